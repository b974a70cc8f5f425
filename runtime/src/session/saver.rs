//! Creates a saver for a session after checking that the store is writable, large enough, and visible to all processes.

use std::time::{SystemTime, UNIX_EPOCH};

use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode};

use super::{Session, SessionError, resident_parts};
use crate::checkpoint::error::{CheckpointError, StoreOperation};
use crate::checkpoint::saver::{Saver, SaverOptions};
use crate::checkpoint::store::Store;
use crate::files::free_bytes;
use crate::text::counted;

/// Outcomes of a process's check; a failed write probe is sent as the exit code of its error.
const GOOD: u64 = 0;
const FAILED: u64 = 1;

impl Session {
    /// Starts a saver of this session, like [`Saver::new`], for the session's processes and job. All processes call it.
    /// It finds faults that would prevent a later save: process 0 takes the store's lock, checks the free space for the
    /// kept checkpoints and one more, and writes, renames and deletes a file, which every process must see.
    ///
    /// # Errors
    /// On all processes: [`CheckpointError::Held`], [`CheckpointError::NoRoom`], [`CheckpointError::NotShared`], or the
    /// store's error.
    pub fn saver(&mut self, store: &Store, options: SaverOptions) -> Result<Saver, SessionError> {
        let (agree, member) = self.agreement()?;
        let (keep, saves_max) = (options.keep.max(1) as u64, options.saves_max.unwrap_or(u64::MAX));
        let plan = options.plan.or_else(|| Some(self.plan.hash().to_string()));
        let job = options.job.or_else(|| self.job.0.clone());
        let saver = Saver::new(store.clone(), agree, SaverOptions { member, plan, job, ..options });
        let number = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let probed = saver.and_then(|saver| {
            if member.process == 0 {
                check_free_space(store, self.checkpoint_bytes(), keep, saves_max)?;
                write_probe(store, number)?;
            }
            Ok(saver)
        });
        let own = probed.as_ref().err().map_or(GOOD, |error| u64::from(error.exit_code()));
        let results = self.exchange([own, number])?;
        let saver = probed?;
        if let Some((rank, [exit, _])) = (0..).zip(&results).find(|(_, [result, _])| *result != GOOD) {
            let (place, problem) = (store.place().into(), "cannot use it".into());
            return Err(CheckpointError::OnRank { place, rank, exit: *exit as u8, problem }.into());
        }
        let [_, number] = results[0];
        let seen = sees_probe(store, number);
        let results = self.exchange([if matches!(seen, Ok(true)) { GOOD } else { FAILED }, 0])?;
        let deleted = if member.process == 0 { delete_probe(store, number) } else { Ok(()) };
        seen?;
        deleted?;
        let failing = results.iter().enumerate().filter(|(_, [result, _])| *result != GOOD);
        let ranks: Vec<String> = failing.map(|(process, _)| format!("rank {process}")).collect();
        if ranks.is_empty() {
            return Ok(saver);
        }
        Err(CheckpointError::NotShared { place: store.place().into(), ranks: ranks.join(", ") }.into())
    }

    /// Bytes of all elements of a checkpoint, for all processes.
    fn checkpoint_bytes(&self) -> u64 {
        let bytes = |var| {
            let (shape, parts) = (self.plan.graph.shape(var), resident_parts(&self.plan, var));
            let element = parts.first().map_or(0, |(_, _, resident)| resident.dtype.bytes());
            (shape.iter().product::<usize>() * element) as u64
        };
        self.residents().map(|(var, _)| bytes(var)).sum()
    }
}

/// Checks the free space for the checkpoints that are still to be written: `keep` and one more, minus the existing
/// ones, and at most `saves_max`. Does nothing if the file system does not report its free space.
fn check_free_space(store: &Store, bytes: u64, keep: u64, saves_max: u64) -> Result<(), CheckpointError> {
    // The lock has created the folder.
    let Some(free_bytes) = store.local.as_deref().and_then(free_bytes) else { return Ok(()) };
    let existing = store.steps()?.len() as u64;
    let checkpoints = keep.saturating_add(1).saturating_sub(existing).max(1).min(saves_max);
    let needed_bytes = bytes.saturating_mul(checkpoints);
    if needed_bytes <= free_bytes {
        return Ok(());
    }
    let needed = format!("{needed_bytes} are needed for {} of {bytes} bytes", counted(checkpoints, "checkpoint"));
    let why = format!("{free_bytes} bytes are free, {needed}");
    Err(CheckpointError::NoRoom { place: store.place().into(), checkpoints, why })
}

fn probe(store: &Store, number: u64) -> (String, Path) {
    let file = format!("probe-{number}");
    (format!("{}/{file}", store.place()), store.top(&file))
}

/// Writes a small file with the operations of a commit, and renames it.
fn write_probe(store: &Store, number: u64) -> Result<(), CheckpointError> {
    let (operations, (name, path), (_, new)) = (&store.operations, probe(store, number), probe(store, number + 1));
    operations.put(&name, &new, b"a probe".to_vec(), PutMode::Create)?;
    let backend = operations.backend.clone();
    operations.run(&name, StoreOperation::Write, async move { backend.rename(&new, &path).await })
}

/// True if this process sees the probe that process 0 has written.
fn sees_probe(store: &Store, number: u64) -> Result<bool, CheckpointError> {
    let (name, path) = probe(store, number);
    Ok(store.operations.wait_visible(|| store.operations.size(&name, &path))?.is_some())
}

fn delete_probe(store: &Store, number: u64) -> Result<(), CheckpointError> {
    let (name, path) = probe(store, number);
    store.operations.delete(&name, &path)
}
