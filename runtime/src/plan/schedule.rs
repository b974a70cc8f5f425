//! A schedule is a pure function from the work of a step to one ordered list for each compute actor. A named schedule is
//! one file, which gives priorities and limits; [`list`] plays the step with them and writes down the order.

use std::fmt;

use shardflow_actors::label::Role;

use crate::plan::segments::SegmentId;

mod gpipe;
mod list;
mod one_f_one_b;
pub(crate) mod work;

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
    /// Plans a step.
    pub fn plan(self, work: &WorkGraph) -> StepPlan {
        let rules = match self {
            Self::GPipe => gpipe::rules(work),
            Self::OneFOneB => one_f_one_b::rules(work),
        };
        list::play(work, &rules)
    }
}

/// The work of a step on the compute streams.
#[derive(Clone, Debug, Default)]
pub struct WorkGraph {
    /// The compute segments.
    pub work: Vec<Work>,
    /// Number of sites. The devices of a site are in the same placements, so they run the same segments.
    pub sites: usize,
    /// Firings in a step of the work of each micro-batch.
    pub micro_batches: u32,
    /// Ticks from the end of work to the start of work that waits for it on another stream or device.
    pub hop_ticks: u64,
}

/// The work of one compute segment.
#[derive(Clone, Debug)]
pub struct Work {
    /// The segment.
    pub segment: SegmentId,
    /// Its role.
    pub role: Role,
    /// The sites that run it.
    pub sites: Vec<usize>,
    /// Firings in a step: 1, or one for each micro-batch.
    pub firings: u32,
    /// Duration of a firing.
    pub ticks: u64,
    /// The work that it waits for: index, and whether a hop lies between.
    pub needs: Vec<(usize, bool)>,
    /// The backward work on the same sites that reads what this leaves for it.
    pub closed_by: Vec<usize>,
}

/// What a named schedule says about each [`Work`], by index.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Of the work that is ready, the lowest value runs first; ties go to the work that the program makes last, which
    /// finishes micro-batches.
    pub priorities: Vec<i32>,
    /// Maximum number of micro-batches that have begun and are not closed.
    pub in_flight_max: Vec<u32>,
}

/// One firing of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Index of the work.
    pub work: usize,
    /// The micro-batch; 0 for work of the whole step.
    pub iteration: u32,
}

/// The order of a step, and when each firing runs.
#[derive(Clone, Debug, Default)]
pub struct StepPlan {
    /// By site, in order.
    pub lists: Vec<Vec<Entry>>,
    /// By work and iteration: start and end in ticks.
    pub times: Vec<Vec<(u64, u64)>>,
    /// By work: maximum number of micro-batches in flight.
    pub in_flight: Vec<u32>,
    /// The schedule's priorities, by work.
    pub priorities: Vec<i32>,
}

#[cfg(test)]
mod tests;
