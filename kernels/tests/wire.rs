//! The socket engine passes the conformance suite, over socket pairs and over TCP, with trees and with rings.

use std::collections::HashMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
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

/// Channel ends that the other member has not requested yet.
type Ends = Arc<Mutex<HashMap<ChannelKey, Channel>>>;

/// The first member that requests a channel gets one end of a new pair; the other member gets the other end.
fn connector(pair: fn() -> io::Result<[Channel; 2]>, ends: Ends) -> Box<Connect> {
    Box::new(move |group: &Group, member, peer| {
        let mut ends = ends.lock();
        if let Some(channel) = ends.remove(&(group.id, member, peer)) {
            return Ok(channel);
        }
        let [own, other] = pair()?;
        ends.insert((group.id, peer, member), other);
        Ok(own)
    })
}

/// The engine of one process in a session that aborts all processes together. The socket engine aborts only its own
/// process; notifying the others is the session's task.
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
        let all = self.session.lock();
        all.iter().for_each(|engine| engine.abort(cause));
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        self.own.bytes_received(rank)
    }
}

/// Runs the suite with this number of devices per engine, as in a process with that many devices.
fn check(pair: fn() -> io::Result<[Channel; 2]>, devices_per_process: usize, tree_bytes_max: Option<usize>) {
    let make = |n: usize| {
        let (ends, session) = (Ends::default(), Arc::default());
        let mut devices = Vec::new();
        for first in (0..n).step_by(devices_per_process) {
            let own = Arc::new(Wire::with_connector(connector(pair, ends.clone()), WRITE_TIMEOUT));
            tree_bytes_max.into_iter().for_each(|bytes| own.set_tree_bytes_max(bytes));
            let session: &Arc<Mutex<Vec<Arc<Wire>>>> = &session;
            session.lock().push(own.clone());
            let engine = Arc::new(Process { own, session: session.clone() });
            for rank in first..n.min(first + devices_per_process) {
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
fn all_devices_in_one_process() {
    check(unix_pair, 4, None);
}

#[test]
fn one_device_per_process() {
    check(unix_pair, 1, None);
}

#[test]
fn one_device_per_process_with_rings_only() {
    check(unix_pair, 1, Some(0));
}

#[test]
fn two_devices_per_process_over_tcp() {
    check(tcp_pair, 2, None);
}
