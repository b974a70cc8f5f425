//! Queues the host data of all processes by port, because a peer may be one step ahead of this process.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crossbeam_channel::Receiver;
use shardflow_actors::remote::{HostPiece, PeerMessage};
use shardflow_kernels::tensor::HostTensor;

use super::ports::HostPorts;

/// Received pieces, including those of this process's own ports.
#[derive(Debug)]
pub(super) struct Inbox {
    ports: Arc<HostPorts>,
    pub(super) peers: Receiver<PeerMessage>,
    waiting: BTreeMap<u32, VecDeque<Arc<HostPiece>>>,
    /// Processes that will send no more pieces.
    pub(super) ended: BTreeSet<u32>,
}

impl Inbox {
    pub(super) fn new(ports: Arc<HostPorts>, peers: Receiver<PeerMessage>) -> Self {
        Self { ports, peers, waiting: BTreeMap::new(), ended: BTreeSet::new() }
    }

    pub(super) fn receive(&mut self, message: PeerMessage) {
        match message {
            PeerMessage::Piece(piece) => self.put(piece),
            PeerMessage::Ended { process } => drop(self.ended.insert(process)),
        }
    }

    pub(super) fn put(&mut self, piece: Arc<HostPiece>) {
        self.waiting.entry(piece.port).or_default().push_back(piece);
    }

    /// Returns the senders of missing pieces. `wanted` has each port with its number of pieces.
    pub(super) fn missing_senders(&self, wanted: &[(u32, usize)]) -> Vec<u32> {
        let missing = |(port, count): &&(u32, usize)| self.waiting.get(port).map_or(0, VecDeque::len) < *count;
        wanted.iter().filter(missing).map(|(port, _)| self.ports.sender(*port)).collect()
    }

    /// Removes and returns up to `count` of a port's oldest pieces.
    pub(super) fn take(&mut self, port: u32, count: usize) -> Vec<Vec<HostTensor>> {
        let Some(pieces) = self.waiting.get_mut(&port) else { return Vec::new() };
        let tensors = |piece| {
            Arc::try_unwrap(piece).map_or_else(|piece: Arc<HostPiece>| piece.tensors.clone(), |piece| piece.tensors)
        };
        pieces.drain(..count.min(pieces.len())).map(tensors).collect()
    }
}
