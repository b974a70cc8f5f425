//! The checkpoints of a training: go on from the newest, save in the background, tell how it went. Imports `shardflow` and
//! `args`, `log`.

use std::time::Duration;

use shardflow::checkpoint::{Begun, CheckpointError, Cursor, SaveReport, Saver, SaverOptions, Store};
use shardflow::exit;
use shardflow::prelude::*;

use crate::args::GptArgs;
use crate::log::note;

/// Where the cursor of a checkpoint tells of batches that were passed over before it.
const PASSED_OVER: &str = "batches_passed_over";

/// How often one checkpoint is gone back to before the training is given up.
const ROLLBACKS_MAX: u32 = 3;

/// How long the last save may take.
const LAST_SAVE: Duration = Duration::from_secs(600);

/// Why checkpoints cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointsError {
    /// What is there cannot be loaded.
    #[error("--checkpoint {0}")]
    Load(Box<SessionError>),
    /// The place cannot be used.
    #[error("--checkpoint {0}")]
    Place(CheckpointError),
    /// A snapshot could not be taken, or there is no memory for one.
    #[error(transparent)]
    Snapshot(Box<SessionError>),
    /// A step was not finite, and there is nothing to go back to.
    #[error("{0}, and there is no checkpoint yet")]
    NoWayBack(Box<NonFinite>),
    /// A step was not finite, again and again.
    #[error("gone back to step {step} {ROLLBACKS_MAX} times, and again {found}")]
    NoHelp {
        /// The checkpoint's.
        step: u64,
        /// The last one.
        found: Box<NonFinite>,
    },
    /// The last checkpoint was not committed.
    #[error("the last checkpoint is lost: {0}")]
    Last(CheckpointError),
}

impl CheckpointsError {
    /// The code that the program ends with.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Load(error) | Self::Snapshot(error) => error.exit(),
            Self::Place(error) => Exit::from_code(error.exit_code()),
            Self::NoWayBack(_) | Self::NoHelp { .. } => Exit::Numerics,
            Self::Last(_) => Exit::CannotWrite,
        }
    }

    /// What became of the session meanwhile, if that is it.
    pub fn session(&self) -> Option<&SessionError> {
        match self {
            Self::Load(error) | Self::Snapshot(error) => Some(error),
            _ => None,
        }
    }

    /// What the user can change.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Load(_) => "train with the flags that the checkpoint was made with, or give another --checkpoint",
            Self::Place(_) => "give a folder that can be written to",
            Self::Snapshot(_) => "",
            Self::NoWayBack(_) | Self::NoHelp { .. } => "try a lower --lr, or --clip 1",
            Self::Last(_) => "see that there is room; the one before it is still there",
        }
    }
}

/// The checkpoints of one training.
pub struct Checkpoints {
    saver: Saver,
    store: Store,
    every: u64,
    speaks: bool,
    /// Batches that are left out: step `s` trains on batch `s + passed_over`.
    passed_over: u64,
    /// The step that was gone back to last, and how often.
    rollbacks: (u64, u32),
    /// The step of a save that a request asked for.
    requested: Option<u64>,
    /// How long the last save took.
    save_time: Duration,
}

impl Checkpoints {
    /// Opens the place, and loads the newest good checkpoint into the session, if there is one.
    ///
    /// # Errors
    /// A place that cannot be used, or a checkpoint of another model.
    pub fn open(place: &str, args: &GptArgs, speaks: bool, session: &mut Session) -> Result<Self, CheckpointsError> {
        let store = Store::open(place).map_err(CheckpointsError::Place)?;
        let found = restore(&store, session, speaks)?;
        let passed_over = found.map_or(0, |(_, passed_over)| passed_over);
        let (agree, member) = session.agreement().map_err(|error| CheckpointsError::Snapshot(Box::new(error)))?;
        let plan = Some(session.plan().hash().to_string());
        let options = SaverOptions { member, keep: args.checkpoint_keep, plan, ..SaverOptions::default() };
        let saver = Saver::new(store.clone(), agree, options).map_err(CheckpointsError::Place)?;
        let (every, rollbacks, requested, save_time) = (args.checkpoint_every, (0, 0), None, Duration::ZERO);
        Ok(Self { saver, store, every, speaks, passed_over, rollbacks, requested, save_time })
    }

    /// How long the last save took.
    pub fn save_time(&self) -> Duration {
        self.save_time
    }

    /// The batch that a step trains on.
    pub fn batch(&self, step: u64) -> u64 {
        step + self.passed_over
    }

    /// Goes back to the newest checkpoint because of a step that was not finite; its batch, and those between, are not
    /// trained on again. All processes call it.
    ///
    /// # Errors
    /// When there is no checkpoint, or going back to it has not helped.
    pub fn roll_back(&mut self, session: &mut Session, found: &NonFinite) -> Result<(), CheckpointsError> {
        if let Some(report) = self.saver.wait(LAST_SAVE).ok().flatten() {
            self.tell(&report);
        }
        let Some((step, _)) = restore(&self.store, session, self.speaks)? else {
            return Err(CheckpointsError::NoWayBack(Box::new(found.clone())));
        };
        let (last, times) = self.rollbacks;
        self.rollbacks = (step, if last == step { times + 1 } else { 1 });
        if self.rollbacks.1 > ROLLBACKS_MAX {
            return Err(CheckpointsError::NoHelp { step, found: Box::new(found.clone()) });
        }
        self.passed_over = self.batch(found.step) + 1 - step;
        Ok(())
    }

    /// Begins a save where one is due or requested, and tells of those that have ended. The last one is waited for.
    ///
    /// # Errors
    /// When no snapshot can be taken, or the last save failed; a save that fails before is told, and training goes on.
    pub fn after_step(&mut self, session: &Session, request: Request, is_last: bool) -> Result<(), CheckpointsError> {
        if let Some(report) = self.saver.poll() {
            self.tell(&report);
        }
        if !is_last && request == Request::Nothing && !session.steps().is_multiple_of(self.every) {
            return Ok(());
        }
        self.requested = (request != Request::Nothing).then(|| session.steps()).or(self.requested);
        let cursor = Cursor::from([(PASSED_OVER.to_string(), self.passed_over.to_string())]);
        let begun = self.saver.save(session, cursor).map_err(|e| CheckpointsError::Snapshot(Box::new(e)))?;
        if let Begun::Started { before: Some(report) } = begun {
            self.tell(&report);
        }
        if !is_last {
            return Ok(());
        }
        match self.saver.wait(LAST_SAVE).map_err(CheckpointsError::Last)? {
            None => Ok(()),
            Some(report) => {
                self.tell(&report);
                report.result.map(drop).map_err(CheckpointsError::Last)
            }
        }
    }

    fn tell(&mut self, report: &SaveReport) {
        self.save_time = Duration::from_secs_f64(report.seconds);
        match &report.result {
            Ok(_) => {
                if self.speaks && self.requested == Some(report.step) {
                    note(format!("checkpoint of step {} saved in {}, on request", report.step, self.store.place()));
                }
                // Tells the launcher that restarts get somewhere; without one it does nothing.
                if let Err(error) = exit::progress(report.step) {
                    note(format!("warning: cannot tell the launcher of step {}: {error}", report.step));
                }
            }
            Err(error) if self.speaks => {
                note(format!("warning: no checkpoint of step {}: {error}", report.step));
            }
            Err(_) => {}
        }
    }
}

/// Loads the newest good checkpoint: its step, and the batches that were passed over before it.
fn restore(store: &Store, session: &mut Session, speaks: bool) -> Result<Option<(u64, u64)>, CheckpointsError> {
    let restored = session.restore_newest(store).map_err(|e| CheckpointsError::Load(Box::new(e)))?;
    if speaks {
        restored.damaged.iter().for_each(|error| note(format!("warning: passed over: {error}")));
    }
    let Some((step, cursor)) = restored.found else { return Ok(None) };
    if speaks {
        note(format!("going on from step {step} in {}", store.place()));
    }
    Ok(Some((step, cursor.get(PASSED_OVER).and_then(|count| count.parse().ok()).unwrap_or(0))))
}
