//! A pipeline of pieces: some go out to one peer while others come in from one, are combined with what the member has,
//! and go on. Rings and pairwise exchanges are lists of pieces.
//!
//! - FLOW-1: pieces go out in order and come in in order; out piece t that passes on what in piece t-1 brought goes as
//!   far as that has come.
//! - FLOW-2: what passes through takes one of two slots in turn. In piece t may take its slot once out pieces `0..t`
//!   have gone, so the slot's last content (in piece t-2, out piece t-1) has. Two slots are enough for a ring to move
//!   always: the member that has sent least can send, since its next has sent no less and so has a slot free.

use std::ops::Range;

use super::port::Port;
use crate::collective::ReduceOp;
use crate::collective::exchange::{combine_into, combine_onto, combine_two};
use crate::error::KernelError;
use crate::memory::Words;
use crate::region::Runs;

/// Words of a piece at most, and of a slot.
pub(super) const PIECE_WORDS: usize = 64 << 10;

/// Slots for what passes through, and one more for what is packed to go out.
pub(super) const SLOTS: usize = 3;

const PACK_SLOT: usize = 2;

/// Bytes that are worth a system call, when more of the piece is to come.
const SEND_BYTES_MIN: usize = 32 << 10;

/// Some elements of a box: `range` counts inside it.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// Index into [`Flow::boxes`].
    pub(super) runs: usize,
    pub(super) range: Range<usize>,
}

/// Where an out piece's words are.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// In one piece in x.
    X(Range<usize>),
    /// In one piece in y.
    Y(Range<usize>),
    /// Strewn over x: packed first.
    Pack(Part),
    /// In the slot of the in piece before it.
    Slot,
}

#[derive(Clone, Debug)]
pub(super) struct Out {
    pub(super) from: Source,
    pub(super) words: usize,
    /// True when it passes on the in piece before it.
    pub(super) passes_on: bool,
}

/// Where an in piece's words go.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// Straight to one piece of y.
    Y(Range<usize>),
    /// To a slot, to be combined there with own words of x.
    Combine(Part),
    /// To a slot; combined with own words of x, the result goes to y from this place on.
    Finish(Part, usize),
    /// To a slot, then strewn over y.
    Unpack(Part),
}

#[derive(Clone, Debug)]
pub(super) struct In {
    pub(super) to: Target,
    pub(super) words: usize,
}

/// The pieces of one exchange.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) op: ReduceOp,
    /// Boxes that pieces are parts of.
    pub(super) boxes: Vec<Runs>,
    pub(super) outs: Vec<Out>,
    pub(super) ins: Vec<In>,
}

/// How far one direction is.
#[derive(Default)]
struct Place {
    /// Pieces that are done.
    piece: usize,
    /// Bytes of the next one that have moved.
    bytes: usize,
    /// Words of it that can be passed on.
    words: usize,
}

impl Flow {
    pub(super) fn new(op: ReduceOp) -> Self {
        Self { op, boxes: Vec::new(), outs: Vec::new(), ins: Vec::new() }
    }

    /// Adds a box, for [`Part::runs`].
    pub(super) fn add_box(&mut self, runs: Runs) -> usize {
        self.boxes.push(runs);
        self.boxes.len() - 1
    }

    /// Where the words of a part lie, when they lie in one piece.
    pub(super) fn contiguous(&self, part: &Part) -> Option<Range<usize>> {
        self.boxes[part.runs].contiguous(&part.range)
    }

    /// Calls `run(place in the tensor, place in the piece, len)` for the words `words` of the piece that `part` is.
    fn for_each(&self, part: &Part, words: Range<usize>, mut run: impl FnMut(usize, usize, usize)) {
        let range = part.range.start + words.start..part.range.start + words.end;
        self.boxes[part.runs].for_each(range, |place, at, len| run(place, words.start + at, len));
    }

    /// Moves all pieces: those that go out to member `to`, those that come in from member `from`. `slots` has
    /// [`SLOTS`] times [`PIECE_WORDS`] words.
    pub(super) fn run(
        &self,
        port: &mut Port,
        words: &mut Words<'_>,
        slots: &mut [f32],
        to: Option<usize>,
        from: Option<usize>,
    ) -> Result<(), KernelError> {
        if let Some(peer) = to {
            port.begin_out(peer, size_of::<f32>() * self.outs.iter().map(|piece| piece.words).sum::<usize>())?;
        }
        if let Some(peer) = from {
            port.begin_in(peer, size_of::<f32>() * self.ins.iter().map(|piece| piece.words).sum::<usize>())?;
        }
        let mut run = Run { flow: self, slots, sent: Place::default(), got: Place::default() };
        loop {
            let mut moved = false;
            let (mut waits_to, mut waits_from) = (None, None);
            if let Some(peer) = from {
                moved |= run.receive(port, words, peer)?;
                waits_from = run.can_receive(port, peer)?.then_some(peer);
            }
            if let Some(peer) = to {
                moved |= run.send(port, words, peer)?;
                waits_to = run.can_send(port, peer)?.then_some(peer);
            }
            if waits_to.is_none() && waits_from.is_none() && run.is_done(to.is_some(), from.is_some()) {
                return Ok(());
            }
            // Where nothing is to be waited for, empty pieces are skipped next.
            if !moved && (waits_to.is_some() || waits_from.is_some()) {
                port.wait(waits_to, waits_from)?;
            }
        }
    }
}

/// A flow under way.
struct Run<'a> {
    flow: &'a Flow,
    slots: &'a mut [f32],
    sent: Place,
    got: Place,
}

/// The words of slot `index`.
fn slot(index: usize, words: usize) -> Range<usize> {
    index * PIECE_WORDS..index * PIECE_WORDS + words
}

impl Run<'_> {
    fn is_done(&self, sends: bool, receives: bool) -> bool {
        (!sends || self.sent.piece == self.flow.outs.len()) && (!receives || self.got.piece == self.flow.ins.len())
    }

    /// True when the next bytes to come have a place (FLOW-2), or a header is missing.
    fn can_receive(&self, port: &mut Port, peer: usize) -> Result<bool, KernelError> {
        match self.flow.ins.get(self.got.piece) {
            Some(In { to: Target::Y(_), .. }) => Ok(true),
            Some(_) => Ok(self.sent.piece >= self.got.piece),
            None => Ok(!port.in_done(peer)?),
        }
    }

    /// Words of the next out piece that may go (FLOW-1).
    fn ready(&self, piece: &Out) -> usize {
        let before = self.sent.piece.wrapping_sub(1);
        match self.got.piece {
            _ if !piece.passes_on => piece.words,
            at if at > before => piece.words,
            at if at == before => self.got.words,
            _ => 0,
        }
    }

    /// True when bytes wait to be sent, and are worth it.
    fn can_send(&self, port: &mut Port, peer: usize) -> Result<bool, KernelError> {
        let Some(piece) = self.flow.outs.get(self.sent.piece) else { return Ok(!port.out_done(peer)?) };
        let ready = self.ready(piece);
        let bytes = size_of::<f32>() * ready - self.sent.bytes;
        Ok(bytes > 0 && (ready == piece.words || bytes >= SEND_BYTES_MIN))
    }

    /// One attempt to receive; true when bytes came.
    fn receive(&mut self, port: &mut Port, words: &mut Words<'_>, peer: usize) -> Result<bool, KernelError> {
        while self.flow.ins.get(self.got.piece).is_some_and(|piece| piece.words == 0) {
            self.got.piece += 1;
        }
        if !self.can_receive(port, peer)? {
            return Ok(false);
        }
        // A transfer of nothing is its header.
        let Some(piece) = self.flow.ins.get(self.got.piece) else { return Ok(port.receive(peer, &mut [])? > 0) };
        let into = match &piece.to {
            Target::Y(range) => &mut words.y[range.clone()],
            _ => &mut self.slots[slot(self.got.piece % 2, piece.words)],
        };
        let bytes = port.receive(peer, &mut bytemuck::cast_slice_mut(into)[self.got.bytes..])?;
        self.got.bytes += bytes;
        let come = self.got.bytes / size_of::<f32>();
        self.absorb(words, piece, self.got.words..come);
        self.got.words = come;
        if come == piece.words {
            self.got = Place { piece: self.got.piece + 1, ..Place::default() };
        }
        Ok(bytes > 0)
    }

    /// Does what is to be done with words that have come.
    fn absorb(&mut self, words: &mut Words<'_>, piece: &In, come: Range<usize>) {
        let (flow, op) = (self.flow, self.flow.op);
        let here = &mut self.slots[slot(self.got.piece % 2, piece.words)];
        match &piece.to {
            Target::Y(_) => {}
            Target::Combine(part) => {
                let x = words.x();
                flow.for_each(part, come, |place, at, len| {
                    combine_into(op, &mut here[at..][..len], &x[place..][..len])
                });
            }
            Target::Finish(part, start) => flow.for_each(part, come, |place, at, len| {
                let (x, y) = words.split();
                let (sum, y) = (&here[at..][..len], &mut y[start + at..][..len]);
                match x {
                    Some(x) => combine_two(op, sum, &x[place..][..len], y),
                    // In place, y is still what x was.
                    None => combine_onto(op, sum, y),
                }
            }),
            Target::Unpack(part) => flow.for_each(part, come, |place, at, len| {
                words.y[place..][..len].copy_from_slice(&here[at..][..len]);
            }),
        }
    }

    /// One attempt to send; true when bytes went.
    fn send(&mut self, port: &mut Port, words: &Words<'_>, peer: usize) -> Result<bool, KernelError> {
        while self.flow.outs.get(self.sent.piece).is_some_and(|piece| piece.words == 0) {
            self.sent.piece += 1;
        }
        if !self.can_send(port, peer)? {
            return Ok(false);
        }
        let Some(piece) = self.flow.outs.get(self.sent.piece) else { return Ok(port.send(peer, &[])? > 0) };
        let ready = self.ready(piece);
        let from = match &piece.from {
            Source::X(range) => &words.x()[range.clone()],
            Source::Y(range) => &words.y[range.clone()],
            Source::Slot => &self.slots[slot((self.sent.piece + 1) % 2, piece.words)],
            Source::Pack(part) => {
                let packed = &mut self.slots[slot(PACK_SLOT, piece.words)];
                if self.sent.bytes == 0 {
                    self.flow.for_each(part, 0..piece.words, |place, at, len| {
                        packed[at..][..len].copy_from_slice(&words.x()[place..][..len]);
                    });
                }
                packed
            }
        };
        let bytes = port.send(peer, &bytemuck::cast_slice(&from[..ready])[self.sent.bytes..])?;
        self.sent.bytes += bytes;
        if self.sent.bytes == size_of::<f32>() * piece.words {
            self.sent = Place { piece: self.sent.piece + 1, ..Place::default() };
        }
        Ok(bytes > 0)
    }
}
