//! Converts a plan to the form that the shell runs, in which bases and registers have memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use crossbeam_channel::{Sender, never, unbounded};
use shardflow_actors::remote::Peers;
use shardflow_actors::shell::{ActionProgram, ActorHost, BaseRef, FiringEnd, LoadedPlan, RegisterMemory};
use shardflow_actors::spec::{ActorSpec, RegisterId, StreamKind};
use shardflow_kernels::clock::Stamped;
use shardflow_kernels::device::{Device, Priority};
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::op::Program;

use super::host_io::HostIo;
use super::ports::HostPorts;
use crate::cluster::connector::Connections;
use crate::plan::instance::Instance;
use crate::plan::{ActionPlan, BaseKey, DeviceMemory, HostTransfer, StagingPlace, threads_of};
use crate::process_map::ProcessMap;

/// Prepares the kernels of this process's actors, and assigns memory to registers. `arenas` has at least the devices of
/// this process, and `staging` has their staging memory. Returns the plan, the session's access to its inputs and
/// outputs, and the registers of peers that this process copies, each with the transport of its bytes.
pub(super) fn load(
    plan: &Instance,
    process_map: &ProcessMap,
    devices: &[Device],
    [arenas, staging]: [&BTreeMap<usize, Arena>; 2],
    connections: Connections,
    ports: Arc<HostPorts>,
) -> Result<(LoadedPlan, HostIo, BTreeMap<RegisterId, &'static str>), KernelError> {
    let Connections { engine, mirrors: mut memory, peers, hops, .. } = connections;
    let (ends, fetched) = unbounded();
    let mut hosted = BTreeMap::new();
    for id in process_map.own_actors(plan) {
        let actor = &plan.spec.actors[id];
        let device = &devices[actor.device - process_map.own().start];
        let threads = threads_of(actor.stream, plan.threads_per_device);
        let priority = if actor.stream == StreamKind::Communication { Priority::High } else { Priority::Normal };
        let stream = device.stream_with(&actor.name, threads, engine.clone(), priority)?;
        let memory = plan.memory(actor.device);
        let actions = plan.actions[id].iter();
        let programs: Vec<_> = actions.map(|x| program(&memory, [arenas, staging], actor, x, &ends)).collect();
        programs.iter().try_for_each(|action| stream.prepare(&action.program))?;
        hosted.insert(id, ActorHost { stream, programs });
    }
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
    let host_io = HostIo::new(plan, *process_map, staging, (ports, fetched), from_peers);
    Ok((loaded, host_io, mirrored))
}

/// The program of an action, with its memory in the arenas or the staging memory of the devices. `ends` receives the
/// ends of fetches.
fn program(
    memory: &DeviceMemory,
    [arenas, staging]: [&BTreeMap<usize, Arena>; 2],
    ActorSpec { name, device, stream, .. }: &ActorSpec,
    action: &ActionPlan,
    ends: &Sender<Stamped<FiringEnd>>,
) -> ActionProgram {
    let name = format!("{name} {}", action.name);
    let program = Program { name, launches: action.launches.clone(), signals: action.signals.clone() };
    let base = |arenas: &BTreeMap<usize, Arena>, offset| Base { arena: arenas[device].clone(), offset };
    let bases = action.bases.iter().map(|key| match key {
        BaseKey::Fixed => BaseRef::Fixed(base(arenas, 0)),
        BaseKey::Scratch => BaseRef::Fixed(base(arenas, memory.scratch.get(stream).map_or(0, |scratch| scratch.0))),
        BaseKey::Input(port) => BaseRef::Input(*port),
        BaseKey::Output(port) => BaseRef::Output(*port),
        BaseKey::Staging => {
            let StagingPlace { offset, stride, slots } = memory.staging[&action.segment];
            let memory = RegisterMemory { base: base(staging, offset), stride };
            BaseRef::Ring { memory, slots: slots as u32 }
        }
    });
    let is_fetch = action.host.as_ref().is_some_and(|host| host.transfer == HostTransfer::Fetch);
    ActionProgram { bases: bases.collect(), program: Arc::new(program), ends: is_fetch.then(|| ends.clone()) }
}
