//! The fixed order in which pieces of a register are published to a reader, or released by it.

use crate::spec::{ActionRef, RegisterId, Spec};

/// A sequence of pieces that repeats every step, and the position of the next one.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    /// Pieces of step 0; empty for all pieces in the order of their numbers.
    order: Box<[u32]>,
    pieces_per_step: u32,
    /// Position in `order`.
    at: usize,
    /// Number to add to the entries of `order`, or the next piece if `order` is empty.
    base: u64,
}

impl Sequence {
    fn new(order: Vec<u32>, pieces_per_step: u32) -> Self {
        let first = order.first().copied().unwrap_or(0);
        let is_plain = order.len() == pieces_per_step as usize && (first..).zip(&order).all(|(n, piece)| n == *piece);
        if is_plain {
            return Self { order: Box::default(), pieces_per_step, at: 0, base: first.into() };
        }
        Self { order: order.into(), pieces_per_step, at: 0, base: 0 }
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
        Self::new(numbers.filter(is_read).collect(), of.pieces_per_step)
    }

    /// The pieces that a reader releases, in this order.
    pub(crate) fn of_releases(spec: &Spec, register: RegisterId, reader: ActionRef) -> Self {
        let per_step = spec.action(reader.actor, reader.action).per_step;
        let port = spec.input(register, reader);
        let accesses = port.into_iter().flat_map(|port| port.pieces.accesses(per_step));
        let order = accesses.filter(|access| access.last).map(|access| access.piece).collect();
        Self::new(order, spec.register(register).pieces_per_step)
    }

    /// The next piece.
    pub(crate) fn next(&self) -> u64 {
        match self.order.get(self.at) {
            Some(piece) => self.base + u64::from(*piece),
            None => self.base,
        }
    }

    pub(crate) fn advance(&mut self) {
        if self.order.is_empty() {
            self.base += 1;
            return;
        }
        self.at += 1;
        if self.at == self.order.len() {
            self.at = 0;
            self.base += u64::from(self.pieces_per_step);
        }
    }
}
