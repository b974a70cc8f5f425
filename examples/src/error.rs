//! The errors of `gpt`: texts, exit codes, and hints that name its flags.

use shardflow::checkpoint::error::StoreOperation;
use shardflow::checkpoint_manager::ManagerError;
use shardflow::files::{self, OutputFileError};
use shardflow::graph::optimizer::Overflow;
use shardflow::job::membership::MembershipError;
use shardflow::job::rendezvous::RendezvousError;
use shardflow::prelude::*;
use shardflow::program::ProgramError;
use shardflow::session::THREADS_HINT;
use shardflow::trace::TraceError;
use shardflow::watch::WatchError;

/// The state that a training saved before it ended on request.
#[derive(Debug)]
pub enum Saved {
    /// The last step is done, and all files are written.
    All,
    /// A checkpoint of the last step is saved in this store. The second field is the command's resume policy.
    Checkpoint(String, Resume),
    /// Nothing is saved.
    Nothing,
}

/// The reason why the program ends early.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error texts describe the variants")]
pub enum GptError {
    /// Flags or data that cannot be used.
    #[error(transparent)]
    Usage(#[from] ProgramError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    OutputFile(#[from] OutputFileError),
    #[error("cannot write log {}: {}", .0.path.display(), .0.cause)]
    Log(OutputFileError),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error("--init-from {0}")]
    InitFrom(Box<SessionError>),
    #[error("--save {0}")]
    Save(Box<SessionError>),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("{flag}{0}", flag = flag_of(.0))]
    Checkpoints(#[from] ManagerError),
    #[error("--device cuda: {0}")]
    Device(KernelError),
    #[error("--listen {0}")]
    Watch(#[from] WatchError),
    #[error("--trace: {0}")]
    Trace(#[from] TraceError),
    #[error("cannot handle signals: {0}")]
    Signals(std::io::Error),
    #[error("ended after step {steps} because of {}; {saved}", requester(*.exit))]
    Ended { exit: Exit, steps: u64, process: u32, saved: Saved },
}

/// Returns the flag that causes a checkpoint error, for the beginning of the error text.
fn flag_of(error: &ManagerError) -> &'static str {
    match error {
        ManagerError::Store(_) => "--checkpoint ",
        ManagerError::Present { .. } => "--resume never is given, but ",
        _ => "",
    }
}

/// Returns the signal or event that requested the end.
fn requester(exit: Exit) -> &'static str {
    match exit {
        Exit::Signal(1) => "SIGHUP",
        Exit::Signal(2) => "SIGINT",
        Exit::Signal(_) => "SIGTERM",
        Exit::CannotWrite => "a rank that cannot write its log or trace",
        _ => "SIGUSR1 or the end of the job's time",
    }
}

impl std::fmt::Display for Saved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("the training is done"),
            Self::Checkpoint(place, _) => write!(f, "this step is saved in {place}"),
            Self::Nothing => f.write_str("nothing is saved"),
        }
    }
}

impl From<GptError> for ProgramError {
    fn from(error: GptError) -> Self {
        let (text, hint, exit) = (error.to_string(), error.hint(), error.exit());
        Self { text, hint, exit, first_cause_rank: error.first_cause_rank() }
    }
}

impl GptError {
    /// The exit code of the program.
    pub fn exit(&self) -> Exit {
        use SessionError::Checkpoint;
        match self {
            Self::Usage(error) => error.exit,
            Self::Cluster(error) => error.exit(),
            Self::Checkpoints(error) => error.exit(),
            Self::Signals(error) if is_thread_limit(error) => Exit::Refused,
            Self::Signals(_) => Exit::Internal,
            Self::Device(error) => SessionError::Kernel(error.clone()).exit(),
            Self::Ended { exit, .. } => *exit,
            Self::OutputFile(OutputFileError { cause, .. })
            | Self::Log(OutputFileError { cause, .. })
            | Self::Trace(TraceError { source: cause, .. })
                if files::is_full(cause.kind()) =>
            {
                Exit::CannotWrite
            }
            Self::Watch(WatchError::Listen { source, .. }) if is_thread_limit(source) => Exit::Refused,
            Self::OutputFile(_) | Self::Log(_) | Self::Watch(_) | Self::Trace(_) => Exit::Usage,
            Self::InitFrom(error) if matches!(**error, Checkpoint(_)) => Exit::Usage,
            Self::Save(error) if matches!(**error, Checkpoint(_)) => Exit::CannotWrite,
            Self::Compile(_) => Exit::Refused,
            Self::InitFrom(error) | Self::Save(error) => error.exit(),
            Self::Session(error) => error.exit(),
        }
    }

    /// True for a failure that only this process can see.
    pub fn is_of_this_process(&self) -> bool {
        use GptError::{Device, Log, OutputFile, Signals, Trace, Usage, Watch};
        matches!(self, Usage(_) | OutputFile(_) | Log(_) | Device(_) | Watch(_) | Trace(_) | Signals(_))
    }

    /// The rank that failed first, if it is known.
    fn first_cause_rank(&self) -> Option<u32> {
        match self {
            Self::InitFrom(error) | Self::Save(error) => error.first_cause_rank(),
            Self::Session(error) => error.first_cause_rank(),
            Self::Checkpoints(error) => error.session().and_then(SessionError::first_cause_rank),
            // This process is the first cause. The launcher does not restart a job that reports this rank and code 75.
            Self::Ended { process, .. } => Some(*process),
            _ => None,
        }
    }

    /// Suggests what the user can change.
    fn hint(&self) -> String {
        let hint = match self {
            Self::Usage(error) => &error.hint,
            Self::Signals(error) if is_thread_limit(error) => THREADS_HINT,
            Self::Watch(WatchError::Listen { source, .. }) if is_thread_limit(source) => THREADS_HINT,
            Self::Watch(_) => "give an address of this machine, and ports that are free",
            Self::OutputFile(OutputFileError { cause, .. })
            | Self::Log(OutputFileError { cause, .. })
            | Self::Trace(TraceError { source: cause, .. }) => files::hint(cause.kind()),
            Self::Compile(error) => compile_hint(error),
            Self::Cluster(error) => cluster_hint(error),
            Self::Session(error) => session_hint(error),
            Self::InitFrom(error) => match &**error {
                SessionError::Checkpoint(CheckpointError::Unfit { .. }) => {
                    "give the --data, --layers, --heads, --width and --context that the file was saved with"
                }
                SessionError::Checkpoint(CheckpointError::Dtype { .. }) => {
                    "convert the file's tensors to F32, F16 or BF16"
                }
                SessionError::Disagreement(_) => "give all ranks the same file",
                _ => "give a file that `gpt --save` wrote",
            },
            Self::Save(error) => match &**error {
                SessionError::Checkpoint(error) => error.io_kind().map_or("", files::hint),
                _ => "",
            },
            Self::Checkpoints(error) => manager_hint(error),
            Self::Ended { saved: Saved::Checkpoint(_, Resume::Never), .. } => {
                "to continue from there, run the same command with --resume auto"
            }
            Self::Ended { saved: Saved::Checkpoint(..), .. } => "to continue from there, run the same command",
            Self::Ended { saved: Saved::Nothing, .. } => {
                "the same command starts from step 0; give --checkpoint DIR, so that a checkpoint is saved at the end"
            }
            Self::Device(_) => DOCTOR_HINT,
            Self::Ended { saved: Saved::All, .. } | Self::Signals(_) => "",
        };
        match self {
            // Another policy for non-finite steps does not help if the loaded parameters have Inf or NaN.
            Self::Session(SessionError::NonFinite(found)) if !is_loaded(found) => {
                format!("{hint}; --on-non-finite selects another policy")
            }
            _ => hint.into(),
        }
    }
}

const DOCTOR_HINT: &str = "run `shardflow doctor` to list the devices and libraries of this machine";
const BUG_HINT: &str = "this is a bug in Shardflow: please report it with the command and this text";
const DEVICE_MEMORY_HINT: &str = "--memory-mib sets the memory limit of each device";

fn compile_hint(error: &CompileError) -> &'static str {
    match error {
        CompileError::Devices { .. } => "reduce the sizes in --mesh; their product is the number of devices",
        CompileError::Plan(PlanError::Memory { .. }) => DEVICE_MEMORY_HINT,
        CompileError::Graph(_) | CompileError::Range { .. } => "change the flag that gives this size; see `gpt --help`",
        CompileError::Plan(_) => BUG_HINT,
    }
}

/// True if the system cannot start a thread.
fn is_thread_limit(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::WouldBlock
}

fn cluster_hint(error: &ClusterError) -> &'static str {
    let is_limited = match error {
        ClusterError::System { cause, .. } => is_thread_limit(cause),
        ClusterError::Membership(MembershipError::Io { source, .. }) => is_thread_limit(source),
        ClusterError::Transport(error) => error.is_thread_limit(),
        ClusterError::Rendezvous(RendezvousError::Transport(error)) => error.is_thread_limit(),
        _ => false,
    };
    if is_limited {
        return THREADS_HINT;
    }
    match error.exit() {
        Exit::PeerUnavailable => {
            "check that all ranks are started with the same program and flags, and can reach rank 0"
        }
        // The error text already states the cause.
        _ => "",
    }
}

fn session_hint(error: &SessionError) -> &'static str {
    match error {
        SessionError::PlanFile { source, .. } => files::hint(source.kind()),
        SessionError::Plan(PlanError::Memory { .. }) => DEVICE_MEMORY_HINT,
        SessionError::Plan(PlanError::NodeMemory { extra: 1.., .. }) => {
            "reduce --batch, --width or --layers, give --sample 0 to generate no text, use more nodes, free up memory \
             on this node, or raise its memory limit"
        }
        SessionError::Plan(PlanError::NodeMemory { .. }) => {
            "reduce --batch, --width or --layers, use more nodes, free up memory on this node, or raise its memory limit"
        }
        SessionError::Kernel(KernelError::OutOfMemory { .. }) => {
            "reduce the model or the batch, or raise the limit on memory (`ulimit -v`)"
        }
        SessionError::Kernel(KernelError::Unavailable { .. }) => DOCTOR_HINT,
        SessionError::NonFinite(found) => non_finite_hint(found),
        SessionError::Cluster(error) => cluster_hint(error),
        SessionError::Declared(_) | SessionError::Disagreement(_) => "",
        SessionError::Failed(failure) if failure.is_peer_failure() => {
            "see the log of that rank; a run with --checkpoint continues from its last checkpoint, if there is one"
        }
        SessionError::Failed(_) | SessionError::Kernel(_) | SessionError::Actors(_) | SessionError::Checkpoint(_)
            if error.exit() != Exit::Internal =>
        {
            ""
        }
        _ => BUG_HINT,
    }
}

/// Suggests how to keep steps finite. Clipping helps if a moment overflows: moments depend only on gradients.
fn non_finite_hint(found: &NonFinite) -> &'static str {
    if is_loaded(found) {
        return "the loaded file or checkpoint has parameters with Inf or NaN: give another one";
    }
    match found.overflow {
        Some(Overflow::Parameter) => "try a lower --lr",
        Some(_) => "try --clip 1, or less",
        None => "try a lower --lr, or --clip 1",
    }
}

/// True if a loaded parameter is not finite. A step never stores a parameter that is not finite.
fn is_loaded(found: &NonFinite) -> bool {
    found.first.as_ref().is_some_and(|first| first.op == "parameter")
}

/// Suggests how to fix an error of the checkpoint manager.
fn manager_hint(error: &ManagerError) -> &'static str {
    match error {
        ManagerError::Store(error) | ManagerError::Snapshot(error) => match &**error {
            SessionError::Checkpoint(error) => checkpoint_hint(error),
            SessionError::Disagreement(_) => "give all ranks one --checkpoint folder that they share",
            SessionError::Plan(_) => session_hint(error),
            _ => "",
        },
        ManagerError::Present { .. } => "give another --checkpoint, or --resume auto to continue from this checkpoint",
        ManagerError::NoCheckpoint(found) | ManagerError::TooManyRollbacks { found, .. } => non_finite_hint(found),
        ManagerError::Last { cause, .. } => checkpoint_hint(cause),
    }
}

fn checkpoint_hint(error: &CheckpointError) -> &'static str {
    use std::io::ErrorKind;
    let is_read = |doing: &StoreOperation| matches!(doing, StoreOperation::Read | StoreOperation::List);
    match (error, error.io_kind()) {
        // The error text already contains a hint.
        (CheckpointError::Thread(_), _) => "",
        (CheckpointError::Absent { .. }, _) => {
            "give the folder that has the checkpoint, or --resume auto to start from step 0"
        }
        (CheckpointError::Unfit { .. }, _) => {
            "use the flags and the data of the run that saved the checkpoint, or give another --checkpoint"
        }
        (CheckpointError::Damaged { .. }, _) => {
            "no checkpoint there is intact; restore one from a copy, or give another --checkpoint"
        }
        (CheckpointError::Fenced { .. }, _) => {
            "end the other run if there is one, or restore the folder if it was moved; then start this run again"
        }
        (CheckpointError::NoRoom { checkpoints: 1, .. }, _) => "free up space, or give another --checkpoint",
        (CheckpointError::NoRoom { .. }, _) => {
            "free up space, keep fewer checkpoints with --checkpoint-keep and --checkpoint-keep-every, or give another \
             --checkpoint"
        }
        (CheckpointError::NotShared { .. }, _) => "give a --checkpoint that all nodes share",
        (CheckpointError::Others { .. }, _) => "see the log of that rank",
        (CheckpointError::Stalled { .. }, _) => "check the file system, or the network to the store",
        (CheckpointError::Store { doing, .. }, Some(ErrorKind::PermissionDenied)) if is_read(doing) => {
            "give a --checkpoint that this user may read"
        }
        (_, Some(ErrorKind::NotFound | ErrorKind::NotADirectory)) => {
            "give a folder, or a path where one can be created"
        }
        (_, cause) => cause.map_or("", files::hint),
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use shardflow::exit::Report;
    use shardflow::job::rendezvous::{RendezvousError, RendezvousRefusal};

    use super::*;

    fn hint_of(error: impl Into<SessionError>) -> String {
        GptError::Session(error.into()).hint()
    }

    /// If another rank reports the failure, the hint does not advise to start all ranks.
    #[test]
    fn hints_fit_the_cause() {
        let refused = |exit| {
            let report = Report { rank: 1, exit, cause: "--lr must be finite".into(), ..Report::default() };
            ClusterError::Rendezvous(RendezvousError::Refused(RendezvousRefusal::Failed(report)))
        };
        assert_eq!([2, 65, 76, 78].map(|exit| hint_of(refused(exit))), [""; 4]);
        assert!(hint_of(refused(69)).contains("can reach rank 0"));
        let kernel = |cause| hint_of(SessionError::Kernel(cause));
        assert_eq!(
            kernel(KernelError::Data { op: "embedding".into(), what: "token 7 of 5".into() }),
            "",
            "bad data is not a bug"
        );
        let file = |kind: ErrorKind| GptError::Log(OutputFileError { path: "log".into(), cause: kind.into() }).hint();
        let save = CheckpointError::Io { path: "model".into(), source: ErrorKind::StorageFull.into() };
        assert_eq!(GptError::Save(Box::new(save.into())).exit(), Exit::CannotWrite);
        assert!(file(ErrorKind::StorageFull).contains("free up space"));
        assert!(file(ErrorKind::PermissionDenied).contains("immutable"));
    }

    #[test]
    fn hints_for_checkpoints_fit_the_cause() {
        let io = |kind: ErrorKind| CheckpointError::Io { path: "x".into(), source: kind.into() };
        for (error, expected) in [
            (io(ErrorKind::StorageFull), "free up space"),
            (io(ErrorKind::ReadOnlyFilesystem), "may write"),
            (io(ErrorKind::PermissionDenied), "may write"),
            (io(ErrorKind::NotADirectory), "give a folder"),
            (CheckpointError::NotShared { place: "x".into(), ranks: "rank 1".into() }, "all nodes share"),
        ] {
            assert!(checkpoint_hint(&error).contains(expected), "{error}: {}", checkpoint_hint(&error));
        }
        let room = |checkpoints| CheckpointError::NoRoom { place: "x".into(), checkpoints, why: String::new() };
        let room = |checkpoints| checkpoint_hint(&room(checkpoints)).contains("--checkpoint-keep");
        assert!(room(2) && !room(1));
        assert_eq!(checkpoint_hint(&io(ErrorKind::Other)), "", "an unknown cause has no hint");
    }
}
