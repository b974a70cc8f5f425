//! Options of the rendezvous, the connections and the heartbeats, and the environment variables that set them.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::env::{
    ADVERTISE, COLLECTIVES, ENCRYPT, Endpoint, EnvError, HEARTBEAT_DEADLINE_MS, HEARTBEAT_MS, INTERFACE, MEET_MS,
    REPORT_WAIT_MS, TRANSPORT, Variables,
};
use crate::machine::parse_ip;
use crate::transport::Address;

/// The transport that carries tensors between processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Shared memory between processes of one node, TCP between nodes, and NCCL between GPUs.
    #[default]
    Auto,
    /// Like `Auto`, but fails if the processes of a node cannot share memory.
    SharedMemory,
    /// Unix sockets within a node, TCP between nodes. Data between GPUs of two processes goes through host memory.
    Unix,
    /// TCP between all processes, even within a node. Data between GPUs of two processes goes through host memory.
    Tcp,
}

/// The engine that runs collectives between processes. Tensors outside of collectives use the [`Transport`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Collectives {
    /// Shardflow's own engines over the [`Transport`]. The bits of results do not depend on the number of processes.
    #[default]
    Own,
    /// MPI for groups whose members are all in different processes, and `Own` for all other groups. The sums of MPI and
    /// `Own` may differ by rounding. Needs the feature `mpi` and processes that `mpirun` starts.
    Mpi,
}

/// Receives log lines. A line may name the ranks that this process waits for, or state why a transport was replaced.
pub type OnWaiting = Arc<dyn Fn(&str) + Send + Sync>;

/// Translates this process's listening addresses into those that others use, for example if it is behind a proxy.
pub trait Advertise: fmt::Debug + Send + Sync {
    /// Returns the address to which others connect to reach `bound`. After an error, the process does not start.
    fn connections(&self, bound: &Address) -> io::Result<Address>;

    /// Returns the UDP address to which others send heartbeats for the socket that is bound to `bound`.
    fn heartbeats(&self, bound: SocketAddr) -> io::Result<SocketAddr>;
}

/// How long to retry until an advertised host name resolves. The name may be registered after this process starts.
const RESOLVE_WITHIN: Duration = Duration::from_secs(5);

/// A host name or IP address, published instead of the address on which a process listens. The port does not change.
#[derive(Clone, Debug)]
struct AdvertisedHost(String);

impl AdvertisedHost {
    fn parse(text: &str) -> Option<Self> {
        let is_name = matches!(Endpoint::parse_rendezvous(text), Ok(Endpoint::Tcp { host, .. }) if host == text);
        (is_name || parse_ip(text).is_some()).then(|| Self(text.to_owned()))
    }
}

impl Advertise for AdvertisedHost {
    fn connections(&self, bound: &Address) -> io::Result<Address> {
        let Address::Tcp(name) = bound else { return Ok(bound.clone()) };
        let port = name.rsplit(':').next().and_then(|port| port.parse().ok()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Endpoint::Tcp { host: self.0.clone(), port }.address())
    }

    fn heartbeats(&self, bound: SocketAddr) -> io::Result<SocketAddr> {
        let give_up = Instant::now() + RESOLVE_WITHIN;
        let invalid =
            |why| io::Error::other(format!("{ADVERTISE} or --advertise is {}, which does not resolve: {why}", self.0));
        loop {
            match (self.0.as_str(), bound.port()).to_socket_addrs() {
                Ok(mut found) => return found.next().ok_or_else(|| invalid("the name has no address".to_owned())),
                Err(_) if Instant::now() < give_up => std::thread::sleep(Duration::from_millis(250)),
                Err(error) => return Err(invalid(error.to_string())),
            }
        }
    }
}

/// Options of the rendezvous, the connections and the heartbeats. All processes must use the same options.
#[derive(Clone)]
pub struct ClusterOptions {
    /// The transport of tensors.
    pub transport: Transport,
    /// The engine of collectives.
    pub collectives: Collectives,
    /// Whether tensors over TCP, and the messages between actors, are encrypted. Rendezvous and control messages over
    /// TCP are always encrypted. Heartbeats and the traffic of NCCL and MPI are never encrypted.
    pub encrypt: bool,
    /// Local address to listen on, with port 0. By default, the address from which this node reaches process 0.
    pub interface: Option<SocketAddr>,
    /// How others reach this process. By default, they use the addresses on which this process listens.
    pub advertise: Option<Arc<dyn Advertise>>,
    /// How long to wait for all processes to join.
    pub meet_within: Duration,
    /// How long to wait for connections after all processes have joined. Later waits are limited by the watchdog.
    pub connect_within: Duration,
    /// Interval between reports about a wait. A report names the missing or slow ranks.
    pub report_every: Duration,
    /// Time between heartbeats.
    pub heartbeat_every: Duration,
    /// A process counts as failed after this time without a heartbeat from it. At least four times `heartbeat_every`.
    pub heartbeat_deadline: Duration,
    /// How long a process that fails before the rendezvous tries to report its failure to the others. See
    /// [`crate::departure::report`].
    pub report_within: Duration,
    /// Receives the lines about waits. These lines are also logged.
    pub on_waiting: Option<OnWaiting>,
}

/// Maximum of a wait. It is small enough that adding it to an `Instant` does not overflow.
const WAIT_MAX: Duration = Duration::from_secs(1 << 30);

impl ClusterOptions {
    /// Returns the options with all times limited, so that they can be added to an `Instant`.
    pub fn with_finite_times(mut self) -> Self {
        let times = [&mut self.meet_within, &mut self.connect_within, &mut self.report_every];
        let more = [&mut self.heartbeat_every, &mut self.heartbeat_deadline, &mut self.report_within];
        times.into_iter().chain(more).for_each(|time| *time = (*time).min(WAIT_MAX));
        self
    }
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            transport: Transport::Auto,
            collectives: Collectives::Own,
            encrypt: false,
            interface: None,
            advertise: None,
            meet_within: Duration::from_secs(300),
            connect_within: Duration::from_secs(60),
            report_every: Duration::from_secs(3),
            heartbeat_every: Duration::from_millis(250),
            heartbeat_deadline: Duration::from_secs(4),
            report_within: Duration::from_secs(10),
            on_waiting: None,
        }
    }
}

impl ClusterOptions {
    /// Logs a line about a wait, and passes the line to `on_waiting`.
    pub fn report_waiting(&self, line: &str) {
        tracing::warn!("{line}");
        self.on_waiting.iter().for_each(|on_waiting| on_waiting(line));
    }

    /// Reads the options from these variables.
    pub fn read(variables: &Variables) -> Result<Self, EnvError> {
        let mut options = Self::default();
        let transports = [
            ("auto", Transport::Auto),
            ("shared-memory", Transport::SharedMemory),
            ("unix", Transport::Unix),
            ("tcp", Transport::Tcp),
        ];
        let transport = read(variables, TRANSPORT, "auto, shared-memory, unix or tcp", one_of(&transports))?;
        options.transport = transport.unwrap_or_default();
        let engines = [("own", Collectives::Own), ("mpi", Collectives::Mpi)];
        options.collectives = read(variables, COLLECTIVES, "own or mpi", one_of(&engines))?.unwrap_or_default();
        let switch = [("on", true), ("off", false)];
        options.encrypt = read(variables, ENCRYPT, "on or off", one_of(&switch))?.unwrap_or(options.encrypt);
        options.interface = read(variables, INTERFACE, "an IP address, such as 10.0.0.1 or fe80::1%eth0", parse_ip)?;
        let advertise =
            read(variables, ADVERTISE, "a host name or an IP address, without a port", AdvertisedHost::parse)?;
        options.advertise = advertise.map(|host| Arc::new(host) as Arc<dyn Advertise>);
        let ms = |min: u64| move |text: &str| text.parse().ok().filter(|ms| (min..=DAY_MS).contains(ms));
        let ms_expected = "a whole number of milliseconds, from 1 to 86400000";
        let time = |name| Ok(read(variables, name, ms_expected, ms(1))?.map(Duration::from_millis));
        options.heartbeat_every = time(HEARTBEAT_MS)?.unwrap_or(options.heartbeat_every);
        options.meet_within = time(MEET_MS)?.unwrap_or(options.meet_within);
        let deadline_min = 4 * options.heartbeat_every.as_millis() as u64;
        let deadline_expected =
            "a whole number of milliseconds, from four times SHARDFLOW_HEARTBEAT_MS (default 250) to 86400000";
        let given = read(variables, HEARTBEAT_DEADLINE_MS, deadline_expected, ms(deadline_min))?;
        // If only the interval is set, the default deadline may be below its minimum of four intervals.
        let deadline = options.heartbeat_deadline.max(4 * options.heartbeat_every);
        options.heartbeat_deadline = given.map_or(deadline, Duration::from_millis);
        let within = read(variables, REPORT_WAIT_MS, "a whole number of milliseconds, from 0 to 86400000", ms(0))?;
        options.report_within = within.map_or(options.report_within, Duration::from_millis);
        Ok(options)
    }
}

/// Maximum of a variable in milliseconds. A longer time is presumably a mistake.
const DAY_MS: u64 = 86_400_000;

fn one_of<T: Copy>(words: &[(&str, T)]) -> impl Fn(&str) -> Option<T> {
    |text| words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value)
}

/// Parses a variable. Returns `None` if the variable is unset or empty.
fn read<T>(
    variables: &Variables,
    name: &'static str,
    expected: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, EnvError> {
    let text = variables.get(name).filter(|text| !text.is_empty());
    text.map(|text| parse(text).ok_or(EnvError::Option { name, value: text.clone(), expected })).transpose()
}

impl fmt::Debug for ClusterOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { transport, collectives, encrypt, .. } = self;
        f.debug_struct("ClusterOptions")
            .field("transport", transport)
            .field("collectives", collectives)
            .field("encrypt", encrypt)
            .field("heartbeat", &(self.heartbeat_every, self.heartbeat_deadline))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    fn options(given: &[(&str, &str)]) -> Result<ClusterOptions, String> {
        let variables = given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        ClusterOptions::read(&variables).map_err(|error| {
            assert_eq!(error.exit(), Exit::Refused, "{error}");
            error.to_string()
        })
    }

    #[test]
    fn finite_times_can_be_added_to_an_instant() {
        let (meet_within, report_within) = (Duration::MAX, Duration::from_secs(i64::MAX as u64));
        let options = ClusterOptions { meet_within, report_within, ..ClusterOptions::default() }.with_finite_times();
        for time in [options.meet_within, options.report_within] {
            assert!(std::time::Instant::now().checked_add(time).is_some(), "{time:?}");
        }
        assert_eq!(options.connect_within, ClusterOptions::default().connect_within);
    }

    #[test]
    fn heartbeats_and_waits_are_set_by_variables() {
        let given = [
            (ENCRYPT, "on"),
            (HEARTBEAT_MS, "50"),
            (HEARTBEAT_DEADLINE_MS, "200"),
            (MEET_MS, "1"),
            (REPORT_WAIT_MS, "0"),
            (INTERFACE, "::1"),
        ];
        let read = options(&given).unwrap();
        let times = [read.heartbeat_every, read.heartbeat_deadline, read.meet_within, read.report_within];
        assert_eq!(
            (times.map(|time| time.as_millis()), read.interface),
            ([50, 200, 1, 0], Some("[::1]:0".parse().unwrap()))
        );
        assert!(read.encrypt && !ClusterOptions::default().encrypt);
        let slow = options(&[(HEARTBEAT_MS, "3000"), (REPORT_WAIT_MS, "")]).unwrap();
        assert_eq!(slow.heartbeat_deadline.as_millis(), 12_000, "at least four intervals");
        assert_eq!(slow.report_within, ClusterOptions::default().report_within);
        assert_eq!(slow.meet_within.as_secs(), 300, "the default");
        assert_eq!(options(&[(MEET_MS, "86400000")]).unwrap().meet_within.as_secs(), 86_400);
    }

    #[test]
    fn an_error_names_the_invalid_variable() {
        for (name, value) in [
            (HEARTBEAT_MS, "0"),
            (HEARTBEAT_MS, "1 s"),
            (HEARTBEAT_MS, "86400001"),
            (HEARTBEAT_DEADLINE_MS, "999"),
            (HEARTBEAT_DEADLINE_MS, "-1"),
            (MEET_MS, "0"),
            (MEET_MS, "86400001"),
            (REPORT_WAIT_MS, "soon"),
            (INTERFACE, "eth0"),
            (ADVERTISE, "host:5"),
            (ADVERTISE, "tcp://host"),
            (ADVERTISE, "a b"),
            (TRANSPORT, "udp"),
            (ENCRYPT, "true"),
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
