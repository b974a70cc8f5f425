//! Adds the end of a step: the sums of gradients over the micro-batches, their global norm, and AdamW's update.

use std::collections::BTreeMap;

use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::DType;

use crate::graph::builder::{GRAD_SQUARES_OUTPUT, HYPER_INPUT, Layout, STATE_PREFIX};
use crate::graph::{AdamW, Combine, Graph, NodeOp, Phase, Rate, Var};
use crate::placement::{Axis, Placement};
use crate::sbp::{NdSbp, Sbp};

/// Sums `var` over the micro-batches of a step, in the phase and on the placement of its producer.
pub fn accumulate(graph: &mut Graph, var: Var) -> Var {
    let (producer, info) = (graph.producer(var).clone(), graph.tensor(var).clone());
    let saved = (graph.phase, graph.current_placement);
    (graph.phase, graph.current_placement) = (producer.phase, producer.placement);
    let name = format!("{}.sum", producer.name);
    let sum = [(info.shape, info.dtype, Rate::Step)];
    let out = graph.layer(producer.location, |graph| graph.push(&name, NodeOp::Accumulate, &[var], &sum))[0];
    (graph.phase, graph.current_placement) = saved;
    out
}

/// Adds the update of each parameter that has a gradient.
pub fn add_update(graph: &mut Graph, grads: &BTreeMap<Var, Var>, adamw: AdamW) {
    let parameters = graph.parameters();
    let index_of: BTreeMap<Var, usize> = parameters.iter().enumerate().map(|(i, p)| (*p, i)).collect();
    // In the order of the gradients, which is the order in which backward computes them.
    let mut summed: Vec<(Var, Var)> = grads.iter().map(|(p, g)| (*p, *g)).collect();
    summed.sort_by_key(|(_, g)| *g);
    let summed: Vec<(Var, Var)> = summed.into_iter().map(|(p, g)| (p, accumulate(graph, g))).collect();

    graph.phase = Phase::Norm;
    let mut squares = Vec::new();
    for placement in 0..graph.placements.len() {
        let here: Vec<(Var, Var)> =
            summed.iter().copied().filter(|(p, _)| graph.placement_of(*p) == placement).collect();
        if here.is_empty() {
            continue;
        }
        graph.current_placement = placement;
        let at = graph.producer(here[0].0).location;
        let indices = here.iter().map(|(p, _)| index_of[p]).collect();
        let inputs: Vec<Var> = here.iter().map(|(_, g)| *g).collect();
        let (op, output) = (NodeOp::NormSums { indices }, [(vec![parameters.len(), 2], DType::F32, Rate::Step)]);
        let sums = graph.layer(at, |graph| graph.push("grad_squares", op, &inputs, &output))[0];
        squares.push((placement, sums, here));
    }
    graph.phase = Phase::Update;
    for (placement, sums, here) in squares {
        graph.current_placement = placement;
        graph.layer(graph.producer(sums).location, |graph| {
            update_placement(graph, sums, &here, adamw);
            graph.push_output(GRAD_SQUARES_OUTPUT, sums, Some(Combine::First));
        });
    }
    graph.phase = Phase::Forward;
}

/// The layout of `NormSums`: each device contributes the gradient parts of which it holds the first copy.
pub fn owner_sums(placement: &Placement) -> NdSbp {
    let partial = |axis: &Axis| if axis.size > 1 { Sbp::Partial(ReduceOp::Sum) } else { Sbp::Broadcast };
    NdSbp(placement.axes().iter().map(partial).collect())
}

fn update_placement(graph: &mut Graph, sums: Var, parameters: &[(Var, Var)], adamw: AdamW) {
    let hyper = graph.source(HYPER_INPUT, NodeOp::Input, &[2], DType::F32, Rate::Step, Layout::broadcast());
    let scalar = (Vec::new(), DType::F32, Rate::Step);
    let scale = if adamw.max_norm.is_finite() {
        let op = NodeOp::ClipScale { max_norm: adamw.max_norm };
        graph.push("clip", op, &[sums], &[scalar.clone(), scalar])[0]
    } else {
        graph.push("no_clip", NodeOp::Kernel(Op::Fill { value: 1.0 }), &[], &[scalar])[0]
    };
    for (parameter, grad) in parameters {
        let (name, shape) = (graph.tensor(*parameter).name.clone(), graph.shape(*parameter).to_vec());
        let layout = graph.tensor(*parameter).layout.clone();
        let mut moments = Vec::new();
        for moment in ["m", "v"] {
            let name = format!("{STATE_PREFIX}{moment}/{name}");
            let state = graph.push(&name, NodeOp::State, &[], &[(shape.clone(), DType::F32, Rate::Step)])[0];
            graph.tensors[state.index()].name = name;
            graph.tensors[state.index()].layout = layout.clone();
            moments.push(state);
        }
        let weight_decay = if shape.len() >= 2 { adamw.weight_decay } else { 0.0 };
        let op = Op::AdamW { beta1: adamw.betas.0, beta2: adamw.betas.1, eps: adamw.eps, weight_decay };
        graph.push(&format!("{name}.update"), NodeOp::Kernel(op), &[*grad, hyper, scale], &[]);
        let last = graph.nodes.len() - 1;
        graph.nodes[last].updates = vec![*parameter, moments[0], moments[1]];
    }
}
