//! A schedule is a pure function from the work of a step to one ordered list for each compute actor. A named schedule
//! gives priorities and limits. [`list`] simulates the step with these and records the order.

use std::fmt;

use list::{Rules, StepPlan};
use shardflow_actors::label::Role;
use work::WorkGraph;

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
        let (order, in_flight_max) = match self {
            Self::GPipe => ([Role::Forward, Role::Backward], vec![u32::MAX; work.work.len()]),
            Self::OneFOneB => ([Role::Backward, Role::Forward], one_f_one_b::in_flight_max(work, saves_memory)),
        };
        let priority = |role: Role| order.iter().position(|other| *other == role).unwrap_or(order.len()) as i32;
        let priorities = work.work.iter().map(|work| priority(work.role)).collect();
        list::play(work, Rules { priorities, in_flight_max })
    }
}

#[cfg(test)]
mod tests;
