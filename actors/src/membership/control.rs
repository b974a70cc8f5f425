//! The control plane: a ractor_cluster node on its own thread, over authenticated connections.
//!
//! ractor_cluster also runs its own handshake with a cookie. Its sessions mirror every actor of the process whose
//! messages are serializable; the member actor is the only one. A mirror is found by its name among the children of its
//! session. Process groups do not work: they identify mirrors by numbers that repeat when one process has several
//! nodes, as in tests.

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

use super::letter::{MESSAGE_BYTES_MAX, Received};
use super::shared::Shared;
use super::{MembershipError, exit};
use crate::transport::Connection;

/// Maximum size of a ractor_cluster frame: a control message with its envelope.
const FRAME_BYTES_MAX: u64 = 2 * MESSAGE_BYTES_MAX as u64;
/// In ractor, a stop overtakes messages received before it, so the end of a stream is reported with this delay.
const END_DELAY: Duration = Duration::from_millis(50);
/// Timeout for actors to stop.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// The running thread; dropping it ends the thread within [`STOP_TIMEOUT`].
#[derive(Debug)]
pub(crate) struct ControlThread {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for ControlThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread is a bug; the panic hook has reported it.
            let _ = thread.join();
        }
    }
}

/// Starts the node; connections become ready later. `scope` identifies this session.
pub(crate) fn start(
    shared: Arc<Shared>,
    connections: BTreeMap<u32, Connection>,
    key: &[u8; 32],
    scope: String,
) -> Result<ControlThread, MembershipError> {
    let failed = |operation| move |source| MembershipError::Io { operation, source };
    let cookie = blake3::Hash::from_bytes(blake3::derive_key("shardflow control cookie v1", key)).to_string();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(failed("start the control plane's runtime"))?;
    let guard = runtime.enter();
    let mut streams = Vec::new();
    for (process, connection) in connections {
        let stream = Stream::new(process, connection).map_err(failed("prepare a control connection"))?;
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
    Ok(ControlThread { stop: Some(stop), thread: Some(thread) })
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
    // Name and port together must be unique per node; otherwise a node takes its peer for itself.
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
    // Actors that take longer end with the runtime.
    let _ = timeout(STOP_TIMEOUT, async { (member_end.await, server_end.await) }).await;
    Ok(())
}

/// Closes the port that a node always opens, and reopens when it closes. Peers use the given connections only, so the
/// listener actor is unlinked from the node and killed; a stop would not reach it, because it waits in a handler.
fn close_port(server: &ActorRef<NodeServerMessage>) {
    for listener in server.get_children() {
        listener.unlink(server.get_cell());
        listener.kill();
    }
}

fn member_name(scope: &str, process: u32) -> String {
    format!("{scope} member {process}")
}

/// Receives the control messages of all peers.
struct Member;

impl Actor for Member {
    type Msg = Received;
    type State = Arc<Shared>;
    type Arguments = Arc<Shared>;

    async fn pre_start(&self, _: ActorRef<Received>, shared: Arc<Shared>) -> Result<Arc<Shared>, ActorProcessingErr> {
        Ok(shared)
    }

    async fn handle(
        &self,
        _: ActorRef<Received>,
        received: Received,
        shared: &mut Arc<Shared>,
    ) -> Result<(), ActorProcessingErr> {
        shared.receive(received);
        Ok(())
    }
}

/// Receives session events on the node's thread.
struct Events {
    shared: Arc<Shared>,
    scope: String,
}

impl Events {
    /// The process at the other end, from the stream's label.
    fn process(session: &NodeServerSessionInformation) -> Option<u32> {
        session.peer_addr.strip_prefix(LABEL)?.parse().ok()
    }

    /// The mirror of the peer's member actor in this session.
    fn mirror(&self, process: u32, session: &ActorRef<NodeSessionMessage>) -> Option<ActorRef<Received>> {
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
                tracing::error!(process, "the peer has no member actor of this session; it may run another epoch");
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

/// A connection in the form that ractor_cluster requires.
struct Stream {
    process: u32,
    read: BoxRead,
    write: BoxWrite,
}

impl Stream {
    /// Must be called within a tokio runtime.
    fn new(process: u32, connection: Connection) -> io::Result<Self> {
        let (read, write): (BoxRead, BoxWrite) = match connection {
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
        Ok(Self { process, read: Box::new(DelayedEnd { read, end: None }), write })
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

/// Reports the end of a stream, orderly or not, with a delay of [`END_DELAY`].
struct DelayedEnd {
    read: BoxRead,
    end: Option<Pin<Box<Sleep>>>,
}

impl AsyncRead for DelayedEnd {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.end.is_none() {
            let filled = buffer.filled().len();
            match Pin::new(&mut self.read).poll_read(cx, buffer) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) if buffer.filled().len() > filled => return Poll::Ready(Ok(())),
                Poll::Ready(_) => self.end = Some(Box::pin(sleep(END_DELAY))),
            }
        }
        // Returning without filling the buffer means the end of the stream.
        self.end.as_mut().map_or(Poll::Pending, |end| end.as_mut().poll(cx).map(Ok))
    }
}
