//! Creates a saver for a session after checking that the store is writable, large enough, and visible to all processes.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use object_store::PutMode;
use shardflow_kernels::tensor::element_count;

use super::Session;
use super::error::SessionError;
use super::outcome::Outcome;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::io::StoreFile;
use crate::checkpoint::manifest::Cursor;
use crate::checkpoint::options::{SaveSchedule, SaverOptions};
use crate::checkpoint::saver::{SaveStart, Saver};
use crate::checkpoint::store::Store;
use crate::files::{folder_of, free_bytes, free_inodes};
use shardflow_job::text::counted;

impl Saver {
    /// Takes a snapshot between two steps and starts to write it. All processes of a job call it after the same steps.
    ///
    /// # Errors
    /// Returns an error if the session or the saver's thread has failed. The result of the write is reported later.
    pub fn save(&mut self, session: &Session, cursor: Cursor) -> Result<SaveStart, SessionError> {
        if self.must_skip() {
            return Ok(SaveStart::Skipped);
        }
        let mut snapshot = session.snapshot(self.spare.take())?;
        snapshot.manifest.cursor = cursor;
        let replaces = snapshot.manifest.step <= session.progress.damaged_up_to;
        Ok(self.start(snapshot, replaces)?)
    }
}

impl Session {
    /// Starts a saver, like [`Saver::new`], for this session's processes and job. All processes call it. The call
    /// detects faults that prevent later saves: process 0 takes the store's lock, and checks that there is space
    /// for all checkpoints. Every process writes, renames and deletes a file, and must see the file of process 0.
    ///
    /// # Errors
    /// On all processes, [`CheckpointError`]: `Held`, `NoRoom`, `NotShared`, or the store's error.
    pub fn saver(&mut self, store: &Store, options: SaverOptions) -> Result<Saver, SessionError> {
        let (agree, member) = self.agreement()?;
        let checkpoints = checkpoints_max(options.keep, options.keep_every, options.schedule);
        let save = options.save.clone();
        let plan = options.plan.or_else(|| Some(self.plan.hash().to_string()));
        let job = options.job.or_else(|| self.job.0.clone());
        let saver = Saver::new(store.clone(), agree, SaverOptions { member, plan, job, ..options });
        let nanoseconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        // The lowest 16 bits come from the rank, so the number differs between the processes of this job.
        let number = (nanoseconds & !0xffff) | u64::from(member.process & 0xffff);
        let probed = saver.and_then(|saver| {
            if member.process == 0 {
                // A checkpoint has two folders, a manifest and, for each process, a shard and its description.
                let files = 3 + 2 * u64::from(member.processes);
                let entries = (1 + u64::from(member.processes)) * self.residents().count() as u64;
                let tensors = self.checkpoint_bytes();
                let each = tensors + files * BLOCK_BYTES + entries * ENTRY_BYTES;
                let saved = save.filter(|path| is_with(store, path)).map_or(0, |_| tensors);
                check_free_space(store, each, files, checkpoints, saved)?;
            }
            write_probe(store, number)?;
            Ok(saver)
        });
        let failed = |error: &CheckpointError| Outcome::Failed(error.exit_code());
        let outcomes = self.combine_outcomes(probed.as_ref().err().map_or(Outcome::Good(number), failed))?;
        let saver = probed?;
        let delete = || store.operations.delete(&probe(store, number));
        outcomes.worst.check(store.place(), "cannot use this store").inspect_err(|_| drop(delete()))?;
        let seen = store.operations.wait_visible(|| store.operations.size(&probe(store, outcomes.first)));
        let own = match &seen {
            Ok(Some(_)) => Outcome::Good(0),
            Ok(None) => Outcome::Absent,
            Err(error) => failed(error),
        };
        let outcomes = self.combine_outcomes(own)?;
        let deleted = delete();
        seen?;
        deleted?;
        outcomes.worst.check(store.place(), "cannot read this store")?;
        let ranks: Vec<String> = outcomes.absent.iter().map(|rank| format!("rank {rank}")).collect();
        if ranks.is_empty() {
            return Ok(saver);
        }
        Err(CheckpointError::NotShared { place: store.place().into(), ranks: ranks.join(", ") }.into())
    }

    /// Bytes of all tensors of a checkpoint, or of a file of [`Session::save`], of all processes together.
    pub fn checkpoint_bytes(&self) -> u64 {
        let graph = &self.plan.graph;
        let bytes = |var| (element_count(graph.shape(var)) * graph.tensor(var).dtype.bytes()) as u64;
        self.residents().map(|(var, _)| bytes(var)).sum()
    }
}

/// Maximum number of checkpoints in a store at any time: the newest `keep`, one that is being written, and the planned
/// ones that are never deleted.
fn checkpoints_max(keep: usize, keep_every: Option<u64>, schedule: Option<SaveSchedule>) -> u64 {
    let newest = (keep.max(1) as u64).saturating_add(1);
    let Some(SaveSchedule { every, steps }) = schedule else { return newest };
    let saves = steps.div_ceil(every.max(1));
    let older_steps = saves.saturating_sub(newest).saturating_mul(every);
    let kept = keep_every.and_then(|keep_every| older_steps.checked_div(common_multiple(every, keep_every)));
    saves.min(newest) + kept.unwrap_or(0)
}

/// Least common multiple, at most `u64::MAX`.
fn common_multiple(a: u64, b: u64) -> u64 {
    let (mut divisor, mut rest) = (a, b);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    a.checked_div(divisor).unwrap_or(0).saturating_mul(b)
}

/// Unit of allocation of common file systems, in bytes.
const BLOCK_BYTES: u64 = 4096;
/// Typical bytes of a tensor's entry in a manifest or in the description of a shard.
const ENTRY_BYTES: u64 = 256;

/// True if a store is local and in the same file system as `path`.
fn is_with(store: &Store, path: &Path) -> bool {
    let device = |path: &Path| path.metadata().ok().map(|metadata| metadata.dev());
    store.local.as_deref().is_some_and(|folder| device(folder) == device(folder_of(path)))
}

/// If the free space is known, checks that it suffices for `more` bytes and the checkpoints to come (at least one).
fn check_free_space(store: &Store, bytes: u64, files: u64, checkpoints: u64, more: u64) -> Result<(), CheckpointError> {
    // The folder exists, because taking the lock has created it.
    let Some(folder) = store.local.as_deref() else { return Ok(()) };
    let existing = store.steps()?.len() as u64;
    let checkpoints = checkpoints.saturating_sub(existing).max(1);
    let kinds = [("bytes", free_bytes(folder), bytes, more), ("inodes", free_inodes(folder), files, 0)];
    for (unit, free, each, more) in kinds {
        let needed = each.saturating_mul(checkpoints).saturating_add(more);
        if let Some(free) = free.filter(|free| *free < needed) {
            let all = counted(checkpoints, "checkpoint");
            let also = if more > 0 { format!(", and {more} for the file with all parameters") } else { String::new() };
            let why = format!("{free} {unit} are free, but {needed} are needed: {all} of {each} {unit}{also}");
            return Err(CheckpointError::NoRoom { place: store.place().into(), checkpoints, why });
        }
    }
    Ok(())
}

fn probe(store: &Store, number: u64) -> StoreFile {
    store.top(&format!("probe-{number}"))
}

/// Writes a small file with the operations of a commit, and renames it.
fn write_probe(store: &Store, number: u64) -> Result<(), CheckpointError> {
    let new = store.top(&format!("new-probe-{number}"));
    store.operations.put(&new, b"a probe".to_vec(), PutMode::Create)?;
    store.operations.rename(&new, &probe(store, number)).inspect_err(|_| drop(store.operations.delete(&new)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts the checkpoints of a simulated training, including the one being written.
    fn simulated(keep: usize, keep_every: u64, every: u64, steps: u64) -> u64 {
        let (mut held, mut most) = (Vec::new(), 0);
        for step in (1..=steps).filter(|step| step.is_multiple_of(every) || *step == steps) {
            held.push(step);
            most = most.max(held.len());
            let newest = held.split_off(held.len().saturating_sub(keep));
            held.retain(|step| step.is_multiple_of(keep_every));
            held.extend(newest);
        }
        most as u64
    }

    #[test]
    fn checkpoints_that_are_kept_permanently_are_counted() {
        for keep in 1..4 {
            for (keep_every, every) in [(1, 1), (1, 3), (4, 2), (6, 4), (5, 7), (2, 4)] {
                for steps in 1..60 {
                    let counted = checkpoints_max(keep, Some(keep_every), Some(SaveSchedule { every, steps }));
                    let expected = simulated(keep, keep_every, every, steps);
                    assert_eq!(counted, expected, "keep {keep}, keep_every {keep_every}, every {every}, {steps} steps");
                }
            }
        }
        assert_eq!(checkpoints_max(3, Some(1), None), 4, "without a schedule, only the newest are counted");
        let schedule = Some(SaveSchedule { every: 1, steps: u64::MAX });
        assert_eq!(checkpoints_max(usize::MAX, Some(u64::MAX), schedule), u64::MAX);
    }
}
