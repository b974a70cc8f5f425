//! Checks that the placements form a pipeline. All forward work of a device is one action, so a device cannot wait for
//! a result that depends on its own forward work.

use std::collections::{BTreeMap, BTreeSet};

use crate::graph::{Graph, NodeOp, SourceLine};

/// Records an error for each node that reads from a placement which shares a device with the node's own, or which waits
/// for the node's own, directly or indirectly.
pub fn check(graph: &mut Graph) {
    // For each placement, the placements that it reads from.
    let mut reads: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    let mut errors = Vec::new();
    for node in &graph.nodes {
        for input in &node.inputs {
            let producer = graph.producer(*input);
            let (from, to) = (producer.placement, node.placement);
            // Parameters and inputs exist before forward starts.
            let is_computed = !matches!(producer.op, NodeOp::Parameter { .. } | NodeOp::Input);
            if from == to || !is_computed || !reads.entry(to).or_default().insert(from) {
                continue;
            }
            let (source, target) = (&graph.placements[from], &graph.placements[to]);
            let shared = source.devices().iter().find(|d| target.devices().contains(d));
            let name = &graph.tensor(*input).name;
            let message = match shared {
                Some(device) => format!(
                    "runs on devices {:?} and reads {name} from devices {:?}, and both contain device {device}; place it on exactly these devices, or on none of them",
                    target.devices(),
                    source.devices()
                ),
                None if reaches(&reads, from, to) => format!(
                    "runs on devices {0:?} and reads {name} from devices {1:?}, which already wait for {0:?}; place layers in execution order, each stage once",
                    target.devices(),
                    source.devices()
                ),
                None => continue,
            };
            errors.push((node.name.clone(), message, node.location));
        }
    }
    if graph.objective.is_some() {
        errors.extend(shared_parameter_errors(graph, &reads));
    }
    errors.into_iter().for_each(|(name, message, location)| graph.error(&name, message, location));
}

/// Backward sends a parameter's gradient to the parameter's devices and runs from the last stage to the first, so no
/// stage before theirs may use the parameter.
fn shared_parameter_errors(
    graph: &Graph,
    reads: &BTreeMap<usize, BTreeSet<usize>>,
) -> Vec<(String, String, SourceLine)> {
    let mut errors = Vec::new();
    for node in &graph.nodes {
        for input in &node.inputs {
            let (owner, user) = (graph.placement_of(*input), node.placement);
            let is_parameter = matches!(graph.producer(*input).op, NodeOp::Parameter { .. });
            if !is_parameter || owner == user {
                continue;
            }
            let (source, target) = (&graph.placements[owner], &graph.placements[user]);
            if reaches(reads, owner, user) {
                let message = format!(
                    "runs on devices {:?} and uses parameter {} of a later stage on devices {:?}; place a shared parameter on the first stage that uses it",
                    target.devices(),
                    graph.tensor(*input).name,
                    source.devices()
                );
                errors.push((node.name.clone(), message, node.location));
            }
        }
    }
    errors
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
