//! Boxing: changes a tensor's layout or placement by the cheapest sequence of collectives.
//! The same planner serves cost estimates, the choice of layouts and execution.
//!
//! The states of the search are layouts on the source and target placements; the edges are the steps of [`step`]. A
//! step costs `alpha` for each round of messages and `beta` for each byte that the busiest device receives. Dijkstra's
//! algorithm (1959) finds the cheapest path; ties go to fewer steps, then to the layout that is listed first.

#[cfg(test)]
pub(crate) mod interpret;
pub mod step;
pub(crate) mod table;

use std::collections::BTreeMap;
use std::fmt;

use shardflow_kernels::tensor::{DType, Region};

use crate::layout_error::LayoutError;
use crate::placement::Placement;
use crate::sbp::region::contains;
use crate::sbp::{NdSbp, PlacedLayout, Sbp, local_region};
use step::{BoxingStep, StepKind, bytes_pulled, bytes_received, classify};

/// The cost of messages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkCost {
    /// Latency of one round of messages (alpha).
    pub alpha_seconds: f64,
    /// Inverse of the receive bandwidth of one device (beta).
    pub seconds_per_byte: f64,
}

/// The cost of collectives, measured or assumed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CostModel {
    /// Messages within a placement.
    pub within: LinkCost,
    /// Messages between placements.
    pub across: LinkCost,
}

impl Default for CostModel {
    /// For one machine: 5 us and 10 GB/s within a placement, 10 us and 5 GB/s between. Only ratios affect the choice.
    fn default() -> Self {
        Self {
            within: LinkCost { alpha_seconds: 5e-6, seconds_per_byte: 1e-10 },
            across: LinkCost { alpha_seconds: 1e-5, seconds_per_byte: 2e-10 },
        }
    }
}

impl CostModel {
    fn seconds(&self, kind: StepKind, bytes_received: &[usize]) -> f64 {
        let bytes = bytes_received.iter().max().copied().unwrap_or(0);
        // If all devices already have their parts, a transfer sends nothing.
        if bytes == 0 && kind == StepKind::Transfer {
            return 0.0;
        }
        let link = if kind == StepKind::Transfer { self.across } else { self.within };
        link.alpha_seconds * kind.rounds() as f64 + link.seconds_per_byte * bytes as f64
    }
}

/// A sequence of steps that changes a layout.
#[derive(Clone, Debug, PartialEq)]
pub struct BoxingPlan {
    /// The steps in order; each starts from the previous step's target layout. Empty if nothing changes.
    pub steps: Vec<BoxingStep>,
    /// The sum over the steps.
    pub cost_seconds: f64,
    /// Bytes that each device of both placements receives from others, by rank.
    pub bytes_received: BTreeMap<usize, usize>,
}

impl fmt::Display for BoxingPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps: Vec<String> = self.steps.iter().map(BoxingStep::to_string).collect();
        f.write_str(&steps.join("; "))
    }
}

/// Finds the cheapest layout change for a tensor of this shape. A pure function of its arguments.
///
/// # Errors
/// When a layout does not fit its placement or the shape, or is `Partial` for an integer tensor.
pub fn plan(
    shape: &[usize],
    dtype: DType,
    from: &PlacedLayout,
    to: &PlacedLayout,
    model: &CostModel,
) -> Result<BoxingPlan, LayoutError> {
    from.sbp.check(shape, &from.placement)?;
    to.sbp.check(shape, &to.placement)?;
    let error = |why: &str| LayoutError::NoBoxing {
        from: from.to_string(),
        to: to.to_string(),
        dtype: format!("{dtype:?}"),
        shape: shape.to_vec(),
        why: why.into(),
    };
    if dtype == DType::I32 && (from.sbp.partial().is_some() || to.sbp.partial().is_some()) {
        return Err(error("integer tensors cannot be partial"));
    }
    let space = SearchSpace::new(shape, dtype, from, to, model, layouts_between);
    let path = space.cheapest_path().ok_or_else(|| error("no sequence of collectives makes this change"))?;
    let steps: Vec<BoxingStep> = path.windows(2).filter_map(|pair| space.step(pair[0], pair[1])).collect();
    let devices = from.placement.devices().iter().chain(to.placement.devices());
    let mut bytes: BTreeMap<usize, usize> = devices.map(|&d| (d, 0)).collect();
    for step in &steps {
        for (&device, &received) in step.to.placement.devices().iter().zip(&step.bytes_received) {
            *bytes.entry(device).or_default() += received;
        }
    }
    let cost_seconds = steps.iter().map(|s| s.cost_seconds).sum();
    Ok(BoxingPlan { steps, cost_seconds, bytes_received: bytes })
}

/// A layout on the source placement (side 0) or the target placement (side 1).
struct State {
    side: usize,
    sbp: NdSbp,
    regions: Vec<Region>,
}

struct SearchSpace<'a> {
    shape: &'a [usize],
    dtype: DType,
    /// One placement if source and target are the same, otherwise two.
    placements: Vec<&'a Placement>,
    /// For each placement and each set of its axes (as a bit mask): the groups along them.
    groups: Vec<Vec<Vec<Vec<usize>>>>,
    /// Each target device's index in the source placement, if it is in both.
    own_index: Vec<Option<usize>>,
    model: &'a CostModel,
    states: Vec<State>,
    source: usize,
    target: usize,
}

struct Edge {
    kind: StepKind,
    axes: Vec<usize>,
    bytes_received: Vec<usize>,
    cost_seconds: f64,
}

impl<'a> SearchSpace<'a> {
    /// `layouts` lists the layouts that a path may contain on a placement, given its end layouts there.
    fn new(
        shape: &'a [usize],
        dtype: DType,
        from: &'a PlacedLayout,
        to: &'a PlacedLayout,
        model: &'a CostModel,
        layouts: fn(&[usize], &Placement, &[&NdSbp]) -> Vec<NdSbp>,
    ) -> Self {
        let same_placement = from.placement == to.placement;
        let placements = if same_placement { vec![&from.placement] } else { vec![&from.placement, &to.placement] };
        let mut states = Vec::new();
        for (side, &placement) in placements.iter().enumerate() {
            let ends = if same_placement { vec![&from.sbp, &to.sbp] } else { vec![[&from.sbp, &to.sbp][side]] };
            for sbp in layouts(shape, placement, &ends) {
                let region = |index| local_region(shape, &sbp, placement, index);
                let regions = (0..placement.device_count()).map(region).collect();
                states.push(State { side, sbp, regions });
            }
        }
        let find =
            |side: usize, sbp: &NdSbp| states.iter().position(|s| s.side == side && s.sbp == *sbp).unwrap_or_default();
        let (source, target) = (find(0, &from.sbp), find(placements.len() - 1, &to.sbp));
        let subset = |set: usize| (0..usize::BITS as usize).filter(|a| set >> a & 1 == 1).collect::<Vec<_>>();
        let groups_of = |placement: &&Placement| {
            (0..1 << placement.axes().len()).map(|set| placement.group_indices(&subset(set))).collect()
        };
        let groups = placements.iter().map(groups_of).collect();
        let own_index = to.placement.devices().iter().map(|&device| from.placement.index_of(device)).collect();
        Self { shape, dtype, placements, groups, own_index, model, states, source, target }
    }

    /// The step from one state to another, if a single step makes the change for `limit_seconds` or less.
    fn edge(&self, from: usize, to: usize, limit_seconds: f64) -> Option<Edge> {
        let (a, b) = (&self.states[from], &self.states[to]);
        let placement = self.placements[a.side];
        let (kind, axes, bytes_received) = if a.side == b.side {
            let (mut kind, axes) = classify(placement, &a.sbp, &b.sbp)?;
            // With small shapes, every device may already have its target region.
            let is_move = matches!(kind, StepKind::AllGather | StepKind::AllToAll);
            if is_move && a.regions.iter().zip(&b.regions).all(|(before, after)| contains(before, after)) {
                kind = StepKind::Slice;
            }
            if self.model.seconds(kind, &[]) > limit_seconds {
                return None;
            }
            let groups = &self.groups[a.side][axes.iter().fold(0, |set, axis| set | 1 << axis)];
            let bytes = bytes_received(kind, self.dtype, groups, &a.regions, &b.regions);
            (kind, axes, bytes)
        } else {
            if a.side > b.side || a.sbp.partial().is_some() || b.sbp.partial().is_some() {
                return None;
            }
            let bytes = bytes_pulled(self.dtype, &self.own_index, &a.regions, &b.regions);
            (StepKind::Transfer, Vec::new(), bytes)
        };
        let cost_seconds = self.model.seconds(kind, &bytes_received);
        Some(Edge { kind, axes, bytes_received, cost_seconds })
    }

    fn step(&self, from: usize, to: usize) -> Option<BoxingStep> {
        let Edge { kind, axes, bytes_received, cost_seconds } = self.edge(from, to, f64::INFINITY)?;
        let [from, to] = [from, to].map(|state| {
            let State { side, sbp, .. } = &self.states[state];
            PlacedLayout { placement: self.placements[*side].clone(), sbp: sbp.clone() }
        });
        Some(BoxingStep { kind, shape: self.shape.to_vec(), from, to, axes, bytes_received, cost_seconds })
    }

    /// The states from source to target, both included.
    fn cheapest_path(&self) -> Option<Vec<usize>> {
        let count = self.states.len();
        // By state: cost and number of steps so far, and the previous state.
        let mut best: Vec<Option<(f64, usize, usize)>> = vec![None; count];
        let mut done = vec![false; count];
        best[self.source] = Some((0.0, 0, self.source));
        while !done[self.target] {
            let open = (0..count).filter(|&s| !done[s]).filter_map(|s| best[s].map(|b| (b.0, b.1, s)));
            let (cost, steps, state) = open.min_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))))?;
            done[state] = true;
            // The target first: its cost bounds the other edges.
            for next in std::iter::once(self.target).chain(0..count).filter(|&s| !done[s]) {
                // An edge that costs more than a known path need not be evaluated.
                let limit = best[self.target].map_or(f64::INFINITY, |b| b.0 - cost);
                let Some(edge) = self.edge(state, next, limit) else { continue };
                let reached = (cost + edge.cost_seconds, steps + 1, state);
                let is_better = |b: (f64, usize, usize)| reached.0.total_cmp(&b.0).then(reached.1.cmp(&b.1)).is_lt();
                if best[next].is_none_or(is_better) {
                    best[next] = Some(reached);
                }
            }
        }
        let mut path = vec![self.target];
        while path[path.len() - 1] != self.source {
            path.push(best[path[path.len() - 1]]?.2);
        }
        path.reverse();
        Some(path)
    }
}

/// The layouts that a path may contain on this placement; `ends` are its end layouts there. An axis may be `Partial`
/// only if it is in one of the ends, because any other partial terms would have to be reduced again.
fn layouts_between(shape: &[usize], placement: &Placement, ends: &[&NdSbp]) -> Vec<NdSbp> {
    let entries = |axis: usize| {
        let mut entries = vec![Sbp::Broadcast];
        entries.extend((0..shape.len()).map(Sbp::Split));
        entries.extend(ends.iter().map(|end| end.0[axis]).filter(|s| s.is_partial()));
        entries.dedup();
        entries
    };
    combinations((0..placement.axes().len()).map(entries))
}

/// All layouts with one of the entries of each axis, except those that mix reductions.
fn combinations(axes: impl Iterator<Item = Vec<Sbp>>) -> Vec<NdSbp> {
    let mut layouts = vec![NdSbp(Vec::new())];
    for entries in axes {
        let extended = |layout: &NdSbp, entry: &Sbp| NdSbp(layout.0.iter().copied().chain([*entry]).collect());
        let all = layouts.iter().flat_map(|layout| entries.iter().map(move |entry| extended(layout, entry)));
        layouts = all.filter(|layout| !layout.mixes_reductions()).collect();
    }
    layouts
}

#[cfg(test)]
mod tests;
