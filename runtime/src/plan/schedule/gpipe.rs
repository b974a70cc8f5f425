//! GPipe: all forwards, then all backwards. Huang et al. 2018, <https://arxiv.org/abs/1811.06965>.

use shardflow_actors::label::Role;

use super::list::Rules;
use super::work::WorkGraph;

pub(super) fn rules(graph: &WorkGraph) -> Rules {
    let priorities = graph.work.iter().map(|work| match work.role {
        Role::Forward => 0,
        Role::Backward => 1,
        _ => 2,
    });
    Rules { priorities: priorities.collect(), in_flight_max: vec![u32::MAX; graph.work.len()] }
}
