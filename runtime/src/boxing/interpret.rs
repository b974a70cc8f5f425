//! The reference interpreter of boxing plans: runs the [`LocalStep`]s of all devices sequentially in host memory and
//! counts every byte that moves between devices. Tests compare the engines with it.

use std::collections::BTreeMap;

use shardflow_kernels::collective::{CollectiveKind, ReduceOp};
use shardflow_kernels::tensor::{HostTensor, Region, split_range};

use super::BoxingPlan;
use super::step::{BoxingStep, GroupCall, LocalStep};
use crate::sbp::region::{combine, copy_box, filled, slice_region};

/// Marks an element that no device has written. Test data does not contain these bits.
const UNWRITTEN: f32 = f32::from_bits(0x7fff_ffff);

/// Runs a plan on shards, which are in the order of the placement's devices. Returns the new shards, and the bytes that
/// each device receives, by rank.
///
/// # Panics
/// Panics if a shard does not have the shape that its layout requires, or a step does not write a whole shard.
pub fn interpret(plan: &BoxingPlan, shards: &[HostTensor]) -> (Vec<HostTensor>, BTreeMap<usize, usize>) {
    let mut bytes_received: BTreeMap<usize, usize> =
        plan.bytes_received().into_keys().map(|device| (device, 0)).collect();
    let mut shards = shards.to_vec();
    for step in &plan.steps {
        let run = |(index, &device): (usize, &usize)| {
            let mut received = 0;
            let out = run_local(step, index, &shards, &mut received);
            let is_written = |value: &f32| value.to_bits() != UNWRITTEN.to_bits();
            assert!(out.as_f32().unwrap_or_default().iter().all(is_written), "{step}: no data for a part of {device}");
            (device, out, received * shards[0].dtype().bytes())
        };
        let outputs: Vec<_> = step.to.placement.devices().iter().enumerate().map(run).collect();
        shards.clear();
        for (device, out, bytes) in outputs {
            *bytes_received.entry(device).or_default() += bytes;
            shards.push(out);
        }
    }
    (shards, bytes_received)
}

/// Runs a step on the device at `index` of the target placement, and counts the elements that the device receives.
pub(super) fn run_local(step: &BoxingStep, index: usize, shards: &[HostTensor], received: &mut usize) -> HostTensor {
    let shape = step.output_shape(index);
    let mut out = filled(&shape, shards[0].dtype(), UNWRITTEN);
    let by_rank = |rank: usize| &shards[step.from.placement.index_of(rank).unwrap_or_default()];
    match step.local(index) {
        LocalStep::Keep => shards[index].clone(),
        LocalStep::Local { fill, copy } => {
            if let Some(value) = fill {
                out = filled(&shape, out.dtype(), value);
            }
            if let Some((src, dst)) = copy {
                copy_box(&shards[index], &src, &mut out, &dst);
            }
            out
        }
        LocalStep::Call(call) => {
            let inputs: Vec<&HostTensor> = call.ranks.iter().map(|&rank| by_rank(rank)).collect();
            run_collective(&call, &inputs, out, received)
        }
        LocalStep::Pull(pulls) => {
            for pull in pulls {
                copy_box(by_rank(pull.from_device), &pull.src, &mut out, &pull.dst);
                let own = pull.from_device == step.to.placement.devices()[index];
                *received += if own { 0 } else { pull.src.element_count() };
            }
            out
        }
    }
}

fn run_collective(call: &GroupCall, inputs: &[&HostTensor], mut out: HostTensor, received: &mut usize) -> HostTensor {
    let own = call.member;
    match &call.kind {
        CollectiveKind::AllReduce { op } => {
            let flat = |t: &HostTensor| HostTensor { shape: vec![t.elements_held()], data: t.data.clone() };
            let flats: Vec<HostTensor> = inputs.iter().map(|t| flat(t)).collect();
            let refs: Vec<&HostTensor> = flats.iter().collect();
            let mut whole = flat(inputs[0]);
            for owner in 0..inputs.len() {
                let chunk = split_range(whole.elements_held(), inputs.len(), owner);
                let chunk = Region { start: vec![chunk.start], size: vec![chunk.len()] };
                let sum = reduce(&refs, &chunk, *op);
                copy_box(&sum, &Region::whole(&sum.shape), &mut whole, &chunk);
                *received += if owner == own { (inputs.len() - 1) * sum.elements_held() } else { sum.elements_held() };
            }
            HostTensor { shape: out.shape, data: whole.data }
        }
        CollectiveKind::ReduceScatter { op, parts } => {
            let sum = reduce(inputs, &parts[own], *op);
            *received += (inputs.len() - 1) * sum.elements_held();
            sum
        }
        CollectiveKind::AllGather { parts } => {
            for (member, part) in parts.iter().enumerate() {
                copy_box(inputs[member], &Region::whole(&part.size), &mut out, part);
                *received += if member == own { 0 } else { part.element_count() };
            }
            out
        }
        CollectiveKind::AllToAll { sources, targets } => {
            let mut seen: Vec<&Region> = Vec::new();
            let own_first = std::iter::once(own).chain((0..sources.len()).filter(|&m| m != own));
            for member in own_first {
                // Two regions are either equal or disjoint. The first holder of a region sends it.
                let common = sources[member].intersect(&targets[own]);
                if let Some(common) = common.filter(|_| !seen.contains(&&sources[member])) {
                    let (src, dst) = (common.relative_to(&sources[member]), common.relative_to(&targets[own]));
                    copy_box(inputs[member], &src, &mut out, &dst);
                    *received += if member == own { 0 } else { common.element_count() };
                    seen.push(&sources[member]);
                }
            }
            out
        }
        other => unreachable!("boxing does not use {other:?}"),
    }
}

/// Reduces the box `region` of all tensors, in the order of `tensors`.
fn reduce(tensors: &[&HostTensor], region: &Region, op: ReduceOp) -> HostTensor {
    let mut sum = slice_region(tensors[0], region);
    tensors[1..].iter().for_each(|t| combine(&mut sum, &slice_region(t, region), op));
    sum
}
