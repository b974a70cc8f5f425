//! Boxing costs between all layouts of a tensor on one placement: those of [`super::plan`], for many pairs at once.

use std::collections::HashMap;

use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::tensor::DType;

use super::{CostModel, SearchSpace, combinations};
use crate::placement::Placement;
use crate::sbp::{NdSbp, PlacedLayout, Sbp};

/// Costs of one tensor's layout changes within a placement.
#[derive(Debug)]
pub struct CostTable {
    ids: HashMap<NdSbp, usize>,
    /// Seconds of a single step between two layouts; infinity if no step makes the change.
    steps: Vec<Vec<f64>>,
    /// By source, computed on first use: seconds of the cheapest path to each layout.
    paths: Vec<Option<Vec<f64>>>,
}

impl CostTable {
    pub fn new(shape: &[usize], dtype: DType, placement: &Placement, model: &CostModel) -> Self {
        let sbp = NdSbp::broadcast(placement.axes().len());
        let end = PlacedLayout { placement: placement.clone(), sbp };
        let layouts = if dtype == DType::I32 { unreduced_layouts } else { all_layouts };
        let space = SearchSpace::new(shape, dtype, &end, &end, model, layouts);
        let count = space.states.len();
        let step = |from, to| match from == to {
            true => 0.0,
            false => space.edge(from, to, f64::INFINITY).map_or(f64::INFINITY, |e| e.cost_seconds),
        };
        Self {
            ids: space.states.iter().enumerate().map(|(id, state)| (state.sbp.clone(), id)).collect(),
            steps: (0..count).map(|from| (0..count).map(|to| step(from, to)).collect()).collect(),
            paths: vec![None; count],
        }
    }

    /// The cost of [`super::plan`] between two layouts; infinity if it would fail.
    pub fn seconds(&mut self, from: &NdSbp, to: &NdSbp) -> f64 {
        let (Some(&from), Some(&to)) = (self.ids.get(from), self.ids.get(to)) else { return f64::INFINITY };
        let steps = &self.steps;
        self.paths[from].get_or_insert_with(|| cheapest_from(steps, from))[to]
    }
}

/// Dijkstra's algorithm on a dense graph.
fn cheapest_from(steps: &[Vec<f64>], source: usize) -> Vec<f64> {
    let mut best = vec![f64::INFINITY; steps.len()];
    let mut open: Vec<usize> = (0..steps.len()).collect();
    best[source] = 0.0;
    while let Some(position) = (0..open.len()).min_by(|&a, &b| best[open[a]].total_cmp(&best[open[b]])) {
        let state = open.swap_remove(position);
        let cost = best[state];
        best.iter_mut().zip(&steps[state]).for_each(|(to, seconds)| *to = to.min(cost + seconds));
    }
    best
}

pub(super) fn all_layouts(shape: &[usize], placement: &Placement, _: &[&NdSbp]) -> Vec<NdSbp> {
    let (splits, partial) = ((0..shape.len()).map(Sbp::Split), [ReduceOp::Sum, ReduceOp::Max].map(Sbp::Partial));
    let entries: Vec<Sbp> = std::iter::once(Sbp::Broadcast).chain(splits).chain(partial).collect();
    combinations(placement.axes().iter().map(|_| entries.clone()))
}

fn unreduced_layouts(shape: &[usize], placement: &Placement, ends: &[&NdSbp]) -> Vec<NdSbp> {
    all_layouts(shape, placement, ends).into_iter().filter(|layout| layout.partial().is_none()).collect()
}
