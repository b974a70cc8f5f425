//! A snapshot: a copy of a process's state between two steps, in host memory. It is written while training continues.

use shardflow_kernels::tensor::{HostTensor, Region};

use super::manifest::Manifest;

/// A process's part of a checkpoint, and the metadata of the whole checkpoint.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The manifest, to which the commit adds shards and pieces. Equal on all processes; only process 0's cursor is
    /// used.
    pub manifest: Manifest,
    /// The pieces that this process writes.
    pub pieces: Vec<SnapshotPiece>,
}

/// A box of a tensor.
#[derive(Clone, Debug)]
pub struct SnapshotPiece {
    /// Index in [`Manifest::tensors`].
    pub tensor: usize,
    /// The box.
    pub region: Region,
    /// The elements of the box.
    pub data: HostTensor,
}

impl Snapshot {
    /// Bytes of all elements.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|p| p.data.elements_held() as u64 * p.data.dtype().bytes() as u64).sum()
    }
}
