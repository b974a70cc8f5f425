//! Maps shared memory and dials connections for registers and collectives, in the same order on all processes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardflow_actors::remote::{ByteRun, PeerSpec};
use shardflow_actors::shell::RegisterMemory;
use shardflow_actors::spec::RegisterId;
use shardflow_job::env::{INTERFACE, TRANSPORT};
use shardflow_job::membership::ControlTree;
use shardflow_job::options::{ClusterOptions, Collectives, Transport};
use shardflow_job::rendezvous::{Apart, Member, Roster};
use shardflow_job::secret::Secret;
use shardflow_job::transport::{
    self, Address, Connection, Hello, Listener, Purpose, Socket, TransportError, with_zone_of,
};
use shardflow_kernels::collective::board::Board;
use shardflow_kernels::collective::routed::Routed;
use shardflow_kernels::collective::shared_memory::SharedMemory;
use shardflow_kernels::collective::wire::{Channel, ChannelKey, SealedStream, Wire};
use shardflow_kernels::collective::{Collective, Group};
use shardflow_kernels::cuda::nccl::Pipe;
use shardflow_kernels::device::{Device, DeviceKind};
use shardflow_kernels::memory::{Access, Arena, Base};

use super::by_mpi::ByMpi;
use super::error::ClusterError;
use crate::devices::Pipes;
use crate::plan::Plan;
use crate::plan::instance::Instance;
use crate::process_map::{ProcessMap, groups, links};

/// Interval at which a wait for a peer checks whether the session has ended.
const END_CHECK_INTERVAL: Duration = Duration::from_millis(100);

pub(crate) struct Connections {
    pub(crate) engine: Arc<dyn Collective>,
    /// Arenas of peers' devices that are mapped into this process, by device.
    pub(crate) mapped: BTreeMap<usize, Arena>,
    /// Local copies (mirrors) of the slots of peers' registers.
    pub(crate) mirrors: BTreeMap<RegisterId, RegisterMemory>,
    pub(crate) peers: Vec<PeerSpec>,
    /// For each rank: the peer to which this process sends messages for that rank.
    pub(crate) hops: Vec<u32>,
}

impl Connections {
    /// The connections of a job with a single process.
    pub(crate) fn alone(engine: Arc<dyn Collective>) -> Self {
        Self { engine, mapped: BTreeMap::new(), mirrors: Mirrors::new(), peers: Vec::new(), hops: Vec::new() }
    }
}

#[derive(Clone)]
pub(crate) struct Connector {
    /// CUDA devices never share memory between processes, and the GPU engine runs their collectives.
    pub(crate) device: DeviceKind,
    pub(crate) process_map: ProcessMap,
    /// Control connections follow this tree, as do the connections for tensors of host programs.
    pub(crate) tree: Arc<ControlTree>,
    pub(crate) roster: Arc<Roster>,
    pub(crate) listener: Arc<Listener>,
    pub(crate) secret: Secret,
    pub(crate) options: ClusterOptions,
    pub(crate) by_mpi: ByMpi,
    pub(crate) deadline: Instant,
    pub(crate) pipes: Pipes,
}

impl Connector {
    /// The roster's entry for a process of this node, or for another process to which this one connects.
    pub(super) fn member(&self, process: u32) -> Result<&Member, ClusterError> {
        self.roster.member(process).ok_or(ClusterError::NotListed { process })
    }

    /// True if the processes share memory. At least one of them must run on this node.
    pub(crate) fn shares_memory(&self, a: u32, b: u32) -> bool {
        let is_enabled = matches!(self.options.transport, Transport::Auto | Transport::SharedMemory);
        // The roster lists all processes of this node, so a process that it does not list is on another node.
        let both = self.roster.member(a).zip(self.roster.member(b));
        is_enabled && self.device == DeviceKind::Cpu && both.is_some_and(|(a, b)| a.is_near(b))
    }

    /// Opens the connection to a peer for a purpose. The process with the higher rank dials, and the other one accepts.
    pub(crate) fn connect(&self, peer: u32, purpose: Purpose) -> Result<Connection, ClusterError> {
        if self.process_map.process < peer {
            let purpose = match purpose {
                Purpose::Group { group, member, peer } => Purpose::Group { group, member: peer, peer: member },
                same => same,
            };
            return Ok(self.listener.wait(peer, purpose, self.deadline)?);
        }
        let (session, epoch) = (self.roster.session, self.roster.epoch);
        let address = self.address(peer)?;
        let sealed = matches!(address, Address::Tcp(_)) && (self.options.encrypt || purpose == Purpose::Control);
        let hello = Hello { session, epoch, from: self.process_map.process, to: peer, sealed, purpose };
        Ok(self.listener.dial(&address, &self.secret, &hello, self.deadline)?)
    }

    fn address(&self, peer: u32) -> Result<Address, ClusterError> {
        let (member, own) = (self.member(peer)?, self.member(self.process_map.process)?);
        let is_tcp = self.options.transport == Transport::Tcp;
        let chosen = if own.is_near(member) && !is_tcp { member.unix() } else { member.tcp() };
        let host = &member.host;
        let no_address =
            format!("rank {peer} on {host} listens on no address that this rank can reach; set {INTERFACE} on {host}");
        let address = chosen.cloned().ok_or(ClusterError::Refused(no_address))?;
        let socket = |address: &Address| if let Address::Tcp(text) = address { text.parse().ok() } else { None };
        let (peer, own) = (socket(&address), self.listener.addresses().iter().find_map(socket));
        Ok(peer.zip(own).map_or(address, |(peer, own)| Address::Tcp(with_zone_of(peer, own).to_string())))
    }

    pub(crate) fn connect_all(
        &self,
        plan: &Instance,
        devices: &[Device],
        arenas: &BTreeMap<usize, Arena>,
        in_process: Arc<dyn Collective>,
    ) -> Result<Connections, ClusterError> {
        let own = self.process_map.process;
        let near: BTreeSet<u32> =
            (0..self.process_map.processes).filter(|p| *p == own || self.shares_memory(own, *p)).collect();
        // All processes on this node lay out the same groups in their board. With MPI, all processes of the job create
        // all communicators in the same order.
        let members: Vec<usize> = match self.options.collectives {
            Collectives::Mpi => (0..plan.device_count()).collect(),
            Collectives::Own => near.iter().flat_map(|process| self.process_map.devices_of(*process)).collect(),
        };
        let crossing = crossing_groups(plan, members.into_iter(), &self.process_map, self.options.collectives);
        let (mpi_groups, own_groups) = crossing;
        let is_near = |group: &Arc<Group>| self.process_map.processes_of(group).is_subset(&near);
        let (board_groups, mut wire_groups): (Vec<_>, Vec<_>) = own_groups.into_iter().partition(is_near);
        wire_groups.retain(|group| self.process_map.processes_of(group).contains(&self.process_map.process));
        let (mapped, board) = self.share_memory(board_groups, plan, arenas, &near)?;
        let mut engines = BTreeMap::new();
        let mut add = |groups: Vec<Arc<Group>>, engine: Arc<dyn Collective>| {
            engines.extend(groups.into_iter().map(|group| (group.id, engine.clone())));
        };
        if let Some((board, groups)) = board {
            let all = arenas.iter().chain(&mapped).map(|(device, arena)| (*device, arena.clone())).collect();
            let engine = SharedMemory::new(board, &groups, all)?;
            add(groups, Arc::new(engine));
        }
        if !wire_groups.is_empty() {
            let wire = Wire::new(self.channels(plan, &wire_groups)?, transport::SEND_TIMEOUT);
            add(wire_groups, Arc::new(wire));
        }
        let (mirrors, peers) = self.peers(plan, devices)?;
        if !mpi_groups.is_empty() {
            let timeout = self.deadline.saturating_duration_since(Instant::now());
            let engine = self.by_mpi.engine(&self.process_map, &mpi_groups, timeout)?;
            add(mpi_groups, engine);
        }
        let engine: Arc<dyn Collective> =
            if engines.is_empty() { in_process } else { Arc::new(Routed::new(engines, in_process)) };
        let hop = |process| self.tree.next_hop(own, process).unwrap_or(own);
        let hops = (0..self.process_map.processes).map(hop).collect();
        Ok(Connections { engine, mapped, mirrors, peers, hops })
    }
}

/// Finds the groups of these devices that have members in several processes. Returns the groups that MPI runs, and
/// those that this crate's engines run.
fn crossing_groups(
    plan: &Plan,
    devices: impl Iterator<Item = usize>,
    process_map: &ProcessMap,
    collectives: Collectives,
) -> (Vec<Arc<Group>>, Vec<Arc<Group>>) {
    let hosts = |group: &Arc<Group>| process_map.processes_of(group).len();
    // MPI runs the groups whose members are all in different processes.
    let uses_mpi = |group: &Arc<Group>| collectives == Collectives::Mpi && hosts(group) == group.ranks.len();
    let mut crossing = groups(plan, devices);
    crossing.retain(|group| plan.device == DeviceKind::Cpu && hosts(group) > 1);
    crossing.into_iter().partition(uses_mpi)
}

/// The processes with which this one exchanges registers or collectives over connections.
pub(super) fn partners(plan: &Instance, process_map: &ProcessMap, collectives: Collectives) -> BTreeSet<u32> {
    let own = process_map.process;
    let crossings = process_map.crossings(plan).into_iter();
    let registers = crossings.flat_map(|crossing| [(crossing.from, crossing.to), (crossing.to, crossing.from)]);
    let mut partners: BTreeSet<u32> =
        registers.filter(|(process, _)| *process == own).map(|(_, other)| other).collect();
    let links = links(plan, process_map.own());
    for group in crossing_groups(plan, process_map.own(), process_map, collectives).1 {
        let peers = links.get(&group.id).into_iter().flatten();
        partners.extend(peers.map(|(_, peer)| process_map.process_of(group.ranks.rank(*peer))));
    }
    partners.remove(&own);
    partners
}

/// Refuses a transport that needs Unix sockets if processes of one node cannot open each other's sockets, as in
/// containers with separate `/tmp`. If TCP can replace the sockets, returns a log line about the lowest affected rank.
pub(super) fn check_near(roster: &Roster, own: u32, transport: Transport) -> Result<Option<String>, ClusterError> {
    let apart = roster.apart.as_ref().filter(|_| transport != Transport::Tcp);
    let Some(Apart { ranks: (a, b), host, without_socket }) = apart else { return Ok(None) };
    let reason = match without_socket {
        Some(rank) => format!("rank {rank} could not create a Unix socket in its TMPDIR"),
        None => "they do not see the same folder at TMPDIR, as in containers with separate /tmp".into(),
    };
    let apart = format!("ranks {a} and {b} on {host}: {reason}");
    if transport != Transport::Auto {
        let message = format!(
            "{apart}; {TRANSPORT}=shared-memory and {TRANSPORT}=unix need a common folder: share one, or set {TRANSPORT}=auto"
        );
        return Err(ClusterError::Refused(message));
    }
    Ok((own == *a).then(|| format!("{apart}; TCP is used between such ranks")))
}

/// Mapped memory of peers on this node, by device; and the board of the groups on this node, with the groups.
type Shared = (BTreeMap<usize, Arena>, Option<(Arena, Vec<Arc<Group>>)>);

impl Connector {
    /// Exchanges arena descriptors with the peers on this node and maps their arenas.
    fn share_memory(
        &self,
        groups: Vec<Arc<Group>>,
        plan: &Instance,
        arenas: &BTreeMap<usize, Arena>,
        near: &BTreeSet<u32>,
    ) -> Result<Shared, ClusterError> {
        let own = self.process_map.process;
        let first = near.first().copied().unwrap_or(own);
        let bytes = Board::bytes(&groups);
        let mut board = if first == own && near.len() > 1 { Some(Board::create(&groups)?) } else { None };
        let mut mapped = BTreeMap::new();
        for peer in near.iter().copied().filter(|peer| *peer != own) {
            let connection = self.connect(peer, Purpose::Memory)?;
            let sent: Vec<BorrowedFd<'_>> = arenas.values().chain(&board).filter_map(Arena::descriptor).collect();
            let sent = if own == first { &sent[..] } else { &sent[..arenas.len()] };
            transport::send_descriptors(&connection, sent)?;
            let peer_devices = self.process_map.devices_of(peer);
            let count = peer_devices.len() + usize::from(peer == first);
            let mut received = self.receive_descriptors(&connection, count)?.into_iter();
            for (device, descriptor) in peer_devices.zip(received.by_ref()) {
                let arena = Arena::map_peer(descriptor, plan.memory(device).arena_bytes, Access::Read)?;
                mapped.insert(device, arena);
            }
            if let Some(descriptor) = received.next() {
                board = Some(Arena::map_peer(descriptor, bytes, Access::ReadWrite)?);
            }
        }
        Ok((mapped, board.map(|board| (board, groups))))
    }

    /// Waits for a peer's descriptors, until the deadline or the session's end.
    fn receive_descriptors(&self, connection: &Connection, count: usize) -> Result<Vec<OwnedFd>, ClusterError> {
        let set = connection.set_read_timeout(Some(END_CHECK_INTERVAL));
        set.map_err(|cause| ClusterError::System { action: "set the read timeout of a connection", cause })?;
        loop {
            match transport::receive_descriptors(connection, count) {
                Err(TransportError::Io { cause, .. })
                    if cause.kind() == ErrorKind::WouldBlock && Instant::now() < self.deadline =>
                {
                    if self.listener.is_closed() {
                        return Err(TransportError::Closed.into());
                    }
                }
                received => return Ok(received?),
            }
        }
    }

    /// Opens a channel from each member in this process to each member with which it exchanges data. Dialling does not
    /// wait for the accepting process to call this function, and a process waits only for processes with higher ranks.
    /// So the processes cannot wait for each other in a cycle.
    fn channels(&self, plan: &Plan, groups: &[Arc<Group>]) -> Result<BTreeMap<ChannelKey, Channel>, ClusterError> {
        let own = self.process_map.own();
        let links = links(plan, own.clone());
        let mut channels = BTreeMap::new();
        for group in groups {
            for (member, peer) in links.get(&group.id).into_iter().flatten().copied() {
                let key = |from: usize, to: usize| (group.id, from, to);
                if !own.contains(&group.ranks.rank(peer)) {
                    let purpose = Purpose::Group { group: group.id, member: member as u32, peer: peer as u32 };
                    let connection = self.connect(self.process_map.process_of(group.ranks.rank(peer)), purpose)?;
                    channels.insert(key(member, peer), channel(connection));
                } else if member < peer {
                    let pair = UnixStream::pair()
                        .map_err(|cause| ClusterError::System { action: "create a socket pair", cause })?;
                    channels.insert(key(member, peer), Channel::Unix(pair.0));
                    channels.insert(key(peer, member), Channel::Unix(pair.1));
                }
            }
        }
        Ok(channels)
    }

    /// Opens a register connection to each process that exchanges registers with this one, and to the neighbours in the
    /// control tree. Allocates a mirror for each register that this process receives.
    fn peers(&self, plan: &Instance, devices: &[Device]) -> Result<(Mirrors, Vec<PeerSpec>), ClusterError> {
        let own = self.process_map.process;
        let mut memory = Mirrors::new();
        let mut peers: BTreeMap<u32, Exchanged> = BTreeMap::new();
        peers.extend(self.tree.neighbours(own).into_iter().map(|process| (process, Exchanged::default())));
        let crossings = self.process_map.crossings(plan).into_iter();
        for crossing in crossings.filter(|crossing| crossing.from == own || crossing.to == own) {
            let process = if crossing.from == own { crossing.to } else { crossing.from };
            let exchanged = peers.entry(process).or_default();
            if self.shares_memory(own, process) {
                continue;
            }
            let (register, runs) = (crossing.register, crossing.runs(plan));
            if let Some(pipe) = self.pipes.get(&(crossing.source, crossing.landing)).filter(|_| !runs.is_empty()) {
                exchanged.pipes.insert(register, pipe.clone());
            }
            if crossing.from == own {
                exchanged.pushes.insert(register, runs);
                continue;
            }
            exchanged.mirrors.insert(register, runs);
            let device = &devices[crossing.landing - self.process_map.own().start];
            let base = Base { arena: device.arena(crossing.mirror_bytes(plan))?, offset: 0 };
            memory.insert(register, RegisterMemory { base, stride: plan.spec.register(register).slot_bytes });
        }
        let mut specs = Vec::new();
        for (process, Exchanged { pushes, mirrors, pipes }) in peers {
            let connection = self.connect(process, Purpose::Registers { index: 0 })?;
            specs.push(PeerSpec { process, connection, pushes, mirrors, pipes });
        }
        Ok((memory, specs))
    }
}

/// The registers that this process exchanges with a peer without shared memory, see [`PeerSpec`].
#[derive(Default)]
struct Exchanged {
    pushes: BTreeMap<RegisterId, Vec<ByteRun>>,
    mirrors: BTreeMap<RegisterId, Vec<ByteRun>>,
    pipes: BTreeMap<RegisterId, Arc<Pipe>>,
}

type Mirrors = BTreeMap<RegisterId, RegisterMemory>;

fn channel(connection: Connection) -> Channel {
    match connection.into_socket() {
        Ok(Socket::Tcp(stream)) => Channel::Tcp(stream),
        Ok(Socket::Unix(stream)) => Channel::Unix(stream),
        Err(sealed) => Channel::Sealed(Box::new(SealedConnection(sealed))),
    }
}

/// Adapts an encrypted connection to the interface that collectives use.
#[derive(Debug)]
struct SealedConnection(Connection);

impl SealedStream for SealedConnection {
    fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn send(&self, first: &[u8], second: &[u8]) -> io::Result<usize> {
        self.0.write_both(first, second)
    }

    fn has_unsent(&self) -> bool {
        self.0.has_unsent()
    }

    fn flush(&self) -> io::Result<()> {
        (&self.0).flush()
    }

    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(into)
    }

    fn shutdown(&self, direction: Shutdown) {
        drop(self.0.shutdown(direction));
    }
}

#[cfg(test)]
mod tests {
    use shardflow_job::machine::MemoryClaim;
    use shardflow_job::transport::SessionId;

    use super::*;
    use crate::plan::Schedule;
    use crate::plan::tests::gpt;

    /// The partners of each process, with one process per device.
    fn partners_of_all(mesh: &str) -> Vec<BTreeSet<u32>> {
        let plan = Arc::new(gpt(mesh, 1, Schedule::OneFOneB));
        let devices = plan.device_count();
        let of = |process: u32| {
            let process_map = ProcessMap { process, processes: devices as u32, devices };
            partners(&plan.clone().instance_of(process_map.own()), &process_map, Collectives::Own)
        };
        (0..devices as u32).map(of).collect()
    }

    #[test]
    fn the_partners_of_a_process_grow_with_the_logarithm_of_the_data_axis() {
        let most = |mesh: &str| partners_of_all(mesh).iter().map(BTreeSet::len).max();
        assert_eq!(["data=8", "data=64"].map(most), [3, 6].map(Some));
    }

    #[test]
    fn partners_are_mutual() {
        for mesh in ["data=7", "data=5,tensor=2", "data=3,stage=2", "data=2,stage=2,tensor=2"] {
            let all = partners_of_all(mesh);
            for (process, partners) in (0..).zip(&all) {
                assert!(partners.iter().all(|other| all[*other as usize].contains(&process)), "{mesh}: {all:?}");
            }
        }
    }

    /// Processes on these nodes with these socket folders; 0 means that no folder can be used.
    fn roster(places: &[(&str, u8)]) -> Roster {
        let member = |(process, (node, folder)): (u32, &(&str, u8))| {
            let mut addresses = vec![Address::Tcp(format!("10.0.0.1:{process}"))];
            addresses.extend((*folder > 0).then(|| Address::Unix(format!("/tmp/{process}.sock").into())));
            let (node, host, sockets, heartbeat) =
                (node.to_string(), "h".into(), [*folder; 32], ([10, 0, 0, 1], 9).into());
            let memory = MemoryClaim::default();
            Member { process, node, sockets, cores: vec![], memory, host, pid: 1, restart: 0, addresses, heartbeat }
        };
        let members: Vec<Member> = (0..).zip(places).map(member).collect();
        Roster { session: SessionId::default(), epoch: 0, nodes: Vec::new(), apart: Apart::find(&members), members }
    }

    #[test]
    fn processes_with_different_socket_folders_are_not_near() {
        use Transport::{Auto, SharedMemory, Tcp, Unix};
        let check = |places: &[(&str, u8)], own, transport| {
            check_near(&roster(places), own, transport).map_err(|error| (error.to_string(), error.exit().code()))
        };
        let one_node = [("a", 1), ("a", 1), ("b", 2)];
        for transport in [Auto, SharedMemory, Unix, Tcp] {
            assert_eq!(check(&one_node, 0, transport), Ok(None), "{transport:?}");
        }
        let containers = [("b", 1), ("a", 1), ("a", 2)];
        let line = check(&containers, 1, Auto).unwrap().unwrap();
        assert!(line.starts_with("ranks 1 and 2 on h: they do not see the same folder at TMPDIR"), "{line}");
        assert!(line.ends_with("TCP is used between such ranks"), "{line}");
        for silent in [0, 2] {
            assert_eq!(check(&containers, silent, Auto), Ok(None), "only rank 1 logs it");
        }
        assert_eq!(check(&containers, 1, Tcp), Ok(None));
        for (transport, own) in [SharedMemory, Unix].into_iter().flat_map(|t| (0..3).map(move |own| (t, own))) {
            let (message, code) = check(&containers, own, transport).unwrap_err();
            assert!(
                message.contains("ranks 1 and 2") && message.contains("set SHARDFLOW_TRANSPORT=auto") && code == 78,
                "{message}"
            );
        }
        let (message, _) = check(&[("a", 1), ("a", 0)], 0, Unix).unwrap_err();
        assert!(message.contains("rank 1 could not create a Unix socket in its TMPDIR"), "{message}");
    }
}
