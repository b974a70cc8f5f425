//! A connection over TCP or a Unix socket, encrypted or not, and the addresses of both.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, SocketAddrV6, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::netdevice::name_to_index;
use rustix::net::sockopt;
use serde::{Deserialize, Serialize};

use super::TransportError;
use super::sealed::Seal;

/// Default timeout of a write to a peer that does not read, see [`Connection::set_send_timeout`].
pub const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Idle time of a TCP connection before the first keepalive probe.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;
/// The system treats zero as "no timeout", so an expired deadline uses this value instead.
const TIMEOUT_MIN: Duration = Duration::from_millis(1);

/// Address of a listener, written `HOST:PORT` or `unix:PATH`. [`resolve`] handles the first form.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Address {
    /// `HOST:PORT`; an IPv6 host is in brackets. Names are resolved at each connection attempt.
    Tcp(String),
    /// Path of a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Address {
    type Err = TransportError;

    fn from_str(text: &str) -> Result<Self, TransportError> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let is_port = |(host, port): (&str, &str)| !host.is_empty() && port.parse::<u16>().is_ok();
        match text.rsplit_once(':').is_some_and(is_port) {
            true => Ok(Self::Tcp(text.into())),
            false => Err(TransportError::Address { text: text.into() }),
        }
    }
}

/// Resolves `HOST:PORT`. The zone of an IPv6 address is a number or the name of an interface of this node:
/// `[fe80::1%eth0]:29400`.
///
/// # Errors
/// System errors, such as an unknown host or interface.
pub fn resolve(address: &str) -> io::Result<Vec<SocketAddr>> {
    let parts = address.strip_prefix('[').and_then(|rest| rest.split_once("]:"));
    let zoned = parts.and_then(|(host, port)| host.split_once('%').map(|(ip, zone)| (ip, zone, port)));
    let Some((ip, zone, port)) = zoned else { return Ok(address.to_socket_addrs()?.collect()) };
    let (Ok(ip), Ok(port)) = (ip.parse(), port.parse()) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let id = match zone.parse() {
        Ok(id) => id,
        Err(_) => name_to_index(UnixDatagram::unbound()?, zone)
            .map_err(|cause| io::Error::new(cause.kind(), format!("interface {zone}: {cause}")))?,
    };
    Ok(vec![SocketAddrV6::new(ip, port, 0, id).into()])
}

/// Removes the zone for use on other nodes: a zone is valid only on its own node.
pub fn without_zone(address: SocketAddr) -> SocketAddr {
    (address.ip(), address.port()).into()
}

/// Adds the zone of an own address to a peer's link-local address; returns other addresses unchanged.
pub fn with_zone_of(peer: SocketAddr, own: SocketAddr) -> SocketAddr {
    match (peer, own) {
        (SocketAddr::V6(peer), SocketAddr::V6(own)) if peer.ip().is_unicast_link_local() && peer.scope_id() == 0 => {
            SocketAddrV6::new(*peer.ip(), peer.port(), 0, own.scope_id()).into()
        }
        _ => peer,
    }
}

/// A connected socket, blocking unless [`Connection::set_nonblocking`] changes it. Reads have no timeout unless
/// [`Connection::set_read_timeout`] sets one. If it is encrypted, call [`Write::flush`] after the last write: a non-blocking or
/// timed-out write may leave a part unsent that it has accepted.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    seal: Option<Arc<Seal>>,
}

/// The socket of a [`Connection`].
#[derive(Debug)]
pub enum Socket {
    /// Between nodes, or over loopback.
    Tcp(TcpStream),
    /// Within a node.
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

/// Applies the same call to both kinds of sockets.
macro_rules! each {
    ($connection:expr, $stream:ident => $call:expr) => {
        match &$connection.socket {
            Socket::Tcp($stream) => $call,
            Socket::Unix($stream) => $call,
        }
    };
}

impl Connection {
    /// Clones the handle, for use in another thread.
    ///
    /// # Errors
    /// System errors.
    pub fn try_clone(&self) -> io::Result<Self> {
        let socket = match &self.socket {
            Socket::Tcp(stream) => Socket::Tcp(stream.try_clone()?),
            Socket::Unix(stream) => Socket::Unix(stream.try_clone()?),
        };
        Ok(Self { socket, seal: self.seal.clone() })
    }

    /// Encrypts all further bytes in both directions.
    pub(super) fn seal(&mut self, seal: Seal) {
        self.seal = Some(Arc::new(seal));
    }

    /// The socket of a plain connection; an encrypted one is returned as it is.
    ///
    /// # Errors
    /// The connection.
    pub fn into_socket(self) -> Result<Socket, Self> {
        if self.seal.is_some() { Err(self) } else { Ok(self.socket) }
    }

    /// The socket, to wait until it is ready.
    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// True if it is encrypted.
    pub fn is_sealed(&self) -> bool {
        self.seal.is_some()
    }

    /// Writes as much of `first`, and then of `second`, as is accepted without blocking; in one record if it is encrypted.
    ///
    /// # Errors
    /// System errors.
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
    ///
    /// # Errors
    /// System errors, for example for an unconnected socket.
    pub fn shutdown(&self, direction: Shutdown) -> io::Result<()> {
        each!(self, stream => stream.shutdown(direction))
    }

    /// Sets the read timeout; a read that exceeds it fails with `WouldBlock`. `None` disables the timeout.
    ///
    /// # Errors
    /// System errors.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        each!(self, stream => stream.set_read_timeout(timeout))
    }

    /// Sets the write timeout. A write that makes no progress for this time fails with `WouldBlock`. If the peer's
    /// machine does not acknowledge bytes for this time, the TCP connection fails with `TimedOut`, even without a
    /// pending write. This includes a live peer that does not read, so receivers must always keep reading.
    ///
    /// # Errors
    /// System errors.
    pub fn set_send_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = timeout.max(TIMEOUT_MIN);
        if let Socket::Tcp(stream) = &self.socket {
            sockopt::set_tcp_user_timeout(stream, timeout.as_millis().min(u32::MAX.into()) as u32)?;
        }
        each!(self, stream => stream.set_write_timeout(Some(timeout)))
    }

    /// Enables or disables nonblocking mode. A new connection is blocking.
    ///
    /// # Errors
    /// System errors.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        each!(self, stream => stream.set_nonblocking(nonblocking))
    }

    /// True for a Unix socket, which can transfer descriptors.
    pub fn is_unix(&self) -> bool {
        matches!(self.socket, Socket::Unix(_))
    }

    /// The peer's address, for error messages.
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

    /// True if the connection is closed or broken and nothing is left to read. Does not block.
    pub fn is_closed(&self) -> bool {
        use rustix::net::RecvFlags;
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(self, &mut [0u8; 1][..], flags) {
            Ok((bytes, _)) => bytes == 0,
            Err(error) => error != rustix::io::Errno::AGAIN && error != rustix::io::Errno::INTR,
        }
    }

    /// Returns a wrapper whose reads and writes end by a deadline.
    pub fn until(&self, deadline: Instant) -> DeadlineConnection<'_> {
        DeadlineConnection { connection: self, deadline }
    }

    /// Configures an authenticated connection: blocking mode, keepalive probes and the write timeout.
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

/// Reads and writes of a connection that fail with `TimedOut` after a deadline, even if bytes keep arriving slowly. It
/// changes the connection's timeouts.
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
}

/// Maps `WouldBlock`, which the system returns on a timeout, to `TimedOut`.
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
        let left = self.time_left()?;
        each!(self.connection, stream => stream.set_write_timeout(left))?;
        let mut connection = self.connection;
        connection.write(buffer).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        let left = self.time_left()?;
        each!(self.connection, stream => stream.set_write_timeout(left))?;
        let mut connection = self.connection;
        connection.flush().map_err(timed_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_is_a_number_or_an_interface_name() {
        let zone = |text: &str| match resolve(text).map(|all| all[0]) {
            Ok(SocketAddr::V6(address)) => Ok((address.ip().to_string(), address.port(), address.scope_id())),
            other => Err(format!("{other:?}")),
        };
        let loopback = name_to_index(UnixDatagram::unbound().unwrap(), "lo").unwrap();
        assert_eq!(zone("[fe80::1%lo]:7"), Ok(("fe80::1".into(), 7, loopback)));
        assert_eq!(zone("[fe80::1%3]:7"), Ok(("fe80::1".into(), 7, 3)));
        assert_eq!(zone("[::1]:7"), Ok(("::1".into(), 7, 0)));
        assert!(zone("[fe80::1%no-such]:7").unwrap_err().contains("interface no-such"));
        assert!(zone("[x%lo]:7").is_err() && zone("[fe80::1%lo]").is_err());
        assert_eq!(resolve("127.0.0.1:7").unwrap(), ["127.0.0.1:7".parse().unwrap()]);
    }

    #[test]
    fn a_zone_is_used_only_on_its_node() {
        let (own, peer): (SocketAddr, SocketAddr) = ("[fe80::1%5]:1".parse().unwrap(), "[fe80::2]:9".parse().unwrap());
        assert_eq!(without_zone(own), "[fe80::1]:1".parse().unwrap());
        assert_eq!(with_zone_of(peer, own), "[fe80::2%5]:9".parse().unwrap());
        for other in ["[fd00::2]:9", "10.0.0.1:9", "[fe80::2%7]:9"] {
            assert_eq!(with_zone_of(other.parse().unwrap(), own), other.parse().unwrap());
        }
    }
}
