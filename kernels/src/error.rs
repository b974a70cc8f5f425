//! The error type of this crate.

/// A result with the error of this crate.
pub type Result<T, E = KernelError> = std::result::Result<T, E>;

/// An error of the layers below the actors.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum KernelError {
    /// An op received buffers that it cannot process. This is a bug of the planner or of a custom kernel.
    #[error("{op}: {what}: expected {expected}, got {got}")]
    Arguments {
        /// The op's name.
        op: String,
        /// The invalid argument or property.
        what: String,
        /// What the op requires.
        expected: String,
        /// What the op received.
        got: String,
    },
    /// An op received values that no valid program produces, such as a token id outside the vocabulary.
    #[error("{op}: {what}")]
    Data {
        /// The op's name.
        op: String,
        /// The invalid value, with its numbers.
        what: String,
    },
    /// A kernel panicked.
    #[error("kernel {launch} of program {program} panicked: {message}")]
    Panic {
        /// Index of the launch, and its op.
        launch: String,
        /// Name of the program.
        program: String,
        /// The panic's message.
        message: String,
    },
    /// The members of a collective made different calls.
    #[error("collective mismatch in group {group}, member {member}: the other members expect {expected}, got {got}")]
    CollectiveMismatch {
        /// Group id.
        group: u32,
        /// The member that disagrees.
        member: usize,
        /// The call of the other members.
        expected: String,
        /// The call of this member.
        got: String,
    },
    /// A connection between two members of a group failed, or received bytes that are not a valid message.
    #[error("group {group}: link of device {rank} to device {peer} failed: {cause}")]
    Link {
        /// Group id.
        group: u32,
        /// Rank of the device that detected the failure.
        rank: usize,
        /// Rank of the device at the other end of the connection. This device is the likely cause.
        peer: usize,
        /// The cause.
        cause: String,
    },
    /// An MPI call failed.
    #[error("{call}: {cause}")]
    Mpi {
        /// The call's name in MPI.
        call: &'static str,
        /// The error text of MPI.
        cause: String,
    },
    /// The session was aborted while an operation waited.
    #[error("aborted: {cause}")]
    Aborted {
        /// The first cause of the abort.
        cause: String,
    },
    /// A memory allocation failed.
    #[error("device {device}: cannot allocate {bytes} bytes")]
    OutOfMemory {
        /// Rank of the device.
        device: usize,
        /// Requested bytes.
        bytes: usize,
    },
    /// A custom kernel failed.
    #[error("custom kernel {name}: {message}")]
    Custom {
        /// The kernel's name.
        name: String,
        /// The kernel's error text.
        message: String,
    },
    /// A call of the CUDA driver or of a CUDA library failed.
    #[error("{place}: {call} failed: {name} ({code}): {text}")]
    Cuda {
        /// The device and, if known, the stream, program and launch.
        place: String,
        /// The library's name for the call.
        call: &'static str,
        /// The library's error code.
        code: u32,
        /// The name of the error code.
        name: String,
        /// The library's error text.
        text: String,
    },
    /// The run-time compiler rejected CUDA C source.
    #[error("{file} does not compile for {target}:\n{log}")]
    Compile {
        /// File name of the source.
        file: String,
        /// Target architecture.
        target: String,
        /// The compiler's log.
        log: String,
    },
    /// A required driver, device or library is missing on this machine, or is too old.
    #[error("{what}: {hint}")]
    Unavailable {
        /// What is missing.
        what: String,
        /// How to install what is missing.
        hint: String,
    },
    /// The system cannot start a thread.
    #[error("cannot start the thread {name}: {cause}; {THREADS_HINT}")]
    Thread {
        /// The thread's name.
        name: String,
        /// The error that the system returned.
        cause: String,
    },
    /// The stream has ended.
    #[error("stream of device {device} is closed")]
    Closed {
        /// Rank of the device.
        device: usize,
    },
}

/// What the user can change if the system cannot start a thread.
pub const THREADS_HINT: &str = "raise the limit on processes and threads (`ulimit -u`, `pids.max` of the cgroup)";

impl KernelError {
    /// Creates a [`KernelError::Thread`].
    pub fn thread(name: &str, cause: &std::io::Error) -> Self {
        Self::Thread { name: name.into(), cause: cause.to_string() }
    }

    /// Creates a [`KernelError::Arguments`].
    pub fn arguments(op: &str, what: &str, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Arguments { op: op.to_owned(), what: what.to_owned(), expected: expected.into(), got: got.into() }
    }
}

impl From<KernelError> for std::io::Error {
    fn from(error: KernelError) -> Self {
        Self::other(error)
    }
}
