//! The fixed order in which a register's pieces are published to a reader, or in which the reader releases them.

use super::slot::SlotMap;
use crate::spec::{ActionRef, Pieces, RegisterId, RegisterSpec, Spec};

/// A sequence of pieces that repeats every step, and a position in it. Advancing needs no division if the pieces are in
/// order of their numbers and the slots form a ring.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    /// The pieces of step 0, in the sequence's order. Empty if the sequence contains all pieces in order of number.
    order: Box<[u32]>,
    slots: SlotMap,
    pieces_per_step: u32,
    /// Position of the next piece in `order`.
    at: usize,
    /// Number of the current step's first piece.
    base: u64,
    next: u64,
    slot: u32,
}

impl Sequence {
    /// All pieces from `next` on, in order of their numbers.
    fn plain(of: &RegisterSpec, next: u32) -> Self {
        let (slots, next) = (SlotMap::new(of), next.into());
        let (order, slot) = (Box::default(), slots.slot(next));
        Self { order, pieces_per_step: of.pieces_per_step, at: 0, base: 0, next, slot, slots }
    }

    fn new(of: &RegisterSpec, order: Vec<u32>) -> Self {
        let next = order.first().copied().unwrap_or(0);
        let is_plain = order.len() == of.pieces_per_step as usize && (next..).zip(&order).all(|(n, piece)| n == *piece);
        let plain = Self::plain(of, next);
        if is_plain { plain } else { Self { order: order.into(), ..plain } }
    }

    /// The pieces that a reader gets, without initial pieces, in order of publication.
    pub(crate) fn of_arrivals(spec: &Spec, register: RegisterId, reader: ActionRef) -> Self {
        Self::of_arrivals_to(spec, register, &[reader])
    }

    /// The pieces that at least one of these readers gets, in order of publication.
    pub(crate) fn of_arrivals_to(spec: &Spec, register: RegisterId, readers: &[ActionRef]) -> Self {
        let of = spec.register(register);
        let ports: Vec<_> = readers.iter().filter_map(|reader| spec.input(register, *reader)).collect();
        let is_rate = |pieces: &Pieces| matches!(pieces, Pieces::Rate(_));
        let producer = spec.actor(of.producer);
        let written = |(action, port): (u32, u32)| &producer.actions[action as usize].outputs[port as usize].pieces;
        if spec.writers(register).map(written).all(is_rate) && ports.iter().all(|port| is_rate(&port.pieces)) {
            return Self::plain(of, of.initial);
        }
        let published = spec.writes(register).into_iter().filter(|(_, access)| access.last);
        let numbers = published.map(|(_, access)| access.piece + of.initial);
        let is_read = |piece: &u32| ports.iter().any(|port| port.pieces.contains(piece % of.pieces_per_step));
        Self::new(of, numbers.filter(is_read).collect())
    }

    /// The pieces that a reader releases, in order of release.
    pub(crate) fn of_releases(spec: &Spec, register: RegisterId, reader: ActionRef) -> Self {
        let (of, port) = (spec.register(register), spec.input(register, reader));
        if port.is_some_and(|port| matches!(port.pieces, Pieces::Rate(_))) {
            return Self::plain(of, 0);
        }
        let per_step = spec.action(reader.actor, reader.action).per_step;
        let accesses = port.into_iter().flat_map(|port| port.pieces.accesses(per_step));
        let order = accesses.filter(|access| access.last).map(|access| access.piece).collect();
        Self::new(of, order)
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
