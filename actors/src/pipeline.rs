//! Plans of plain pipelines for the study of schedules: `p` stages, `m` micro-batches, forward and backward.

use crate::builder::Builder;
use crate::spec::{ActionRef, Firing, Spec};

/// Whether forward or backward fires first when both are ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PipelineSchedule {
    /// All forwards run before any backward. Huang et al. 2019, <https://arxiv.org/abs/1811.06965>.
    Gpipe,
    /// Forwards and backwards alternate. Narayanan et al. 2019 (PipeDream), 2021, <https://arxiv.org/abs/2104.04473>.
    OneForwardOneBackward,
}

/// A pipeline of `credits.len()` stages.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// Number of micro-batches in a step.
    pub micro_batches: u32,
    /// Stash slots by stage: the maximum number of micro-batches that are between their forward and their backward.
    pub credits: Vec<u32>,
    /// The schedule.
    pub schedule: PipelineSchedule,
    /// True if the stages fire by a precomputed list, false if they fire by credit.
    pub ordered: bool,
}

impl Pipeline {
    /// Builds the plan: actor `s` is stage `s`, on device `s`, with actions `forward` (0) and `backward` (1).
    pub fn build(&self) -> Spec {
        let (m, p) = (self.micro_batches, self.credits.len());
        let mut b = Builder::new();
        let mut stages: Vec<(ActionRef, ActionRef)> = Vec::new();
        for (s, &credits) in self.credits.iter().enumerate() {
            let actor = b.actor(format!("stage{s}.compute"), s, self.firing(credits));
            let (forward, backward) = (b.action(actor, "forward", m), b.action(actor, "backward", m));
            b.action_mut(forward).external = s == 0;
            let first = if self.schedule == PipelineSchedule::Gpipe { forward } else { backward };
            b.action_mut(first).priority = -1;
            b.edge(format!("stage{s}.stash"), credits, forward, backward);
            stages.push((forward, backward));
        }
        for s in 0..p.saturating_sub(1) {
            let (here, next) = (stages[s], stages[s + 1]);
            // Each of these registers has as many slots as the earlier stage's stash, so it never delays a firing: a
            // micro-batch in one of its slots also holds a stash slot until the earlier stage's backward has ended. The
            // release of the register slot arrives before the stash slot's next micro-batch needs a register slot.
            let slots = self.credits[s];
            b.edge(format!("stage{s}.activation"), slots, here.0, next.0);
            b.edge(format!("stage{}.gradient", s + 1), slots, next.1, here.1);
        }
        b.build()
    }

    /// Returns the firing rule. A list has `warm_up` forwards, then alternating backwards and forwards, then backwards.
    fn firing(&self, credits: u32) -> Firing {
        if !self.ordered {
            return Firing::Credit;
        }
        let warm_up = match self.schedule {
            PipelineSchedule::Gpipe => self.micro_batches,
            PipelineSchedule::OneForwardOneBackward => credits.min(self.micro_batches),
        };
        let mut list = vec![0; warm_up as usize];
        list.extend([1, 0].repeat((self.micro_batches - warm_up) as usize));
        list.resize(2 * self.micro_batches as usize, 1);
        Firing::Ordered(list)
    }
}
