//! Why the processes of a job cannot form a world.

use std::io;

use shardflow_job::env::{COLLECTIVES, EnvError};
use shardflow_job::exit::Exit;
use shardflow_job::membership::MembershipError;
use shardflow_job::rendezvous::{RendezvousError, RendezvousRefusal};
use shardflow_job::transport::TransportError;
use shardflow_kernels::error::KernelError;

/// Why the processes cannot form a world.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages explain the fields")]
pub enum ClusterError {
    #[error(transparent)]
    Env(#[from] EnvError),
    #[error("{COLLECTIVES}=mpi, but {0}")]
    Mpi(String),
    /// An invalid combination of processes, devices, addresses or transports.
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A process was lost after the rendezvous, before the session began.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A bug: this process connects to a process whose address it did not request at the rendezvous.
    #[error("the rendezvous did not return the address of rank {process}")]
    NotListed { process: u32 },
    #[error("cannot {action}: {cause}")]
    System { action: &'static str, cause: io::Error },
}

impl ClusterError {
    /// The exit code of a program that ends with this error.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Env(error) => error.exit(),
            Self::Mpi(_) | Self::Refused(_) => Exit::Refused,
            Self::Kernel(KernelError::Mpi { .. }) => Exit::PeerUnavailable,
            Self::Rendezvous(RendezvousError::Refused(RendezvousRefusal::Conflicts(_))) => Exit::Refused,
            Self::Rendezvous(RendezvousError::Refused(RendezvousRefusal::Failed(report))) => {
                Exit::from_code(report.exit)
            }
            Self::Rendezvous(RendezvousError::Transport(error) | RendezvousError::NotReached(error))
            | Self::Transport(error) => transport_exit(error),
            Self::Rendezvous(RendezvousError::TooLong { .. } | RendezvousError::Rank { .. }) => Exit::Refused,
            Self::Rendezvous(RendezvousError::InUse { .. }) => Exit::Refused,
            Self::Rendezvous(_) => Exit::PeerUnavailable,
            Self::Membership(error) => error.exit(),
            Self::Kernel(KernelError::OutOfMemory { .. }) => Exit::OutOfMemory,
            Self::Kernel(KernelError::Thread { .. }) => Exit::Refused,
            // The system cannot start a thread.
            Self::System { cause, .. } if cause.kind() == io::ErrorKind::WouldBlock => Exit::Refused,
            Self::Kernel(_) | Self::NotListed { .. } | Self::System { .. } => Exit::Internal,
        }
    }
}

fn transport_exit(error: &TransportError) -> Exit {
    if error.is_thread_limit() {
        return Exit::Refused;
    }
    if error.is_authentication() { Exit::Protocol } else { Exit::PeerUnavailable }
}
