//! Divides the batch: inputs shrink to one micro-batch and every forward shape follows.
//! Imports `graph`.

use crate::graph::builder::RNG_INPUT;
use crate::graph::{Graph, NodeOp, Rate, Var, ops};
use crate::layout_error::LayoutError;
use crate::sbp::rule::Rule;

/// Makes the graph one of a micro-batch, `count` of which are a step. Records an error for each input whose batch
/// does not divide.
pub fn divide(graph: &mut Graph, count: usize) {
    for index in 0..graph.nodes.len() {
        let node = graph.nodes[index].clone();
        let shapes = match &node.op {
            NodeOp::Input => {
                let out = node.outputs[0].index();
                if graph.tensors[out].rate == Rate::Step || node.name == RNG_INPUT {
                    continue;
                }
                let rows = graph.tensors[out].shape.first().copied().unwrap_or(0);
                if graph.tensors[out].shape.is_empty() && count > 1 {
                    let message =
                        "a scalar has no dim to divide into micro-batches; feed it with `step_input`".to_string();
                    graph.error(&node.name, message, node.location);
                    continue;
                }
                if count == 0 || rows % count != 0 {
                    let message = format!(
                        "a batch of {rows} does not divide into {count} micro-batches; choose a batch that is a multiple of {count}"
                    );
                    graph.error(&node.name, message, node.location);
                    continue;
                }
                let mut shape = graph.tensors[out].shape.clone();
                if count > 1 {
                    shape[0] = rows / count;
                }
                vec![shape]
            }
            NodeOp::Kernel(op) => infer(graph, &node.inputs, |shapes| ops::rule(op, shapes)),
            NodeOp::Custom(op) => infer(graph, &node.inputs, |_| op.rule()),
            NodeOp::Relayout => vec![graph.shape(node.inputs[0]).to_vec()],
            _ => continue,
        };
        for (output, shape) in node.outputs.iter().zip(shapes) {
            graph.tensors[output.index()].shape = shape;
        }
    }
}

fn infer(graph: &Graph, inputs: &[Var], rule: impl Fn(&[&[usize]]) -> Result<Rule, LayoutError>) -> Vec<Vec<usize>> {
    let shapes: Vec<&[usize]> = inputs.iter().map(|v| graph.shape(*v)).collect();
    // Shapes that did not fit were reported when the graph was built; those tensors keep what they had.
    rule(&shapes).and_then(|rule| rule.infer_shapes(&shapes)).unwrap_or_default()
}
