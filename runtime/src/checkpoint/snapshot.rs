//! A snapshot: what a process's devices held between two steps, in host memory, so that it can be written while training
//! goes on.

use shardflow_kernels::tensor::{HostTensor, Region};

use super::manifest::{Cursor, JobTime, TensorMeta};
use crate::declare::Values;

/// A process's part of a checkpoint, and what is known of the whole.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Steps done.
    pub step: u64,
    /// Updates applied.
    pub updates: u64,
    /// The session's seed.
    pub seed: u64,
    /// The mesh.
    pub mesh: String,
    /// The user's own; only that of process 0 is written.
    pub cursor: Cursor,
    /// What the program declared.
    pub declared: Values,
    /// What the job has made of its time.
    pub job: JobTime,
    /// Every tensor of the checkpoint, the same for all processes.
    pub tensors: Vec<TensorMeta>,
    /// What this process writes.
    pub pieces: Vec<SnapshotPiece>,
}

/// A box of a tensor.
#[derive(Clone, Debug)]
pub struct SnapshotPiece {
    /// Index in [`Snapshot::tensors`].
    pub tensor: usize,
    /// Which part of it.
    pub region: Region,
    /// Its elements.
    pub data: HostTensor,
}

impl Snapshot {
    /// Bytes of all elements.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|p| p.data.elements_held() as u64 * p.data.dtype().bytes() as u64).sum()
    }
}
