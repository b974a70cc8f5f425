//! The processes that run a plan together: where a program finds out that it is one of several, and how it wants to meet the
//! others.
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
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use shardflow_actors::membership::MembershipError;
use shardflow_actors::transport::{Address, TransportError};
use shardflow_kernels::error::KernelError;

use crate::exit::Exit;
use crate::machine::parse_ip;
use crate::session::process_map::ProcessMap;

mod by_mpi;
pub(crate) mod connector;
pub(crate) mod departure;
pub mod env;
mod nccl_ids;
pub mod rendezvous;
mod save_agreement;
pub(crate) mod world;

use by_mpi::ByMpi;
use env::{EnvError, LaunchContext, Variables};
use rendezvous::{RendezvousError, RendezvousRefusal};

/// Variable that chooses the [`Transport`]: `auto`, `shared-memory`, `unix` or `tcp`; the same for all processes.
pub const TRANSPORT: &str = "SHARDFLOW_TRANSPORT";
/// Variable that chooses the engine of [`Collectives`]: `own` or `mpi`; the same for all processes.
pub const COLLECTIVES: &str = "SHARDFLOW_COLLECTIVES";
/// Variable with the exit codes for which the launcher has started the job again, comma-separated.
const RESTART_CAUSES: &str = "SHARDFLOW_RESTART_CAUSES";
const JOB_BEGAN_MS: &str = "SHARDFLOW_JOB_BEGAN_MS";
/// Variable with the address of this node that the process listens on.
pub const INTERFACE: &str = "SHARDFLOW_INTERFACE";
/// Variable with the host name or address at which others reach this process, at the ports that it listens on.
pub const ADVERTISE: &str = "SHARDFLOW_ADVERTISE";
/// Variable with the milliseconds between heartbeats; the same for all processes.
pub const HEARTBEAT_MS: &str = "SHARDFLOW_HEARTBEAT_MS";
/// Variable with the milliseconds of silence after which a process counts as failed; the same for all processes.
pub const HEARTBEAT_DEADLINE_MS: &str = "SHARDFLOW_HEARTBEAT_DEADLINE_MS";
/// Variable with the milliseconds for which a failure before the processes meet is reported to the others.
pub const REPORT_WAIT_MS: &str = "SHARDFLOW_REPORT_WAIT_MS";

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
    fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            "shared-memory" => Some(Self::SharedMemory),
            "unix" => Some(Self::Unix),
            "tcp" => Some(Self::Tcp),
            _ => None,
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
    fn parse(text: &str) -> Option<Self> {
        match text {
            "own" => Some(Self::Own),
            "mpi" => Some(Self::Mpi),
            _ => None,
        }
    }
}

/// Receives log lines: which ranks are missing while processes wait for each other, or why another transport is used.
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

/// A host name or address that is published in place of the one that a process listens on; the port does not change.
#[derive(Clone, Debug)]
struct AdvertisedHost(String);

impl AdvertisedHost {
    fn parse(text: &str) -> Option<Self> {
        let is_name =
            matches!(env::Endpoint::parse_rendezvous(text), Ok(env::Endpoint::Tcp { host, .. }) if host == text);
        (is_name || parse_ip(text).is_some()).then(|| Self(text.to_owned()))
    }
}

impl Advertise for AdvertisedHost {
    fn connections(&self, bound: &Address) -> io::Result<Address> {
        let Address::Tcp(name) = bound else { return Ok(bound.clone()) };
        let port = name.rsplit(':').next().and_then(|port| port.parse().ok()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(world::address(&env::Endpoint::Tcp { host: self.0.clone(), port }))
    }

    fn heartbeats(&self, bound: SocketAddr) -> io::Result<SocketAddr> {
        let nowhere = || io::Error::new(io::ErrorKind::NotFound, format!("{} has no address", self.0));
        (self.0.as_str(), bound.port()).to_socket_addrs()?.next().ok_or_else(nowhere)
    }
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
    /// How long connections may take to be made, once all have come, before heartbeats show who is alive. Later waits take
    /// [`crate::prelude::WatchdogOptions::abort_after`] at most.
    pub connect_within: Duration,
    /// How often a wait is reported, with the ranks that are missing or slow.
    pub report_every: Duration,
    /// Time between heartbeats.
    pub heartbeat_every: Duration,
    /// Silence after which a process counts as failed; at least four times `heartbeat_every`.
    pub heartbeat_deadline: Duration,
    /// How long a failure before the processes meet is reported to the others, see [`crate::exit::report`].
    pub report_within: Duration,
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
            report_every: Duration::from_secs(3),
            heartbeat_every: Duration::from_millis(250),
            heartbeat_deadline: Duration::from_secs(4),
            report_within: rendezvous::REPORT_WITHIN,
            on_waiting: None,
        }
    }
}

impl ClusterOptions {
    /// Logs which ranks this process waits for.
    pub(crate) fn report_waiting(&self, line: &str) {
        tracing::warn!("{line}");
        self.on_waiting.iter().for_each(|on_waiting| on_waiting(line));
    }

    /// Reads the options from these variables.
    ///
    /// # Errors
    /// [`ClusterError::Variable`], [`ClusterError::Mpi`].
    pub(crate) fn read(variables: &Variables) -> Result<Self, ClusterError> {
        let mut options = Self::default();
        let transport = read(variables, TRANSPORT, "auto, shared-memory, unix or tcp", Transport::parse)?;
        options.transport = transport.unwrap_or_default();
        options.collectives = read(variables, COLLECTIVES, "own or mpi", Collectives::parse)?.unwrap_or_default();
        options.interface = read(variables, INTERFACE, "an IP address, such as 10.0.0.1 or fe80::1%eth0", parse_ip)?;
        let advertise =
            read(variables, ADVERTISE, "a host name or an IP address, without a port", AdvertisedHost::parse)?;
        options.advertise = advertise.map(|host| Arc::new(host) as Arc<dyn Advertise>);
        let ms = |least: u64| move |text: &str| text.parse().ok().filter(|ms| (least..=DAY_MS).contains(ms));
        let ms_expected = "a whole number of milliseconds, from 1 to 86400000";
        let every = read(variables, HEARTBEAT_MS, ms_expected, ms(1))?;
        options.heartbeat_every = every.map_or(options.heartbeat_every, Duration::from_millis);
        let least = 4 * options.heartbeat_every.as_millis() as u64;
        let deadline_expected =
            "milliseconds, at least four times SHARDFLOW_HEARTBEAT_MS (250 if not set), at most 86400000";
        let given = read(variables, HEARTBEAT_DEADLINE_MS, deadline_expected, ms(least))?;
        // Where only the interval is given, the default deadline may be too short for it.
        let deadline = options.heartbeat_deadline.max(4 * options.heartbeat_every);
        options.heartbeat_deadline = given.map_or(deadline, Duration::from_millis);
        let within = read(variables, REPORT_WAIT_MS, "a whole number of milliseconds, from 0 to 86400000", ms(0))?;
        options.report_within = within.map_or(options.report_within, Duration::from_millis);
        Ok(options)
    }
}

/// Longest time that a variable may set; a longer one is a mistake.
const DAY_MS: u64 = 86_400_000;

/// A variable's value, if it is set and not empty.
fn read<T>(
    variables: &Variables,
    name: &'static str,
    expected: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, ClusterError> {
    let text = variables.get(name).filter(|text| !text.is_empty());
    text.map(|text| parse(text).ok_or(ClusterError::Variable { name, value: text.clone(), expected })).transpose()
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
    launch: LaunchContext,
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
        Self::new(LaunchContext::Local, ClusterOptions::default())
    }

    /// A process that was started as `launch` says.
    pub fn new(launch: LaunchContext, options: ClusterOptions) -> Self {
        Self { launch, by_mpi: ByMpi::default(), options, restart_causes: Vec::new(), job_began_ms: None }
    }

    /// As the environment says: the launcher's variables, torchrun's, Slurm's, OpenMPI's, a Kubernetes indexed job's; alone
    /// where there are none. Nothing is connected yet: processes meet when a session starts.
    ///
    /// # Errors
    /// An environment that contradicts itself, with the variable and what to set.
    pub fn from_env() -> Result<Self, ClusterError> {
        let variables = env::process_variables();
        let options = ClusterOptions::read(&variables)?;
        if options.collectives == Collectives::Mpi && cfg!(not(feature = "mpi")) {
            return Err(by_mpi::not_built());
        }
        let launch = env::detect(&variables)?;
        let causes = variables.get(RESTART_CAUSES).map_or("", |text| text.as_str());
        // For metrics only: what makes no sense is left out.
        let restart_causes = causes.split(',').filter_map(|code| code.parse().ok()).collect();
        let job_began_ms = variables.get(JOB_BEGAN_MS).and_then(|text| text.parse().ok());
        Ok(Self { launch, by_mpi: ByMpi::default(), options, restart_causes, job_began_ms })
    }

    fn world(&self) -> Option<&env::World> {
        if let LaunchContext::World(world) = &self.launch { Some(world) } else { None }
    }

    /// Number of this process: its rank, as torchrun calls it.
    pub fn process(&self) -> u32 {
        self.world().map_or(0, |world| world.process)
    }

    /// The job's name, where it has one, and how often it was started before.
    pub(crate) fn job(&self) -> (Option<String>, u64) {
        (self.world().map(|world| world.run_id.clone()).filter(|id| id != "none"), self.restart())
    }

    /// How many processes there are.
    pub fn processes(&self) -> u32 {
        self.world().map_or(1, |world| world.processes)
    }

    /// How many of them share this node, and its cores.
    pub fn local_processes(&self) -> u32 {
        self.world().map_or(1, |world| world.local_processes)
    }

    /// How many of a mesh's devices are on this node, and so share its cores and memory. Before the processes meet, so their
    /// numbers on a node are taken to follow each other; where they do not, and devices do not divide evenly, it may be off by
    /// one for each process.
    pub fn devices_here(&self, devices: usize) -> usize {
        let Some(world) = self.world() else { return devices };
        let first = world.process.saturating_sub(world.local_process);
        let process_map = ProcessMap { process: world.process, processes: world.processes, devices };
        process_map.on_node(first..(first + world.local_processes).min(world.processes), world.process).all
    }

    /// How often the job has been restarted, as far as this process knows.
    pub fn restart(&self) -> u64 {
        self.world().map_or(0, |world| world.restart)
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
    /// MPI is asked for and cannot be used.
    #[error("{COLLECTIVES}=mpi, but {0}")]
    Mpi(String),
    /// Processes, devices, addresses or transports that do not go together.
    #[error("{0}")]
    Refused(String),
    /// They did not meet.
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
    /// A connection could not be made.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// They met, and one was lost before the session began.
    #[error(transparent)]
    Membership(#[from] MembershipError),
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
            Self::Variable { .. } | Self::Mpi(_) | Self::Refused(_) => Exit::Refused,
            Self::Kernel(KernelError::Mpi { .. }) => Exit::PeerUnavailable,
            Self::Rendezvous(RendezvousError::Refused(RendezvousRefusal::Conflicts(_))) => Exit::Refused,
            Self::Rendezvous(RendezvousError::Refused(RendezvousRefusal::Failed(report))) => {
                Exit::from_code(report.exit)
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn options(given: &[(&str, &str)]) -> Result<ClusterOptions, String> {
        let variables = given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        ClusterOptions::read(&variables).map_err(|error| {
            assert_eq!(error.exit(), Exit::Refused, "{error}");
            error.to_string()
        })
    }

    #[test]
    fn heartbeats_and_waits_are_set_by_variables() {
        let given = [(HEARTBEAT_MS, "50"), (HEARTBEAT_DEADLINE_MS, "200"), (REPORT_WAIT_MS, "0"), (INTERFACE, "::1")];
        let read = options(&given).unwrap();
        let ms = [read.heartbeat_every, read.heartbeat_deadline, read.report_within].map(|time| time.as_millis());
        assert_eq!((ms, read.interface), ([50, 200, 0], Some("[::1]:0".parse().unwrap())));
        let slow = options(&[(HEARTBEAT_MS, "3000"), (REPORT_WAIT_MS, "")]).unwrap();
        assert_eq!(slow.heartbeat_deadline.as_millis(), 12_000, "four beats at least");
        assert_eq!(slow.report_within, ClusterOptions::default().report_within);
    }

    #[test]
    fn variables_that_cannot_be_used_are_named() {
        for (name, value) in [
            (HEARTBEAT_MS, "0"),
            (HEARTBEAT_MS, "1 s"),
            (HEARTBEAT_MS, "86400001"),
            (HEARTBEAT_DEADLINE_MS, "999"),
            (HEARTBEAT_DEADLINE_MS, "-1"),
            (REPORT_WAIT_MS, "soon"),
            (INTERFACE, "eth0"),
            (ADVERTISE, "host:5"),
            (ADVERTISE, "tcp://host"),
            (ADVERTISE, "a b"),
            (TRANSPORT, "pigeon"),
        ] {
            let message = options(&[(name, value)]).expect_err(value);
            assert!(message.starts_with(&format!("{name} is {value:?}, expected ")), "{message}");
        }
    }

    #[test]
    fn an_advertised_host_keeps_the_ports() {
        for (host, expected) in
            [("10.0.0.7", "10.0.0.7:20000"), ("fd00::7", "[fd00::7]:20000"), ("a-1.b", "a-1.b:20000")]
        {
            let advertise = options(&[(ADVERTISE, host)]).unwrap().advertise.expect("it is given");
            let tcp = |name: &str| Address::Tcp(name.into());
            assert_eq!(advertise.connections(&tcp("127.0.0.1:20000")).unwrap(), tcp(expected));
            assert_eq!(advertise.connections(&tcp("[::1]:20000")).unwrap(), tcp(expected));
            let unix = Address::Unix("/tmp/socket".into());
            assert_eq!(advertise.connections(&unix).unwrap(), unix);
        }
        let advertise = options(&[(ADVERTISE, "10.0.0.7")]).unwrap().advertise.expect("it is given");
        assert_eq!(advertise.heartbeats("0.0.0.0:9".parse().unwrap()).unwrap(), "10.0.0.7:9".parse().unwrap());
    }
}
