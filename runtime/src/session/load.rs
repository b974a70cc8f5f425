//! Converts a plan to the form that the shell runs: bases and registers become memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, never, unbounded};
use shardflow_actors::remote::{PeerMessage, Peers};
use shardflow_actors::shell::{ActionProgram, ActorHost, BaseRef, FiringEnd, LoadedPlan, RegisterMemory};
use shardflow_actors::spec::{ActorSpec, RegisterId, StreamKind};
use shardflow_kernels::clock::Stamped;
use shardflow_kernels::device::{Device, Priority};
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::op::Program;

use super::ports::HostPorts;
use crate::cluster::connector::Connections;
use crate::plan::instance::Instance;
use crate::plan::{ActionPlan, BaseKey, HostTransfer, StagingPlace, threads_of};
use crate::process_map::ProcessMap;

/// A plan in the form that the shell runs, with the session's ends of its channels.
pub(super) struct Loaded {
    pub(super) plan: LoadedPlan,
    /// Receives the end of each firing of a fetch.
    pub(super) fetched: Receiver<Stamped<FiringEnd>>,
    pub(super) from_peers: Receiver<PeerMessage>,
    /// Peers' registers that this process copies, each with the transport of its bytes.
    pub(super) mirrored: BTreeMap<RegisterId, &'static str>,
}

/// Prepares the kernels of this process's actors, and assigns memory to registers. `arenas` has at least the devices of
/// this process, and `staging` has their staging memory.
pub(super) fn load(
    plan: &Instance,
    process_map: &ProcessMap,
    devices: &[Device],
    (arenas, staging): (&BTreeMap<usize, Arena>, &BTreeMap<usize, Arena>),
    connections: Connections,
    ports: &HostPorts,
) -> Result<Loaded, KernelError> {
    let Connections { engine, mirrors: mut memory, peers, distant, hops, .. } = connections;
    let (sender, fetched) = unbounded();
    let loader = Loader { plan, arenas, staging, sender };
    let mut hosted = BTreeMap::new();
    for id in process_map.actors_of(plan, process_map.process) {
        let actor = &plan.spec.actors[id.0 as usize];
        let device = &devices[actor.device - process_map.own().start];
        let threads = threads_of(actor.stream, plan.threads_per_device);
        let urgent = actor.stream == StreamKind::Communication;
        let priority = if urgent { Priority::High } else { Priority::Normal };
        let stream = device.stream_with(&actor.name, threads, engine.clone(), priority)?;
        let programs: Vec<_> = plan.actions[id.0 as usize].iter().map(|action| loader.program(actor, action)).collect();
        programs.iter().try_for_each(|action| stream.prepare(&action.program))?;
        hosted.insert(id, ActorHost { stream, programs });
    }
    let is_piped = |register: &RegisterId| peers.iter().any(|peer| peer.pipes.contains_key(register));
    let transport = |register: &RegisterId| (*register, if is_piped(register) { "nccl" } else { "socket" });
    let mirrored = memory.keys().map(transport).collect();
    for (index, place) in plan.registers.iter().enumerate() {
        let Some(arena) = arenas.get(&place.device) else { continue };
        let base = Base { arena: arena.clone(), offset: place.offset };
        memory.insert(RegisterId(index as u32), RegisterMemory { base, stride: place.stride });
    }
    let (host, from_peers) = unbounded();
    let peers = Peers { peers, distant, hops, host_ports: ports.ports.clone(), host: Some(host) };
    let loaded = LoadedPlan { spec: Arc::new(plan.spec.clone()), hosted, memory, engine, peers };
    // Without fetches, the channel has no senders and would count as closed.
    let has_fetches = ports.fetches.keys().any(|(device, _)| process_map.own().contains(device));
    let fetched = if has_fetches { fetched } else { never() };
    Ok(Loaded { plan: loaded, fetched, from_peers, mirrored })
}

struct Loader<'a> {
    plan: &'a Instance,
    arenas: &'a BTreeMap<usize, Arena>,
    staging: &'a BTreeMap<usize, Arena>,
    sender: Sender<Stamped<FiringEnd>>,
}

impl Loader<'_> {
    fn program(&self, ActorSpec { name, device, stream, .. }: &ActorSpec, action: &ActionPlan) -> ActionProgram {
        let name = format!("{name} {}", action.name);
        let program = Program { name, launches: action.launches.clone(), signals: action.signals.clone() };
        let base = |arenas: &BTreeMap<usize, Arena>, offset| Base { arena: arenas[device].clone(), offset };
        let memory = &self.plan.memory[*device];
        let scratch = memory.scratch.get(stream).map_or(0, |s| s.0);
        let bases = action.bases.iter().map(|key| match key {
            BaseKey::Fixed => BaseRef::Fixed(base(self.arenas, 0)),
            BaseKey::Scratch => BaseRef::Fixed(base(self.arenas, scratch)),
            BaseKey::Input(port) => BaseRef::Input(*port),
            BaseKey::Output(port) => BaseRef::Output(*port),
            BaseKey::Staging => {
                let StagingPlace { offset, stride, slots } = memory.staging[&action.segment];
                let memory = RegisterMemory { base: base(self.staging, offset), stride };
                BaseRef::Ring { memory, slots: slots as u32 }
            }
        });
        let is_fetch = action.host.as_ref().is_some_and(|host| host.transfer == HostTransfer::Fetch);
        let ends = is_fetch.then(|| self.sender.clone());
        ActionProgram { bases: bases.collect(), program: Arc::new(program), ends }
    }
}
