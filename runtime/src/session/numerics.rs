//! How a session handles a non-finite step: its loss or gradients are Inf or NaN, or its update could overflow (see
//! [`crate::graph::optimizer`]). The host checks each step before the update (the action `decide` of the plan), so a
//! non-finite step changes no weight. After Inf or NaN, the session repeats the step and checks all launch outputs to
//! find the first non-finite tensor. Weights, batch and masks are unchanged, so the second run has the same bits.
//!
//! To return to older weights, accept the step ([`OnNonFinite::Skip`]) and load a checkpoint with
//! [`super::Session::restore_newest`]. Then continue with other data, because the same batch would fail again.

use std::fmt;

use shardflow_actors::label::Role;

use crate::graph::optimizer::Overflow;
use shardflow_job::text::counted;

/// How a non-finite step (see the module's documentation) is handled. Such a step never updates the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnNonFinite {
    /// [`super::Session::step`] fails with [`super::SessionError::NonFinite`] on all processes. Weights are unchanged.
    #[default]
    Stop,
    /// The step counts as done, and [`super::StepReport::non_finite`] describes it.
    Skip {
        /// Maximum number of consecutive non-finite steps. The next one fails as with `Stop`.
        in_a_row_max: u32,
    },
}

/// Description of a non-finite step; equal on all processes.
#[derive(Clone, Debug, PartialEq)]
pub struct NonFinite {
    /// Number of steps done before this one.
    pub step: u64,
    /// The loss.
    pub loss: Option<f32>,
    /// Global norm of the gradients.
    pub grad_norm: Option<f64>,
    /// The value that could overflow in the update, if loss and gradients are finite; see [`crate::graph::optimizer`].
    pub overflow: Option<Overflow>,
    /// The first non-finite tensor. `None` with an `overflow`, or if the repeat was finite (faulty memory or kernel).
    pub first: Option<FirstNonFinite>,
}

/// The first tensor with Inf or NaN, in the order of the program, in the first micro-batch with such a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstNonFinite {
    /// The tensor's name in the program.
    pub tensor: String,
    /// The operation that computes the tensor, for instance `einsum`, `parameter` or `input`.
    pub op: String,
    /// What the operation does in the step.
    pub role: Role,
    /// The micro-batch; `None` for parameters and for tensors computed once per step.
    pub micro_batch: Option<usize>,
    /// The device.
    pub device: usize,
    /// Number of Inf or NaN elements in the device's part.
    pub elements: u64,
    /// Line of the program that creates the operation.
    pub location: String,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} is not finite", self.step + 1)?;
        self.loss.iter().try_for_each(|loss| write!(f, ", loss {loss}"))?;
        self.grad_norm.iter().try_for_each(|norm| write!(f, ", gradient norm {norm}"))?;
        match (&self.first, self.overflow) {
            (None, Some(overflow)) => {
                let (value, advice) = match overflow {
                    Overflow::Parameter => ("a parameter", "lower the learning rate"),
                    Overflow::FirstMoment => ("a first moment", "clip the gradients to a smaller norm"),
                    Overflow::SecondMoment => ("a second moment", "clip the gradients to a smaller norm"),
                };
                write!(f, "; its update could make {value} overflow f32: {advice}")
            }
            (None, None) => f.write_str("; the repeated step was finite: suspect this machine's memory or a kernel"),
            (Some(first), _) => write!(f, "; the first tensor with Inf or NaN is {first}"),
        }
    }
}

impl fmt::Display for FirstNonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tensor, op, device, elements, location, .. } = self;
        write!(f, "{tensor} ({op}), ")?;
        match (op.as_str(), self.micro_batch, self.role) {
            ("parameter", ..) => {}
            (_, Some(micro_batch), Role::Backward) => write!(f, "backward of micro-batch {micro_batch}, ")?,
            (_, Some(micro_batch), _) => write!(f, "forward of micro-batch {micro_batch}, ")?,
            (_, None, _) => write!(f, "at the end of the step, ")?,
        }
        write!(f, "{} on device {device} ({location})", counted(elements, "element"))
    }
}
