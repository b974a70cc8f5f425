//! Moves tensors between the host, devices and other processes. A tensor passes between host and device through a slot
//! of staging memory. For a feed, the host writes the slot, and then allows the firing by a token. For a fetch, the
//! host reads the slot after the end of the firing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, after, never, select};
use parking_lot::Mutex;
use shardflow_actors::error::{Failure, PeerError};
use shardflow_actors::remote::{HostPiece, PeerMessage};
use shardflow_actors::shell::{FiringEnd, RunningSession};
use shardflow_actors::spec::ActionRef;
use shardflow_kernels::clock::Stamped;
use shardflow_kernels::memory::Arena;
use shardflow_kernels::op::Buffer;
use shardflow_kernels::tensor::HostTensor;

use super::batch::Part;
use super::error::stopped;
use super::ports::HostPorts;
use crate::cluster::world::World;
use crate::graph::Var;
use crate::plan::instance::Instance;
use crate::plan::segments::SegmentId;
use crate::plan::{ActionPlan, HostPort, HostTransfer, StagingPlace};
use crate::process_map::ProcessMap;

/// Interval without arrivals after which a waiting process checks whether a sender has left.
const DEPARTURE_CHECK: Duration = Duration::from_millis(500);

/// The host's side of the external actions on this process's devices, and of the ports between processes.
pub(super) struct HostIo {
    process_map: ProcessMap,
    /// Actions that exchange tensors with the host.
    staged: BTreeMap<ActionRef, StagedAction>,
    /// External actions that the host does not feed, with their firings per step.
    unfed: Vec<(ActionRef, u32)>,
    /// Receives the end of each firing of a fetch.
    fetched: Receiver<Stamped<FiringEnd>>,
    /// Ports of host data between processes; equal on all processes.
    pub(super) ports: Arc<HostPorts>,
    from_peers: Receiver<PeerMessage>,
    pub(super) inbox: Mutex<Inbox>,
}

/// Received pieces by port, including those of this process's own ports. A peer may be one step ahead of this process.
#[derive(Default)]
pub(super) struct Inbox {
    waiting: BTreeMap<u32, VecDeque<Arc<HostPiece>>>,
    /// The number of pieces that the latest wait still needs, by port.
    missing: BTreeMap<u32, usize>,
    /// Processes that will send no more pieces.
    ended: BTreeSet<u32>,
}

impl Inbox {
    fn put(&mut self, piece: Arc<HostPiece>) {
        if let Some(missing) = self.missing.get_mut(&piece.port) {
            *missing -= 1;
            if *missing == 0 {
                self.missing.remove(&piece.port);
            }
        }
        self.waiting.entry(piece.port).or_default().push_back(piece);
    }

    /// Begins a wait for these pieces, each port with its number of pieces.
    fn expect(&mut self, wanted: &[(u32, usize)]) {
        let missing = |(port, count): &(u32, usize)| {
            let waiting = self.waiting.get(port).map_or(0, VecDeque::len);
            (*count > waiting).then(|| (*port, count - waiting))
        };
        self.missing = wanted.iter().filter_map(missing).collect();
    }

    /// Removes and returns up to `count` of a port's oldest pieces.
    pub(super) fn take(&mut self, port: u32, count: usize) -> Vec<Vec<HostTensor>> {
        let Some(pieces) = self.waiting.get_mut(&port) else { return Vec::new() };
        let tensors = |piece| {
            Arc::try_unwrap(piece).map_or_else(|piece: Arc<HostPiece>| piece.tensors.clone(), |piece| piece.tensors)
        };
        pieces.drain(..count.min(pieces.len())).map(tensors).collect()
    }
}

/// The tensors that an action exchanges with the host, and their staging memory.
struct StagedAction {
    device: usize,
    segment: SegmentId,
    host: HostPort,
    arena: Arena,
    place: StagingPlace,
}

impl StagedAction {
    /// Offset of a firing's slot.
    fn slot(&self, firing: u64) -> usize {
        self.place.offset + (firing % self.place.slots as u64) as usize * self.place.stride
    }

    /// # Panics
    /// Panics if a tensor does not fit its place in the slot: a planner bug, because the batch has been checked.
    fn write<'a>(&self, firing: u64, part: impl Fn(Var) -> Part<'a>) {
        for (var, Buffer { offset, shape, dtype, .. }) in self.host.vars.iter().zip(&self.host.buffers) {
            let (tensor, region) = part(*var);
            assert_eq!((tensor.dtype(), &region.size), (*dtype, shape), "a fed tensor has the wrong type or shape");
            let written = self.arena.write_region(self.slot(firing) + offset, &tensor, &region);
            written.expect("the tensor has room in its slot");
        }
    }

    fn read(&self, firing: u64) -> Vec<HostTensor> {
        let read = |buffer: &Buffer| {
            let found = self.arena.read_host(self.slot(firing) + buffer.offset, &buffer.shape, buffer.dtype);
            found.expect("the tensor lies in its slot")
        };
        self.host.buffers.iter().map(read).collect()
    }
}

impl HostIo {
    /// `staging` has the staging memory of this process's devices.
    pub(super) fn new(
        plan: &Instance,
        process_map: ProcessMap,
        staging: &BTreeMap<usize, Arena>,
        (ports, fetched): (Arc<HostPorts>, Receiver<Stamped<FiringEnd>>),
        from_peers: Receiver<PeerMessage>,
    ) -> Self {
        let (mut staged, mut unfed) = (BTreeMap::new(), Vec::new());
        for actor in process_map.own_actors(plan) {
            let (spec, plans) = (plan.spec.actor(actor), &plan.actions[actor]);
            for ((action, spec_action), ActionPlan { host, segment, .. }) in (0..).zip(&spec.actions).zip(plans) {
                let at = ActionRef { actor, action };
                if spec_action.external && host.as_ref().is_none_or(|host| host.transfer == HostTransfer::Fetch) {
                    unfed.push((at, spec_action.per_step));
                }
                if let Some(host) = host.clone() {
                    let (device, segment) = (spec.device, *segment);
                    let (arena, place) = (staging[&device].clone(), plan.memory(device).staging[&segment]);
                    staged.insert(at, StagedAction { device, segment, host, arena, place });
                }
            }
        }
        Self { process_map, staged, unfed, fetched, ports, from_peers, inbox: Mutex::default() }
    }

    /// Feeds each firing its parts, and then allows the firing. A transfer of inputs begins a step, so the call
    /// then also allows all actions that the host does not feed. `part` returns the part of a device and a micro-batch.
    pub(super) fn feed<'a>(
        &self,
        running: &RunningSession,
        transfer: HostTransfer,
        part: impl Fn(Var, usize, usize) -> Part<'a>,
    ) -> Result<(), Failure> {
        let feeds = self.staged.iter().filter(|(_, feed)| feed.host.transfer == transfer);
        // All devices get their first micro-batch before any gets its second.
        for firing in 0..feeds.clone().map(|(_, feed)| feed.place.slots).max().unwrap_or(0) {
            for (at, feed) in feeds.clone().filter(|(_, feed)| firing < feed.place.slots) {
                // Every step begins with slot 0, because a step has one firing for each slot.
                feed.write(firing as u64, |var| part(var, feed.device, firing));
                running.add_tokens(at.actor, at.action, 1)?;
            }
        }
        let unfed = self.unfed.iter().filter(|_| transfer == HostTransfer::Feed);
        unfed.into_iter().try_for_each(|(at, firings)| running.add_tokens(at.actor, at.action, *firings))
    }

    /// Reads the tensors of a fetch, and sends them.
    fn forward(&self, running: &RunningSession, inbox: &mut Inbox, end: Stamped<FiringEnd>) {
        let FiringEnd { at, firing } = end.open();
        let fetch = &self.staged[&at];
        let mut ports = self.ports.fetches(fetch.device).filter(|(segment, ..)| *segment == fetch.segment);
        let (_, port, _) = ports.next().expect("the plan has a port for every fetch");
        self.send(running, inbox, HostPiece { port, tensors: fetch.read(firing) });
    }

    /// Sends a piece to the processes of its port's route, and adds it to this process's inbox.
    pub(super) fn send(&self, running: &RunningSession, inbox: &mut Inbox, piece: HostPiece) {
        let piece = Arc::new(piece);
        if self.process_map.processes > 1 {
            running.send_host_piece(&piece);
        }
        inbox.put(piece);
    }

    /// Waits for these pieces, each port with its number of pieces, and sends this process's fetches meanwhile. Fails if
    /// the pieces have not all arrived after `limit`.
    pub(super) fn receive(
        &self,
        running: &RunningSession,
        world: Option<&World>,
        wanted: &[(u32, usize)],
        limit: Option<Duration>,
    ) -> Result<(), Failure> {
        let timeout = limit.map_or_else(never, after);
        // A closed channel means that the session has failed. The result is its first failure.
        let ended = || running.control().first_failure().unwrap_or_else(stopped);
        let mut inbox = self.inbox.lock();
        inbox.expect(wanted);
        while let Some(first) = inbox.missing.keys().next() {
            let sender = self.ports.sender(*first);
            running.host_waits_for((sender != self.process_map.process).then_some(sender));
            if !inbox.ended.is_empty() {
                // Pieces travel along the control tree and arrive in order.
                let hop = |process: u32| world.map_or(process, |world| world.hop(process));
                let mut hops = inbox.missing.keys().map(|port| hop(self.ports.sender(*port)));
                if let Some(process) = hops.find(|hop| inbox.ended.contains(hop)) {
                    return Err(Failure::Peer { process, cause: PeerError::Ended });
                }
            }
            select! {
                recv(self.fetched) -> end => self.forward(running, &mut inbox, end.map_err(|_| ended())?),
                recv(self.from_peers) -> message => match message.map_err(|_| ended())? {
                    PeerMessage::Piece(piece) => inbox.put(piece),
                    PeerMessage::Ended { process } => drop(inbox.ended.insert(process)),
                },
                recv(running.failures()) -> failure => return Err(failure.unwrap_or_else(|_| ended())),
                recv(timeout) -> _ => {
                    let seconds = limit.unwrap_or_default().as_secs();
                    return Err(Failure::Peer { process: sender, cause: PeerError::Late { seconds } });
                }
                // Everything that a process sent before it left has arrived by now.
                default(DEPARTURE_CHECK) => {
                    let has_left = |process: &u32| world.is_some_and(|world| world.has_left(*process));
                    let mut senders = inbox.missing.keys().map(|port| self.ports.sender(*port));
                    if let Some(process) = senders.find(has_left) {
                        return Err(Failure::Peer { process, cause: PeerError::Ended });
                    }
                }
            }
        }
        running.host_waits_for(None);
        Ok(())
    }
}
