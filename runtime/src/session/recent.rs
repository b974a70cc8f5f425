//! Statistics of a session's most recent steps.

use std::collections::VecDeque;
use std::time::Duration;

use super::report::StepReport;

/// Number of recent steps that are kept, and number of the newest steps whose durations determine the quantiles.
const STEPS_KEPT: usize = 512;
const STEPS_TIMED: usize = 128;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecentSteps {
    /// Number of tokens per step.
    pub tokens: u64,
    /// Total number of steps that the program plans, if it has set one.
    pub planned: Option<u64>,
    /// Steps done by this session, without those before a restored checkpoint.
    pub done: u64,
    /// At most 512 steps, the newest last.
    pub steps: VecDeque<StepStats>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepStats {
    /// Steps done, including this one.
    pub steps: u64,
    pub loss: Option<f32>,
    /// Global norm of the step's gradients, before clipping.
    pub gradient_norm: Option<f64>,
    pub learning_rate: f32,
    pub seconds: f64,
}

impl RecentSteps {
    pub fn last(&self) -> Option<&StepStats> {
        self.steps.back()
    }

    /// Quantile of the durations of the newest 128 steps, in seconds.
    pub fn quantile(&self, fraction: f64) -> Option<f64> {
        let mut sorted: Vec<f64> = self.steps.iter().rev().take(STEPS_TIMED).map(|step| step.seconds).collect();
        sorted.sort_by(f64::total_cmp);
        let index = (fraction * sorted.len() as f64).ceil() as usize;
        sorted.get(index.saturating_sub(1)).copied()
    }

    /// Adds a step; `steps` is the number of steps done, including this one. Returns the 99th percentile of durations
    /// only after steps 1, 2, 4, 8 .. and every 64th step, because a quantile needs a sort.
    pub(super) fn record(
        &mut self,
        steps: u64,
        report: &StepReport,
        learning_rate: f32,
        took: Duration,
    ) -> Option<Duration> {
        self.done += 1;
        if self.steps.len() == STEPS_KEPT {
            self.steps.pop_front();
        }
        let (loss, gradient_norm, seconds) = (report.loss, report.grad_norm, took.as_secs_f64());
        self.steps.push_back(StepStats { steps, loss, gradient_norm, learning_rate, seconds });
        let is_due = self.done.is_power_of_two() || self.done.is_multiple_of(STEPS_TIMED as u64 / 2);
        is_due.then(|| Duration::from_secs_f64(self.quantile(0.99).unwrap_or_default()))
    }
}
