//! The control plane: a node of ractor_cluster on a thread of its own, over connections that were authenticated before.
//!
//! ractor_cluster's own handshake, with a cookie, comes on top. Its sessions mirror every actor whose messages can be
//! serialized, process-wide; ours is the only one. A mirror is found by its name below the session that it belongs to. Not by
//! a process group: those tell mirrors apart by numbers that repeat when several nodes live in one process, as in tests.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::node::{NodeServerSessionInformation, NodeSessionMessage};
use ractor_cluster::{BoxRead, BoxWrite, ClusterBidiStream, NodeEventSubscription, NodeServer, NodeServerMessage};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::oneshot;
use tokio::time::{Sleep, sleep, timeout};

use super::letter::{MESSAGE_BYTES_MAX, Mail};
use super::shared::Shared;
use super::{MembershipError, exit};
use crate::transport::Connection;

/// A frame of ractor_cluster: a letter with its envelope.
const FRAME_BYTES_MAX: u64 = 2 * MESSAGE_BYTES_MAX as u64;
/// ractor lets a stop overtake what was received before it, so the end of a stream is held back until that is through.
const END_DELAY: Duration = Duration::from_millis(50);
/// How long actors may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// The running thread; dropping it ends it, within [`STOP_TIMEOUT`].
#[derive(Debug)]
pub(crate) struct Control {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Control {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there would be a bug that its own message tells.
            let _ = thread.join();
        }
    }
}

/// Starts the node; connections become ready later. `scope` tells this session from all others.
pub(crate) fn start(
    shared: Arc<Shared>,
    links: BTreeMap<u32, Connection>,
    key: &[u8; 32],
    scope: String,
) -> Result<Control, MembershipError> {
    let failed = |what| move |source| MembershipError::Io { what, source };
    let cookie = blake3::Hash::from_bytes(blake3::derive_key("shardflow control cookie v1", key)).to_string();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(failed("start the control plane's runtime"))?;
    let guard = runtime.enter();
    let mut streams = Vec::new();
    for (process, link) in links {
        let stream = Stream::new(process, link).map_err(failed("prepare a control connection"))?;
        streams.push((process, stream));
    }
    drop(guard);
    let (stop, stopped) = oneshot::channel::<()>();
    let run = async move {
        if let Err(error) = run(&shared, streams, cookie, scope, stopped).await {
            shared.fail(format!("its control plane failed: {error}"), exit::INTERNAL);
        }
    };
    let thread = thread::Builder::new().name("control".into()).spawn(move || runtime.block_on(run));
    let thread = thread.map_err(failed("start the control plane's thread"))?;
    Ok(Control { stop: Some(stop), thread: Some(thread) })
}

async fn run(
    shared: &Arc<Shared>,
    streams: Vec<(u32, Stream)>,
    cookie: String,
    scope: String,
    stopped: oneshot::Receiver<()>,
) -> Result<(), ActorProcessingErr> {
    let name = member_name(&scope, shared.own);
    let (member, mut member_end) = Actor::spawn(Some(name), Member, shared.clone()).await?;
    // The name and port together must differ between nodes, or a node takes its peer for itself.
    let host = format!("{scope}.{}", shared.own);
    let server = NodeServer::new(0, cookie, format!("process-{}", shared.own), host, None, None)
        .with_listen_addr(IpAddr::V4(Ipv4Addr::LOCALHOST))
        .with_max_inbound_frame_size(FRAME_BYTES_MAX);
    let (server, mut server_end) = Actor::spawn(None, server, ()).await?;
    close_port(&server);
    let events = Events { shared: shared.clone(), scope };
    server.cast(NodeServerMessage::SubscribeToEvents { id: "membership".into(), subscription: Box::new(events) })?;
    for (process, stream) in streams {
        let is_server = shared.own < process;
        server.cast(NodeServerMessage::ConnectionOpenedExternal { stream: Box::new(stream), is_server })?;
    }
    tokio::select! {
        _ = stopped => {}
        _ = &mut server_end => return Err("the node stopped".into()),
        _ = &mut member_end => return Err("the member stopped".into()),
    }
    member.stop(None);
    server.stop(None);
    // Whatever takes longer ends with the runtime.
    let _ = timeout(STOP_TIMEOUT, async { (member_end.await, server_end.await) }).await;
    Ok(())
}

/// A node always opens a port for others to connect to, and opens it again when it closes. Peers come over connections that
/// we made, so the listener is taken from the node and killed (it waits in a handler, where a stop does not reach it).
fn close_port(server: &ActorRef<NodeServerMessage>) {
    for listener in server.get_children() {
        listener.unlink(server.get_cell());
        listener.kill();
    }
}

fn member_name(scope: &str, process: u32) -> String {
    format!("{scope} member {process}")
}

/// Takes the letters of all peers.
struct Member;

impl Actor for Member {
    type Msg = Mail;
    type State = Arc<Shared>;
    type Arguments = Arc<Shared>;

    async fn pre_start(&self, _: ActorRef<Mail>, shared: Arc<Shared>) -> Result<Arc<Shared>, ActorProcessingErr> {
        Ok(shared)
    }

    async fn handle(&self, _: ActorRef<Mail>, mail: Mail, shared: &mut Arc<Shared>) -> Result<(), ActorProcessingErr> {
        shared.take(mail);
        Ok(())
    }
}

/// Hears of sessions, on the node's thread.
struct Events {
    shared: Arc<Shared>,
    scope: String,
}

impl Events {
    /// The process at the other end, which the stream's label tells.
    fn process(session: &NodeServerSessionInformation) -> Option<u32> {
        session.peer_addr.strip_prefix(LABEL)?.parse().ok()
    }

    /// The peer's member, as mirrored by this session.
    fn mirror(&self, process: u32, session: &ActorRef<NodeSessionMessage>) -> Option<ActorRef<Mail>> {
        let name = member_name(&self.scope, process);
        let mirrors = session.get_children().into_iter().filter(|c| !c.get_id().is_local());
        mirrors.into_iter().find(|m| m.get_name().as_ref() == Some(&name)).map(ActorRef::from)
    }
}

impl NodeEventSubscription for Events {
    fn node_session_opened(&self, _: NodeServerSessionInformation) {}

    fn node_session_authenticated(&self, _: NodeServerSessionInformation) {}

    fn node_session_ready(&self, session: NodeServerSessionInformation) {
        let Some(process) = Self::process(&session) else { return };
        match self.mirror(process, &session.actor) {
            Some(member) => self.shared.connected(process, member),
            None => {
                tracing::error!(process, "the peer has no member of this session: another epoch?");
                session.actor.stop(None);
            }
        }
    }

    fn node_session_disconnected(&self, session: NodeServerSessionInformation) {
        if let Some(process) = Self::process(&session) {
            self.shared.disconnected(process);
        }
    }
}

const LABEL: &str = "process ";

/// A link as ractor_cluster takes it.
struct Stream {
    process: u32,
    read: BoxRead,
    write: BoxWrite,
}

impl Stream {
    /// Within a runtime.
    fn new(process: u32, link: Connection) -> io::Result<Self> {
        let (read, write): (BoxRead, BoxWrite) = match link {
            Connection::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                let (read, write) = tokio::net::TcpStream::from_std(stream)?.into_split();
                (Box::new(read), Box::new(write))
            }
            Connection::Unix(stream) => {
                stream.set_nonblocking(true)?;
                let (read, write) = tokio::net::UnixStream::from_std(stream)?.into_split();
                (Box::new(read), Box::new(write))
            }
        };
        Ok(Self { process, read: Box::new(LateEnd { read, end: None }), write })
    }
}

impl ClusterBidiStream for Stream {
    fn split(self: Box<Self>) -> (BoxRead, BoxWrite) {
        (self.read, self.write)
    }

    fn peer_label(&self) -> Option<String> {
        Some(format!("{LABEL}{}", self.process))
    }
}

/// Tells the end of a stream, orderly or not, [`END_DELAY`] late.
struct LateEnd {
    read: BoxRead,
    end: Option<Pin<Box<Sleep>>>,
}

impl AsyncRead for LateEnd {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.end.is_none() {
            let filled = buffer.filled().len();
            match Pin::new(&mut self.read).poll_read(cx, buffer) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) if buffer.filled().len() > filled => return Poll::Ready(Ok(())),
                Poll::Ready(_) => self.end = Some(Box::pin(sleep(END_DELAY))),
            }
        }
        // Nothing filled: the end.
        self.end.as_mut().map_or(Poll::Pending, |end| end.as_mut().poll(cx).map(Ok))
    }
}
