//! A connection over TCP or a Unix socket, encrypted or not.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::sockopt;

use super::address::Address;
use super::sealed::Seal;

/// Default timeout for a write if the peer does not read. See [`Connection::set_send_timeout`].
pub const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a TCP connection is idle before the first keepalive probe.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;
/// Minimum of a socket timeout. For the system, a timeout of zero means "no timeout".
const TIMEOUT_MIN: Duration = Duration::from_millis(1);

/// A connected socket. By default it is blocking and has no read timeout. If the connection is encrypted, call
/// [`Write::flush`] after the last write: a non-blocking or timed-out write may leave accepted bytes unsent.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    seal: Option<Arc<Seal>>,
}

/// The socket of a [`Connection`].
#[derive(Debug)]
pub enum Socket {
    /// A connection between nodes, or over loopback.
    Tcp(TcpStream),
    /// A connection within a node.
    Unix(UnixStream),
}

impl From<TcpStream> for Connection {
    fn from(stream: TcpStream) -> Self {
        Self { socket: Socket::Tcp(stream), seal: None }
    }
}

impl From<UnixStream> for Connection {
    fn from(stream: UnixStream) -> Self {
        Self { socket: Socket::Unix(stream), seal: None }
    }
}

/// Calls the same method on both kinds of sockets.
macro_rules! each {
    ($connection:expr, $stream:ident => $call:expr) => {
        match &$connection.socket {
            Socket::Tcp($stream) => $call,
            Socket::Unix($stream) => $call,
        }
    };
}

impl Connection {
    /// Clones the handle for use in another thread.
    pub fn try_clone(&self) -> io::Result<Self> {
        let plain: Self = each!(self, stream => stream.try_clone()?.into());
        Ok(Self { seal: self.seal.clone(), ..plain })
    }

    /// Encrypts all further bytes in both directions.
    pub(super) fn seal(&mut self, seal: Seal) {
        self.seal = Some(Arc::new(seal));
    }

    /// Returns the socket of an unencrypted connection. The error is the connection itself, if it is encrypted.
    pub fn into_socket(self) -> Result<Socket, Self> {
        if self.seal.is_some() { Err(self) } else { Ok(self.socket) }
    }

    /// The socket, for waiting until it is ready.
    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// True if the connection is encrypted.
    pub fn is_sealed(&self) -> bool {
        self.seal.is_some()
    }

    /// Writes as much of `first` and then `second` as the socket accepts in one call. An encrypted connection writes at
    /// most one record.
    pub fn write_both(&self, first: &[u8], second: &[u8]) -> io::Result<usize> {
        match &self.seal {
            Some(seal) => each!(self, stream => seal.write(stream, first, second)),
            None => each!(self, stream => (&mut &*stream).write_vectored(&[IoSlice::new(first), IoSlice::new(second)])),
        }
    }

    /// True if [`Write::flush`] has bytes to send.
    pub fn has_unsent(&self) -> bool {
        self.seal.as_ref().is_some_and(|seal| seal.has_unsent())
    }

    /// Closes one or both directions for all handles; a blocked read returns 0 bytes.
    pub fn shutdown(&self, direction: Shutdown) -> io::Result<()> {
        each!(self, stream => stream.shutdown(direction))
    }

    /// Sets the read timeout. A read that takes longer fails with `WouldBlock`. `None` disables the timeout.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        each!(self, stream => stream.set_read_timeout(timeout))
    }

    /// Sets the send timeout. A write without progress for this long fails with `WouldBlock`. A TCP connection also
    /// fails, with `TimedOut`, if for this long the peer's machine acknowledges no sent bytes or the peer reads none of
    /// them. This can happen after the last write, so the peer must keep reading.
    pub fn set_send_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = timeout.max(TIMEOUT_MIN);
        if let Socket::Tcp(stream) = &self.socket {
            sockopt::set_tcp_user_timeout(stream, timeout.as_millis().min(u32::MAX.into()) as u32)?;
        }
        each!(self, stream => stream.set_write_timeout(Some(timeout)))
    }

    /// Enables or disables nonblocking mode. A new connection is in blocking mode.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        each!(self, stream => stream.set_nonblocking(nonblocking))
    }

    /// True for a Unix socket, which can transfer file descriptors.
    pub fn is_unix(&self) -> bool {
        matches!(self.socket, Socket::Unix(_))
    }

    /// The peer's address, for use in error messages.
    pub fn peer(&self) -> String {
        match &self.socket {
            Socket::Tcp(stream) => stream.peer_addr().map_or_else(|_| "a closed connection".into(), |a| a.to_string()),
            Socket::Unix(stream) => {
                let address = stream.peer_addr().ok();
                let path = address.as_ref().and_then(|a| a.as_pathname());
                path.map_or_else(|| "a local process".into(), |path| Address::Unix(path.into()).to_string())
            }
        }
    }

    /// True if the connection is closed or broken and has no more data to read. Does not block.
    pub fn is_closed(&self) -> bool {
        use rustix::net::RecvFlags;
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(self, &mut [0u8; 1][..], flags) {
            Ok((bytes, _)) => bytes == 0,
            Err(error) => error != rustix::io::Errno::AGAIN && error != rustix::io::Errno::INTR,
        }
    }

    /// Returns a wrapper whose reads and writes fail after a deadline.
    pub fn until(&self, deadline: Instant) -> DeadlineConnection<'_> {
        DeadlineConnection { connection: self, deadline }
    }

    /// Configures an authenticated connection: blocking mode, keepalive probes and write timeout.
    pub(super) fn configure(&self) -> io::Result<()> {
        if let Socket::Tcp(stream) = &self.socket {
            sockopt::set_socket_keepalive(stream, true)?;
            sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
            sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
            sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
        }
        self.set_nonblocking(false)?;
        self.set_read_timeout(None)?;
        self.set_send_timeout(SEND_TIMEOUT)
    }
}

impl Read for &Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.seal {
            Some(seal) => each!(self, stream => seal.read(stream, buffer)),
            None => each!(self, stream => (&mut &*stream).read(buffer)),
        }
    }
}

impl Write for &Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &self.seal {
            Some(seal) => each!(self, stream => seal.write(stream, buffer, &[])),
            None => each!(self, stream => (&mut &*stream).write(buffer)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &self.seal {
            Some(seal) => each!(self, stream => seal.flush(stream)),
            None => Ok(()),
        }
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Write for Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&*self).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&*self).flush()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        each!(self, stream => stream.as_fd())
    }
}

/// A connection whose reads and writes fail with `TimedOut` after a deadline, even if bytes keep arriving slowly.
#[derive(Debug)]
pub struct DeadlineConnection<'a> {
    connection: &'a Connection,
    deadline: Instant,
}

impl DeadlineConnection<'_> {
    fn time_left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left.max(TIMEOUT_MIN))),
        }
    }

    fn send<R>(&self, send: impl FnOnce(&Connection) -> io::Result<R>) -> io::Result<R> {
        let left = self.time_left()?;
        each!(self.connection, stream => stream.set_write_timeout(left))?;
        send(self.connection).map_err(timed_out)
    }
}

/// Turns `WouldBlock`, which the system returns on a timeout, into `TimedOut`.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

impl Read for DeadlineConnection<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.connection.set_read_timeout(self.time_left()?)?;
        let mut connection = self.connection;
        connection.read(buffer).map_err(timed_out)
    }
}

impl Write for DeadlineConnection<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.send(|mut connection| connection.write(buffer))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send(|mut connection| connection.flush())
    }
}
