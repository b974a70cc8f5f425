//! The errors of this crate.

use shardflow_kernels::error::KernelError;

use crate::remote::frame::FrameError;
use crate::spec::{ActorId, RegisterId};

/// An inconsistent plan; [`crate::check::check`] finds it before anything runs.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// An id points outside its table.
    #[error("{at}: no {kind} has index {index}")]
    UnknownIndex {
        /// Actor, action or register that holds the id.
        at: String,
        /// `actor`, `action` or `register`.
        kind: &'static str,
        /// The id.
        index: usize,
    },
    /// A count is zero but must be at least one.
    #[error("{at}: {count} is 0, expected at least 1")]
    Zero {
        /// Actor, action or register.
        at: String,
        /// Name of the count.
        count: &'static str,
    },
    /// Not exactly one output port of the producer writes the register.
    #[error("register '{register}' is written by {writers} output ports of actor {producer}, expected exactly 1")]
    Writers {
        /// Name of the register.
        register: String,
        /// Name of its producer.
        producer: String,
        /// Output ports found.
        writers: usize,
    },
    /// The readers of a register and the input ports do not match one to one.
    #[error("register '{register}' and {action} disagree: {listed} entries in its readers, {ports} input ports")]
    Readers {
        /// Name of the register.
        register: String,
        /// Actor and action.
        action: String,
        /// How often the register's readers contain the action.
        listed: usize,
        /// Input ports of the action that name the register.
        ports: usize,
    },
    /// The firings of an action do not divide into whole pieces.
    #[error(
        "{action} fires {per_step} times per step, not a multiple of the {firings_per_piece} firings per piece of '{register}'"
    )]
    Remainder {
        /// Actor and action.
        action: String,
        /// Name of the register.
        register: String,
        /// Firings in a step.
        per_step: u32,
        /// Firings that share a piece.
        firings_per_piece: u32,
    },
    /// A register is filled and emptied at different rates.
    #[error("register '{register}': {written} pieces per step are written, {reader} reads {read}")]
    Rates {
        /// Name of the register.
        register: String,
        /// Pieces written in a step.
        written: u32,
        /// Actor and action that read.
        reader: String,
        /// Pieces read in a step.
        read: u32,
    },
    /// An ordered list does not contain an action `per_step` times.
    #[error("{action} appears {listed} times in its actor's ordered list but fires {per_step} times per step")]
    Ordered {
        /// Actor and action.
        action: String,
        /// Times in the list.
        listed: u32,
        /// Firings in a step.
        per_step: u32,
    },
    /// No host token bounds how often an action fires.
    #[error("{action} can fire without end: it is not external and none of its inputs depends on an external action")]
    Unbounded {
        /// Actor and action.
        action: String,
    },
    /// The accumulating outputs of one action differ in `firings_per_piece`.
    #[error("{action} accumulates over {first} firings in one output and over {second} in another")]
    Accumulation {
        /// Actor and action.
        action: String,
        /// `firings_per_piece` of one output.
        first: u32,
        /// `firings_per_piece` of another output.
        second: u32,
    },
}

/// An event that no correct peer sends: caused by a bug, a corrupted message, or peers with different plans.
/// [`crate::protocol`] defines the labels.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProtocolError {
    /// CR-4: pieces arrive in order, each once.
    #[error("CR-4 register '{register}': {message} carries piece {got}, expected {expected}")]
    WrongPiece {
        /// Name of the register.
        register: String,
        /// `filled` or `released by ...`.
        message: String,
        /// The expected piece.
        expected: u64,
        /// The received piece.
        got: u64,
    },
    /// CR-4: piece `n` lies in slot `n mod slots`.
    #[error("CR-4 register '{register}': piece {piece} arrived in slot {got}, expected {expected}")]
    WrongSlot {
        /// Name of the register.
        register: String,
        /// The piece.
        piece: u64,
        /// The expected slot.
        expected: u32,
        /// The slot in the message.
        got: u32,
    },
    /// CR-3: a producer has filled more slots than the register has.
    #[error("CR-3 register '{register}': reader {reader} received piece {piece} while all {slots} slots are unread")]
    Overflow {
        /// Name of the register.
        register: String,
        /// Actor and action.
        reader: String,
        /// Slots of the register.
        slots: u32,
        /// The excess piece.
        piece: u64,
    },
    /// A reader has released an unpublished piece.
    #[error("CR-1 register '{register}': {reader} released piece {piece}, but only {published} pieces are published")]
    Unpublished {
        /// Name of the register.
        register: String,
        /// Actor and action.
        reader: String,
        /// The piece.
        piece: u64,
        /// Pieces published so far.
        published: u64,
    },
    /// A message for a register or reader of another actor.
    #[error(
        "actor {actor} received a message for reader {reader} of register {register:?}, which belongs to another actor"
    )]
    Misrouted {
        /// Name of the actor.
        actor: String,
        /// The register.
        register: RegisterId,
        /// Index in the register's readers.
        reader: u32,
    },
    /// CR-5: the end of a firing that is not in flight.
    #[error("CR-5 actor {actor}: action {action} reports {event}, but the action in flight is {in_flight:?}")]
    NotInFlight {
        /// Name of the actor.
        actor: String,
        /// Index of the action.
        action: u32,
        /// `done` or `signal of output n`.
        event: String,
        /// Index of the action in flight.
        in_flight: Option<u32>,
    },
    /// A signal for an output that is not early or is already published.
    #[error("{action}: signal for output {output}, which is {reason}")]
    UnexpectedSignal {
        /// Actor and action.
        action: String,
        /// Output port.
        output: u32,
        /// Why the signal is unexpected.
        reason: &'static str,
    },
    /// A firing ended without the signal of an early output.
    #[error("{action}: the firing ended without the signal of its early output {output}")]
    MissingSignal {
        /// Actor and action.
        action: String,
        /// Output port.
        output: u32,
    },
    /// A token for an action that is not external.
    #[error("actor {actor}: action {action} accepts no tokens from the host")]
    UnexpectedToken {
        /// Name of the actor.
        actor: String,
        /// Index of the action.
        action: u32,
    },
    /// A labelled invariant does not hold.
    #[error("{label} {at}: {numbers}")]
    Invariant {
        /// `CR-1` and so on.
        label: &'static str,
        /// Register or actor.
        at: String,
        /// The counters.
        numbers: String,
    },
}

/// The first cause of a session's end. Later failures follow from it.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum Failure {
    /// A launch failed.
    #[error("{actor} on device {device}, action {action}: {cause}")]
    Kernel {
        /// Name of the actor.
        actor: String,
        /// Rank of the device.
        device: usize,
        /// Name of the action in flight.
        action: String,
        /// The error of the launch.
        cause: Box<KernelError>,
    },
    /// A protocol violation in this process.
    #[error("{actor} on device {device}: {cause}")]
    Protocol {
        /// Name of the actor.
        actor: String,
        /// Rank of the device.
        device: usize,
        /// The violation.
        cause: ProtocolError,
    },
    /// An actor panicked: a bug in this crate.
    #[error("{actor} on device {device} panicked{}: {message}", .action.as_ref().map(|a| format!(" in action {a}")).unwrap_or_default())]
    Panic {
        /// Name of the actor.
        actor: String,
        /// Rank of the device.
        device: usize,
        /// Name of the action in flight.
        action: Option<String>,
        /// The panic's text.
        message: String,
    },
    /// A peer failed, or the connection to it.
    #[error("rank {process}: {cause}")]
    Peer {
        /// Number of the process.
        process: u32,
        /// What happened.
        cause: PeerError,
    },
    /// No progress although work is left.
    #[error("no progress for {idle_ms} ms: {cause}\n{report}")]
    Stalled {
        /// Milliseconds since the last progress.
        idle_ms: u64,
        /// The root cause with the chain of waits, see [`crate::hang`].
        cause: String,
        /// The process that contains the cause, if it is another one.
        process: Option<u32>,
        /// What each actor waits for or has in flight.
        report: String,
    },
}

impl Failure {
    /// True if another process failed, not this one.
    pub fn is_peer_failure(&self) -> bool {
        matches!(self, Self::Peer { .. } | Self::Stalled { process: Some(_), .. })
    }
}

/// A failure of a peer process.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum PeerError {
    /// The connection ended or broke.
    #[error("connection lost: {message}")]
    Lost {
        /// The system's error text.
        message: String,
    },
    /// It sent bytes that are not a valid frame.
    #[error("sent an unreadable frame: {0}")]
    Frame(#[from] FrameError),
    /// It sent a message that the plan does not allow.
    #[error("sent {message}, which the plan does not allow")]
    Unexpected {
        /// Description of the message.
        message: String,
    },
    /// One of its actors sent a message that violates the protocol.
    #[error("sent a message that violates the protocol: {0}")]
    Protocol(ProtocolError),
    /// It was not ready in time.
    #[error("not ready after {seconds} s")]
    Late {
        /// The timeout.
        seconds: u64,
    },
    /// It has ended in order while this process still needs it.
    #[error("it has ended the session before this process: do all processes run the same number of steps?")]
    Ended,
    /// It failed and reported the cause.
    #[error("{cause}")]
    Failed {
        /// Its first cause.
        cause: String,
        /// Its exit code.
        exit: u8,
    },
}

impl From<std::io::Error> for PeerError {
    fn from(error: std::io::Error) -> Self {
        Self::Lost { message: error.to_string() }
    }
}

/// Errors of [`crate::shell::start`] and [`crate::shell::RunningSession::add_tokens`].
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum ActorError {
    /// The plan is inconsistent.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The loaded parts do not match the plan.
    #[error("{at}: {part}: expected {expected}, got {got}")]
    Loaded {
        /// Actor, action or register.
        at: String,
        /// The part.
        part: &'static str,
        /// The value that the plan requires.
        expected: String,
        /// The loaded value.
        got: String,
    },
    /// A thread could not be started.
    #[error("cannot start the thread of device {device}: {message}")]
    Thread {
        /// Rank of the device.
        device: usize,
        /// The system's error text.
        message: String,
    },
    /// No such actor or action, or the action is not external.
    #[error("action {action} of actor {actor:?} accepts no tokens from the host")]
    NotExternal {
        /// The actor.
        actor: ActorId,
        /// Index of the action.
        action: u32,
    },
    /// The session has ended.
    #[error("the session has ended: {cause}")]
    Ended {
        /// The first cause.
        cause: String,
    },
}
