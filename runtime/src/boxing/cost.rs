//! The cost of a step: latency for each round of messages, and time for each byte that the busiest device receives.

use super::step::StepKind;

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
    /// Costs for one machine: 5 us and 10 GB/s within a placement, 10 us and 5 GB/s between placements. Only the ratios
    /// of these costs affect the choice of a plan.
    fn default() -> Self {
        Self {
            within: LinkCost { alpha_seconds: 5e-6, seconds_per_byte: 1e-10 },
            across: LinkCost { alpha_seconds: 1e-5, seconds_per_byte: 2e-10 },
        }
    }
}

impl CostModel {
    /// Duration in seconds of a step in which the busiest device receives `bytes` bytes.
    pub(super) fn seconds(&self, kind: StepKind, bytes: usize) -> f64 {
        // If all devices already have their parts, a transfer sends nothing.
        if bytes == 0 && kind == StepKind::Transfer {
            return 0.0;
        }
        let link = if kind == StepKind::Transfer { self.across } else { self.within };
        link.alpha_seconds * kind.rounds() as f64 + link.seconds_per_byte * bytes as f64
    }
}
