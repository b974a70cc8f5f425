//! The slots of one register, as its producer sees them.
//!
//! - **CR-1**: a slot changes `Free -> Writing -> Filled(readers left) -> Free`. Each piece is published once, and each
//!   of its readers releases it once. For each reader: pieces published to it - pieces it released == its filled slots.
//! - **CR-2**: slots held + slots free == credits.
//! - **CR-4**: a piece lies only in the slot that the plan gives it.

use super::error::ProtocolError;
use super::sequence::Sequence;
use super::slot::{SlotMap, SlotState};
use crate::spec::{ActionRef, ActorId, Pieces, RegisterId, Spec};

/// Bits in a word of a set of readers.
const WORD: usize = u64::BITS as usize;

/// A reader of the register, as its producer sees it.
#[derive(Clone, Debug)]
pub(super) struct ReaderState {
    pub at: ActionRef,
    /// Index of the reader's input port, if the reader belongs to the producing actor.
    pub own_port: Option<u32>,
    /// Number of pieces published to the reader. Not used if all readers get all pieces.
    published: u64,
    /// Number of pieces that the reader has released.
    released: u64,
    /// The pieces that the reader will release, in order.
    pub releases: Sequence,
}

/// A slot rule that a test breaks on purpose.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum SlotFault {
    /// One filled slot counts as free.
    Surplus,
    /// The first reader's release frees the slot, instead of the last reader's release.
    FreedByFirst,
    /// The last reader's release frees a different filled slot, if there is one.
    FreesOther,
    /// The last reader's release does not free the slot.
    KeepsLast,
}

/// The producer's state of one register.
#[derive(Clone, Debug)]
pub struct RegisterSlots {
    map: SlotMap,
    states: Box<[SlotState]>,
    /// For each slot: the readers that have not released the slot's piece, as a bit set of `words` words.
    left: Box<[u64]>,
    words: usize,
    /// The set of readers of each piece of a step. Contains a single set if all pieces have the same readers.
    readers_of: Box<[u64]>,
    pub(super) readers: Box<[ReaderState]>,
    held: u32,
    published: u64,
    /// Maximum number of slots held at the same time.
    pub(crate) peak: u32,
    #[cfg(test)]
    pub(crate) fault: Option<SlotFault>,
}

impl RegisterSlots {
    /// Creates the slots as they are before any firing. The initial pieces are already published.
    pub(super) fn new(spec: &Spec, register: RegisterId, me: ActorId) -> Self {
        let of = spec.register(register);
        let words = of.readers.len().div_ceil(WORD);
        let reader = |at: &ActionRef| {
            let ports = &spec.action(at.actor, at.action).inputs;
            let port = ports.iter().position(|input| input.register == register).map(|port| port as u32);
            let releases = Sequence::of_releases(spec, register, *at);
            ReaderState { at: *at, own_port: port.filter(|_| at.actor == me), published: 0, released: 0, releases }
        };
        let mut slots = Self {
            map: SlotMap::new(of),
            states: vec![SlotState::Free; of.slots as usize].into(),
            left: vec![0; of.slots as usize * words].into(),
            words,
            readers_of: readers_of(spec, register, words),
            readers: of.readers.iter().map(reader).collect(),
            held: 0,
            published: 0,
            peak: 0,
            #[cfg(test)]
            fault: None,
        };
        for piece in 0..u64::from(of.initial) {
            let slot = slots.map.slot(piece);
            slots.acquire(slot, piece);
            slots.publish(slot);
        }
        slots
    }

    /// Number of slots.
    pub fn count(&self) -> u32 {
        self.states.len() as u32
    }

    /// Number of slots that are being written or are filled.
    pub fn held(&self) -> u32 {
        self.held
    }

    /// Number of free slots: the remaining credits.
    pub fn free(&self) -> u32 {
        self.count() - self.held.min(self.count())
    }

    /// Number of published pieces, including the initial ones.
    pub fn published(&self) -> u64 {
        self.published
    }

    /// Number of pieces that were published to a reader, including the initial ones.
    pub fn published_to(&self, reader: usize) -> u64 {
        if self.is_uniform() { self.published } else { self.readers[reader].published }
    }

    /// Number of pieces that each reader has released, as far as the producer knows, in order of the reader index.
    pub fn released(&self) -> impl Iterator<Item = u64> + '_ {
        self.readers.iter().map(|reader| reader.released)
    }

    /// The states of the slots.
    pub fn states(&self) -> &[SlotState] {
        &self.states
    }

    /// The indices of the readers that have not released a slot's piece.
    pub fn readers_left(&self, slot: u32) -> impl Iterator<Item = u32> + '_ {
        (0..self.readers.len()).filter(move |reader| self.is_left(slot, *reader)).map(|reader| reader as u32)
    }

    pub(crate) fn is_left(&self, slot: u32, reader: usize) -> bool {
        self.left[slot as usize * self.words + reader / WORD] >> (reader % WORD) & 1 == 1
    }

    #[inline]
    pub(super) fn is_free(&self, slot: u32) -> bool {
        let state = self.states[slot as usize];
        #[cfg(test)]
        if self.fault == Some(SlotFault::Surplus)
            && matches!(state, SlotState::Filled { .. })
            && self.held <= self.count()
        {
            return true;
        }
        state == SlotState::Free
    }

    #[inline]
    pub(super) fn is_writing(&self, slot: u32, piece: u64) -> bool {
        self.states[slot as usize] == SlotState::Writing { piece }
    }

    /// `Free -> Writing`. The caller has checked [`RegisterSlots::is_free`].
    #[inline]
    pub(super) fn acquire(&mut self, slot: u32, piece: u64) {
        self.states[slot as usize] = SlotState::Writing { piece };
        self.held += 1;
        self.peak = self.peak.max(self.held);
    }

    /// `Writing -> Filled`, or `Writing -> Free` if the piece has no readers. The caller has checked the state.
    #[inline]
    pub(super) fn publish(&mut self, slot: u32) {
        let SlotState::Writing { piece } = self.states[slot as usize] else { return };
        self.published += 1;
        let mut readers = self.readers.len() as u32;
        let (at, set) = (slot as usize * self.words, self.readers_start(piece));
        for word in 0..self.words {
            self.left[at + word] = self.readers_of[set + word];
        }
        if !self.is_uniform() {
            readers = 0;
            for reader in 0..self.readers.len() {
                let is_read = u32::from(self.is_left(slot, reader));
                readers += is_read;
                self.readers[reader].published += u64::from(is_read);
            }
        }
        self.states[slot as usize] = SlotState::Filled { piece, readers };
        if readers == 0 {
            self.free_slot(slot);
        }
    }

    /// True if all readers get all pieces.
    pub(super) fn is_uniform(&self) -> bool {
        self.readers_of.len() == self.words
    }

    /// True if a reader gets the piece.
    pub(super) fn reads(&self, reader: usize, piece: u64) -> bool {
        self.readers_of[self.readers_start(piece) + reader / WORD] >> (reader % WORD) & 1 == 1
    }

    /// Index of the first word of the set of a piece's readers.
    fn readers_start(&self, piece: u64) -> usize {
        if self.is_uniform() {
            return 0;
        }
        (piece % (self.readers_of.len() / self.words) as u64) as usize * self.words
    }

    /// Releases a reader's piece. The slot becomes `Free` when the piece's last reader releases the piece. Returns the
    /// slot's state as an error if the slot does not hold this piece for the reader.
    #[inline]
    pub(super) fn release(&mut self, reader: usize, slot: u32, piece: u64) -> Result<(), SlotState> {
        let state = self.states[slot as usize];
        match state {
            SlotState::Filled { piece: held, readers } if held == piece && self.is_left(slot, reader) => {
                self.left[slot as usize * self.words + reader / WORD] &= !(1 << (reader % WORD));
                self.states[slot as usize] = SlotState::Filled { piece, readers: readers - 1 };
                #[cfg(test)]
                let (slot, readers) = self.broken(slot, readers);
                if readers == 1 {
                    self.free_slot(slot);
                }
            }
            _ => return Err(state),
        }
        let reader = &mut self.readers[reader];
        reader.released += 1;
        reader.releases.advance();
        Ok(())
    }

    /// Injects the fault into a release. Returns the slot to change, and the number of holders to assume.
    #[cfg(test)]
    fn broken(&self, slot: u32, readers: u32) -> (u32, u32) {
        let is_filled =
            |other: &u32| matches!(self.states[*other as usize], SlotState::Filled { .. }) && *other != slot;
        match self.fault {
            Some(SlotFault::FreedByFirst) => (slot, 1),
            Some(SlotFault::FreesOther) => ((0..self.count()).find(is_filled).unwrap_or(slot), readers),
            Some(SlotFault::KeepsLast) => (slot, readers + 1),
            Some(SlotFault::Surplus) | None => (slot, readers),
        }
    }

    fn free_slot(&mut self, slot: u32) {
        self.states[slot as usize] = SlotState::Free;
        self.held -= 1;
    }

    /// Checks CR-1, CR-2 and CR-4.
    pub fn check(&self, name: &str) -> Result<(), ProtocolError> {
        let violated =
            |label, numbers| Err(ProtocolError::Invariant { label, at: format!("register '{name}'"), numbers });
        let mut held = 0;
        for (slot, state) in (0..).zip(&self.states) {
            let (piece, readers) = match *state {
                SlotState::Free => continue,
                SlotState::Writing { piece } => (piece, 0),
                SlotState::Filled { piece, readers } => (piece, readers),
            };
            held += 1;
            let left = self.readers_left(slot).count();
            if matches!(state, SlotState::Filled { .. }) && (left != readers as usize || left == 0) {
                return violated(
                    "CR-1",
                    format!(
                        "slot {slot} waits for {readers} releases of piece {piece}, but its reader set contains {left}"
                    ),
                );
            }
            if self.map.slot(piece) != slot {
                let expected = self.map.slot(piece);
                return violated("CR-4", format!("piece {piece} is in slot {slot}, expected {expected}"));
            }
        }
        for (index, reader) in self.readers.iter().enumerate() {
            let is_filled = |slot: &u32| {
                matches!(self.states[*slot as usize], SlotState::Filled { .. }) && self.is_left(*slot, index)
            };
            let (filled, released) = ((0..self.count()).filter(is_filled).count(), reader.released);
            let published = self.published_to(index);
            if released + filled as u64 != published {
                let numbers = format!(
                    "{published} pieces were published to reader {index} and {released} released, but it has {filled} \
                     filled slots"
                );
                return violated("CR-1", numbers);
            }
        }
        if held != self.held {
            return violated(
                "CR-2",
                format!("{held} of {} slots are in use, but {} are counted as held", self.count(), self.held),
            );
        }
        Ok(())
    }
}

/// Returns the set of readers of each piece of a step, or a single set if all readers read all pieces.
fn readers_of(spec: &Spec, register: RegisterId, words: usize) -> Box<[u64]> {
    let of = spec.register(register);
    let is_rate =
        |reader: &ActionRef| matches!(spec.input(register, *reader).map(|i| &i.pieces), Some(Pieces::Rate(_)));
    let differing = if of.readers.iter().all(is_rate) { 1 } else { of.pieces_per_step };
    let sets = (0..differing).map(|piece| {
        let mut set = vec![0; words];
        for (index, reader) in of.readers.iter().enumerate() {
            let is_read = spec.input(register, *reader).is_some_and(|input| input.pieces.contains(piece));
            set[index / WORD] |= u64::from(is_read) << (index % WORD);
        }
        set
    });
    let mut sets: Vec<_> = sets.collect();
    if sets.windows(2).all(|pair| pair[0] == pair[1]) {
        sets.truncate(1);
    }
    sets.concat().into()
}
