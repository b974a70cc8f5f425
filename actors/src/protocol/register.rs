//! The slots of one register, as its producer counts them.
//!
//! A slot changes `Free -> Writing -> Filled(readers left) -> Free`. Pieces are numbered, every reader reads them in
//! order, and piece `n` lies in slot `n mod slots`. So a few counters determine the state of every slot.
//!
//! - **CR-1**: `freed <= released[reader] <= published <= acquired <= published + 1`: one piece at a time is written,
//!   each piece is published once, and each reader releases it once.
//! - **CR-2**: slots held + slots free == credits, that is `acquired - freed <= slots`.

use super::error::ProtocolError;
use crate::spec::RegisterSpec;

/// The producer's counters of one register. All count pieces since the start.
#[derive(Clone, Debug)]
pub struct SlotRing {
    pub(crate) slots: u32,
    acquired: u64,
    pub(crate) published: u64,
    /// By index in the register's readers, as far as the producer knows.
    released: Box<[u64]>,
    /// The minimum of `released`.
    freed: u64,
    /// Maximum number of slots held at once.
    pub(crate) peak: u32,
    /// Fault injection: credits beyond the slots.
    #[cfg(test)]
    pub(crate) surplus: u32,
}

impl SlotRing {
    /// The ring before any firing; piece 0 of an `initial` register is published.
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

    /// Number of slots that are being written or are filled.
    pub fn held(&self) -> u32 {
        (self.acquired - self.freed) as u32
    }

    /// Number of slots that a firing may acquire: the remaining credits.
    pub fn free(&self) -> u32 {
        #[cfg(test)]
        let slots = self.slots + self.surplus;
        #[cfg(not(test))]
        let slots = self.slots;
        slots.saturating_sub(self.held())
    }

    /// Number of pieces that each reader has released, as far as the producer knows, by reader index.
    pub fn released(&self) -> &[u64] {
        &self.released
    }

    /// The slot of a piece.
    pub fn slot_of(&self, piece: u64) -> u32 {
        (piece % u64::from(self.slots)) as u32
    }

    /// `Free -> Writing`: uses a credit for the next piece. The caller has checked [`SlotRing::free`].
    pub(crate) fn acquire(&mut self) {
        self.acquired += 1;
        self.peak = self.peak.max(self.held());
    }

    /// `Writing -> Filled`, or directly to `Free` without readers. Returns the piece.
    pub(crate) fn publish(&mut self) -> u64 {
        self.published += 1;
        self.refresh_freed();
        self.published - 1
    }

    /// Releases a reader's oldest piece, which the caller has checked; the slot becomes `Free` with the last reader.
    pub(crate) fn release(&mut self, reader: usize) {
        self.released[reader] += 1;
        self.refresh_freed();
    }

    fn refresh_freed(&mut self) {
        self.freed = self.released.iter().copied().min().unwrap_or(self.published);
    }

    /// Checks CR-1 and CR-2.
    pub fn check(&self, name: &str) -> Result<(), ProtocolError> {
        let violated = |label| ProtocolError::Invariant {
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
            return Err(violated("CR-1"));
        }
        if self.acquired - self.freed > u64::from(self.slots) {
            return Err(violated("CR-2"));
        }
        Ok(())
    }
}
