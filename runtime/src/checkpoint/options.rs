//! Options of saves.

use std::path::PathBuf;

use super::agreement::ProcessRank;

/// Behavior of a save while another one runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenBusy {
    /// Wait for the running save.
    Wait,
    /// Skip this save. Valid only in single-process jobs, because all processes must skip the same saves.
    Skip,
}

/// When a program saves: each time the number of steps is a multiple of `every`, and after the last step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveSchedule {
    /// Number of steps between two saves.
    pub every: u64,
    /// Number of steps of the whole training run.
    pub steps: u64,
}

/// Options of a saver.
#[derive(Clone, Debug)]
pub struct SaverOptions {
    /// Rank of this process.
    pub member: ProcessRank,
    /// Number of complete checkpoints to keep, 1 or more.
    pub keep: usize,
    /// A checkpoint whose step is a multiple of this number is never deleted.
    pub keep_every: Option<u64>,
    /// The planned saves, if known. The check of free space includes the checkpoints that remain after these saves.
    pub schedule: Option<SaveSchedule>,
    /// Path of the parameter file that the program will also write, if any. The check of free space includes this file.
    pub save: Option<PathBuf>,
    /// Behavior of a save while another one runs.
    pub busy: WhenBusy,
    /// Hash of the plan, for the manifest.
    pub plan: Option<String>,
    /// The job's unique name, which all incarnations share. A later incarnation takes the store's lock immediately.
    pub job: Option<String>,
}

impl Default for SaverOptions {
    fn default() -> Self {
        Self {
            member: ProcessRank::ALONE,
            keep: 3,
            keep_every: None,
            schedule: None,
            save: None,
            busy: WhenBusy::Wait,
            plan: None,
            job: None,
        }
    }
}
