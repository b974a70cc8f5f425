//! The engine over sockets passes the suite of every engine, over socket pairs and over TCP, with trees and with rings.

use std::collections::HashMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shardflow_kernels::collective::Group;
use shardflow_kernels::collective::wire::{Channel, ChannelKey, Connect, Wire};
use shardflow_kernels::conformance;
use shardflow_kernels::device::Device;

const WRITE_TIMEOUT: Duration = Duration::from_secs(20);

fn unix_pair() -> io::Result<[Channel; 2]> {
    let (a, b) = UnixStream::pair()?;
    Ok([a.into(), b.into()])
}

fn tcp_pair() -> io::Result<[Channel; 2]> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let a = TcpStream::connect(listener.local_addr()?)?;
    let (b, _) = listener.accept()?;
    Ok([a.into(), b.into()])
}

/// Whoever asks first for a channel gets one end of a new pair, the other side the other.
fn connector(pair: fn() -> io::Result<[Channel; 2]>) -> Box<Connect> {
    let ends: Mutex<HashMap<ChannelKey, Channel>> = Mutex::default();
    Box::new(move |group: &Group, member, peer| {
        let mut ends = ends.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = ends.remove(&(group.id, member, peer)) {
            return Ok(channel);
        }
        let [own, other] = pair()?;
        ends.insert((group.id, peer, member), other);
        Ok(own)
    })
}

fn check(pair: fn() -> io::Result<[Channel; 2]>, tree_bytes_max: Option<usize>) {
    let make = |n| {
        let engine = Arc::new(Wire::with_connector(connector(pair), WRITE_TIMEOUT));
        tree_bytes_max.into_iter().for_each(|bytes| engine.set_tree_bytes_max(bytes));
        (0..n).map(|rank| Device::cpu(rank, 1, engine.clone())).collect()
    };
    let failures = conformance::run_collectives(&make);
    let lines: Vec<String> = failures.iter().take(20).map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), lines.join("\n"));
}

#[test]
fn socket_pairs() {
    check(unix_pair, None);
}

#[test]
fn socket_pairs_with_rings_only() {
    check(unix_pair, Some(0));
}

#[test]
fn tcp() {
    check(tcp_pair, None);
}
