//! A snapshot: a copy in host memory of a process's state between two steps, written while training continues.

use shardflow_kernels::tensor::{HostTensor, Region};

use super::manifest::Manifest;

/// A process's part of a checkpoint, and the metadata of the whole checkpoint.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The manifest; the commit adds shards and pieces. Equal on all processes, but only process 0 provides the cursor.
    pub manifest: Manifest,
    /// The pieces that this process writes.
    pub pieces: Vec<SnapshotPiece>,
}

/// A box of a tensor.
#[derive(Clone, Debug)]
pub struct SnapshotPiece {
    /// Index in [`Manifest::tensors`].
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
