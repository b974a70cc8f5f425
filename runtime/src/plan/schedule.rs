//! A schedule is a pure function from the work of a step to one ordered list for each compute actor. Each named
//! schedule is one file with priorities and limits. [`list`] simulates the step with these and records the order.

use std::fmt;

use list::StepPlan;
use work::WorkGraph;

mod gpipe;
pub mod list;
mod one_f_one_b;
pub mod work;

/// The order of the micro-batches in a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Schedule {
    /// All forwards, then all backwards: Huang et al. 2018, <https://arxiv.org/abs/1811.06965>.
    #[cfg_attr(feature = "cli", value(name = "gpipe"))]
    GPipe,
    /// One forward, one backward: Narayanan et al. 2019, <https://arxiv.org/abs/1806.03377>.
    #[cfg_attr(feature = "cli", value(name = "1f1b"))]
    OneFOneB,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GPipe => "gpipe",
            Self::OneFOneB => "1f1b",
        })
    }
}

impl Schedule {
    /// Plans a step. If `saves_memory` is set, the plan keeps as few micro-batches in flight as the schedule allows,
    /// even if stages then wait for messages.
    pub fn plan(self, work: &WorkGraph, saves_memory: bool) -> StepPlan {
        let rules = match self {
            Self::GPipe => gpipe::rules(work),
            Self::OneFOneB => one_f_one_b::rules(work, saves_memory),
        };
        list::play(work, rules)
    }
}

#[cfg(test)]
mod tests;
