//! Refuses plans that would deadlock, that exceed the memory limit, or in which collectives do not match or memory
//! overlaps.

use std::collections::BTreeMap;
use std::sync::Arc;

use shardflow_actors::check::PERIOD_STEPS_MAX;
use shardflow_actors::simulate::{SimulationError, SimulationOptions, Timing, simulate};
use shardflow_actors::spec::{Firing, Spec};
use shardflow_kernels::collective::{CollectiveCall, CollectiveKind};
use shardflow_kernels::op::Launch;
use shardflow_kernels::tensor::element_count;

use crate::plan::action::{BaseKey, DeviceRegister, EmittedAction};
use crate::plan::error::PlanError;
use crate::plan::instance::Quotient;
use crate::plan::segments::{HostTransfer, SegmentId};
use crate::plan::{ClassPlan, Plan};

/// Minimum number of simulated steps. The second step reuses the slots of the first.
const STEPS: u32 = 2;

/// Checks the order of collectives, bounds, memory and liveness, for one device of each class.
pub fn validate(plan: &Plan) -> Result<(), PlanError> {
    check_decisions(plan)?;
    check_bounds(plan)?;
    check_disjoint(plan)?;
    check_memory(plan)?;
    check_quotient(&plan.quotient())
}

/// Checks the order of collectives and liveness among one device of each class.
pub(crate) fn check_quotient(quotient: &Quotient) -> Result<(), PlanError> {
    check_collectives(quotient)?;
    check_collective_order(&quotient.spec)?;
    let spec = Arc::new(quotient.spec.clone());
    let liveness = |e: SimulationError| PlanError::Liveness(e.to_string());
    // If the period exceeds the maximum, `simulate` returns an error.
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

/// Checks that all members of a firing group make the same calls in launch order.
fn check_collectives(Quotient { spec, actions, calls }: &Quotient) -> Result<(), PlanError> {
    let mut seen: BTreeMap<u32, (usize, Vec<String>)> = BTreeMap::new();
    let mut groups_of_calls = calls.iter();
    for (actor, plans) in spec.actors.values().zip(actions.values()) {
        for (action, plan) in actor.actions.iter().zip(plans) {
            let groups_of_calls = groups_of_calls.next().map_or(&[][..], Vec::as_slice);
            for group in &action.groups {
                let own = plan.collectives().zip(groups_of_calls).filter(|(_, groups)| groups.contains(group));
                let calls: Vec<String> = own.map(|(call, _)| signature(call)).collect();
                let first = seen.entry(*group).or_insert_with(|| (actor.device, calls.clone()));
                let longest = first.1.len().max(calls.len());
                if let Some(at) = (0..longest).find(|i| first.1.get(*i) != calls.get(*i)) {
                    let call = |calls: &[String]| {
                        let call = calls.get(at).map_or("nothing", String::as_str);
                        format!("{call} as call {at} of {}", action.name)
                    };
                    let (first, second) = ((first.0, call(&first.1)), (actor.device, call(&calls)));
                    return Err(PlanError::CollectiveOrder { group: *group, first, second });
                }
            }
        }
    }
    Ok(())
}

/// Checks that the actions that use a communicator fire in the same order on all its members.
fn check_collective_order(spec: &Spec) -> Result<(), PlanError> {
    let mut seen: BTreeMap<u32, (usize, String)> = BTreeMap::new();
    for actor in spec.actors.values() {
        let list: Vec<usize> = match &actor.firing {
            Firing::Ordered(list) => list.iter().map(|i| *i as usize).collect(),
            Firing::Credit => (0..actor.actions.len()).collect(),
        };
        let mut orders: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
        for action in list.iter().filter_map(|index| actor.actions.get(*index)) {
            action.communicators.iter().for_each(|group| orders.entry(*group).or_default().push(&action.name));
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

/// Checks that no output comes from the update: the host decides on the update after it has fetched all outputs.
fn check_decisions(plan: &Plan) -> Result<(), PlanError> {
    let segments = &plan.segments;
    let follows_decision = |id: &SegmentId| {
        let reads = segments.reads[id.index()].iter();
        let is_decision = |id: &SegmentId| segments.get(*id).host == Some(HostTransfer::Decide);
        is_decision(id) || reads.into_iter().any(is_decision)
    };
    for id in segments.of_host(HostTransfer::Fetch) {
        if let Some(source) = segments.reads[id.index()].iter().find(|source| follows_decision(source)) {
            let [fetch, source] = [id, *source].map(|id| &segments.get(id).name);
            let why = format!("{fetch} waits for {source}, but the host starts {source} only after {fetch} has ended");
            return Err(PlanError::Liveness(why));
        }
    }
    Ok(())
}

fn check_memory(plan: &Plan) -> Result<(), PlanError> {
    let Some(budget) = plan.memory_bytes.filter(|_| !plan.fits(plan.memories())) else { return Ok(()) };
    Err(PlanError::Memory { budget, table: plan.classes.ids().map(|class| plan.memory_row(class, " bytes")).collect() })
}

/// Checks that the fixed tensors, slots and scratch of a device do not overlap, and that they end within the arena.
fn check_disjoint(plan: &Plan) -> Result<(), PlanError> {
    for device in plan.classes.representatives() {
        let ClassPlan { storage, slots, arena, .. } = plan.class_plan(device);
        let memory = &arena.memory;
        let mut parts = vec![
            (0, memory.fixed_bytes, "fixed tensors".to_owned()),
            (memory.arena_bytes, usize::MAX, "the memory after the arena".to_owned()),
        ];
        for ((place, slots), register) in arena.registers.iter().zip(slots).zip(&storage.registers) {
            let name = register.tensors.first().map_or("done", |var| &plan.graph.tensor(*var).name);
            let end = place.offset + place.stride * slots.count as usize;
            parts.push((place.offset, end, format!("the register of {name}")));
        }
        let scratch = memory.scratch.iter();
        parts.extend(scratch.map(|(stream, (start, bytes))| (*start, start + bytes, format!("scratch of {stream:?}"))));
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
    plan.classes.representatives().try_for_each(|device| {
        plan.class_plan(device).actions.iter().try_for_each(|action| check_action_bounds(plan, device, action))
    })
}

fn check_action_bounds(plan: &Plan, device: usize, action: &EmittedAction) -> Result<(), PlanError> {
    let own = &plan.class_plan(device).arena;
    let stream = plan.segments.get(action.plan.segment).stream;
    let size = |base: usize| match action.plan.bases[base] {
        BaseKey::Fixed => own.memory.arena_bytes,
        BaseKey::Scratch => own.memory.scratch.get(&stream).map_or(0, |scratch| scratch.1),
        BaseKey::Input(port) => {
            let DeviceRegister { device, register } = action.inputs[port];
            plan.class_plan(device).arena.registers[register].stride
        }
        BaseKey::Output(port) => own.registers[action.outputs[port]].stride,
        BaseKey::Staging => own.memory.staging.get(&action.plan.segment).map_or(0, |place| place.stride),
    };
    for (position, launch) in action.plan.launches.iter().enumerate() {
        let Launch { op, reads, writes, workspace, .. } = launch;
        for buffer in reads.iter().chain(writes).chain(workspace) {
            let end = buffer.offset + element_count(&buffer.shape) * buffer.dtype.bytes();
            let size = size(buffer.base);
            if end > size {
                let action = format!("device {device} {}", action.plan.name);
                return Err(PlanError::Bounds { action, launch: position, op: op.name().into(), end, size });
            }
        }
    }
    Ok(())
}
