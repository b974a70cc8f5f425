//! The error of this crate.

/// What can go wrong below the actors.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum KernelError {
    /// An op was given buffers it cannot work on: a bug of the planner, or of a custom kernel.
    #[error("{op}: {what}: expected {expected}, got {got}")]
    Arguments {
        /// The op's name.
        op: String,
        /// Which argument, and what of it.
        what: String,
        /// What the op needs.
        expected: String,
        /// What it was given.
        got: String,
    },
    /// Values that no valid program produces, such as a token id outside the vocabulary.
    #[error("{op}: {what}")]
    Data {
        /// The op's name.
        op: String,
        /// What is wrong, with the numbers.
        what: String,
    },
    /// A kernel panicked.
    #[error("kernel {launch} of program {program} panicked: {message}")]
    Panic {
        /// Position and op.
        launch: String,
        /// Name of the program.
        program: String,
        /// The panic's text.
        message: String,
    },
    /// The members of a collective do not agree on what they call.
    #[error("collective mismatch in group {group}: member {member} calls {got}, others call {expected}")]
    CollectiveMismatch {
        /// Group id.
        group: u32,
        /// Member that disagrees.
        member: usize,
        /// What the first member to arrive calls.
        expected: String,
        /// What this one calls.
        got: String,
    },
    /// A connection between two members of a group failed, or what came over it is no message of ours.
    #[error("group {group}: link of device {rank} to device {peer} failed: {cause}")]
    Link {
        /// Group id.
        group: u32,
        /// Rank of the device that noticed.
        rank: usize,
        /// Rank of the device at the other end: the likely culprit.
        peer: usize,
        /// What happened.
        cause: String,
    },
    /// MPI cannot do what was asked.
    #[error("{call}: {cause}")]
    Mpi {
        /// MPI's name of the call.
        call: &'static str,
        /// What MPI says.
        cause: String,
    },
    /// The session was aborted while this was waiting.
    #[error("aborted: {cause}")]
    Aborted {
        /// The first cause.
        cause: String,
    },
    /// Memory could not be had.
    #[error("device {device}: cannot allocate {bytes} bytes")]
    OutOfMemory {
        /// Rank of the device.
        device: usize,
        /// Bytes asked for.
        bytes: usize,
    },
    /// A custom kernel failed.
    #[error("custom kernel {name}: {message}")]
    Custom {
        /// The kernel's name.
        name: String,
        /// What it says.
        message: String,
    },
    /// A call of the CUDA driver, or of a library above it, failed.
    #[error("{place}: {call} failed: {name} ({code}): {text}")]
    Cuda {
        /// Which device, and where there is one, which stream, program and launch.
        place: String,
        /// The library's name of the call.
        call: &'static str,
        /// The library's code.
        code: u32,
        /// The code's name.
        name: String,
        /// What the library says of it.
        text: String,
    },
    /// CUDA C that the run-time compiler refuses.
    #[error("{file} does not compile for {target}:\n{log}")]
    Compile {
        /// Name of the kernels' file.
        file: String,
        /// Architecture.
        target: String,
        /// What the compiler says.
        log: String,
    },
    /// A driver, device or library that is needed is not on this machine, or is too old.
    #[error("{what}: {hint}")]
    Unavailable {
        /// What is missing.
        what: String,
        /// How to get it.
        hint: String,
    },
    /// The stream has ended.
    #[error("stream of device {device} is closed")]
    Closed {
        /// Rank of the device.
        device: usize,
    },
}

impl KernelError {
    /// An [`KernelError::Arguments`].
    pub fn arguments(op: &str, what: &str, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Arguments { op: op.to_owned(), what: what.to_owned(), expected: expected.into(), got: got.into() }
    }
}

impl From<KernelError> for std::io::Error {
    fn from(error: KernelError) -> Self {
        Self::other(error)
    }
}
