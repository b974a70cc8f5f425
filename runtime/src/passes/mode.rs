//! Applies the mode, training or evaluation. In evaluation, dropout is the identity and nothing is trained.

use std::collections::BTreeMap;

use shardflow_kernels::op::Op;

use crate::graph::builder::RNG_INPUT;
use crate::graph::{Graph, Node, NodeId, NodeOp, TensorInfo, Var};

/// Whether a program is compiled for training or for evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Dropout is active, and the loss, if there is one, is minimised.
    Training,
    /// Dropout is removed, so it costs no kernel and no memory. A loss is computed but not minimised.
    Evaluation,
}

/// Applies the mode. If `mode` is `None`, a program that minimises a loss is compiled for training, and dropout in any
/// other program is an error.
pub fn apply(graph: &mut Graph, mode: Option<Mode>) {
    if mode == Some(Mode::Evaluation) {
        graph.objective = None;
        remove_dropout(graph);
    } else if mode.is_none()
        && graph.objective.is_none()
        && let Some(index) = graph.nodes.iter().position(is_dropout)
    {
        let message = "the program has dropout but minimises nothing; compile it with `mode: Some(Mode::Evaluation)` to disable dropout, or with `mode: Some(Mode::Training)` to keep it";
        graph.node_error(index, message);
    }
}

fn is_dropout(node: &Node) -> bool {
    matches!(node.op, NodeOp::Kernel(Op::Dropout { .. }))
}

/// Rebuilds the graph without dropout and its `rng` inputs; readers of a dropout's output read its input instead.
fn remove_dropout(graph: &mut Graph) {
    let (nodes, tensors) = (std::mem::take(&mut graph.nodes), graph.take_tensors());
    // Maps each old tensor to its new tensor. `rng` inputs need no new tensor, because nothing reads them any more.
    let mut replacement: BTreeMap<Var, Var> = BTreeMap::new();
    for mut node in nodes {
        if is_dropout(&node) {
            replacement.insert(node.outputs[0], replacement[&node.inputs[0]]);
            continue;
        }
        if matches!(node.op, NodeOp::Input) && node.name == RNG_INPUT {
            continue;
        }
        node.inputs.iter_mut().for_each(|input| *input = replacement[input]);
        let producer = NodeId(graph.nodes.len() as u32);
        for output in &mut node.outputs {
            let new_output =
                graph.new_tensor(TensorInfo { producer, ..tensors[output.index()].clone() }, node.location);
            replacement.insert(*output, new_output);
            *output = new_output;
        }
        graph.nodes.push(node);
    }
    graph.outputs.iter_mut().for_each(|output| output.tensor = replacement[&output.tensor]);
}
