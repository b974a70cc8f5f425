//! The result of a step.

use std::collections::BTreeMap;

use shardflow_kernels::tensor::HostTensor;

use super::numerics::NonFinite;
use crate::graph::optimizer::Overflow;
use shardflow_job::requests::Request;

/// What a step computed, and the request that came with it.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Steps done before this one.
    pub step: u64,
    /// The loss, if the program minimizes one.
    pub loss: Option<f32>,
    /// Global norm of the gradients before clipping, if there are any.
    pub grad_norm: Option<f64>,
    /// The outputs by name, for the whole batch. [`crate::graph::Combine`] describes how the values of micro-batches
    /// are combined. See [`super::SessionOptions::outputs`].
    pub outputs: BTreeMap<String, HostTensor>,
    /// The request that the processes agreed on in this step; equal on all of them. See [`shardflow_job::requests`].
    pub request: Request,
    /// Set after a non-finite step that [`super::SessionOptions::on_non_finite`] accepts; nothing was updated.
    pub non_finite: Option<NonFinite>,
}

impl StepReport {
    pub(super) fn is_finite(&self) -> bool {
        self.loss.is_none_or(f32::is_finite) && self.grad_norm.is_none_or(f64::is_finite)
    }

    /// Describes this step as non-finite, without a search for its first non-finite tensor.
    pub(super) fn overflow(&self, overflow: Option<Overflow>) -> NonFinite {
        NonFinite { step: self.step, loss: self.loss, grad_norm: self.grad_norm, overflow, first: None }
    }
}
