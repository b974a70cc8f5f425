//! How processes agree on a checkpoint: each reports its result, process 0 commits, and all receive the outcome.

use serde::{Deserialize, Serialize};

use super::error::AgreeError;

/// Rank of a process, world size, and incarnation of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessRank {
    /// Rank of this process.
    pub process: u32,
    /// Number of processes.
    pub processes: u32,
    /// Number of the incarnation; it increases with every restart.
    pub epoch: u64,
}

impl ProcessRank {
    /// The rank in a single-process job.
    pub const ALONE: Self = Self { process: 0, processes: 1, epoch: 0 };
}

/// Identifies one attempt to save. All processes use the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SaveId {
    /// Incarnation of the job.
    pub epoch: u64,
    /// Number of completed steps.
    pub step: u64,
    /// Index of the save within this incarnation, from 0.
    pub attempt: u32,
}

/// Outcome of a successful save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveOutcome {
    /// The checkpoint was committed.
    Committed,
    /// The step already had a checkpoint, which is unchanged.
    AlreadyThere,
}

/// How the processes of a job agree on saves. For each save, in order, the saver's thread calls
/// [`SaveAgreement::all_written`] and, if this call succeeds, [`SaveAgreement::outcome`]. Each call may wait for other
/// processes, but must return in a limited time.
pub trait SaveAgreement: Send + Sync {
    /// Reports whether this process has written its shard. Returns when all processes have reported.
    ///
    /// # Errors
    /// If a process could not write, ended, or did not report in time. All processes get an error with that rank.
    fn all_written(&self, save: SaveId, own: Result<(), String>) -> Result<(), AgreeError>;

    /// Process 0 passes the result of its commit (`Some`). The other processes pass `None` and wait for that result.
    ///
    /// # Errors
    /// If process 0 could not commit, ended, or did not report in time. All processes get the error.
    fn outcome(&self, save: SaveId, decided: Option<Result<SaveOutcome, String>>) -> Result<SaveOutcome, AgreeError>;
}

/// The agreement in a single-process job.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleProcess;

impl SaveAgreement for SingleProcess {
    fn all_written(&self, _save: SaveId, own: Result<(), String>) -> Result<(), AgreeError> {
        own.map_err(|why| AgreeError { process: Some(0), why })
    }

    fn outcome(&self, _save: SaveId, decided: Option<Result<SaveOutcome, String>>) -> Result<SaveOutcome, AgreeError> {
        let missing = || Err("process 0 reported no outcome".to_string());
        decided.unwrap_or_else(missing).map_err(|why| AgreeError { process: Some(0), why })
    }
}
