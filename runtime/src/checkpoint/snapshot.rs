//! A snapshot: a copy in host memory of a process's state between two steps, written while training continues.

use shardflow_kernels::tensor::{HostTensor, Region};

use super::manifest::Manifest;

/// A process's part of a checkpoint, and the metadata of the whole checkpoint.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The checkpoint's manifest, without shards and pieces, which the commit adds. The same for all processes, except
    /// for the cursor: only that of process 0 is written.
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
