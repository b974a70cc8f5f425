//! The engine over sockets passes the suite of every engine, over socket pairs and over TCP, with trees and with rings.

use std::collections::HashMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shardflow_kernels::collective::wire::{Channel, ChannelKey, Connect, Wire};
use shardflow_kernels::collective::{Collective, CollectiveCall, Group, MemberWait};
use shardflow_kernels::conformance;
use shardflow_kernels::device::Device;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::View;

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

/// Ends of channels that the other side has not asked for yet.
type Ends = Arc<Mutex<HashMap<ChannelKey, Channel>>>;

/// Whoever asks first for a channel gets one end of a new pair, the other side the other.
fn connector(pair: fn() -> io::Result<[Channel; 2]>, ends: Ends) -> Box<Connect> {
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

/// A process's engine in a session that ends on all processes at once: over sockets an abort goes no further than the
/// process, and telling the others is the session's affair.
#[derive(Debug)]
struct Process {
    own: Arc<Wire>,
    session: Arc<Mutex<Vec<Arc<Wire>>>>,
}

impl Collective for Process {
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<(), KernelError> {
        self.own.run(call, reads, writes)
    }

    fn waits(&self) -> Vec<MemberWait> {
        self.own.waits()
    }

    fn abort(&self, cause: &str) {
        let all = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().for_each(|engine| engine.abort(cause));
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        self.own.bytes_received(rank)
    }
}

/// With so many devices on an engine, as in a process of that many.
fn check(pair: fn() -> io::Result<[Channel; 2]>, devices_of_a_process: usize, tree_bytes_max: Option<usize>) {
    let make = |n: usize| {
        let (ends, session) = (Ends::default(), Arc::default());
        let mut devices = Vec::new();
        for first in (0..n).step_by(devices_of_a_process) {
            let own = Arc::new(Wire::with_connector(connector(pair, ends.clone()), WRITE_TIMEOUT));
            tree_bytes_max.into_iter().for_each(|bytes| own.set_tree_bytes_max(bytes));
            let session: &Arc<Mutex<Vec<Arc<Wire>>>> = &session;
            session.lock().unwrap_or_else(PoisonError::into_inner).push(own.clone());
            let engine = Arc::new(Process { own, session: session.clone() });
            for rank in first..n.min(first + devices_of_a_process) {
                let device = Device::cpu(rank, 1, engine.clone());
                let arena = device.arena(conformance::COLLECTIVES_ARENA_BYTES)?;
                devices.push((device, arena));
            }
        }
        Ok(devices)
    };
    let failures = conformance::run_collectives(&make);
    let lines: Vec<String> = failures.iter().take(20).map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), lines.join("\n"));
}

#[test]
fn one_process() {
    check(unix_pair, 4, None);
}

#[test]
fn a_device_in_each_process() {
    check(unix_pair, 1, None);
}

#[test]
fn a_device_in_each_process_with_rings_only() {
    check(unix_pair, 1, Some(0));
}

#[test]
fn two_devices_in_each_process_over_tcp() {
    check(tcp_pair, 2, None);
}
