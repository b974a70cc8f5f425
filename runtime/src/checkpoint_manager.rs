//! Checkpoints of one training run: resume, scheduled saves in the background, and rollback after a non-finite step.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shardflow_job::exit::{self, Exit};
use shardflow_job::requests::{Request, Requests};

use crate::checkpoint::{CheckpointError, Cursor, SaveReport, SaveSchedule, SaveStart, Saver, SaverOptions, Store};
use crate::session::numerics::NonFinite;
use crate::session::{Session, SessionError, StepReport};

/// Key in the cursor. Its value is the number of samples consumed before the checkpoint, including skipped batches.
const SAMPLES: &str = "samples";

/// Key that older checkpoints have instead of [`SAMPLES`]. Its value is the number of skipped batches, not counting the
/// batches of completed steps.
const SKIPPED_BATCHES: &str = "batches_passed_over";

/// Maximum number of rollbacks to one checkpoint.
const ROLLBACKS_MAX: u32 = 3;

const LAST_SAVE_LIMIT: Duration = Duration::from_secs(600);

/// Whether a training run continues from a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Resume {
    /// Continue from the newest checkpoint, or start from step 0 if there is none. A message reports the choice.
    #[default]
    Auto,
    /// Continue from the newest checkpoint, or end with code 65 if there is none.
    Required,
    /// Start from step 0; end with code 2 if there is a checkpoint. A restarted job continues from its own checkpoints.
    Never,
}

impl Resume {
    /// The policy after `restart` restarts. A restarted job continues from its own checkpoints.
    pub fn at_restart(self, restart: u64) -> Self {
        if restart > 0 && self == Self::Never { Self::Auto } else { self }
    }
}

/// Options of a [`CheckpointManager`].
#[derive(Clone)]
pub struct ManagerOptions {
    /// Whether to continue from an existing checkpoint.
    pub resume: Resume,
    /// When to save, besides requested saves and the save after the last step.
    pub schedule: SaveSchedule,
    /// Number of newest checkpoints to keep, 1 or more.
    pub keep: usize,
    /// A checkpoint whose step is a multiple of this number is never deleted.
    pub keep_every: Option<u64>,
    /// Number of samples per step.
    pub batch: u64,
    /// Path of the parameter file that the program will also write, if any. The check of free space includes this file.
    pub save: Option<PathBuf>,
    /// The requests to this process. The manager records the duration of each save in them. Under Slurm, the request to
    /// end then comes early enough before the end time for one more save.
    pub requests: Option<Arc<Requests>>,
    /// Receives messages for the user, one line each. Only rank 0 receives messages about the whole job.
    pub on_note: Arc<dyn Fn(&str) + Send + Sync>,
}

/// Why checkpoints cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The store cannot be used, its newest checkpoint cannot be loaded, or another run has taken its lock.
    #[error(transparent)]
    Store(Box<SessionError>),
    #[error("{place} has a checkpoint of step {step}")]
    Present { place: String, step: u64 },
    #[error(transparent)]
    Snapshot(Box<SessionError>),
    #[error("{0}; there is no checkpoint to roll back to")]
    NoCheckpoint(Box<NonFinite>),
    #[error("rolled back {ROLLBACKS_MAX} times to step {step} without success: {found}")]
    TooManyRollbacks { step: u64, found: Box<NonFinite> },
    #[error("the last checkpoint is not saved: {cause}; {}", newest.map_or("no other checkpoint exists".into(), |step| format!("the newest checkpoint is of step {step}")))]
    Last { cause: Box<CheckpointError>, newest: Option<u64> },
}

impl ManagerError {
    /// The exit code of the program.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Store(error) => match &**error {
                SessionError::Checkpoint(error) if error.io_kind() == Some(ErrorKind::NotADirectory) => Exit::Usage,
                error => error.exit(),
            },
            Self::Snapshot(error) => error.exit(),
            Self::Present { .. } => Exit::Usage,
            Self::NoCheckpoint(_) | Self::TooManyRollbacks { .. } => Exit::Numerics,
            Self::Last { .. } => Exit::CannotWrite,
        }
    }

    /// The session's error, if the cause is a session's error.
    pub fn session(&self) -> Option<&SessionError> {
        match self {
            Self::Store(error) | Self::Snapshot(error) => Some(error),
            _ => None,
        }
    }
}

fn store_error(error: impl Into<SessionError>) -> ManagerError {
    ManagerError::Store(Box::new(error.into()))
}

/// The checkpoints of one training run. All processes must make the same calls.
///
/// ```
/// # use std::sync::Arc;
/// use shardflow::prelude::*;
///
/// # let mut g = Graph::new(&Mesh::parse("data=2")?);
/// # let ids = g.input("ids", &[4, 8], DType::I32, Layout::split("data", 0));
/// # let x = nn::embedding(&mut g, "embedding", ids, 16, 16, Parallel::Replicated);
/// # let loss = g.cross_entropy(x, ids);
/// # g.minimize(loss, AdamW::default());
/// # let plan = compile(g, &CompileOptions::default())?;
/// # let folder = tempfile::tempdir()?;
/// # let place = folder.path().to_str().unwrap();
/// # let batch_from = |sample: u64| vec![("ids", HostTensor::i32(&[4, 8], vec![sample as i32 % 16; 32]))];
/// let mut session = Session::start(plan, &SessionOptions::default())?;
/// let options = ManagerOptions {
///     resume: Resume::Auto,
///     schedule: SaveSchedule { every: 5, steps: 12 },
///     keep: 3,
///     keep_every: None,
///     batch: 4,
///     save: None,
///     requests: None,
///     on_note: Arc::new(|line| program::note(line)),
/// };
/// let mut checkpoints = CheckpointManager::open(place, options, &mut session)?;
/// while session.steps() < 12 {
///     let report = session.step(&batch_from(checkpoints.take_batch()), 1e-3)?;
///     checkpoints.after_step(&session, &report)?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct CheckpointManager {
    saver: Saver,
    store: Store,
    options: ManagerOptions,
    /// Index of the next batch's first sample.
    next_sample: u64,
    /// Whether this process is rank 0, which writes to the store.
    is_first: bool,
    /// Step of the last rollback, and the number of consecutive rollbacks to that step.
    rollbacks: (u64, u32),
    requested: Option<u64>,
}

impl CheckpointManager {
    /// Opens the store, checks that it is writable, and loads the newest intact checkpoint, if any, into the session.
    ///
    /// # Errors
    /// If the store cannot be used, another run writes to it, the checkpoint has another model or other data, or
    /// [`ManagerOptions::resume`] forbids an existing checkpoint or requires a missing one.
    pub fn open(place: &str, options: ManagerOptions, session: &mut Session) -> Result<Self, ManagerError> {
        let store = Store::open(place).map_err(store_error)?;
        let (keep, keep_every, schedule) = (options.keep, options.keep_every, Some(options.schedule));
        let save = options.save.clone();
        let saver_options = SaverOptions { keep, keep_every, schedule, save, ..SaverOptions::default() };
        let saver = session.saver(&store, saver_options).map_err(store_error)?;
        // `steps` also lists damaged checkpoints and those of other models.
        if options.resume == Resume::Never
            && let Some(step) = store.steps().map_err(store_error)?.pop()
        {
            return Err(ManagerError::Present { place: store.place().into(), step });
        }
        let is_first = session.is_first();
        let mut own = Self { saver, store, options, next_sample: 0, is_first, rollbacks: (0, 0), requested: None };
        match (own.restore(session)?, own.options.resume) {
            (Some((step, cursor)), _) => own.next_sample = samples_before(step, &cursor, own.options.batch),
            (None, Resume::Required) => {
                return Err(store_error(CheckpointError::Absent { place: own.store.place().into(), step: None }));
            }
            (None, _) => own.note(format!("no checkpoint in {}: starting from step 0", own.store.place())),
        }
        Ok(own)
    }

    /// Takes a batch and returns its first sample's index. No sample repeats, even if a resume changes the batch size.
    pub fn take_batch(&mut self) -> u64 {
        let first = self.next_sample;
        self.next_sample = first.wrapping_add(self.options.batch);
        first
    }

    /// Returns to the newest checkpoint after a non-finite step. Training continues with the samples after the bad
    /// batch: it repeats neither the bad batch nor the batches since the checkpoint. All processes must call this.
    ///
    /// # Errors
    /// When there is no checkpoint, or after too many rollbacks to the same checkpoint.
    pub fn roll_back(&mut self, session: &mut Session, found: &NonFinite) -> Result<(), ManagerError> {
        if let Some(report) = self.saver.wait(LAST_SAVE_LIMIT).ok().flatten() {
            self.report_save(&report)?;
        }
        let Some((step, _)) = self.restore(session)? else {
            return Err(ManagerError::NoCheckpoint(Box::new(found.clone())));
        };
        let (last, times) = self.rollbacks;
        self.rollbacks = (step, if last == step { times + 1 } else { 1 });
        if self.rollbacks.1 > ROLLBACKS_MAX {
            return Err(ManagerError::TooManyRollbacks { step, found: Box::new(found.clone()) });
        }
        // If a process dies before the next save, the restarted job must not train on the bad batch again.
        if let Err(error) = self.saver.set_cursor(step, self.cursor()) {
            let note = "warning: a restart before the next checkpoint will train on the bad batch again";
            self.note(format!("{note}: {error}"));
        }
        Ok(())
    }

    /// Starts a scheduled or requested save, and reports saves that have ended. After the last step or a request to
    /// end, waits for the save.
    ///
    /// # Errors
    /// When no snapshot can be taken, the lock is lost, or the last save failed. Other failed saves are only reported.
    pub fn after_step(&mut self, session: &Session, report: &StepReport) -> Result<(), ManagerError> {
        let (request, SaveSchedule { every, steps }) = (report.request, self.options.schedule);
        let is_last = session.steps() >= steps || matches!(request, Request::End(_));
        if let Some(report) = self.saver.poll() {
            self.report_save(&report)?;
        }
        if !is_last && request == Request::Nothing && !session.steps().is_multiple_of(every) {
            return Ok(());
        }
        self.requested = (request != Request::Nothing).then(|| session.steps()).or(self.requested);
        let start = self.saver.save(session, self.cursor()).map_err(|e| ManagerError::Snapshot(Box::new(e)))?;
        if let SaveStart::Started { before: Some(report) } = start {
            self.report_save(&report)?;
        }
        if !is_last {
            return Ok(());
        }
        let last = self.saver.wait(LAST_SAVE_LIMIT).map_err(|cause| self.last_error(cause))?;
        last.map_or(Ok(()), |report| {
            self.report_save(&report)?;
            report.result.map(drop).map_err(|cause| self.last_error(cause))
        })
    }

    fn cursor(&self) -> Cursor {
        Cursor::from([(SAMPLES.to_string(), self.next_sample.to_string())])
    }

    fn last_error(&self, cause: CheckpointError) -> ManagerError {
        let newest = self.store.newest().ok().and_then(|newest| newest.reader);
        ManagerError::Last { cause: cause.into(), newest: newest.map(|reader| reader.manifest().step) }
    }

    /// Reports the outcome of a save. A lost lock is an error, because the run cannot save any more.
    fn report_save(&mut self, report: &SaveReport) -> Result<(), ManagerError> {
        if let Some(requests) = &self.options.requests {
            requests.set_save_time(Duration::from_secs_f64(report.seconds));
        }
        match &report.result {
            Ok(_) => {
                let (step, place) = (report.step, self.store.place());
                if self.requested == Some(step) {
                    self.note(format!("the checkpoint of step {step} is saved in {place}, on request"));
                }
                // The launcher gives up after restarts without progress. Without a launcher, this does nothing.
                if let Err(error) = exit::progress(step) {
                    (self.options.on_note)(&format!("warning: cannot report step {step} to the launcher: {error}"));
                }
            }
            Err(CheckpointError::Fenced { place, holder }) => {
                let (place, holder) = (place.clone(), holder.clone());
                return Err(store_error(CheckpointError::Fenced { place, holder }));
            }
            Err(error) => self.note(format!("warning: the checkpoint of step {} is not saved: {error}", report.step)),
        }
        if let Some(error) = &report.prune {
            self.note(format!("warning: cannot delete older checkpoints: {error}"));
        }
        Ok(())
    }

    /// Loads the newest intact checkpoint, and returns its step and cursor.
    fn restore(&self, session: &mut Session) -> Result<Option<(u64, Cursor)>, ManagerError> {
        let restored = session.restore_newest(&self.store).map_err(store_error)?;
        restored.damaged.iter().for_each(|error| self.note(format!("warning: checkpoint skipped: {error}")));
        restored.notes.iter().for_each(|line| self.note(format!("warning: {line}")));
        if let Some((step, _)) = &restored.found {
            self.note(format!("continuing from step {step} in {}", self.store.place()));
        }
        Ok(restored.found)
    }

    /// On rank 0, sends a message about the whole job. Does nothing on other ranks.
    fn note(&self, line: String) {
        if self.is_first {
            (self.options.on_note)(&line);
        }
    }
}

fn samples_before(step: u64, cursor: &Cursor, batch: u64) -> u64 {
    let number = |key: &str| cursor.get(key).and_then(|count| count.parse::<u64>().ok());
    let from_batches = || step.saturating_add(number(SKIPPED_BATCHES).unwrap_or(0)).wrapping_mul(batch);
    number(SAMPLES).unwrap_or_else(from_batches)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_of_older_versions_are_read() {
        let cursor = |key: &str, value: &str| Cursor::from([(key.to_string(), value.to_string())]);
        assert_eq!(samples_before(5, &cursor(SAMPLES, "22"), 2), 22);
        assert_eq!(samples_before(5, &cursor(SKIPPED_BATCHES, "2"), 4), 28, "an older cursor counts batches");
        assert_eq!(samples_before(5, &Cursor::new(), 4), 20, "the oldest cursors are empty");
    }

    #[test]
    fn an_error_of_the_last_save_names_the_newest_checkpoint() {
        let cause = || CheckpointError::Io { path: "x".into(), source: ErrorKind::StorageFull.into() };
        let last = |newest| ManagerError::Last { cause: cause().into(), newest }.to_string();
        assert!(last(Some(4)).ends_with("; the newest checkpoint is of step 4"), "{}", last(Some(4)));
        assert!(last(None).ends_with("; no other checkpoint exists"), "{}", last(None));
    }
}
