//! Training or evaluation: in evaluation dropout is the identity and nothing is trained.

use std::collections::BTreeMap;

use shardflow_kernels::op::Op;

use crate::graph::builder::RNG_INPUT;
use crate::graph::{Graph, Node, NodeId, NodeOp, TensorInfo, Var};

/// What a program is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Dropout is active, and the loss is minimised if there is one to minimise.
    Training,
    /// Dropout is the identity, without a kernel or memory. A loss is computed and nothing is trained.
    Evaluation,
}

/// Applies the mode. Without one, a program that minimises a loss trains, and dropout in any other program is an error.
pub fn apply(graph: &mut Graph, mode: Option<Mode>) {
    match mode {
        Some(Mode::Training) => {}
        Some(Mode::Evaluation) => {
            graph.objective = None;
            remove_dropout(graph);
        }
        None if graph.objective.is_some() => {}
        None => {
            let Some(node) = graph.nodes.iter().find(|node| is_dropout(node)) else { return };
            let (name, location) = (node.name.clone(), node.location);
            let message = "the program has dropout and minimises nothing; compile it with `mode: Some(Mode::Evaluation)` for no dropout, or with `Some(Mode::Training)` to keep it";
            graph.error(&name, message.to_string(), location);
        }
    }
}

fn is_dropout(node: &Node) -> bool {
    matches!(node.op, NodeOp::Kernel(Op::Dropout { .. }))
}

/// Rebuilds the graph without dropout and its random numbers; readers of its output read its input.
fn remove_dropout(graph: &mut Graph) {
    let (nodes, tensors) = (std::mem::take(&mut graph.nodes), graph.take_tensors());
    // The replacement of each tensor; the random numbers have no reader left.
    let mut now: BTreeMap<Var, Var> = BTreeMap::new();
    for mut node in nodes {
        if is_dropout(&node) {
            now.insert(node.outputs[0], now[&node.inputs[0]]);
            continue;
        }
        if matches!(node.op, NodeOp::Input) && node.name == RNG_INPUT {
            continue;
        }
        node.inputs.iter_mut().for_each(|input| *input = now[input]);
        let producer = NodeId(graph.nodes.len() as u32);
        for output in &mut node.outputs {
            let made = graph.new_tensor(TensorInfo { producer, ..tensors[output.index()].clone() }, node.location);
            now.insert(*output, made);
            *output = made;
        }
        graph.nodes.push(node);
    }
    graph.outputs.iter_mut().for_each(|output| output.tensor = now[&output.tensor]);
}
