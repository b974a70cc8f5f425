//! Combines all-reduces of gradients into buckets. A bucket is one call on the communication stream. It runs
//! concurrently with the backward pass.
//!
//! Li et al. 2020, <https://arxiv.org/abs/2006.15704>, section 3.2.

use std::collections::{BTreeMap, BTreeSet};

use shardflow_actors::label::Role;
use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::tensor::element_count;

use crate::boxing::step::StepKind;
use crate::graph::{Graph, Node, NodeOp, Var};
use crate::plan::memory::local_shape;

/// All-reduces that are combined into one.
struct Bucket {
    placement: usize,
    axes: Vec<usize>,
    /// Bytes on each device.
    bytes: usize,
    /// Indices of the all-reduce nodes.
    members: Vec<usize>,
}

/// Replaces the all-reduces of accumulated gradients by buckets of about `bucket_bytes` on each device. An all-reduce
/// qualifies if it is the gradient's only reader. A bucket combines all-reduces of one placement over the same axes, in
/// the order in which backward computes the gradients.
pub fn gather(graph: &mut Graph, bucket_bytes: usize) {
    let mut readers: BTreeMap<Var, usize> = BTreeMap::new();
    for input in graph.nodes.iter().flat_map(|n| &n.inputs) {
        *readers.entry(*input).or_default() += 1;
    }
    let mut buckets: Vec<Bucket> = Vec::new();
    let mut candidates: Vec<usize> =
        (0..graph.nodes.len()).filter(|i| can_bucket(graph, &graph.nodes[*i], &readers)).collect();
    // Gradients are numbered in the order in which backward computes them.
    candidates.sort_by_key(|i| graph.nodes[*i].inputs[0]);
    for index in candidates {
        let node = &graph.nodes[index];
        let NodeOp::Boxing(step) = &node.op else { continue };
        let device = graph.placements[node.placement].devices()[0];
        let bytes = element_count(&local_shape(graph, node.inputs[0], device)) * 4;
        let open = buckets.iter_mut().rfind(|b| b.placement == node.placement && b.axes == step.axes);
        match open {
            Some(bucket) if bucket.bytes < bucket_bytes => {
                bucket.bytes += bytes;
                bucket.members.push(index);
            }
            _ => {
                let (placement, axes) = (node.placement, step.axes.clone());
                buckets.push(Bucket { placement, axes, bytes, members: vec![index] });
            }
        }
    }
    replace(graph, buckets);
}

fn can_bucket(graph: &Graph, node: &Node, readers: &BTreeMap<Var, usize>) -> bool {
    let (NodeOp::Boxing(step), Some(input)) = (&node.op, node.inputs.first()) else { return false };
    let producer = graph.producer(*input);
    step.kind == StepKind::AllReduce(ReduceOp::Sum)
        && matches!(producer.op, NodeOp::Accumulate)
        && readers[input] == 1
        && (producer.role, producer.placement) == (Role::Backward, node.placement)
}

/// Replaces the first member of each bucket by the bucket's node and removes the other members.
fn replace(graph: &mut Graph, buckets: Vec<Bucket>) {
    let mut removed = BTreeSet::new();
    for (number, Bucket { axes, mut members, .. }) in buckets.into_iter().enumerate() {
        let inputs: Vec<Var> = members.iter().map(|i| graph.nodes[*i].inputs[0]).collect();
        let outputs: Vec<Var> = members.iter().map(|i| graph.nodes[*i].outputs[0]).collect();
        members.sort_unstable();
        removed.extend(members.drain(1..));
        let node = &mut graph.nodes[members[0]];
        node.name = format!("bucket {number}");
        node.op = NodeOp::Bucket { axes };
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
