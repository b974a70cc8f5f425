//! Checkpoints of a training run: each process writes a shard. The atomic creation of a manifest commits all shards.
//!
//! [`Store`] defines the invariants and the location of files. A [`Saver`] writes a snapshot and commits it. A
//! [`CheckpointReader`] reads any box of a tensor, for any mesh. `Session::save` writes a safetensors file of a whole
//! model, and [`convert::export`] converts a checkpoint to such a file.

pub(crate) mod agreement;
#[cfg(feature = "cli")]
pub mod cli;
pub mod convert;
pub mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub(crate) mod io;
pub mod manifest;
pub(crate) mod newest;
pub(crate) mod options;
pub(crate) mod read;
pub(crate) mod save;
pub(crate) mod saver;
pub(crate) mod shard;
pub mod snapshot;
pub(crate) mod store;

pub use crate::clock::{SimulatedClock, WaitClock};
pub use agreement::{ProcessRank, SaveAgreement, SaveId, SaveOutcome, SingleProcess};
pub use error::{AgreeError, CheckpointError};
pub use manifest::{Cursor, Manifest};
pub use newest::NewestCheckpoint;
pub use options::{SaveSchedule, SaverOptions, WhenBusy};
pub use read::CheckpointReader;
pub use save::SaveReport;
pub use saver::{SaveStart, Saver, save_now};
pub use snapshot::Snapshot;
pub use store::Store;
