//! With which code a program ends because of an error, and whom the error blames.

use shardflow_actors::error::{Failure, PeerError};
use shardflow_kernels::error::KernelError;

use super::SessionError;
use crate::cluster::ClusterError;
use crate::cluster::rendezvous::{RendezvousError, RendezvousRefusal};
use crate::exit::Exit;

/// The code that goes with the first cause of a session's end.
pub(crate) fn exit_of(failure: &Failure) -> Exit {
    match failure {
        Failure::Kernel { cause, .. } => exit_of_kernel(cause),
        Failure::Protocol { .. } | Failure::Panic { .. } => Exit::Internal,
        Failure::Stalled { .. } => Exit::Hang,
        Failure::Peer { cause, .. } => match cause {
            PeerError::Lost { .. } | PeerError::Late { .. } => Exit::PeerUnavailable,
            PeerError::Frame(_) | PeerError::Unexpected { .. } | PeerError::Protocol(_) => Exit::Protocol,
            PeerError::Ended => Exit::Internal,
            // Where starting again cannot help, no launcher may try: it sees only its own node's processes.
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
    /// The code that a program ends with because of it.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Failed(failure) => exit_of(failure),
            // Memory is had when a plan is loaded: it does not fit.
            Self::Kernel(KernelError::OutOfMemory { .. }) => Exit::Refused,
            Self::Kernel(cause) => exit_of_kernel(cause),
            Self::Cluster(error) => error.exit(),
            Self::Checkpoint(error) => Exit::from_code(error.exit_code()),
            Self::NonFinite(_) => Exit::Numerics,
            Self::Plan(_) | Self::Declared(_) | Self::Disagreement(_) => Exit::Refused,
            Self::PlanShown => Exit::Done,
            Self::Input { .. } | Self::PlanFile { .. } => Exit::Usage,
            Self::Actors(_) | Self::Layout(_) => Exit::Internal,
        }
    }

    /// The process that failed, where it was another one.
    pub fn first_cause_rank(&self) -> Option<u32> {
        match self {
            Self::Failed(Failure::Peer { process, .. } | Failure::Stalled { process: Some(process), .. }) => {
                Some(*process)
            }
            Self::Cluster(ClusterError::Rendezvous(RendezvousError::Refused(RendezvousRefusal::Failed(report)))) => {
                Some(report.rank)
            }
            _ => None,
        }
    }
}
