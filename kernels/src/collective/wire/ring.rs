//! All-gather on a ring: each member sends to the next member and receives from the previous one, until the parts have
//! made one trip around the ring. They are sent in rounds, each small enough for the two slots and the cache.

use super::flow::{Flow, In, PIECE_WORDS, Part, Source, Target};
use super::port::Port;
use crate::error::Result;
use crate::memory::Words;
use crate::region::Runs;
use crate::tensor::Region;

/// The pieces that travel around the ring, by owner.
struct Ring {
    flow: Flow,
    member: usize,
    members: usize,
    /// For each member: the index in [`Flow::boxes`] of the box that the member owns in the shared tensor.
    boxes: Vec<usize>,
}

/// The next member, to which `member` sends, and the previous member.
pub(super) fn neighbours(members: usize, member: usize) -> [usize; 2] {
    [(member + 1) % members, (member + members - 1) % members]
}

/// Ring all-gather of parts that do not overlap; y has the shape `whole`.
pub(super) fn all_gather(
    port: &mut Port,
    words: &mut Words<'_>,
    slots: &mut [f32],
    (whole, parts): (&[usize], &[Region]),
) -> Result<()> {
    let mut ring = Ring::new(port, parts.iter().map(|part| Runs::new(whole, part)));
    let own = Runs::new(whole, &parts[port.context.member]);
    let (x, y) = words.split();
    if let Some(x) = x {
        own.for_each(0..x.len(), |place, at, len| y[place..][..len].copy_from_slice(&x[at..][..len]));
    }
    for round in 0..ring.rounds() {
        ring.gather(round);
    }
    ring.flow.run(port, words, slots)
}

impl Ring {
    fn new(port: &Port, boxes: impl Iterator<Item = Runs>) -> Self {
        let (member, members) = (port.context.member, port.members());
        let [next, previous] = neighbours(members, member);
        let mut flow = Flow::new([next], [previous]);
        flow.is_ring = true;
        let boxes = boxes.map(|runs| flow.add_box(runs)).collect();
        Self { flow, member, members, boxes }
    }

    /// Number of rounds that the largest part needs.
    fn rounds(&self) -> usize {
        let largest = self.flow.boxes.iter().map(Runs::element_count).max().unwrap_or(0);
        largest.div_ceil(PIECE_WORDS)
    }

    /// This round's part of the data whose owner is `back` positions before this member.
    fn part(&self, back: usize, round: usize) -> Part {
        let owner = (self.member + 2 * self.members - back) % self.members;
        let runs = self.boxes[owner];
        let all = self.flow.boxes[runs].element_count();
        Part { runs, range: all.min(round * PIECE_WORDS)..all.min((round + 1) * PIECE_WORDS) }
    }

    /// One round of the gather.
    fn gather(&mut self, round: usize) {
        let [_, previous] = neighbours(self.members, self.member);
        for step in 0..self.members - 1 {
            let (sent, received) = (self.part(step, round), self.part(step + 1, round));
            let from = match self.flow.contiguous(&sent) {
                _ if step == 0 => Source::X(sent.range.clone()),
                Some(place) => Source::Y(place),
                None => Source::Slot,
            };
            let after = (step > 0).then(|| self.flow.ins.len() - 1);
            self.flow.push_out(0, sent.range.len(), from, after);
            let words = received.range.len();
            let to = self.flow.contiguous(&received).map_or_else(|| Target::Unpack(received), Target::Y);
            self.flow.ins.push(In { from: previous, to, words });
        }
    }
}
