//! Combines all-reduces of gradients into buckets. A bucket is one call on the communication stream. It runs
//! concurrently with the backward pass.
//!
//! Li et al. 2020, <https://arxiv.org/abs/2006.15704>, section 3.2.

use std::collections::{BTreeMap, BTreeSet};

use shardflow_actors::label::Role;
use shardflow_kernels::collective::ReduceOp;

use crate::boxing::step::StepKind;
use crate::graph::{Graph, Node, NodeOp, Var};
use crate::plan::memory::local_bytes;

/// Replaces the all-reduces of accumulated gradients by buckets of about `bucket_bytes` on each device. An all-reduce
/// qualifies if it is the gradient's only reader. A bucket combines all-reduces of one placement over the same axes, in
/// the order in which backward computes the gradients.
pub fn gather(graph: &mut Graph, bucket_bytes: usize) {
    let mut readers: BTreeMap<Var, usize> = BTreeMap::new();
    for input in graph.nodes.iter().flat_map(|n| &n.inputs) {
        *readers.entry(*input).or_default() += 1;
    }
    let mut candidates: Vec<usize> =
        (0..graph.nodes.len()).filter(|i| can_bucket(graph, &graph.nodes[*i], &readers)).collect();
    // Gradients are numbered in the order in which backward computes them.
    candidates.sort_by_key(|i| graph.nodes[*i].inputs[0]);
    // The bytes of each bucket on one device, and its all-reduces.
    let mut buckets: Vec<(usize, Vec<usize>)> = Vec::new();
    let mut newest: BTreeMap<(usize, &[usize]), usize> = BTreeMap::new();
    for index in candidates {
        let node = &graph.nodes[index];
        let NodeOp::Boxing(step) = &node.op else { continue };
        let bucket = newest.entry((node.placement, &step.axes)).or_insert(buckets.len());
        if buckets.get(*bucket).is_none_or(|(bytes, _)| *bytes >= bucket_bytes) {
            *bucket = buckets.len();
            buckets.push((0, Vec::new()));
        }
        let (bytes, members) = &mut buckets[*bucket];
        *bytes += local_bytes(graph, node.inputs[0], graph.placements[node.placement].devices()[0]);
        members.push(index);
    }
    // The first member of each bucket becomes the bucket's node. The other members are removed.
    let mut removed = BTreeSet::new();
    for (number, (_, mut members)) in buckets.into_iter().enumerate() {
        let inputs: Vec<Var> = members.iter().map(|i| graph.nodes[*i].inputs[0]).collect();
        let outputs: Vec<Var> = members.iter().map(|i| graph.nodes[*i].outputs[0]).collect();
        members.sort_unstable();
        removed.extend(members.drain(1..));
        let node = &mut graph.nodes[members[0]];
        node.name = format!("bucket {number}");
        if let NodeOp::Boxing(step) = &node.op {
            node.op = NodeOp::Bucket { axes: step.axes.clone() };
        }
        (node.inputs, node.outputs) = (inputs, outputs);
    }
    let mut rebuilt = Vec::new();
    for (index, node) in std::mem::take(&mut graph.nodes).into_iter().enumerate() {
        if !removed.contains(&index) {
            graph.push_rebuilt(&mut rebuilt, node);
        }
    }
    graph.nodes = rebuilt;
}

fn can_bucket(graph: &Graph, node: &Node, readers: &BTreeMap<Var, usize>) -> bool {
    let (NodeOp::Boxing(step), Some(input)) = (&node.op, node.inputs.first()) else { return false };
    let producer = graph.producer(*input);
    step.kind == StepKind::AllReduce(ReduceOp::Sum)
        && matches!(producer.op, NodeOp::Accumulate)
        && readers[input] == 1
        && (producer.role, producer.placement) == (Role::Backward, node.placement)
}
