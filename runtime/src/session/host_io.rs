//! Tensors between the host, devices and other processes. A tensor passes between host and device through a slot of
//! staging memory, and permission to use the slot passes with it: the token of a feed's firing follows its tensors, and
//! the end of a fetch's firing precedes them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, after, never, select};
use parking_lot::Mutex;
use shardflow_actors::error::{Failure, PeerError};
use shardflow_actors::remote::{HostPiece, PeerMessage};
use shardflow_actors::shell::{FiringEnd, RunningSession};
use shardflow_actors::spec::ActionRef;
use shardflow_kernels::clock::Stamped;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::Arena;
use shardflow_kernels::tensor::{HostTensor, Region};

use super::error::stopped;
use super::exchange::Inbox;
use super::ports::HostPorts;
use crate::cluster::world::World;
use crate::graph::Var;
use crate::plan::instance::Instance;
use crate::plan::segments::SegmentId;
use crate::plan::{HostPort, HostTransfer, StagingPlace};
use crate::process_map::ProcessMap;

/// Interval without arrivals after which a waiting process checks whether a sender has left.
const DEPARTURE_CHECK: Duration = Duration::from_millis(500);

/// The host's side of its actions on this process's devices, and of the ports between processes.
pub(super) struct HostIo {
    plan: Arc<Instance>,
    process_map: ProcessMap,
    feeds: Vec<StagedAction>,
    fetches: BTreeMap<ActionRef, StagedAction>,
    /// External actions that get no tensors from the host, with their firings per step.
    unfed: Vec<(ActionRef, u32)>,
    /// Receives the end of each firing of a fetch.
    fetched: Receiver<Stamped<FiringEnd>>,
    /// Ports of host data between processes; equal on all processes.
    pub(super) ports: Arc<HostPorts>,
    pub(super) inbox: Mutex<Inbox>,
}

/// An action of the host on a device, with its staging memory.
struct StagedAction {
    at: ActionRef,
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

    /// Writes the tensors of a firing. `tensor` returns a region of a tensor.
    fn write<'a>(&self, firing: u64, tensor: impl Fn(Var) -> (Cow<'a, HostTensor>, Region)) -> Result<(), KernelError> {
        for (var, buffer) in self.host.vars.iter().zip(&self.host.buffers) {
            let (tensor, region) = tensor(*var);
            if (tensor.dtype(), &region.size) != (buffer.dtype, &buffer.shape) {
                let [expected, got] =
                    [(buffer.dtype, &buffer.shape), (tensor.dtype(), &region.size)].map(|of| format!("{of:?}"));
                return Err(KernelError::arguments("feed", "tensor", expected, got));
            }
            self.arena.write_region(self.slot(firing) + buffer.offset, &tensor, &region)?;
        }
        Ok(())
    }

    fn read(&self, firing: u64) -> Result<Vec<HostTensor>, KernelError> {
        let buffers = self.host.buffers.iter();
        buffers.map(|b| self.arena.read_host(self.slot(firing) + b.offset, &b.shape, b.dtype)).collect()
    }
}

impl HostIo {
    /// `staging` has the staging memory of this process's devices.
    pub(super) fn new(
        plan: &Arc<Instance>,
        process_map: ProcessMap,
        staging: &BTreeMap<usize, Arena>,
        (ports, fetched): (Arc<HostPorts>, Receiver<Stamped<FiringEnd>>),
        from_peers: Receiver<PeerMessage>,
    ) -> Self {
        let (mut feeds, mut fetches, mut unfed) = (Vec::new(), BTreeMap::new(), Vec::new());
        for actor in process_map.actors_of(plan, process_map.process) {
            let (spec, plans) = (plan.spec.actor(actor), &plan.actions[actor.0 as usize]);
            for ((action, spec_action), action_plan) in (0..).zip(&spec.actions).zip(plans) {
                let at = ActionRef { actor, action };
                let (device, segment) = (spec.device, action_plan.segment);
                let staged = action_plan.host.clone().map(|host| {
                    let (arena, place) = (staging[&device].clone(), plan.memory[device].staging[&segment]);
                    StagedAction { at, device, segment, host, arena, place }
                });
                match staged {
                    Some(staged) if staged.host.transfer != HostTransfer::Fetch => feeds.push(staged),
                    staged => {
                        fetches.extend(staged.map(|fetch| (at, fetch)));
                        unfed.extend(spec_action.external.then_some((at, spec_action.per_step)));
                    }
                }
            }
        }
        let inbox = Mutex::new(Inbox::new(ports.clone(), from_peers));
        Self { plan: plan.clone(), process_map, feeds, fetches, unfed, fetched, ports, inbox }
    }

    /// Starts a step: feeds the tensors of each firing and allows it, and allows all actions without tensors. `tensor`
    /// returns a region of the tensor for a device and a micro-batch.
    pub(super) fn feed_batch<'a>(
        &self,
        running: &RunningSession,
        tensor: impl Fn(Var, usize, usize) -> (Cow<'a, HostTensor>, Region),
    ) -> Result<(), Failure> {
        self.feed(running, HostTransfer::Feed, tensor)?;
        self.unfed.iter().try_for_each(|(at, firings)| running.add_tokens(at.actor, at.action, *firings))
    }

    /// Feeds `decision` to the actions that wait for the host's decision.
    pub(super) fn decide(&self, running: &RunningSession, decision: &HostTensor) -> Result<(), Failure> {
        let tensor = |_, _, _| (Cow::Borrowed(decision), Region::whole(&decision.shape));
        self.feed(running, HostTransfer::Decide, tensor)
    }

    fn feed<'a>(
        &self,
        running: &RunningSession,
        transfer: HostTransfer,
        tensor: impl Fn(Var, usize, usize) -> (Cow<'a, HostTensor>, Region),
    ) -> Result<(), Failure> {
        let feeds = self.feeds.iter().filter(|feed| feed.host.transfer == transfer);
        // All devices get their first micro-batch before any gets its second.
        for firing in 0..feeds.clone().map(|feed| feed.place.slots).max().unwrap_or(0) {
            for feed in feeds.clone().filter(|feed| firing < feed.place.slots) {
                // Every step begins with slot 0, because it has a firing for each slot.
                let written = feed.write(firing as u64, |var| tensor(var, feed.device, firing));
                written.map_err(|cause| self.kernel_failure(feed, cause))?;
                running.add_tokens(feed.at.actor, feed.at.action, 1)?;
            }
        }
        Ok(())
    }

    fn kernel_failure(&self, StagedAction { at, device, .. }: &StagedAction, cause: KernelError) -> Failure {
        let (spec, cause) = (&self.plan.spec, Box::new(cause));
        let action = spec.action(at.actor, at.action).name.clone();
        Failure::Kernel { actor: spec.actor(at.actor).name.clone(), device: *device, action, cause }
    }

    /// Reads the tensors of a fetch, and sends them.
    fn forward(&self, running: &RunningSession, inbox: &mut Inbox, end: Stamped<FiringEnd>) -> Result<(), Failure> {
        let FiringEnd { at, firing } = end.open();
        let fetch = &self.fetches[&at];
        let tensors = fetch.read(firing).map_err(|cause| self.kernel_failure(fetch, cause))?;
        let port = self.ports.fetches[&(fetch.device, fetch.segment)].0;
        self.send_to(running, inbox, HostPiece { port, tensors });
        Ok(())
    }

    /// Sends a piece to the processes of its port's route, and adds it to this process's inbox.
    pub(super) fn send(&self, running: &RunningSession, piece: HostPiece) {
        self.send_to(running, &mut self.inbox.lock(), piece);
    }

    fn send_to(&self, running: &RunningSession, inbox: &mut Inbox, piece: HostPiece) {
        let piece = Arc::new(piece);
        if self.process_map.processes > 1 {
            running.send_host_piece(&piece);
        }
        inbox.put(piece);
    }

    /// Waits for these pieces, and sends this process's fetches meanwhile. Fails if a piece takes longer than `limit`.
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
        let peers = inbox.peers.clone();
        loop {
            let missing = inbox.missing_senders(wanted);
            let Some(sender) = missing.first().copied() else { break };
            running.host_waits_for((sender != self.process_map.process).then_some(sender));
            // Pieces travel along the control tree and arrive in order.
            let hop = |process: u32| world.map_or(process, |world| world.hop(process));
            if let Some(process) = missing.iter().copied().map(hop).find(|hop| inbox.ended.contains(hop)) {
                return Err(Failure::Peer { process, cause: PeerError::Ended });
            }
            select! {
                recv(self.fetched) -> end => self.forward(running, &mut inbox, end.map_err(|_| ended())?)?,
                recv(peers) -> message => inbox.receive(message.map_err(|_| ended())?),
                recv(running.failures()) -> failure => return Err(failure.unwrap_or_else(|_| ended())),
                recv(timeout) -> _ => {
                    let seconds = limit.unwrap_or_default().as_secs();
                    return Err(Failure::Peer { process: sender, cause: PeerError::Late { seconds } });
                }
                // Everything that a process sent before it left has arrived by now.
                default(DEPARTURE_CHECK) => {
                    let has_left = |process: &u32| world.is_some_and(|world| world.has_left(*process));
                    if let Some(process) = missing.into_iter().find(has_left) {
                        return Err(Failure::Peer { process, cause: PeerError::Ended });
                    }
                }
            }
        }
        running.host_waits_for(None);
        Ok(())
    }
}
