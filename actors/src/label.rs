//! What an action does, for people and schedules: traces, metrics and reports read it; the protocol does not.

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
    /// Gives gradients their parameters' layouts and computes their norm, once per step after all micro-batches.
    Norm,
    /// Updates parameters, once per step after the host has decided.
    Update,
    /// Moves tensors between devices, on a stream other than that of the layers.
    Communication,
    /// Exchanges tensors with the host.
    Host,
}

impl Role {
    /// The name in traces, plans and errors.
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

/// The segment that an action runs, as people know it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Label {
    /// What it does.
    pub role: Role,
    /// Its number among the segments of this role on its device, in the order of the program.
    pub chunk: u16,
    /// The program that it belongs to, such as `train`.
    pub program: Arc<str>,
}
