//! Errors for an invalid environment.

use std::fmt::Display;

use crate::exit::Exit;
use crate::secret::{SECRET_CHARS_MIN, ShortSecret};

/// An invalid environment. The process exits with code 78.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the error texts explain variants and fields")]
pub enum EnvError {
    #[error("{found}={value} is set but {missing} is not: set {missing} to {meaning}, or unset {found}")]
    HalfSet { found: &'static str, value: String, missing: &'static str, meaning: &'static str },
    #[error("{variable}={value}: {expected}")]
    Invalid { variable: &'static str, value: String, expected: String },
    #[error("{variable}={value} contradicts {other}={other_value}: {rule}")]
    Contradiction {
        variable: &'static str,
        value: String,
        other: &'static str,
        other_value: String,
        rule: &'static str,
    },
    #[error(
        "{launcher} started {processes} processes without a secret: in every process, set SHARDFLOW_SECRET to the same \
         text of at least {SECRET_CHARS_MIN} characters, or SHARDFLOW_SECRET_FILE to the path of a file with that text; \
         {instructions}"
    )]
    NoSecret { launcher: &'static str, processes: u32, instructions: &'static str },
    #[error("{place} holds {source}")]
    ShortSecret { place: String, source: ShortSecret },
    #[error("{name} is {value:?}, expected {expected}")]
    Option { name: &'static str, value: String, expected: &'static str },
}

impl EnvError {
    /// The exit code of a process that ends with this error.
    pub fn exit(&self) -> Exit {
        Exit::Refused
    }
}

pub(super) fn invalid(variable: &'static str, value: &str, expected: &str) -> EnvError {
    EnvError::Invalid { variable, value: value.into(), expected: expected.into() }
}

pub(super) fn contradiction(
    (variable, value): (&'static str, impl Display),
    (other, other_value): (&'static str, impl Display),
    rule: &'static str,
) -> EnvError {
    EnvError::Contradiction { variable, value: value.to_string(), other, other_value: other_value.to_string(), rule }
}
