//! The choice of layouts: one signature for each op, so that boxing and compute cost least in all.
//! Works on an abstract [`Problem`], so that it knows no graph.
//!
//! The **objective** is the sum of
//! - CH-1: for each tensor and each distinct layout that its readers require, boxing to it, once;
//! - CH-2: for a tensor that is an output or that nobody reads, reducing it to `Broadcast` where it is `Partial`;
//! - CH-3: each op's compute on its busiest device.
//!
//! The search is a beam in topological order, in which assignments that leave the same layouts to later ops are merged
//! (so it is exact while the beam is wide enough), then sweeps that change one op at a time while that helps. The beam
//! ranks by what is paid and what is **pending**: reducing `Partial` tensors that nobody has reduced yet. (A pending cost
//! for gathering what was sliced out of a `Broadcast` tensor was tried: answers were the same or worse.)

use std::collections::HashSet;

use shardflow_kernels::tensor::DType;

use super::cost::{Costs, compute_seconds};
use super::rule::{NdSignature, Rule};
use super::{NdSbp, PlacedLayout};
use crate::boxing::CostModel;
use crate::layout_error::LayoutError;
use crate::placement::Placement;

/// Assignments that the beam keeps after each op, at least.
const BEAM_WIDTH_MIN: usize = 16;

/// The beam is as wide as gives this many extensions of a node: wide where there are few candidates.
const EXTENSIONS: usize = 512;

/// Sweeps of single changes, at most.
const SWEEPS_MAX: usize = 16;

/// Costs that differ by less than this part are one cost: sums in another order differ by rounding.
const TIE: f64 = 1e-9;

/// A tensor of a [`Problem`].
#[derive(Clone, Debug)]
pub struct TensorSpec {
    /// Shown in errors.
    pub name: String,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// The layout it must have, if that is given. A tensor that no node produces must have one.
    pub pinned: Option<PlacedLayout>,
    /// True when it is used after the problem's nodes; one that no node reads counts as used too.
    pub is_output: bool,
}

/// A way to do a node.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Layouts of the operands.
    pub signature: NdSignature,
    /// Seconds on the busiest device.
    pub compute_seconds: f64,
}

/// An op of a [`Problem`].
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Shown in errors.
    pub name: String,
    /// Where it runs.
    pub placement: Placement,
    /// Indices of the tensors it reads.
    pub inputs: Vec<usize>,
    /// Indices of the tensors it produces.
    pub outputs: Vec<usize>,
    /// What may be chosen; ties go to the first.
    pub candidates: Vec<Candidate>,
}

/// Nodes in topological order, and their tensors.
#[derive(Clone, Debug, Default)]
pub struct Problem {
    /// By index.
    pub tensors: Vec<TensorSpec>,
    /// Each reads only tensors that are pinned or produced by earlier nodes.
    pub nodes: Vec<NodeSpec>,
}

/// A change of layout that a choice needs.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversion {
    /// Index of the tensor.
    pub tensor: usize,
    /// Layout it has.
    pub from: PlacedLayout,
    /// Layout that readers require.
    pub to: PlacedLayout,
    /// What boxing costs.
    pub cost_seconds: f64,
}

/// The answer to a [`Problem`].
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// For each node, the index of its candidate.
    pub candidates: Vec<usize>,
    /// For each tensor, the layout it has (the pinned one, where there is one).
    pub layouts: Vec<PlacedLayout>,
    /// All changes of layout among nodes, by tensor; what outputs cost to reduce (CH-2) is not among them.
    pub conversions: Vec<Conversion>,
    /// The objective.
    pub cost_seconds: f64,
}

impl NodeSpec {
    /// A node whose candidates are a rule's signatures on this placement. `whole_seconds` is what the op would take unsharded.
    ///
    /// # Errors
    /// When an input is not among the tensors, or the inputs' shapes do not fit the rule.
    pub fn of_rule(
        name: &str,
        placement: &Placement,
        rule: &Rule,
        tensors: &[TensorSpec],
        inputs: Vec<usize>,
        outputs: Vec<usize>,
        whole_seconds: f64,
    ) -> Result<Self, LayoutError> {
        let missing = |t: usize| LayoutError::Choice { node: name.into(), why: format!("no tensor {t}") };
        let shape = |&t: &usize| tensors.get(t).map(|tensor| tensor.shape.clone()).ok_or_else(|| missing(t));
        let input_shapes = inputs.iter().map(shape).collect::<Result<Vec<_>, _>>()?;
        let output_shapes = rule.infer_shapes(&input_shapes)?;
        let candidate = |signature: NdSignature| {
            let seconds = compute_seconds(whole_seconds, &signature, &input_shapes, &output_shapes, placement);
            Candidate { signature, compute_seconds: seconds }
        };
        let candidates = rule.signatures(placement.axes().len()).into_iter().map(candidate).collect();
        Ok(Self { name: name.into(), placement: placement.clone(), inputs, outputs, candidates })
    }
}

/// Chooses a signature for each node. A pure function of its arguments.
///
/// # Errors
/// [`LayoutError::Choice`] when the problem is not well formed (see [`Problem`]), or no candidate of a node can be had from
/// the layouts before it.
pub fn choose(problem: &Problem, model: &CostModel) -> Result<Choice, LayoutError> {
    let mut chooser = Chooser::new(problem, *model)?;
    let mut candidates = chooser.beam()?;
    chooser.sweep(&mut candidates);
    Ok(chooser.answer(candidates))
}

/// A candidate with interned layouts.
struct Way {
    inputs: Vec<usize>,
    outputs: Vec<usize>,
    seconds: f64,
}

struct Chooser<'a> {
    problem: &'a Problem,
    costs: Costs,
    /// Interned shape of each tensor.
    shapes: Vec<usize>,
    /// Interned pinned layouts.
    pinned: Vec<Option<usize>>,
    /// `(node, output)` that produces each tensor.
    producers: Vec<Option<(usize, usize)>>,
    /// `(node, input)` that read each tensor, in order.
    readers: Vec<Vec<(usize, usize)>>,
    /// For each node its candidates.
    ways: Vec<Vec<Way>>,
}

/// A tensor that is there and that later nodes read, in one assignment of the beam.
#[derive(Clone)]
struct Held {
    tensor: usize,
    layout: usize,
    /// Layouts that it was converted to and paid for, sorted.
    paid: Vec<usize>,
    pending_seconds: f64,
}

/// An assignment of the nodes so far.
#[derive(Clone)]
struct Assignment {
    paid_seconds: f64,
    held: Vec<Held>,
    /// Position in the list of choices, from which the earlier ones are found.
    last: Option<usize>,
}

/// An assignment with one more node.
struct Extension {
    assignment: Assignment,
    way: usize,
    rank_seconds: f64,
    converted: usize,
}

impl<'a> Chooser<'a> {
    fn new(problem: &'a Problem, model: CostModel) -> Result<Self, LayoutError> {
        let (mut costs, count) = (Costs::new(model), problem.tensors.len());
        let (mut producers, mut readers, mut ways) = (vec![None; count], vec![Vec::new(); count], Vec::new());
        for (n, node) in problem.nodes.iter().enumerate() {
            check_node(problem, node, &producers, &readers)?;
            node.inputs.iter().enumerate().for_each(|(i, &t)| readers[t].push((n, i)));
            node.outputs.iter().enumerate().for_each(|(i, &t)| producers[t] = Some((n, i)));
            let mut id =
                |sbp: &NdSbp| costs.layout_id(PlacedLayout { placement: node.placement.clone(), sbp: sbp.clone() });
            let mut way = |c: &Candidate| Way {
                inputs: c.signature.inputs.iter().map(&mut id).collect(),
                outputs: c.signature.outputs.iter().map(&mut id).collect(),
                seconds: c.compute_seconds,
            };
            ways.push(node.candidates.iter().map(&mut way).collect());
        }
        let shapes = problem.tensors.iter().map(|t| costs.shape_id(&t.shape, t.dtype)).collect();
        let mut pinned = Vec::new();
        for (tensor, producer) in problem.tensors.iter().zip(&producers) {
            match &tensor.pinned {
                Some(layout) => layout.sbp.check(&tensor.shape, &layout.placement)?,
                None if producer.is_some() => {}
                None => {
                    let why = "neither produced nor given a layout".into();
                    return Err(LayoutError::Choice { node: tensor.name.clone(), why });
                }
            }
            pinned.push(tensor.pinned.clone().map(|layout| costs.layout_id(layout)));
        }
        Ok(Self { problem, costs, shapes, pinned, producers, readers, ways })
    }

    fn is_used_after(&self, tensor: usize) -> bool {
        self.problem.tensors[tensor].is_output || self.readers[tensor].is_empty()
    }

    fn boxing(&mut self, tensor: usize, from: usize, to: usize) -> f64 {
        self.costs.boxing_seconds(self.shapes[tensor], from, to)
    }

    /// CH-2 for a tensor of this layout.
    fn output_seconds(&mut self, tensor: usize, layout: usize) -> f64 {
        if !self.is_used_after(tensor) {
            return 0.0;
        }
        let reduced = self.costs.reduced(layout);
        self.boxing(tensor, layout, reduced)
    }

    fn beam(&mut self) -> Result<Vec<usize>, LayoutError> {
        let mut beam = vec![Assignment { paid_seconds: 0.0, held: Vec::new(), last: None }];
        // (position of the choice before, way)
        let mut choices: Vec<(Option<usize>, usize)> = Vec::new();
        for n in 0..self.problem.nodes.len() {
            let width = (EXTENSIONS / self.ways[n].len()).max(BEAM_WIDTH_MIN);
            let mut extensions = Vec::new();
            for assignment in &beam {
                extensions.extend((0..self.ways[n].len()).filter_map(|way| self.extend(n, way, assignment)));
            }
            // Stable: what is listed first wins a tie.
            extensions.sort_by(|a: &Extension, b: &Extension| {
                a.rank_seconds.total_cmp(&b.rank_seconds).then((a.converted, a.way).cmp(&(b.converted, b.way)))
            });
            let (mut next, mut seen) = (Vec::new(), HashSet::new());
            for Extension { mut assignment, way, .. } in extensions {
                // What later nodes can see. Equal ones have equal pending costs, so the first has paid least.
                let leaves = |h: &Held| (h.tensor, h.layout, h.paid.clone());
                if next.len() < width && seen.insert(assignment.held.iter().map(leaves).collect::<Vec<_>>()) {
                    choices.push((assignment.last, way));
                    assignment.last = Some(choices.len() - 1);
                    next.push(assignment);
                }
            }
            if next.is_empty() {
                let why = "no candidate's layouts can be had from its inputs".into();
                return Err(LayoutError::Choice { node: self.problem.nodes[n].name.clone(), why });
            }
            beam = next;
        }
        // All is paid at the end, so the first is the cheapest.
        let (mut ways, mut last) = (Vec::new(), beam[0].last);
        while let Some(position) = last {
            ways.push(choices[position].1);
            last = choices[position].0;
        }
        ways.reverse();
        Ok(ways)
    }

    /// The assignment with this way for node `n`; none where boxing to it is impossible.
    fn extend(&mut self, n: usize, way: usize, assignment: &Assignment) -> Option<Extension> {
        let node = &self.problem.nodes[n];
        let mut held = assignment.held.clone();
        let mut paid_seconds = assignment.paid_seconds + self.ways[n][way].seconds;
        let mut converted = 0;
        for (i, &tensor) in node.inputs.iter().enumerate() {
            let required = self.ways[n][way].inputs[i];
            let position = held.iter().position(|h| h.tensor == tensor).unwrap_or(held.len());
            if position == held.len() {
                // Not produced by a node: it is held from its first reader to its last.
                let layout = self.pinned[tensor]?;
                held.push(Held { tensor, layout, paid: Vec::new(), pending_seconds: 0.0 });
            }
            let source = &mut held[position];
            if source.layout != required {
                converted += 1;
                if let Err(position) = source.paid.binary_search(&required) {
                    paid_seconds += self.boxing(tensor, source.layout, required);
                    source.paid.insert(position, required);
                    source.pending_seconds = 0.0;
                }
            }
        }
        for (i, &tensor) in node.outputs.iter().enumerate() {
            let made = self.ways[n][way].outputs[i];
            let layout = self.pinned[tensor].unwrap_or(made);
            paid_seconds += self.boxing(tensor, made, layout) + self.output_seconds(tensor, layout);
            if !self.readers[tensor].is_empty() {
                let is_settled = self.is_used_after(tensor) || self.pinned[tensor].is_some();
                let reduced = self.costs.reduced(layout);
                let pending_seconds = if is_settled { 0.0 } else { self.boxing(tensor, layout, reduced) };
                held.push(Held { tensor, layout, paid: Vec::new(), pending_seconds });
            }
        }
        held.retain(|h| self.readers[h.tensor].last().is_some_and(|last| last.0 > n));
        let rank_seconds = paid_seconds + held.iter().map(|h| h.pending_seconds).sum::<f64>();
        let assignment = Assignment { paid_seconds, held, last: assignment.last };
        rank_seconds.is_finite().then_some(Extension { assignment, way, rank_seconds, converted })
    }

    /// The layout in which readers find a tensor, and the one in which it is made.
    fn layouts_of(&self, tensor: usize, candidates: &[usize]) -> (usize, usize) {
        let made = self.producers[tensor].map(|(n, i)| self.ways[n][candidates[n]].outputs[i]);
        let layout = self.pinned[tensor].or(made).unwrap_or_default();
        (layout, made.unwrap_or(layout))
    }

    /// The changes of layout of one tensor (CH-1).
    fn conversions_of(&self, tensor: usize, candidates: &[usize]) -> Vec<(usize, usize)> {
        let (layout, made) = self.layouts_of(tensor, candidates);
        let mut pairs = if layout == made { Vec::new() } else { vec![(made, layout)] };
        for &(n, i) in &self.readers[tensor] {
            let pair = (layout, self.ways[n][candidates[n]].inputs[i]);
            if pair.1 != layout && !pairs.contains(&pair) {
                pairs.push(pair);
            }
        }
        pairs
    }

    /// The tensor's part of the objective.
    fn tensor_seconds(&mut self, tensor: usize, candidates: &[usize]) -> f64 {
        let pairs = self.conversions_of(tensor, candidates);
        let boxing: f64 = pairs.into_iter().map(|(from, to)| self.boxing(tensor, from, to)).sum();
        let (layout, _) = self.layouts_of(tensor, candidates);
        boxing + self.output_seconds(tensor, layout)
    }

    /// Changes one node at a time, as long as that makes the objective smaller.
    fn sweep(&mut self, candidates: &mut [usize]) {
        for _ in 0..SWEEPS_MAX {
            let before = candidates.to_vec();
            for n in 0..candidates.len() {
                let node = &self.problem.nodes[n];
                let mut tensors: Vec<usize> = node.inputs.iter().chain(&node.outputs).copied().collect();
                tensors.sort_unstable();
                tensors.dedup();
                let mut cost_of = |chooser: &mut Self, way: usize| {
                    candidates[n] = way;
                    let seconds = chooser.ways[n][way].seconds;
                    tensors.iter().fold(seconds, |sum, &t| sum + chooser.tensor_seconds(t, candidates))
                };
                let mut best = before[n];
                let mut best_seconds = cost_of(self, best);
                for way in 0..self.ways[n].len() {
                    let seconds = cost_of(self, way);
                    if seconds < best_seconds * (1.0 - TIE) {
                        (best, best_seconds) = (way, seconds);
                    }
                }
                candidates[n] = best;
            }
            if candidates == before {
                return;
            }
        }
    }

    fn objective_seconds(&mut self, candidates: &[usize]) -> f64 {
        let compute: f64 = candidates.iter().enumerate().map(|(n, &way)| self.ways[n][way].seconds).sum();
        (0..self.shapes.len()).fold(compute, |sum, tensor| sum + self.tensor_seconds(tensor, candidates))
    }

    fn answer(mut self, candidates: Vec<usize>) -> Choice {
        let cost_seconds = self.objective_seconds(&candidates);
        let (mut layouts, mut conversions) = (Vec::new(), Vec::new());
        for tensor in 0..self.shapes.len() {
            for (from, to) in self.conversions_of(tensor, &candidates) {
                let cost_seconds = self.boxing(tensor, from, to);
                let layout = |id| self.costs.layout(id).clone();
                conversions.push(Conversion { tensor, from: layout(from), to: layout(to), cost_seconds });
            }
            layouts.push(self.costs.layout(self.layouts_of(tensor, &candidates).0).clone());
        }
        Choice { candidates, layouts, conversions, cost_seconds }
    }
}

/// # Errors
/// When a node reads what is not there yet, produces what is, or has candidates that do not fit its operands.
fn check_node(
    problem: &Problem,
    node: &NodeSpec,
    producers: &[Option<(usize, usize)>],
    readers: &[Vec<(usize, usize)>],
) -> Result<(), LayoutError> {
    let wrong = |why: String| Err(LayoutError::Choice { node: node.name.clone(), why });
    if let Some(tensor) = node.inputs.iter().chain(&node.outputs).find(|&&t| t >= problem.tensors.len()) {
        return wrong(format!("no tensor {tensor}"));
    }
    let name = |tensor: usize| &problem.tensors[tensor].name;
    for &tensor in &node.inputs {
        if producers[tensor].is_none() && problem.tensors[tensor].pinned.is_none() {
            return wrong(format!("reads {}, which has no layout yet", name(tensor)));
        }
    }
    for (i, &tensor) in node.outputs.iter().enumerate() {
        if producers[tensor].is_some() || !readers[tensor].is_empty() || node.outputs[..i].contains(&tensor) {
            return wrong(format!("produces {}, which was produced or read before", name(tensor)));
        }
    }
    if node.candidates.is_empty() {
        return wrong("has no candidates".into());
    }
    for Candidate { signature, .. } in &node.candidates {
        if (signature.inputs.len(), signature.outputs.len()) != (node.inputs.len(), node.outputs.len()) {
            return wrong(format!("candidate {signature} has another number of operands"));
        }
        let operands = signature.inputs.iter().zip(&node.inputs);
        for (sbp, &tensor) in operands.chain(signature.outputs.iter().zip(&node.outputs)) {
            sbp.check(&problem.tensors[tensor].shape, &node.placement)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
