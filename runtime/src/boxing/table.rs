//! Boxing costs between all layouts of one tensor on one placement: what [`super::plan`] would say, for many pairs at once.

use std::collections::HashMap;

use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::tensor::DType;

use super::{CostModel, Space};
use crate::placement::Placement;
use crate::sbp::{NdSbp, PlacedLayout, Sbp};

/// Costs of one tensor's changes of layout within a placement.
#[derive(Debug)]
pub struct CostTable {
    ids: HashMap<NdSbp, usize>,
    /// Seconds of the one step between two layouts; infinite where no step does it.
    steps: Vec<Vec<f64>>,
    /// For a source that was asked for: seconds of the cheapest path to each layout.
    paths: Vec<Option<Vec<f64>>>,
}

impl CostTable {
    /// The table for a tensor of this shape.
    pub fn new(shape: &[usize], dtype: DType, placement: &Placement, model: &CostModel) -> Self {
        let sbp = NdSbp::broadcast(placement.axes().len());
        let any = PlacedLayout { placement: placement.clone(), sbp };
        let layouts = if dtype == DType::I32 { unreduced_layouts } else { all_layouts };
        let space = Space::new(shape, dtype, &any, &any, model, layouts);
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

    /// What [`super::plan`] would cost from one layout to the other; infinite where it would fail.
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
        let so_far = best[state];
        best.iter_mut().zip(&steps[state]).for_each(|(to, seconds)| *to = to.min(so_far + seconds));
    }
    best
}

/// Every layout of a tensor of this shape.
pub(super) fn all_layouts(shape: &[usize], placement: &Placement, _: &[&NdSbp]) -> Vec<NdSbp> {
    let partial = [Sbp::Partial(ReduceOp::Sum), Sbp::Partial(ReduceOp::Max)];
    combinations(shape, placement, &partial)
}

fn unreduced_layouts(shape: &[usize], placement: &Placement, _: &[&NdSbp]) -> Vec<NdSbp> {
    combinations(shape, placement, &[])
}

fn combinations(shape: &[usize], placement: &Placement, partial: &[Sbp]) -> Vec<NdSbp> {
    let splits = (0..shape.len()).map(Sbp::Split);
    let entries: Vec<Sbp> = std::iter::once(Sbp::Broadcast).chain(splits).chain(partial.iter().copied()).collect();
    let mut layouts = vec![NdSbp(Vec::new())];
    for _ in placement.axes() {
        let extended = |layout: &NdSbp| {
            let layout = layout.clone();
            entries.clone().into_iter().map(move |e| NdSbp(layout.0.iter().copied().chain([e]).collect()))
        };
        layouts = layouts.iter().flat_map(extended).filter(|layout| !layout.mixes_reductions()).collect();
    }
    layouts
}
