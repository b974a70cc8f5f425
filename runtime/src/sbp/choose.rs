//! The layout search: chooses a signature for each op of an abstract [`Problem`], such that the total cost is small.
//!
//! The **objective** is the sum of
//! - CH-1: for each tensor, the boxing from the layout in which it is produced to its pinned layout, if they differ,
//!   and one boxing to each distinct layout that its readers require;
//! - CH-2: for a tensor that is an output or has no reader, the reduction of `Partial` to `Broadcast`;
//! - CH-3: for each op, the compute on its busiest device.
//!
//! [`eliminate`] solves a large problem exactly while its tables stay small, in time that is linear in the number of
//! layers. A beam search in topological order solves a small problem. Sweeps then change one op at a time while the
//! cost decreases. The beam merges assignments that leave the same layouts to later ops. It finds the optimum
//! if it has room for all assignments that remain after each op. It ranks assignments by the cost so far plus the
//! **pending** cost of reducing `Partial` tensors that are not reduced yet. (A pending cost for gathering slices of a
//! `Broadcast` tensor was tried. The results were the same or worse.)

mod eliminate;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::rc::Rc;

use shardflow_kernels::tensor::DType;

use eliminate::{Cost, ENTRIES_MAX, Minimum, Table, for_each_combination, minimise};

use super::cost::{CostCache, compute_seconds};
use super::rule::{NdSignature, Rule};
use super::{NdSbp, PlacedLayout};
use crate::boxing::Planner;
use crate::layout_error::LayoutError;
use crate::placement::Placement;

/// Maximum number of nodes for the beam search, whose time grows with the square of this number. Smaller problems keep
/// the beam search, although some of its choices are not the cheapest, because the result bits of existing programs
/// depend on these choices.
const BEAM_NODES_MAX: usize = 512;

/// Minimum number of assignments that the beam keeps after each op.
const BEAM_WIDTH_MIN: usize = 16;

/// Target number of extensions (assignment and candidate) per node: the beam is wide where nodes have few candidates.
const EXTENSIONS: usize = 512;

const SWEEPS_MAX: usize = 16;

/// Relative difference below which costs count as equal, because the order of a sum changes its rounding.
const TIE: f64 = 1e-9;

#[derive(Clone, Debug)]
pub struct TensorSpec {
    pub name: String,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    pub dtype: DType,
    /// The required layout, if there is one. A tensor that no node produces must have one.
    pub pinned: Option<PlacedLayout>,
    /// True if the tensor is used after the problem's nodes. A tensor without readers also counts as used.
    pub is_output: bool,
}

/// One possible signature of a node.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub signature: NdSignature,
    /// Compute time on the busiest device, in seconds.
    pub compute_seconds: f64,
}

#[derive(Clone, Debug)]
pub struct NodeSpec {
    pub name: String,
    pub placement: Placement,
    /// Indices of the tensors that the node reads.
    pub inputs: Vec<usize>,
    /// Indices of the tensors that the node produces.
    pub outputs: Vec<usize>,
    /// The possible signatures. If costs are equal, the first one wins.
    pub candidates: Vec<Candidate>,
}

/// The input of the search: nodes in topological order, and their tensors.
#[derive(Clone, Debug, Default)]
pub struct Problem {
    pub tensors: Vec<TensorSpec>,
    /// The nodes. Each reads only tensors that are pinned or produced by earlier nodes.
    pub nodes: Vec<NodeSpec>,
}

/// The solution of a [`Problem`].
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// For each node, the index of the chosen candidate.
    pub candidates: Vec<usize>,
    /// For each tensor, its layout (the pinned one, if there is one).
    pub layouts: Vec<PlacedLayout>,
    /// Layout changes between nodes, without the reductions of CH-2: `(tensor, its layout, required layout)`.
    pub conversions: Vec<(usize, PlacedLayout, PlacedLayout)>,
    /// The value of the objective.
    pub cost_seconds: f64,
}

impl NodeSpec {
    /// Adds these signatures as candidates. `whole_seconds` is the time of the unsharded op.
    ///
    /// # Errors
    /// Returns an error if an input is not in `tensors`, or the inputs' shapes do not fit the rule.
    pub fn add_candidates(
        &mut self,
        rule: &Rule,
        tensors: &[TensorSpec],
        whole_seconds: f64,
        signatures: Vec<NdSignature>,
    ) -> Result<(), LayoutError> {
        let missing =
            |t: usize| LayoutError::Choice { node: self.name.clone(), why: format!("there is no tensor {t}") };
        let shape = |&t: &usize| tensors.get(t).map(|tensor| tensor.shape.clone()).ok_or_else(|| missing(t));
        let input_shapes = self.inputs.iter().map(shape).collect::<Result<Vec<_>, _>>()?;
        let output_shapes = rule.infer_shapes(&input_shapes)?;
        self.candidates.extend(signatures.into_iter().map(|signature| {
            let seconds = compute_seconds(whole_seconds, &signature, &input_shapes, &output_shapes, &self.placement);
            Candidate { signature, compute_seconds: seconds }
        }));
        Ok(())
    }
}

/// Chooses a signature for each node. This is a pure function of the problem and the planner's cost model. Fails with
/// [`LayoutError::Choice`] if the problem is malformed, or if a node's inputs cannot take the layouts of any candidate.
pub fn choose(problem: &Problem, planner: &mut Planner) -> Result<Choice, LayoutError> {
    let mut chooser = Chooser::new(problem, planner)?;
    let candidates = if problem.nodes.len() <= BEAM_NODES_MAX {
        let mut candidates = chooser.beam()?;
        chooser.sweep(&mut candidates);
        candidates
    } else {
        chooser.eliminate()
    };
    chooser.check_reachable(&candidates)?;
    Ok(chooser.into_choice(candidates))
}

struct InternedCandidate {
    inputs: Vec<usize>,
    outputs: Vec<usize>,
    seconds: f64,
}

struct Chooser<'a> {
    problem: &'a Problem,
    costs: CostCache<'a>,
    /// The interned shape of each tensor.
    shapes: Vec<usize>,
    /// The interned pinned layout of each tensor.
    pinned: Vec<Option<usize>>,
    /// For each tensor, the `(node, output)` that produces it.
    producers: Vec<Option<(usize, usize)>>,
    /// For each tensor, the `(node, input)` pairs that read it, in order.
    readers: Vec<Vec<(usize, usize)>>,
    candidates: Vec<Vec<InternedCandidate>>,
}

/// An existing tensor that later nodes read, in one assignment of the beam.
#[derive(Clone)]
struct LiveTensor {
    tensor: usize,
    layout: usize,
    /// The layouts to which the tensor was converted, sorted. The cost includes these conversions.
    converted_to: Vec<usize>,
    pending_seconds: f64,
}

/// The candidates chosen for the nodes so far.
#[derive(Clone)]
struct Assignment {
    cost_seconds: f64,
    live: Vec<LiveTensor>,
    /// Index of the last choice in the beam's list of choices, in which each choice links to its predecessor.
    last: Option<usize>,
}

struct Extension {
    assignment: Assignment,
    candidate: usize,
    /// The cost so far plus the pending costs.
    rank_seconds: f64,
    conversions: usize,
}

impl<'a> Chooser<'a> {
    fn new(problem: &'a Problem, planner: &'a mut Planner) -> Result<Self, LayoutError> {
        let (mut costs, count) = (CostCache::new(planner), problem.tensors.len());
        let (mut producers, mut readers, mut candidates) = (vec![None; count], vec![Vec::new(); count], Vec::new());
        for (n, node) in problem.nodes.iter().enumerate() {
            check_node(problem, node, &producers, &readers)?;
            node.inputs.iter().enumerate().for_each(|(i, &t)| readers[t].push((n, i)));
            node.outputs.iter().enumerate().for_each(|(i, &t)| producers[t] = Some((n, i)));
            let placement_id = costs.placement_id(&node.placement);
            let mut id = |sbp: &NdSbp| costs.layout_id(&node.placement, placement_id, sbp);
            let mut intern = |c: &Candidate| InternedCandidate {
                inputs: c.signature.inputs.iter().map(&mut id).collect(),
                outputs: c.signature.outputs.iter().map(&mut id).collect(),
                seconds: c.compute_seconds,
            };
            candidates.push(node.candidates.iter().map(&mut intern).collect());
        }
        let shapes = problem.tensors.iter().map(|t| costs.shape_id(&t.shape, t.dtype)).collect();
        let mut pinned = Vec::new();
        for (tensor, producer) in problem.tensors.iter().zip(&producers) {
            match &tensor.pinned {
                Some(layout) => layout.sbp.check(&tensor.shape, &layout.placement)?,
                None if producer.is_some() => {}
                None => {
                    let why = "no node produces it, and it has no pinned layout".into();
                    return Err(LayoutError::Choice { node: tensor.name.clone(), why });
                }
            }
            pinned.push(tensor.pinned.as_ref().map(|PlacedLayout { placement, sbp }| {
                let placement_id = costs.placement_id(placement);
                costs.layout_id(placement, placement_id, sbp)
            }));
        }
        Ok(Self { problem, costs, shapes, pinned, producers, readers, candidates })
    }

    fn is_used_after(&self, tensor: usize) -> bool {
        self.problem.tensors[tensor].is_output || self.readers[tensor].is_empty()
    }

    fn boxing(&mut self, tensor: usize, from: usize, to: usize) -> f64 {
        self.costs.boxing_seconds(self.shapes[tensor], from, to)
    }

    /// The cost CH-2 of a tensor with this layout.
    fn output_seconds(&mut self, tensor: usize, layout: usize) -> f64 {
        if !self.is_used_after(tensor) {
            return 0.0;
        }
        let reduced = self.costs.reduced(layout);
        self.boxing(tensor, layout, reduced)
    }

    /// Minimises the objective by eliminating nodes. Returns the index of each node's candidate.
    fn eliminate(&mut self) -> Vec<usize> {
        let sizes: Vec<usize> = self.candidates.iter().map(Vec::len).collect();
        let (tables, is_exact) = self.tables(&sizes);
        let Minimum { values: mut candidates, is_exact: is_minimum } = minimise(&sizes, tables);
        if !(is_exact && is_minimum) {
            self.sweep(&mut candidates);
        }
        candidates
    }

    /// The objective as tables over the nodes that have a choice, and true if the tables are exact.
    fn tables(&mut self, sizes: &[usize]) -> (Vec<Table>, bool) {
        let (mut tables, mut is_exact, mut costs_by_key) = (Vec::new(), true, HashMap::new());
        for (n, candidates) in self.candidates.iter().enumerate().filter(|(_, candidates)| candidates.len() > 1) {
            let costs = candidates.iter().map(|c| Cost { seconds: c.seconds, conversions: 0 }).collect();
            tables.push(Table { variables: vec![n], costs });
        }
        let mut chosen = vec![0; sizes.len()];
        for tensor in 0..self.shapes.len() {
            let nodes = self.deciding_nodes(tensor);
            let entries = nodes.iter().fold(1_usize, |entries, n| entries.saturating_mul(sizes[*n]));
            // If a tensor has too many readers for one table, a conversion counts once for each reader.
            let parts = if entries <= ENTRIES_MAX { vec![nodes] } else { self.pairs(tensor, &nodes) };
            is_exact &= entries <= ENTRIES_MAX;
            for nodes in parts.into_iter().filter(|nodes| !nodes.is_empty()) {
                let key = self.table_key(tensor, &nodes);
                let costs =
                    costs_by_key.entry(key).or_insert_with(|| self.costs_of(tensor, &nodes, sizes, &mut chosen));
                tables.push(Table { costs: costs.clone(), variables: nodes });
            }
        }
        (tables, is_exact)
    }

    /// The tensor's part of the objective for each combination of the nodes' candidates. `chosen` is a buffer of zeros.
    fn costs_of(&mut self, tensor: usize, nodes: &[usize], sizes: &[usize], chosen: &mut [usize]) -> Rc<[Cost]> {
        let mut costs = Vec::new();
        for_each_combination(nodes, sizes, |values| {
            nodes.iter().zip(values).for_each(|(n, value)| chosen[*n] = *value);
            let conversions = self.conversions_of(tensor, chosen).len();
            costs.push(Cost { seconds: self.tensor_seconds(tensor, chosen), conversions });
        });
        nodes.iter().for_each(|n| chosen[*n] = 0);
        costs.into()
    }

    /// All values that [`Chooser::costs_of`] depends on. The key is equal for the tensors of repeated layers.
    fn table_key(&self, tensor: usize, nodes: &[usize]) -> Vec<usize> {
        let none = usize::MAX;
        let mut key = vec![self.shapes[tensor], self.pinned[tensor].unwrap_or(none)];
        key.push(usize::from(self.is_used_after(tensor)));
        let mut extend = |n: usize, layout: &dyn Fn(&InternedCandidate) -> usize| {
            key.push(nodes.binary_search(&n).unwrap_or(none));
            key.push(self.candidates[n].len());
            key.extend(self.candidates[n].iter().map(layout));
        };
        if let Some((n, i)) = self.producers[tensor] {
            extend(n, &|c| c.outputs[i]);
        }
        self.readers[tensor].iter().for_each(|&(n, i)| extend(n, &|c| c.inputs[i]));
        key.push(usize::from(self.producers[tensor].is_some()));
        key
    }

    /// The nodes whose choice determines the layout changes of a tensor, sorted.
    fn deciding_nodes(&self, tensor: usize) -> Vec<usize> {
        let varies = |n: usize, layout: &dyn Fn(&InternedCandidate) -> usize| {
            let candidates = &self.candidates[n];
            candidates.iter().any(|c| layout(c) != layout(&candidates[0]))
        };
        let producer = self.producers[tensor].filter(|&(n, i)| varies(n, &|c| c.outputs[i]));
        let readers = self.readers[tensor].iter().copied().filter(|&(n, i)| varies(n, &|c| c.inputs[i]));
        let nodes: BTreeSet<usize> = producer.into_iter().chain(readers).map(|(n, _)| n).collect();
        nodes.into_iter().collect()
    }

    /// Each deciding reader, with the producer if the producer is a deciding node too.
    fn pairs(&self, tensor: usize, nodes: &[usize]) -> Vec<Vec<usize>> {
        let producer = self.producers[tensor].map(|(n, _)| n).filter(|n| nodes.contains(n));
        let readers = nodes.iter().filter(|n| Some(**n) != producer);
        readers.map(|&n| producer.into_iter().chain([n]).collect::<BTreeSet<_>>().into_iter().collect()).collect()
    }

    /// Checks that every input can take the layout that its node requires.
    fn check_reachable(&mut self, chosen: &[usize]) -> Result<(), LayoutError> {
        for tensor in 0..self.shapes.len() {
            if !self.tensor_seconds(tensor, chosen).is_finite() {
                let node = self.readers[tensor].first().or(self.producers[tensor].as_ref()).map_or(0, |(n, _)| *n);
                return Err(self.unreachable_error(node));
            }
        }
        Ok(())
    }

    fn unreachable_error(&self, node: usize) -> LayoutError {
        let why = "the inputs cannot be converted to the layouts of any candidate".into();
        LayoutError::Choice { node: self.problem.nodes[node].name.clone(), why }
    }

    /// The beam search. Returns the index of each node's candidate.
    fn beam(&mut self) -> Result<Vec<usize>, LayoutError> {
        let mut beam = vec![Assignment { cost_seconds: 0.0, live: Vec::new(), last: None }];
        // Each choice is `(index of the previous choice, candidate)`.
        let mut choices: Vec<(Option<usize>, usize)> = Vec::new();
        // Only the layouts of these tensors can differ between assignments.
        let varies: Vec<bool> = (0..self.shapes.len()).map(|t| !self.deciding_nodes(t).is_empty()).collect();
        for n in 0..self.problem.nodes.len() {
            let width = (EXTENSIONS / self.candidates[n].len()).max(BEAM_WIDTH_MIN);
            let mut extensions = Vec::new();
            for assignment in &beam {
                let count = self.candidates[n].len();
                extensions.extend((0..count).filter_map(|candidate| self.extend(n, candidate, assignment)));
            }
            // The sort is stable, so the first of equal extensions stays first.
            extensions.sort_by(|a: &Extension, b: &Extension| {
                let tie_break = (a.conversions, a.candidate).cmp(&(b.conversions, b.candidate));
                a.rank_seconds.total_cmp(&b.rank_seconds).then(tie_break)
            });
            let (mut next, mut seen) = (Vec::new(), HashSet::new());
            for Extension { mut assignment, candidate, .. } in extensions {
                // Later nodes depend only on this state. Extensions with equal states have equal pending costs, so the
                // first is best.
                let state = |t: &LiveTensor| (t.tensor, t.layout, t.converted_to.clone());
                let live = assignment.live.iter().filter(|t| varies[t.tensor]);
                if next.len() < width && seen.insert(live.map(state).collect::<Vec<_>>()) {
                    choices.push((assignment.last, candidate));
                    assignment.last = Some(choices.len() - 1);
                    next.push(assignment);
                }
            }
            if next.is_empty() {
                return Err(self.unreachable_error(n));
            }
            beam = next;
        }
        // No cost is pending at the end, so the first assignment is the cheapest.
        let (mut chosen, mut last) = (Vec::new(), beam[0].last);
        while let Some(position) = last {
            chosen.push(choices[position].1);
            last = choices[position].0;
        }
        chosen.reverse();
        Ok(chosen)
    }

    /// Extends the assignment by this candidate of node `n`; `None` if boxing to its layouts is impossible.
    fn extend(&mut self, n: usize, candidate: usize, assignment: &Assignment) -> Option<Extension> {
        let node = &self.problem.nodes[n];
        let mut live = assignment.live.clone();
        let mut cost_seconds = assignment.cost_seconds + self.candidates[n][candidate].seconds;
        let mut conversions = 0;
        for (i, &tensor) in node.inputs.iter().enumerate() {
            let required = self.candidates[n][candidate].inputs[i];
            let position = live.iter().position(|t| t.tensor == tensor).unwrap_or(live.len());
            if position == live.len() {
                // No node produces this tensor: it is live from its first to its last reader.
                let layout = self.pinned[tensor]?;
                live.push(LiveTensor { tensor, layout, converted_to: Vec::new(), pending_seconds: 0.0 });
            }
            let source = &mut live[position];
            if source.layout != required {
                conversions += 1;
                if let Err(position) = source.converted_to.binary_search(&required) {
                    cost_seconds += self.boxing(tensor, source.layout, required);
                    source.converted_to.insert(position, required);
                    source.pending_seconds = 0.0;
                }
            }
        }
        for (i, &tensor) in node.outputs.iter().enumerate() {
            let produced = self.candidates[n][candidate].outputs[i];
            let layout = self.pinned[tensor].unwrap_or(produced);
            cost_seconds += self.boxing(tensor, produced, layout) + self.output_seconds(tensor, layout);
            if !self.readers[tensor].is_empty() {
                let is_settled = self.is_used_after(tensor) || self.pinned[tensor].is_some();
                let reduced = self.costs.reduced(layout);
                let pending_seconds = if is_settled { 0.0 } else { self.boxing(tensor, layout, reduced) };
                live.push(LiveTensor { tensor, layout, converted_to: Vec::new(), pending_seconds });
            }
        }
        live.retain(|t| self.readers[t.tensor].last().is_some_and(|last| last.0 > n));
        let rank_seconds = cost_seconds + live.iter().map(|t| t.pending_seconds).sum::<f64>();
        let assignment = Assignment { cost_seconds, live, last: assignment.last };
        rank_seconds.is_finite().then_some(Extension { assignment, candidate, rank_seconds, conversions })
    }

    /// The layout of a tensor for its readers, and the layout in which it is produced.
    fn layouts_of(&self, tensor: usize, chosen: &[usize]) -> (usize, usize) {
        let produced = self.producers[tensor].map(|(n, i)| self.candidates[n][chosen[n]].outputs[i]);
        let layout = self.pinned[tensor].or(produced).unwrap_or_default();
        (layout, produced.unwrap_or(layout))
    }

    /// The layout changes of one tensor (CH-1).
    fn conversions_of(&self, tensor: usize, chosen: &[usize]) -> Vec<(usize, usize)> {
        let (layout, produced) = self.layouts_of(tensor, chosen);
        let mut pairs = if layout == produced { Vec::new() } else { vec![(produced, layout)] };
        for &(n, i) in &self.readers[tensor] {
            let pair = (layout, self.candidates[n][chosen[n]].inputs[i]);
            if pair.1 != layout && !pairs.contains(&pair) {
                pairs.push(pair);
            }
        }
        pairs
    }

    /// The tensor's part of the objective.
    fn tensor_seconds(&mut self, tensor: usize, chosen: &[usize]) -> f64 {
        let pairs = self.conversions_of(tensor, chosen);
        let boxing: f64 = pairs.into_iter().map(|(from, to)| self.boxing(tensor, from, to)).sum();
        let (layout, _) = self.layouts_of(tensor, chosen);
        boxing + self.output_seconds(tensor, layout)
    }

    /// Changes one node at a time while the objective decreases.
    fn sweep(&mut self, chosen: &mut [usize]) {
        for _ in 0..SWEEPS_MAX {
            let before = chosen.to_vec();
            for n in 0..chosen.len() {
                let node = &self.problem.nodes[n];
                let mut tensors: Vec<usize> = node.inputs.iter().chain(&node.outputs).copied().collect();
                tensors.sort_unstable();
                tensors.dedup();
                let mut cost_of = |chooser: &mut Self, candidate: usize| {
                    chosen[n] = candidate;
                    let seconds = chooser.candidates[n][candidate].seconds;
                    tensors.iter().fold(seconds, |sum, &t| sum + chooser.tensor_seconds(t, chosen))
                };
                let mut best = before[n];
                let mut best_seconds = cost_of(self, best);
                for candidate in 0..self.candidates[n].len() {
                    let seconds = cost_of(self, candidate);
                    if seconds < best_seconds * (1.0 - TIE) {
                        (best, best_seconds) = (candidate, seconds);
                    }
                }
                chosen[n] = best;
            }
            if chosen == before {
                return;
            }
        }
    }

    fn objective_seconds(&mut self, chosen: &[usize]) -> f64 {
        let compute: f64 = chosen.iter().enumerate().map(|(n, &candidate)| self.candidates[n][candidate].seconds).sum();
        (0..self.shapes.len()).fold(compute, |sum, tensor| sum + self.tensor_seconds(tensor, chosen))
    }

    fn into_choice(mut self, candidates: Vec<usize>) -> Choice {
        let cost_seconds = self.objective_seconds(&candidates);
        let (mut layouts, mut conversions) = (Vec::new(), Vec::new());
        for tensor in 0..self.shapes.len() {
            let layout = |id| self.costs.layout(id).clone();
            let pairs = self.conversions_of(tensor, &candidates).into_iter();
            conversions.extend(pairs.map(|(from, to)| (tensor, layout(from), layout(to))));
            layouts.push(layout(self.layouts_of(tensor, &candidates).0));
        }
        Choice { candidates, layouts, conversions, cost_seconds }
    }
}

/// Checks that the node reads existing tensors and produces new ones, and that its candidates fit its operands.
fn check_node(
    problem: &Problem,
    node: &NodeSpec,
    producers: &[Option<(usize, usize)>],
    readers: &[Vec<(usize, usize)>],
) -> Result<(), LayoutError> {
    let error = |why: String| Err(LayoutError::Choice { node: node.name.clone(), why });
    if let Some(tensor) = node.inputs.iter().chain(&node.outputs).find(|&&t| t >= problem.tensors.len()) {
        return error(format!("there is no tensor {tensor}"));
    }
    let name = |tensor: usize| &problem.tensors[tensor].name;
    for &tensor in &node.inputs {
        if producers[tensor].is_none() && problem.tensors[tensor].pinned.is_none() {
            return error(format!("it reads {}, which has no layout yet", name(tensor)));
        }
    }
    for (i, &tensor) in node.outputs.iter().enumerate() {
        if producers[tensor].is_some() || !readers[tensor].is_empty() || node.outputs[..i].contains(&tensor) {
            return error(format!("it produces {}, which an earlier node produces or reads", name(tensor)));
        }
    }
    if node.candidates.is_empty() {
        return error("it has no candidates".into());
    }
    for Candidate { signature, .. } in &node.candidates {
        if (signature.inputs.len(), signature.outputs.len()) != (node.inputs.len(), node.outputs.len()) {
            return error(format!("candidate {signature} and the node differ in their numbers of inputs or outputs"));
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
