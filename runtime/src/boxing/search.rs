//! Searches for the cheapest sequence of steps. States are layouts on the source and target placements; edges are the
//! steps of [`super::step`]. Dijkstra's algorithm (1959) finds the cheapest path. If costs are equal, fewer steps win,
//! then the layout that is listed first. `docs/adr/0023-boxing-changes-few-axes.md` lists the axes that may change.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};

use shardflow_kernels::tensor::{DType, Region};

use super::cost::CostModel;
use super::step::{StepKind, classify, common, elements_max};
use crate::placement::Placement;
use crate::sbp::{NdSbp, PlacedLayout, Sbp, local_region};

/// Number of axes, or bundles of axes, that a path may change independently of each other.
const FREE_AXES: usize = 2;

/// The steps from one layout to another.
pub(super) type Route = Vec<RouteStep>;

/// A [`super::BoxingStep`] without the shape and the devices.
#[derive(Clone, Debug)]
pub(super) struct RouteStep {
    pub kind: StepKind,
    pub from: State,
    pub to: State,
    pub axes: Vec<usize>,
    pub elements_max: usize,
    pub cost_seconds: f64,
}

/// A layout on the source placement (side 0) or the target placement (side 1).
#[derive(Clone, Debug)]
pub(super) struct State {
    pub side: usize,
    pub sbp: NdSbp,
}

/// The devices that two placements have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Overlap {
    /// The placements are equal.
    Same,
    /// The placements share no device.
    Disjoint,
    /// The placements share some devices. The entry of each target device is its index in the source placement, if the
    /// device is in that placement.
    Some(Vec<Option<usize>>),
}

impl Overlap {
    pub fn of(from: &Placement, to: &Placement) -> Self {
        if from == to {
            return Self::Same;
        }
        let index_of: HashMap<usize, usize> = from.devices().iter().enumerate().map(|(i, &rank)| (rank, i)).collect();
        let own: Vec<Option<usize>> = to.devices().iter().map(|rank| index_of.get(rank).copied()).collect();
        if own.iter().all(Option::is_none) { Self::Disjoint } else { Self::Some(own) }
    }
}

/// The facts that limit which layouts a path may have on one placement.
pub(super) struct Side<'a> {
    pub shape: &'a [usize],
    pub sizes: &'a [usize],
    /// The first and the last layout of the path, without those that are on the other placement.
    pub ends: Vec<&'a NdSbp>,
    /// True if some cheapest path has no layouts other than `ends` on this placement.
    only_ends: bool,
}

pub(super) struct SearchSpace<'a> {
    shape: &'a [usize],
    dtype: DType,
    /// The source and target placements (only one entry if they are equal), with the sizes of their axes.
    placements: Vec<(&'a Placement, Vec<usize>)>,
    overlap: &'a Overlap,
    model: &'a CostModel,
    pub states: Vec<State>,
    pub source: usize,
    pub target: usize,
    pub edges_evaluated: Cell<usize>,
}

pub(super) struct Edge {
    kind: StepKind,
    axes: Vec<usize>,
    elements_max: usize,
    pub cost_seconds: f64,
}

impl<'a> SearchSpace<'a> {
    /// `layouts` lists the layouts that a path may contain on a placement.
    pub fn new(
        shape: &'a [usize],
        dtype: DType,
        from: &'a PlacedLayout,
        to: &'a PlacedLayout,
        overlap: &'a Overlap,
        model: &'a CostModel,
        layouts: fn(&Side<'_>) -> Vec<NdSbp>,
    ) -> Self {
        let is_same = *overlap == Overlap::Same;
        let with_sizes = |placement: &'a Placement| (placement, placement.axes().iter().map(|a| a.size).collect());
        let placements: Vec<(&Placement, Vec<usize>)> = if is_same {
            vec![with_sizes(&from.placement)]
        } else {
            vec![with_sizes(&from.placement), with_sizes(&to.placement)]
        };
        let mut states = Vec::new();
        for (side, (_, sizes)) in placements.iter().enumerate() {
            let ends = if is_same { vec![&from.sbp, &to.sbp] } else { vec![[&from.sbp, &to.sbp][side]] };
            // Without a reduction, one step on a placement delivers only the elements that each device lacks, so no
            // detour is cheaper. A transfer to other devices delivers the same bytes from every source layout, so an
            // earlier change of the layout saves nothing.
            let is_direct = is_same || (side == 0 && *overlap == Overlap::Disjoint);
            let only_ends = is_direct && ends.iter().all(|end| end.partial().is_none());
            let layouts = layouts(&Side { shape, sizes, ends, only_ends });
            states.extend(layouts.into_iter().map(|sbp| State { side, sbp }));
        }
        let find =
            |side: usize, sbp: &NdSbp| states.iter().position(|s| s.side == side && s.sbp == *sbp).unwrap_or_default();
        let (source, target) = (find(0, &from.sbp), find(placements.len() - 1, &to.sbp));
        Self { shape, dtype, placements, overlap, model, states, source, target, edges_evaluated: Cell::new(0) }
    }

    /// The single step from one state to another, if any. May be `None` if the step costs more than `limit_seconds`.
    pub fn edge(&self, from: usize, to: usize, limit_seconds: f64) -> Option<Edge> {
        let (a, b) = (&self.states[from], &self.states[to]);
        let sizes = &self.placements[a.side].1;
        let (kind, axes, elements_max) = if a.side == b.side {
            let (kind, axes) = classify(sizes, &a.sbp, &b.sbp)?;
            if self.model.seconds(kind, 0) > limit_seconds && !is_move(kind) {
                return None;
            }
            let elements_max = elements_max(kind, &axes, self.shape, sizes, [&a.sbp, &b.sbp]);
            // If the tensor is small, every device may already hold its target region; the step then moves nothing.
            let kind = if is_move(kind) && elements_max == 0 { StepKind::Slice } else { kind };
            (kind, axes, elements_max)
        } else {
            let has_terms = a.sbp.partial().is_some() || b.sbp.partial().is_some();
            if a.side > b.side || (has_terms && !self.moves_terms(&a.sbp, &b.sbp)) {
                return None;
            }
            (StepKind::Transfer, Vec::new(), self.elements_pulled_max(&a.sbp, &b.sbp))
        };
        self.edges_evaluated.set(self.edges_evaluated.get() + 1);
        let cost_seconds = self.model.seconds(kind, elements_max * self.dtype.bytes());
        Some(Edge { kind, axes, elements_max, cost_seconds })
    }

    /// Whether a transfer can move terms: each target device reads the term of the source device at its coordinates.
    fn moves_terms(&self, from: &NdSbp, to: &NdSbp) -> bool {
        let sizes = |side: usize| &self.placements[side].1;
        from == to && sizes(0) == sizes(1) && *self.overlap == Overlap::Disjoint
    }

    /// Number of elements that the busiest target device pulls in a transfer.
    fn elements_pulled_max(&self, from: &NdSbp, to: &NdSbp) -> usize {
        let (source, target) = (self.placements[0].0, self.placements[1].0);
        let region = |index| local_region(self.shape, to, target, index);
        match self.overlap {
            Overlap::Some(own) => {
                let held = |index: Option<usize>, region: &Region| {
                    index.map_or(0, |index| common(&local_region(self.shape, from, source, index), region))
                };
                let elements = |(index, own): (usize, &Option<usize>)| {
                    let region = region(index);
                    region.element_count() - held(*own, &region)
                };
                own.iter().enumerate().map(elements).max().unwrap_or(0)
            }
            // The device at index 0 has the largest part of every split.
            _ => region(0).element_count(),
        }
    }

    /// The cheapest steps from source to target.
    pub fn cheapest_route(&self) -> Option<Route> {
        let path = self.cheapest_path()?;
        path.windows(2).map(|pair| self.step(pair[0], pair[1])).collect()
    }

    pub fn step(&self, from: usize, to: usize) -> Option<RouteStep> {
        let Edge { kind, axes, elements_max, cost_seconds } = self.edge(from, to, f64::INFINITY)?;
        let [from, to] = [from, to].map(|state| self.states[state].clone());
        Some(RouteStep { kind, from, to, axes, elements_max, cost_seconds })
    }

    /// The states of the cheapest path, including source and target.
    fn cheapest_path(&self) -> Option<Vec<usize>> {
        let count = self.states.len();
        // For each state: cost and number of steps so far, and the previous state.
        let mut best: Vec<Option<(f64, usize, usize)>> = vec![None; count];
        let mut done = vec![false; count];
        best[self.source] = Some((0.0, 0, self.source));
        while !done[self.target] {
            let open = (0..count).filter(|&s| !done[s]).filter_map(|s| best[s].map(|b| (b.0, b.1, s)));
            let (cost, steps, state) = open.min_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))))?;
            done[state] = true;
            // The target comes first, because its cost bounds the other edges.
            let others = (0..count).filter(|&s| s != self.target && !done[s]);
            for next in std::iter::once(self.target).filter(|&s| !done[s]).chain(others.collect::<Vec<_>>()) {
                // An edge that costs more than a known path need not be evaluated.
                let known = [self.target, next].map(|s| best[s].map_or(f64::INFINITY, |b| b.0 - cost));
                let limit = known[0].min(known[1]);
                if limit < 0.0 {
                    continue;
                }
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
fn is_move(kind: StepKind) -> bool {
    matches!(kind, StepKind::AllGather | StepKind::AllToAll)
}

/// The layouts that a path may contain on a placement.
pub(super) fn layouts_between(side: &Side<'_>) -> Vec<NdSbp> {
    let wide = side.sizes.iter().filter(|size| **size > 1).count();
    let mut layouts = match side.ends[..] {
        _ if side.only_ends => side.ends.iter().map(|end| (*end).clone()).collect(),
        _ if wide <= FREE_AXES => all_between(side),
        [from, to] => bundled(side).into_iter().chain(mixtures(from, to)).collect(),
        _ => bundled(side),
    };
    let mut seen = HashSet::new();
    layouts.retain(|layout| !layout.mixes_reductions() && seen.insert(layout.clone()));
    layouts
}

/// The target, the target after its reduction, and mixtures of source and target. In a mixture, either only the axes
/// that are `Partial` at one end have changed, or only the other axes.
fn mixtures(from: &NdSbp, to: &NdSbp) -> Vec<NdSbp> {
    let mixed = |entry: fn(Sbp, Sbp) -> Sbp| NdSbp(from.0.iter().zip(&to.0).map(|(a, b)| entry(*a, *b)).collect());
    vec![
        to.clone(),
        to.reduced(),
        mixed(|from, to| if from.is_partial() { from } else { to }),
        mixed(|from, to| if from.is_partial() { to } else { from }),
        mixed(|from, to| if to.is_partial() { from } else { to }),
        mixed(|from, to| if to.is_partial() { to } else { from }),
    ]
}

/// All layouts in which an axis is `Partial` only if it is `Partial` in the first or the last layout. Any other
/// `Partial` axis would need an additional reduction.
fn all_between(side: &Side<'_>) -> Vec<NdSbp> {
    let entries = |axis: usize| {
        let mut entries = vec![Sbp::Broadcast];
        // Along an axis of size 1, all entries are equivalent.
        if side.sizes[axis] > 1 {
            entries.extend((0..side.shape.len()).map(Sbp::Split));
        }
        for end in side.ends.iter().map(|end| end.0[axis]) {
            if !entries.contains(&end) {
                entries.push(end);
            }
        }
        entries
    };
    combinations((0..side.sizes.len()).map(entries))
}

/// The layouts in which only bundles change. A bundle consists of all axes with the same entry in `side.ends[0]`. At
/// most [`FREE_AXES`] bundles change: first the `Partial` bundle, then the `Broadcast` bundle, then the splits.
fn bundled(side: &Side<'_>) -> Vec<NdSbp> {
    let end = side.ends[0];
    let entries = end.0.iter().zip(side.sizes).filter(|(entry, size)| **size > 1 || entry.is_partial());
    let mut bundles: Vec<Sbp> = entries.map(|(entry, _)| *entry).collect();
    bundles.sort_by_key(|entry| match entry {
        Sbp::Partial(_) => 0,
        Sbp::Broadcast => 1,
        Sbp::Split(dim) => 2 + dim,
    });
    bundles.dedup();
    bundles.truncate(FREE_AXES);
    let entries = |bundle: &Sbp| {
        let mut entries = vec![Sbp::Broadcast];
        entries.extend((0..side.shape.len()).map(Sbp::Split));
        entries.extend(Some(*bundle).filter(|bundle| bundle.is_partial()));
        entries
    };
    let of_axes = |layout: NdSbp| {
        let of_axis = |entry: &Sbp| bundles.iter().position(|bundle| bundle == entry).map_or(*entry, |b| layout.0[b]);
        NdSbp(end.0.iter().map(of_axis).collect())
    };
    combinations(bundles.iter().map(entries)).into_iter().map(of_axes).collect()
}

/// All layouts that take one of the given entries for each axis, except those that mix reductions.
pub(super) fn combinations(axes: impl Iterator<Item = Vec<Sbp>>) -> Vec<NdSbp> {
    let mut layouts = vec![NdSbp(Vec::new())];
    for entries in axes {
        let extended = |layout: &NdSbp, entry: &Sbp| NdSbp(layout.0.iter().copied().chain([*entry]).collect());
        let all = layouts.iter().flat_map(|layout| entries.iter().map(move |entry| extended(layout, entry)));
        layouts = all.filter(|layout| !layout.mixes_reductions()).collect();
    }
    layouts
}
