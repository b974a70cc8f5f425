//! What the programs of all processes give each other, sorted by port: peers may be a step ahead of each other with what they
//! give. Imports `session::hosting` and the actors' `remote`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crossbeam_channel::Receiver;
use shardflow_actors::remote::{FromPeer, HostPiece};
use shardflow_kernels::tensor::HostTensor;

use super::hosting::HostPorts;

/// Pieces that have come, of this process's own ports too.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) ports: HostPorts,
    pub(super) peers: Receiver<FromPeer>,
    waiting: BTreeMap<u32, VecDeque<Vec<HostTensor>>>,
    /// Processes from which nothing more comes.
    ended: BTreeSet<u32>,
}

impl Inbox {
    pub(super) fn new(ports: HostPorts, peers: Receiver<FromPeer>) -> Self {
        Self { ports, peers, waiting: BTreeMap::new(), ended: BTreeSet::new() }
    }

    pub(super) fn hear(&mut self, said: FromPeer) {
        match said {
            FromPeer::Piece(piece) => self.put(piece),
            FromPeer::Ended { process } => drop(self.ended.insert(process)),
        }
    }

    pub(super) fn put(&mut self, piece: HostPiece) {
        self.waiting.entry(piece.port).or_default().push_back(piece.tensors);
    }

    /// A process that has ended without giving what is wanted of it.
    pub(super) fn never(&self, wanted: &[(u32, usize)]) -> Option<u32> {
        let missing = |(port, count): &&(u32, usize)| self.waiting.get(port).map_or(0, VecDeque::len) < *count;
        let giver = |(port, _): &(u32, usize)| self.ports.ports[*port as usize].process;
        wanted.iter().filter(missing).map(giver).find(|process| self.ended.contains(process))
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
