//! The checkpoints of a training: continues from the newest, saves in the background, reports the outcomes.

use std::io::ErrorKind;
use std::time::Duration;

use shardflow::checkpoint::error::StoreOperation;
use shardflow::checkpoint::{CheckpointError, Cursor, SaveReport, SaveStart, Saver, SaverOptions, Store};
use shardflow::exit;
use shardflow::prelude::*;

use crate::args::{GptArgs, ResumeArg};
use crate::files;
use crate::log::note;

/// Key of the cursor: samples consumed before the checkpoint, skipped batches included.
const SAMPLES: &str = "samples";

/// Key in older checkpoints in place of [`SAMPLES`]: skipped batches, in addition to one batch for each step.
const SKIPPED_BATCHES: &str = "batches_passed_over";

/// Maximum number of rollbacks to one checkpoint.
const ROLLBACKS_MAX: u32 = 3;

/// Time limit of the last save.
const LAST_SAVE_LIMIT: Duration = Duration::from_secs(600);

/// Why checkpoints cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointsError {
    /// A checkpoint cannot be loaded.
    #[error("--checkpoint {0}")]
    Load(Box<SessionError>),
    /// The store cannot be used.
    #[error("--checkpoint {0}")]
    Store(Box<SessionError>),
    /// Another run has taken the store's lock.
    #[error("--checkpoint {0}")]
    Fenced(CheckpointError),
    /// `--resume never`, and there is a checkpoint.
    #[error("--resume never, but {place} has a checkpoint of step {step}")]
    Present {
        /// The store.
        place: String,
        /// Step of the newest checkpoint.
        step: u64,
    },
    /// A snapshot could not be taken, or there is no memory for one.
    #[error(transparent)]
    Snapshot(Box<SessionError>),
    /// A step was not finite, and there is no checkpoint to roll back to.
    #[error("{0}; there is no checkpoint to roll back to")]
    NoCheckpoint(Box<NonFinite>),
    /// A step was not finite again after the maximum number of rollbacks to one checkpoint.
    #[error("rolled back to step {step} {ROLLBACKS_MAX} times, and again {found}")]
    TooManyRollbacks {
        /// Step of the checkpoint.
        step: u64,
        /// The last step that was not finite.
        found: Box<NonFinite>,
    },
    /// The last checkpoint was not committed.
    #[error("the last checkpoint is not saved: {cause}; {}", newest.map_or("there is no other".into(), |step| format!("the newest is of step {step}")))]
    Last {
        /// The cause.
        cause: CheckpointError,
        /// Step of the newest intact checkpoint.
        newest: Option<u64>,
    },
}

impl CheckpointsError {
    /// The exit code of the program.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Store(error) if io_kind(error) == Some(ErrorKind::NotADirectory) => Exit::Usage,
            Self::Load(error) | Self::Snapshot(error) | Self::Store(error) => error.exit(),
            Self::Present { .. } => Exit::Usage,
            Self::NoCheckpoint(_) | Self::TooManyRollbacks { .. } => Exit::Numerics,
            Self::Last { .. } | Self::Fenced(_) => Exit::CannotWrite,
        }
    }

    /// The session's error, if this is one.
    pub fn session(&self) -> Option<&SessionError> {
        match self {
            Self::Load(error) | Self::Snapshot(error) | Self::Store(error) => Some(error),
            _ => None,
        }
    }

    /// What the user can change.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Load(error) => match **error {
                SessionError::Checkpoint(CheckpointError::Absent { .. }) => {
                    "give the folder that has the checkpoint, or --resume auto to start from step 0"
                }
                SessionError::Checkpoint(CheckpointError::Unfit { .. }) => {
                    "use the flags and the data of the run that saved the checkpoint, or give another --checkpoint"
                }
                SessionError::Checkpoint(CheckpointError::Damaged { .. }) => {
                    "no checkpoint there is intact; restore one from a copy, or give another --checkpoint"
                }
                SessionError::Disagreement(_) => "give all ranks one --checkpoint folder that they share",
                SessionError::Checkpoint(ref error @ CheckpointError::Store { .. }) => hint(error),
                _ => "",
            },
            Self::Present { .. } => "give another --checkpoint, or --resume auto to continue from it",
            Self::Store(error) => match &**error {
                SessionError::Checkpoint(error) => hint(error),
                _ => "",
            },
            Self::Fenced(_) => "end the other run, and start this one again: it continues from the newest checkpoint",
            Self::Snapshot(_) => "",
            Self::NoCheckpoint(found) | Self::TooManyRollbacks { found, .. } => non_finite_hint(found),
            Self::Last { cause, .. } => hint(cause),
        }
    }
}

fn io_kind(error: &SessionError) -> Option<ErrorKind> {
    match error {
        SessionError::Checkpoint(error) => error.io_kind(),
        _ => None,
    }
}

/// What the user can change so that a step is finite. The moments of AdamW depend on the gradients alone.
pub fn non_finite_hint(found: &NonFinite) -> &'static str {
    match found.overflow {
        Some("a parameter") => "try a lower --lr",
        Some(_) => "try --clip 1, or less",
        None => "try a lower --lr, or --clip 1",
    }
}

/// What the user can change so that a store can be used.
fn hint(error: &CheckpointError) -> &'static str {
    match error {
        CheckpointError::NoRoom { checkpoints: 1, .. } => "free space, or give another --checkpoint",
        CheckpointError::NoRoom { .. } => {
            "free space, keep fewer checkpoints with --checkpoint-keep and --checkpoint-keep-every, or give another \
             --checkpoint"
        }
        CheckpointError::NotShared { .. } => "give a --checkpoint that all nodes share",
        CheckpointError::Others { .. } => "see the log of that rank",
        CheckpointError::Stalled { .. } => "check the file system, or the network to the store",
        CheckpointError::Store { doing: StoreOperation::Read | StoreOperation::List, .. } => {
            error.io_kind().map_or("", read_hint)
        }
        _ => error.io_kind().map_or("", write_hint),
    }
}

fn read_hint(cause: ErrorKind) -> &'static str {
    match cause {
        ErrorKind::PermissionDenied => "give a --checkpoint that this user may read",
        cause => write_hint(cause),
    }
}

fn write_hint(cause: ErrorKind) -> &'static str {
    match cause {
        ErrorKind::NotFound | ErrorKind::NotADirectory => "give a folder, or a path where one can be created",
        cause => files::hint(cause),
    }
}

/// The checkpoints of one training.
pub struct Checkpoints {
    saver: Saver,
    store: Store,
    every: u64,
    prints: bool,
    /// Whether the session has the state of a checkpoint.
    is_resumed: bool,
    /// Number of the next batch's first sample.
    next_sample: u64,
    /// Whether this process writes to the store.
    is_first: bool,
    /// Step of the last rollback, and the number of rollbacks to it in a row.
    rollbacks: (u64, u32),
    /// The step of a save on request.
    requested: Option<u64>,
    /// Duration of the last save.
    save_time: Duration,
}

impl Checkpoints {
    /// Opens the store, checks that checkpoints can be written there, and loads the newest intact one into the session,
    /// if there is one.
    ///
    /// # Errors
    /// A store that cannot be used or that another run writes to, a checkpoint of another model or data, or a
    /// checkpoint that `--resume` forbids or requires.
    pub fn open(place: &str, args: &GptArgs, prints: bool, session: &mut Session) -> Result<Self, CheckpointsError> {
        let store_error = |error: SessionError| CheckpointsError::Store(Box::new(error));
        let store = Store::open(place).map_err(|e| store_error(e.into()))?;
        let options = SaverOptions {
            keep: args.checkpoint_keep,
            keep_every: args.checkpoint_keep_every,
            schedule: Some(SaveSchedule { every: args.checkpoint_every, steps: args.steps }),
            ..SaverOptions::default()
        };
        let saver = session.saver(&store, options).map_err(store_error)?;
        // `steps` lists checkpoints of any model, damaged or not.
        if args.resume == ResumeArg::Never
            && let Some(step) = store.steps().map_err(|e| store_error(e.into()))?.pop()
        {
            return Err(CheckpointsError::Present { place: store.place().into(), step });
        }
        let found = restore(&store, session, prints)?;
        match (args.resume, &found) {
            (ResumeArg::Required, None) => {
                let absent = CheckpointError::Absent { place: store.place().into(), step: None };
                return Err(CheckpointsError::Load(Box::new(absent.into())));
            }
            (_, None) if prints => note(format!("no checkpoint in {}: starting from step 0", store.place())),
            _ => {}
        }
        let is_resumed = found.is_some();
        let next_sample = found.map_or(0, |(step, cursor)| samples_before(step, &cursor, args.batch as u64));
        let (_, member) = session.agreement().map_err(|error| CheckpointsError::Snapshot(Box::new(error)))?;
        let is_first = member.process == 0;
        let (every, rollbacks, requested, save_time) = (args.checkpoint_every, (0, 0), None, Duration::ZERO);
        Ok(Self { saver, store, every, prints, is_resumed, next_sample, is_first, rollbacks, requested, save_time })
    }

    /// True if the session has the state of a checkpoint.
    pub fn is_resumed(&self) -> bool {
        self.is_resumed
    }

    /// Duration of the last save.
    pub fn save_time(&self) -> Duration {
        self.save_time
    }

    /// Consumes a batch of `count` samples, and returns the number of the first one. No sample is returned twice, for
    /// any batch size before a resume.
    pub fn take(&mut self, count: u64) -> u64 {
        let first = self.next_sample;
        self.next_sample = first.wrapping_add(count);
        first
    }

    /// Returns to the newest checkpoint after a step that was not finite. Training continues with the samples after the
    /// bad batch: neither that batch nor those since the checkpoint are trained on again. All processes must call it.
    ///
    /// # Errors
    /// When there is no checkpoint, or after too many rollbacks to it.
    pub fn roll_back(&mut self, session: &mut Session, found: &NonFinite) -> Result<(), CheckpointsError> {
        if let Some(report) = self.saver.wait(LAST_SAVE_LIMIT).ok().flatten() {
            self.report_save(&report)?;
        }
        let Some((step, _)) = restore(&self.store, session, self.prints)? else {
            return Err(CheckpointsError::NoCheckpoint(Box::new(found.clone())));
        };
        let (last, times) = self.rollbacks;
        self.rollbacks = (step, if last == step { times + 1 } else { 1 });
        if self.rollbacks.1 > ROLLBACKS_MAX {
            return Err(CheckpointsError::TooManyRollbacks { step, found: Box::new(found.clone()) });
        }
        // A process that dies before the next save must not train on the bad batch again.
        if self.is_first
            && let Err(error) = self.store.set_cursor(step, self.cursor())
        {
            note(format!("warning: a restart before the next checkpoint will train on the bad batch again: {error}"));
        }
        Ok(())
    }

    /// Starts a save if one is due or requested, and reports saves that have ended. After the last step, waits for the
    /// save.
    ///
    /// # Errors
    /// When no snapshot can be taken, or the last save failed. An earlier save that fails is only reported.
    pub fn after_step(&mut self, session: &Session, request: Request, is_last: bool) -> Result<(), CheckpointsError> {
        if let Some(report) = self.saver.poll() {
            self.report_save(&report)?;
        }
        if !is_last && request == Request::Nothing && !session.steps().is_multiple_of(self.every) {
            return Ok(());
        }
        self.requested = (request != Request::Nothing).then(|| session.steps()).or(self.requested);
        let start = self.saver.save(session, self.cursor()).map_err(|e| CheckpointsError::Snapshot(Box::new(e)))?;
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

    fn last_error(&self, cause: CheckpointError) -> CheckpointsError {
        let newest = self.store.newest().ok().and_then(|newest| newest.reader);
        CheckpointsError::Last { cause, newest: newest.map(|reader| reader.manifest().step) }
    }

    /// Prints the outcome of a save. A run that has lost the lock cannot save any more, so this is an error.
    fn report_save(&mut self, report: &SaveReport) -> Result<(), CheckpointsError> {
        self.save_time = Duration::from_secs_f64(report.seconds);
        let warn = |text: String| {
            if self.prints {
                note(format!("warning: {text}"))
            }
        };
        match &report.result {
            Ok(_) => {
                if self.prints && self.requested == Some(report.step) {
                    note(format!("checkpoint of step {} saved in {}, on request", report.step, self.store.place()));
                }
                // The launcher gives up restarts without progress. Without a launcher this does nothing.
                if let Err(error) = exit::progress(report.step) {
                    note(format!("warning: cannot report step {} to the launcher: {error}", report.step));
                }
            }
            Err(CheckpointError::Fenced { place, holder }) => {
                let (place, holder) = (place.clone(), holder.clone());
                return Err(CheckpointsError::Fenced(CheckpointError::Fenced { place, holder }));
            }
            Err(error) => warn(format!("the checkpoint of step {} is not saved: {error}", report.step)),
        }
        if let Some(error) = &report.prune {
            warn(format!("cannot delete older checkpoints: {error}"));
        }
        Ok(())
    }
}

/// Samples that were consumed before a checkpoint of `step`.
fn samples_before(step: u64, cursor: &Cursor, batch: u64) -> u64 {
    let number = |key: &str| cursor.get(key).and_then(|count| count.parse::<u64>().ok());
    let from_batches = || step.saturating_add(number(SKIPPED_BATCHES).unwrap_or(0)).wrapping_mul(batch);
    number(SAMPLES).unwrap_or_else(from_batches)
}

/// Loads the newest intact checkpoint, and returns its step and cursor.
fn restore(store: &Store, session: &mut Session, prints: bool) -> Result<Option<(u64, Cursor)>, CheckpointsError> {
    let restored = session.restore_newest(store).map_err(|e| CheckpointsError::Load(Box::new(e)))?;
    if prints {
        restored.damaged.iter().for_each(|error| note(format!("warning: checkpoint skipped: {error}")));
        restored.notes.iter().for_each(|line| note(format!("warning: {line}")));
    }
    if let Some((step, _)) = restored.found.as_ref().filter(|_| prints) {
        note(format!("continuing from step {step} in {}", store.place()));
    }
    Ok(restored.found)
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
    fn hints_fit_the_cause() {
        let io = |kind: ErrorKind| CheckpointError::Io { path: "x".into(), source: kind.into() };
        for (error, expected) in [
            (io(ErrorKind::StorageFull), "free space"),
            (io(ErrorKind::ReadOnlyFilesystem), "may write"),
            (CheckpointError::NotShared { place: "x".into(), ranks: "rank 1".into() }, "all nodes share"),
        ] {
            assert!(hint(&error).contains(expected), "{error}: {}", hint(&error));
        }
        assert!(read_hint(ErrorKind::PermissionDenied).contains("may read"));
        assert!(write_hint(ErrorKind::PermissionDenied).contains("may write"));
        let room = |checkpoints| CheckpointError::NoRoom { place: "x".into(), checkpoints, why: String::new() };
        assert!(hint(&room(2)).contains("--checkpoint-keep") && !hint(&room(1)).contains("--checkpoint-keep"));
        // An unknown cause has no hint.
        assert_eq!(hint(&io(ErrorKind::Other)), "");
        let last = |newest| CheckpointsError::Last { cause: io(ErrorKind::StorageFull), newest };
        assert!(last(Some(4)).to_string().ends_with("; the newest is of step 4"), "{}", last(Some(4)));
        assert!(last(None).to_string().ends_with("; there is no other"), "{}", last(None));
    }
}
