//! Computes the number of slots of each register: the fewest credits that keep the pipeline busy.

use std::collections::BTreeMap;

use shardflow_actors::credits;

use crate::graph::{Graph, NodeOp, Phase, Rate};
use crate::plan::assign::{Assignment, RegisterPlan};
use crate::plan::{ActionKey, Schedule};

/// Relative durations from which credits are computed: of one micro-batch through one stage, and from the end of an
/// action to the start of the waiting action on the next stage.
const FORWARD: u64 = 10;
const BACKWARD: u64 = 20;
const HOP: u64 = 1;

/// The placements with forward work, in the order of the graph, which is the order of the pipeline.
pub fn stages(graph: &Graph) -> Vec<usize> {
    let mut stages = Vec::new();
    for node in &graph.nodes {
        let has_work = matches!(node.op, NodeOp::Kernel(_) | NodeOp::Custom(_)) && node.phase == Phase::Forward;
        if has_work && !stages.contains(&node.placement) {
            stages.push(node.placement);
        }
    }
    stages
}

/// Maximum forward micro-batches in flight, by placement.
pub fn in_flight(graph: &Graph, schedule: Schedule, micro_batches: usize) -> Vec<u32> {
    let (stages, count) = (stages(graph), micro_batches as u32);
    let mut out = vec![1; graph.placements.len()];
    for (position, placement) in stages.iter().enumerate() {
        let credits = match schedule {
            Schedule::GPipe => count,
            Schedule::OneFOneB => {
                credits::pipeline(stages.len() as u32, position as u32, count, FORWARD, BACKWARD, HOP)
            }
        };
        out[*placement] = credits.clamp(1, count.max(1));
    }
    out
}

pub fn slots(graph: &Graph, assignment: &Assignment, in_flight: &[u32], micro_batches: usize) -> Vec<u32> {
    let mut placement_of: BTreeMap<usize, usize> = BTreeMap::new();
    for placement in stages(graph) {
        placement_of.extend(graph.placements[placement].devices().iter().map(|d| (*d, placement)));
    }
    let count = |register: &RegisterPlan| {
        if register.initial || register.rate == Rate::Step {
            return 1;
        }
        let device = register.producer.0;
        let waits_for_backward = register.readers.contains(&(device, ActionKey::Backward));
        let producer = register.producer.1;
        let is_backward = match producer {
            ActionKey::Pull(id) => graph.nodes[id.index()].phase == Phase::Backward,
            key => key == ActionKey::Backward,
        };
        let flight = placement_of.get(&device).map_or(1, |p| in_flight[*p]);
        let count = match (waits_for_backward && !is_backward, producer) {
            // The stash: one slot for each micro-batch in flight.
            (true, ActionKey::Forward) => flight,
            // Transferred for forward and kept until backward: one more, so that the next transfer can overlap.
            (true, _) => flight + 1,
            // Double buffering: one slot is filled while the other is read.
            (false, _) => 2,
        };
        count.min(micro_batches.max(1) as u32)
    };
    assignment.registers.iter().map(count).collect()
}
