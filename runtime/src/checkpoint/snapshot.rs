//! A snapshot: a copy in host memory of the state of a process's devices between two steps, which can be written while
//! training continues.

use shardflow_kernels::tensor::{HostTensor, Region};

use super::manifest::{Cursor, JobTime, TensorMeta};
use crate::declare::Values;

/// A process's part of a checkpoint, and the metadata of the whole checkpoint.
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
    /// The program's cursor; only that of process 0 is written.
    pub cursor: Cursor,
    /// Values that the program declared.
    pub declared: Values,
    /// Time statistics of the job.
    pub job: JobTime,
    /// Every tensor of the checkpoint, the same for all processes.
    pub tensors: Vec<TensorMeta>,
    /// The pieces that this process writes.
    pub pieces: Vec<SnapshotPiece>,
}

/// A box of a tensor.
#[derive(Clone, Debug)]
pub struct SnapshotPiece {
    /// Index in [`Snapshot::tensors`].
    pub tensor: usize,
    /// Its region of the tensor.
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
