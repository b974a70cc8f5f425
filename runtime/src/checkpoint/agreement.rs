//! How processes agree that a checkpoint is complete: each says how it went, process 0 commits, all learn the outcome.

use super::error::AgreeError;

/// Which process of how many, and in which incarnation of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessRank {
    /// Rank of this process.
    pub process: u32,
    /// How many there are.
    pub processes: u32,
    /// Number of the incarnation: it grows with every restart.
    pub epoch: u64,
}

impl ProcessRank {
    /// The only process.
    pub const ALONE: Self = Self { process: 0, processes: 1, epoch: 0 };
}

/// One attempt to save: the same on all processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SaveId {
    /// Incarnation of the job.
    pub epoch: u64,
    /// Steps done.
    pub step: u64,
    /// Which of this incarnation's saves it is, from 0.
    pub attempt: u32,
}

/// What became of a save that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveOutcome {
    /// It was committed.
    Committed,
    /// The step had a checkpoint already, which stays as it is.
    AlreadyThere,
}

/// The agreement of the processes of a job. Calls come from the saver's thread, never from a step, in the order of the
/// saves; for each save [`SaveAgreement::all_written`], then [`SaveAgreement::outcome`], but no `outcome` after an error. Each call may
/// wait for the other processes, and must come back within a deadline of its own.
pub trait SaveAgreement: Send + Sync {
    /// Says whether this process's shard is written. Comes back when all have said so.
    ///
    /// # Errors
    /// On every process, when one could not write, is gone, or did not say in time; it is named.
    fn all_written(&self, save: SaveId, mine: Result<(), String>) -> Result<(), AgreeError>;

    /// Process 0 says (`Some`) what became of the commit, the others (`None`) wait for it.
    ///
    /// # Errors
    /// On every process, when process 0 could not commit, is gone, or did not say in time.
    fn outcome(&self, save: SaveId, decided: Option<Result<SaveOutcome, String>>) -> Result<SaveOutcome, AgreeError>;
}

/// The agreement of one process with itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleProcess;

impl SaveAgreement for SingleProcess {
    fn all_written(&self, _save: SaveId, mine: Result<(), String>) -> Result<(), AgreeError> {
        mine.map_err(|why| AgreeError { process: Some(0), why })
    }

    fn outcome(&self, _save: SaveId, decided: Option<Result<SaveOutcome, String>>) -> Result<SaveOutcome, AgreeError> {
        let missing = || Err("process 0 decided nothing".to_string());
        decided.unwrap_or_else(missing).map_err(|why| AgreeError { process: Some(0), why })
    }
}
