//! Inconsistencies of plans.

/// Maximum [`crate::spec::Spec::period_steps`]. The simulator must be able to run this number of steps.
pub const PERIOD_STEPS_MAX: u64 = 1024;

/// An inconsistency of a plan. [`crate::check::check`] reports it before anything runs.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the texts describe variants and fields")]
pub enum SpecError {
    #[error("{at}: no {kind} has index {index}")]
    UnknownIndex { at: String, kind: &'static str, index: usize },
    #[error("{at}: {count} is 0, expected at least 1")]
    Zero { at: String, count: &'static str },
    #[error("register '{register}' is written by {writers} output ports of {by}, expected {expected}")]
    Writers { register: String, by: String, writers: usize, expected: &'static str },
    #[error("register '{register}' is written by {action}, but its producer is actor {producer}")]
    ForeignWriter { register: String, action: String, producer: String },
    #[error("register '{register}' is written by {writers} actions of actor {producer}, which has no ordered list")]
    Unordered { register: String, producer: String, writers: usize },
    #[error(
        "register '{register}' lists {action} {listed} times as a reader, but {action} reads it at {ports} input ports"
    )]
    Readers { register: String, action: String, listed: usize, ports: usize },
    #[error(
        "{action} fires {per_step} times per step, expected a multiple of {firings_per_piece}, the firings per piece \
         of '{register}'"
    )]
    Remainder { action: String, register: String, per_step: u32, firings_per_piece: u32 },
    #[error("register '{register}' has {expected} pieces per step, but {action} {does} {got}")]
    Rates { register: String, expected: u32, action: String, does: &'static str, got: u32 },
    #[error("{action} fires {per_step} times per step, but its table for '{register}' has {entries} entries")]
    TableLength { action: String, register: String, per_step: u32, entries: usize },
    #[error(
        "{action}, firing {firing}: its table for '{register}' has piece {piece}, expected less than {pieces_per_step}"
    )]
    PieceRange { action: String, register: String, firing: u32, piece: u32, pieces_per_step: u32 },
    #[error("register '{register}': no action writes piece {piece} of a step")]
    Unwritten { register: String, piece: u32 },
    #[error("{action}, firing {firing}: piece {piece} of register '{register}' is {done} a second time in the step")]
    Twice { action: String, register: String, firing: u32, piece: u32, done: &'static str },
    #[error(
        "{action}, firing {firing}: '{flag}' is {got} for piece {piece} of register '{register}', expected {expected}"
    )]
    Flag { action: String, register: String, firing: u32, piece: u32, flag: &'static str, expected: bool, got: bool },
    #[error("register '{register}': no piece lies in slot {slot}")]
    UnusedSlot { register: String, slot: u32 },
    #[error("register '{register}': initial pieces {first} and {second} both lie in slot {slot}")]
    InitialSlots { register: String, first: u64, second: u64, slot: u32 },
    #[error("register '{register}', slot {slot}: piece {second} is begun before piece {first} is complete")]
    Overlap { register: String, first: u64, second: u64, slot: u32 },
    #[error(
        "register '{register}', slot {slot}: piece {second} is written in step {written}, but piece {first} is not \
         read until step {read}"
    )]
    Lag { register: String, first: u64, second: u64, slot: u32, written: u64, read: u64 },
    #[error("the assignment of pieces to slots repeats after {steps} steps, expected at most {PERIOD_STEPS_MAX}")]
    Period { steps: u64 },
    #[error("{action} appears {listed} times in its actor's ordered list but fires {per_step} times per step")]
    Ordered { action: String, listed: u32, per_step: u32 },
    #[error("{action} can fire without end: it is not external and none of its inputs depends on an external action")]
    Unbounded { action: String },
    #[error("this is one process's part of a plan, but a simulation needs the whole plan")]
    Part,
    #[error(
        "{action}, firing {firing}: continues a piece of '{added}' but begins a piece of '{begun}': outputs that \
         accumulate must begin their pieces in the same firings"
    )]
    Accumulation { action: String, firing: u32, added: String, begun: String },
}
