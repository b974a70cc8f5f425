//! The address at which the processes of a world rendezvous.

use std::fmt;
use std::path::PathBuf;

use crate::transport::{Address, UNIX_PATH_BYTES_MAX};

use crate::machine::parse_ip;

/// Default port of a rendezvous address. torchrun has the same default.
pub const PORT_DEFAULT: u16 = 29400;

/// An address that the first process listens on and all others connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the comments of the variants name the fields")]
pub enum Endpoint {
    /// `tcp://HOST:PORT`. An IPv6 host is stored without brackets and may have a zone. Port 0 is invalid.
    Tcp { host: String, port: u16 },
    /// `unix:PATH`, for processes on one node.
    Unix(PathBuf),
}

impl Endpoint {
    /// Parses `tcp://HOST:PORT` or `unix:PATH`. The error describes the expected form.
    pub fn parse(text: &str) -> Result<Endpoint, &'static str> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                _ if !path.starts_with('/') => Err("`unix:` followed by an absolute path"),
                _ if path.len() > UNIX_PATH_BYTES_MAX => Err("a Unix socket path of at most 107 bytes"),
                _ if path.contains('\0') => Err("a path without NUL"),
                path => Ok(Endpoint::Unix(path.into())),
            };
        }
        let Some(address) = text.strip_prefix("tcp://") else { return Err("tcp://HOST:PORT or unix:PATH") };
        let (host, port) = split_port(address)?;
        Ok(Endpoint::Tcp { host, port: port.ok_or("tcp://HOST:PORT; the port is missing")? })
    }

    /// Like [`Endpoint::parse`], but also accepts torchrun's forms `HOST` and `HOST:PORT`.
    pub fn parse_rendezvous(text: &str) -> Result<Endpoint, &'static str> {
        if text.starts_with("tcp://") || text.starts_with("unix:") {
            return Endpoint::parse(text);
        }
        let (host, port) = split_port(text)?;
        Ok(Endpoint::Tcp { host, port: port.unwrap_or(PORT_DEFAULT) })
    }

    /// The address to listen on or to dial.
    pub fn address(&self) -> Address {
        match self {
            Endpoint::Tcp { host, port } if host.contains(':') => Address::Tcp(format!("[{host}]:{port}")),
            Endpoint::Tcp { host, port } => Address::Tcp(format!("{host}:{port}")),
            Endpoint::Unix(path) => Address::Unix(path.clone()),
        }
    }
}

/// Splits `HOST` or `HOST:PORT`. An IPv6 address must be in brackets.
fn split_port(address: &str) -> Result<(String, Option<u16>), &'static str> {
    let (host, port) = if let Some(rest) = address.strip_prefix('[') {
        let (host, after) = rest.split_once(']').ok_or("a closing bracket after the IPv6 address")?;
        if !host.contains(':') || parse_ip(host).is_none() {
            return Err("an IPv6 address in the brackets; text after a % must be an interface of this node");
        }
        match after.strip_prefix(':') {
            None if !after.is_empty() => return Err("a colon and a port after the bracket"),
            port => (host, port),
        }
    } else {
        let (host, port) = match address.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        };
        if !host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) {
            return Err("a host of letters, digits, dots and dashes");
        }
        (host, port)
    };
    if host.is_empty() && address.matches(':').count() > 1 {
        return Err("brackets around an IPv6 address");
    }
    if host.is_empty() {
        return Err("a host");
    }
    match port.map(str::parse::<u16>) {
        None => Ok((host.into(), None)),
        Some(Ok(port)) if port > 0 => Ok((host.into(), Some(port))),
        Some(_) => Err("one port from 1 to 65535, and brackets around an IPv6 address"),
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address() {
            Address::Tcp(address) => write!(f, "tcp://{address}"),
            unix => unix.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn endpoints_are_parsed_and_malformed_ones_are_refused() {
        let tcp = |host: &str, port| Ok(Endpoint::Tcp { host: host.into(), port });
        assert_eq!(Endpoint::parse("tcp://node-1.site:29400"), tcp("node-1.site", 29400));
        assert_eq!(Endpoint::parse("tcp://[::1]:7"), tcp("::1", 7));
        assert_eq!(Endpoint::parse("tcp://[fe80::1%lo]:7"), tcp("fe80::1%lo", 7));
        assert_eq!(Endpoint::parse_rendezvous("[fe80::1%2]"), tcp("fe80::1%2", PORT_DEFAULT));
        assert_eq!(Endpoint::parse("unix:/tmp/a b"), Ok(Endpoint::Unix("/tmp/a b".into())));
        assert_eq!(Endpoint::parse_rendezvous("node1"), tcp("node1", PORT_DEFAULT));
        assert_eq!(Endpoint::parse_rendezvous("node1:5"), tcp("node1", 5));
        assert_eq!(Endpoint::parse_rendezvous("[fe80::1]"), tcp("fe80::1", PORT_DEFAULT));
        for bad in ["", "node1:5", "tcp://", "tcp://a", "tcp://a:0", "tcp://a:65536", "tcp://:5", "tcp://a:b:5"] {
            assert!(Endpoint::parse(bad).is_err(), "{bad}");
        }
        for bad in [
            "tcp://[fe80::1%]:5",
            "tcp://[fe80::1%a b]:5",
            "tcp://[fe80::1%no-such]:5",
            "tcp://[%eth0]:5",
            "tcp://a%b:5",
            "tcp://::1:5",
            "tcp://[::1]5",
            "tcp://[::1",
            "tcp://[a]:5",
            "unix:a",
            "unix:",
            "http://a:5",
            "a/b",
        ] {
            assert!(Endpoint::parse(bad).is_err() && Endpoint::parse_rendezvous(bad).is_err(), "{bad}");
        }
        for bad in ["::1", "::1:29400", "fe80::1"] {
            assert!(Endpoint::parse_rendezvous(bad).unwrap_err().contains("brackets around an IPv6 address"), "{bad}");
        }
        assert!(Endpoint::parse(&format!("unix:/{}", "a".repeat(106))).is_ok());
        assert!(Endpoint::parse(&format!("unix:/{}", "a".repeat(107))).is_err());
    }

    proptest! {
        #[test]
        fn a_parsed_endpoint_survives_display_and_parse(text in "(tcp://|unix:|)[a-z0-9:/.%\\[\\]]{0,24}") {
            if let Ok(endpoint) = Endpoint::parse(&text) {
                prop_assert_eq!(Endpoint::parse(&endpoint.to_string()), Ok(endpoint));
            }
        }
    }
}
