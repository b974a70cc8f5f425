//! Adds the nodes at the end of a step. They sum gradients over the micro-batches, compute their global norm, and
//! update the parameters with AdamW.

use std::collections::BTreeMap;

use shardflow_actors::label::Role;
use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::DType;

use crate::graph::builder::{GRAD_SQUARES_OUTPUT, HYPER_INPUT, Layout, STATE_PREFIX};
use crate::graph::{AdamW, Combine, Graph, NodeOp, Rate, Var};
use crate::placement::{Axis, Placement};
use crate::sbp::{NdSbp, Sbp};

/// Sums `var` over the micro-batches of a step, on the placement of its producer.
pub fn accumulate(graph: &mut Graph, var: Var) -> Var {
    let (producer, info) = (graph.producer(var).clone(), graph.tensor(var).clone());
    let saved = (graph.role, graph.current_placement);
    (graph.role, graph.current_placement) = (producer.role, producer.placement);
    let name = format!("{}.sum", producer.name);
    let sum = [(info.shape, info.dtype, Rate::Step)];
    let out = graph.layer(producer.location, |graph| graph.push(&name, NodeOp::Accumulate, &[var], &sum))[0];
    (graph.role, graph.current_placement) = saved;
    out
}

/// Adds the update of each parameter that has a gradient.
pub fn add_update(graph: &mut Graph, grads: &BTreeMap<Var, Vec<Var>>, adamw: AdamW) {
    let parameters = graph.parameters();
    let index_of: BTreeMap<Var, usize> = parameters.iter().enumerate().map(|(i, p)| (*p, i)).collect();
    // The uses of parameters, in the order in which backward computes their gradients.
    let mut uses: Vec<(Var, Var)> = grads.iter().flat_map(|(p, uses)| uses.iter().map(|use_| (*p, *use_))).collect();
    uses.sort_by_key(|(_, use_)| *use_);
    let sums: Vec<(Var, Var)> = uses.into_iter().map(|(p, use_)| (p, accumulate(graph, use_))).collect();
    (graph.role, graph.rate) = (Role::Norm, Rate::Step);
    let summed = add_uses(graph, sums);
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
    let all: Vec<Var> = squares.iter().map(|(_, sums, _)| *sums).collect();
    let total = adamw.max_norm.is_finite().then(|| norm_total(graph, &all, parameters.len()));
    graph.role = Role::Update;
    for (placement, sums, here) in squares {
        graph.current_placement = placement;
        graph.layer(graph.producer(sums).location, |graph| {
            update_placement(graph, total, &here, adamw);
            graph.push_output(GRAD_SQUARES_OUTPUT, sums, Some(Combine::First));
        });
    }
    (graph.role, graph.rate) = (Role::Forward, Rate::MicroBatch);
}

/// Adds up the gradient sums of each parameter's uses, in the order of the uses, on the parameter's placement. The
/// gradient of a shared parameter therefore crosses placements only once per step.
fn add_uses(graph: &mut Graph, sums: Vec<(Var, Var)>) -> Vec<(Var, Var)> {
    let mut totals: Vec<(Var, Var)> = Vec::new();
    for (parameter, sum) in sums {
        let Some(total) = totals.iter_mut().find(|(other, _)| *other == parameter) else {
            totals.push((parameter, sum));
            continue;
        };
        graph.current_placement = graph.placement_of(parameter);
        let location = graph.producer(parameter).location;
        total.1 = graph.layer(location, |graph| graph.kernel("grad_sum", Op::Add, &[total.1, sum])[0]);
    }
    totals
}

/// Adds up the sums of squares of all devices. The sums of each placement are reduced on this placement first, so the
/// order of the additions does not depend on other placements. Then only the first device of each placement has a row
/// that is not zero, so the order of `NormTotal` does not matter.
fn norm_total(graph: &mut Graph, sums: &[Var], parameters: usize) -> Var {
    let placements: Vec<usize> = sums.iter().map(|sums| graph.placement_of(*sums)).collect();
    let output = [(vec![parameters, 2], DType::F32, Rate::Step)];
    let reduce = |graph: &mut Graph, sums: &Var| {
        graph.current_placement = graph.placement_of(*sums);
        if graph.placements[graph.current_placement].device_count() == 1 {
            return *sums;
        }
        let location = graph.producer(*sums).location;
        graph.layer(location, |graph| {
            let reduced = graph.push("norm_part", NodeOp::Relayout, &[*sums], &output)[0];
            if placements.len() == 1 {
                return reduced;
            }
            let first = graph.push("norm_part", NodeOp::Relayout, &[reduced], &output)[0];
            let layout = owner_sums(&graph.placements[graph.current_placement]);
            graph.tensors[first.index()].layout = Some(layout);
            first
        })
    };
    let parts: Vec<Var> = sums.iter().map(|sums| reduce(graph, sums)).collect();
    if let [total] = parts[..] {
        return total;
    }
    let mut devices: Vec<usize> = placements.iter().flat_map(|p| graph.placements[*p].devices()).copied().collect();
    devices.sort_unstable();
    devices.dedup();
    graph.current_placement = if devices.len() == graph.mesh.device_count() {
        graph.placement_index(graph.mesh.whole())
    } else {
        graph.placement_index(Placement::of_all(devices))
    };
    let location = graph.producer(sums[0]).location;
    graph.layer(location, |graph| graph.push("norm_total", NodeOp::NormTotal, &parts, &output))[0]
}

/// The layout of `NormSums`. Each device contributes the gradient parts whose first copy it holds.
pub fn owner_sums(placement: &Placement) -> NdSbp {
    let partial = |axis: &Axis| if axis.size > 1 { Sbp::Partial(ReduceOp::Sum) } else { Sbp::Broadcast };
    NdSbp(placement.axes().iter().map(partial).collect())
}

/// Adds the updates of one placement. `total` is the output of `NormTotal`, if gradients are clipped.
fn update_placement(graph: &mut Graph, total: Option<Var>, parameters: &[(Var, Var)], adamw: AdamW) {
    let hyper = graph.source(HYPER_INPUT, NodeOp::Input, &[2], DType::F32, Rate::Step, Layout::broadcast());
    let scalar = (Vec::new(), DType::F32, Rate::Step);
    let scale = match total {
        Some(total) => {
            let op = NodeOp::ClipScale { max_norm: adamw.max_norm };
            graph.push("clip", op, &[total], &[scalar.clone(), scalar])[0]
        }
        None => graph.push("no_clip", NodeOp::Kernel(Op::Fill { value: 1.0 }), &[], &[scalar])[0],
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
