//! What the environment states about this process: its rank, its world and its launcher.

use super::endpoint::Endpoint;
use super::secret_source::SecretSource;

/// How this process was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LaunchContext {
    /// A single process: no variable indicates a launcher of several processes.
    Local,
    /// One of several processes.
    World(Launched),
}

/// A process's rank and how to reach the other processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// Rank of this process, below `processes`.
    pub process: u32,
    /// World size, at least 1.
    pub processes: u32,
    /// Rank of this process on its node, below `local_processes`.
    pub local_process: u32,
    /// Number of processes on this node.
    pub local_processes: u32,
    /// Number of this node, if the launcher provides it.
    pub node: Option<u32>,
    /// Address on which process 0 listens.
    pub endpoint: Endpoint,
    /// The secret shared by the job's processes.
    pub secret: SecretSource,
    /// How many times the job was restarted, according to the launcher.
    pub restart: u64,
    /// The launcher that set the variables.
    pub source: LaunchedBy,
    /// The job's name, for display. It may differ between nodes.
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

impl LaunchedBy {
    /// The launcher's name, and how the user can give all processes the same secret under this launcher.
    pub(super) fn texts(self) -> (&'static str, &'static str) {
        match self {
            LaunchedBy::Shardflow => ("shardflow launch", "`shardflow launch` sets one"),
            LaunchedBy::Torchrun => (
                "torchrun",
                "run `shardflow secret` once and copy the secret that it prints; on every node, before `torchrun`, run \
                 `export SHARDFLOW_SECRET=..` with this secret; in a PyTorchJob, set the variable from a Secret",
            ),
            LaunchedBy::OpenMpi => ("OpenMPI", "start with `mpirun -x SHARDFLOW_SECRET=$(shardflow secret) ..`"),
            LaunchedBy::Slurm => {
                ("Slurm", "in the script, before `srun`, run `export SHARDFLOW_SECRET=$(shardflow secret)`")
            }
            LaunchedBy::Mpich => {
                ("MPICH or Intel MPI", "start with `mpiexec -genv SHARDFLOW_SECRET $(shardflow secret) ..`")
            }
            LaunchedBy::Kubernetes => (
                "Kubernetes",
                "set the variable from a Secret; `kubectl create secret generic NAME --from-literal=..` makes one",
            ),
        }
    }
}
