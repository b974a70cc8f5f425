//! Addresses of listeners, and their resolution.

use std::net::{SocketAddr, SocketAddrV6, ToSocketAddrs};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::{fmt, io};

use rustix::net::netdevice::name_to_index;
use serde::{Deserialize, Serialize};

/// Maximum length of a Unix socket path in bytes: `sun_path` has 108 bytes, including the terminating 0.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

/// Address of a listener, written as `HOST:PORT` or `unix:PATH`. [`resolve`] resolves `HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Address {
    /// `HOST:PORT`, with brackets around an IPv6 host. A name is resolved at each connection attempt.
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

/// Resolves `HOST:PORT`. The zone of an IPv6 address is a number or an interface: `[fe80::1%eth0]:29400`.
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

/// Calls `attempt` for each of `addresses` until one call succeeds. If no call succeeds, returns the last error.
pub(crate) fn first_success<T>(
    addresses: Vec<SocketAddr>,
    mut attempt: impl FnMut(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    let none = Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    addresses.into_iter().fold(none, |found, address| found.or_else(|_| attempt(address)))
}

/// Removes the zone for use on other nodes. A zone is valid only on its own node.
pub fn without_zone(address: SocketAddr) -> SocketAddr {
    (address.ip(), address.port()).into()
}

/// Adds the zone of `own` to a link-local address of a peer. Returns other addresses unchanged.
pub fn with_zone_of(peer: SocketAddr, own: SocketAddr) -> SocketAddr {
    match (peer, own) {
        (SocketAddr::V6(peer), SocketAddr::V6(own)) if peer.ip().is_unicast_link_local() && peer.scope_id() == 0 => {
            SocketAddrV6::new(*peer.ip(), peer.port(), 0, own.scope_id()).into()
        }
        _ => peer,
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
