//! Errors of a session, their exit codes, and the rank that caused them.

use std::io;
use std::path::PathBuf;

use shardflow_actors::error::{ActorError, Failure};
use shardflow_kernels::error::KernelError;

use super::agreement::RankDisagreement;
use super::numerics::NonFinite;
use super::plan_files::PLAN_HTML;
use crate::checkpoint::error::CheckpointError;
use crate::cluster::ClusterError;
use crate::cluster::failure::{exit_of, exit_of_kernel};
use crate::declare::DeclareError;
use crate::plan::error::PlanError;
use shardflow_job::exit::Exit;
use shardflow_job::rendezvous::{RendezvousError, RendezvousRefusal};

/// Errors of a session.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages explain the fields")]
pub enum SessionError {
    /// An actor, a kernel or a collective failed; this is the first cause.
    #[error("{0}")]
    Failed(#[from] Failure),
    #[error(transparent)]
    Actors(#[from] ActorError),
    /// The plan, including buffers for data of other processes, exceeds its memory budget or the node's memory.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A device is not available, or memory cannot be allocated.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A bug in a kernel, a fault of a device, or an MPI library whose sums differ between ranks.
    #[error(
        "{name} in layout {layout}: copies differ between devices; a kernel, a device or MPI computes wrong values"
    )]
    Copies { name: String, layout: String },
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// A checkpoint or a parameter file cannot be read or written, or does not fit the program.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Declared(#[from] DeclareError),
    /// Ranks differ in a value that must be equal on all ranks; nothing was updated or loaded.
    #[error(transparent)]
    Disagreement(#[from] RankDisagreement),
    #[error("an environment variable such as {} is set, so the plan was written and no session was started", PLAN_HTML)]
    PlanWritten,
    #[error("cannot write the plan to {path}: {source}")]
    PlanFile { path: PathBuf, source: io::Error },
    /// The loss or the gradients of a step are Inf or NaN, or its update could overflow.
    #[error("{0}")]
    NonFinite(Box<NonFinite>),
    #[error("input {name}: expected {expected}, got {got}")]
    Input { name: String, expected: String, got: String },
}

impl SessionError {
    /// Exit code of a program that fails with this error.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Failed(failure) => exit_of(failure),
            // All memory is allocated when a plan is loaded, so the error means that the plan does not fit.
            Self::Kernel(KernelError::OutOfMemory { .. }) => Exit::Refused,
            Self::Kernel(cause) => exit_of_kernel(cause),
            Self::Cluster(error) => error.exit(),
            Self::Checkpoint(error) => Exit::from_code(error.exit_code()),
            Self::NonFinite(_) => Exit::Numerics,
            Self::Plan(_) | Self::Declared(_) | Self::Disagreement(_) => Exit::Refused,
            Self::PlanWritten => Exit::Done,
            Self::Input { .. } | Self::PlanFile { .. } => Exit::Usage,
            Self::Actors(ActorError::Thread { .. }) => Exit::Refused,
            Self::Actors(_) | Self::Copies { .. } => Exit::Internal,
        }
    }

    /// Rank of the process that failed first, if the error comes from another process.
    pub fn first_cause_rank(&self) -> Option<u32> {
        match self {
            Self::Failed(Failure::Peer { process, .. } | Failure::Stalled { process: Some(process), .. }) => {
                Some(*process)
            }
            Self::Cluster(ClusterError::Rendezvous(RendezvousError::Refused(RendezvousRefusal::Failed(report)))) => {
                Some(report.rank)
            }
            Self::Checkpoint(CheckpointError::OnRank { rank, .. }) => Some(*rank),
            _ => None,
        }
    }
}

/// The failure of a session whose actors have stopped without a cause.
pub(super) fn stopped() -> Failure {
    Failure::Stalled { idle_ms: 0, cause: "the session has ended".into(), process: None, report: String::new() }
}
