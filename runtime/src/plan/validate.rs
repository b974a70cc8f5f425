//! Refuses plans that would deadlock, call different collectives, overlap in memory or exceed the memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shardflow_actors::check::PERIOD_STEPS_MAX;
use shardflow_actors::simulate::{SimulationError, SimulationOptions, Timing, simulate};
use shardflow_actors::spec::{ActorId, Firing};
use shardflow_kernels::collective::{CollectiveCall, CollectiveKind};
use shardflow_kernels::op::Launch;
use shardflow_kernels::tensor::element_count;

use crate::plan::{ActionKey, BaseKey, DeviceMemory, Plan};

/// Why a plan is refused.
#[derive(Clone, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages explain variants and fields")]
pub enum PlanError {
    #[error("the plan cannot run to completion: {0}")]
    Liveness(String),
    #[error(
        "devices {} and {} call different collectives of group {group}: {} versus {}",
        first.0, second.0, first.1, second.1
    )]
    CollectiveOrder { group: u32, first: (usize, String), second: (usize, String) },
    #[error(
        "the plan does not fit: a device has {budget} bytes\n{table}reduce the batch, use more micro-batches or more devices"
    )]
    Memory { budget: usize, table: String },
    #[error(
        "the plan does not fit: this node has {budget} bytes free ({bound}), but the job needs {needed} bytes\n{table}reduce \
         the batch, use more micro-batches or more nodes, or give the job more memory"
    )]
    NodeMemory { budget: u64, bound: String, needed: u64, extra: u64, table: String },
    /// A buffer is outside its register, scratch or arena: a planner bug.
    #[error("{action}: launch {launch} ({op}): a buffer ends at byte {end}, but its memory has only {size} bytes")]
    Bounds { action: String, launch: usize, op: String, end: usize, size: usize },
    /// Two parts of a device's arena overlap, or a part exceeds it: a planner bug.
    #[error("device {device}: {first} ends at byte {end}, but {second} starts at byte {start}")]
    Overlap { device: usize, first: String, end: usize, second: String, start: usize },
}

/// Minimum number of simulated steps: enough to reuse every register's slots.
const STEPS: u32 = 2;

/// Checks the order of collectives, bounds, memory and liveness.
///
/// # Errors
/// The first failed check.
pub fn validate(plan: &Plan) -> Result<(), PlanError> {
    check_collectives(plan)?;
    check_collective_order(plan)?;
    check_bounds(plan)?;
    check_disjoint(plan)?;
    check_decisions(plan)?;
    memory(plan)?;
    let spec = Arc::new(plan.spec.clone());
    let liveness = |e: SimulationError| PlanError::Liveness(e.to_string());
    // `simulate` refuses a longer period.
    let steps = spec.period_steps().min(PERIOD_STEPS_MAX) as u32;
    simulate(&spec, &Timing::uniform(&spec, 1, 0), &SimulationOptions::steps(steps.max(STEPS))).map_err(liveness)?;
    Ok(())
}

/// The part of a call that is equal on all members: all regions, but not the member's own index.
fn signature(call: &CollectiveCall) -> String {
    match &call.kind {
        CollectiveKind::Send { to } => format!("send to {to}"),
        CollectiveKind::Receive { from } => format!("receive from {from}"),
        kind => format!("{kind:?}"),
    }
}

/// Checks, for each group and action, that all members make the same calls in launch order.
fn check_collectives(plan: &Plan) -> Result<(), PlanError> {
    let mut seen: BTreeMap<(u32, ActionKey), (usize, Vec<String>)> = BTreeMap::new();
    for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
        for action in actions {
            let mut calls: BTreeMap<u32, Vec<String>> = BTreeMap::new();
            action.collectives().for_each(|call| calls.entry(call.group.id).or_default().push(signature(call)));
            for (group, calls) in calls {
                let first = seen.entry((group, action.key)).or_insert_with(|| (actor.device, calls.clone()));
                let longest = first.1.len().max(calls.len());
                if let Some(at) = (0..longest).find(|i| first.1.get(*i) != calls.get(*i)) {
                    let call = |calls: &[String]| {
                        let call = calls.get(at).map_or("nothing", String::as_str);
                        format!("{call} as call {at} of {}", action.name)
                    };
                    let (first, second) = ((first.0, call(&first.1)), (actor.device, call(&calls)));
                    return Err(PlanError::CollectiveOrder { group, first, second });
                }
            }
        }
    }
    Ok(())
}

/// Checks that all members fire the actions that call a group's collectives in the same order.
fn check_collective_order(plan: &Plan) -> Result<(), PlanError> {
    let mut seen: BTreeMap<u32, (usize, String)> = BTreeMap::new();
    for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
        let list: Vec<usize> = match &actor.firing {
            Firing::Ordered(list) => list.iter().map(|i| *i as usize).collect(),
            // Without a list, the order is defined only if a single action calls collectives.
            Firing::Credit => (0..actions.len()).collect(),
        };
        let mut orders: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
        for action in list.into_iter().map(|index| &actions[index]) {
            let groups: BTreeSet<u32> = action.collectives().map(|call| call.group.id).collect();
            groups.into_iter().for_each(|group| orders.entry(group).or_default().push(&action.name));
        }
        for (group, order) in orders {
            let own = (actor.device, order.join(" "));
            let first = seen.entry(group).or_insert_with(|| own.clone());
            if first.1 != own.1 {
                return Err(PlanError::CollectiveOrder { group, first: first.clone(), second: own });
            }
        }
    }
    Ok(())
}

/// The host decides on a step's update after it has fetched all outputs, so no output may come from the update.
fn check_decisions(plan: &Plan) -> Result<(), PlanError> {
    let key = |(actor, action): (ActorId, u32)| plan.actions[actor.0 as usize][action as usize].key;
    for (index, actions) in plan.actions.iter().enumerate() {
        let specs = &plan.spec.actors[index].actions;
        let fetches = actions.iter().zip(specs).filter(|(action, _)| matches!(action.key, ActionKey::Fetch(_)));
        for register in fetches.flat_map(|(_, spec)| spec.inputs.iter().map(|input| input.register)) {
            let producer = plan.spec.register(register).producer;
            let writer = plan.spec.writer(register).map(|(action, _)| key((producer, action)));
            if matches!(writer, Some(ActionKey::Decide | ActionKey::Update)) {
                let name = plan.spec.register_name(register);
                let why = format!(
                    "the host fetches register '{name}', which the update writes, but the update starts only after that fetch"
                );
                return Err(PlanError::Liveness(why));
            }
        }
    }
    Ok(())
}

/// Checks that no device needs more than the plan's memory limit.
///
/// # Errors
/// [`PlanError::Memory`].
pub fn memory(plan: &Plan) -> Result<(), PlanError> {
    let Some(budget) = plan.memory_bytes else { return Ok(()) };
    if plan.memory.iter().all(|m| m.total_bytes() <= budget) {
        return Ok(());
    }
    let row = |(device, memory): (usize, &DeviceMemory)| memory.row(device);
    Err(PlanError::Memory { budget, table: plan.memory.iter().enumerate().map(row).collect() })
}

/// Checks that fixed tensors, slots and scratch of a device do not overlap and end within its arena.
fn check_disjoint(plan: &Plan) -> Result<(), PlanError> {
    let after = "the memory after the arena";
    let ends = |m: &DeviceMemory| {
        vec![(0, m.fixed_bytes, "fixed tensors".to_string()), (m.arena_bytes, usize::MAX, after.into())]
    };
    let mut parts: Vec<Vec<(usize, usize, String)>> = plan.memory.iter().map(ends).collect();
    for (place, register) in plan.registers.iter().zip(&plan.spec.registers) {
        let end = place.offset + place.stride * register.slots as usize;
        parts[place.device].push((place.offset, end, format!("register '{}'", register.name)));
    }
    for (memory, parts) in plan.memory.iter().zip(&mut parts) {
        let scratch = memory.scratch.iter().map(|(actor, (start, bytes))| {
            (*start, start + bytes, format!("scratch of {}", plan.spec.actor(*actor).name))
        });
        parts.extend(scratch);
    }
    for (device, mut parts) in parts.into_iter().enumerate() {
        parts.retain(|part| part.0 < part.1);
        parts.sort();
        if let Some(pair) = parts.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            let (first, second) = (pair[0].2.clone(), pair[1].2.clone());
            return Err(PlanError::Overlap { device, first, end: pair[0].1, second, start: pair[1].0 });
        }
    }
    Ok(())
}

/// Checks that every buffer ends within the memory of its base.
fn check_bounds(plan: &Plan) -> Result<(), PlanError> {
    for (index, (actor, actions)) in plan.spec.actors.iter().zip(&plan.actions).enumerate() {
        for (action, spec) in actions.iter().zip(&actor.actions) {
            let memory = &plan.memory[actor.device];
            let size = |base: usize| match action.bases[base] {
                BaseKey::Fixed => memory.arena_bytes,
                BaseKey::Scratch => memory.scratch.get(&ActorId(index as u32)).map_or(0, |s| s.1),
                BaseKey::Input(port) => plan.register_place(spec.inputs[port].register).stride,
                BaseKey::Output(port) => plan.register_place(spec.outputs[port].register).stride,
            };
            for (position, launch) in action.launches.iter().enumerate() {
                let Launch { op, reads, writes, workspace, .. } = launch;
                for buffer in reads.iter().chain(writes).chain(workspace) {
                    let end = buffer.offset + element_count(&buffer.shape) * buffer.dtype.bytes();
                    let size = size(buffer.base);
                    if end > size {
                        return Err(PlanError::Bounds {
                            action: format!("{} {}", actor.name, action.name),
                            launch: position,
                            op: op.name().into(),
                            end,
                            size,
                        });
                    }
                }
            }
        }
    }
    Ok(())
}
