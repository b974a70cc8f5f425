//! What the programs of all processes give each other, sorted by port: peers may be a step ahead of each other with what they
//! give. Imports `session::hosting` and the actors' `remote`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crossbeam_channel::Receiver;
use shardflow_actors::remote::{FromPeer, HostPiece};
use shardflow_kernels::tensor::HostTensor;

use super::hosting::{HostPorts, WORD_INTEGERS};

/// Pieces that have come, of this process's own ports too.
#[derive(Debug)]
pub(super) struct Inbox {
    ports: Arc<HostPorts>,
    pub(super) peers: Receiver<FromPeer>,
    waiting: BTreeMap<u32, VecDeque<Vec<HostTensor>>>,
    /// Processes from which nothing more comes.
    ended: BTreeSet<u32>,
}

impl Inbox {
    pub(super) fn new(ports: Arc<HostPorts>, peers: Receiver<FromPeer>) -> Self {
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

    /// The oldest word of each process, by number.
    pub(super) fn take_words(&mut self) -> Vec<Word> {
        let ports = self.ports.clone();
        let word = |port: &u32| self.take(*port, 1).into_iter().flatten().next().map_or([0; 2], word_of);
        ports.words.iter().map(word).collect()
    }

    /// A process that has ended without giving what is wanted of it.
    pub(super) fn never(&self, wanted: &[(u32, usize)]) -> Option<u32> {
        let missing = |(port, count): &&(u32, usize)| self.waiting.get(port).map_or(0, VecDeque::len) < *count;
        let giver = |(port, _): &(u32, usize)| self.ports.ports[*port as usize].process;
        wanted.iter().filter(missing).map(giver).find(|process| self.ended.contains(process))
    }

    /// The first process of which something wanted has not come.
    pub(super) fn giver(&self, wanted: &[(u32, usize)]) -> Option<u32> {
        let missing = |(port, count): &&(u32, usize)| self.waiting.get(port).map_or(0, VecDeque::len) < *count;
        wanted.iter().find(missing).map(|(port, _)| self.ports.ports[*port as usize].process)
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

/// What a process tells all others between steps.
pub(super) type Word = [u64; 2];

/// A word as the tensor that carries it.
pub(super) fn tensor_of(word: Word) -> HostTensor {
    let halves = word.iter().flat_map(|number| [*number as u32 as i32, (number >> 32) as i32]).collect();
    HostTensor::i32(&[WORD_INTEGERS], halves)
}

fn word_of(tensor: HostTensor) -> Word {
    let halves = tensor.as_i32().unwrap_or_default();
    let number = |at: usize| {
        let half = |at: usize| u64::from(halves.get(at).copied().unwrap_or_default() as u32);
        half(at) | half(at + 1) << 32
    };
    [number(0), number(2)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back() {
        for word in [[0, 0], [1, u64::MAX], [u64::MAX - 1, 1 << 32], [0x8000_0000, 0x1234_5678_9abc_def0]] {
            assert_eq!(word_of(tensor_of(word)), word);
        }
    }
}
