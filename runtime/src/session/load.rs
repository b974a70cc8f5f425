//! Converts a plan to the form that the shell runs: bases and registers become memory, host ports become kernels.

use std::collections::BTreeMap;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, never, unbounded};
use shardflow_actors::remote::{PeerMessage, Peers};
use shardflow_actors::shell::{ActionProgram, ActorHost, BaseRef, LoadedPlan, RegisterMemory};
use shardflow_actors::spec::{ActorId, ActorSpec, RegisterId, StreamKind};
use shardflow_kernels::clock::Stamped;
use shardflow_kernels::device::{Device, Priority};
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::op::{CustomKernel, Launch, Op, Program};
use shardflow_kernels::tensor::HostTensor;

use super::host::{Fetched, HostIn, HostOut};
use super::ports::HostPorts;
use crate::cluster::connector::Connections;
use crate::graph::{Rate, Var};
use crate::plan::instance::Instance;
use crate::plan::{ActionPlan, BaseKey, HostTransfer, threads_of};
use crate::process_map::ProcessMap;

/// External actions of these actors that get no tensors from the host: actor, action and firings per step.
pub(super) fn external_actions(plan: &Instance, actors: &[ActorId]) -> Vec<(ActorId, u32, u32)> {
    let mut out = Vec::new();
    for actor in actors {
        let (spec, plans) = (plan.spec.actor(*actor), &plan.actions[*actor]);
        for (index, (action, plan)) in spec.actions.iter().zip(plans).enumerate() {
            let is_fed = plan.host.as_ref().is_some_and(|host| host.transfer != HostTransfer::Fetch);
            if action.external && !is_fed {
                out.push((*actor, index as u32, action.per_step));
            }
        }
    }
    out
}

/// A plan in the form that the shell runs, with the session's ends of the channels to the host kernels.
pub(super) struct Loaded {
    pub(super) plan: LoadedPlan,
    pub(super) feeds: Vec<FeedPort>,
    pub(super) fetched: Receiver<Stamped<Fetched>>,
    pub(super) from_peers: Receiver<PeerMessage>,
    /// Peers' registers that this process copies, each with the transport of its bytes.
    pub(super) mirrored: BTreeMap<RegisterId, &'static str>,
}

/// Prepares the kernels of this process's actors, and assigns memory to registers.
pub(super) fn load(
    plan: &Instance,
    process_map: &ProcessMap,
    devices: &[Device],
    arenas: &BTreeMap<usize, Arena>,
    connections: Connections,
    ports: &Arc<HostPorts>,
) -> Result<Loaded, KernelError> {
    let Connections { engine, mirrors: mut memory, peers, hops, .. } = connections;
    let (sender, fetched) = unbounded();
    let mut loader = Loader { plan, arenas, feeds: Vec::new(), sender };
    let mut hosted = BTreeMap::new();
    for id in process_map.own_actors(plan) {
        let actor = &plan.spec.actors[id];
        let device = &devices[actor.device - process_map.own().start];
        let threads = threads_of(actor.stream, plan.threads_per_device);
        let urgent = actor.stream == StreamKind::Communication;
        let priority = if urgent { Priority::High } else { Priority::Normal };
        let stream = device.stream_with(&actor.name, threads, engine.clone(), priority)?;
        let actions = 0..plan.actions[id].len();
        let programs: Vec<_> = actions.map(|action| loader.program(id, action)).collect();
        programs.iter().try_for_each(|action| stream.prepare(&action.program))?;
        hosted.insert(id, ActorHost { stream, programs });
    }
    let feeds = loader.feeds;
    let is_piped = |register: &RegisterId| peers.iter().any(|peer| peer.pipes.contains_key(register));
    let transport = |register: &RegisterId| (*register, if is_piped(register) { "nccl" } else { "socket" });
    let mirrored = memory.keys().map(transport).collect();
    for (id, place) in plan.registers.iter() {
        let Some(arena) = arenas.get(&place.device) else { continue };
        let base = Base { arena: arena.clone(), offset: place.offset };
        memory.insert(id, RegisterMemory { base, stride: place.stride });
    }
    let (host, from_peers) = unbounded();
    let peers = Peers { peers, hops, directory: ports.clone(), host: Some(host) };
    let loaded = LoadedPlan { spec: Arc::new(plan.spec.clone()), hosted, memory, engine, peers };
    // Without fetches, the channel has no senders and would count as closed.
    let has_fetches = process_map.own().any(|device| ports.fetches(device).next().is_some());
    let fetched = if has_fetches { fetched } else { never() };
    Ok(Loaded { plan: loaded, feeds, fetched, from_peers, mirrored })
}

struct Loader<'a> {
    plan: &'a Instance,
    /// Arenas by device, for at least the devices of this process.
    arenas: &'a BTreeMap<usize, Arena>,
    feeds: Vec<FeedPort>,
    sender: Sender<Stamped<Fetched>>,
}

/// Port through which the host sends tensors to an action.
pub(super) struct FeedPort {
    pub(super) actor: ActorId,
    pub(super) action: u32,
    pub(super) device: usize,
    pub(super) rate: Rate,
    /// True if the host feeds the action after the results of the step have arrived.
    pub(super) decides: bool,
    pub(super) vars: Vec<Var>,
    pub(super) sender: Sender<Vec<HostTensor>>,
}

impl Loader<'_> {
    fn program(&mut self, actor: ActorId, index: usize) -> ActionProgram {
        let action = &self.plan.actions[actor][index];
        let ActorSpec { name, device, stream, .. } = &self.plan.spec.actors[actor];
        let mut launches = action.launches.clone();
        launches.extend(self.host_launch(actor, index, *device, action));
        let name = format!("{name} {}", action.name);
        let program = Program { name, launches, signals: action.signals.clone() };
        let fixed = |offset: usize| BaseRef::Fixed(Base { arena: self.arenas[device].clone(), offset });
        let scratch = self.plan.memory(*device).scratch.get(stream).map_or(0, |s| s.0);
        let bases = action.bases.iter().map(|base| match base {
            BaseKey::Fixed => fixed(0),
            BaseKey::Scratch => fixed(scratch),
            BaseKey::Input(port) => BaseRef::Input(*port),
            BaseKey::Output(port) => BaseRef::Output(*port),
        });
        ActionProgram { bases: bases.collect(), program: Arc::new(program) }
    }

    fn host_launch(&mut self, actor: ActorId, index: usize, device: usize, action: &ActionPlan) -> Option<Launch> {
        let port = action.host.as_ref()?;
        let rate = self.plan.segments.get(action.segment).rate;
        let (kernel, reads, writes): (Arc<dyn CustomKernel>, _, _) = match port.transfer {
            HostTransfer::Feed | HostTransfer::Decide => {
                let decides = port.transfer == HostTransfer::Decide;
                let (sender, receiver) = unbounded();
                let vars = port.vars.clone();
                self.feeds.push(FeedPort { actor, action: index as u32, device, rate, decides, vars, sender });
                (Arc::new(HostIn { receiver }), Vec::new(), port.buffers.clone())
            }
            HostTransfer::Fetch => {
                let sender = self.sender.clone();
                (Arc::new(HostOut { device, segment: action.segment, sender }), port.buffers.clone(), Vec::new())
            }
        };
        Some(Launch { op: Op::Custom(kernel), reads, writes, accumulate: false, workspace: None })
    }
}
