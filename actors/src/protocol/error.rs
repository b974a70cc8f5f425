//! Violations of the protocol.

use super::slot::SlotState;
use crate::spec::RegisterId;

/// A protocol violation, due to a bug, a corrupt message or a different plan. [`crate::protocol`] defines the labels.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the texts describe variants and fields")]
pub enum ProtocolError {
    #[error("register '{register}': {message} carries piece {got}, expected {expected} (CR-4)")]
    WrongPiece { register: String, message: String, expected: u64, got: u64 },
    #[error("register '{register}': piece {piece} arrived in slot {got}, expected {expected} (CR-4)")]
    WrongSlot { register: String, piece: u64, expected: u32, got: u32 },
    #[error(
        "register '{register}': {reader} received piece {piece} in slot {slot}, which still holds piece {unread} (CR-3)"
    )]
    Overflow { register: String, reader: String, slot: u32, unread: u64, piece: u64 },
    #[error("register '{register}': {reader} released piece {piece} from slot {slot}, which {state} (CR-1)")]
    Unpublished { register: String, reader: String, piece: u64, slot: u32, state: SlotState },
    #[error(
        "actor {actor} received a message for another actor, about reader {reader} of register {}",
        .register.0
    )]
    Misrouted { actor: String, register: RegisterId, reader: u32 },
    #[error(
        "actor {actor}: action {action} reports {event}, but {} is in flight (CR-5)",
        .in_flight.map_or_else(|| "no action".to_owned(), |a| format!("action {a}"))
    )]
    NotInFlight { actor: String, action: u32, event: String, in_flight: Option<u32> },
    #[error("{action}: received a signal for output {output}, but this output is {reason}")]
    UnexpectedSignal { action: String, output: u32, reason: &'static str },
    #[error("{action}: the firing ended without the signal of its early output {output}")]
    MissingSignal { action: String, output: u32 },
    #[error("actor {actor}: action {action} accepts no tokens from the host")]
    UnexpectedToken { actor: String, action: u32 },
    #[error("{at}: {numbers} ({label})")]
    Invariant { label: &'static str, at: String, numbers: String },
}
