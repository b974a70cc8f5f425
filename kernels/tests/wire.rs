//! The socket engine passes the conformance suite over socket pairs and over TCP, with whole and with divided tensors.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shardflow_kernels::collective::wire::{Channel, ChannelKey, Connect, SealedStream, Wire};
use shardflow_kernels::collective::{Collective, CollectiveCall, Group, MemberWait};
use shardflow_kernels::conformance;
use shardflow_kernels::device::Device;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::View;

const WRITE_TIMEOUT: Duration = Duration::from_secs(20);

fn unix_pair() -> io::Result<[Channel; 2]> {
    let (a, b) = UnixStream::pair()?;
    Ok([Channel::Unix(a), Channel::Unix(b)])
}

fn tcp_pair() -> io::Result<[Channel; 2]> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let a = TcpStream::connect(listener.local_addr()?)?;
    let (b, _) = listener.accept()?;
    Ok([Channel::Tcp(a), Channel::Tcp(b)])
}

/// Maximum number of bytes that a [`Holding`] stream accepts at a time. It also reads at most this many bytes ahead.
const HELD_BYTES: usize = 3000;

/// A stream that buffers in both directions, as an encrypted stream does. It sends accepted bytes at the next call, and
/// reads ahead.
#[derive(Debug)]
struct Holding {
    socket: UnixStream,
    accepted: Mutex<Vec<u8>>,
    received: Mutex<Vec<u8>>,
}

impl Holding {
    fn pair() -> io::Result<[Channel; 2]> {
        let (a, b) = UnixStream::pair()?;
        Ok([a, b].map(|socket| {
            Channel::Sealed(Box::new(Self { socket, accepted: Mutex::default(), received: Mutex::default() }))
        }))
    }
}

impl SealedStream for Holding {
    fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn send(&self, first: &[u8], second: &[u8]) -> io::Result<usize> {
        self.flush()?;
        let both: Vec<u8> = first.iter().chain(second).copied().take(HELD_BYTES).collect();
        let bytes = both.len();
        *self.accepted.lock() = both;
        Ok(bytes)
    }

    fn has_unsent(&self) -> bool {
        !self.accepted.lock().is_empty()
    }

    fn flush(&self) -> io::Result<()> {
        let mut accepted = self.accepted.lock();
        while !accepted.is_empty() {
            let sent = (&self.socket).write(&accepted)?;
            accepted.drain(..sent);
        }
        Ok(())
    }

    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut received = self.received.lock();
        if received.is_empty() && !into.is_empty() {
            let mut ahead = [0; HELD_BYTES];
            let bytes = (&self.socket).read(&mut ahead)?;
            received.extend_from_slice(&ahead[..bytes]);
        }
        let bytes = received.len().min(into.len());
        into[..bytes].copy_from_slice(&received[..bytes]);
        received.drain(..bytes);
        Ok(bytes)
    }

    fn shutdown(&self, direction: Shutdown) {
        drop(self.socket.shutdown(direction));
    }
}

/// Ends of channels that the other member has not requested yet.
type Ends = Arc<Mutex<HashMap<ChannelKey, Channel>>>;

/// The first member that requests a channel gets one end of a new pair. The other member later gets the other end.
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

/// The engine of one process. The socket engine aborts only its own process, and a session must notify the other
/// processes. Here, `abort` aborts the engines of all processes.
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

fn check(pair: fn() -> io::Result<[Channel; 2]>, devices_per_process: usize, whole_bytes_max: Option<usize>) {
    let make = |n: usize| {
        let (ends, session) = (Ends::default(), Arc::default());
        let mut devices = Vec::new();
        for first in (0..n).step_by(devices_per_process) {
            let own = Arc::new(Wire::with_connector(connector(pair, ends.clone()), WRITE_TIMEOUT));
            whole_bytes_max.into_iter().for_each(|bytes| own.set_whole_bytes_max(bytes));
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
fn streams_that_hold_bytes() {
    check(Holding::pair, 1, None);
    check(Holding::pair, 2, Some(0));
}

#[test]
fn one_device_per_process_with_divided_tensors_only() {
    check(unix_pair, 1, Some(0));
}

#[test]
fn two_devices_per_process_over_tcp() {
    check(tcp_pair, 2, None);
}
