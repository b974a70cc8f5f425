//! Failures of a session with several processes: each failure's exit code, and whether another process caused it.

use shardflow_actors::error::{Failure, PeerError};
use shardflow_job::membership::{FirstCause, Membership};
use shardflow_kernels::error::KernelError;

use crate::process_map::ProcessMap;
use shardflow_job::exit::Exit;

pub(crate) fn exit_of(failure: &Failure) -> Exit {
    match failure {
        Failure::Kernel { cause, .. } => exit_of_kernel(cause),
        Failure::Protocol { .. } | Failure::Panic { .. } => Exit::Internal,
        Failure::Stalled { .. } => Exit::Hang,
        Failure::Peer { cause, .. } => match cause {
            PeerError::Lost { .. } | PeerError::Late { .. } => Exit::PeerUnavailable,
            PeerError::Frame(_) | PeerError::Unexpected { .. } | PeerError::Protocol(_) => Exit::Protocol,
            PeerError::Ended => Exit::Internal,
            // If a restart cannot help, exit with the peer's code, because launchers see only processes of their node.
            PeerError::Failed { exit, .. } => match Exit::from_code(*exit) {
                exit if exit.worth_a_retry() => Exit::PeerUnavailable,
                exit => exit,
            },
        },
    }
}

pub(crate) fn exit_of_kernel(cause: &KernelError) -> Exit {
    match cause {
        KernelError::OutOfMemory { .. } => Exit::OutOfMemory,
        KernelError::Link { .. } | KernelError::Mpi { .. } | KernelError::Aborted { .. } => Exit::PeerUnavailable,
        KernelError::Data { .. } => Exit::BadData,
        KernelError::Unavailable { .. } | KernelError::Thread { .. } => Exit::Refused,
        _ => Exit::Internal,
    }
}

pub(crate) fn peer_failure(cause: &FirstCause) -> Failure {
    Failure::Peer { process: cause.process, cause: PeerError::Failed { cause: cause.cause.clone(), exit: cause.exit } }
}

/// True if a peer aborted the collective, or for any MPI error: that peer or the heartbeats then report the cause.
pub(crate) fn is_aborted_by_peer(cause: &KernelError) -> bool {
    matches!(cause, KernelError::Aborted { .. } | KernelError::Mpi { .. })
}

/// True for a failure that another process may have caused.
pub(super) fn is_symptom(failure: &Failure) -> bool {
    match failure {
        Failure::Peer { .. } | Failure::Stalled { process: Some(_), .. } => true,
        Failure::Kernel { cause, .. } => is_aborted_by_peer(cause) || matches!(&**cause, KernelError::Link { .. }),
        _ => false,
    }
}

/// Reports a failure of this process to the other processes: a symptom as a suspicion, any other failure as a cause.
pub(super) fn report_failure(membership: &Membership, process_map: &ProcessMap, failure: &Failure) {
    match failure {
        // The membership reported this failure itself.
        Failure::Peer { cause: PeerError::Failed { .. }, .. } => {}
        Failure::Peer { process, cause } => membership.suspect(*process, cause.to_string()),
        // The peer's own report has more detail.
        Failure::Stalled { process: Some(process), .. } => membership.suspect(*process, failure.to_string()),
        Failure::Kernel { cause, .. } => match &**cause {
            cause if is_aborted_by_peer(cause) => {}
            KernelError::Link { peer, .. } => membership.suspect(process_map.process_of(*peer), failure.to_string()),
            _ => membership.fail(failure.to_string(), exit_of(failure).code()),
        },
        _ => membership.fail(failure.to_string(), exit_of(failure).code()),
    }
}

/// Attributes a broken connection to the process at its other end.
pub(super) fn attribute_to_peer(failure: Failure, process_map: &ProcessMap) -> Failure {
    let Failure::Kernel { cause, .. } = &failure else { return failure };
    let KernelError::Link { peer, .. } = &**cause else { return failure };
    let (process, message) = (process_map.process_of(*peer), failure.to_string());
    if process == process_map.process {
        return failure;
    }
    Failure::Peer { process, cause: PeerError::Lost { message } }
}
