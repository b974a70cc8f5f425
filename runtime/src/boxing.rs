//! Boxing: changes a tensor's layout or placement by the cheapest sequence of collectives.
//! The same planner serves cost estimates, the choice of layouts and execution.
//!
//! A step costs `alpha` for each round of messages and `beta` for each byte that the busiest device receives. `search`
//! finds the cheapest sequence of steps, the **route**. A route depends on which devices the
//! placements share, not on ranks.

mod cost;
#[cfg(test)]
pub(crate) mod interpret;
mod search;
pub mod step;

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use shardflow_kernels::tensor::DType;

use crate::layout_error::LayoutError;
use crate::placement::Placement;
use crate::sbp::{NdSbp, PlacedLayout};
pub use cost::{CostModel, LinkCost};
use search::{Overlap, Route, RouteStep, SearchSpace, layouts_between};
use step::BoxingStep;

/// A sequence of steps that changes a layout.
#[derive(Clone, Debug, PartialEq)]
pub struct BoxingPlan {
    /// The steps in order; each starts from the previous step's target layout. Empty if nothing changes.
    pub steps: Vec<BoxingStep>,
    /// The sum of the costs of the steps.
    pub cost_seconds: f64,
}

impl BoxingPlan {
    /// Bytes that each device receives from other devices, by rank.
    pub fn bytes_received(&self) -> BTreeMap<usize, usize> {
        let mut bytes = BTreeMap::new();
        for step in &self.steps {
            step.from.placement.devices().iter().for_each(|&device| *bytes.entry(device).or_default() += 0);
            for (index, &device) in step.to.placement.devices().iter().enumerate() {
                *bytes.entry(device).or_default() += step.bytes_received(index);
            }
        }
        bytes
    }
}

impl fmt::Display for BoxingPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps: Vec<String> = self.steps.iter().map(BoxingStep::to_string).collect();
        f.write_str(&steps.join("; "))
    }
}

/// Finds the cheapest layout change for a tensor of this shape. This is a pure function of its arguments. For many
/// changes, use a [`Planner`].
///
/// # Errors
/// Returns an error if a layout does not fit its placement, the shape or the type, or if no steps make the change.
pub fn plan(
    shape: &[usize],
    dtype: DType,
    from: &PlacedLayout,
    to: &PlacedLayout,
    model: &CostModel,
) -> Result<BoxingPlan, LayoutError> {
    Planner::new(*model).plan(shape, dtype, from, to)
}

/// Finds layout changes, and keeps their routes for reuse. A route serves all changes with the same shape, type and
/// layouts, on placements with the same axis sizes and the same overlap, so all layers and stages share one search.
#[derive(Debug, Default)]
pub struct Planner {
    model: CostModel,
    routes: HashMap<RouteKey, Option<Route>>,
    overlaps: HashMap<(Placement, Placement), Overlap>,
    /// Number of edges that the searches have evaluated, as a measure of their work.
    edges_evaluated: usize,
}

/// All values that the route between two layouts depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RouteKey {
    shape: Vec<usize>,
    dtype: DType,
    from: NdSbp,
    to: NdSbp,
    /// Sizes of the axes of both placements.
    sizes: [Vec<usize>; 2],
    overlap: Overlap,
}

impl Planner {
    /// A planner without any routes.
    pub fn new(model: CostModel) -> Self {
        Self { model, ..Self::default() }
    }

    /// Finds the cheapest layout change for a tensor of this shape.
    ///
    /// # Errors
    /// Returns an error if a layout does not fit its placement, the shape or the type, or if no steps make the change.
    pub fn plan(
        &mut self,
        shape: &[usize],
        dtype: DType,
        from: &PlacedLayout,
        to: &PlacedLayout,
    ) -> Result<BoxingPlan, LayoutError> {
        let route = self.route(shape, dtype, from, to)?;
        let step = |step: &RouteStep| {
            let [start, end] = [&step.from, &step.to].map(|state| {
                let placement = [&from.placement, &to.placement][state.side].clone();
                PlacedLayout { placement, sbp: state.sbp.clone() }
            });
            let RouteStep { kind, elements_max, cost_seconds, .. } = *step;
            let (shape, axes) = (shape.to_vec(), step.axes.clone());
            BoxingStep { kind, shape, dtype, from: start, to: end, axes, elements_max, cost_seconds }
        };
        Ok(BoxingPlan { steps: route.iter().map(step).collect(), cost_seconds: cost_seconds(route) })
    }

    /// The cost of the change that [`Planner::plan`] returns, or infinity if [`Planner::plan`] returns an error.
    pub fn seconds(&mut self, shape: &[usize], dtype: DType, from: &PlacedLayout, to: &PlacedLayout) -> f64 {
        self.route(shape, dtype, from, to).map_or(f64::INFINITY, cost_seconds)
    }

    fn route(
        &mut self,
        shape: &[usize],
        dtype: DType,
        from: &PlacedLayout,
        to: &PlacedLayout,
    ) -> Result<&[RouteStep], LayoutError> {
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
        let overlap = self.overlap(&from.placement, &to.placement);
        let sizes = [from, to].map(|layout| layout.placement.axes().iter().map(|axis| axis.size).collect());
        let (from_sbp, to_sbp) = (from.sbp.clone(), to.sbp.clone());
        let key =
            RouteKey { shape: shape.to_vec(), dtype, from: from_sbp, to: to_sbp, sizes, overlap: overlap.clone() };
        let Self { model, routes, edges_evaluated, .. } = self;
        let route = routes.entry(key).or_insert_with(|| {
            let space = SearchSpace::new(shape, dtype, from, to, &overlap, model, layouts_between);
            let route = space.cheapest_route();
            *edges_evaluated += space.edges_evaluated.get();
            route
        });
        route.as_deref().ok_or_else(|| error("no sequence of collectives makes this change"))
    }

    /// Number of edges that the searches have evaluated, as a measure of their work.
    #[cfg(test)]
    pub(crate) fn edges_evaluated(&self) -> usize {
        self.edges_evaluated
    }

    fn overlap(&mut self, from: &Placement, to: &Placement) -> Overlap {
        if from == to {
            return Overlap::Same;
        }
        let new = || Overlap::of(from, to);
        self.overlaps.entry((from.clone(), to.clone())).or_insert_with(new).clone()
    }
}

fn cost_seconds(route: &[RouteStep]) -> f64 {
    route.iter().map(|step| step.cost_seconds).sum()
}

#[cfg(test)]
mod tests;
