//! The state of one slot of a register, and the map from pieces to slots.

use std::fmt;
use std::sync::Arc;

use crate::spec::{RegisterSpec, slot_in};

/// The state of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Free: a firing may acquire the slot.
    Free,
    /// Some firing has begun this piece, and no firing has completed it.
    Writing {
        /// Number of the piece.
        piece: u64,
    },
    /// The piece is published, and not all readers have released it.
    Filled {
        /// Number of the piece.
        piece: u64,
        /// Number of readers that have not released the piece.
        readers: u32,
    },
}

impl fmt::Display for SlotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Free => f.write_str("is free"),
            Self::Writing { piece } => write!(f, "is being written with piece {piece}"),
            Self::Filled { piece, readers } => write!(f, "holds piece {piece} for {readers} readers"),
        }
    }
}

/// Maps pieces to slots.
#[derive(Clone, Debug)]
pub(crate) struct SlotMap {
    slots: u32,
    /// The register's slot table; empty for a ring.
    table: Arc<[u32]>,
}

impl SlotMap {
    pub(crate) fn new(spec: &RegisterSpec) -> Self {
        Self { slots: spec.slots, table: spec.slot_of.clone() }
    }

    pub(crate) fn slot(&self, piece: u64) -> u32 {
        slot_in(self.slots, &self.table, piece)
    }

    /// The slot of a piece whose predecessor lies in slot `last`. Needs no division for a ring.
    #[inline]
    pub(crate) fn following(&self, last: u32, piece: u64) -> u32 {
        if !self.table.is_empty() {
            return self.slot(piece);
        }
        if last + 1 == self.slots { 0 } else { last + 1 }
    }
}
