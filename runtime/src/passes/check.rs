//! Refuses invalid programs, with the user's source line.

use std::collections::BTreeMap;

use shardflow_kernels::device::DeviceKind;

use crate::graph::builder::RNG_INPUT;
use crate::graph::{Graph, NodeOp, Var};

/// Refuses tensors so large that sums of their sizes in bytes could overflow.
pub fn sizes(graph: &mut Graph) {
    const ELEMENTS_MAX: usize = 1 << 48;
    for index in 0..graph.nodes.len() {
        let node = &graph.nodes[index];
        let fits = |shape: &[usize]| {
            let extents = shape.iter().filter(|extent| **extent > 0);
            extents.copied().try_fold(1usize, |n, extent| n.checked_mul(extent)).is_some_and(|n| n <= ELEMENTS_MAX)
        };
        if let Some(out) = node.outputs.iter().find(|out| !fits(graph.shape(**out))) {
            let message = format!("shape {:?} has more elements than any device can hold", graph.shape(*out));
            return graph.node_error(index, message);
        }
    }
}

/// Refuses programs without outputs, trained parameters as outputs, and parameters and inputs that no output needs.
pub fn purpose(graph: &mut Graph) {
    if graph.outputs.is_empty() {
        let location = graph.nodes.last().map_or(graph.location, |node| node.location);
        return graph.error("program", "the program has no output; call `minimize` or `output`", location);
    }
    for index in 0..graph.outputs.len() {
        let output = graph.outputs[index].tensor;
        if let Some(objective) = graph.objective
            && matches!(graph.producer(output).op, NodeOp::Parameter { .. })
        {
            let message = if objective.loss == output {
                "a parameter cannot be the loss; minimise a scalar that an op computes"
            } else {
                "a trained parameter cannot be an output; read it with `Session::parameters`"
            };
            graph.node_error(graph.tensor(output).producer.index(), message);
        }
    }
    let mut used = vec![false; graph.nodes.len()];
    for output in &graph.outputs {
        used[graph.tensor(output.tensor).producer.index()] = true;
    }
    // Nodes are in topological order.
    for index in (0..graph.nodes.len()).rev() {
        if used[index] {
            let inputs = graph.nodes[index].inputs.iter();
            inputs.for_each(|input| used[graph.tensor(*input).producer.index()] = true);
        }
    }
    for index in (0..graph.nodes.len()).filter(|index| !used[*index]) {
        let kind = match graph.nodes[index].op {
            NodeOp::Parameter { .. } => "parameter",
            NodeOp::Input if graph.nodes[index].name != RNG_INPUT => "input",
            _ => continue,
        };
        graph.node_error(index, format!("no output depends on this {kind}; remove it, or use it"));
    }
}

/// Refuses a loss that depends on no parameter. `grads` is empty for such a loss.
pub fn trained(graph: &mut Graph, grads: &BTreeMap<Var, Vec<Var>>) {
    if let Some(objective) = graph.objective
        && grads.is_empty()
    {
        let message =
            "the loss depends on no parameter, so nothing can be trained; make the loss depend on one, or use `output`";
        graph.error("minimize", message, objective.location);
    }
}

/// Refuses custom ops without a kernel for the device.
pub fn kernels(graph: &mut Graph, device: DeviceKind) {
    for index in 0..graph.nodes.len() {
        let node = &graph.nodes[index];
        if let NodeOp::Custom(op) = &node.op
            && !op.runs_on(device)
        {
            let message = format!(
                "the op has no kernel for {device} devices (`CustomOp::runs_on`); compile for another device kind"
            );
            graph.node_error(index, message);
        }
    }
}
