//! Rings: each member sends to the next member and receives from the previous one. Reductions and gathers take one trip
//! around the ring, and an all-reduce takes two trips.
//!
//! Data that member c owns is combined on its way around the ring from member c+1 to member c: each member adds its own
//! values. This is the order of [`crate::collective::Group`]. The data is sent in rounds, each small enough for the two
//! slots and the cache.

use super::flow::{Flow, In, Out, PIECE_WORDS, Part, Source, Target};
use super::port::Port;
use crate::collective::ReduceOp;
use crate::error::Result;
use crate::memory::Words;
use crate::region::Runs;
use crate::tensor::{Region, split_range};

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

pub(super) fn all_reduce(port: &mut Port, words: &mut Words<'_>, slots: &mut [f32], op: ReduceOp) -> Result<()> {
    let (all, n) = (words.y.len(), port.members());
    let mut ring = Ring::new(port, op, (0..n).map(|owner| Runs::flat(split_range(all, n, owner))));
    let own = split_range(all, n, port.context.member).start;
    for round in 0..ring.rounds() {
        ring.reduce(round, own);
        ring.gather(round, true);
    }
    ring.run(port, words, slots)
}

/// Ring reduce-scatter; x has the shape `whole`.
pub(super) fn reduce_scatter(
    port: &mut Port,
    words: &mut Words<'_>,
    slots: &mut [f32],
    op: ReduceOp,
    (whole, parts): (&[usize], &[Region]),
) -> Result<()> {
    let mut ring = Ring::new(port, op, parts.iter().map(|part| Runs::new(whole, part)));
    for round in 0..ring.rounds() {
        ring.reduce(round, 0);
    }
    ring.run(port, words, slots)
}

/// Ring all-gather of parts that do not overlap; y has the shape `whole`.
pub(super) fn all_gather(
    port: &mut Port,
    words: &mut Words<'_>,
    slots: &mut [f32],
    (whole, parts): (&[usize], &[Region]),
) -> Result<()> {
    // A gather combines nothing, so the operation does not matter.
    let mut ring = Ring::new(port, ReduceOp::Sum, parts.iter().map(|part| Runs::new(whole, part)));
    let own = Runs::new(whole, &parts[port.context.member]);
    let (x, y) = words.split();
    if let Some(x) = x {
        own.for_each(0..x.len(), |place, at, len| y[place..][..len].copy_from_slice(&x[at..][..len]));
    }
    for round in 0..ring.rounds() {
        ring.gather(round, false);
    }
    ring.run(port, words, slots)
}

impl Ring {
    fn new(port: &Port, op: ReduceOp, boxes: impl Iterator<Item = Runs>) -> Self {
        let mut flow = Flow::new(op);
        let boxes = boxes.map(|runs| flow.add_box(runs)).collect();
        Self { flow, member: port.context.member, members: port.members(), boxes }
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

    fn push_out(&mut self, from: Source, part: &Part, forwards: bool) {
        self.flow.outs.push(Out { from, words: part.range.len(), forwards });
    }

    fn push_in(&mut self, to: Target, part: &Part) {
        self.flow.ins.push(In { to, words: part.range.len() });
    }

    /// One round of a reduction. The result is written to y from `own_start` on.
    fn reduce(&mut self, round: usize, own_start: usize) {
        for step in 0..self.members - 1 {
            let (sent, received) = (self.part(step + 1, round), self.part(step + 2, round));
            let first = self.flow.contiguous(&sent).map_or_else(|| Source::Pack(sent.clone()), Source::X);
            self.push_out(if step == 0 { first } else { Source::Slot }, &sent, step > 0);
            let start = own_start + received.range.start;
            let is_own = step + 2 == self.members;
            let to = if is_own { Target::Finish(received.clone(), start) } else { Target::Combine(received.clone()) };
            self.push_in(to, &received);
        }
    }

    /// One round of a gather. This member's own part is in y if `reduced`, else in x.
    fn gather(&mut self, round: usize, reduced: bool) {
        for step in 0..self.members - 1 {
            let (sent, received) = (self.part(step, round), self.part(step + 1, round));
            let from = match self.flow.contiguous(&sent) {
                _ if step == 0 && !reduced => Source::X(sent.range.clone()),
                Some(place) => Source::Y(place),
                None => Source::Slot,
            };
            self.push_out(from, &sent, step > 0 || reduced);
            let to = self.flow.contiguous(&received).map_or_else(|| Target::Unpack(received.clone()), Target::Y);
            self.push_in(to, &received);
        }
    }

    fn run(&self, port: &mut Port, words: &mut Words<'_>, slots: &mut [f32]) -> Result<()> {
        let [next, previous] = neighbours(self.members, self.member);
        self.flow.run(port, words, slots, Some(next), Some(previous))
    }
}
