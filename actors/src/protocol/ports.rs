//! The ports of an action: the piece and the slot that the current firing accesses at each port.

use super::sequence::Sequence;
use super::slot::SlotMap;
use crate::spec::{ActionRef, ActorId, InputSpec, OutputSpec, Pieces, RegisterId, Spec};

/// Marks a slot in which a reader holds no piece.
const NONE: u64 = u64::MAX;

/// One firing's access to a piece.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reach {
    pub piece: u64,
    pub slot: u32,
    /// True for the first access to the piece. An output then acquires the slot.
    pub first: bool,
    /// True for the last access to the piece. An output then publishes the piece; an input releases it.
    pub last: bool,
}

/// Maps the firings of a port to pieces and slots.
#[derive(Clone, Debug)]
pub(super) struct PortMap {
    pieces: Pieces,
    slots: SlotMap,
    pieces_per_step: u32,
    /// This offset is added to piece numbers. For a writer, it is the register's `initial`; for a reader, it is 0.
    offset: u64,
}

impl PortMap {
    fn new(spec: &Spec, register: RegisterId, pieces: &Pieces, offset: u32) -> Self {
        let of = spec.register(register);
        let (pieces, slots, pieces_per_step) = (pieces.clone(), SlotMap::new(of), of.pieces_per_step);
        Self { pieces, slots, pieces_per_step, offset: offset.into() }
    }

    pub fn reach(&self, firing: u64) -> Reach {
        let (piece, first, last) = self.pieces.of_firing(firing, self.pieces_per_step);
        let piece = piece + self.offset;
        Reach { piece, slot: self.slots.slot(piece), first, last }
    }

    /// Changes `current` to the access of the next firing, which has number `next`. With one piece per firing, this
    /// needs no division, and `first` and `last` stay true.
    #[inline]
    fn advance(&self, current: &mut Reach, next: u64) {
        if matches!(self.pieces, Pieces::Rate(1)) {
            current.piece += 1;
            current.slot = self.slots.following(current.slot, current.piece);
        } else {
            *current = self.reach(next);
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct InPort {
    pub register: RegisterId,
    /// Index in the register's readers.
    pub reader: u32,
    pub producer: ActorId,
    pub map: PortMap,
    /// The access of the firing in flight or, if there is none, of the next firing.
    pub current: Reach,
    /// For each slot: the filled piece that this port has not released, or `NONE`.
    held: Box<[u64]>,
    /// The pieces that will arrive, in order.
    pub arrivals: Sequence,
    /// Number of filled pieces, including the initial ones.
    pub filled: u64,
    /// Number of released pieces.
    pub released: u64,
}

impl InPort {
    pub fn new(spec: &Spec, at: ActionRef, input: &InputSpec) -> Self {
        let register = spec.register(input.register);
        let map = PortMap::new(spec, input.register, &input.pieces, 0);
        let mut port = Self {
            register: input.register,
            reader: register.readers.iter().position(|r| *r == at).expect("the checked plan lists the reader") as u32,
            producer: register.producer,
            current: map.reach(0),
            map,
            held: vec![NONE; register.slots as usize].into(),
            arrivals: Sequence::of_arrivals(spec, input.register, at),
            filled: 0,
            released: 0,
        };
        for piece in (0..register.initial).filter(|n| input.pieces.contains(n % register.pieces_per_step)) {
            port.hold(port.map.slots.slot(piece.into()), piece.into());
        }
        port
    }

    /// True if the current firing can read its piece.
    #[inline]
    pub fn is_ready(&self) -> bool {
        self.holds(self.current)
    }

    #[inline]
    pub fn holds(&self, reach: Reach) -> bool {
        self.held[reach.slot as usize] == reach.piece
    }

    /// The piece that the port holds in a slot.
    #[inline]
    pub fn held_in(&self, slot: u32) -> Option<u64> {
        Some(self.held[slot as usize]).filter(|piece| *piece != NONE)
    }

    /// The pieces that the port holds, as `(slot, piece)`.
    pub fn held(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        (0..).zip(&self.held).filter(|(_, piece)| **piece != NONE).map(|(slot, piece)| (slot, *piece))
    }

    #[inline]
    fn hold(&mut self, slot: u32, piece: u64) {
        self.held[slot as usize] = piece;
        self.filled += 1;
    }

    /// Records that the next piece of `arrivals` was filled. The caller has checked the slot.
    #[inline]
    pub fn fill(&mut self, slot: u32, piece: u64) {
        self.hold(slot, piece);
        self.arrivals.advance();
    }

    /// Releases the piece of the current firing.
    #[inline]
    pub fn release(&mut self) {
        self.held[self.current.slot as usize] = NONE;
        self.released += 1;
    }

    /// Ends the current firing and moves to the following one, which has number `next`.
    #[inline]
    pub fn advance(&mut self, next: u64) {
        self.map.advance(&mut self.current, next);
    }
}

#[derive(Clone, Debug)]
pub(super) struct OutPort {
    pub register: RegisterId,
    /// Index of the register among the registers that the actor produces.
    pub slots: usize,
    pub early: bool,
    pub map: PortMap,
    /// The access of the firing in flight or, if there is none, of the next firing.
    pub current: Reach,
}

impl OutPort {
    pub fn new(spec: &Spec, output: &OutputSpec, slots: usize) -> Self {
        let map = PortMap::new(spec, output.register, &output.pieces, spec.register(output.register).initial);
        Self { register: output.register, slots, early: output.early, current: map.reach(0), map }
    }

    /// Ends the current firing and moves to the following one, which has number `next`.
    #[inline]
    pub fn advance(&mut self, next: u64) {
        self.map.advance(&mut self.current, next);
    }
}
