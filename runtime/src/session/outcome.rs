//! The outcomes of a collective operation on all processes, and their combination.

use std::sync::Arc;

use shardflow_job::membership::{MergeRule, Reduced};

use crate::checkpoint::error::CheckpointError;

/// The result of one process's part of a collective operation. Later variants are more severe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    /// The process succeeded, with this value.
    Good(u64),
    /// The process found nothing.
    Absent,
    /// The process found only damaged files.
    Damaged,
    /// The process failed with this exit code.
    Failed(u8),
}

impl Outcome {
    pub(super) fn to_pair(self) -> [u64; 2] {
        match self {
            Self::Good(value) => [0, value],
            Self::Absent => [1, 0],
            Self::Damaged => [2, 0],
            Self::Failed(exit) => [3, exit.into()],
        }
    }

    pub(super) fn from_pair([code, value]: [u64; 2]) -> Self {
        match code {
            0 => Self::Good(value),
            1 => Self::Absent,
            2 => Self::Damaged,
            _ => Self::Failed(value as u8),
        }
    }

    /// Returns an error if this outcome of `rank` is a failure. `problem` is a predicate, such as "cannot read it".
    pub(super) fn check(self, rank: u32, place: &str, problem: &str) -> Result<(), CheckpointError> {
        let Self::Failed(exit) = self else { return Ok(()) };
        let (place, problem) = (place.into(), problem.into());
        Err(CheckpointError::OnRank { place, rank, exit, problem })
    }
}

/// The worst outcome of all processes, and the lowest rank that has it. Larger words mean a worse outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Worst {
    pub(super) outcome: Outcome,
    pub(super) rank: u32,
}

impl Worst {
    pub(super) const WORDS: usize = 3;

    pub(super) fn words(rank: u32, outcome: Outcome) -> [u64; Self::WORDS] {
        let [code, value] = outcome.to_pair();
        [code, u64::from(u32::MAX - rank), value]
    }

    pub(super) fn from_words([code, rank, value]: [u64; Self::WORDS]) -> Self {
        Self { outcome: Outcome::from_pair([code, value]), rank: u32::MAX - rank as u32 }
    }

    pub(super) fn check(self, place: &str, problem: &str) -> Result<(), CheckpointError> {
        self.outcome.check(self.rank, place, problem)
    }
}

/// The outcomes of all processes, combined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcomes {
    pub(super) worst: Worst,
    /// The value of process 0; 0 if it did not succeed.
    pub(super) first: u64,
    /// The ranks that have found nothing.
    pub(super) absent: Vec<u32>,
}

impl Outcomes {
    pub(super) fn rules() -> Arc<[MergeRule]> {
        [MergeRule::Max { words: Worst::WORDS }, MergeRule::First { words: 1 }, MergeRule::Same(None)].into()
    }

    pub(super) fn fields(rank: u32, outcome: Outcome) -> Vec<Vec<u64>> {
        let value = if let Outcome::Good(value) = outcome { value } else { 0 };
        let first = if rank == 0 { vec![value] } else { Vec::new() };
        vec![Worst::words(rank, outcome).to_vec(), first, vec![u64::from(outcome == Outcome::Absent)]]
    }

    pub(super) fn new(reduced: &Reduced, processes: u32) -> Self {
        let worst = Worst::from_words(array(reduced, 0));
        let [first] = array(reduced, 1);
        let absent = match &reduced.difference {
            Some(found) => found.values.iter().filter(|(_, absent)| *absent != 0).map(|(rank, _)| *rank).collect(),
            // All ranks have the same flag. So if the worst rank found nothing, no rank found anything.
            None if worst.outcome == Outcome::Absent => (0..processes).collect(),
            None => Vec::new(),
        };
        Self { worst, first, absent }
    }
}

/// The words of a field. Zeros if the field does not have `WORDS` words.
pub(super) fn array<const WORDS: usize>(reduced: &Reduced, field: usize) -> [u64; WORDS] {
    let words = reduced.words.get(field).and_then(|words| words.as_slice().try_into().ok());
    words.unwrap_or([0; WORDS])
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Outcome; 5] =
        [Outcome::Good(u64::MAX), Outcome::Absent, Outcome::Damaged, Outcome::Failed(73), Outcome::Failed(65)];

    fn worst(all: &[Outcome]) -> Worst {
        let words = (0..).zip(all).map(|(rank, outcome)| Worst::words(rank, *outcome));
        Worst::from_words(words.max().expect("there is at least one process"))
    }

    #[test]
    fn outcomes_survive_the_encoding_and_the_first_failure_is_reported() {
        assert_eq!(ALL.map(|outcome| Outcome::from_pair(outcome.to_pair())), ALL);
        assert!(worst(&ALL[..3]).check("/run", "cannot read it").is_ok());
        let error = worst(&ALL).check("/run", "cannot read it").unwrap_err();
        let expected = "/run: rank 3 cannot read it; see the log of rank 3";
        assert_eq!((error.to_string().as_str(), error.exit_code()), (expected, 73));
        for (processes, outcome) in (1..).zip(&ALL[..4]) {
            let expected = Worst { outcome: *outcome, rank: processes - 1 };
            assert_eq!(worst(&ALL[..processes as usize]), expected);
        }
    }

    #[test]
    fn ranks_that_found_nothing_are_listed() {
        let fields = Outcomes::fields(0, Outcome::Absent);
        let alone = Reduced::alone(&Outcomes::rules(), fields);
        let expected = Outcomes { worst: Worst { outcome: Outcome::Absent, rank: 0 }, first: 0, absent: vec![0] };
        assert_eq!(Outcomes::new(&alone, 1), expected);
        let good = Reduced::alone(&Outcomes::rules(), Outcomes::fields(0, Outcome::Good(7)));
        assert_eq!((Outcomes::new(&good, 1).first, Outcomes::new(&good, 1).absent), (7, vec![]));
    }
}
