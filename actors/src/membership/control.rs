//! The control plane: one thread that exchanges control messages with all peers, over connections that the caller has
//! authenticated.
//!
//! Each end first sends an [`Opening`], which proves that both belong to one session and epoch. Control messages follow,
//! each after its length, a little-endian u32.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::MembershipError;
use super::control_message::{CONTROL_BYTES_MAX, ControlMessage, OPENING_BYTES, Opening};
use super::outbox::{Outbox, Waiting};
use super::shared::Shared;
use crate::transport::Connection;

/// The running thread. Dropping it closes all connections and ends the thread.
#[derive(Debug)]
pub(crate) struct ControlThread {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for ControlThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has printed its own message.
            let _ = thread.join();
        }
    }
}

/// Starts the thread. Connections become ready later: [`Shared::connected`].
pub(crate) fn start(
    shared: Arc<Shared>,
    connections: BTreeMap<u32, Connection>,
    session: [u8; 16],
    key: &[u8; 32],
) -> Result<ControlThread, MembershipError> {
    let failed = |operation| move |source| MembershipError::Io { operation, source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(failed("start the control plane's runtime"))?;
    let guard = runtime.enter();
    let (key, opening) = (Opening::key(key), Opening { session, epoch: shared.epoch, from: shared.own });
    let mut peers = JoinSet::new();
    for (process, connection) in connections {
        let halves = halves(connection).map_err(failed("prepare a control connection"))?;
        peers.spawn_on(exchange(shared.clone(), process, halves, opening, key), runtime.handle());
    }
    drop(guard);
    let (stop, stopped) = oneshot::channel::<()>();
    let run = async move {
        // An error means that the sender was dropped, which is the signal.
        let _ = stopped.await;
        peers.shutdown().await;
    };
    let thread = thread::Builder::new().name("control".into()).spawn(move || runtime.block_on(run));
    let thread = thread.map_err(failed("start the control plane's thread"))?;
    Ok(ControlThread { stop: Some(stop), thread: Some(thread) })
}

type Read = Box<dyn AsyncRead + Send + Unpin>;
type Write = Box<dyn AsyncWrite + Send + Unpin>;

/// Needs a runtime's context.
fn halves(connection: Connection) -> io::Result<(Read, Write)> {
    Ok(match connection {
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
    })
}

/// Serves the connection to one peer until either direction ends.
async fn exchange(shared: Arc<Shared>, process: u32, (read, write): (Read, Write), opening: Opening, key: [u8; 32]) {
    let (outbox, waiting) = Outbox::new();
    tokio::select! {
        // Messages that have arrived are handled before the connection's end, whichever direction ends first.
        biased;
        ended = receive(&shared, process, read, outbox, opening, &key) => report(process, ended),
        ended = send(write, waiting, opening.write(&key)) => report(process, ended),
    }
    shared.disconnected(process);
}

fn report(process: u32, ended: io::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(process, %error, "a control connection ended");
    }
}

async fn send(mut write: Write, mut waiting: Waiting, opening: [u8; OPENING_BYTES]) -> io::Result<()> {
    write.write_all(&opening).await?;
    while let Some(message) = waiting.next().await {
        write.write_all(&(message.bytes.len() as u32).to_le_bytes()).await?;
        write.write_all(&message.bytes).await?;
        waiting.written(&message);
    }
    Ok(())
}

async fn receive(
    shared: &Shared,
    process: u32,
    mut read: Read,
    outbox: Outbox,
    own: Opening,
    key: &[u8; 32],
) -> io::Result<()> {
    let mut opening = [0; OPENING_BYTES];
    read.read_exact(&mut opening).await?;
    if let Err(rejection) = (Opening { from: process, ..own }).check(&opening, key) {
        tracing::error!(
            process,
            ?rejection,
            "the peer's control connection belongs to another session, epoch or secret"
        );
        shared.reject(rejection);
        return Ok(());
    }
    shared.connected(process, outbox);
    loop {
        let mut length = [0; 4];
        read.read_exact(&mut length).await?;
        let length = u32::from_le_bytes(length) as usize;
        if length > CONTROL_BYTES_MAX {
            shared.garbled(process, "too long");
            return Ok(());
        }
        let mut bytes = vec![0; length];
        read.read_exact(&mut bytes).await?;
        match ControlMessage::read(&bytes) {
            Ok(message) => shared.receive(process, message),
            Err(why) => shared.garbled(process, why),
        }
    }
}
