//! The pieces that the firings of a port read or write.

use std::sync::Arc;

/// One firing's access to a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PieceAccess {
    /// Index of the piece within the step, below [`crate::spec::RegisterSpec::pieces_per_step`].
    pub piece: u32,
    /// True for a writer's access if it is the first write of the piece by any action. This write acquires the slot.
    /// True for a reader's access if it is the reader's first read of the piece.
    pub first: bool,
    /// True for a writer's access if it is the last write of the piece by any action. This write publishes the piece.
    /// True for a reader's access if it is the reader's last read of the piece. This read releases the piece.
    pub last: bool,
}

/// The pieces that a port's firings access within a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pieces {
    /// This many firings in a row access the same piece. The pieces follow in the order of their numbers.
    Rate(u32),
    /// One entry per firing of the step. Every step repeats the table.
    Table(Arc<[PieceAccess]>),
}

impl Default for Pieces {
    /// One piece per firing.
    fn default() -> Self {
        Self::Rate(1)
    }
}

impl Pieces {
    /// The table of a port if no other port shares these pieces. `pieces` lists one piece per firing, in any order.
    pub fn in_order(pieces: &[u32]) -> Self {
        let access = |(at, &piece): (usize, &u32)| {
            let (before, after) = (&pieces[..at], &pieces[at + 1..]);
            PieceAccess { piece, first: !before.contains(&piece), last: !after.contains(&piece) }
        };
        Self::Table(pieces.iter().enumerate().map(access).collect())
    }

    /// The tables of several writing actions. `list` is the ordered list of their actor, and `writers` holds each
    /// writing action with its pieces, one per firing.
    pub fn of_writers(list: &[u32], writers: &[(u32, &[u32])]) -> Vec<Self> {
        let mut fired = vec![0; writers.len()];
        let mut order = Vec::new();
        for action in list {
            let Some(writer) = writers.iter().position(|(a, _)| a == action) else { continue };
            if let Some(&piece) = writers[writer].1.get(fired[writer]) {
                order.push((writer, piece));
            }
            fired[writer] += 1;
        }
        let Self::Table(flags) = Self::in_order(&order.iter().map(|o| o.1).collect::<Vec<_>>()) else {
            return Vec::new();
        };
        let of =
            |writer: usize| order.iter().zip(&*flags).filter(move |(o, _)| o.0 == writer).map(|(_, access)| *access);
        (0..writers.len()).map(|writer| Self::Table(of(writer).collect())).collect()
    }

    /// The access of a firing within the step.
    ///
    /// # Panics
    /// Panics if a table has no entry for the firing.
    pub fn access(&self, at: u32) -> PieceAccess {
        match self {
            Self::Rate(k) => {
                PieceAccess { piece: at / k, first: at.is_multiple_of(*k), last: (at + 1).is_multiple_of(*k) }
            }
            Self::Table(table) => table[at as usize],
        }
    }

    /// The accesses of an action with `per_step` firings in one step. A table ignores `per_step` and uses its length.
    pub fn accesses(&self, per_step: u32) -> impl Iterator<Item = PieceAccess> + '_ {
        let count = match self {
            Self::Rate(_) => per_step,
            Self::Table(table) => table.len() as u32,
        };
        (0..count).map(|at| self.access(at))
    }

    /// The access of a firing, counted from the session's start: `(piece, first, last)`. For a writer, the caller must
    /// add [`crate::spec::RegisterSpec::initial`] to the piece.
    pub fn of_firing(&self, firing: u64, pieces_per_step: u32) -> (u64, bool, bool) {
        match self {
            Self::Rate(1) => (firing, true, true),
            Self::Rate(k) => {
                let (piece, at) = (firing / u64::from(*k), firing % u64::from(*k));
                (piece, at == 0, at + 1 == u64::from(*k))
            }
            Self::Table(table) => {
                let (step, at) = (firing / table.len() as u64, firing % table.len() as u64);
                let PieceAccess { piece, first, last } = table[at as usize];
                (step * u64::from(pieces_per_step) + u64::from(piece), first, last)
            }
        }
    }

    /// Number of pieces that the first `firings` firings finish, according to [`PieceAccess::last`].
    pub fn finished(&self, firings: u64) -> u64 {
        match self {
            Self::Rate(k) => firings / u64::from(*k),
            Self::Table(table) => {
                let (steps, rest) = (firings / table.len() as u64, firings % table.len() as u64);
                let lasts = |count: usize| table[..count].iter().filter(|access| access.last).count() as u64;
                steps * lasts(table.len()) + lasts(rest as usize)
            }
        }
    }

    /// Number of firings after which this port has finished a piece; `None` if the port never accesses the piece. For a
    /// writer, the caller must subtract [`crate::spec::RegisterSpec::initial`] from the piece.
    pub fn firings_to_finish(&self, piece: u64, pieces_per_step: u32) -> Option<u64> {
        match self {
            Self::Rate(k) => Some((piece + 1) * u64::from(*k)),
            Self::Table(table) => {
                let (step, within) = (piece / u64::from(pieces_per_step), piece % u64::from(pieces_per_step));
                let last = table.iter().rposition(|access| u64::from(access.piece) == within)?;
                Some(step * table.len() as u64 + last as u64 + 1)
            }
        }
    }

    /// True if some firing accesses a piece of this number within the step.
    pub fn contains(&self, piece: u32) -> bool {
        match self {
            Self::Rate(_) => true,
            Self::Table(table) => table.iter().any(|access| access.piece == piece),
        }
    }

    /// True if some firing adds to a piece that an earlier firing has begun.
    pub fn accumulates(&self) -> bool {
        match self {
            Self::Rate(k) => *k > 1,
            Self::Table(table) => table.iter().any(|access| !access.first),
        }
    }
}
