//! Who this process is, from its environment: a pure function of the variables that our launcher, torchrun, OpenMPI,
//! Slurm, MPICH or Kubernetes set, or a process on its own.
//!
//! The sources are asked from the innermost to the outermost: a launcher that was started by another one has set its
//! variables last, and the other's are still there. An empty variable counts as absent.

use std::collections::BTreeMap;

use crate::exit::Exit;

pub(crate) use detect::DERIVED_PORTS;
pub use detect::detect;
pub use endpoint::{Endpoint, PORT_DEFAULT};
pub use secret::{SECRET_CHARS_MIN, Secret, SecretSource};

mod detect;
mod endpoint;
mod secret;
mod slurm;
#[cfg(test)]
mod tests;

/// Variables by name.
pub type Variables = BTreeMap<String, String>;

/// How this process was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LaunchContext {
    /// Alone: nothing says that there are others.
    Local,
    /// As one of several.
    World(World),
}

/// A process's place among the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// Number of this process, below `processes`.
    pub process: u32,
    /// How many there are, at least 1.
    pub processes: u32,
    /// Number of this process on its node, below `local_processes`.
    pub local_process: u32,
    /// How many are on this node.
    pub local_processes: u32,
    /// Number of this node, where that is known.
    pub node: Option<u32>,
    /// Where process 0 listens.
    pub endpoint: Endpoint,
    /// What all processes of the job know and nobody else.
    pub secret: SecretSource,
    /// How often the job was started before, as far as who started this process knows.
    pub restart: u64,
    /// Who said all this.
    pub source: LaunchedBy,
    /// The job's name. For people: it need not be the same on all nodes.
    pub run_id: String,
}

/// Who started the processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaunchedBy {
    /// `shardflow launch`.
    Shardflow,
    /// `torchrun`, or what sets its variables.
    Torchrun,
    /// `mpirun` of OpenMPI.
    OpenMpi,
    /// `srun`.
    Slurm,
    /// `mpiexec` of MPICH, or `mpirun` of Intel MPI.
    Mpich,
    /// An indexed Job.
    Kubernetes,
}

/// An environment that cannot be used. Ends with code 78.
#[derive(Debug, thiserror::Error)]
pub enum EnvError {
    /// Some variables of a source are there and one is not.
    #[error("{found}={value} is set but {missing} is not: set {missing} to {meaning}, or unset {found}")]
    HalfSet {
        /// A variable that is there.
        found: &'static str,
        /// Its value.
        value: String,
        /// The one that is not.
        missing: &'static str,
        /// What it should hold.
        meaning: &'static str,
    },
    /// A value that cannot be read.
    #[error("{variable}={value}: {expected}")]
    Invalid {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What it should hold.
        expected: String,
    },
    /// Two variables that cannot both be right.
    #[error("{variable}={value} contradicts {other}={other_value}: {rule}")]
    Contradiction {
        /// One variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// The other.
        other: &'static str,
        /// Its value.
        other_value: String,
        /// What must hold.
        rule: &'static str,
    },
    /// The processes have no secret in common.
    #[error(
        "{source_name} started {processes} processes without a secret: set SHARDFLOW_SECRET, or SHARDFLOW_SECRET_FILE, \
         to the same text of at least {SECRET_CHARS_MIN} characters for all of them; {how}"
    )]
    NoSecret {
        /// Who started them.
        source_name: &'static str,
        /// How many.
        processes: u32,
        /// The command that does it.
        how: &'static str,
    },
    /// A secret that can be guessed.
    #[error("{place} holds {chars} characters, at least {SECRET_CHARS_MIN} are needed: make one by `shardflow secret`")]
    ShortSecret {
        /// Variable or file.
        place: String,
        /// How many it has.
        chars: usize,
    },
}

impl EnvError {
    /// How a process ends for it.
    pub fn exit(&self) -> Exit {
        Exit::Refused
    }
}

impl LaunchedBy {
    /// Name for people.
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

    /// How its users give all processes the same secret.
    fn how_to_give_a_secret(self) -> &'static str {
        match self {
            LaunchedBy::Shardflow => "`shardflow launch` does so itself",
            LaunchedBy::Torchrun => {
                "before `torchrun`, on every node: `export SHARDFLOW_SECRET=..`; `shardflow secret` makes one; in \
                 a PyTorchJob, from a Secret"
            }
            LaunchedBy::OpenMpi => "`mpirun -x SHARDFLOW_SECRET=$(shardflow secret) ..`",
            LaunchedBy::Slurm => "in the script, before `srun`: `export SHARDFLOW_SECRET=$(shardflow secret)`",
            LaunchedBy::Mpich => "`mpiexec -genv SHARDFLOW_SECRET $(shardflow secret) ..`",
            LaunchedBy::Kubernetes => "from a Secret, made by `kubectl create secret generic NAME --from-literal=..`",
        }
    }
}

/// The variables of this process. Bytes that are no UTF-8 become replacement characters.
pub fn process_variables() -> Variables {
    let text = |os: std::ffi::OsString| os.to_string_lossy().into_owned();
    std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect()
}

/// A variable that is there and not empty.
fn get<'a>(variables: &'a Variables, name: &str) -> Option<&'a str> {
    variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
}
