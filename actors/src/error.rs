//! The errors of this crate.

use shardflow_kernels::error::KernelError;

use crate::spec::{ActorId, RegisterId};
use crate::transport::frame::FrameError;

/// A plan whose parts do not fit together; found by [`crate::check::check`] before anything runs.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// An id points outside its table.
    #[error("{at}: no {what} has index {index}")]
    UnknownIndex {
        /// Actor, action or register that holds the id.
        at: String,
        /// `actor`, `action` or `register`.
        what: &'static str,
        /// The id.
        index: usize,
    },
    /// A count that must be at least one is zero.
    #[error("{at}: {what} is 0, at least 1 is needed")]
    Zero {
        /// Where.
        at: String,
        /// Which count.
        what: &'static str,
    },
    /// A register must be written by one output port of its producer, exactly.
    #[error("register '{register}' is written by {writers} output ports, exactly 1 is needed, of actor {producer}")]
    Writers {
        /// Name of the register.
        register: String,
        /// Name of its producer.
        producer: String,
        /// Output ports found.
        writers: usize,
    },
    /// The list of readers and the input ports do not name each other one to one.
    #[error("register '{register}' and {action} disagree: {listed} entries in its readers, {ports} input ports")]
    Readers {
        /// Name of the register.
        register: String,
        /// Actor and action.
        action: String,
        /// Times that the register's readers name the action.
        listed: usize,
        /// Input ports of the action that name the register.
        ports: usize,
    },
    /// Firings of an action do not divide into whole pieces.
    #[error(
        "{action} fires {per_step} times a step, which {firings_per_piece} firings a piece of '{register}' do not divide"
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
    #[error("register '{register}': {written} pieces a step are written, {reader} reads {read}")]
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
    /// An ordered list fires an action not `per_step` times.
    #[error("{action} stands {listed} times in its actor's ordered list but fires {per_step} times a step")]
    Ordered {
        /// Actor and action.
        action: String,
        /// Times in the list.
        listed: u32,
        /// Firings in a step.
        per_step: u32,
    },
    /// Nothing that the host gives bounds how often an action fires.
    #[error("{action} can fire without end: it is not external and none of its inputs follows from an external action")]
    Unbounded {
        /// Actor and action.
        action: String,
    },
    /// Outputs of one action that accumulate must do so over the same firings.
    #[error("{action} accumulates over {first} firings in one output and over {second} in another")]
    Accumulation {
        /// Actor and action.
        action: String,
        /// `firings_per_piece` of one output.
        first: u32,
        /// Of another.
        second: u32,
    },
}

/// An event that no correct peer sends: a bug, a corrupted message, or peers that run different plans.
/// Labels are those of [`crate::protocol`].
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProtocolError {
    /// CR-4: pieces come in order, each once.
    #[error("CR-4 register '{register}': {message} carries piece {got}, expected {expected}")]
    WrongPiece {
        /// Name of the register.
        register: String,
        /// `filled` or `released by ...`.
        message: String,
        /// The piece that is due.
        expected: u64,
        /// The piece that came.
        got: u64,
    },
    /// CR-4: piece `n` lies in slot `n mod slots`.
    #[error("CR-4 register '{register}': piece {piece} comes in slot {got}, expected {expected}")]
    WrongSlot {
        /// Name of the register.
        register: String,
        /// The piece.
        piece: u64,
        /// Where it has to be.
        expected: u32,
        /// Where it is said to be.
        got: u32,
    },
    /// CR-3: a producer has filled more slots than there are.
    #[error("CR-3 register '{register}': reader {reader} of {slots} slots got piece {piece} with all of them unread")]
    Overflow {
        /// Name of the register.
        register: String,
        /// Actor and action.
        reader: String,
        /// Slots of the register.
        slots: u32,
        /// The piece too many.
        piece: u64,
    },
    /// A reader has released a piece that was never published.
    #[error("CR-1 register '{register}': {reader} released piece {piece}, only {published} were published")]
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
    /// A message for a register, or a reader, that this actor does not have.
    #[error("actor {actor} got a message for reader {reader} of register {register:?}, which is not its own")]
    Misrouted {
        /// Name of the actor.
        actor: String,
        /// The register.
        register: RegisterId,
        /// Index in the register's readers.
        reader: u32,
    },
    /// CR-5: the end of a firing that is not in flight.
    #[error("CR-5 actor {actor}: action {action} reports {what}, in flight is {in_flight:?}")]
    NotInFlight {
        /// Name of the actor.
        actor: String,
        /// Index of the action.
        action: u32,
        /// `done` or `signal of output n`.
        what: String,
        /// Index of the action in flight.
        in_flight: Option<u32>,
    },
    /// A signal for an output that is not early, or is published already.
    #[error("{action}: signal for output {output}, which is {why}")]
    UnexpectedSignal {
        /// Actor and action.
        action: String,
        /// Output port.
        output: u32,
        /// What speaks against it.
        why: &'static str,
    },
    /// A firing ended and one of its early outputs was never signalled.
    #[error("{action}: ended without the signal of its early output {output}")]
    MissingSignal {
        /// Actor and action.
        action: String,
        /// Output port.
        output: u32,
    },
    /// A token for an action that takes none.
    #[error("actor {actor}: action {action} takes no tokens from the host")]
    UnexpectedToken {
        /// Name of the actor.
        actor: String,
        /// Index of the action.
        action: u32,
    },
    /// One of the labelled invariants does not hold.
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

/// What ends a session first. Everything else that fails afterwards follows from it.
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
        /// What failed.
        cause: Box<KernelError>,
    },
    /// The protocol was broken.
    #[error("{actor} on device {device}: {cause}")]
    Protocol {
        /// Name of the actor.
        actor: String,
        /// Rank of the device.
        device: usize,
        /// What was broken.
        cause: ProtocolError,
    },
    /// An actor panicked: a bug of this crate.
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
    /// A peer, or the way to it.
    #[error("rank {process}: {cause}")]
    Peer {
        /// Number of the process.
        process: u32,
        /// What it did, or what became of it.
        cause: PeerError,
    },
    /// Nothing moved although there was work.
    #[error("no progress for {idle_ms} ms: {cause}\n{report}")]
    Stalled {
        /// Milliseconds since the last progress.
        idle_ms: u64,
        /// What everything waits for in the end, and how (see [`crate::hang`]).
        cause: String,
        /// The process that is waited for, where it is another one.
        process: Option<u32>,
        /// Who waits for which register of whom.
        report: String,
    },
}

impl Failure {
    /// True when another process failed, and not this one.
    pub fn is_of_a_peer(&self) -> bool {
        matches!(self, Self::Peer { .. } | Self::Stalled { process: Some(_), .. })
    }
}

/// What a peer process can do wrong.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum PeerError {
    /// The connection ended or broke.
    #[error("connection lost: {message}")]
    Lost {
        /// What the system says.
        message: String,
    },
    /// It sent what is no frame of ours.
    #[error("sent what cannot be read: {0}")]
    Frame(#[from] FrameError),
    /// It sent what no process that runs the same plan sends.
    #[error("sent {what}, which the plan does not allow")]
    Unexpected {
        /// What it sent.
        what: String,
    },
    /// One of its actors sent what breaks the protocol.
    #[error("sent what breaks the protocol: {0}")]
    Protocol(ProtocolError),
    /// It did not get as far as the others.
    #[error("not ready after {seconds} s")]
    Late {
        /// How long it was waited for.
        seconds: u64,
    },
    /// It has ended in order, though this process still needs it.
    #[error("it has ended the session, and this process has not: do all make the same steps?")]
    Ended,
    /// It failed, and says why.
    #[error("{cause}")]
    Failed {
        /// Its first cause.
        cause: String,
        /// The exit code that it ends with.
        exit: u8,
    },
}

impl From<std::io::Error> for PeerError {
    fn from(error: std::io::Error) -> Self {
        Self::Lost { message: error.to_string() }
    }
}

/// What `start` and `give` refuse.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum ActorError {
    /// The plan does not fit together.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The loaded parts do not fit the plan.
    #[error("{at}: {what}: expected {expected}, got {got}")]
    Loaded {
        /// Actor, action or register.
        at: String,
        /// Which part.
        what: &'static str,
        /// What the plan needs.
        expected: String,
        /// What was given.
        got: String,
    },
    /// A thread could not be started.
    #[error("cannot start the thread of device {device}: {message}")]
    Thread {
        /// Rank of the device.
        device: usize,
        /// What the system says.
        message: String,
    },
    /// No such actor or action, or an action that takes no tokens.
    #[error("action {action} of actor {actor:?} takes no tokens from the host")]
    NotExternal {
        /// The actor.
        actor: ActorId,
        /// Index of the action.
        action: u32,
    },
    /// The session has ended.
    #[error("the session has ended: {cause}")]
    Ended {
        /// Why.
        cause: String,
    },
}
