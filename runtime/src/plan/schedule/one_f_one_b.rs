//! One forward, one backward: Narayanan et al. 2019, <https://arxiv.org/abs/1806.03377>. A backward runs as soon as it
//! can. A forward may run ahead of its backward by the number of micro-batches that keeps all later stages busy.

use shardflow_actors::credits;
use shardflow_actors::label::Role;

use super::list::Rules;
use super::work::WorkGraph;

/// If `saves_memory` is set, computes the limits as if messages took no time. Stage `s` of `p` then keeps `p - s`
/// micro-batches in flight.
pub(super) fn rules(graph: &WorkGraph, saves_memory: bool) -> Rules {
    let priorities = graph.work.iter().map(|work| match work.role {
        Role::Backward => 0,
        Role::Forward => 1,
        _ => 2,
    });
    let ticks = |role: Role| graph.work.iter().filter(|work| work.role == role).map(|work| work.ticks).max();
    let (forward, backward) = (ticks(Role::Forward).unwrap_or(1), ticks(Role::Backward).unwrap_or(0));
    let hop_ticks = if saves_memory { 0 } else { graph.hop_ticks };
    let credits = |hops: u32| credits::pipeline(hops + 1, 0, graph.micro_batches, forward, backward, hop_ticks);
    let in_flight_max = hops_to_end(graph).into_iter().map(credits);
    Rules { priorities: priorities.collect(), in_flight_max: in_flight_max.collect() }
}

/// For each work: the largest number of hops from it to the end of the forward work.
fn hops_to_end(graph: &WorkGraph) -> Vec<u32> {
    let mut hops = vec![0; graph.work.len()];
    // The work has no cycle, so the loop ends. One pass is enough if each work comes after the work that it needs.
    loop {
        let before = hops.clone();
        for (index, work) in graph.work.iter().enumerate().rev().filter(|(_, work)| work.role == Role::Forward) {
            for (need, hop) in &work.needs {
                hops[*need] = hops[*need].max(hops[index] + u32::from(*hop));
            }
        }
        if hops == before {
            return hops;
        }
    }
}
