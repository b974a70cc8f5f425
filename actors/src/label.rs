//! Labels that describe actions. Traces, metrics, reports and schedules read them; the protocol does not.

use std::fmt;
use std::sync::Arc;

/// What the nodes of a segment do in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Computes activations, once per micro-batch.
    #[default]
    Forward,
    /// Computes gradients, once per micro-batch.
    Backward,
    /// Converts gradients to parameter layouts and computes the gradient norm, once per step after all micro-batches.
    Norm,
    /// Updates parameters, once per step after the host's decision.
    Update,
    /// Moves tensors between devices. Runs on its own stream, not on the stream of the layers.
    Communication,
    /// Exchanges tensors with the host.
    Host,
}

impl Role {
    /// Returns the role's name in traces, plans and errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Norm => "norm",
            Self::Update => "update",
            Self::Communication => "communication",
            Self::Host => "host",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Describes the segment that an action runs, for reports and schedules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Label {
    /// What the segment does.
    pub role: Role,
    /// Index of the segment among the segments of this role on its device, in program order.
    pub chunk: u16,
    /// The program that contains the segment, such as `train`.
    pub program: Arc<str>,
}
