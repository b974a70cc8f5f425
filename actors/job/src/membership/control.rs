//! The control plane: one thread that exchanges control messages with all peers over authenticated connections. The
//! length of a message precedes the message as a little-endian u32. The first message is [`Body::Joined`].

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::thread;

use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::control_message::{Body, CONTROL_BYTES_MAX, ControlMessage};
use super::error::MembershipError;
use super::outbox::{Outbox, Waiting};
use super::shared::{JoinOnDrop, Shared};
use crate::transport::{Connection, Socket};

/// Starts the control thread. Dropping the first returned value ends the thread. A peer counts as connected after its
/// first message.
pub(super) fn start(
    shared: Arc<Shared>,
    connections: BTreeMap<u32, Connection>,
) -> Result<(oneshot::Sender<()>, JoinOnDrop), MembershipError> {
    let failed = |operation| move |source| MembershipError::Io { operation, source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(failed("start the control plane's runtime"))?;
    let guard = runtime.enter();
    let mut peers = JoinSet::new();
    for (process, connection) in connections {
        let connection = AsyncConnection::new(connection).map_err(failed("prepare a control connection"))?;
        peers.spawn_on(exchange(shared.clone(), process, connection), runtime.handle());
    }
    drop(guard);
    let (stop, stopped) = oneshot::channel::<()>();
    let run = async move {
        // An error means that the sender was dropped. Dropping it is the signal to stop.
        let _ = stopped.await;
        peers.shutdown().await;
    };
    let thread = thread::Builder::new().name("control".into()).spawn(move || runtime.block_on(run));
    let thread = thread.map_err(failed("start the control plane's thread"))?;
    Ok((stop, JoinOnDrop(Some(thread))))
}

/// Serves the connection to one peer until reading or writing ends.
async fn exchange(shared: Arc<Shared>, process: u32, connection: AsyncConnection) {
    let (outbox, waiting) = Outbox::new();
    let ended = tokio::select! {
        // Received messages are handled before the end of the connection, whichever direction ends first.
        biased;
        ended = receive(&shared, process, &connection, outbox) => ended,
        ended = send(&connection, waiting) => ended,
    };
    shared.disconnected(process, &how(ended));
}

/// Describes the end of a control connection: a close or a reset comes from the peer, other errors from the network.
fn how(ended: io::Result<()>) -> String {
    use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match ended {
        Err(error) if !matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof) => {
            format!("its control connection failed: {error}")
        }
        _ => "its control connection closed".into(),
    }
}

async fn send(connection: &AsyncConnection, mut waiting: Waiting) -> io::Result<()> {
    connection.write_message(&ControlMessage::from(Body::Joined).write()).await?;
    while let Some(message) = waiting.messages.recv().await {
        connection.write_message(&message.bytes).await?;
        waiting.written(&message);
    }
    Ok(())
}

async fn receive(shared: &Shared, process: u32, connection: &AsyncConnection, outbox: Outbox) -> io::Result<()> {
    let mut outbox = Some(outbox);
    loop {
        let mut length = [0; 4];
        connection.read_exact(&mut length).await?;
        let length = u32::from_le_bytes(length) as usize;
        if length > CONTROL_BYTES_MAX {
            shared.garbled(process, "the message is too long");
            return Ok(());
        }
        let mut bytes = vec![0; length];
        connection.read_exact(&mut bytes).await?;
        match (ControlMessage::read(&bytes), outbox.take()) {
            (Ok(ControlMessage { body: Body::Joined, .. }), Some(outbox)) => shared.connected(process, outbox),
            (Ok(message), None) => shared.receive(process, message),
            (Ok(_), Some(_)) => {
                shared.garbled(process, "the peer sent a message before it joined");
                return Ok(());
            }
            (Err(why), waiting) => {
                outbox = waiting;
                shared.garbled(process, why);
            }
        }
    }
}

/// A connection, and a second handle of its socket, used to wait for readiness.
struct AsyncConnection {
    connection: Connection,
    ready: Ready,
}

enum Ready {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl AsyncConnection {
    /// Must be called in the context of a tokio runtime.
    fn new(connection: Connection) -> io::Result<Self> {
        connection.set_nonblocking(true)?;
        let ready = match connection.socket() {
            Socket::Tcp(stream) => Ready::Tcp(TcpStream::from_std(stream.try_clone()?)?),
            Socket::Unix(stream) => Ready::Unix(UnixStream::from_std(stream.try_clone()?)?),
        };
        Ok(Self { connection, ready })
    }

    /// Retries `attempt` while it returns `WouldBlock`.
    async fn complete<R>(
        &self,
        interest: Interest,
        mut attempt: impl FnMut(&Connection) -> io::Result<R>,
    ) -> io::Result<R> {
        let attempt = || attempt(&self.connection);
        match &self.ready {
            Ready::Tcp(stream) => stream.async_io(interest, attempt).await,
            Ready::Unix(stream) => stream.async_io(interest, attempt).await,
        }
    }

    async fn read_exact(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.complete(Interest::READABLE, |mut connection| connection.read(buffer)).await? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                bytes => buffer = &mut buffer[bytes..],
            }
        }
        Ok(())
    }

    async fn write_message(&self, message: &[u8]) -> io::Result<()> {
        let bytes = [&(message.len() as u32).to_le_bytes(), message].concat();
        let mut left = &bytes[..];
        while !left.is_empty() {
            let written = self.complete(Interest::WRITABLE, |mut connection| connection.write(left)).await?;
            left = &left[written..];
        }
        self.complete(Interest::WRITABLE, |mut connection| connection.flush()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_network_is_named_and_the_end_of_the_peer_is_not() {
        let kinds = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
        assert!(kinds.into_iter().all(|kind| how(Err(kind.into())) == how(Ok(()))));
        let timed_out = how(Err(io::Error::from_raw_os_error(110)));
        assert_eq!(timed_out, "its control connection failed: Connection timed out (os error 110)");
    }
}
