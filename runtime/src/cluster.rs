//! The processes that run a plan together: where a program finds out that it is one of several, and how it wants to meet the
//! others. Imports `exit`, `machine`, `session::hosting` and the actors' transport and membership.
//!
//! ```no_run
//! use shardflow::prelude::*;
//!
//! # fn program(plan: Plan) -> Result<(), Box<dyn std::error::Error>> {
//! let cluster = Cluster::from_env()?; // from the launcher, torchrun, Slurm, ..; alone where there is none of them
//! let session = Session::start(plan, &SessionOptions { cluster, ..SessionOptions::default() })?;
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use shardflow_actors::membership::MembershipError;
use shardflow_actors::transport::{Address, TransportError};
use shardflow_kernels::error::KernelError;

use crate::exit::Exit;
use crate::machine::parse_ip;
use crate::session::hosting::Hosting;

mod agree;
mod by_mpi;
pub mod env;
mod nccl_ids;
pub mod rendezvous;
pub(crate) mod roads;
pub(crate) mod world;

use by_mpi::ByMpi;
use env::{EnvError, Launch};
use rendezvous::{RendezvousError, Verdict};

/// Variable that chooses the [`Transport`]: `auto`, `shared-memory`, `unix` or `tcp`; the same for all processes.
pub const TRANSPORT: &str = "SHARDFLOW_TRANSPORT";
/// Variable that chooses the engine of [`Collectives`]: `own` or `mpi`; the same for all processes.
pub const COLLECTIVES: &str = "SHARDFLOW_COLLECTIVES";
/// Variable with the exit codes for which the launcher has started the job again, comma-separated.
const RESTART_CAUSES: &str = "SHARDFLOW_RESTART_CAUSES";
const JOB_BEGAN_MS: &str = "SHARDFLOW_JOB_BEGAN_MS";
/// Variable with the address of this node that the process listens on.
pub const INTERFACE: &str = "SHARDFLOW_INTERFACE";

/// What carries tensors from process to process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Shared memory between processes of one node, TCP between nodes; NCCL between GPUs.
    #[default]
    Auto,
    /// Shared memory; processes on other nodes are reached by TCP. NCCL between GPUs.
    SharedMemory,
    /// Unix sockets on one node, TCP between nodes; by way of the host between GPUs, for what collectives do not do.
    Unix,
    /// TCP, on one node too; between GPUs as `Unix`.
    Tcp,
}

impl Transport {
    fn parse(text: &str) -> Result<Self, ClusterError> {
        match text {
            "auto" | "" => Ok(Self::Auto),
            "shared-memory" => Ok(Self::SharedMemory),
            "unix" => Ok(Self::Unix),
            "tcp" => Ok(Self::Tcp),
            _ => Err(ClusterError::Variable {
                name: TRANSPORT,
                value: text.into(),
                expected: "auto, shared-memory, unix or tcp",
            }),
        }
    }
}

/// What runs collectives between processes. Registers go by the [`Transport`] in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Collectives {
    /// Shardflow's own engines, over the [`Transport`]: the same bits on any number of processes.
    #[default]
    Own,
    /// MPI, where all members of a group are in different processes; the others as with `Own`. Sums agree with those of
    /// `Own` within rounding. Needs the feature `mpi`, and processes that `mpirun` started.
    Mpi,
}

impl Collectives {
    fn parse(text: &str) -> Result<Self, ClusterError> {
        match text {
            "own" | "" => Ok(Self::Own),
            "mpi" if cfg!(feature = "mpi") => Ok(Self::Mpi),
            "mpi" => Err(ClusterError::MpiNotBuilt),
            _ => Err(ClusterError::Variable { name: COLLECTIVES, value: text.into(), expected: "own or mpi" }),
        }
    }
}

/// Called with a line that says who is missing while processes wait for each other, or why they use other ways than expected.
pub type OnWaiting = Arc<dyn Fn(&str) + Send + Sync>;

/// How the others reach what this process listens on, where that is not at the same address: through a proxy, or ports that
/// are forwarded. Asked once for each address.
pub trait Advertise: fmt::Debug + Send + Sync {
    /// Where others connect to, for connections to arrive at `bound`.
    ///
    /// # Errors
    /// When there is no such place; the process does not start then.
    fn connections(&self, bound: &Address) -> io::Result<Address>;

    /// Where others send heartbeats (UDP) to, for them to arrive at `bound`.
    ///
    /// # Errors
    /// As [`Advertise::connections`].
    fn heartbeats(&self, bound: SocketAddr) -> io::Result<SocketAddr>;
}

/// How processes meet and watch each other; the same for all.
#[derive(Clone)]
pub struct ClusterOptions {
    /// What carries tensors.
    pub transport: Transport,
    /// What runs collectives.
    pub collectives: Collectives,
    /// Address of this node to listen on, with port 0; without it, the one by which process 0 is reached, loopback if it is on
    /// loopback.
    pub interface: Option<SocketAddr>,
    /// Where others reach this process; without it, at the addresses that it listens on.
    pub advertise: Option<Arc<dyn Advertise>>,
    /// How long to wait until all have come.
    pub meet_within: Duration,
    /// How long connections may take to be made, once all have come.
    pub connect_within: Duration,
    /// Time between heartbeats.
    pub heartbeat_every: Duration,
    /// Silence after which a process counts as failed.
    pub heartbeat_deadline: Duration,
    /// Hears who is missing, besides the log.
    pub on_waiting: Option<OnWaiting>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            transport: Transport::Auto,
            collectives: Collectives::Own,
            interface: None,
            advertise: None,
            meet_within: Duration::from_secs(300),
            connect_within: Duration::from_secs(60),
            heartbeat_every: Duration::from_millis(250),
            heartbeat_deadline: Duration::from_secs(4),
            on_waiting: None,
        }
    }
}

impl fmt::Debug for ClusterOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { transport, collectives, interface, advertise, meet_within, connect_within, .. } = self;
        f.debug_struct("ClusterOptions")
            .field("transport", transport)
            .field("collectives", collectives)
            .field("interface", interface)
            .field("advertise", advertise)
            .field("meet_within", meet_within)
            .field("connect_within", connect_within)
            .field("heartbeat", &(self.heartbeat_every, self.heartbeat_deadline))
            .finish_non_exhaustive()
    }
}

/// This process, and what it knows of the others before it meets them.
#[derive(Clone, Debug)]
pub struct Cluster {
    launch: Launch,
    by_mpi: ByMpi,
    /// How to meet them.
    pub options: ClusterOptions,
    /// The exit codes for which the launcher has started the job again so far.
    pub restart_causes: Vec<u8>,
    /// When the launcher began the job, Unix time in milliseconds: the same for all attempts.
    pub job_began_ms: Option<u64>,
}

impl Cluster {
    /// One process, alone.
    pub fn local() -> Self {
        Self::new(Launch::Local, ClusterOptions::default())
    }

    /// A process that was started as `launch` says.
    pub fn new(launch: Launch, options: ClusterOptions) -> Self {
        Self { launch, by_mpi: ByMpi::default(), options, restart_causes: Vec::new(), job_began_ms: None }
    }

    /// As the environment says: the launcher's variables, torchrun's, Slurm's, OpenMPI's, a Kubernetes indexed job's; alone
    /// where there are none. Nothing is connected yet: processes meet when a session starts.
    ///
    /// # Errors
    /// An environment that contradicts itself, with the variable and what to set.
    pub fn from_env() -> Result<Self, ClusterError> {
        let variables = env::process_variables();
        let mut options = ClusterOptions::default();
        if let Some(text) = variables.get(TRANSPORT) {
            options.transport = Transport::parse(text)?;
        }
        if let Some(text) = variables.get(COLLECTIVES) {
            options.collectives = Collectives::parse(text)?;
        }
        if let Some(text) = variables.get(INTERFACE).filter(|text| !text.is_empty()) {
            let expected = "an IP address, such as 10.0.0.1 or fe80::1%eth0";
            let wrong = || ClusterError::Variable { name: INTERFACE, value: text.clone(), expected };
            options.interface = Some(parse_ip(text).ok_or_else(wrong)?);
        }
        let launch = env::detect(&variables)?;
        let causes = variables.get(RESTART_CAUSES).map_or("", |text| text.as_str());
        // For metrics only: what makes no sense is left out.
        let restart_causes = causes.split(',').filter_map(|code| code.parse().ok()).collect();
        let job_began_ms = variables.get(JOB_BEGAN_MS).and_then(|text| text.parse().ok());
        Ok(Self { launch, by_mpi: ByMpi::default(), options, restart_causes, job_began_ms })
    }

    /// Number of this process: its rank, as torchrun calls it.
    pub fn process(&self) -> u32 {
        match &self.launch {
            Launch::Local => 0,
            Launch::World(world) => world.process,
        }
    }

    /// How many processes there are.
    pub fn processes(&self) -> u32 {
        match &self.launch {
            Launch::Local => 1,
            Launch::World(world) => world.processes,
        }
    }

    /// How many of them share this node, and its cores.
    pub fn local_processes(&self) -> u32 {
        match &self.launch {
            Launch::Local => 1,
            Launch::World(world) => world.local_processes,
        }
    }

    /// How many of a mesh's devices are on this node, and so share its cores and memory. Before the processes meet, so their
    /// numbers on a node are taken to follow each other; where they do not, and devices do not divide evenly, it may be off by
    /// one for each process.
    pub fn devices_here(&self, devices: usize) -> usize {
        let Launch::World(world) = &self.launch else { return devices };
        let first = world.process.saturating_sub(world.local_process);
        let hosting = Hosting { process: world.process, processes: world.processes, devices };
        hosting.on_node(first..(first + world.local_processes).min(world.processes), world.process).all
    }

    /// True for the one process that speaks for all: rank 0.
    pub fn is_first(&self) -> bool {
        self.process() == 0
    }
}

/// Why the processes do not come together.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The environment contradicts itself.
    #[error(transparent)]
    Env(#[from] EnvError),
    /// A variable of ours has a value that it cannot have.
    #[error("{name} is {value:?}, expected {expected}")]
    Variable {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// MPI is asked for, and not there.
    #[error(
        "{COLLECTIVES}=mpi, but this program was built without MPI: build it with `--features mpi`, or set it to `own`"
    )]
    MpiNotBuilt,
    /// MPI cannot be used.
    #[error("{COLLECTIVES}=mpi, but MPI cannot be used: {cause}")]
    Mpi {
        /// What MPI says.
        cause: KernelError,
    },
    /// MPI and we count processes differently.
    #[error(
        "{COLLECTIVES}=mpi, but to MPI this is rank {rank} of {size}, and to us rank {process} of {processes}: start the \
         processes by `mpirun -n {processes}`, without another launcher"
    )]
    MpiPlace {
        /// As MPI has it.
        rank: u32,
        /// As MPI has it.
        size: u32,
        /// As the environment says.
        process: u32,
        /// As the environment says.
        processes: u32,
    },
    /// There are more processes than devices for them.
    #[error("a mesh of {devices} devices cannot be spread over {processes} processes: start at most {devices}")]
    TooManyProcesses {
        /// Devices of the mesh.
        devices: usize,
        /// Processes.
        processes: u32,
    },
    /// They did not meet.
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
    /// A connection could not be made.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// They met, and one was lost before the session began.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// A process that cannot be reached from here.
    #[error("rank {process} on {host} listens on no address that can be reached from here; set {INTERFACE} there")]
    NoAddress {
        /// The process.
        process: u32,
        /// Its host.
        host: String,
    },
    /// Processes of one machine that cannot open each other's sockets, with a transport that needs them.
    #[error("{0}; {TRANSPORT}=shared-memory and unix need that: set it to auto, or give these ranks one folder")]
    NotNear(String),
    /// Memory or a collective engine could not be had.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The system failed a call.
    #[error("cannot {what}: {cause}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system says.
        cause: io::Error,
    },
}

impl ClusterError {
    /// The code that a program ends with because of it.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Env(error) => error.exit(),
            Self::Variable { .. } | Self::TooManyProcesses { .. } | Self::NoAddress { .. } => Exit::Refused,
            Self::NotNear(_) | Self::MpiNotBuilt | Self::Mpi { .. } | Self::MpiPlace { .. } => Exit::Refused,
            Self::Kernel(KernelError::Mpi { .. }) => Exit::PeerUnavailable,
            Self::Rendezvous(RendezvousError::Refused(Verdict::Conflicts(_))) => Exit::Refused,
            Self::Rendezvous(RendezvousError::Transport(error)) | Self::Transport(error) => transport_exit(error),
            Self::Rendezvous(RendezvousError::TooLong { .. } | RendezvousError::Rank { .. }) => Exit::Refused,
            Self::Rendezvous(_) => Exit::PeerUnavailable,
            Self::Membership(error) => Exit::from_code(error.exit()),
            Self::Kernel(KernelError::OutOfMemory { .. }) => Exit::OutOfMemory,
            Self::Kernel(_) | Self::System { .. } => Exit::Internal,
        }
    }
}

fn transport_exit(error: &TransportError) -> Exit {
    if error.is_authentication() { Exit::Protocol } else { Exit::PeerUnavailable }
}
