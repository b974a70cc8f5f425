//! Registers between processes. For each peer, this process has an outbox, which queues messages to the peer's actors.
//! One thread writes the outbox to the connection. Another reads the peer's messages and delivers them to local actors.
//!
//! The bytes of a published piece are sent to each process at most once, before the `Filled` message. They arrive in
//! the same slot of the receiver's copy of the register, its mirror. Credits also protect the mirror: the producer
//! cannot rewrite a slot before all readers have released it. Processes with shared memory exchange only ids. Between
//! GPUs, a pipe may carry the bytes, which the connection only announces.
//!
//! Two processes are connected if they exchange registers or are neighbours on a tree of all processes. Host programs
//! send host pieces (the tensors of one port) along the tree, and every process forwards the host pieces of others.
//!
//! - **RM-1**: every message from a peer is checked against the plan before use: the hosts of the register's producer
//!   and reader, the number of bytes of a slot, and the expected piece and slot.
//! - **RM-2**: an outbox holds at most the messages that credits allow (CR-3), and the host pieces of one step.
//! - **RM-3**: a mirror's slot is written only after all local readers have released the slot's piece. A refresh, which
//!   sends initial registers again, writes the slot only while no local reader is in the middle of a step.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::{Condvar, Mutex};
use shardflow_kernels::clock::{ReleaseClocks, Stamped};
use shardflow_kernels::cuda::nccl::Pipe;
use shardflow_kernels::tensor::{DType, HostTensor};

use crate::error::{Failure, PeerError};
use crate::protocol::Message;
use crate::spec::{ActionRef, ActorId, RegisterId, Spec};
use crate::table::Table;
use shardflow_job::transport::Connection;

/// Interval at which a wait for peers checks whether the session has failed.
const CHECK_EVERY: Duration = Duration::from_millis(50);

/// A contiguous part of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRun {
    /// Offset from the slot's start in bytes.
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

/// The registers that this process exchanges with one peer. Both processes derive these registers from the same plan.
#[derive(Debug)]
pub struct PeerSpec {
    /// Number of the peer.
    pub process: u32,
    /// The connection.
    pub connection: Connection,
    /// Local registers whose memory the peer cannot access, with the parts of a slot that the peer's readers read.
    pub pushes: BTreeMap<RegisterId, Vec<ByteRun>>,
    /// The peer's registers whose bytes arrive here, with the parts of a slot that local readers read.
    pub mirrors: BTreeMap<RegisterId, Vec<ByteRun>>,
    /// Pipes by register. The pipe, not the connection, carries the register's bytes. Registers may share a pipe.
    pub pipes: BTreeMap<RegisterId, Arc<Pipe>>,
}

/// A port through which one process's host program sends tensors to other host programs, along the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoute {
    /// The sending process.
    pub process: u32,
    /// The only receiver; `None` if all other processes receive the tensors.
    pub to: Option<u32>,
    /// Shape and element type of each tensor.
    pub tensors: Vec<(Vec<usize>, DType)>,
}

/// Facts about all processes of a job. They are computed on demand, because stored lists would grow with the
/// number of processes.
pub trait Directory: Debug + Send + Sync {
    /// The process that hosts a device; `None` for this process.
    fn process_of(&self, device: usize) -> Option<u32>;

    /// The devices of a communicator, in order; empty if the communicator is unknown.
    fn members_of(&self, communicator: u32) -> Vec<usize>;

    /// A port between host programs, outside the plan; `None` if no port has this index.
    fn route(&self, port: u32) -> Option<HostRoute>;
}

/// A directory that lists all its entries. By default, there are no other processes and no ports.
#[derive(Clone, Debug, Default)]
pub struct Listed {
    /// For each device of another process: that process.
    pub processes: BTreeMap<usize, u32>,
    /// Devices of each communicator.
    pub communicators: BTreeMap<u32, Vec<usize>>,
    /// Ports by index.
    pub routes: Vec<HostRoute>,
}

impl Directory for Listed {
    fn process_of(&self, device: usize) -> Option<u32> {
        self.processes.get(&device).copied()
    }

    fn members_of(&self, communicator: u32) -> Vec<usize> {
        self.communicators.get(&communicator).cloned().unwrap_or_default()
    }

    fn route(&self, port: u32) -> Option<HostRoute> {
        self.routes.get(port as usize).cloned()
    }
}

/// The peers of a process and the ports between host programs.
#[derive(Debug)]
pub struct Peers {
    /// The processes with a connection to this one.
    pub peers: Vec<PeerSpec>,
    /// For each process: the peer on the path to that process. This process's entry is its own number. Empty if all
    /// other processes are peers.
    pub hops: Vec<u32>,
    /// The processes of devices, and the ports between host programs.
    pub directory: Arc<dyn Directory>,
    /// Receives the peers' messages for the host program.
    pub host: Option<Sender<PeerMessage>>,
}

impl Default for Peers {
    fn default() -> Self {
        Self { peers: Vec::new(), hops: Vec::new(), directory: Arc::new(Listed::default()), host: None }
    }
}

/// A message from another process for the host program.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the comments of the variants name the fields")]
pub enum PeerMessage {
    Piece(Arc<HostPiece>),
    /// The process has ended in an orderly way and sends nothing more.
    Ended {
        process: u32,
    },
}

/// Tensors for a port.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPiece {
    /// Index of the port.
    pub port: u32,
    /// The tensors, as the port declares them.
    pub tensors: Vec<HostTensor>,
}

#[derive(Debug)]
pub(crate) enum Outgoing {
    Message(Stamped<Message>),
    Host(Arc<HostPiece>),
    /// Send the current bytes of initial registers, then `Ready`.
    Refresh(Stamped<u64>),
    End,
}

/// Where an actor runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Host {
    ThisProcess,
    /// Index of the peer.
    Peer(usize),
    /// A process without a connection to this one.
    Distant(u32),
}

/// The outboxes of a session, and the state of its peers.
#[derive(Debug)]
pub(crate) struct Remote {
    hosts: Table<ActorId, Host>,
    pub(crate) directory: Arc<dyn Directory>,
    hops: Vec<u32>,
    /// For each peer, by index: true if the peer receives host pieces.
    carries_host: Vec<bool>,
    outboxes: Vec<(u32, Sender<Outgoing>)>,
    pub(crate) host: Option<Sender<PeerMessage>>,
    /// For each peer: the last received `Ready` round, the race checker's stamp of that round, and true if the peer has
    /// ended in an orderly way.
    ready: Mutex<Vec<(u64, Stamped<()>, bool)>>,
    changed: Condvar,
    /// For each register: the race checker's clocks of this process's messages about the register. They order these
    /// messages before later messages of peers about the same register.
    pub(crate) sent: Table<RegisterId, ReleaseClocks>,
    /// For each register and local reader: number of pieces that the reader has released to a remote producer.
    released: Table<RegisterId, Box<[AtomicU64]>>,
}

impl Remote {
    /// Creates the outboxes; the threads start later. Also returns the peers, each with the queue of its outbox.
    pub(crate) fn new(spec: &Spec, peers: Peers) -> (Self, Vec<(PeerSpec, Receiver<Outgoing>)>) {
        let Peers { peers, hops, directory, host } = peers;
        let hosts = spec.actors.map(|(_, actor)| match directory.process_of(actor.device) {
            None => Host::ThisProcess,
            Some(process) => {
                let peer = peers.iter().position(|peer| peer.process == process);
                peer.map_or(Host::Distant(process), Host::Peer)
            }
        });
        let (mut outboxes, mut ends) = (Vec::new(), Vec::new());
        for peer in peers {
            let (sender, outgoing) = unbounded();
            outboxes.push((peer.process, sender));
            ends.push((peer, outgoing));
        }
        let carries_host = outboxes.iter().map(|(process, _)| hops.is_empty() || hops.contains(process)).collect();
        let ready = Mutex::new(vec![(0, Stamped::default(), false); ends.len()]);
        let sent = spec.registers.map(|_| ReleaseClocks::default());
        let released = spec.registers.map(|(_, r)| r.readers.iter().map(|_| AtomicU64::new(0)).collect());
        let changed = Condvar::new();
        let remote = Self { hosts, directory, hops, carries_host, outboxes, host, ready, changed, sent, released };
        (remote, ends)
    }

    /// Queues a message for an actor on a peer. Returns false if no peer hosts the actor.
    pub(crate) fn send(&self, to: ActorId, message: Message) -> bool {
        let Some(Host::Peer(peer)) = self.hosts.get(to).copied() else { return false };
        if let Message::Released { register, reader, .. } = message {
            // Counts the release before the producer can receive it.
            self.released[register][reader as usize].fetch_add(1, Ordering::Release);
        }
        // If the peer's writer thread has ended, the peer is lost; the reader thread reports that.
        let _ = self.outboxes[peer].1.send(Outgoing::Message(Stamped::new(message)));
        true
    }

    /// Sends a piece to the neighbours on the tree, but not back to the peer that sent it. If the port has only one
    /// receiver, sends the piece only towards this receiver.
    pub(crate) fn send_host_piece(&self, piece: &Arc<HostPiece>, from: Option<usize>) {
        let to = self.directory.route(piece.port).and_then(|port| port.to);
        for (index, (_, outbox)) in self.outboxes.iter().enumerate() {
            let is_on_way = to.map_or(self.carries_host[index], |to| self.is_behind(index, to));
            if is_on_way && Some(index) != from {
                // If the peer's writer thread has ended, the peer is lost; the reader thread reports that.
                let _ = outbox.send(Outgoing::Host(piece.clone()));
            }
        }
    }

    /// True if this process's host program receives the pieces of a port.
    pub(crate) fn is_for_host(&self, port: &HostRoute) -> bool {
        // If no peer leads to the receiver, this process is the receiver.
        port.to.is_none_or(|to| !(0..self.outboxes.len()).any(|peer| self.is_behind(peer, to)))
    }

    /// True if host pieces from and to `process` pass through this peer.
    pub(crate) fn is_behind(&self, peer: usize, process: u32) -> bool {
        let hop = self.hops.get(process as usize).copied().unwrap_or(process);
        self.carries_host[peer] && self.outboxes[peer].0 == hop
    }

    /// Ends the writer threads after they have sent the queued messages.
    pub(crate) fn end(&self) {
        self.outboxes.iter().for_each(|(_, outbox)| drop(outbox.send(Outgoing::End)));
    }

    /// Records a peer's `Ready`. Returns false and records nothing if `round` is not the peer's next round.
    pub(crate) fn set_ready(&self, peer: usize, round: u64) -> bool {
        let mut ready = self.ready.lock();
        let is_next = ready[peer].0.checked_add(1) == Some(round);
        if is_next {
            ready[peer] = (round, Stamped::new(()), false);
            self.changed.notify_all();
        }
        is_next
    }

    pub(crate) fn set_ended(&self, peer: usize) {
        self.ready.lock()[peer].2 = true;
        self.changed.notify_all();
    }

    pub(crate) fn local_readers(&self, spec: &Spec, register: RegisterId) -> Vec<ActionRef> {
        let readers = spec.register(register).readers.iter();
        readers.filter(|reader| self.is_local(reader.actor)).copied().collect()
    }

    /// RM-3: true if a local reader reads the piece and has not released it.
    pub(crate) fn is_held(&self, spec: &Spec, register: RegisterId, piece: u64) -> bool {
        let pieces_per_step = spec.register(register).pieces_per_step;
        let readers = spec.register(register).readers.iter().zip(&self.released[register]);
        let mut local = readers.filter(|(reader, _)| self.is_local(reader.actor));
        local.any(|(reader, released)| {
            let pieces = spec.input(register, *reader).map(|input| &input.pieces);
            let needed = pieces.and_then(|p| Some(p.finished(p.firings_to_finish(piece, pieces_per_step)?)));
            needed.is_some_and(|needed| released.load(Ordering::Acquire) < needed)
        })
    }

    /// The process that hosts the actor; `None` for this process.
    pub(crate) fn process_of(&self, actor: ActorId) -> Option<u32> {
        match self.hosts.get(actor)? {
            Host::ThisProcess => None,
            Host::Peer(peer) => Some(self.outboxes[*peer].0),
            Host::Distant(process) => Some(*process),
        }
    }

    /// The members of a communicator that run in other processes, each as a process and a device.
    pub(crate) fn members_of(&self, communicator: u32) -> Vec<(u32, usize)> {
        let devices = self.directory.members_of(communicator).into_iter();
        devices.filter_map(|device| Some((self.directory.process_of(device)?, device))).collect()
    }

    pub(crate) fn is_at(&self, peer: usize, actor: ActorId) -> bool {
        self.hosts.get(actor) == Some(&Host::Peer(peer))
    }

    pub(crate) fn is_local(&self, actor: ActorId) -> bool {
        self.hosts.get(actor) == Some(&Host::ThisProcess)
    }

    /// Sends the initial registers' bytes for refresh number `round` and waits until all peers have done the same.
    pub(crate) fn refresh(
        &self,
        round: u64,
        timeout: Duration,
        failure: impl Fn() -> Option<Failure>,
    ) -> Result<(), Failure> {
        self.sent.values().for_each(ReleaseClocks::add);
        let refresh = |outbox: &Sender<Outgoing>| outbox.send(Outgoing::Refresh(Stamped::new(round)));
        self.outboxes.iter().for_each(|(_, outbox)| drop(refresh(outbox)));
        let deadline = Instant::now() + timeout;
        let mut ready = self.ready.lock();
        while let Some(late) = ready.iter().position(|r| r.0 < round) {
            if let Some(first) = failure() {
                return Err(first);
            }
            if ready[late].2 || Instant::now() >= deadline {
                let is_late = PeerError::Late { seconds: timeout.as_secs() };
                let cause = if ready[late].2 { PeerError::Ended } else { is_late };
                return Err(Failure::Peer { process: self.outboxes[late].0, cause });
            }
            self.changed.wait_for(&mut ready, CHECK_EVERY);
        }
        ready.iter().for_each(|(_, ready, _)| *ready.get());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::builder::Builder;

    /// Process 3 of 8. Its neighbours on the tree are 0 and 5. Process 7 is behind 5. Process 3 exchanges registers
    /// with process 6, which is behind 0.
    fn remote() -> (Remote, Vec<Receiver<Outgoing>>) {
        let peer = |process| {
            let connection = UnixStream::pair().expect("a socket pair is created").0.into();
            let (pushes, mirrors, pipes) = Default::default();
            PeerSpec { process, connection, pushes, mirrors, pipes }
        };
        let route = |process, to| HostRoute { process, to, tensors: Vec::new() };
        let routes = vec![
            route(3, None),
            route(7, Some(0)),
            route(7, None),
            route(6, None),
            route(7, Some(3)),
            route(0, Some(6)),
        ];
        let peers = [0, 5, 6].map(peer).into();
        let hops = vec![0, 0, 0, 3, 0, 5, 0, 5];
        let directory = Arc::new(Listed { routes, ..Listed::default() });
        let peers = Peers { peers, hops, directory, ..Peers::default() };
        let (remote, ends) = Remote::new(&Builder::default().build(), peers);
        (remote, ends.into_iter().map(|(_, outbox)| outbox).collect())
    }

    #[test]
    fn host_pieces_pass_along_the_tree() {
        let (remote, outboxes) = remote();
        let sent = |port, from| {
            remote.send_host_piece(&Arc::new(HostPiece { port, tensors: Vec::new() }), from);
            outboxes.iter().map(|outbox| outbox.try_iter().count()).collect::<Vec<_>>()
        };
        assert_eq!(sent(0, None), [1, 1, 0], "its own piece for all goes only along the tree");
        assert_eq!(sent(1, Some(1)), [1, 0, 0], "a piece for process 0 goes only to process 0");
        assert_eq!(sent(2, Some(1)), [1, 0, 0], "a piece for all is not sent back to its sender");
        assert_eq!(sent(3, Some(0)), [0, 1, 0]);
        assert_eq!(sent(4, Some(1)), [0, 0, 0], "a piece for this process is not forwarded");
        let is_for_host: Vec<bool> =
            (0..6).map(|port| remote.is_for_host(&remote.directory.route(port).unwrap())).collect();
        assert_eq!(is_for_host, [true, false, true, true, true, false]);
        let behind = |peer| (0..8).filter(|process| remote.is_behind(peer, *process)).collect::<Vec<u32>>();
        assert_eq!([behind(0), behind(1), behind(2)], [vec![0, 1, 2, 4, 6], vec![5, 7], vec![]]);
    }
}
