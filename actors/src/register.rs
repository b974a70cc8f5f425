//! The slot ring of one register, as its producer sees it.
//!
//! A slot goes `Free -> Writing -> Filled(readers left) -> Free`. Pieces are numbered, every reader takes them in order, and
//! piece `n` lies in slot `n mod slots`; so the state of every slot follows from a few counters, and nothing is queued.
//!
//! - **CR-1**: `freed <= released[reader] <= published <= acquired <= published + 1`: a slot is written by one firing at a
//!   time, published once, and released once by each reader.
//! - **CR-2**: slots held + slots free == credits, that is `acquired - freed <= slots`.

use crate::error::ProtocolError;
use crate::spec::RegisterSpec;

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// A credit of the producer.
    Free,
    /// The producer's current firing, or the firings that accumulate into it, write it.
    Writing,
    /// Published; this many readers have yet to release it.
    Filled {
        /// At least 1.
        readers_left: u32,
    },
}

/// Counters of one register, kept by its producer. All count pieces since the start.
#[derive(Clone, Debug)]
pub struct SlotRing {
    slots: u32,
    acquired: u64,
    published: u64,
    /// By index in the register's readers.
    released: Box<[u64]>,
    /// The least of `released`.
    freed: u64,
    peak: u32,
    /// A seeded fault: credits beyond the slots.
    #[cfg(test)]
    pub(crate) surplus: u32,
}

impl SlotRing {
    /// The ring before anything fires; an `initial` register has piece 0 published.
    pub fn new(spec: &RegisterSpec) -> Self {
        let first = u64::from(spec.initial);
        let mut ring = Self {
            slots: spec.slots,
            acquired: first,
            published: first,
            released: vec![0; spec.readers.len()].into(),
            freed: 0,
            peak: 0,
            #[cfg(test)]
            surplus: 0,
        };
        ring.refresh_freed();
        ring.peak = ring.held();
        ring
    }

    /// Slots that are written or filled.
    pub fn held(&self) -> u32 {
        (self.acquired - self.freed) as u32
    }

    /// Slots that a firing may acquire: the credits left.
    pub fn free(&self) -> u32 {
        #[cfg(test)]
        let slots = self.slots + self.surplus;
        #[cfg(not(test))]
        let slots = self.slots;
        slots.saturating_sub(self.held())
    }

    /// Number of slots.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Most slots that were held at once.
    pub fn peak(&self) -> u32 {
        self.peak
    }

    /// Pieces published.
    pub fn published(&self) -> u64 {
        self.published
    }

    /// Pieces that a reader has released, as far as the producer knows.
    pub fn released(&self, reader: usize) -> u64 {
        self.released[reader]
    }

    /// The same of all readers.
    pub fn all_released(&self) -> &[u64] {
        &self.released
    }

    /// The slot of a piece.
    pub fn slot_of(&self, piece: u64) -> u32 {
        (piece % u64::from(self.slots)) as u32
    }

    /// State of a slot, from the counters.
    pub fn state(&self, slot: u32) -> SlotState {
        let Some(piece) = (self.freed..self.acquired).find(|&p| self.slot_of(p) == slot) else {
            return SlotState::Free;
        };
        if piece >= self.published {
            return SlotState::Writing;
        }
        SlotState::Filled { readers_left: self.released.iter().filter(|&&r| r <= piece).count() as u32 }
    }

    /// `Free -> Writing`: spends a credit for the next piece. The caller has seen that one is [`SlotRing::free`].
    pub(crate) fn acquire(&mut self) {
        self.acquired += 1;
        self.peak = self.peak.max(self.held());
    }

    /// `Writing -> Filled`, or straight to `Free` when nobody reads. Returns the piece.
    pub(crate) fn publish(&mut self) -> u64 {
        self.published += 1;
        self.refresh_freed();
        self.published - 1
    }

    /// One reader lets its oldest piece go; the slot becomes `Free` with the last. The caller has checked the piece.
    pub(crate) fn release(&mut self, reader: usize) {
        self.released[reader] += 1;
        self.refresh_freed();
    }

    fn refresh_freed(&mut self) {
        self.freed = self.released.iter().copied().min().unwrap_or(self.published);
    }

    /// CR-1 and CR-2.
    ///
    /// # Errors
    /// The invariant that does not hold, with the counters.
    pub fn check(&self, name: &str) -> Result<(), ProtocolError> {
        let broken = |label| ProtocolError::Invariant {
            label,
            at: format!("register '{name}'"),
            numbers: format!(
                "{} slots, acquired {}, published {}, released {:?}, freed {}",
                self.slots, self.acquired, self.published, self.released, self.freed
            ),
        };
        let published_once = self.published <= self.acquired && self.acquired <= self.published + 1;
        let released_once = self.released.iter().all(|&r| self.freed <= r && r <= self.published);
        if !(published_once && released_once) {
            return Err(broken("CR-1"));
        }
        if self.acquired - self.freed > u64::from(self.slots) {
            return Err(broken("CR-2"));
        }
        Ok(())
    }
}
