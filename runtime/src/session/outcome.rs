//! The result of one process's part of a collective operation, as the other processes receive it.

use crate::checkpoint::error::CheckpointError;

/// Numbers that a process sends to all others between steps.
pub(super) type NumberPair = [u64; 2];

/// The result of a process's part. The variants are in the order of severity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    /// It succeeded, with this value.
    Good(u64),
    /// It found nothing.
    Absent,
    /// It found only damaged files.
    Damaged,
    /// It failed with this exit code.
    Failed(u8),
}

impl Outcome {
    pub(super) fn to_pair(self) -> NumberPair {
        match self {
            Self::Good(value) => [0, value],
            Self::Absent => [1, 0],
            Self::Damaged => [2, 0],
            Self::Failed(exit) => [3, exit.into()],
        }
    }

    pub(super) fn from_pair([code, value]: NumberPair) -> Self {
        match code {
            0 => Self::Good(value),
            1 => Self::Absent,
            2 => Self::Damaged,
            _ => Self::Failed(value as u8),
        }
    }

    /// The value of a process that succeeded, else 0.
    pub(super) fn value(self) -> u64 {
        if let Self::Good(value) = self { value } else { 0 }
    }

    /// Returns an error if the part of a rank failed. `problem`: what the first such rank cannot do with `place`.
    pub(super) fn check_others(all: &[Self], place: &str, problem: &str) -> Result<(), CheckpointError> {
        for (rank, outcome) in (0..).zip(all) {
            if let Self::Failed(exit) = outcome {
                let (place, problem) = (place.into(), problem.into());
                return Err(CheckpointError::OnRank { place, rank, exit: *exit, problem });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_survive_the_encoding_and_the_first_failure_is_reported() {
        let all =
            [Outcome::Good(u64::MAX), Outcome::Absent, Outcome::Damaged, Outcome::Failed(73), Outcome::Failed(65)];
        assert_eq!(all.map(|outcome| Outcome::from_pair(outcome.to_pair())), all);
        assert!(Outcome::check_others(&all[..3], "/run", "cannot read it").is_ok());
        let error = Outcome::check_others(&all, "/run", "cannot read it").unwrap_err();
        assert_eq!((error.to_string().as_str(), error.exit_code()), ("/run: rank 3 cannot read it; see its log", 73));
    }
}
