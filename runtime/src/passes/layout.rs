//! Chooses a signature for every kernel by cost, which gives every tensor a layout. The pass formulates the graph as a
//! [`Problem`] of `sbp::choose`, and writes the solution into the graph.
//!
//! The user's layouts restrict the choice:
//! - LAY-1: a kernel reads parameters and inputs in their given layout;
//! - LAY-2: a kernel may read split inputs along a mesh axis only if one of them can already have the required split.
//!   So splits originate from parameters, inputs and `relayout`s, and from kernels that split only outputs;
//! - LAY-3: if a tensor can have no entry except one split along an axis, kernels that can read this split do so;
//! - LAY-4: a kernel may read terms (`Partial`) along an axis only if one of the inputs can already have these terms.
//!
//! One more rule keeps the order of sums:
//! - LAY-5: if the gradient of a use of a shared parameter can have terms along an axis, the gradients of all uses are
//!   added as terms along this axis. So devices add the gradients of all uses before they reduce their sum, wherever the
//!   uses are.
//!
//! If the rules leave a kernel no candidate, all its candidates stay.
//!
//! Cost decides among the remaining candidates. Without these rules, the cheapest choice would gather weights or
//! introduce sequence parallelism on small models, and the program's text would not show these layouts.

use std::collections::BTreeSet;
use std::panic::Location;

use shardflow_actors::label::Role;
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::element_count;

use crate::boxing::Planner;
use crate::graph::{Graph, Node, NodeOp, Rate, Var, ops};
use crate::layout_error::LayoutError;
use crate::passes::optimizer::owner_sums;
use crate::placement::Axis;
use crate::sbp::choose::{Candidate, NodeSpec, Problem, TensorSpec, choose as choose_layouts};
use crate::sbp::rule::{NdSignature, Rule, Signature};
use crate::sbp::{NdSbp, PlacedLayout, Sbp};

/// Assumed compute rates; only their ratio to the rates of the cost model matters.
const FLOPS_PER_SECOND: f64 = 1e11;
const BYTES_PER_SECOND: f64 = 1e10;

/// Sets the signature of every node and the layout of every tensor; records an error if there is no solution.
pub fn choose(graph: &mut Graph, planner: &mut Planner) {
    set_update_layouts(graph);
    let mut problem = Problem { tensors: tensors(graph), nodes: Vec::new() };
    let mut splits = Splits::new(&problem.tensors);
    let mut node_of = Vec::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        match spec(graph, node, &problem.tensors, &mut splits) {
            Ok(Some(spec)) => {
                problem.nodes.push(spec);
                node_of.push(index);
            }
            Ok(None) => {}
            Err(e) => return graph.node_error(index, e.to_string()),
        }
    }
    match choose_layouts(&problem, planner) {
        Ok(choice) => {
            for ((spec, index), candidate) in problem.nodes.iter().zip(node_of).zip(choice.candidates) {
                graph.nodes[index].signature = Some(spec.candidates[candidate].signature.clone());
            }
            for (tensor, layout) in graph.tensors.iter_mut().zip(choice.layouts) {
                tensor.layout = Some(layout.sbp);
            }
            // An accumulated sum has the layout of its input.
            let sums = graph.nodes.iter().filter(|node| matches!(node.op, NodeOp::Accumulate));
            for (output, input) in sums.map(|node| (node.outputs[0], node.inputs[0])) {
                graph.tensors[output.index()].layout = graph.tensors[input.index()].layout.clone();
            }
        }
        Err(e) => {
            let is_named = |n: &&Node| matches!(&e, LayoutError::Choice { node, .. } if *node == n.name);
            let node = graph.nodes.iter().find(is_named).or(graph.nodes.first());
            graph.error("layout", e.to_string(), node.map_or(Location::caller(), |n| n.location));
        }
    }
}

/// Sets the layouts of the tensors that the norm and the update produce. The search does not choose these layouts.
fn set_update_layouts(graph: &mut Graph) {
    for index in 0..graph.nodes.len() {
        let node = graph.nodes[index].clone();
        if node.rate == Rate::MicroBatch || matches!(node.op, NodeOp::Kernel(Op::Add)) {
            continue;
        }
        let axes = graph.placements[node.placement].axes().len();
        let layout = match node.op {
            NodeOp::NormSums { .. } => owner_sums(&graph.placements[node.placement]),
            _ => NdSbp::broadcast(axes),
        };
        for output in node.outputs {
            graph.tensors[output.index()].layout.get_or_insert_with(|| layout.clone());
        }
    }
}

fn tensors(graph: &Graph) -> Vec<TensorSpec> {
    let outputs: Vec<Var> = graph.outputs.iter().map(|o| source(graph, o.tensor)).collect();
    let spec = |index: usize| {
        let info = &graph.tensors[index];
        let placement = graph.placements[graph.placement_of(graph.var(index))].clone();
        // An accumulated sum is not part of the problem: its input represents it.
        let accumulated = source(graph, graph.var(index)).index() != index;
        let axes = placement.axes().len();
        let pinned = info.layout.clone().or(accumulated.then(|| NdSbp::broadcast(axes)));
        TensorSpec {
            name: info.name.clone(),
            shape: info.shape.clone(),
            dtype: info.dtype,
            pinned: pinned.map(|sbp| PlacedLayout { placement, sbp }),
            is_output: outputs.contains(&graph.var(index)),
        }
    };
    (0..graph.tensors.len()).map(spec).collect()
}

/// The tensor itself; for an accumulated sum, the input of the accumulation.
fn source(graph: &Graph, var: Var) -> Var {
    let node = graph.producer(var);
    if matches!(node.op, NodeOp::Accumulate) { node.inputs[0] } else { var }
}

/// The node as a part of the problem; `None` if the node has nothing to choose.
fn spec(
    graph: &Graph,
    node: &Node,
    tensors: &[TensorSpec],
    splits: &mut Splits,
) -> Result<Option<NodeSpec>, LayoutError> {
    let mut spec = NodeSpec {
        name: node.name.clone(),
        placement: graph.placements[node.placement].clone(),
        inputs: node.inputs.iter().map(|v| source(graph, *v).index()).collect(),
        outputs: node.outputs.iter().map(|v| v.index()).collect(),
        candidates: Vec::new(),
    };
    let shapes: Vec<&[usize]> = node.inputs.iter().map(|v| graph.shape(*v)).collect();
    let rule = match &node.op {
        NodeOp::Kernel(Op::AdamW { .. }) => {
            // The gradient must have the parameter's layout.
            let required = graph.layout(node.updates[0]).clone();
            let signature = NdSignature { inputs: vec![required], outputs: Vec::new() };
            spec.candidates.push(Candidate { signature, compute_seconds: 0.0 });
            spec.inputs.truncate(1);
            return Ok(Some(spec));
        }
        // Of the kernels that run once per step, only sums over uses of a shared parameter have a choice.
        NodeOp::Kernel(op) if node.rate == Rate::Step && !matches!(op, Op::Add) => return Ok(None),
        NodeOp::Kernel(Op::SumLeading) => ops::sum_leading(shapes[0].len(), graph.shape(node.outputs[0]).len())?,
        NodeOp::Kernel(op @ Op::EmbeddingGrad { .. }) => {
            ops::rule(op, &shapes)?.size('v', graph.shape(node.outputs[0])[0])?
        }
        NodeOp::Kernel(op) => ops::rule(op, &shapes)?,
        NodeOp::Custom(op) => op.rule()?,
        // `optimizer::norm_total` and `set_update_layouts` have set these layouts.
        NodeOp::Relayout if node.role == Role::Norm => return Ok(None),
        NodeOp::Relayout => {
            let x: String = ('a'..='z').take(shapes[0].len()).collect();
            Rule::parse(&format!("{x}->{x}"))?
        }
        _ => return Ok(None),
    };
    let by_axis = signatures_by_axis(node, &rule, &spec, tensors);
    let counts = (node.inputs.len(), node.outputs.len());
    let mut signatures = Vec::new();
    if node.rate == Rate::MicroBatch {
        signatures = NdSignature::combinations(&splits.restricted(graph, node, &spec, &by_axis), counts);
    } else if matches!(node.op, NodeOp::Kernel(Op::Add)) {
        signatures = NdSignature::combinations(&splits.terms_first(graph, &spec, &by_axis), counts);
    }
    // The rules allow no candidate if the op cannot read a parameter in its given layout. All candidates then stay, and
    // `explain` lists the layout change.
    if signatures.is_empty() {
        signatures = NdSignature::combinations(&by_axis, counts);
    }
    splits.record(&spec, &signatures);
    spec.add_candidates(&rule, tensors, whole_seconds(graph, node), signatures)?;
    Ok(Some(spec))
}

/// The rule's signatures along each axis. An axis of size 1 has only `Broadcast`, as all its entries are equivalent.
fn signatures_by_axis(node: &Node, rule: &Rule, spec: &NodeSpec, tensors: &[TensorSpec]) -> Vec<Vec<Signature<Sbp>>> {
    let all = rule.signatures_1d();
    let along = |(axis, size): (usize, usize)| {
        let is_broadcast = |s: &Signature<Sbp>| s.inputs.iter().chain(&s.outputs).all(|entry| *entry == Sbp::Broadcast);
        let pinned = spec.outputs.first().and_then(|output| tensors[*output].pinned.as_ref());
        let required = pinned.filter(|_| matches!(node.op, NodeOp::Relayout)).map(|layout| layout.sbp.0[axis]);
        let is_required = |s: &&Signature<Sbp>| required.is_none_or(|entry| entry == s.outputs[0]);
        all.iter().filter(|s| size > 1 || is_broadcast(s)).filter(is_required).cloned().collect()
    };
    spec.placement.axes().iter().map(|axis| axis.size).enumerate().map(along).collect()
}

/// For each tensor and mesh axis, the possible entries of its layout.
struct Splits(Vec<Vec<BTreeSet<Sbp>>>);

impl Splits {
    fn new(tensors: &[TensorSpec]) -> Self {
        let entries = |t: &TensorSpec| match &t.pinned {
            Some(layout) => layout.sbp.0.iter().map(|s| BTreeSet::from([*s])).collect(),
            None => Vec::new(),
        };
        Self(tensors.iter().map(entries).collect())
    }

    /// The signatures along each axis that LAY-1 to LAY-4 allow.
    fn restricted(
        &self,
        graph: &Graph,
        node: &Node,
        spec: &NodeSpec,
        by_axis: &[Vec<Signature<Sbp>>],
    ) -> Vec<Vec<Signature<Sbp>>> {
        let is_given = |input: &Var| matches!(graph.producer(*input).op, NodeOp::Parameter { .. } | NodeOp::Input);
        let given: Vec<bool> = node.inputs.iter().map(is_given).collect();
        let along = |(axis, all): (usize, &Vec<Signature<Sbp>>)| {
            let allowed = |signature: &&Signature<Sbp>| {
                self.keeps_given_layouts(spec, &given, signature, axis)
                    && self.exists(spec, signature, axis, |sbp| sbp.split_dim().is_some())
                    && self.exists(spec, signature, axis, Sbp::is_partial)
                    && self.stays_split(spec, signature, all, axis)
            };
            all.iter().filter(allowed).cloned().collect()
        };
        by_axis.iter().enumerate().map(along).collect()
    }

    /// The signatures along each axis that LAY-5 allows.
    fn terms_first(&self, graph: &Graph, spec: &NodeSpec, by_axis: &[Vec<Signature<Sbp>>]) -> Vec<Vec<Signature<Sbp>>> {
        let along = |(axis, all): (&Axis, &Vec<Signature<Sbp>>)| {
            let can_have_terms = |tensor: &usize| {
                let axes = graph.placements[graph.placement_of(graph.var(*tensor))].axes();
                let own = axes.iter().position(|other| other == axis);
                own.is_some_and(|own| {
                    self.0[*tensor].get(own).is_some_and(|entries| entries.iter().any(|e| e.is_partial()))
                })
            };
            let reads_terms = |s: &&Signature<Sbp>| s.inputs.iter().all(|entry| entry.is_partial());
            let has_terms = spec.inputs.iter().any(can_have_terms);
            all.iter().filter(|s| !has_terms || reads_terms(s)).cloned().collect()
        };
        spec.placement.axes().iter().zip(by_axis).map(along).collect()
    }

    /// Records the possible layouts of the node's outputs.
    fn record(&mut self, spec: &NodeSpec, signatures: &[NdSignature]) {
        for signature in signatures {
            for (tensor, layout) in spec.outputs.iter().zip(&signature.outputs) {
                self.0[*tensor].resize(layout.0.len(), BTreeSet::new());
                self.0[*tensor].iter_mut().zip(&layout.0).for_each(|(entries, sbp)| {
                    entries.insert(*sbp);
                });
            }
        }
    }

    fn can_have(&self, tensor: usize, axis: usize, entry: Sbp) -> Option<bool> {
        self.0[tensor].get(axis).map(|entries| entries.contains(&entry))
    }

    /// LAY-1: false if a parameter or an input cannot have the layout that the signature requires.
    fn keeps_given_layouts(&self, spec: &NodeSpec, given: &[bool], signature: &Signature<Sbp>, axis: usize) -> bool {
        let mut inputs = given.iter().zip(&spec.inputs).zip(&signature.inputs);
        inputs.all(|((given, tensor), required)| !given || self.can_have(*tensor, axis, *required) != Some(false))
    }

    /// LAY-2 if `is_such` selects splits, LAY-4 if it selects terms. False if the signature requires selected entries
    /// of some inputs along the axis, and none of these inputs can have the entry that is required of it.
    fn exists(&self, spec: &NodeSpec, signature: &Signature<Sbp>, axis: usize, is_such: fn(Sbp) -> bool) -> bool {
        let inputs = spec.inputs.iter().zip(&signature.inputs);
        let mut inputs = inputs.filter(|(_, required)| is_such(**required)).peekable();
        inputs.peek().is_none() || inputs.any(|(t, required)| self.can_have(*t, axis, *required) == Some(true))
    }

    /// LAY-3: false if an input can have only one split, the signature requires another entry, and another signature
    /// reads that split.
    fn stays_split(&self, spec: &NodeSpec, signature: &Signature<Sbp>, all: &[Signature<Sbp>], axis: usize) -> bool {
        (0..spec.inputs.len()).all(|input| {
            let only = self.0[spec.inputs[input]].get(axis).filter(|e| e.len() == 1).and_then(|e| e.first());
            let Some(entry @ Sbp::Split(_)) = only else { return true };
            signature.inputs[input] == *entry || !all.iter().any(|other| other.inputs[input] == *entry)
        })
    }
}

/// Estimated seconds of the op on one device.
fn whole_seconds(graph: &Graph, node: &Node) -> f64 {
    let elements = |v: &Var| element_count(graph.shape(*v)) as f64;
    let bytes: f64 = node.inputs.iter().chain(&node.outputs).map(elements).sum::<f64>() * 4.0;
    let flops = match &node.op {
        NodeOp::Kernel(Op::Einsum(e)) => {
            // Twice the product of the extents of all indices, that is, of the output's indices and the summed ones.
            let a = graph.shape(node.inputs[0]);
            let summed = e.a.chars().zip(a).filter(|(letter, _)| !e.out.contains(*letter)).map(|(_, n)| *n as f64);
            2.0 * elements(&node.outputs[0]) * summed.product::<f64>()
        }
        _ => 0.0,
    };
    flops / FLOPS_PER_SECOND + bytes / BYTES_PER_SECOND
}
