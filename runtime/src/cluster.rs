//! The processes that run a plan together: detects the process's rank from its environment and holds the options of the
//! rendezvous.
//!
//! ```no_run
//! use shardflow::prelude::*;
//!
//! # fn program(plan: Plan) -> Result<(), Box<dyn std::error::Error>> {
//! let cluster = Cluster::from_env()?; // set by the launcher, torchrun, Slurm, ..; a single process without them
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
use crate::process_map::ProcessMap;

mod by_mpi;
pub(crate) mod connector;
pub(crate) mod departure;
pub mod env;
pub(crate) mod failure;
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
/// Variable with the exit codes that caused the launcher's restarts of the job so far, comma-separated.
const RESTART_CAUSES: &str = "SHARDFLOW_RESTART_CAUSES";
/// Variable with the time at which the launcher began the job: Unix time in milliseconds.
const JOB_BEGAN_MS: &str = "SHARDFLOW_JOB_BEGAN_MS";
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

/// The transport that carries tensors between processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Shared memory between processes of one node, TCP between nodes; NCCL between GPUs.
    #[default]
    Auto,
    /// Shared memory on one node, TCP between nodes; refused if the processes of a node cannot share memory. NCCL between GPUs.
    SharedMemory,
    /// Unix sockets on one node, TCP between nodes. Register transfers between GPUs are staged through host memory.
    Unix,
    /// TCP, also within one node. Between GPUs, the same as `Unix`.
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

/// The engine that runs collectives between processes. Registers always use the [`Transport`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Collectives {
    /// Shardflow's own engines over the [`Transport`]. Results have the same bits on any number of processes.
    #[default]
    Own,
    /// MPI for groups whose members are all in different processes, `Own` for other groups. Sums agree with those of
    /// `Own` within rounding. Needs the feature `mpi` and processes started by `mpirun`.
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

/// Receives log lines: the ranks that a wait is for, or why another transport is used.
pub type OnWaiting = Arc<dyn Fn(&str) + Send + Sync>;

/// Maps the addresses that this process listens on to those that others connect to, for example with a proxy or forwarded
/// ports. Called once for each address.
pub trait Advertise: fmt::Debug + Send + Sync {
    /// Returns the address that others connect to in order to reach `bound`.
    ///
    /// # Errors
    /// There is no such address. The process then does not start.
    fn connections(&self, bound: &Address) -> io::Result<Address>;

    /// Returns the UDP address that others send heartbeats to in order to reach `bound`.
    ///
    /// # Errors
    /// As [`Advertise::connections`].
    fn heartbeats(&self, bound: SocketAddr) -> io::Result<SocketAddr>;
}

/// A host name or address that is published instead of the one that a process listens on; the port does not change.
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
        let unresolved = || io::Error::new(io::ErrorKind::NotFound, format!("{} has no address", self.0));
        (self.0.as_str(), bound.port()).to_socket_addrs()?.next().ok_or_else(unresolved)
    }
}

/// Options of the rendezvous, the connections and the heartbeats; the same for all processes.
#[derive(Clone)]
pub struct ClusterOptions {
    /// The transport of tensors.
    pub transport: Transport,
    /// The engine of collectives.
    pub collectives: Collectives,
    /// Local address to listen on, with port 0. Without it, the address from which process 0 is reached; loopback if process 0
    /// is on loopback.
    pub interface: Option<SocketAddr>,
    /// How others reach this process; without it, at the addresses that it listens on.
    pub advertise: Option<Arc<dyn Advertise>>,
    /// How long to wait for all processes to join.
    pub meet_within: Duration,
    /// How long connecting may take once all processes have joined, before heartbeats start. Later waits are limited by
    /// [`crate::prelude::WatchdogOptions::abort_after`].
    pub connect_within: Duration,
    /// Interval between reports of a wait, with the missing or slow ranks.
    pub report_every: Duration,
    /// Time between heartbeats.
    pub heartbeat_every: Duration,
    /// Silence after which a process counts as failed; at least four times `heartbeat_every`.
    pub heartbeat_deadline: Duration,
    /// How long to report a failure before the rendezvous to the other processes, see [`crate::exit::report`].
    pub report_within: Duration,
    /// Receives the log lines of a wait, in addition to the log.
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
        let ms = |min: u64| move |text: &str| text.parse().ok().filter(|ms| (min..=DAY_MS).contains(ms));
        let ms_expected = "a whole number of milliseconds, from 1 to 86400000";
        let interval = read(variables, HEARTBEAT_MS, ms_expected, ms(1))?;
        options.heartbeat_every = interval.map_or(options.heartbeat_every, Duration::from_millis);
        let deadline_min = 4 * options.heartbeat_every.as_millis() as u64;
        let deadline_expected =
            "milliseconds, at least four times SHARDFLOW_HEARTBEAT_MS (250 if not set), at most 86400000";
        let given = read(variables, HEARTBEAT_DEADLINE_MS, deadline_expected, ms(deadline_min))?;
        // If only the interval is set, the default deadline may be too short for it.
        let deadline = options.heartbeat_deadline.max(4 * options.heartbeat_every);
        options.heartbeat_deadline = given.map_or(deadline, Duration::from_millis);
        let within = read(variables, REPORT_WAIT_MS, "a whole number of milliseconds, from 0 to 86400000", ms(0))?;
        options.report_within = within.map_or(options.report_within, Duration::from_millis);
        Ok(options)
    }
}

/// Largest value of a variable in milliseconds; a longer time is a mistake.
const DAY_MS: u64 = 86_400_000;

/// Parses a variable, if it is set and not empty.
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

/// This process's rank and options, known before the rendezvous.
#[derive(Clone, Debug)]
pub struct Cluster {
    launch: LaunchContext,
    by_mpi: ByMpi,
    /// Options of the rendezvous and the connections.
    pub options: ClusterOptions,
    /// The exit codes that caused the launcher's restarts of the job so far.
    pub restart_causes: Vec<u8>,
    /// When the launcher began the job: Unix time in milliseconds, the same for all attempts.
    pub job_began_ms: Option<u64>,
}

impl Cluster {
    /// A single process.
    pub fn local() -> Self {
        Self::new(LaunchContext::Local, ClusterOptions::default())
    }

    /// A process with this launch context.
    pub fn new(launch: LaunchContext, options: ClusterOptions) -> Self {
        Self { launch, by_mpi: ByMpi::default(), options, restart_causes: Vec::new(), job_began_ms: None }
    }

    /// Reads the variables of the launcher, torchrun, Slurm, OpenMPI, MPICH or a Kubernetes indexed job; a single process
    /// without them. Connects nothing: the processes meet when a session starts.
    ///
    /// # Errors
    /// The environment contradicts itself; the error names the variable and the fix.
    pub fn from_env() -> Result<Self, ClusterError> {
        let variables = env::process_variables();
        let options = ClusterOptions::read(&variables)?;
        if options.collectives == Collectives::Mpi && cfg!(not(feature = "mpi")) {
            return Err(by_mpi::not_built());
        }
        let launch = env::detect(&variables)?;
        let causes = variables.get(RESTART_CAUSES).map_or("", |text| text.as_str());
        // Used for metrics only, so values that cannot be parsed are skipped.
        let restart_causes = causes.split(',').filter_map(|code| code.parse().ok()).collect();
        let job_began_ms = variables.get(JOB_BEGAN_MS).and_then(|text| text.parse().ok());
        Ok(Self { launch, by_mpi: ByMpi::default(), options, restart_causes, job_began_ms })
    }

    fn world(&self) -> Option<&env::World> {
        if let LaunchContext::World(world) = &self.launch { Some(world) } else { None }
    }

    /// The rank of this process.
    pub fn process(&self) -> u32 {
        self.world().map_or(0, |world| world.process)
    }

    /// The job's name, if it has one, and how many times it was restarted.
    pub(crate) fn job(&self) -> (Option<String>, u64) {
        (self.world().map(|world| world.run_id.clone()).filter(|id| id != "none"), self.restart())
    }

    /// The world size: the number of processes.
    pub fn processes(&self) -> u32 {
        self.world().map_or(1, |world| world.processes)
    }

    /// The number of processes on this node, which share its cores.
    pub fn local_processes(&self) -> u32 {
        self.world().map_or(1, |world| world.local_processes)
    }

    /// How many of the mesh's devices are on this node and share its cores and memory. Called before the rendezvous, so it
    /// assumes that the ranks of a node are consecutive. If they are not and the devices do not divide evenly, the result may
    /// be off by one for each process.
    pub fn devices_here(&self, devices: usize) -> usize {
        let Some(world) = self.world() else { return devices };
        let first = world.process.saturating_sub(world.local_process);
        let process_map = ProcessMap { process: world.process, processes: world.processes, devices };
        process_map.on_node(first..(first + world.local_processes).min(world.processes), world.process).all
    }

    /// How many times the job was restarted, as far as this process knows.
    pub fn restart(&self) -> u64 {
        self.world().map_or(0, |world| world.restart)
    }

    /// True for rank 0, the only process that prints output for all.
    pub fn is_first(&self) -> bool {
        self.process() == 0
    }
}

/// Why the processes cannot form a world.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The environment contradicts itself.
    #[error(transparent)]
    Env(#[from] EnvError),
    /// One of Shardflow's variables has an invalid value.
    #[error("{name} is {value:?}, expected {expected}")]
    Variable {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// The valid values.
        expected: &'static str,
    },
    /// MPI is selected and cannot be used.
    #[error("{COLLECTIVES}=mpi, but {0}")]
    Mpi(String),
    /// An invalid combination of processes, devices, addresses or transports.
    #[error("{0}")]
    Refused(String),
    /// The rendezvous failed.
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
    /// A connection could not be made.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A process was lost after the rendezvous, before the session began.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// Memory or a collective engine could not be created.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A system call failed.
    #[error("cannot {action}: {cause}")]
    System {
        /// The action that failed.
        action: &'static str,
        /// The system's error.
        cause: io::Error,
    },
}

impl ClusterError {
    /// The exit code of a program that ends with this error.
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
        assert_eq!(slow.heartbeat_deadline.as_millis(), 12_000, "at least four intervals");
        assert_eq!(slow.report_within, ClusterOptions::default().report_within);
    }

    #[test]
    fn an_error_names_the_invalid_variable() {
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
            (TRANSPORT, "udp"),
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
            let advertise = options(&[(ADVERTISE, host)]).unwrap().advertise.expect("the variable is set");
            let tcp = |name: &str| Address::Tcp(name.into());
            assert_eq!(advertise.connections(&tcp("127.0.0.1:20000")).unwrap(), tcp(expected));
            assert_eq!(advertise.connections(&tcp("[::1]:20000")).unwrap(), tcp(expected));
            let unix = Address::Unix("/tmp/socket".into());
            assert_eq!(advertise.connections(&unix).unwrap(), unix);
        }
        let advertise = options(&[(ADVERTISE, "10.0.0.7")]).unwrap().advertise.expect("the variable is set");
        assert_eq!(advertise.heartbeats("0.0.0.0:9".parse().unwrap()).unwrap(), "10.0.0.7:9".parse().unwrap());
    }
}
