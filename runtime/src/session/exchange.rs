//! What the programs of all processes give each other, sorted by port: peers may be a step ahead of each other with what they
//! give. Imports `session::hosting` and the actors' `remote`.

use std::collections::{BTreeMap, VecDeque};

use crossbeam_channel::Receiver;
use shardflow_actors::remote::HostPiece;
use shardflow_kernels::tensor::HostTensor;

use super::hosting::HostPorts;

/// Pieces that have come, of this process's own ports too.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) ports: HostPorts,
    pub(super) pieces: Receiver<HostPiece>,
    waiting: BTreeMap<u32, VecDeque<Vec<HostTensor>>>,
}

impl Inbox {
    pub(super) fn new(ports: HostPorts, pieces: Receiver<HostPiece>) -> Self {
        Self { ports, pieces, waiting: BTreeMap::new() }
    }

    pub(super) fn put(&mut self, piece: HostPiece) {
        self.waiting.entry(piece.port).or_default().push_back(piece.tensors);
    }

    /// True when each port has as many pieces as are wanted of it.
    pub(super) fn has(&self, wanted: &[(u32, usize)]) -> bool {
        wanted.iter().all(|(port, count)| self.waiting.get(port).map_or(0, VecDeque::len) >= *count)
    }

    /// The oldest pieces of a port; no more than there are.
    pub(super) fn take(&mut self, port: u32, count: usize) -> Vec<Vec<HostTensor>> {
        let Some(pieces) = self.waiting.get_mut(&port) else { return Vec::new() };
        pieces.drain(..count.min(pieces.len())).collect()
    }
}
