//! How the processes of a world find each other: process 0 listens, all others introduce themselves to it, it compares them,
//! and they start together.
//!
//! ```text
//! process 0                     process p
//!    ◄── (authenticated) Introduction ── who, where, restarts, and facts: version, mesh, plan, ..
//!    ... until all are here, or the deadline
//!    ── Roster: session, epoch, members ──►   p lets the members in
//!    ◄────────────── Ready ──
//!    ... from all
//!    ── Start ──►
//! ```
//!
//! - **RV-1**: nobody starts unless all are ready: whoever starts can be dialled by every member.
//! - **RV-2**: a refusal goes to all, names who differs from whom, and gives both values.
//! - **RV-3**: a process that comes again while others wait takes its own place: if its old connection is dead, if it says
//!   that it was restarted more often, or if it is the same process.
//! - **RV-4**: a process that ends before it joins, for a cause that is not worth a retry, is reported to process 0; all that
//!   wait, and all that come within `report_within`, are refused with its exit code. The first report counts. On behalf of a
//!   process 0 that ended, its launcher or its `exit::report` answers.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardflow_actors::transport::{
    Address, Listener, ListenerOptions, SharedKey, TransportError, resolve, without_zone,
};

use super::Advertise;
use crate::declare::{EXECUTABLE, PROCESSES, VERSION};
use crate::machine::address_towards;

pub(super) use coordinator::answer;
pub(super) use join::call;

mod coordinator;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod join;
mod messages;

pub(crate) use messages::ranks;
pub use messages::{
    Conflict, Fact, Identity, JoinInfo, Member, MissingRanks, ProcessLabel, RendezvousError, RendezvousRefusal, Roster,
};

/// What one process needs to know to meet the others.
#[derive(Clone, Debug)]
pub struct RendezvousConfig {
    /// Its rank, below `processes`.
    pub process: u32,
    /// Processes of the world.
    pub processes: u32,
    /// How often it has been restarted; the world's epoch is the most of all.
    pub restart: u64,
    /// Where process 0 listens; the same text for all.
    pub coordinator: Address,
    /// The job's secret.
    pub secret: SharedKey,
    /// Which program it is.
    pub identity: Identity,
    /// Values that must be equal on all processes, besides the identity, ordered so that a difference explains those after it.
    pub facts: Vec<Fact>,
    /// Its address for heartbeats (UDP); [`local_address`] says on which of this node's addresses to listen.
    pub heartbeat: SocketAddr,
    /// Whether there are processes on other nodes.
    pub spans_nodes: bool,
    /// Address of this node to listen on, with port 0. Without it, the one by which process 0 is reached: see
    /// [`local_address`].
    pub interface: Option<SocketAddr>,
    /// Where others reach this process; without it, at the addresses that it listens on.
    pub advertise: Option<Arc<dyn Advertise>>,
    /// How long to wait for all others; and then, for them to be ready.
    pub timeout: Duration,
    /// How often to say who is missing.
    pub report_every: Duration,
    /// How long to try again at a world that runs already: it may be about to end, because this process died in it.
    pub late_grace: Duration,
    /// After processes that do not fit together were found, how long to wait for others, so as to tell them too.
    pub conflict_grace: Duration,
    /// How long a failure before the start is reported: rank 0 answers, others call it.
    pub report_within: Duration,
    /// Limits of the endpoint.
    pub endpoint: ListenerOptions,
}

impl RendezvousConfig {
    /// A world of one process, to be filled in: five minutes to meet, a report every three seconds.
    pub fn new(coordinator: Address, secret: SharedKey, identity: Identity) -> Self {
        Self {
            process: 0,
            processes: 1,
            restart: 0,
            coordinator,
            secret,
            identity,
            facts: Vec::new(),
            heartbeat: (Ipv4Addr::LOCALHOST, 0).into(),
            spans_nodes: false,
            interface: None,
            advertise: None,
            timeout: Duration::from_secs(300),
            report_every: Duration::from_secs(3),
            late_grace: Duration::from_secs(10),
            conflict_grace: Duration::from_secs(2),
            report_within: REPORT_WITHIN,
            endpoint: ListenerOptions::default(),
        }
    }
}

/// Meets the other processes. All get the same roster; each gets its own endpoint, which lets in the members of the roster.
/// `on_waiting` hears, every `report_every`, who is still missing.
///
/// # Errors
/// See [`RendezvousError`]; a process outlives `timeout` by a few seconds at most.
pub fn rendezvous(
    config: &RendezvousConfig,
    mut on_waiting: impl FnMut(&MissingRanks),
) -> Result<(Roster, Listener), RendezvousError> {
    let deadline = Instant::now() + config.timeout;
    let (process, processes) = (config.process, config.processes);
    if process >= processes || processes > shardflow_actors::transport::PROCESSES_MAX {
        return Err(RendezvousError::Rank { process, processes });
    }
    if process == 0 {
        coordinator::lead(config, deadline, &mut on_waiting)
    } else {
        join::follow(config, deadline, &mut on_waiting)
    }
}

/// The address of this node on which to listen, with port 0: `interface`, or the one by which the coordinator is reached. Loopback
/// for a Unix socket. Tries until the deadline, because a name may appear later than the process.
///
/// # Errors
/// [`RendezvousError::NoWay`] when the coordinator's name has no address, or there is no way there.
pub fn local_address(
    coordinator: &Address,
    interface: Option<SocketAddr>,
    spans_nodes: bool,
    deadline: Instant,
) -> Result<SocketAddr, RendezvousError> {
    let loopback = (Ipv4Addr::LOCALHOST, 0).into();
    let (None, Address::Tcp(name)) = (interface, coordinator) else { return Ok(interface.unwrap_or(loopback)) };
    loop {
        match address_towards(name, spans_nodes) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(RETRY),
            found => return found.map_err(|cause| RendezvousError::NoWay { coordinator: coordinator.clone(), cause }),
        }
    }
}

/// What this process says of itself.
fn introduction(config: &RendezvousConfig, addresses: Vec<Address>) -> Result<JoinInfo, RendezvousError> {
    let Identity { version, binary, node, sockets, cores, host, pid } = config.identity.clone();
    let (process, restart, heartbeat) = (config.process, config.restart, without_zone(config.heartbeat));
    let addresses = addresses.into_iter().map(unzoned).collect();
    let member = Member { process, node, sockets, cores, host, pid, restart, addresses, heartbeat };
    let mut facts = vec![
        Fact::new(VERSION, version),
        Fact::new(EXECUTABLE, format_args!("blake3 {}", blake3::Hash::from_bytes(binary).to_hex())),
        Fact::new(PROCESSES, config.processes),
    ];
    facts.extend_from_slice(&config.facts);
    let introduction = JoinInfo { member, facts };
    introduction.check()?;
    Ok(introduction)
}

/// The same address, for other nodes.
fn unzoned(address: Address) -> Address {
    let zoned = match &address {
        Address::Tcp(text) if text.contains('%') => resolve(text).ok(),
        _ => None,
    };
    zoned.and_then(|all| all.first().copied()).map_or(address, |own| Address::Tcp(without_zone(own).to_string()))
}

/// Where others reach what listens at these addresses.
fn advertised(config: &RendezvousConfig, bound: Vec<Address>) -> Result<Vec<Address>, RendezvousError> {
    let Some(advertise) = &config.advertise else { return Ok(bound) };
    let outside = |address: &Address| {
        let failed = |cause| TransportError::Listen { address: address.clone(), cause };
        advertise.connections(address).map_err(failed)
    };
    Ok(bound.iter().map(outside).collect::<Result<_, _>>()?)
}

/// How long a failure before the start is reported, unless the options say otherwise.
pub(super) const REPORT_WITHIN: Duration = Duration::from_secs(10);
/// Pause between attempts at what has no time-out of its own.
const RETRY: Duration = Duration::from_millis(50);

/// True for an address that another process holds.
fn is_in_use(error: &TransportError) -> bool {
    matches!(error, TransportError::Listen { cause, .. } if cause.kind() == io::ErrorKind::AddrInUse)
}

#[cfg(test)]
mod tests;
