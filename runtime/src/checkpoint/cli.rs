//! The commands on checkpoints: `ls`, `verify`, `reshard` and `export`.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Subcommand;

use super::convert::{export, reshard};
use super::error::CheckpointError;
use super::manifest::Manifest;
use super::read::CheckpointReader;
use super::store::Store;
use crate::program::ProgramError;
use shardflow_job::exit::Exit;
use shardflow_job::text::counted;

/// Commands on the checkpoints of a store. DIR is a folder, or a URL such as s3://bucket/path if this binary was built
/// with support for that store.
#[derive(Subcommand, Clone, Debug)]
pub enum CheckpointCommand {
    /// List the committed checkpoints, oldest first
    Ls {
        /// Folder or URL of the checkpoints
        dir: String,
    },
    /// Read every byte and compare checksums. Reports the first damaged file of each checkpoint
    Verify {
        /// Folder or URL of the checkpoints
        dir: String,
        /// Verify only the checkpoint of this step
        #[arg(long)]
        step: Option<u64>,
    },
    /// Copy a checkpoint to another place, with another number of shards
    Reshard {
        /// Folder or URL of the checkpoints
        dir: String,
        /// Folder or URL to write to
        #[arg(long)]
        to: String,
        /// Number of shards
        #[arg(long)]
        shards: u32,
        /// Step of the checkpoint [default: the newest complete one]
        #[arg(long)]
        step: Option<u64>,
    },
    /// Write a checkpoint as one safetensors file
    Export {
        /// Folder or URL of the checkpoints
        dir: String,
        /// File to write
        file: PathBuf,
        /// Step of the checkpoint [default: the newest complete one]
        #[arg(long)]
        step: Option<u64>,
    },
}

impl From<CheckpointError> for ProgramError {
    fn from(error: CheckpointError) -> Self {
        Self::new(Exit::from_code(error.exit_code()), error.to_string(), "")
    }
}

/// Maximum number of attempts to read the newest checkpoint while a training run replaces it.
const ATTEMPTS_MAX: u32 = 5;

/// Runs a command and returns the text to print.
///
/// # Errors
/// The error contains one or more lines to print, and the exit code.
pub fn run(command: &CheckpointCommand) -> Result<String, ProgramError> {
    match command {
        CheckpointCommand::Ls { dir } => list(&Store::open(dir)?),
        CheckpointCommand::Verify { dir, step } => verify(&Store::open(dir)?, *step),
        CheckpointCommand::Reshard { dir, to, shards, step } => {
            let (reader, text) =
                with_selected(&Store::open(dir)?, *step, |reader| reshard(reader, &Store::open(to)?, *shards))?;
            let (step, from) = (reader.manifest().step, reader.manifest().shards.len());
            Ok(format!("{text}step {step}: {from} -> {} in {to}\n", counted(shards, "shard")))
        }
        CheckpointCommand::Export { dir, file, step } => {
            let exported = with_selected(&Store::open(dir)?, *step, |reader| export(reader, file));
            let (reader, text) = exported.map_err(|error| match error {
                CheckpointError::Io { .. } => ProgramError::new(Exit::CannotWrite, error.to_string(), ""),
                error => error.into(),
            })?;
            let (step, tensors) = (reader.manifest().step, reader.manifest().tensors.len());
            Ok(format!("{text}step {step}: {} in {}\n", counted(tensors, "tensor"), file.display()))
        }
    }
}

/// Opens the checkpoint of `step`, or the newest complete one. Also returns one warning line per damaged checkpoint.
fn select(store: &Store, step: Option<u64>) -> Result<(CheckpointReader, String), CheckpointError> {
    if let Some(step) = step {
        return Ok((store.read(step)?, String::new()));
    }
    let newest = store.newest()?;
    let warnings = newest.damaged.iter().fold(String::new(), |text, error| format!("{text}warning: {error}\n"));
    let absent = || CheckpointError::Absent { place: store.place().into(), step: None };
    Ok((newest.reader.ok_or_else(absent)?, warnings))
}

/// Calls `work` with a checkpoint. If a training run deletes that checkpoint meanwhile, retries with the newest one.
fn with_selected(
    store: &Store,
    step: Option<u64>,
    work: impl Fn(&CheckpointReader) -> Result<(), CheckpointError>,
) -> Result<(CheckpointReader, String), CheckpointError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        let (reader, text) = select(store, step)?;
        match work(&reader) {
            Err(CheckpointError::Deleted { .. }) if step.is_none() && attempts < ATTEMPTS_MAX => {}
            done => return done.map(|()| (reader, text)),
        }
    }
}

/// Returns the steps to process, or an error if there are none.
fn steps(store: &Store, step: Option<u64>) -> Result<Vec<u64>, CheckpointError> {
    let steps = step.map_or_else(|| store.steps(), |step| Ok(vec![step]))?;
    if steps.is_empty() {
        return Err(CheckpointError::Absent { place: store.place().into(), step: None });
    }
    Ok(steps)
}

fn list(store: &Store) -> Result<String, ProgramError> {
    let mut text = format!("{:>12}  {:>6}  {:>6}  {:>14}  {}\n", "step", "epoch", "shards", "bytes", "mesh");
    for step in steps(store, None)? {
        let _ = match store.read(step) {
            Ok(reader) => {
                let Manifest { epoch, mesh, shards, .. } = reader.manifest();
                let bytes = reader.manifest().bytes();
                writeln!(text, "{step:>12}  {epoch:>6}  {:>6}  {bytes:>14}  {mesh}", shards.len())
            }
            Err(error @ (CheckpointError::Damaged { .. } | CheckpointError::Newer { .. })) => {
                writeln!(text, "{step:>12}  {error}")
            }
            // The checkpoint was deleted after the listing.
            Err(CheckpointError::Absent { .. } | CheckpointError::Deleted { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
    }
    Ok(text)
}

fn verify(store: &Store, only: Option<u64>) -> Result<String, ProgramError> {
    let (mut text, mut damaged) = (String::new(), 0);
    let steps = steps(store, only)?;
    for step in &steps {
        let _ = match store.read(*step).and_then(|reader| reader.verify().map(|()| reader)) {
            Ok(reader) => {
                let manifest = reader.manifest();
                let (shards, bytes) = (counted(manifest.shards.len(), "shard"), counted(manifest.bytes(), "byte"));
                writeln!(text, "step {step}: ok, {shards}, {bytes}")
            }
            Err(error) if error.is_damage() => {
                damaged += 1;
                writeln!(text, "step {step}: {error}")
            }
            Err(CheckpointError::Absent { .. } | CheckpointError::Deleted { .. }) if only.is_none() => {
                writeln!(text, "step {step}: deleted during the verification")
            }
            Err(error) => return Err(error.into()),
        };
    }
    if damaged == 0 {
        return Ok(text);
    }
    let checked = counted(steps.len(), "checkpoint");
    Err(ProgramError::new(Exit::BadData, format!("{text}{damaged} of {checked} checkpoints are damaged"), ""))
}
