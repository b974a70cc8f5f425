//! Chooses a signature for every kernel, and so a layout for every tensor, by cost: formulates the graph as a
//! [`Problem`] of `sbp::choose` and writes the solution into the graph.
//!
//! The user's layouts restrict the choice:
//! - LAY-1: parameters and inputs are read in their given layout;
//! - LAY-2: a split comes from a split. A kernel may split a factor over an axis only if one of its inputs can have
//!   that split, because a parameter, an input or a `relayout` has it, or if it makes the parts from whole inputs;
//! - LAY-3: a tensor that can only be split stays split for a kernel that can work on its parts.
//!
//! Cost decides among the remaining candidates. Without these rules, cost would gather weights or introduce sequence
//! parallelism on small models, and the program would not show what runs.

use std::collections::BTreeSet;
use std::panic::Location;

use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::element_count;

use crate::boxing::Planner;
use crate::graph::{Graph, Node, NodeOp, Rate, SourceLine, Var, ops};
use crate::layout_error::LayoutError;
use crate::passes::optimizer::owner_sums;
use crate::placement::Placement;
use crate::sbp::choose::{Candidate, NodeSpec, Problem, TensorSpec, choose as choose_layouts};
use crate::sbp::rule::{NdSignature, Rule};
use crate::sbp::{NdSbp, PlacedLayout, Sbp};

/// Assumed rates of compute; only their ratio to the rates of the cost model matters.
const FLOPS_PER_SECOND: f64 = 1e11;
const BYTES_PER_SECOND: f64 = 1e10;

/// Sets the signature of every node and the layout of every tensor; records an error if there is no solution.
pub fn choose(graph: &mut Graph, planner: &mut Planner) {
    set_update_layouts(graph);
    let mut problem = Problem { tensors: tensors(graph), nodes: Vec::new() };
    let mut splits = Splits::new(&problem.tensors);
    let mut node_of = Vec::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        match spec(graph, node, &problem.tensors) {
            Ok(Some(mut spec)) => {
                if node.rate == Rate::MicroBatch {
                    splits.restrict(graph, node, &mut spec);
                }
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
            copy_layouts_to_sums(graph);
        }
        Err(e) => {
            let location = error_location(graph, &e);
            graph.error("layout", e.to_string(), location);
        }
    }
}

/// The source line of the node that the error names.
fn error_location(graph: &Graph, error: &LayoutError) -> SourceLine {
    let found = match error {
        LayoutError::Choice { node, .. } => graph.nodes.iter().find(|n| n.name == *node),
        _ => None,
    };
    found.or(graph.nodes.first()).map_or(Location::caller(), |n| n.location)
}

/// Sets the layouts of the tensors that norm and update make; they are not chosen.
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

/// Gives each accumulated sum the layout of its input.
fn copy_layouts_to_sums(graph: &mut Graph) {
    for index in 0..graph.nodes.len() {
        let node = &graph.nodes[index];
        if matches!(node.op, NodeOp::Accumulate) {
            let (output, layout) = (node.outputs[0], graph.tensor(node.inputs[0]).layout.clone());
            graph.tensors[output.index()].layout = layout;
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

/// The tensor itself, or the input of its accumulation.
fn source(graph: &Graph, var: Var) -> Var {
    let node = graph.producer(var);
    if matches!(node.op, NodeOp::Accumulate) { node.inputs[0] } else { var }
}

/// The node as a part of the problem; `None` if there is nothing to choose.
fn spec(graph: &Graph, node: &Node, tensors: &[TensorSpec]) -> Result<Option<NodeSpec>, LayoutError> {
    let placement = &graph.placements[node.placement];
    let indices = |vars: &[Var]| -> Vec<usize> { vars.iter().map(|v| source(graph, *v).index()).collect() };
    let shapes: Vec<&[usize]> = node.inputs.iter().map(|v| graph.shape(*v)).collect();
    let rule = match &node.op {
        NodeOp::Kernel(Op::AdamW { .. }) => {
            // The gradient must have the parameter's layout.
            let required = graph.layout(node.updates[0]).clone();
            let signature = NdSignature { inputs: vec![required], outputs: Vec::new() };
            let candidates = vec![Candidate { signature, compute_seconds: 0.0 }];
            let inputs = indices(&node.inputs[..1]);
            let (name, placement) = (node.name.clone(), placement.clone());
            return Ok(Some(NodeSpec { name, placement, inputs, outputs: Vec::new(), candidates }));
        }
        // Only sums of the uses of a shared parameter have a choice.
        NodeOp::Kernel(op) if node.rate == Rate::Step && !matches!(op, Op::Add) => return Ok(None),
        NodeOp::Kernel(Op::SumLeading) => ops::sum_leading(shapes[0].len(), graph.shape(node.outputs[0]).len())?,
        NodeOp::Kernel(op @ Op::EmbeddingGrad { .. }) => {
            ops::rule(op, &shapes)?.size('v', graph.shape(node.outputs[0])[0])?
        }
        NodeOp::Kernel(op) => ops::rule(op, &shapes)?,
        NodeOp::Custom(op) => op.rule()?,
        NodeOp::Relayout => {
            let x: String = ('a'..='z').take(shapes[0].len()).collect();
            Rule::parse(&format!("{x}->{x}"))?
        }
        _ => return Ok(None),
    };
    let (inputs, outputs) = (indices(&node.inputs), node.outputs.iter().map(|v| v.index()).collect());
    let seconds = whole_seconds(graph, node);
    let mut spec = NodeSpec::of_rule(&node.name, placement, &rule, tensors, inputs, outputs, seconds)?;
    spec.candidates.retain(|c| is_canonical(&c.signature, placement));
    if let NodeOp::Relayout = node.op {
        let required = tensors[node.outputs[0].index()].pinned.as_ref().map(|l| &l.sbp);
        spec.candidates.retain(|c| c.signature.outputs.first() == required);
    }
    Ok(Some(spec))
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

    /// Keeps the candidates that LAY-1 to LAY-3 allow, and records the possible layouts of their outputs.
    fn restrict(&mut self, graph: &Graph, node: &Node, spec: &mut NodeSpec) {
        let is_given = |input: &Var| matches!(graph.producer(*input).op, NodeOp::Parameter { .. } | NodeOp::Input);
        let keeps_given_layouts = |c: &Candidate| {
            let mut inputs = node.inputs.iter().zip(&spec.inputs).zip(&c.signature.inputs);
            inputs.all(|((var, tensor), required)| !is_given(var) || self.can_have(*tensor, required))
        };
        let axes = spec.placement.axes().len();
        let comes_from_a_split = |c: &Candidate| (0..axes).all(|axis| self.split_exists(spec, &c.signature, axis));
        let stays_split = |c: &Candidate| (0..axes).all(|axis| self.stays_split(spec, &c.signature, axis));
        let allowed = |c: &&Candidate| keeps_given_layouts(c) && comes_from_a_split(c) && stays_split(c);
        let kept: Vec<Candidate> = spec.candidates.iter().filter(allowed).cloned().collect();
        // If the op cannot read a parameter in its given layout, all candidates stay; `explain` lists the change.
        if !kept.is_empty() {
            spec.candidates = kept;
        }
        for candidate in &spec.candidates {
            for (tensor, layout) in spec.outputs.iter().zip(&candidate.signature.outputs) {
                self.0[*tensor].resize(axes, BTreeSet::new());
                self.0[*tensor].iter_mut().zip(&layout.0).for_each(|(entries, sbp)| {
                    entries.insert(*sbp);
                });
            }
        }
    }

    fn can_have(&self, tensor: usize, layout: &NdSbp) -> bool {
        self.0[tensor].iter().zip(&layout.0).all(|(entries, sbp)| entries.contains(sbp))
    }

    /// LAY-2: false if a signature splits inputs along the axis and no input can have that split.
    fn split_exists(&self, spec: &NodeSpec, signature: &NdSignature, axis: usize) -> bool {
        let inputs = spec.inputs.iter().zip(&signature.inputs);
        let mut inputs = inputs.filter(|(_, required)| required.0[axis].split_dim().is_some()).peekable();
        inputs.peek().is_none()
            || inputs.any(|(t, required)| self.0[*t].get(axis).is_some_and(|e| e.contains(&required.0[axis])))
    }

    /// LAY-3: false if an input can only be split, the signature requires another layout, and another signature reads
    /// it split.
    fn stays_split(&self, spec: &NodeSpec, signature: &NdSignature, axis: usize) -> bool {
        (0..spec.inputs.len()).all(|input| {
            let only = self.0[spec.inputs[input]].get(axis).filter(|e| e.len() == 1).and_then(|e| e.first());
            let Some(entry @ Sbp::Split(_)) = only else { return true };
            let reads_it_split = |c: &Candidate| c.signature.inputs[input].0[axis] == *entry;
            signature.inputs[input].0[axis] == *entry || !spec.candidates.iter().any(reads_it_split)
        })
    }
}

/// True if all layouts are `Broadcast` along axes of size 1, where all entries are equivalent.
fn is_canonical(signature: &NdSignature, placement: &Placement) -> bool {
    let canonical =
        |layout: &NdSbp| layout.0.iter().zip(placement.axes()).all(|(s, a)| a.size > 1 || *s == Sbp::Broadcast);
    signature.inputs.iter().chain(&signature.outputs).all(canonical)
}

/// Estimated seconds of the op on one device.
fn whole_seconds(graph: &Graph, node: &Node) -> f64 {
    let elements = |v: &Var| element_count(graph.shape(*v)) as f64;
    let bytes: f64 = node.inputs.iter().chain(&node.outputs).map(elements).sum::<f64>() * 4.0;
    let flops = match &node.op {
        NodeOp::Kernel(Op::Einsum(e)) => {
            // 2 times the extents of all indices: those of the output, and those that are summed.
            let a = graph.shape(node.inputs[0]);
            let summed = e.a.chars().zip(a).filter(|(letter, _)| !e.out.contains(*letter)).map(|(_, n)| *n as f64);
            2.0 * elements(&node.outputs[0]) * summed.product::<f64>()
        }
        _ => 0.0,
    };
    flops / FLOPS_PER_SECOND + bytes / BYTES_PER_SECOND
}
