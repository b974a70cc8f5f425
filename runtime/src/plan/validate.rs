//! Refuses plans that would deadlock, call different collectives, overlap in memory or exceed the memory.

use std::sync::Arc;

use shardflow_actors::simulate::{SimulationError, SimulationOptions, Timing, simulate};
use shardflow_actors::spec::ActorId;
use shardflow_kernels::op::Launch;
use shardflow_kernels::tensor::element_count;

use crate::plan::collective_order::{self, CollectiveMismatch};
use crate::plan::{ActionKey, BaseKey, DeviceMemory, Plan};

/// Why a plan is refused.
#[derive(Clone, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages explain variants and fields")]
pub enum PlanError {
    #[error("the plan cannot run to completion: {0}")]
    Liveness(String),
    #[error(
        "devices {} and {} call different collectives of group {}: {} versus {}",
        .0.first.0, .0.second.0, .0.group, .0.first.1, .0.second.1
    )]
    CollectiveOrder(CollectiveMismatch),
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

/// Simulated steps: enough to reuse every register's slots.
const STEPS: u32 = 2;

/// Checks the order of collectives, bounds, memory and liveness.
///
/// # Errors
/// The first failed check.
pub fn validate(plan: &Plan) -> Result<(), PlanError> {
    collective_order::check(plan).map_err(PlanError::CollectiveOrder)?;
    check_bounds(plan)?;
    check_disjoint(plan)?;
    check_decisions(plan)?;
    memory(plan)?;
    let spec = Arc::new(plan.spec.clone());
    let liveness = |e: SimulationError| PlanError::Liveness(e.to_string());
    simulate(&spec, &Timing::uniform(&spec, 1, 0), &SimulationOptions::steps(STEPS)).map_err(liveness)?;
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
