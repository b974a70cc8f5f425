//! The configuration of a rendezvous, and what a process publishes according to it.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::facts::{EXECUTABLE, PROCESSES, VERSION};
use super::messages::{Fact, Identity, JoinInfo, Member, RendezvousError};
use crate::machine::{MemoryClaim, address_towards};
use crate::options::{Advertise, ClusterOptions};
use crate::secret::Secret;
use crate::transport::{Address, Hello, Purpose, SessionId, TransportError, resolve, without_zone};

/// Configuration of one process's rendezvous.
#[derive(Clone, Debug)]
pub struct RendezvousConfig {
    /// Rank, below `processes`.
    pub process: u32,
    /// World size.
    pub processes: u32,
    /// How many times the process was restarted; the largest count of all processes is the world's epoch.
    pub restart: u64,
    /// The address of process 0; the same text for all.
    pub coordinator: Address,
    /// The job's secret.
    pub secret: Secret,
    /// The program, host and process.
    pub identity: Identity,
    /// Memory of this process, for the others of its node.
    pub memory: MemoryClaim,
    /// Further values that must be equal on all processes. A value comes before those that depend on it.
    pub facts: Vec<Fact>,
    /// UDP address that receives heartbeats; [`local_address`] selects the local address to bind.
    pub heartbeat: SocketAddr,
    /// True if other nodes have processes of this world.
    pub spans_nodes: bool,
    /// Local address to listen on, with port 0. Without it, see [`local_address`].
    pub interface: Option<SocketAddr>,
    /// How others reach this process; without it, at the addresses that it listens on.
    pub advertise: Option<Arc<dyn Advertise>>,
    /// How long to wait for all others to join, and then again for them to be ready.
    pub timeout: Duration,
    /// Interval between reports of the missing ranks.
    pub report_every: Duration,
    /// How long to retry while the world already runs: it may be about to end because of a failure.
    pub late_grace: Duration,
    /// How long to wait for more processes after a conflict, so that they are refused too.
    pub conflict_grace: Duration,
    /// How long to report a failure before the start: rank 0 refuses the others, other ranks report to rank 0.
    pub report_within: Duration,
}

impl RendezvousConfig {
    /// Configuration of a world of one process.
    pub fn new(coordinator: Address, secret: Secret, identity: Identity, options: &ClusterOptions) -> Self {
        Self {
            process: 0,
            processes: 1,
            restart: 0,
            coordinator,
            secret,
            identity,
            memory: MemoryClaim::default(),
            facts: Vec::new(),
            heartbeat: (Ipv4Addr::LOCALHOST, 0).into(),
            spans_nodes: false,
            interface: options.interface,
            advertise: options.advertise.clone(),
            timeout: options.meet_within,
            report_every: options.report_every,
            late_grace: Duration::from_secs(10),
            conflict_grace: Duration::from_secs(2),
            report_within: options.report_within,
        }
    }
}

/// The local address to listen on, with port 0: `interface`, or the address from which the coordinator is reached.
/// Loopback for a Unix socket. Retries until the deadline, because the name may be registered later.
pub fn local_address(
    coordinator: &Address,
    interface: Option<SocketAddr>,
    spans_nodes: bool,
    deadline: Instant,
) -> Result<SocketAddr, RendezvousError> {
    let loopback = (Ipv4Addr::LOCALHOST, 0).into();
    let (None, Address::Tcp(name)) = (interface, coordinator) else { return Ok(interface.unwrap_or(loopback)) };
    let no_route = |cause| RendezvousError::NoRoute { coordinator: coordinator.clone(), cause };
    loop {
        match address_towards(name, spans_nodes) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(RETRY),
            found => return found.map_err(no_route),
        }
    }
}

pub(super) fn join_info(config: &RendezvousConfig, addresses: Vec<Address>) -> Result<JoinInfo, RendezvousError> {
    let Identity { version, binary, node, sockets, cores, host, pid } = config.identity.clone();
    let (process, restart, heartbeat) = (config.process, config.restart, without_zone(config.heartbeat));
    let memory = config.memory.clone();
    let addresses = addresses.into_iter().map(unzoned).collect();
    let member = Member { process, node, sockets, cores, memory, host, pid, restart, addresses, heartbeat };
    let mut facts = vec![
        Fact::new(VERSION, version),
        Fact::new(EXECUTABLE, format_args!("blake3 {}", blake3::Hash::from_bytes(binary).to_hex())),
        Fact::new(PROCESSES, config.processes),
    ];
    facts.extend_from_slice(&config.facts);
    let info = JoinInfo { member, facts };
    info.check()?;
    Ok(info)
}

/// The same address without its IPv6 zone, which is valid on this node only.
pub(super) fn unzoned(address: Address) -> Address {
    let zoned = match &address {
        Address::Tcp(text) if text.contains('%') => resolve(text).ok(),
        _ => None,
    };
    zoned.and_then(|all| all.first().copied()).map_or(address, |own| Address::Tcp(without_zone(own).to_string()))
}

/// The addresses at which others reach these listening addresses.
pub(super) fn advertised(config: &RendezvousConfig, bound: Vec<Address>) -> Result<Vec<Address>, RendezvousError> {
    let Some(advertise) = &config.advertise else { return Ok(bound) };
    let published = |address: &Address| {
        let failed = |cause| TransportError::Listen { address: address.clone(), cause };
        advertise.connections(address).map_err(failed)
    };
    Ok(bound.iter().map(published).collect::<Result<_, _>>()?)
}

/// Pause between retries of a call that returns at once.
pub(super) const RETRY: Duration = Duration::from_millis(50);

pub(super) fn is_in_use(error: &TransportError) -> bool {
    matches!(error, TransportError::Listen { cause, .. } if cause.kind() == io::ErrorKind::AddrInUse)
}

/// The hello of a process without a session yet. Everything between nodes is encrypted.
pub(super) fn hello(config: &RendezvousConfig, from: u32) -> Hello {
    let sealed = matches!(config.coordinator, Address::Tcp(_));
    let session = SessionId::default();
    Hello { session, epoch: config.restart, from, to: 0, sealed, purpose: Purpose::Rendezvous }
}
