//! Divides the batch into micro-batches. Each forward tensor gets its shape in one micro-batch, and a loop SBP: whether
//! its values in the micro-batches are parts, copies or terms of the whole tensor. The loop SBP determines an element's
//! index in the whole tensor (for dropout), and how outputs are combined.

use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::element_count;

use crate::graph::builder::RNG_INPUT;
use crate::graph::{Combine, Graph, Node, NodeOp, Objective, Rate, TensorInfo, Var, ops};
use crate::layout_error::LayoutError;
use crate::sbp::Sbp;
use crate::sbp::rule::Rule;

/// A tensor's shape in one micro-batch, and its loop SBP.
type Part = (Vec<usize>, Option<Sbp>);

/// Turns the graph of a step into the graph of one micro-batch out of `count`. Records an error for each input whose
/// batch is not divisible by `count`, and for each op, loss and output whose value would depend on `count`.
pub fn divide(graph: &mut Graph, count: usize) {
    for index in 0..graph.nodes.len() {
        let node = graph.nodes[index].clone();
        let parts = match &node.op {
            NodeOp::Input => divide_input(graph, &node, count).map(|part| vec![part]),
            NodeOp::Kernel(op) => infer_outputs(graph, &node.inputs, count, |shapes| ops::rule(op, shapes)),
            NodeOp::Custom(op) => infer_outputs(graph, &node.inputs, count, |_| op.rule()),
            NodeOp::Relayout => {
                let TensorInfo { shape, loop_sbp, .. } = graph.tensor(node.inputs[0]);
                Ok(vec![(shape.clone(), *loop_sbp)])
            }
            _ => continue,
        };
        let parts = parts.and_then(|parts| set_dropout_position(graph, index, &parts, count).map(|()| parts));
        let poisoned = node.inputs.iter().any(|v| graph.tensor(*v).poisoned);
        match parts {
            Ok(parts) => {
                for (output, (shape, loop_sbp)) in node.outputs.iter().zip(parts) {
                    let info = &mut graph.tensors[output.index()];
                    (info.shape, info.loop_sbp, info.poisoned) = (shape, loop_sbp, info.poisoned || poisoned);
                }
            }
            Err(message) => {
                if !poisoned {
                    graph.error(&node.name, message, node.location);
                }
                node.outputs.iter().for_each(|output| graph.tensors[output.index()].poisoned = true);
            }
        }
    }
    check_loss(graph, count);
    set_output_combines(graph, count);
}

fn divide_input(graph: &Graph, node: &Node, count: usize) -> Result<Part, String> {
    let TensorInfo { shape, loop_sbp, rate, .. } = graph.tensor(node.outputs[0]);
    let mut shape = shape.clone();
    if let (Rate::MicroBatch, Some(Sbp::Split(dim))) = (rate, *loop_sbp)
        && count > 1
    {
        let Some(rows) = shape.get_mut(dim) else {
            return Err("a scalar has no dim to divide into micro-batches; feed it with `step_input`".into());
        };
        if !rows.is_multiple_of(count) {
            return Err(format!(
                "a batch of {rows} does not divide into {count} micro-batches; choose a batch that is a multiple of {count}"
            ));
        }
        *rows /= count;
    }
    Ok((shape, *loop_sbp))
}

/// The shapes and loop SBPs of an op's outputs, given those of its inputs.
fn infer_outputs(
    graph: &Graph,
    inputs: &[Var],
    count: usize,
    rule: impl Fn(&[&[usize]]) -> Result<Rule, LayoutError>,
) -> Result<Vec<Part>, String> {
    let shapes: Vec<&[usize]> = inputs.iter().map(|v| graph.shape(*v)).collect();
    let layouts: Option<Vec<Sbp>> = inputs.iter().map(|v| graph.tensor(*v).loop_sbp).collect();
    let message = |e: LayoutError| {
        let inputs = describe(graph, inputs);
        format!(
            "in each of {count} micro-batches, the inputs do not match: {e}; {inputs}; all inputs of an op must be divided: feed them with `input` or `input_with_batch_dim`"
        )
    };
    let rule = rule(&shapes).map_err(message)?;
    let shapes = rule.infer_shapes(&shapes).map_err(message)?;
    let outputs = layouts.and_then(|layouts| rule.output_layouts(&layouts));
    let layout = |port: usize| outputs.as_ref().map(|outputs| outputs[port]);
    Ok(shapes.into_iter().enumerate().map(|(port, shape)| (shape, layout(port))).collect())
}

/// Sets the values that determine a dropout's mask: the shape in the whole step, and the offset between micro-batches.
fn set_dropout_position(graph: &mut Graph, index: usize, parts: &[Part], count: usize) -> Result<(), String> {
    let node = &graph.nodes[index];
    // At this point, the output's shape is still that of the whole step.
    let whole = match node.op {
        NodeOp::Kernel(Op::Dropout { .. }) => graph.shape(node.outputs[0]).to_vec(),
        _ => return Ok(()),
    };
    let (part, loop_sbp) = &parts[0];
    let offset = match loop_sbp {
        Some(Sbp::Split(dim)) if *dim < part.len() => part[*dim] * element_count(&whole[dim + 1..]),
        Some(_) => 0,
        None if count == 1 => 0,
        None => {
            return Err(format!(
                "with {count} micro-batches, an element's position in the whole batch is unknown: {}; compile with `micro_batches: 1`",
                cause(graph, node.inputs[0])
            ));
        }
    };
    if let NodeOp::Kernel(Op::Dropout { shape, stride, .. }) = &mut graph.nodes[index].op {
        (*shape, *stride) = (whole, offset);
    }
    Ok(())
}

/// Records an error if the loss is not a sum over the micro-batches. The loss must be such a sum, because gradients are
/// summed over the micro-batches.
fn check_loss(graph: &mut Graph, count: usize) {
    let Some(Objective { loss, .. }) = graph.objective else { return };
    let info = graph.tensor(loss);
    let why = match info.loop_sbp {
        _ if count == 1 || info.poisoned || !info.shape.is_empty() => return,
        Some(Sbp::Partial(ReduceOp::Sum)) => return,
        Some(Sbp::Broadcast) => {
            format!("{} does not depend on the batch, and would be counted {count} times", info.name)
        }
        Some(_) => describe(graph, &[loss]),
        None => cause(graph, loss),
    };
    let location =
        graph.outputs.iter().find(|o| o.tensor == loss).map_or(graph.producer(loss).location, |o| o.location);
    let message = format!(
        "with {count} micro-batches, the loss must be a sum over the micro-batches, but {why}; minimise a sum or a mean over the samples, or compile with `micro_batches: 1`"
    );
    graph.error("minimize", message, location);
}

/// Sets how the values of each output are combined, unless the user has set it.
fn set_output_combines(graph: &mut Graph, count: usize) {
    let loss = graph.objective.map(|objective| objective.loss);
    for index in 0..graph.outputs.len() {
        let output = graph.outputs[index].clone();
        let info = graph.tensor(output.tensor);
        let combine = match info.loop_sbp {
            _ if output.combine.is_some() || info.poisoned => continue,
            Some(sbp) => Combine::from(sbp),
            None if count == 1 => Combine::First,
            None if Some(output.tensor) == loss => continue,
            None => {
                let message = format!(
                    "no rule determines how to combine the values of {count} micro-batches: {}; use `output_with`: `Combine::Stack` keeps all values, `Combine::Sum`, `Combine::Max` and `Combine::Concat(dim)` combine them",
                    cause(graph, output.tensor)
                );
                graph.error(&output.name, message, output.location);
                continue;
            }
        };
        graph.outputs[index].combine = Some(combine);
    }
}

/// The op whose rule gives no loop SBP, and its inputs, as text.
fn cause(graph: &Graph, var: Var) -> String {
    let mut node = graph.producer(var);
    while let Some(input) = node.inputs.iter().find(|v| graph.tensor(**v).loop_sbp.is_none()) {
        node = graph.producer(*input);
    }
    let (name, location, inputs) = (&node.name, node.location, describe(graph, &node.inputs));
    let hint = if matches!(node.op, NodeOp::Custom(_)) { " (`Rule::linear` declares a linear op)" } else { "" };
    format!("{name} at {}:{} has no rule for its inputs{hint}: {inputs}", location.file(), location.line())
}

fn describe(graph: &Graph, vars: &[Var]) -> String {
    let text = |var: &Var| {
        let info = graph.tensor(*var);
        let layout = match info.loop_sbp {
            Some(Sbp::Split(dim)) => format!("is divided along dim {dim}"),
            Some(Sbp::Broadcast) => "is the same in each micro-batch".into(),
            Some(Sbp::Partial(ReduceOp::Sum)) => "is one term of a sum over micro-batches".into(),
            Some(Sbp::Partial(ReduceOp::Max)) => "is one term of a maximum over micro-batches".into(),
            None => "has an unknown layout".into(),
        };
        format!("{} {layout}", info.name)
    };
    let shown = vars.iter().filter(|v| graph.tensor(**v).name != RNG_INPUT);
    shown.map(text).collect::<Vec<_>>().join(", ")
}
