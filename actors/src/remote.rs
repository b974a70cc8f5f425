//! Registers between processes. What an actor tells one that a peer hosts goes to the peer's outbox, which one thread writes to
//! a connection; another thread (both in `connections`) reads what the peer's actors tell, and casts it.
//!
//! A slot's bytes travel at most once to a process, ahead of the `Filled` that tells of them, into the slot of the same number
//! of a mirror. The mirror has the register's own credits, so it needs no bound of its own: the producer cannot write the slot
//! again before all readers have released it. Between processes that share memory nothing travels but ids. Between GPUs the
//! bytes may take a pipe of their own: then the connection only announces them.
//!
//! - **RM-1**: what comes from a peer is checked against the plan before it is believed: who hosts the register's producer and
//!   reader, how many bytes a slot sends, which piece and slot are due.
//! - **RM-2**: an outbox holds no more than credits allow of the peer's actors (CR-3), and what the host puts there in a step.
//! - **RM-3**: a mirror's slot is written only after all readers here have released the piece that it holds; a refresh writes it
//!   only while no reader here is in the middle of a step.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use shardflow_kernels::clock::{RaceClock, ReleaseClocks};
use shardflow_kernels::cuda::nccl::Pipe;
use shardflow_kernels::tensor::{DType, HostTensor};

use crate::error::{Failure, PeerError};
use crate::protocol::Message;
use crate::spec::{ActorId, RegisterId, Spec};
use crate::transport::Connection;

mod connections;
pub(crate) use connections::{Connections, serve};

/// How often a wait for peers looks whether the session has failed.
const LOOK: Duration = Duration::from_millis(50);

/// A contiguous part of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRun {
    /// Bytes from the slot's start.
    pub offset: usize,
    /// Its length.
    pub bytes: usize,
}

/// What the actors of another process and those of this one exchange. Both ends make it of the same plan.
#[derive(Debug)]
pub struct PeerSpec {
    /// Its number.
    pub process: u32,
    /// Whom it hosts.
    pub actors: Vec<ActorId>,
    /// The connection.
    pub link: Connection,
    /// Registers produced here whose bytes the peer's readers cannot reach, with what they read of a slot.
    pub pushes: BTreeMap<RegisterId, Vec<ByteRun>>,
    /// Registers produced there whose bytes come here, likewise.
    pub mirrors: BTreeMap<RegisterId, Vec<ByteRun>>,
    /// What the bytes of some of both take in place of the connection; one pipe may be that of several registers.
    pub pipes: BTreeMap<RegisterId, Arc<Pipe>>,
}

/// Tensors that the program at one process gives to the programs at all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostBroadcast {
    /// Who gives.
    pub process: u32,
    /// Shape and element type of each.
    pub tensors: Vec<(Vec<usize>, DType)>,
}

/// All that a process has to do with others.
#[derive(Debug, Default)]
pub struct Peers {
    /// The processes that host the other actors.
    pub peers: Vec<PeerSpec>,
    /// What the programs of all processes give each other beside the plan.
    pub host_ports: Vec<HostBroadcast>,
    /// Gets what comes from peers for the ports.
    pub host: Option<Sender<PeerMessage>>,
}

/// What the program hears from the programs of other processes.
#[derive(Clone, Debug, PartialEq)]
pub enum PeerMessage {
    /// Tensors.
    Piece(HostPiece),
    /// The process has ended in order: nothing more comes from it.
    Ended {
        /// Which.
        process: u32,
    },
}

/// What came for a port.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPiece {
    /// Index of the port.
    pub port: u32,
    /// As the port says.
    pub tensors: Vec<HostTensor>,
}

#[derive(Debug)]
pub(crate) enum Outgoing {
    /// With what its sender knew to have happened.
    Message(Message, RaceClock),
    Host(Arc<HostPiece>),
    /// The current bytes of initial registers, then `Ready`.
    Refresh(u64, RaceClock),
    End,
}

/// The outboxes of a session, and how far its peers are.
#[derive(Debug)]
pub(crate) struct Remote {
    /// By actor: index of the peer that hosts it.
    peer_of: Vec<Option<usize>>,
    outboxes: Vec<(u32, Sender<Outgoing>)>,
    host_ports: Vec<HostBroadcast>,
    host: Option<Sender<PeerMessage>>,
    /// By peer: the last `Ready` that came, what had happened then, and whether the peer has ended in order.
    ready: Mutex<Vec<(u64, RaceClock, bool)>>,
    changed: Condvar,
    /// By register: what had happened here when peers were last told of it. What they tell of it later is behind that.
    told: Vec<ReleaseClocks>,
    /// By register and reader: pieces that readers here have released to a producer elsewhere.
    released: Vec<Box<[AtomicU64]>>,
}

/// The end that the threads of a peer take.
#[derive(Debug)]
pub(crate) struct PeerEnd {
    peer: PeerSpec,
    index: usize,
    outgoing: Receiver<Outgoing>,
}

impl Remote {
    /// Nothing runs yet; [`serve`] starts the threads.
    pub(crate) fn new(spec: &Spec, peers: Peers) -> (Self, Vec<PeerEnd>) {
        let Peers { peers, host_ports, host } = peers;
        let mut peer_of = vec![None; spec.actors.len()];
        let (mut outboxes, mut ends) = (Vec::new(), Vec::new());
        for (index, peer) in peers.into_iter().enumerate() {
            peer.actors.iter().for_each(|actor| peer_of[actor.0 as usize] = Some(index));
            let (sender, outgoing) = unbounded();
            outboxes.push((peer.process, sender));
            ends.push(PeerEnd { peer, index, outgoing });
        }
        let ready = Mutex::new(vec![(0, RaceClock::default(), false); ends.len()]);
        let told = spec.registers.iter().map(|_| ReleaseClocks::default()).collect();
        let released = spec.registers.iter().map(|r| r.readers.iter().map(|_| AtomicU64::new(0)).collect()).collect();
        (Self { peer_of, outboxes, host_ports, host, ready, changed: Condvar::new(), told, released }, ends)
    }

    /// True when a peer hosts the actor, and the message is on its way.
    pub(crate) fn send(&self, to: ActorId, message: Message) -> bool {
        let Some(peer) = self.peer_of.get(to.0 as usize).copied().flatten() else { return false };
        if let Message::Released { register, reader, .. } = message {
            // Before the producer can know.
            self.released[register.0 as usize][reader as usize].fetch_add(1, Ordering::Release);
        }
        // A peer whose writer has ended is lost, which its reader tells.
        let _ = self.outboxes[peer].1.send(Outgoing::Message(message, RaceClock::capture()));
        true
    }

    /// Gives a piece of this process to all others.
    pub(crate) fn give(&self, piece: HostPiece) {
        let piece = Arc::new(piece);
        self.outboxes.iter().for_each(|(_, outbox)| drop(outbox.send(Outgoing::Host(piece.clone()))));
    }

    /// Ends the writers, after what is queued.
    pub(crate) fn end(&self) {
        self.outboxes.iter().for_each(|(_, outbox)| drop(outbox.send(Outgoing::End)));
    }

    fn ready(&self) -> MutexGuard<'_, Vec<(u64, RaceClock, bool)>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A peer has sent the initial registers' bytes of this round; false unless it is the peer's next one.
    fn is_ready(&self, peer: usize, round: u64) -> bool {
        let mut ready = self.ready();
        let is_next = ready[peer].0.checked_add(1) == Some(round);
        if is_next {
            ready[peer] = (round, RaceClock::capture(), false);
            self.changed.notify_all();
        }
        is_next
    }

    /// Nothing more comes from the peer.
    fn has_ended(&self, peer: usize) {
        self.ready()[peer].2 = true;
        self.changed.notify_all();
    }

    /// RM-3: the oldest piece of the register that some reader here has not released.
    fn oldest_held(&self, spec: &Spec, register: RegisterId) -> u64 {
        let readers = spec.registers[register.0 as usize].readers.iter().zip(&self.released[register.0 as usize]);
        let here = readers.filter(|(reader, _)| self.is_here(reader.actor));
        here.map(|(_, released)| released.load(Ordering::Acquire)).min().unwrap_or(u64::MAX)
    }

    /// The process that hosts the actor, if it is another one.
    pub(crate) fn process_of(&self, actor: ActorId) -> Option<u32> {
        self.peer_of.get(actor.0 as usize).copied().flatten().map(|peer| self.outboxes[peer].0)
    }

    /// True when the actor is one of this process.
    fn is_here(&self, actor: ActorId) -> bool {
        self.peer_of.get(actor.0 as usize).is_some_and(Option::is_none)
    }

    /// Sends the initial registers' bytes and waits until all peers have done so too, `round` times since the start.
    ///
    /// # Errors
    /// The first cause, if the session fails meanwhile; [`PeerError::Late`] with the peer that is missing,
    /// [`PeerError::Ended`] if it will not come.
    pub(crate) fn refresh(
        &self,
        round: u64,
        timeout: Duration,
        failure: impl Fn() -> Option<Failure>,
    ) -> Result<(), Failure> {
        self.told.iter().for_each(ReleaseClocks::add);
        let refresh = |outbox: &Sender<Outgoing>| outbox.send(Outgoing::Refresh(round, RaceClock::capture()));
        self.outboxes.iter().for_each(|(_, outbox)| drop(refresh(outbox)));
        let deadline = Instant::now() + timeout;
        let mut ready = self.ready();
        while let Some(late) = ready.iter().position(|r| r.0 < round) {
            if let Some(first) = failure() {
                return Err(first);
            }
            if ready[late].2 || Instant::now() >= deadline {
                let is_late = PeerError::Late { seconds: timeout.as_secs() };
                let cause = if ready[late].2 { PeerError::Ended } else { is_late };
                return Err(Failure::Peer { process: self.outboxes[late].0, cause });
            }
            ready = self.changed.wait_timeout(ready, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        ready.iter().for_each(|(_, clock, _)| clock.join());
        Ok(())
    }
}
