//! Detects this process's rank and world from the variables that `shardflow launch`, torchrun, OpenMPI, Slurm, MPICH or
//! Kubernetes set. A function of the variables, and of the names of this node's interfaces.
//!
//! Launchers are checked from the innermost to the outermost: one that was started by another sets its variables last, and
//! those of the outer one are still there. An empty variable counts as unset.

use std::collections::BTreeMap;

use crate::exit::Exit;
use crate::secret::{SECRET_CHARS_MIN, ShortSecret};

pub use detect::{DERIVED_PORTS, detect};
pub use endpoint::{Endpoint, PORT_DEFAULT};
pub use secret_source::SecretSource;

mod detect;
mod endpoint;
mod secret_source;
mod slurm;
#[cfg(test)]
mod tests;

/// Variable that chooses the [`crate::options::Transport`]: `auto`, `shared-memory`, `unix` or `tcp`; the same for all processes.
pub const TRANSPORT: &str = "SHARDFLOW_TRANSPORT";
/// Variable that chooses the engine of [`crate::options::Collectives`]: `own` or `mpi`; the same for all processes.
pub const COLLECTIVES: &str = "SHARDFLOW_COLLECTIVES";
/// Variable that switches the encryption of tensors over TCP `on` or `off`; the same for all processes.
pub const ENCRYPT: &str = "SHARDFLOW_ENCRYPT";
/// Variable with the exit codes that caused the launcher's restarts of the job so far, comma-separated.
pub const RESTART_CAUSES: &str = "SHARDFLOW_RESTART_CAUSES";
/// Variable with the time at which the launcher began the job: Unix time in milliseconds.
pub const JOB_BEGAN_MS: &str = "SHARDFLOW_JOB_BEGAN_MS";
/// Variable with the local address that the process listens on.
pub const INTERFACE: &str = "SHARDFLOW_INTERFACE";
/// Variable with the host name or address at which other processes reach this one; the ports do not change.
pub const ADVERTISE: &str = "SHARDFLOW_ADVERTISE";
/// Variable with the milliseconds between heartbeats; the same for all processes.
pub const HEARTBEAT_MS: &str = "SHARDFLOW_HEARTBEAT_MS";
/// Variable with the milliseconds of silence after which a process counts as failed; the same for all processes.
pub const HEARTBEAT_DEADLINE_MS: &str = "SHARDFLOW_HEARTBEAT_DEADLINE_MS";
/// Variable with the milliseconds that a process spends on reporting a failure before the rendezvous to the others.
pub const REPORT_WAIT_MS: &str = "SHARDFLOW_REPORT_WAIT_MS";

/// Variables by name.
pub type Variables = BTreeMap<String, String>;

/// How this process was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LaunchContext {
    /// As a single process: no variable indicates others.
    Local,
    /// As one of several.
    World(World),
}

/// A process's rank and how to reach the other processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// Rank of this process, below `processes`.
    pub process: u32,
    /// World size, at least 1.
    pub processes: u32,
    /// Rank of this process on its node, below `local_processes`.
    pub local_process: u32,
    /// Number of processes on this node.
    pub local_processes: u32,
    /// Number of this node, if known.
    pub node: Option<u32>,
    /// Address that process 0 listens on.
    pub endpoint: Endpoint,
    /// The secret shared by the job's processes.
    pub secret: SecretSource,
    /// How many times the job was restarted, according to the launcher.
    pub restart: u64,
    /// The launcher that set the variables.
    pub source: LaunchedBy,
    /// The job's name, for messages. It may differ between nodes.
    pub run_id: String,
}

/// The launcher of the processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaunchedBy {
    /// `shardflow launch`.
    Shardflow,
    /// `torchrun`, or a launcher that sets the same variables.
    Torchrun,
    /// `mpirun` of OpenMPI.
    OpenMpi,
    /// `srun`.
    Slurm,
    /// `mpiexec` of MPICH, or `mpirun` of Intel MPI.
    Mpich,
    /// A Kubernetes indexed Job.
    Kubernetes,
}

/// An invalid environment. The process exits with code 78.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the error texts explain variants and fields")]
pub enum EnvError {
    #[error("{found}={value} is set but {missing} is not: set {missing} to {meaning}, or unset {found}")]
    HalfSet { found: &'static str, value: String, missing: &'static str, meaning: &'static str },
    #[error("{variable}={value}: {expected}")]
    Invalid { variable: &'static str, value: String, expected: String },
    #[error("{variable}={value} contradicts {other}={other_value}: {rule}")]
    Contradiction {
        variable: &'static str,
        value: String,
        other: &'static str,
        other_value: String,
        rule: &'static str,
    },
    #[error(
        "{launcher} started {processes} processes without a secret: set SHARDFLOW_SECRET for all of them to the same text \
         of at least {SECRET_CHARS_MIN} characters, or SHARDFLOW_SECRET_FILE to a file with it; {instructions}"
    )]
    NoSecret { launcher: &'static str, processes: u32, instructions: &'static str },
    #[error("{place} holds {source}")]
    ShortSecret { place: String, source: ShortSecret },
    #[error("{name} is {value:?}, expected {expected}")]
    Option { name: &'static str, value: String, expected: &'static str },
}

impl EnvError {
    /// The exit code of a process that ends with this error.
    pub fn exit(&self) -> Exit {
        Exit::Refused
    }
}

impl LaunchedBy {
    /// Name for messages.
    pub fn name(self) -> &'static str {
        match self {
            LaunchedBy::Shardflow => "shardflow launch",
            LaunchedBy::Torchrun => "torchrun",
            LaunchedBy::OpenMpi => "OpenMPI",
            LaunchedBy::Slurm => "Slurm",
            LaunchedBy::Mpich => "MPICH or Intel MPI",
            LaunchedBy::Kubernetes => "Kubernetes",
        }
    }

    /// How to give all processes the same secret with this launcher.
    fn secret_instructions(self) -> &'static str {
        match self {
            LaunchedBy::Shardflow => "`shardflow launch` sets one",
            LaunchedBy::Torchrun => {
                "before `torchrun`, on every node: `export SHARDFLOW_SECRET=..`, with the output of `shardflow secret`; \
                 in a PyTorchJob, from a Secret"
            }
            LaunchedBy::OpenMpi => "`mpirun -x SHARDFLOW_SECRET=$(shardflow secret) ..`",
            LaunchedBy::Slurm => "in the script, before `srun`: `export SHARDFLOW_SECRET=$(shardflow secret)`",
            LaunchedBy::Mpich => "`mpiexec -genv SHARDFLOW_SECRET $(shardflow secret) ..`",
            LaunchedBy::Kubernetes => "from a Secret, made with `kubectl create secret generic NAME --from-literal=..`",
        }
    }
}

/// The environment variables of this process. Invalid UTF-8 becomes replacement characters.
pub fn process_variables() -> Variables {
    let text = |os: std::ffi::OsString| os.to_string_lossy().into_owned();
    std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect()
}

/// A variable's value, if it is set and not empty.
fn get<'a>(variables: &'a Variables, name: &str) -> Option<&'a str> {
    variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
}
