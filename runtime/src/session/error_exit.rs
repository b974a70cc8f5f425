//! Exit codes of session errors, and the rank that caused an error.

use shardflow_actors::error::{Failure, PeerError};
use shardflow_kernels::error::KernelError;

use super::SessionError;
use crate::checkpoint::error::CheckpointError;
use crate::cluster::ClusterError;
use shardflow_job::exit::Exit;
use shardflow_job::rendezvous::{RendezvousError, RendezvousRefusal};

/// Exit code for the first cause of a session's failure.
pub(crate) fn exit_of(failure: &Failure) -> Exit {
    match failure {
        Failure::Kernel { cause, .. } => exit_of_kernel(cause),
        Failure::Protocol { .. } | Failure::Panic { .. } => Exit::Internal,
        Failure::Stalled { .. } => Exit::Hang,
        Failure::Peer { cause, .. } => match cause {
            PeerError::Lost { .. } | PeerError::Late { .. } => Exit::PeerUnavailable,
            PeerError::Frame(_) | PeerError::Unexpected { .. } | PeerError::Protocol(_) => Exit::Protocol,
            PeerError::Ended => Exit::Internal,
            // Keep exit codes for which a restart cannot help: a launcher sees only the processes of its own node.
            PeerError::Failed { exit, .. } => match Exit::from_code(*exit) {
                exit if exit.worth_a_retry() => Exit::PeerUnavailable,
                exit => exit,
            },
        },
    }
}

fn exit_of_kernel(cause: &KernelError) -> Exit {
    match cause {
        KernelError::OutOfMemory { .. } => Exit::OutOfMemory,
        KernelError::Link { .. } | KernelError::Mpi { .. } | KernelError::Aborted { .. } => Exit::PeerUnavailable,
        KernelError::Data { .. } => Exit::BadData,
        KernelError::Unavailable { .. } => Exit::Refused,
        _ => Exit::Internal,
    }
}

impl SessionError {
    /// Exit code of a program that fails with this error.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Failed(failure) => exit_of(failure),
            // Memory is allocated when a plan is loaded, so the plan does not fit.
            Self::Kernel(KernelError::OutOfMemory { .. }) => Exit::Refused,
            Self::Kernel(cause) => exit_of_kernel(cause),
            Self::Cluster(error) => error.exit(),
            Self::Checkpoint(error) => Exit::from_code(error.exit_code()),
            Self::NonFinite(_) => Exit::Numerics,
            Self::Plan(_) | Self::Declared(_) | Self::Disagreement(_) => Exit::Refused,
            Self::PlanWritten => Exit::Done,
            Self::Input { .. } | Self::PlanFile { .. } => Exit::Usage,
            Self::Actors(_) | Self::Layout(_) => Exit::Internal,
        }
    }

    /// Rank of the process that failed, if it is another one.
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
