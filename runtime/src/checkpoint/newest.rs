//! The newest good checkpoint of a store, and the deletion of older ones.

use super::error::CheckpointError;
use super::read::CheckpointReader;
use super::store::{CURSOR, MANIFEST, Store};

/// The newest good checkpoint, and the errors of newer, damaged ones.
#[derive(Debug)]
pub struct NewestCheckpoint {
    /// The checkpoint, if there is one.
    pub reader: Option<CheckpointReader>,
    /// Errors of newer, damaged checkpoints. Each error names the damaged file.
    pub damaged: Vec<CheckpointError>,
}

impl Store {
    /// The newest good checkpoint: one that [`Store::read`] accepts. Damaged checkpoints are skipped and reported.
    pub fn newest(&self) -> Result<NewestCheckpoint, CheckpointError> {
        self.newest_accepted(None, |_| Ok(()))
    }

    /// Like [`Store::newest`], but checks every byte. Only damage that occurs after the check can prevent loading.
    pub fn newest_verified(&self) -> Result<NewestCheckpoint, CheckpointError> {
        self.newest_accepted(None, CheckpointReader::verify)
    }

    /// The newest checkpoint that `accept` accepts. If `before` is given, only earlier steps are considered.
    pub(crate) fn newest_accepted(
        &self,
        before: Option<u64>,
        accept: impl Fn(&CheckpointReader) -> Result<(), CheckpointError>,
    ) -> Result<NewestCheckpoint, CheckpointError> {
        let mut steps = self.steps_with_folder()?;
        loop {
            let (mut damaged, mut is_any_gone) = (Vec::new(), false);
            for step in steps.iter().rev().filter(|step| before.is_none_or(|before| **step < before)) {
                match self.read(*step).and_then(|reader| accept(&reader).map(|()| reader)) {
                    Ok(reader) => return Ok(NewestCheckpoint { reader: Some(reader), damaged }),
                    Err(CheckpointError::Absent { .. } | CheckpointError::Deleted { .. }) => is_any_gone = true,
                    Err(error) if error.is_damage() => damaged.push(error),
                    Err(error) => return Err(error),
                }
            }
            // A run commits a newer checkpoint before it deletes an older one. So if one is gone, list the checkpoints
            // again. The loop ends, because saves are slower than this loop.
            let listed = self.steps_with_folder()?;
            if !is_any_gone || listed.last() <= steps.last() {
                return Ok(NewestCheckpoint { reader: None, damaged });
            }
            steps = listed;
        }
    }

    /// Deletes old checkpoints up to step `newest`, and files of failed attempts. Keeps the newest `keep` good ones (at
    /// least one), and those whose step is a multiple of `keep_every`. One process calls this after `newest` is
    /// committed. Checkpoints of later steps stay, even damaged ones: other processes may already save those steps.
    ///
    /// # Errors
    /// If a deletion fails; the next call finds the remaining files again.
    pub fn prune(&self, newest: u64, keep: usize, keep_every: Option<u64>) -> Result<(), CheckpointError> {
        let (keep, mut kept) = (keep.max(1), 0);
        for step in self.steps_with_folder()?.into_iter().rev().skip_while(|step| *step > newest) {
            match self.read(step) {
                Ok(reader) if kept < keep || keep_every.is_some_and(|every| step.is_multiple_of(every)) => {
                    kept += 1;
                    self.delete_other_attempts(&reader)?;
                }
                Ok(_) => self.delete(step, "", true)?,
                // A newer good checkpoint exists, so the files of a failed attempt are useless.
                Err(CheckpointError::Absent { .. } | CheckpointError::Deleted { .. }) if kept > 0 => {
                    self.delete(step, "", true)?
                }
                Err(error) if error.is_damage() && kept >= keep => self.delete(step, "", true)?,
                Err(
                    CheckpointError::Absent { .. } | CheckpointError::Deleted { .. } | CheckpointError::Newer { .. },
                ) => {}
                Err(error) if error.is_damage() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Deletes files of uncommitted attempts in a committed checkpoint's folder.
    fn delete_other_attempts(&self, reader: &CheckpointReader) -> Result<(), CheckpointError> {
        let step = reader.manifest().step;
        let shards = || reader.manifest().shards.iter().filter_map(|shard| shard.file.split('/').next());
        for (name, bytes) in self.list(Some(step), false)? {
            if name != MANIFEST && name != CURSOR && !shards().any(|attempt| attempt == name) {
                self.delete(step, &name, bytes.is_none())?;
            }
        }
        Ok(())
    }
}
