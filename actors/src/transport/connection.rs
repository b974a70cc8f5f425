//! One connection, over TCP or a Unix socket, and addresses of either.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, SocketAddrV6, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::net::netdevice::name_to_index;
use rustix::net::sockopt;
use serde::{Deserialize, Serialize};

use super::TransportError;

/// How long a write may wait for a peer that takes nothing, unless [`Link::set_send_timeout`] says otherwise.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// A silent TCP connection is probed after this long, and then again and again.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;
/// Zero means "no time-out" to the system, so a passed deadline waits this long instead.
const TIMEOUT_MIN: Duration = Duration::from_millis(1);

/// Where a process listens. Written `HOST:PORT` or `unix:PATH`; [`resolve`] reads the first.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Address {
    /// `HOST:PORT`; an IPv6 host stands in brackets. Names are looked up at each attempt to connect.
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

/// The addresses that `HOST:PORT` stands for. Of an IPv6 address in brackets, the zone is a number or the name of an interface of
/// this node: `[fe80::1%eth0]:29400`.
///
/// # Errors
/// Those of the system: no such host, no such interface.
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

/// The address for other nodes: a zone has a meaning on its own node only.
pub fn without_zone(address: SocketAddr) -> SocketAddr {
    (address.ip(), address.port()).into()
}

/// A peer's link-local address in the zone of an address of this node; any other address as it is.
pub fn with_zone_of(peer: SocketAddr, own: SocketAddr) -> SocketAddr {
    match (peer, own) {
        (SocketAddr::V6(peer), SocketAddr::V6(own)) if peer.ip().is_unicast_link_local() && peer.scope_id() == 0 => {
            SocketAddrV6::new(*peer.ip(), peer.port(), 0, own.scope_id()).into()
        }
        _ => peer,
    }
}

/// A connected socket. Blocking; reads wait without end unless [`Link::set_read_timeout`] says otherwise.
#[derive(Debug)]
pub enum Connection {
    /// To another node, or over loopback.
    Tcp(TcpStream),
    /// Within a node.
    Unix(UnixStream),
}

impl From<TcpStream> for Connection {
    fn from(stream: TcpStream) -> Self {
        Self::Tcp(stream)
    }
}

impl From<UnixStream> for Connection {
    fn from(stream: UnixStream) -> Self {
        Self::Unix(stream)
    }
}

/// Does the same to either kind of socket.
macro_rules! each {
    ($link:expr, $stream:ident => $call:expr) => {
        match $link {
            Connection::Tcp($stream) => $call,
            Connection::Unix($stream) => $call,
        }
    };
}

impl Connection {
    /// A second handle to the same connection, for another thread.
    ///
    /// # Errors
    /// Those of the system.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
        })
    }

    /// Ends both directions for all handles: a read that waits returns 0 bytes.
    ///
    /// # Errors
    /// Those of the system; an unconnected socket for one.
    pub fn shutdown(&self) -> io::Result<()> {
        each!(self, stream => stream.shutdown(Shutdown::Both))
    }

    /// A read that waits longer fails with `WouldBlock`. `None`: for ever.
    ///
    /// # Errors
    /// Those of the system.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        each!(self, stream => stream.set_read_timeout(timeout))
    }

    /// A write that gets rid of nothing for longer fails with `WouldBlock`; where the peer's machine has not confirmed
    /// bytes for so long, the TCP connection ends with `TimedOut`, waiting or not. A peer that lives but reads nothing for so
    /// long is ended too, so whoever receives must always read on.
    ///
    /// # Errors
    /// Those of the system.
    pub fn set_send_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = timeout.max(TIMEOUT_MIN);
        if let Self::Tcp(stream) = self {
            sockopt::set_tcp_user_timeout(stream, timeout.as_millis().min(u32::MAX.into()) as u32)?;
        }
        each!(self, stream => stream.set_write_timeout(Some(timeout)))
    }

    /// Whether reads and writes return at once. A new link blocks.
    ///
    /// # Errors
    /// Those of the system.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        each!(self, stream => stream.set_nonblocking(nonblocking))
    }

    /// True for a Unix socket, which can pass descriptors.
    pub fn is_unix(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// The other side, for messages.
    pub fn peer(&self) -> String {
        match self {
            Self::Tcp(stream) => stream.peer_addr().map_or_else(|_| "a closed connection".into(), |a| a.to_string()),
            Self::Unix(stream) => {
                let address = stream.peer_addr().ok();
                let path = address.as_ref().and_then(|a| a.as_pathname());
                path.map_or_else(|| "a local process".into(), |path| Address::Unix(path.into()).to_string())
            }
        }
    }

    /// True when the peer has closed the connection, or it broke, and nothing is left to read. Waits for nothing.
    pub fn is_closed(&self) -> bool {
        use rustix::net::RecvFlags;
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(self, &mut [0u8; 1][..], flags) {
            Ok((bytes, _)) => bytes == 0,
            Err(error) => error != rustix::io::Errno::AGAIN && error != rustix::io::Errno::INTR,
        }
    }

    /// Reads and writes that all end by a deadline.
    pub fn until(&self, deadline: Instant) -> DeadlineConnection<'_> {
        DeadlineConnection { link: self, deadline }
    }

    /// What every authenticated link has: no delay, probes of a silent peer, an end to writes.
    pub(super) fn settle(&self) -> io::Result<()> {
        if let Self::Tcp(stream) = self {
            stream.set_nodelay(true)?;
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
        each!(self, stream => (&*stream).read(buffer))
    }
}

impl Write for &Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        each!(self, stream => (&*stream).write(buffer))
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        each!(self, stream => (&*stream).write_vectored(buffers))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self).write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        each!(self, stream => stream.as_fd())
    }
}

/// Reads and writes of a link that fail with `TimedOut` once a deadline has passed, however slowly bytes drip in. It leaves
/// the link's time-outs changed.
#[derive(Debug)]
pub struct DeadlineConnection<'a> {
    link: &'a Connection,
    deadline: Instant,
}

impl DeadlineConnection<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left.max(TIMEOUT_MIN))),
        }
    }
}

/// The system says `WouldBlock` when a time-out passes.
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

impl Read for DeadlineConnection<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.link.set_read_timeout(self.left()?)?;
        let mut link = self.link;
        link.read(buffer).map_err(timed_out)
    }
}

impl Write for DeadlineConnection<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let left = self.left()?;
        each!(self.link, stream => stream.set_write_timeout(left))?;
        let mut link = self.link;
        link.write(buffer).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_are_numbers_or_names_of_interfaces() {
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
    fn a_zone_stays_on_its_node() {
        let (own, peer): (SocketAddr, SocketAddr) = ("[fe80::1%5]:1".parse().unwrap(), "[fe80::2]:9".parse().unwrap());
        assert_eq!(without_zone(own), "[fe80::1]:1".parse().unwrap());
        assert_eq!(with_zone_of(peer, own), "[fe80::2%5]:9".parse().unwrap());
        for other in ["[fd00::2]:9", "10.0.0.1:9", "[fe80::2%7]:9"] {
            assert_eq!(with_zone_of(other.parse().unwrap(), own), other.parse().unwrap());
        }
    }
}
