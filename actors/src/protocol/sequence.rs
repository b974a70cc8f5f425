//! The fixed order in which pieces of a register are published to a reader, or released by it.

use super::slot::SlotMap;
use crate::spec::{ActionRef, RegisterId, Spec};

/// A sequence of pieces that repeats every step, and the next one. Advancing does not divide if pieces follow in the order
/// of their numbers and slots form a ring.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    /// Pieces of step 0; empty for all pieces in the order of their numbers.
    order: Box<[u32]>,
    slots: SlotMap,
    pieces_per_step: u32,
    /// Position of the next piece in `order`.
    at: usize,
    /// Number of the step's first piece.
    base: u64,
    next: u64,
    slot: u32,
}

impl Sequence {
    fn new(spec: &Spec, register: RegisterId, mut order: Vec<u32>) -> Self {
        let of = spec.register(register);
        let next = order.first().copied().unwrap_or(0);
        let is_plain = order.len() == of.pieces_per_step as usize && (next..).zip(&order).all(|(n, piece)| n == *piece);
        if is_plain {
            order.clear();
        }
        let (order, slots, next) = (order.into(), SlotMap::new(of), next.into());
        Self { order, pieces_per_step: of.pieces_per_step, at: 0, base: 0, next, slot: slots.slot(next), slots }
    }

    /// The pieces that a reader gets, as far as they are not initial, in the order in which they are published.
    pub(crate) fn of_arrivals(spec: &Spec, register: RegisterId, reader: ActionRef) -> Self {
        Self::of_arrivals_to(spec, register, &[reader])
    }

    /// The pieces that at least one of these readers gets.
    pub(crate) fn of_arrivals_to(spec: &Spec, register: RegisterId, readers: &[ActionRef]) -> Self {
        let of = spec.register(register);
        let ports: Vec<_> = readers.iter().filter_map(|reader| spec.input(register, *reader)).collect();
        let published = spec.writes(register).into_iter().filter(|(_, access)| access.last);
        let numbers = published.map(|(_, access)| access.piece + of.initial);
        let is_read = |piece: &u32| ports.iter().any(|port| port.pieces.contains(piece % of.pieces_per_step));
        Self::new(spec, register, numbers.filter(is_read).collect())
    }

    /// The pieces that a reader releases, in this order.
    pub(crate) fn of_releases(spec: &Spec, register: RegisterId, reader: ActionRef) -> Self {
        let per_step = spec.action(reader.actor, reader.action).per_step;
        let port = spec.input(register, reader);
        let accesses = port.into_iter().flat_map(|port| port.pieces.accesses(per_step));
        let order = accesses.filter(|access| access.last).map(|access| access.piece).collect();
        Self::new(spec, register, order)
    }

    /// The next piece.
    pub(crate) fn piece(&self) -> u64 {
        self.next
    }

    /// The slot of the next piece.
    pub(crate) fn slot(&self) -> u32 {
        self.slot
    }

    #[inline]
    pub(crate) fn advance(&mut self) {
        if self.order.is_empty() {
            self.next += 1;
            self.slot = self.slots.following(self.slot, self.next);
            return;
        }
        self.at += 1;
        if self.at == self.order.len() {
            self.at = 0;
            self.base += u64::from(self.pieces_per_step);
        }
        self.next = self.base + u64::from(self.order[self.at]);
        self.slot = self.slots.slot(self.next);
    }
}
