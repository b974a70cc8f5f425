//! Addresses of this node, and how host names resolve on this node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::{fs, io};

use crate::transport::{Address, first_success, resolve};

/// The addresses at which this node may reach process 0's `HOST:PORT`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Targets {
    pub(crate) addresses: Vec<SocketAddr>,
    /// True if the job spans nodes, but the host, such as this node's own name, resolves only to addresses that other
    /// nodes cannot use: loopback or unspecified (`0.0.0.0`). False for a literal loopback address.
    pub(crate) is_hidden: bool,
}

impl Targets {
    pub(crate) fn of(name: &str, spans_nodes: bool) -> io::Result<Self> {
        Ok(targets(name, resolve(name)?, spans_nodes))
    }
}

fn targets(name: &str, addresses: Vec<SocketAddr>, spans_nodes: bool) -> Targets {
    // A literal loopback address is not replaced, because its port may be forwarded to another node.
    let host = name.rsplit_once(':').map_or(name, |(host, _)| host);
    let ip = host.trim_matches(['[', ']']).split('%').next().unwrap_or_default();
    let is_literal = host == "localhost" || ip.parse().is_ok_and(|ip: IpAddr| !ip.is_unspecified());
    let is_external = |address: &SocketAddr| !address.ip().is_loopback() && !address.ip().is_unspecified();
    if is_literal || !spans_nodes || addresses.iter().all(is_external) {
        return Targets { addresses, is_hidden: false };
    }
    let external: Vec<_> = addresses.iter().copied().filter(is_external).collect();
    let is_hidden = external.is_empty();
    Targets { addresses: if is_hidden { addresses } else { external }, is_hidden }
}

/// Returns the local address, with port 0, from which this node reaches `HOST:PORT`. If the addresses are hidden
/// ([`Targets::is_hidden`]), returns an address that other nodes may reach. Fails if the name does not resolve yet, or
/// if there is no route to its address.
pub(crate) fn address_towards(name: &str, spans_nodes: bool) -> io::Result<SocketAddr> {
    let Targets { addresses, is_hidden } = Targets::of(name, spans_nodes)?;
    if let Some(outward) = outward_address().filter(|_| is_hidden) {
        return Ok(outward);
    }
    first_success(addresses, source_address)
}

/// Returns a log line if process 0's name resolves on this node to an address that other nodes cannot reach.
pub fn hidden_name(coordinator: &Address, spans_nodes: bool) -> Option<String> {
    let Address::Tcp(name) = coordinator else { return None };
    let Targets { addresses, is_hidden } = Targets::of(name, spans_nodes).ok()?;
    let (host, ip) = (name.rsplit_once(':')?.0, addresses.first().filter(|_| is_hidden)?.ip());
    if ip.is_unspecified() {
        return None;
    }
    Some(match outward_address() {
        Some(outward) => format!(
            "{host} resolves to {ip} on this node (see /etc/hosts), but other nodes cannot reach that address; so rank \
             0 listens on all addresses, and this node's processes publish {} instead; to publish another address, set \
             SHARDFLOW_INTERFACE",
            outward.ip()
        ),
        None => format!("{host} resolves to {ip} on this node, which has no address that other nodes can reach"),
    })
}

/// Parses an IP address and adds port 0. A link-local address may have a zone: `fe80::1%eth0`.
pub fn parse_ip(text: &str) -> Option<SocketAddr> {
    // Host names are rejected: resolving a name may be slow and return several addresses.
    let ip: IpAddr = text.split('%').next()?.parse().ok()?;
    let with_port = if ip.is_ipv6() { format!("[{text}]:0") } else { format!("{text}:0") };
    resolve(&with_port).ok()?.first().copied()
}

/// An address that other nodes may reach: the default route's source address, or else the first non-loopback address.
fn outward_address() -> Option<SocketAddr> {
    // Addresses reserved for documentation (RFC 5737, RFC 3849): packets to them would take the default route.
    let remote = [(Ipv4Addr::new(192, 0, 2, 1), 9).into(), (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 9).into()];
    let routed = remote.into_iter().find_map(|to| source_address(to).ok().filter(|own| !own.ip().is_loopback()));
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    routed.or_else(|| node_addresses(&read("/proc/net/fib_trie"), &read("/proc/net/if_inet6")).first().copied())
}

/// The source address of packets from this node to `target`, with port 0.
fn source_address(target: SocketAddr) -> io::Result<SocketAddr> {
    let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Connecting a UDP socket sends no packet, but the system selects the route and thereby the source address.
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(target)?;
    let mut own = socket.local_addr()?;
    own.set_port(0);
    Ok(own)
}

/// The node's addresses except loopback and link-local ones, from `fib_trie` and `if_inet6` of `/proc/net`.
fn node_addresses(fib_trie: &str, if_inet6: &str) -> Vec<SocketAddr> {
    let mut found: Vec<IpAddr> = Vec::new();
    let mut leaf = None;
    for line in fib_trie.lines().map(str::trim) {
        match line.strip_prefix("|-- ") {
            Some(address) => leaf = address.parse::<Ipv4Addr>().ok(),
            None if line == "/32 host LOCAL" => found.extend(leaf.map(IpAddr::from)),
            None => {}
        }
    }
    let hex = |line: &str| u128::from_str_radix(line.split(' ').next()?, 16).ok().map(Ipv6Addr::from);
    found.extend(if_inet6.lines().filter_map(hex).filter(|ip| !ip.is_unicast_link_local()).map(IpAddr::from));
    found.into_iter().filter(|ip| !ip.is_loopback()).map(|ip| (ip, 0).into()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_an_ip_address_without_a_port() {
        let text = |text: &str| parse_ip(text).map(|address| address.to_string());
        assert_eq!(text("10.0.0.1").as_deref(), Some("10.0.0.1:0"));
        assert_eq!(text("::1").as_deref(), Some("[::1]:0"));
        assert_eq!(text("fe80::1%7").as_deref(), Some("[fe80::1%7]:0"));
        assert!(parse_ip("fe80::1%lo").is_some());
        for bad in ["", "localhost", "10.0.0.1:5", "[::1]", "fe80::1%no-such", "10.0.0.1%lo"] {
            assert_eq!(text(bad), None, "{bad}");
        }
    }

    #[test]
    fn node_addresses_skips_loopback_and_link_local_ones() {
        let fib = "Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
        |-- 127.0.1.1
           /32 host LOCAL
           |-- 10.77.0.0
              /24 link UNICAST
           |-- 10.77.0.2
              /32 host LOCAL
        |-- 10.77.0.255
           /32 link BROADCAST
";
        let inet6 = "fd000000000000000000000000000002 04 40 00 82     eth0
00000000000000000000000000000001 01 80 10 80       lo
fe8000000000000000fc00fffe000001 04 40 20 80     eth0
";
        let text = |all: Vec<SocketAddr>| all.iter().map(SocketAddr::to_string).collect::<Vec<_>>();
        assert_eq!(text(node_addresses(fib, inet6)), ["10.77.0.2:0", "[fd00::2]:0"]);
        assert!(node_addresses("", "x\n").is_empty());
        let source = source_address("127.0.0.1:9".parse().unwrap()).unwrap();
        assert_eq!(source, "127.0.0.1:0".parse().unwrap(), "the port is 0");
    }

    /// Debian's `/etc/hosts` maps the host's own name to 127.0.1.1.
    #[test]
    fn a_name_that_is_loopback_only_on_its_own_node_is_detected() {
        let all = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<SocketAddr>>();
        let resolved = |name: &str, addresses: &[&str], spans_nodes| {
            let Targets { addresses, is_hidden } = targets(name, all(addresses), spans_nodes);
            (addresses.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(" "), is_hidden)
        };
        assert_eq!(resolved("node1:5", &["127.0.1.1:5"], true), ("127.0.1.1:5".into(), true));
        assert_eq!(resolved("node1:5", &["[::1]:5"], true), ("[::1]:5".into(), true));
        assert_eq!(resolved("node1:5", &["127.0.1.1:5"], false), ("127.0.1.1:5".into(), false), "the job has one node");
        assert_eq!(resolved("node1:5", &["127.0.1.1:5", "10.0.0.7:5"], true), ("10.0.0.7:5".into(), false));
        assert_eq!(resolved("node1:5", &["10.0.0.7:5"], true), ("10.0.0.7:5".into(), false));
        assert_eq!(resolved("0.0.0.0:5", &["0.0.0.0:5"], true), ("0.0.0.0:5".into(), true));
        for literal in ["localhost:5", "127.0.1.1:5", "[::1]:5", "[::1%lo]:5"] {
            assert!(!resolved(literal, &["127.0.1.1:5"], true).1, "{literal}");
        }
    }
}
