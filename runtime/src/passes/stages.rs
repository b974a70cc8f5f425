//! Checks that the placements form a pipeline: a device's forward work is one action, which cannot wait for itself.

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::{Graph, NodeOp, Var};

/// Records an error for each node that reads from another placement which shares a device with the node's placement or
/// waits for it, directly or indirectly.
pub fn check(graph: &mut Graph) {
    // For each placement, the placements that it reads from.
    let mut reads: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    let mut errors = Vec::new();
    for (index, input) in inputs(graph) {
        let producer = graph.producer(input);
        let (from, to) = (producer.placement, graph.nodes[index].placement);
        // Parameters and inputs exist before forward starts.
        let is_computed = !matches!(producer.op, NodeOp::Parameter { .. } | NodeOp::Input);
        if from == to || !is_computed || !reads.entry(to).or_default().insert(from) {
            continue;
        }
        let [source, target] = [from, to].map(|placement| graph.placements[placement].devices());
        let shared = source.iter().find(|device| target.contains(device));
        let name = &graph.tensor(input).name;
        let message = match shared {
            Some(device) => format!(
                "runs on devices {target:?} and reads {name} from devices {source:?}, and both contain device {device}; place it on exactly these devices, or on none of them"
            ),
            None if reaches(&reads, from, to) => format!(
                "runs on devices {target:?} and reads {name} from devices {source:?}, which already wait for {target:?}; place layers in execution order, each stage once"
            ),
            None => continue,
        };
        errors.push((index, message));
    }
    if graph.objective.is_some() {
        errors.extend(shared_parameter_errors(graph, &reads));
    }
    errors.into_iter().for_each(|(index, message)| graph.node_error(index, message));
}

/// Each node's index with each of its inputs.
fn inputs(graph: &Graph) -> impl Iterator<Item = (usize, Var)> {
    let nodes = graph.nodes.iter().enumerate();
    nodes.flat_map(|(index, node)| node.inputs.iter().map(move |input| (index, *input)))
}

/// Backward sends a parameter's gradient to the parameter's devices and runs from the last stage to the first, so no
/// stage before theirs may use the parameter.
fn shared_parameter_errors(graph: &Graph, reads: &BTreeMap<usize, BTreeSet<usize>>) -> Vec<(usize, String)> {
    let error = |(index, input): (usize, Var)| {
        let (producer, user) = (graph.producer(input), graph.nodes[index].placement);
        let is_parameter = matches!(producer.op, NodeOp::Parameter { .. });
        if !is_parameter || producer.placement == user || !reaches(reads, producer.placement, user) {
            return None;
        }
        let [source, target] = [producer.placement, user].map(|placement| graph.placements[placement].devices());
        let message = format!(
            "runs on devices {target:?} and uses parameter {} of a later stage on devices {source:?}; place a shared parameter on the first stage that uses it",
            graph.tensor(input).name
        );
        Some((index, message))
    };
    inputs(graph).filter_map(error).collect()
}

/// True if placement `from` reads from placement `to`, directly or indirectly.
fn reaches(reads: &BTreeMap<usize, BTreeSet<usize>>, from: usize, to: usize) -> bool {
    let (mut open, mut seen) = (vec![from], BTreeSet::new());
    while let Some(placement) = open.pop() {
        if placement == to {
            return true;
        }
        if seen.insert(placement) {
            open.extend(reads.get(&placement).into_iter().flatten());
        }
    }
    false
}
