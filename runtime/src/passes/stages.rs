//! Placements that feed each other forward must form a pipeline: all forward work of a device is one action, so a device
//! cannot wait for what it has yet to make.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::Location;

use crate::graph::{Graph, NodeOp};

/// Records an error at the line that reads from a placement which shares a device with its own, or which (perhaps by
/// others) waits for its own.
pub fn check(graph: &mut Graph) {
    // Placements that each placement reads from.
    let mut reads: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    let mut errors = Vec::new();
    for node in &graph.nodes {
        for input in &node.inputs {
            let producer = graph.producer(*input);
            let (from, to) = (producer.placement, node.placement);
            // Parameters and inputs are there before anything runs forward.
            let is_made = !matches!(producer.op, NodeOp::Parameter { .. } | NodeOp::Input);
            if from == to || !is_made || !reads.entry(to).or_default().insert(from) {
                continue;
            }
            let (source, target) = (&graph.placements[from], &graph.placements[to]);
            let shared = source.devices().iter().find(|d| target.devices().contains(d));
            let name = &graph.tensor(*input).name;
            let message = match shared {
                Some(device) => format!(
                    "reads {name} of devices {:?} on devices {:?}, which share device {device}; place what follows on the same devices, or on none of them",
                    source.devices(),
                    target.devices()
                ),
                None if reaches(&reads, from, to) => format!(
                    "reads {name} of devices {:?} on devices {:?}, which those already wait for; place layers in the order in which they run, each stage once",
                    source.devices(),
                    target.devices()
                ),
                None => continue,
            };
            errors.push((node.name.clone(), message, node.location));
        }
    }
    if graph.objective.is_some() {
        errors.extend(parameters(graph, &reads));
    }
    errors.into_iter().for_each(|(name, message, location)| graph.error(&name, message, location));
}

/// The gradient of a parameter goes to the parameter's own devices in backward, which runs from the last stage to the
/// first; so no stage before them may use it.
fn parameters(
    graph: &Graph,
    reads: &BTreeMap<usize, BTreeSet<usize>>,
) -> Vec<(String, String, &'static Location<'static>)> {
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
                    "uses the parameter {} of devices {:?} on devices {:?}; place a shared parameter on the first stage that uses it",
                    graph.tensor(*input).name,
                    source.devices(),
                    target.devices()
                );
                errors.push((node.name.clone(), message, node.location));
            }
        }
    }
    errors
}

/// Does `from` read, directly or by others, from `to`?
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
