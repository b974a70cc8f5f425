//! A pipeline of pieces. A member sends pieces to one peer while it receives pieces from another peer. The member
//! combines received pieces with its own values and forwards them. Rings and pairwise exchanges are lists of pieces.
//!
//! - FLOW-1: pieces are sent in order and received in order. Outgoing piece t may forward incoming piece t-1. In that
//!   case, only words that have been received can be sent.
//! - FLOW-2: data in transit alternates between two slots. Incoming piece t may use its slot once outgoing pieces
//!   `0..t` are sent. These include the slot's previous content, since incoming piece t-2 leaves as outgoing piece t-1.
//!   Two slots are enough to keep a ring moving. The member that has sent the least can always send, because the next
//!   member in the ring has sent at least as much and therefore has a free slot.

use std::ops::Range;

use super::port::Port;
use crate::collective::ReduceOp;
use crate::collective::exchange::{combine_into, combine_onto, combine_two};
use crate::error::Result;
use crate::memory::Words;
use crate::region::Runs;

/// Maximum size of a piece, and size of a slot, in words.
pub(super) const PIECE_WORDS: usize = 64 << 10;

/// Two slots for data in transit, and one for packed outgoing data.
pub(super) const SLOTS: usize = 3;

const PACK_SLOT: usize = 2;

/// While a piece that is to be forwarded is still arriving, each send call sends at least this many bytes of it.
const SEND_BYTES_MIN: usize = 32 << 10;

/// A range of a box's elements. `range` contains indices of elements of the box.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// Index into [`Flow::boxes`].
    pub(super) runs: usize,
    pub(super) range: Range<usize>,
}

/// Location of an outgoing piece's words.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// A contiguous range of x.
    X(Range<usize>),
    /// A contiguous range of y.
    Y(Range<usize>),
    /// A part that is scattered over x. Its words are packed before they are sent.
    Pack(Part),
    /// The slot of the previous incoming piece.
    Slot,
}

#[derive(Clone, Debug)]
pub(super) struct Out {
    pub(super) from: Source,
    pub(super) words: usize,
    /// Whether this piece forwards the previous incoming piece.
    pub(super) forwards: bool,
}

/// Destination of an incoming piece's words.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// Directly into a contiguous range of y.
    Y(Range<usize>),
    /// Into a slot, where the words are combined with this member's words of x.
    Combine(Part),
    /// Into a slot. The words are combined with this member's words of x and written to y from this index on.
    Finish(Part, usize),
    /// Into a slot, then scattered over y.
    Unpack(Part),
}

#[derive(Clone, Debug)]
pub(super) struct In {
    pub(super) to: Target,
    pub(super) words: usize,
}

#[derive(Debug)]
pub(super) struct Flow {
    pub(super) op: ReduceOp,
    pub(super) boxes: Vec<Runs>,
    pub(super) outs: Vec<Out>,
    pub(super) ins: Vec<In>,
}

#[derive(Default)]
struct Progress {
    /// Number of finished pieces.
    piece: usize,
    /// Number of bytes of the next piece that have been transferred.
    bytes: usize,
    /// Number of words of the next piece that can be forwarded.
    words: usize,
}

impl Flow {
    pub(super) fn new(op: ReduceOp) -> Self {
        Self { op, boxes: Vec::new(), outs: Vec::new(), ins: Vec::new() }
    }

    /// Adds a box and returns its index, for [`Part::runs`].
    pub(super) fn add_box(&mut self, runs: Runs) -> usize {
        self.boxes.push(runs);
        self.boxes.len() - 1
    }

    /// The range of a part's words in the tensor, if it is contiguous.
    pub(super) fn contiguous(&self, part: &Part) -> Option<Range<usize>> {
        self.boxes[part.runs].contiguous(&part.range)
    }

    /// Calls `run(index in the tensor, index in the piece, len)` for the words `words` of the piece `part`.
    fn for_each(&self, part: &Part, words: Range<usize>, mut run: impl FnMut(usize, usize, usize)) {
        let range = part.range.start + words.start..part.range.start + words.end;
        self.boxes[part.runs].for_each(range, |place, at, len| run(place, words.start + at, len));
    }

    /// Sends outgoing pieces to `to` and receives incoming ones from `from`. `slots` has `SLOTS * PIECE_WORDS` words.
    pub(super) fn run(
        &self,
        port: &mut Port,
        words: &mut Words<'_>,
        slots: &mut [f32],
        to: Option<usize>,
        from: Option<usize>,
    ) -> Result<()> {
        if let Some(peer) = to {
            port.begin_out(peer, size_of::<f32>() * self.outs.iter().map(|piece| piece.words).sum::<usize>())?;
        }
        if let Some(peer) = from {
            port.begin_in(peer, size_of::<f32>() * self.ins.iter().map(|piece| piece.words).sum::<usize>())?;
        }
        let mut run = RunningFlow { flow: self, slots, sent: Progress::default(), received: Progress::default() };
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
            // If there is no peer to wait for, only empty pieces hold up the flow, and the next iteration skips them.
            if !moved && (waits_to.is_some() || waits_from.is_some()) {
                port.wait(waits_to, waits_from)?;
            }
        }
    }
}

struct RunningFlow<'a> {
    flow: &'a Flow,
    slots: &'a mut [f32],
    sent: Progress,
    received: Progress,
}

fn slot(index: usize, words: usize) -> Range<usize> {
    index * PIECE_WORDS..index * PIECE_WORDS + words
}

impl RunningFlow<'_> {
    fn is_done(&self, sends: bool, receives: bool) -> bool {
        (!sends || self.sent.piece == self.flow.outs.len()) && (!receives || self.received.piece == self.flow.ins.len())
    }

    /// Whether the next received bytes have a place: y, or a free slot (FLOW-2). After the last piece, whether a header
    /// is still expected.
    fn can_receive(&self, port: &mut Port, peer: usize) -> Result<bool> {
        match self.flow.ins.get(self.received.piece) {
            Some(In { to: Target::Y(_), .. }) => Ok(true),
            Some(_) => Ok(self.sent.piece >= self.received.piece),
            None => Ok(!port.link(peer)?.0.in_done()),
        }
    }

    /// Number of words of the next outgoing piece that may be sent (FLOW-1).
    fn ready(&self, piece: &Out) -> usize {
        let before = self.sent.piece.wrapping_sub(1);
        match self.received.piece {
            _ if !piece.forwards => piece.words,
            at if at > before => piece.words,
            at if at == before => self.received.words,
            _ => 0,
        }
    }

    /// Whether enough bytes are ready to be sent, or the channel holds unsent bytes.
    fn can_send(&self, port: &mut Port, peer: usize) -> Result<bool> {
        let Some(piece) = self.flow.outs.get(self.sent.piece) else { return Ok(!port.link(peer)?.0.out_done()) };
        let ready = self.ready(piece);
        let bytes = size_of::<f32>() * ready - self.sent.bytes;
        let enough = bytes > 0 && (ready == piece.words || bytes >= SEND_BYTES_MIN);
        Ok(enough || port.link(peer)?.0.channel.has_unsent())
    }

    /// Tries to receive once; returns whether bytes arrived.
    fn receive(&mut self, port: &mut Port, words: &mut Words<'_>, peer: usize) -> Result<bool> {
        while self.flow.ins.get(self.received.piece).is_some_and(|piece| piece.words == 0) {
            self.received.piece += 1;
        }
        if !self.can_receive(port, peer)? {
            return Ok(false);
        }
        // A transfer of no bytes still has a header.
        let Some(piece) = self.flow.ins.get(self.received.piece) else {
            return Ok(port.receive(peer, &mut [])? > 0);
        };
        let into = match &piece.to {
            Target::Y(range) => &mut words.y[range.clone()],
            _ => &mut self.slots[slot(self.received.piece % 2, piece.words)],
        };
        let bytes = port.receive(peer, &mut bytemuck::cast_slice_mut(into)[self.received.bytes..])?;
        self.received.bytes += bytes;
        let words_received = self.received.bytes / size_of::<f32>();
        self.process_received(words, piece, self.received.words..words_received);
        self.received.words = words_received;
        if words_received == piece.words {
            self.received = Progress { piece: self.received.piece + 1, ..Progress::default() };
        }
        Ok(bytes > 0)
    }

    fn process_received(&mut self, words: &mut Words<'_>, piece: &In, new: Range<usize>) {
        let (flow, op) = (self.flow, self.flow.op);
        let slot_words = &mut self.slots[slot(self.received.piece % 2, piece.words)];
        match &piece.to {
            Target::Y(_) => {}
            Target::Combine(part) => {
                let x = words.x();
                flow.for_each(part, new, |place, at, len| {
                    combine_into(op, &mut slot_words[at..][..len], &x[place..][..len])
                });
            }
            Target::Finish(part, start) => flow.for_each(part, new, |place, at, len| {
                let (x, y) = words.split();
                let (sum, y) = (&slot_words[at..][..len], &mut y[start + at..][..len]);
                match x {
                    Some(x) => combine_two(op, sum, &x[place..][..len], y),
                    // In an in-place call, y still holds x.
                    None => combine_onto(op, sum, y),
                }
            }),
            Target::Unpack(part) => flow.for_each(part, new, |place, at, len| {
                words.y[place..][..len].copy_from_slice(&slot_words[at..][..len]);
            }),
        }
    }

    /// Tries to send once; returns whether bytes were sent.
    fn send(&mut self, port: &mut Port, words: &Words<'_>, peer: usize) -> Result<bool> {
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
            self.sent = Progress { piece: self.sent.piece + 1, ..Progress::default() };
        }
        Ok(bytes > 0)
    }
}
