//! A pipeline of pieces. A member sends pieces to some peers while it receives pieces from others. It combines received
//! pieces with its own values, or forwards them. Rings, levels of a reduction and pairwise exchanges are lists of pieces.
//!
//! - FLOW-1: pieces are sent to each peer in order, and received in one order from all peers. An outgoing piece may
//!   follow from an incoming one. Then only words can be sent that result from received words.
//! - FLOW-2: in a ring, data to forward alternates between two slots, and outgoing piece t forwards incoming piece t-1.
//!   Incoming piece t may use its slot once outgoing pieces `0..t` are sent. These include the slot's previous content,
//!   since incoming piece t-2 leaves as outgoing piece t-1. Two slots are enough to keep a ring moving. The member that
//!   has sent the least can always send, because the next member in the ring has sent at least as much and therefore has
//!   a free slot.
//! - FLOW-3: words of y that are still to be sent are not overwritten. In a reduction in place, the result of a peer
//!   replaces the words that were sent to this peer, and follows from them.

use std::ops::Range;

use super::port::Port;
use crate::collective::ReduceOp;
use crate::collective::exchange::{combine_into, combine_onto, combine_two};
use crate::error::Result;
use crate::memory::Words;
use crate::region::Runs;

/// Maximum size of a piece if there is one receiver, in words.
pub(super) const PIECE_WORDS: usize = 64 << 10;

/// Two slots for incoming data, and one for packed outgoing data to each receiver.
const SLOTS_IN: usize = 2;

/// Number of words of memory that a flow needs.
pub(super) const SLOTS_WORDS: usize = (SLOTS_IN + 1) * PIECE_WORDS;

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
    /// Index of the incoming piece from which this piece follows, word by word.
    pub(super) after: Option<usize>,
}

/// Destination of an incoming piece's words.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// Directly into a contiguous range of y.
    Y(Range<usize>),
    /// Into a slot, then combined with the values of other members as [`Combination`] specifies.
    Combine(Combination),
    /// Into a slot, then scattered over y.
    Unpack(Part),
}

/// One member's values, among those that are combined in the order of the members' digits. The pieces of the members
/// arrive in this order, one after another.
#[derive(Clone, Debug)]
pub(super) struct Combination {
    pub(super) op: ReduceOp,
    /// The receiver's own values, in x.
    pub(super) own: Part,
    /// Where the result begins in y.
    pub(super) start: usize,
    /// The sender's digit.
    pub(super) digit: usize,
    /// The receiver's digit.
    pub(super) own_digit: usize,
}

#[derive(Clone, Debug)]
pub(super) struct In {
    pub(super) from: usize,
    pub(super) to: Target,
    pub(super) words: usize,
}

#[derive(Debug)]
pub(super) struct Flow {
    /// Maximum size of a piece, and size of a slot, in words.
    pub(super) piece_words: usize,
    pub(super) boxes: Vec<Runs>,
    /// The receivers, and the pieces for each of them.
    pub(super) outs: Vec<(usize, Vec<Out>)>,
    pub(super) ins: Vec<In>,
    /// The senders. Each sends at least a header.
    senders: Vec<usize>,
    /// Whether pieces are forwarded from slots (FLOW-2).
    pub(super) is_ring: bool,
}

#[derive(Clone, Default)]
struct Progress {
    /// Number of finished pieces.
    piece: usize,
    /// Number of bytes of the next piece that have been transferred.
    bytes: usize,
    /// Number of words of the next piece that can be forwarded.
    words: usize,
}

impl Flow {
    /// A flow without pieces, to these receivers and from these senders.
    pub(super) fn new(receivers: impl IntoIterator<Item = usize>, senders: impl IntoIterator<Item = usize>) -> Self {
        let outs: Vec<_> = receivers.into_iter().map(|peer| (peer, Vec::new())).collect();
        let piece_words = PIECE_WORDS.min(SLOTS_WORDS / (SLOTS_IN + outs.len()));
        let senders = senders.into_iter().collect();
        Self { piece_words, boxes: Vec::new(), outs, ins: Vec::new(), senders, is_ring: false }
    }

    /// Adds a box and returns its index, for [`Part::runs`].
    pub(super) fn add_box(&mut self, runs: Runs) -> usize {
        self.boxes.push(runs);
        self.boxes.len() - 1
    }

    /// Splits a range of a box's elements into parts of at most one piece.
    pub(super) fn parts(&self, runs: usize, range: Range<usize>) -> impl Iterator<Item = Part> + use<> {
        let piece_words = self.piece_words;
        let part = move |start: usize| Part { runs, range: start..range.end.min(start + piece_words) };
        range.clone().step_by(piece_words).map(part)
    }

    /// The range of a part's words in the tensor, if it is contiguous.
    pub(super) fn contiguous(&self, part: &Part) -> Option<Range<usize>> {
        self.boxes[part.runs].contiguous(&part.range)
    }

    /// Adds a piece for the receiver with this index.
    pub(super) fn push_out(&mut self, receiver: usize, words: usize, from: Source, after: Option<usize>) {
        self.outs[receiver].1.push(Out { from, words, after });
    }

    /// The source of a part's words in x.
    pub(super) fn source(&self, part: Part) -> Source {
        self.contiguous(&part).map_or_else(|| Source::Pack(part), Source::X)
    }

    /// Calls `run(index in the tensor, index in the piece, len)` for the words `words` of the piece `part`.
    fn for_each(&self, part: &Part, words: Range<usize>, mut run: impl FnMut(usize, usize, usize)) {
        let range = part.range.start + words.start..part.range.start + words.end;
        self.boxes[part.runs].for_each(range, |place, at, len| run(place, words.start + at, len));
    }

    /// Transfers all pieces. `slots` has [`SLOTS_WORDS`] words.
    pub(super) fn run(&self, port: &mut Port, words: &mut Words<'_>, slots: &mut [f32]) -> Result<()> {
        for (peer, pieces) in &self.outs {
            port.begin_out(*peer, size_of::<f32>() * pieces.iter().map(|piece| piece.words).sum::<usize>())?;
        }
        for peer in &self.senders {
            let received = self.ins.iter().filter(|piece| piece.from == *peer);
            port.begin_in(*peer, size_of::<f32>() * received.map(|piece| piece.words).sum::<usize>())?;
        }
        let sent = vec![Progress::default(); self.outs.len()];
        let mut run = RunningFlow { flow: self, slots, sent, received: Progress::default() };
        let mut waits_to = Vec::new();
        loop {
            let mut moved = run.receive(port, words)?;
            let waits_from = run.awaited(port)?;
            waits_to.clear();
            for (receiver, (peer, _)) in self.outs.iter().enumerate() {
                moved |= run.send(port, words, receiver)?;
                waits_to.extend(run.can_send(port, receiver)?.then_some(*peer));
            }
            if waits_to.is_empty() && waits_from.is_none() && run.is_done() {
                return Ok(());
            }
            // If there is no peer to wait for, only empty pieces hold up the flow, and the next iteration skips them.
            if !moved && (!waits_to.is_empty() || waits_from.is_some()) {
                port.wait(&waits_to, waits_from)?;
            }
        }
    }
}

struct RunningFlow<'a> {
    flow: &'a Flow,
    slots: &'a mut [f32],
    /// By receiver.
    sent: Vec<Progress>,
    received: Progress,
}

impl RunningFlow<'_> {
    fn slot(&self, index: usize, words: usize) -> Range<usize> {
        index * self.flow.piece_words..index * self.flow.piece_words + words
    }

    fn is_done(&self) -> bool {
        let sent = self.sent.iter().zip(&self.flow.outs).all(|(sent, (_, pieces))| sent.piece == pieces.len());
        sent && self.received.piece == self.flow.ins.len()
    }

    /// The slot of the next incoming piece. Values that are combined are kept in slot 0 until the receiver's own values
    /// follow.
    fn slot_in(&self, piece: &In) -> usize {
        match &piece.to {
            Target::Combine(values) => usize::from(values.digit > 0),
            _ => self.received.piece % 2,
        }
    }

    /// The peer whose bytes this member awaits: the sender of the next piece if the piece has a place, that is, y or a
    /// free slot (FLOW-2). After the last piece, a sender whose header has not arrived.
    fn awaited(&self, port: &mut Port) -> Result<Option<usize>> {
        if let Some(piece) = self.flow.ins.get(self.received.piece) {
            let has_place = !self.flow.is_ring
                || matches!(piece.to, Target::Y(_))
                || self.sent.iter().all(|sent| sent.piece >= self.received.piece);
            return Ok(Some(piece.from).filter(|_| has_place));
        }
        for peer in &self.flow.senders {
            if !port.link(*peer)?.0.in_done() {
                return Ok(Some(*peer));
            }
        }
        Ok(None)
    }

    /// Number of words of the receiver's next piece that may be sent (FLOW-1).
    fn ready(&self, piece: &Out) -> usize {
        match piece.after {
            Some(incoming) if incoming > self.received.piece => 0,
            Some(incoming) if incoming == self.received.piece => self.received.words,
            _ => piece.words,
        }
    }

    /// Whether enough bytes are ready to be sent, or the channel holds unsent bytes.
    fn can_send(&self, port: &mut Port, receiver: usize) -> Result<bool> {
        let ((peer, pieces), sent) = (&self.flow.outs[receiver], &self.sent[receiver]);
        let Some(piece) = pieces.get(sent.piece) else { return Ok(!port.link(*peer)?.0.out_done()) };
        let ready = self.ready(piece);
        let bytes = size_of::<f32>() * ready - sent.bytes;
        let enough = bytes > 0 && (ready == piece.words || bytes >= SEND_BYTES_MIN);
        Ok(enough || port.link(*peer)?.0.channel.has_unsent())
    }

    /// Tries to receive once; returns whether bytes arrived.
    fn receive(&mut self, port: &mut Port, words: &mut Words<'_>) -> Result<bool> {
        while self.flow.ins.get(self.received.piece).is_some_and(|piece| piece.words == 0) {
            self.received.piece += 1;
        }
        let Some(peer) = self.awaited(port)? else { return Ok(false) };
        // A transfer of no bytes still has a header.
        let Some(piece) = self.flow.ins.get(self.received.piece) else {
            port.receive(peer, &mut [])?;
            return Ok(port.link(peer)?.0.in_done());
        };
        let slot = self.slot(self.slot_in(piece), piece.words);
        let into = match &piece.to {
            Target::Y(range) => &mut words.y[range.clone()],
            _ => &mut self.slots[slot],
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
        let slot = self.slot(self.slot_in(piece), piece.words);
        match &piece.to {
            Target::Y(_) => {}
            Target::Unpack(part) => self.flow.for_each(part, new, |place, at, len| {
                words.y[place..][..len].copy_from_slice(&self.slots[slot.start + at..][..len]);
            }),
            Target::Combine(values) => {
                let (first, second) = self.slots.split_at_mut(self.flow.piece_words);
                values.combine(self.flow, words, first, second, new);
            }
        }
    }

    /// Tries to send once; returns whether bytes were sent.
    fn send(&mut self, port: &mut Port, words: &Words<'_>, receiver: usize) -> Result<bool> {
        let (peer, pieces) = &self.flow.outs[receiver];
        while pieces.get(self.sent[receiver].piece).is_some_and(|piece| piece.words == 0) {
            self.sent[receiver].piece += 1;
        }
        if !self.can_send(port, receiver)? {
            return Ok(false);
        }
        let sent = self.sent[receiver].clone();
        let Some(piece) = pieces.get(sent.piece) else { return Ok(port.send(*peer, &[])? > 0) };
        let ready = self.ready(piece);
        let from = match &piece.from {
            Source::X(range) => &words.x()[range.clone()],
            Source::Y(range) => &words.y[range.clone()],
            Source::Slot => &self.slots[self.slot((sent.piece + 1) % 2, piece.words)],
            Source::Pack(part) => {
                let slot = self.slot(SLOTS_IN + receiver, piece.words);
                let packed = &mut self.slots[slot];
                if sent.bytes == 0 {
                    self.flow.for_each(part, 0..piece.words, |place, at, len| {
                        packed[at..][..len].copy_from_slice(&words.x()[place..][..len]);
                    });
                }
                packed
            }
        };
        let bytes = port.send(*peer, &bytemuck::cast_slice(&from[..ready])[sent.bytes..])?;
        let sent = &mut self.sent[receiver];
        sent.bytes += bytes;
        if sent.bytes == size_of::<f32>() * piece.words {
            *sent = Progress { piece: sent.piece + 1, ..Progress::default() };
        }
        Ok(bytes > 0)
    }
}

impl Combination {
    /// Combines the received words `new`. Slot `first` holds the combined values of the members before the receiver. The
    /// words of the member with digit 0 are in this slot, and those of other members in slot `second`.
    fn combine(&self, flow: &Flow, words: &mut Words<'_>, first: &mut [f32], second: &[f32], new: Range<usize>) {
        if self.digit > 0 && self.digit < self.own_digit {
            combine_into(self.op, &mut first[new.clone()], &second[new.clone()]);
        }
        flow.for_each(&self.own, new, |place, at, len| {
            let (x, y) = words.split();
            let (own, y) = (x.map(|x| &x[place..][..len]), &mut y[self.start + at..][..len]);
            let (lower, higher) = (&first[at..][..len], &second[at..][..len]);
            if self.digit + 1 == self.own_digit {
                match own {
                    Some(own) => combine_two(self.op, lower, own, y),
                    None => combine_onto(self.op, lower, y),
                }
            } else if self.own_digit == 0
                && self.digit == 1
                && let Some(own) = own
            {
                combine_two(self.op, own, higher, y);
            } else if self.digit > self.own_digit {
                combine_into(self.op, y, higher);
            }
        });
    }
}
