//! The checkpoints of a training: go on from the newest, save in the background, tell how it went. Imports `shardflow` and
//! `args`.

use std::time::Duration;

use shardflow::checkpoint::{Begun, CheckpointError, Cursor, SaveReport, Saver, SaverOptions, Store};
use shardflow::exit;
use shardflow::prelude::*;

use crate::args::GptArgs;

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
    /// A snapshot could not be taken.
    #[error(transparent)]
    Snapshot(Box<SessionError>),
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
            Self::Last(_) => Exit::CannotWrite,
        }
    }

    /// What the user can change.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Load(_) => "train with the flags that the checkpoint was made with, or give another --checkpoint",
            Self::Place(_) => "give a folder that can be written to",
            Self::Snapshot(_) => "",
            Self::Last(_) => "see that there is room; the one before it is still there",
        }
    }
}

/// The checkpoints of one training.
pub struct Checkpoints {
    saver: Saver,
    every: u64,
    speaks: bool,
}

impl Checkpoints {
    /// Opens the place, and loads the newest good checkpoint into the session, if there is one.
    ///
    /// # Errors
    /// A place that cannot be used, or a checkpoint of another model.
    pub fn open(place: &str, args: &GptArgs, speaks: bool, session: &mut Session) -> Result<Self, CheckpointsError> {
        let store = Store::open(place).map_err(CheckpointsError::Place)?;
        let restored = session.restore_newest(&store).map_err(|e| CheckpointsError::Load(Box::new(e)))?;
        if speaks {
            restored.damaged.iter().for_each(|error| eprintln!("warning: passed over: {error}"));
            if let Some((step, _)) = restored.found {
                eprintln!("going on from step {step} in {place}");
            }
        }
        let (agree, member) = session.agreement();
        let plan = Some(session.plan().hash().to_string());
        let options = SaverOptions { member, keep: args.checkpoint_keep, plan, ..SaverOptions::default() };
        let saver = Saver::new(store, agree, options).map_err(CheckpointsError::Place)?;
        Ok(Self { saver, every: args.checkpoint_every, speaks })
    }

    /// Begins a save where one is due, and tells of those that have ended. The last one is waited for.
    ///
    /// # Errors
    /// When no snapshot can be taken, or the last save failed; a save that fails before is told, and training goes on.
    pub fn after_step(&mut self, session: &Session, is_last: bool) -> Result<(), CheckpointsError> {
        if let Some(report) = self.saver.poll() {
            self.tell(&report);
        }
        if !is_last && !session.steps().is_multiple_of(self.every) {
            return Ok(());
        }
        let begun = self.saver.save(session, Cursor::new()).map_err(|e| CheckpointsError::Snapshot(Box::new(e)))?;
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

    fn tell(&self, report: &SaveReport) {
        match &report.result {
            Ok(_) => {
                // Tells the launcher that restarts get somewhere; without one it does nothing.
                if let Err(error) = exit::progress(report.step) {
                    eprintln!("warning: cannot tell the launcher of step {}: {error}", report.step);
                }
            }
            Err(error) if self.speaks => eprintln!("warning: no checkpoint of step {}: {error}", report.step),
            Err(_) => {}
        }
    }
}
