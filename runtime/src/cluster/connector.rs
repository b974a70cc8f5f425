//! The ways that a session's registers and collectives take from process to process: memory that is mapped, connections that
//! are dialled. All processes make them in the same order.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardflow_actors::remote::PeerSpec;
use shardflow_actors::shell::RegisterMemory;
use shardflow_actors::spec::RegisterId;
use shardflow_actors::transport::{
    self, Address, Connection, Hello, Listener, Purpose, SharedKey, TransportError, with_zone_of,
};
use shardflow_kernels::collective::board::Board;
use shardflow_kernels::collective::routed::Routed;
use shardflow_kernels::collective::shared_memory::SharedMemory;
use shardflow_kernels::collective::wire::{self, Channel, Wire};
use shardflow_kernels::collective::{Collective, Group};
use shardflow_kernels::device::{Device, DeviceKind};
use shardflow_kernels::memory::{Access, Arena, Base};

use super::by_mpi::ByMpi;
use super::rendezvous::{Member, Roster};
use super::{ClusterError, ClusterOptions, Collectives, INTERFACE, TRANSPORT, Transport};
use crate::plan::Plan;
use crate::session::devices::Pipes;
use crate::session::process_map::ProcessMap;

/// How often a wait for a peer looks whether the session has ended.
const LOOK: Duration = Duration::from_millis(100);

/// How a session's registers and collectives get from process to process.
pub(crate) struct Connections {
    /// Runs every group's collectives.
    pub(crate) engine: Arc<dyn Collective>,
    /// Arenas of peers' devices that are mapped here.
    pub(crate) mapped: BTreeMap<usize, Arena>,
    /// Registers of peers whose slots are copied here.
    pub(crate) mirrors: BTreeMap<RegisterId, RegisterMemory>,
    /// The connections that register messages take.
    pub(crate) peers: Vec<PeerSpec>,
}

impl Connections {
    /// Of a session that has no peers.
    pub(crate) fn alone(engine: Arc<dyn Collective>) -> Self {
        Self { engine, mapped: BTreeMap::new(), mirrors: BTreeMap::new(), peers: Vec::new() }
    }
}

/// Everything that the ways are made with.
pub(crate) struct Connector<'a> {
    /// What memory and collectives are of: a GPU's memory is shared with nobody, and its collectives are the GPU engine's.
    pub(crate) device: DeviceKind,
    pub(crate) process_map: ProcessMap,
    pub(crate) roster: &'a Roster,
    pub(crate) endpoint: &'a Listener,
    pub(crate) secret: &'a SharedKey,
    pub(crate) options: &'a ClusterOptions,
    pub(crate) by_mpi: &'a ByMpi,
    pub(crate) deadline: Instant,
    /// Between GPUs, by the devices where bytes are made and land: what these take.
    pub(crate) pipes: Pipes,
}

impl Connector<'_> {
    fn member(&self, process: u32) -> &Member {
        &self.roster.members[process as usize]
    }

    /// True when two processes share memory.
    pub(crate) fn shares_memory(&self, a: u32, b: u32) -> bool {
        let wanted = matches!(self.options.transport, Transport::Auto | Transport::SharedMemory);
        wanted && self.device == DeviceKind::Cpu && self.member(a).is_near(self.member(b))
    }

    /// The connection to a peer for a purpose: of two processes the one of the higher number dials.
    pub(crate) fn link(&self, peer: u32, purpose: Purpose) -> Result<Connection, ClusterError> {
        if self.process_map.process < peer {
            let purpose = match purpose {
                Purpose::Group { group, member, peer } => Purpose::Group { group, member: peer, peer: member },
                same => same,
            };
            return Ok(self.endpoint.wait(peer, purpose, self.deadline)?);
        }
        let (session, epoch) = (self.roster.session, self.roster.epoch);
        let hello = Hello { session, epoch, from: self.process_map.process, to: peer, purpose };
        Ok(self.endpoint.dial(&self.address(peer)?, self.secret, &hello, self.deadline)?)
    }

    fn address(&self, peer: u32) -> Result<Address, ClusterError> {
        let member = self.member(peer);
        let by_tcp = self.options.transport == Transport::Tcp;
        let chosen =
            if self.member(self.process_map.process).is_near(member) && !by_tcp { member.unix() } else { member.tcp() };
        let host = &member.host;
        let none =
            format!("rank {peer} on {host} listens on no address that can be reached from here; set {INTERFACE} there");
        let address = chosen.cloned().ok_or(ClusterError::Refused(none))?;
        let socket = |address: &Address| if let Address::Tcp(text) = address { text.parse().ok() } else { None };
        let (peer, own) = (socket(&address), self.endpoint.addresses().iter().find_map(socket));
        Ok(peer.zip(own).map_or(address, |(peer, own)| Address::Tcp(with_zone_of(peer, own).to_string())))
    }

    /// Makes all ways of a session whose devices have these arenas.
    pub(crate) fn make(
        &self,
        plan: &Plan,
        devices: &[Device],
        arenas: &BTreeMap<usize, Arena>,
        in_process: Arc<dyn Collective>,
    ) -> Result<Connections, ClusterError> {
        let own = self.process_map.process;
        let near: BTreeSet<u32> =
            (0..self.process_map.processes).filter(|p| *p == own || self.shares_memory(own, *p)).collect();
        let wants_mpi = self.options.collectives == Collectives::Mpi;
        let takes_mpi = |group: &Arc<Group>| wants_mpi && ByMpi::takes(&self.process_map, group);
        let mut crossing = self.process_map.crossing_groups(plan);
        crossing.retain(|_| self.device == DeviceKind::Cpu);
        let (by_mpi, own): (Vec<_>, Vec<_>) = crossing.into_iter().partition(takes_mpi);
        let on_node = |group: &Arc<Group>| self.process_map.processes_of(group).is_subset(&near);
        let (on_board, mut on_wire): (Vec<_>, Vec<_>) = own.into_iter().partition(on_node);
        on_wire.retain(|group| self.process_map.processes_of(group).contains(&self.process_map.process));
        let (mapped, board) = self.share(on_board, plan, arenas, &near)?;
        let mut engines: BTreeMap<u32, Arc<dyn Collective>> = BTreeMap::new();
        if let Some((board, groups)) = board {
            let all = arenas.iter().chain(&mapped).map(|(device, arena)| (*device, arena.clone())).collect();
            let engine: Arc<dyn Collective> = Arc::new(SharedMemory::new(board, &groups, all)?);
            groups.iter().for_each(|group| drop(engines.insert(group.id, engine.clone())));
        }
        if !on_wire.is_empty() {
            let engine: Arc<dyn Collective> = Arc::new(Wire::new(self.channels(&on_wire)?, transport::SEND_TIMEOUT));
            on_wire.iter().for_each(|group| drop(engines.insert(group.id, engine.clone())));
        }
        let (mirrors, peers) = self.peers(plan, devices)?;
        if !by_mpi.is_empty() {
            let within = self.deadline.saturating_duration_since(Instant::now());
            let engine = self.by_mpi.engine(&self.process_map, &by_mpi, within)?;
            by_mpi.iter().for_each(|group| drop(engines.insert(group.id, engine.clone())));
        }
        let engine: Arc<dyn Collective> =
            if engines.is_empty() { in_process } else { Arc::new(Routed::new(engines, in_process)) };
        Ok(Connections { engine, mapped, mirrors, peers })
    }
}

/// Refuses a transport that needs sockets between processes of one machine that cannot open each other's, as in containers with
/// a `/tmp` each. Where TCP may be used instead, returns the line that the first of them logs.
///
/// # Errors
/// [`ClusterError::Refused`], the same for all processes.
pub(super) fn check_near(roster: &Roster, own: u32, transport: Transport) -> Result<Option<String>, ClusterError> {
    let pairs =
        roster.members.iter().enumerate().flat_map(|(i, a)| roster.members[i + 1..].iter().map(move |b| (a, b)));
    let apart = pairs.into_iter().find(|(a, b)| a.node == b.node && !a.is_near(b));
    let Some((a, b)) = apart.filter(|_| transport != Transport::Tcp) else { return Ok(None) };
    let why = match [a, b].into_iter().find(|member| member.unix().is_none()) {
        Some(member) => format!("rank {} could make no Unix socket in its TMPDIR", member.process),
        None => "they do not see the same folder at TMPDIR, as in containers with a /tmp each".into(),
    };
    let apart = format!("ranks {} and {} on {}: {why}", a.process, b.process, a.host);
    if transport != Transport::Auto {
        let why = format!(
            "{apart}; {TRANSPORT}=shared-memory and unix need that: set it to auto, or give these ranks one folder"
        );
        return Err(ClusterError::Refused(why));
    }
    Ok((own == a.process).then(|| format!("{apart}; TCP is used between such ranks")))
}

/// Memory of peers of this node, by device; and the board of groups that meet on this node, with the groups.
type Shared = (BTreeMap<usize, Arena>, Option<(Arena, Vec<Arc<Group>>)>);

impl Connector<'_> {
    /// Maps the arenas of the peers of this node, and gives them this process's.
    fn share(
        &self,
        groups: Vec<Arc<Group>>,
        plan: &Plan,
        arenas: &BTreeMap<usize, Arena>,
        near: &BTreeSet<u32>,
    ) -> Result<Shared, ClusterError> {
        let own = self.process_map.process;
        let first = near.first().copied().unwrap_or(own);
        let bytes = Board::bytes(&groups);
        let mut board = if first == own && near.len() > 1 { Some(Board::create(&groups)?) } else { None };
        let mut mapped = BTreeMap::new();
        for peer in near.iter().copied().filter(|peer| *peer != own) {
            let link = self.link(peer, Purpose::Memory)?;
            let given: Vec<BorrowedFd<'_>> = arenas.values().chain(&board).filter_map(Arena::descriptor).collect();
            let given = if own == first { &given[..] } else { &given[..arenas.len()] };
            transport::send_descriptors(&link, given)?;
            let theirs = self.process_map.devices_of(peer);
            let count = theirs.len() + usize::from(peer == first);
            let mut taken = self.receive_descriptors(&link, count)?.into_iter();
            for (device, descriptor) in theirs.zip(taken.by_ref()) {
                let arena = Arena::map_peer(descriptor, plan.memory[device].arena_bytes, Access::Read)?;
                mapped.insert(device, arena);
            }
            if let Some(descriptor) = taken.next() {
                board = Some(Arena::map_peer(descriptor, bytes, Access::ReadWrite)?);
            }
        }
        Ok((mapped, board.map(|board| (board, groups))))
    }

    /// Waits for a peer's descriptors, until the deadline or the session's end.
    fn receive_descriptors(&self, link: &Connection, count: usize) -> Result<Vec<OwnedFd>, ClusterError> {
        let limited = link.set_read_timeout(Some(LOOK));
        limited.map_err(|cause| ClusterError::System { what: "limit the time of a connection", cause })?;
        loop {
            match transport::receive_descriptors(link, count) {
                Err(TransportError::Io { cause, .. })
                    if cause.kind() == ErrorKind::WouldBlock && Instant::now() < self.deadline =>
                {
                    if self.endpoint.is_closed() {
                        return Err(TransportError::Closed.into());
                    }
                }
                received => return Ok(received?),
            }
        }
    }

    /// Channels of this process's members to the members that they talk to.
    fn channels(&self, groups: &[Arc<Group>]) -> Result<BTreeMap<(u32, usize, usize), Channel>, ClusterError> {
        let own = self.process_map.own();
        let mut channels = BTreeMap::new();
        for group in groups {
            for member in (0..group.ranks.len()).filter(|m| own.contains(&group.ranks[*m])) {
                for peer in wire::peers(group, member) {
                    let at = |from: usize, to: usize| (group.id, from, to);
                    if !own.contains(&group.ranks[peer]) {
                        let (member_id, peer_id) = (member as u32, peer as u32);
                        let purpose = Purpose::Group { group: group.id, member: member_id, peer: peer_id };
                        let link = self.link(self.process_map.process_of(group.ranks[peer]), purpose)?;
                        channels.insert(at(member, peer), channel(link));
                    } else if member < peer {
                        let pair = UnixStream::pair()
                            .map_err(|cause| ClusterError::System { what: "make a pair of sockets", cause })?;
                        channels.insert(at(member, peer), Channel::Unix(pair.0));
                        channels.insert(at(peer, member), Channel::Unix(pair.1));
                    }
                }
            }
        }
        Ok(channels)
    }

    /// A connection to each peer for the registers, and a mirror of each register whose bytes come by it.
    fn peers(&self, plan: &Plan, devices: &[Device]) -> Result<(Mirrors, Vec<PeerSpec>), ClusterError> {
        let own = self.process_map.process;
        let (mut memory, mut peers) = (Mirrors::new(), Vec::new());
        let pairs = if self.pipes.is_empty() { BTreeMap::new() } else { self.process_map.crossing_pairs(plan) };
        for process in self.process_map.peers() {
            let (mut pushes, mut mirrors) = (BTreeMap::new(), BTreeMap::new());
            if !self.shares_memory(own, process) {
                pushes = self.process_map.crossing(plan, own, process);
                mirrors = self.process_map.crossing(plan, process, own);
                for (register, device, bytes) in self.process_map.mirrors(plan, process) {
                    let base = Base { arena: devices[device - self.process_map.own().start].arena(bytes)?, offset: 0 };
                    let stride = plan.spec.registers[register.0 as usize].slot_bytes;
                    memory.insert(register, RegisterMemory { base, stride });
                }
            }
            let link = self.link(process, Purpose::Registers { index: 0 })?;
            let crossing: BTreeSet<RegisterId> = pushes.keys().chain(mirrors.keys()).copied().collect();
            let mut pipes = BTreeMap::new();
            for (ends, registers) in &pairs {
                let Some(pipe) = self.pipes.get(ends) else { continue };
                // A register may go to several processes; at its end here it has one pipe for each.
                let far = if self.process_map.process_of(ends.0) == own { ends.1 } else { ends.0 };
                let here =
                    registers.iter().filter(|r| self.process_map.process_of(far) == process && crossing.contains(r));
                here.for_each(|register| drop(pipes.insert(*register, pipe.clone())));
            }
            peers.push(PeerSpec {
                process,
                actors: self.process_map.actors_of(plan, process),
                connection: link,
                pushes,
                mirrors,
                pipes,
            });
        }
        Ok((memory, peers))
    }
}

type Mirrors = BTreeMap<RegisterId, RegisterMemory>;

fn channel(link: Connection) -> Channel {
    match link {
        Connection::Tcp(stream) => Channel::Tcp(stream),
        Connection::Unix(stream) => Channel::Unix(stream),
    }
}

#[cfg(test)]
mod tests {
    use shardflow_actors::transport::SessionId;

    use super::*;

    /// Processes on these nodes, with these folders for sockets; 0 is none that can be used.
    fn roster(places: &[(&str, u8)]) -> Roster {
        let member = |(process, (node, folder)): (u32, &(&str, u8))| {
            let mut addresses = vec![Address::Tcp(format!("10.0.0.1:{process}"))];
            addresses.extend((*folder > 0).then(|| Address::Unix(format!("/tmp/{process}.sock").into())));
            let (node, host, sockets, heartbeat) =
                (node.to_string(), "h".into(), [*folder; 32], ([10, 0, 0, 1], 9).into());
            Member { process, node, sockets, cores: vec![], host, pid: 1, restart: 0, addresses, heartbeat }
        };
        Roster { session: SessionId::default(), epoch: 0, members: (0..).zip(places).map(member).collect() }
    }

    #[test]
    fn processes_that_see_another_folder_are_not_near() {
        use Transport::{Auto, SharedMemory, Tcp, Unix};
        let check = |places: &[(&str, u8)], own, transport| {
            check_near(&roster(places), own, transport).map_err(|error| (error.to_string(), error.exit().code()))
        };
        let one_node = [("a", 1), ("a", 1), ("b", 2)];
        for transport in [Auto, SharedMemory, Unix, Tcp] {
            assert_eq!(check(&one_node, 0, transport), Ok(None), "{transport:?}");
        }
        let containers = [("b", 1), ("a", 1), ("a", 2)];
        let printed = check(&containers, 1, Auto).unwrap().unwrap();
        assert!(printed.starts_with("ranks 1 and 2 on h: they do not see the same folder at TMPDIR"), "{printed}");
        assert!(printed.ends_with("TCP is used between such ranks"), "{printed}");
        for silent in [0, 2] {
            assert_eq!(check(&containers, silent, Auto), Ok(None), "logged once");
        }
        assert_eq!(check(&containers, 1, Tcp), Ok(None));
        for (transport, own) in [SharedMemory, Unix].into_iter().flat_map(|t| (0..3).map(move |own| (t, own))) {
            let (message, code) = check(&containers, own, transport).unwrap_err();
            assert!(message.contains("ranks 1 and 2") && message.contains("set it to auto") && code == 78, "{message}");
        }
        let (message, _) = check(&[("a", 1), ("a", 0)], 0, Unix).unwrap_err();
        assert!(message.contains("rank 1 could make no Unix socket in its TMPDIR"), "{message}");
    }
}
