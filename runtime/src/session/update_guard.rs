//! Decides after each step whether the update may be applied: tracks bounds of parameters and moments, and counts steps
//! without an update.

use shardflow_kernels::tensor::HostTensor;

use super::error::SessionError;
use super::numerics::{NonFinite, OnNonFinite};
use super::report::StepReport;
use crate::graph::Graph;
use crate::graph::builder::STATE_PREFIX;
use crate::graph::optimizer::Bounds;

#[derive(Debug)]
pub(super) struct UpdateGuard {
    pub(super) on_non_finite: OnNonFinite,
    pub(super) skipped_in_a_row: u32,
    /// Bounds of parameters and moments; equal on all processes.
    pub(super) bounds: Bounds,
}

impl UpdateGuard {
    /// Bounds after the update of this step; default bounds for a program without an objective.
    pub(super) fn bounds_after(&self, graph: &Graph, report: &StepReport, learning_rate: f32) -> Bounds {
        match (graph.objective, report.grad_norm) {
            (Some(objective), Some(norm)) => objective.optimizer.bounds_after(self.bounds, norm, learning_rate),
            _ => Bounds::default(),
        }
    }

    /// Raises the bound of parameters or of a moment to the largest absolute value in a newly written part of the
    /// tensor `name`.
    pub(super) fn raise_bound(&mut self, name: &str, part: &HostTensor) {
        let largest = part.as_f32().unwrap_or_default().iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let bound = match name.strip_prefix(STATE_PREFIX).and_then(|name| name.split_once('/')) {
            None => &mut self.bounds.parameter,
            Some(("m", _)) => &mut self.bounds.first,
            Some(_) => &mut self.bounds.second,
        };
        *bound = bound.max(f64::from(largest));
    }

    /// Counts a step without an update. Accepts it, or returns an error, as [`OnNonFinite`] requires.
    pub(super) fn accept(&mut self, found: &NonFinite) -> Result<(), SessionError> {
        self.skipped_in_a_row += 1;
        match self.on_non_finite {
            OnNonFinite::Skip { in_a_row_max } if self.skipped_in_a_row <= in_a_row_max => Ok(()),
            _ => Err(SessionError::NonFinite(Box::new(found.clone()))),
        }
    }
}
