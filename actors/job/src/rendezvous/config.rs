//! The configuration of a rendezvous, and the values that a process publishes for it.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::facts::{EXECUTABLE, PROCESSES, VERSION};
use super::messages::{Fact, Identity, JoinInfo, RendezvousError};
use super::roster::Member;
use crate::machine::{MemoryClaim, address_towards};
use crate::options::{Advertise, ClusterOptions};
use crate::secret::Secret;
use crate::transport::{Address, Hello, Purpose, SessionId, TransportError, resolve, without_zone};

/// Configuration of one process's rendezvous.
#[derive(Clone, Debug)]
pub struct RendezvousConfig {
    /// Rank of this process, below `processes`.
    pub process: u32,
    /// World size.
    pub processes: u32,
    /// How many times the process was restarted. The largest count of all processes is the world's epoch.
    pub restart: u64,
    /// The address of process 0. All processes use the same text.
    pub coordinator: Address,
    /// The job's secret.
    pub secret: Secret,
    /// The identity of the program, the host and the process.
    pub identity: Identity,
    /// Memory claim of this process, published to the other processes of its node.
    pub memory: MemoryClaim,
    /// Additional values that must be equal on all processes. A value comes before any value that depends on it.
    pub facts: Vec<Fact>,
    /// The ranks to which this process connects, besides those of its node and its neighbours in the control tree.
    pub wanted: BTreeSet<u32>,
    /// UDP address that receives heartbeats. [`local_address`] returns the local address to bind.
    pub heartbeat: SocketAddr,
    /// True if the world also has processes on other nodes.
    pub spans_nodes: bool,
    /// Local address to listen on, with port 0. By default, the result of [`local_address`].
    pub interface: Option<SocketAddr>,
    /// How others reach this process. By default, they use the addresses on which this process listens.
    pub advertise: Option<Arc<dyn Advertise>>,
    /// How long to wait until all processes have joined. The same time applies again until all processes are ready.
    pub timeout: Duration,
    /// Interval between reports of the ranks that are missing.
    pub report_every: Duration,
    /// How long to retry while an earlier attempt of the world is still running. That attempt may be about to end.
    pub late_grace: Duration,
    /// After a conflict, how long to accept more processes, so that these are also refused.
    pub conflict_grace: Duration,
    /// How long a process that fails before the start reports its failure. Rank 0 does so by refusing the other
    /// processes. Any other rank reports its failure to rank 0.
    pub report_within: Duration,
}

impl RendezvousConfig {
    /// The configuration of a world with one process.
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
            wanted: BTreeSet::new(),
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

/// The local address to listen on, with port 0: `interface`, or the address from which this node reaches the
/// coordinator. If `coordinator` is a Unix socket, the address is loopback. Retries until the deadline, because the
/// coordinator's name may be registered later.
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
    let info = JoinInfo { member, facts, wanted: ranges(&config.wanted) };
    info.check()?;
    Ok(info)
}

fn ranges(ranks: &BTreeSet<u32>) -> Vec<Range<u32>> {
    let mut out: Vec<Range<u32>> = Vec::new();
    for rank in ranks.iter().copied() {
        match out.last_mut() {
            Some(last) if last.end == rank => last.end += 1,
            _ => out.push(rank..rank + 1),
        }
    }
    out
}

/// Returns the address without its IPv6 zone, because a zone is valid only on this node.
pub(super) fn unzoned(address: Address) -> Address {
    let zoned = match &address {
        Address::Tcp(text) if text.contains('%') => resolve(text).ok(),
        _ => None,
    };
    zoned.and_then(|all| all.first().copied()).map_or(address, |own| Address::Tcp(without_zone(own).to_string()))
}

/// Returns, for each address in `bound`, the address that other processes use.
pub(super) fn advertised(config: &RendezvousConfig, bound: Vec<Address>) -> Result<Vec<Address>, RendezvousError> {
    let Some(advertise) = &config.advertise else { return Ok(bound) };
    let published = |address: &Address| {
        let failed = |cause| TransportError::Listen { address: address.clone(), cause };
        advertise.connections(address).map_err(failed)
    };
    Ok(bound.iter().map(published).collect::<Result<_, _>>()?)
}

/// Pause before the retry of a call that failed immediately.
pub(super) const RETRY: Duration = Duration::from_millis(50);

pub(super) fn is_in_use(error: &TransportError) -> bool {
    matches!(error, TransportError::Listen { cause, .. } if cause.kind() == io::ErrorKind::AddrInUse)
}

/// The [`Hello`] of a process that has no session yet. A connection over TCP is encrypted.
pub(super) fn hello(config: &RendezvousConfig, from: u32) -> Hello {
    let sealed = matches!(config.coordinator, Address::Tcp(_));
    let session = SessionId::default();
    Hello { session, epoch: config.restart, from, to: 0, sealed, purpose: Purpose::Rendezvous }
}
