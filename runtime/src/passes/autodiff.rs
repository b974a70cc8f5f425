//! Reverse-mode differentiation on the graph: adds the backward nodes of the loss, each on the placement of its forward
//! node. Contributions to the gradient of a tensor are added in reverse program order, so the result is deterministic.

use std::collections::BTreeMap;

use shardflow_actors::label::Role;
use shardflow_kernels::op::{Einsum, Op};

use crate::graph::{Graph, Node, NodeOp, Var, ops};

/// Adds the backward nodes. Returns the contributions to each parameter's gradient: one for each use of the parameter,
/// in reverse program order. A contribution covers one micro-batch and is not accumulated yet.
pub fn backward(graph: &mut Graph, loss: Var) -> BTreeMap<Var, Vec<Var>> {
    let needed = needs_gradient(graph);
    // The contributions to the gradient of each tensor.
    let mut grads: BTreeMap<Var, Vec<Var>> = BTreeMap::new();
    graph.role = Role::Backward;

    graph.current_placement = graph.placement_of(loss);
    let location = graph.producer(loss).location;
    let one = graph.layer(location, |graph| graph.kernel("dloss", Op::Fill { value: 1.0 }, &[]))[0];
    grads.insert(loss, vec![one]);

    for index in (0..graph.nodes.len()).rev() {
        let node = graph.nodes[index].clone();
        let is_source = matches!(node.op, NodeOp::Parameter { .. } | NodeOp::Input);
        if is_source || node.role != Role::Forward || !node.outputs.iter().any(|o| needed[o.index()]) {
            continue;
        }
        let grad = |output: &Var| {
            let parts = grads.remove(output)?;
            Some(graph.layer(node.location, |graph| total(graph, parts)))
        };
        let outputs: Vec<Option<Var>> = node.outputs.iter().map(grad).collect();
        graph.current_placement = node.placement;
        for (input, grad) in node_backward(graph, &node, &outputs) {
            if needed[input.index()] {
                grads.entry(input).or_default().push(grad);
            }
        }
    }
    graph.role = Role::Forward;
    // The remaining gradients belong to tensors without backward nodes: parameters and inputs.
    grads.retain(|var, _| matches!(graph.producer(*var).op, NodeOp::Parameter { .. }));
    grads
}

/// For each tensor: true if it depends on a parameter.
fn needs_gradient(graph: &Graph) -> Vec<bool> {
    let mut needed = vec![false; graph.tensors.len()];
    for node in &graph.nodes {
        let parameter = matches!(node.op, NodeOp::Parameter { .. });
        let any = parameter || node.inputs.iter().any(|i| needed[i.index()]);
        node.outputs.iter().for_each(|output| needed[output.index()] = any);
    }
    needed
}

/// The sum of the contributions to a gradient, in their order on all placements. Each contribution is added on its own
/// placement, so the sum moves along with the backward pass, and crosses to a placement only once for each chunk.
fn total(graph: &mut Graph, parts: Vec<Var>) -> Var {
    let add = |sum, part| {
        graph.current_placement = graph.placement_of(part);
        graph.kernel("grad_sum", Op::Add, &[sum, part])[0]
    };
    parts.into_iter().reduce(add).expect("a gradient has a contribution")
}

/// Returns the gradients of a node's inputs, given the gradients of its outputs.
fn node_backward(graph: &mut Graph, node: &Node, grads: &[Option<Var>]) -> Vec<(Var, Var)> {
    let name = format!("{}_grad", node.name);
    let inputs = &node.inputs;
    if let NodeOp::Custom(op) = &node.op {
        let parts = op.clone().backward(graph, inputs, &node.outputs, grads);
        let mut check = |(port, part): (usize, Option<Var>)| {
            part.map(|v| graph.check_arg(&node.name, &format!("the gradient of input {port}"), v, node.location))
        };
        let parts: Vec<Option<Var>> = parts.into_iter().enumerate().map(&mut check).collect();
        if let Some(message) = gradient_mismatch(graph, inputs, &parts) {
            graph.error(&node.name, message, node.location);
            return Vec::new();
        }
        return inputs.iter().zip(parts).filter_map(|(i, g)| g.map(|g| (*i, g))).collect();
    }
    // Every op below needs only the gradient of its first output.
    let Some(dy) = grads[0] else { return Vec::new() };
    match &node.op {
        // A layout change passes the gradient through; the layout pass chooses the gradient's layout by cost.
        NodeOp::Relayout => vec![(inputs[0], dy)],
        NodeOp::Kernel(op) => graph.layer(node.location, |graph| kernel_backward(graph, node, op, dy, &name)),
        _ => Vec::new(),
    }
}

fn gradient_mismatch(graph: &Graph, inputs: &[Var], parts: &[Option<Var>]) -> Option<String> {
    if parts.len() != inputs.len() {
        return Some(format!(
            "`backward` must return one gradient or `None` for each input: expected {}, got {}",
            inputs.len(),
            parts.len()
        ));
    }
    inputs.iter().zip(parts).enumerate().find_map(|(port, (input, grad))| {
        let (want, got) = (graph.shape(*input), graph.shape((*grad)?));
        (want != got && !graph.is_poisoned(&[(*grad)?]))
            .then(|| format!("`backward` must return a gradient of shape {want:?} for input {port}, got {got:?}"))
    })
}

fn kernel_backward(graph: &mut Graph, node: &Node, op: &Op, dy: Var, name: &str) -> Vec<(Var, Var)> {
    let (inputs, outputs) = (&node.inputs, &node.outputs);
    match op {
        Op::Add => {
            let (rank, rank_b) = (graph.shape(inputs[0]).len(), graph.shape(inputs[1]).len());
            let db = if rank == rank_b {
                dy
            } else {
                let rule = ops::sum_leading(rank, rank_b);
                graph.node_by_rule(name, NodeOp::Kernel(Op::SumLeading), rule, &[dy])[0]
            };
            vec![(inputs[0], dy), (inputs[1], db)]
        }
        Op::Einsum(e) => {
            // The gradient of `a,b->out` with respect to `a` is `out,b->a`, and with respect to `b` it is `out,a->b`.
            let for_a = Einsum { a: e.out.clone(), b: e.b.clone(), out: e.a.clone() };
            let for_b = Einsum { a: e.out.clone(), b: e.a.clone(), out: e.b.clone() };
            let da = graph.kernel(name, Op::Einsum(for_a), &[dy, inputs[1]])[0];
            let db = graph.kernel(name, Op::Einsum(for_b), &[dy, inputs[0]])[0];
            vec![(inputs[0], da), (inputs[1], db)]
        }
        Op::Embedding { .. } => {
            let (op, vocab) = (Op::EmbeddingGrad { vocab_start: 0 }, graph.shape(inputs[1])[0]);
            let rule = ops::rule(&op, &[graph.shape(inputs[0]), graph.shape(dy)]).and_then(|r| r.size('v', vocab));
            let grad = graph.node_by_rule(name, NodeOp::Kernel(op), rule, &[inputs[0], dy])[0];
            vec![(inputs[1], grad)]
        }
        Op::LayerNorm { .. } => {
            let args = [dy, inputs[0], inputs[1], outputs[1], outputs[2]];
            let grads = graph.kernel(name, Op::LayerNormGrad, &args);
            vec![(inputs[0], grads[0]), (inputs[1], grads[1])]
        }
        Op::Gelu => vec![(inputs[0], graph.kernel(name, Op::GeluGrad, &[dy, inputs[0]])[0])],
        Op::Scale { .. } => vec![(inputs[0], graph.kernel(name, op.clone(), &[dy])[0])],
        Op::Attention { scale } => {
            let args = [dy, inputs[0], inputs[1], inputs[2], outputs[0], outputs[1]];
            let grads = graph.kernel(name, Op::AttentionGrad { scale: *scale }, &args);
            vec![(inputs[0], grads[0]), (inputs[1], grads[1]), (inputs[2], grads[2])]
        }
        Op::Dropout { .. } => vec![(inputs[0], graph.kernel(name, op.clone(), &[dy, inputs[1]])[0])],
        Op::TokenLoss { scale } => {
            // One kernel computes the gradient of the whole cross-entropy, without the intermediate sums.
            let stats = graph.producer(inputs[1]).clone();
            let op = Op::CrossEntropyGrad { vocab_start: 0, scale: *scale };
            let args = [dy, stats.inputs[0], inputs[0], inputs[1], stats.inputs[2]];
            vec![(stats.inputs[0], graph.kernel(name, op, &args)[0])]
        }
        other => {
            let message = format!("{} has no gradient; write it as a custom op with a `backward`", other.name());
            graph.refuse(&node.name, message);
            Vec::new()
        }
    }
}
