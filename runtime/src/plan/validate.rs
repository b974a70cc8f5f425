//! Refuses a plan that would deadlock, disagree on collectives, overlap in memory or not fit.

use std::sync::Arc;

use shardflow_actors::simulate::{SimulationError, SimulationOptions, Timing, simulate};
use shardflow_actors::spec::ActorId;
use shardflow_kernels::op::Launch;
use shardflow_kernels::tensor::element_count;

use crate::plan::collective_order::{self, Disagreement};
use crate::plan::{ActionKey, BaseKey, DeviceMemory, Plan};

/// Why a plan is refused.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PlanError {
    /// It would stop for ever, or breaks a rule of the protocol.
    #[error("the plan cannot run to its end: {0}")]
    Liveness(String),
    /// Members of a group would wait for each other in different collectives.
    #[error(
        "devices {} and {} disagree on the collectives of group {}: {} against {}",
        .0.first.0, .0.second.0, .0.group, .0.first.1, .0.second.1
    )]
    CollectiveOrder(Disagreement),
    /// It needs more memory than a device has.
    #[error(
        "the plan does not fit: a device has {budget} bytes\n{table}reduce the batch, use more micro-batches or more devices"
    )]
    Memory {
        /// Bytes of one device.
        budget: usize,
        /// Bytes needed, by device.
        table: String,
    },
    /// The processes of a node need more memory than it has.
    #[error(
        "the plan does not fit: this node has {budget} bytes free ({bound}), and the job needs {needed} of them\n{table}reduce \
         the batch, use more micro-batches or more nodes, or give the job more memory"
    )]
    NodeMemory {
        /// Bytes that were free before anything was allocated for the plan.
        budget: u64,
        /// The limit that sets the budget.
        bound: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes needed, by device and rank of this node.
        table: String,
    },
    /// A buffer lies outside its register, scratch or arena: a bug of the planner.
    #[error("{action}: launch {launch} ({op}): a buffer ends at byte {end} of {size}")]
    Bounds {
        /// The action.
        action: String,
        /// Position in its program.
        launch: usize,
        /// The op.
        op: String,
        /// End of the buffer.
        end: usize,
        /// Bytes there are.
        size: usize,
    },
    /// Two parts of a device's arena share bytes: a bug of the planner.
    #[error("device {device}: {first} ends at byte {end}, past the start of {second} at byte {start}")]
    Overlap {
        /// Rank of the device.
        device: usize,
        /// The part that begins first.
        first: String,
        /// Its end.
        end: usize,
        /// The next part, or the end of the arena.
        second: String,
        /// Its start.
        start: usize,
    },
}

/// Steps of the token game: enough for every register to go round.
const STEPS: u32 = 2;

/// Checks liveness, the order of collectives, bounds and memory.
///
/// # Errors
/// The first that fails.
pub fn validate(plan: &Plan) -> Result<(), PlanError> {
    collective_order::check(plan).map_err(PlanError::CollectiveOrder)?;
    bounds(plan)?;
    disjoint(plan)?;
    decisions(plan)?;
    memory(plan)?;
    let spec = Arc::new(plan.spec.clone());
    let liveness = |e: SimulationError| PlanError::Liveness(e.to_string());
    simulate(&spec, &Timing::uniform(&spec, 1, 0), &SimulationOptions::steps(STEPS)).map_err(liveness)?;
    Ok(())
}

/// The host lets a step's updates fire when it has all that it fetches, so nothing that it fetches may come from an update.
fn decisions(plan: &Plan) -> Result<(), PlanError> {
    let key = |(actor, action): (ActorId, u32)| plan.actions[actor.0 as usize][action as usize].key;
    for (index, actions) in plan.actions.iter().enumerate() {
        let specs = &plan.spec.actors[index].actions;
        let fetches = actions.iter().zip(specs).filter(|(action, _)| matches!(action.key, ActionKey::Fetch(_)));
        for register in fetches.flat_map(|(_, spec)| spec.inputs.iter().map(|input| input.register)) {
            let producer = plan.spec.registers[register.0 as usize].producer;
            let writer = plan.spec.writer(register).map(|(action, _)| key((producer, action)));
            if matches!(writer, Some(ActionKey::Decide | ActionKey::Update)) {
                let name = plan.spec.register_name(register);
                let why = format!("the host fetches register '{name}' of an update, which waits until the host has it");
                return Err(PlanError::Liveness(why));
            }
        }
    }
    Ok(())
}

/// No device needs more than the plan's budget.
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

/// Fixed tensors, slots and scratch of a device share no byte, and end within its arena.
fn disjoint(plan: &Plan) -> Result<(), PlanError> {
    let ends = |m: &DeviceMemory| {
        vec![
            (0, m.fixed_bytes, "fixed tensors".to_string()),
            (m.arena_bytes, usize::MAX, "the end of the arena".into()),
        ]
    };
    let mut parts: Vec<Vec<(usize, usize, String)>> = plan.memory.iter().map(ends).collect();
    for (place, register) in plan.registers.iter().zip(&plan.spec.registers) {
        let end = place.offset + place.stride * register.slots as usize;
        parts[place.device].push((place.offset, end, format!("register '{}'", register.name)));
    }
    for (memory, parts) in plan.memory.iter().zip(&mut parts) {
        let scratch = memory.scratch.iter().map(|(actor, (start, bytes))| {
            (*start, start + bytes, format!("scratch of {}", plan.spec.actors[actor.0 as usize].name))
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

/// Every buffer lies within what its base names.
fn bounds(plan: &Plan) -> Result<(), PlanError> {
    for (index, (actor, actions)) in plan.spec.actors.iter().zip(&plan.actions).enumerate() {
        for (action, spec) in actions.iter().zip(&actor.actions) {
            let memory = &plan.memory[actor.device];
            let size = |base: usize| match action.bases[base] {
                BaseKey::Fixed => memory.arena_bytes,
                BaseKey::Scratch => {
                    let id = ActorId(index as u32);
                    memory.scratch.get(&id).map_or(0, |s| s.1)
                }
                BaseKey::Input(port) => plan.register_place(spec.inputs[port].register).stride,
                BaseKey::Output(port) => plan.register_place(spec.outputs[port].register).stride,
            };
            for (position, launch) in action.launches.iter().enumerate() {
                let Launch { op, reads, writes, workspace, .. } = launch;
                for buffer in reads.iter().chain(writes).chain(workspace) {
                    let end = buffer.offset + element_count(&buffer.shape) * buffer.dtype.bytes();
                    let size = size(buffer.base);
                    if end > size {
                        let name = format!("{} {}", actor.name, action.name);
                        return Err(PlanError::Bounds {
                            action: name,
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
