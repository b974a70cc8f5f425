//! Options of a session.

use std::sync::Arc;

use shardflow_actors::watchdog::WatchdogOptions;

use super::numerics::OnNonFinite;
use crate::cluster::Cluster;
use crate::declare::Declarations;
use shardflow_job::requests::Requests;

/// How many threads a CPU device uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Threads {
    /// The number in [`crate::passes::CompileOptions::threads_per_device`].
    #[default]
    Planned,
    /// The usable cores of this process, divided equally among all devices that share them. The number is known only
    /// after the rendezvous.
    Owned,
}

/// Which ranks get the outputs of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Outputs {
    /// All ranks.
    #[default]
    AllRanks,
    /// Only rank 0. Other ranks get only the loss and the gradient norm.
    FirstRank,
}

/// Options of a session.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Seed of initial weights and dropout masks.
    pub seed: u64,
    /// When and how a stall is reported.
    pub watchdog: WatchdogOptions,
    /// The processes that run the plan together.
    pub cluster: Cluster,
    /// Requests to this process, such as signals. All processes get them in [`super::StepReport`], after the same step.
    pub requests: Option<Arc<Requests>>,
    /// How a non-finite step is handled, see [`super::numerics`].
    pub on_non_finite: OnNonFinite,
    /// Threads of each CPU device; results do not depend on this number.
    pub threads: Threads,
    /// Bytes that this process allocates besides the plan and the snapshots of checkpoints, for instance for a copy of
    /// the parameters. These bytes count against the free memory of the node.
    pub extra_bytes: u64,
    /// Peak floating-point operations per second of one device, for [`crate::metrics::MFU`].
    pub peak_flops: Option<f64>,
    /// Total number of steps that the program plans. The live page uses it to estimate the end time.
    pub steps_planned: Option<u64>,
    /// Which ranks get the outputs of a step. All ranks must have the same value.
    pub outputs: Outputs,
    /// Whether the session publishes to the `metrics` facade; enable it for one session per process.
    pub publishes_metrics: bool,
    /// Values that must be equal on all ranks. Checkpoints record them, and a resume compares them.
    pub declared: Declarations,
    /// Names of parameters that a file may have although the program lacks them. Any other extra parameter is an error.
    pub ignoring: Vec<String>,
}

impl Default for SessionOptions {
    fn default() -> Self {
        let (watchdog, cluster) = (WatchdogOptions::default(), Cluster::local());
        Self {
            seed: 1337,
            watchdog,
            cluster,
            requests: None,
            on_non_finite: OnNonFinite::default(),
            threads: Threads::default(),
            extra_bytes: 0,
            peak_flops: None,
            steps_planned: None,
            outputs: Outputs::default(),
            publishes_metrics: true,
            declared: Declarations::default(),
            ignoring: Vec::new(),
        }
    }
}
