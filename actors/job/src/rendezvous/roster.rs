//! The members of a world, and the part of them that each process receives.
//!
//! A process receives the node of every rank, but only the members that it needs. So the bytes that process 0 sends do
//! not grow with the square of the world size.
//!
//! - **RO-1**: a roster lists process 0, the processes of the receiver's node, the receiver's neighbours in the control
//!   tree, and the ranks that the receiver wants. Process 0 and the receiver compute this list by [`Layout::listed`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::machine::MemoryClaim;
use crate::membership::ControlTree;
use crate::transport::{Address, SessionId, SettledWorld};

/// A process's rank, host and process id, for use in messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names explain the fields")]
pub struct ProcessLabel {
    pub process: u32,
    pub host: String,
    pub pid: u32,
}

impl fmt::Display for ProcessLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} (host {}, pid {})", self.process, self.host, self.pid)
    }
}

/// What one process of a world publishes to the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "`Identity` and `RendezvousConfig` explain the fields")]
pub struct Member {
    pub process: u32,
    pub node: String,
    pub sockets: [u8; 32],
    pub cores: Vec<u64>,
    pub memory: MemoryClaim,
    pub host: String,
    pub pid: u32,
    pub restart: u64,
    pub addresses: Vec<Address>,
    pub heartbeat: SocketAddr,
}

impl Member {
    /// The process's label for error messages.
    pub fn label(&self) -> ProcessLabel {
        ProcessLabel { process: self.process, host: self.host.clone(), pid: self.pid }
    }

    /// True if both processes run on one node and can open each other's Unix sockets.
    pub fn is_near(&self, other: &Self) -> bool {
        let can_open = self.sockets == other.sockets && self.unix().is_some() && other.unix().is_some();
        self.node == other.node && can_open
    }

    /// The address for dialling this process from another node.
    pub fn tcp(&self) -> Option<&Address> {
        self.addresses.iter().find(|a| matches!(a, Address::Tcp(_)))
    }

    /// The address for dialling this process from its own node.
    pub fn unix(&self) -> Option<&Address> {
        self.addresses.iter().find(|a| matches!(a, Address::Unix(_)))
    }
}

/// What a process knows of its world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roster {
    /// Random id of the session, the same for all members.
    pub session: SessionId,
    /// The largest restart count of all members.
    pub epoch: u64,
    /// The nodes of all ranks, in order of rank.
    pub nodes: Vec<NodeRun>,
    /// The members that this process needs (RO-1), sorted by rank.
    pub members: Vec<Member>,
    /// Two processes of one node that cannot open each other's Unix sockets, if any; the same pair for all members.
    pub apart: Option<Apart>,
}

/// Consecutive ranks on `nodes` consecutive nodes from number `first`, with `ranks` ranks on each of these nodes. Nodes
/// are numbered in the order of their lowest ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the comment explains the fields")]
pub struct NodeRun {
    pub first: u32,
    pub nodes: u32,
    pub ranks: u32,
}

impl NodeRun {
    /// Encodes the number of each rank's node.
    fn encode(nodes: &[u32]) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        for same in nodes.chunk_by(|a, b| a == b) {
            let (node, ranks) = (same[0], same.len() as u32);
            match runs.last_mut() {
                Some(last) if last.ranks == ranks && last.first + last.nodes == node => last.nodes += 1,
                _ => runs.push(Self { first: node, nodes: 1, ranks }),
            }
        }
        runs
    }

    fn numbers(self) -> impl Iterator<Item = u32> {
        let all = self.first..self.first.saturating_add(self.nodes);
        all.flat_map(move |node| std::iter::repeat_n(node, self.ranks as usize))
    }
}

impl Roster {
    /// The values that the listener needs.
    pub fn world(&self) -> SettledWorld {
        let ranks = self.nodes.iter().map(|run| run.nodes.saturating_mul(run.ranks));
        let processes = ranks.fold(0, u32::saturating_add);
        SettledWorld { session: self.session, epoch: self.epoch, processes }
    }

    /// The number of each rank's node.
    pub fn nodes(&self) -> Vec<u32> {
        self.nodes.iter().copied().flat_map(NodeRun::numbers).collect()
    }

    /// The member with this rank, if the roster lists it.
    pub fn member(&self, process: u32) -> Option<&Member> {
        let index = self.members.binary_search_by_key(&process, |member| member.process).ok()?;
        Some(&self.members[index])
    }

    /// The listed members on the node of `process`. The roster of `process` itself lists all members of that node.
    pub fn on_node_of(&self, process: u32) -> impl Iterator<Item = &Member> {
        let node = self.member(process).map(|member| &member.node);
        self.members.iter().filter(move |member| Some(&member.node) == node)
    }

    /// True if this is a roster of a world of `processes` for `own`, which wants these ranks.
    pub(super) fn is_for(&self, own: &Member, processes: u32, wanted: &[Range<u32>]) -> bool {
        let is_valid =
            |run: &NodeRun| run.ranks > 0 && run.nodes > 0 && run.nodes.saturating_add(run.first) <= processes;
        // First checks the numbers, because they bound the time and memory of the later checks.
        if self.world().processes != processes || own.process >= processes || !self.nodes.iter().all(is_valid) {
            return false;
        }
        let layout = Layout::new(self.nodes());
        let node = |process: u32| layout.nodes.get(process as usize);
        let is_named = |member: &Member| (member.node == own.node) == (node(member.process) == node(own.process));
        let is_complete = || {
            let listed = layout.listed(own.process, wanted);
            self.members.iter().map(|member| member.process).eq(listed) && self.members.iter().all(is_named)
        };
        is_complete() && self.member(own.process) == Some(own)
    }
}

/// Two processes of one node that cannot open each other's Unix sockets, as in containers with separate `/tmp`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names explain the fields")]
pub struct Apart {
    pub ranks: (u32, u32),
    pub host: String,
    /// The process that has no Unix socket; `None` if both have one.
    pub without_socket: Option<u32>,
}

impl Apart {
    /// Searches the members of each node for such a pair. Of several pairs, returns the one with the lowest rank.
    pub fn find(members: &[Member]) -> Option<Self> {
        // If all processes are near the first process of their node, they are near each other.
        let mut first_of: BTreeMap<&str, &Member> = BTreeMap::new();
        let mut apart: Option<[&Member; 2]> = None;
        for member in members {
            let first = *first_of.entry(&member.node).or_insert(member);
            if first.process != member.process
                && !first.is_near(member)
                && apart.is_none_or(|[a, _]| first.process < a.process)
            {
                apart = Some([first, member]);
            }
        }
        let [a, b] = apart?;
        let without_socket = [a, b].into_iter().find(|member| member.unix().is_none()).map(|member| member.process);
        Some(Self { ranks: (a.process, b.process), host: a.host.clone(), without_socket })
    }
}

/// The nodes of a world.
struct Layout {
    /// By rank: the number of its node.
    nodes: Vec<u32>,
    /// By node: its ranks.
    ranks: BTreeMap<u32, Vec<u32>>,
    tree: ControlTree,
}

impl Layout {
    fn new(nodes: Vec<u32>) -> Self {
        let mut ranks: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        (0..).zip(&nodes).for_each(|(rank, node)| ranks.entry(*node).or_default().push(rank));
        Self { tree: ControlTree::new(&nodes), nodes, ranks }
    }

    /// RO-1: the ranks that the roster of a process lists.
    fn listed(&self, process: u32, wanted: &[Range<u32>]) -> BTreeSet<u32> {
        let processes = self.nodes.len() as u32;
        let here = &self.ranks[&self.nodes[process as usize]];
        let wanted = wanted.iter().flat_map(|ranks| ranks.start..ranks.end.min(processes));
        here.iter().copied().chain(self.tree.neighbours(process)).chain(wanted).chain([0]).collect()
    }
}

/// All members of a world. Process 0 makes every roster from it.
pub(super) struct Directory {
    session: SessionId,
    epoch: u64,
    members: Vec<Member>,
    layout: Layout,
    runs: Vec<NodeRun>,
    apart: Option<Apart>,
}

impl Directory {
    /// `members` contains all members, sorted by rank.
    pub(super) fn new(session: SessionId, members: Vec<Member>) -> Self {
        let mut numbers: BTreeMap<&str, u32> = BTreeMap::new();
        let mut number = |member| {
            let next = numbers.len() as u32;
            *numbers.entry(member).or_insert(next)
        };
        let nodes: Vec<u32> = members.iter().map(|member| number(&member.node)).collect();
        let epoch = members.iter().map(|member| member.restart).max().unwrap_or(0);
        let (runs, apart) = (NodeRun::encode(&nodes), Apart::find(&members));
        Self { session, epoch, members, layout: Layout::new(nodes), runs, apart }
    }

    /// The roster for a process that wants these ranks.
    pub(super) fn roster(&self, process: u32, wanted: &[Range<u32>]) -> Roster {
        let listed = self.layout.listed(process, wanted);
        Roster {
            session: self.session,
            epoch: self.epoch,
            nodes: self.runs.clone(),
            members: listed.into_iter().map(|rank| self.members[rank as usize].clone()).collect(),
            apart: self.apart.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::super::messages::Answer;
    use super::*;
    use crate::transport::wire;

    const PER_NODE: u32 = 8;

    fn member(process: u32, node: u32) -> Member {
        let (boot, host) = ("3f0c1d52-6a0e-4c53-9a57-0c1f5ad0b0c2", format!("node{node:04}"));
        let addresses = vec![
            Address::Tcp(format!("10.0.{}.{}:40000", node / 256, node % 256)),
            Address::Unix(format!("/tmp/shardflow-{process:08}/socket").into()),
        ];
        let (node, heartbeat) = (format!("{boot} {host}"), (Ipv4Addr::LOCALHOST, 40001).into());
        let memory = MemoryClaim { cgroups: vec![(30, 123_456)], extra_bytes: 1 << 30 };
        let (sockets, cores, pid) = ([7; 32], vec![u64::MAX; 2], 1_000_000 + process);
        Member { process, node, sockets, cores, memory, host, pid, restart: 0, addresses, heartbeat }
    }

    fn directory(nodes: &[u32]) -> Directory {
        let members = (0..).zip(nodes).map(|(process, node)| member(process, *node)).collect();
        Directory::new(SessionId([5; 16]), members)
    }

    /// Five ranks of other nodes.
    fn wanted(process: u32, processes: u32) -> Vec<Range<u32>> {
        let distances = [9, 18, processes - 9, processes - 18, processes / 2 + 1];
        distances.map(|distance| (process + distance) % processes).map(|rank| rank..rank + 1).to_vec()
    }

    /// Bytes of all answers with rosters, divided by the number of ranks.
    fn bytes_of_a_rank(nodes: &[u32]) -> usize {
        let (directory, processes) = (directory(nodes), nodes.len() as u32);
        let roster = |process| directory.roster(process, &wanted(process, processes));
        let bytes = |process| wire::encode(&Answer::Roster(roster(process))).unwrap().len();
        (0..processes).map(bytes).sum::<usize>() / nodes.len()
    }

    #[test]
    fn the_bytes_of_all_rosters_grow_linearly_with_the_world() {
        let measure = |name: &str, node: &dyn Fn(u32, u32) -> u32| {
            let bytes = [64, 512, 4096].map(|processes| {
                let nodes: Vec<u32> = (0..processes).map(|process| node(process, processes)).collect();
                bytes_of_a_rank(&nodes)
            });
            println!("{name}: {bytes:?} bytes per roster in worlds of 64, 512 and 4096 ranks");
            bytes
        };
        let block = measure("ranks in order of nodes", &|process, _| process / PER_NODE);
        let cyclic = measure("ranks dealt over nodes", &|process, processes| process % (processes / PER_NODE));
        for [small, middle, large] in [block, cyclic] {
            assert!(middle * 10 < small * 12 && large * 10 < small * 12, "{small} {middle} {large}");
        }
        // If ranks are placed on nodes in an arbitrary order, the list of nodes takes a few bytes per rank.
        let [small, _, large] = measure("ranks in no order", &|process, processes| {
            (process.wrapping_mul(2_654_435_761) >> 16) % (processes / PER_NODE)
        });
        assert!(large < small * 12 / 10 + 6 * 4096, "{small} {large}");
    }

    #[test]
    fn a_roster_lists_the_node_the_neighbours_and_the_wanted_ranks() {
        // Four nodes with two ranks each. The leaders are ranks 0, 2, 4 and 6.
        let directory = directory(&[0, 0, 1, 1, 2, 2, 3, 3]);
        let listed = |process, wanted: &[Range<u32>]| {
            let roster = directory.roster(process, wanted);
            assert!(roster.is_for(&directory.members[process as usize], 8, wanted), "{process}");
            assert_eq!(roster.nodes, [NodeRun { first: 0, nodes: 4, ranks: 2 }]);
            assert_eq!(roster.on_node_of(process).count(), 2);
            assert_eq!(roster.member(process), Some(&directory.members[process as usize]));
            roster.members.iter().map(|member| member.process).collect::<Vec<_>>()
        };
        assert_eq!(listed(0, &[]), [0, 1, 2, 4, 6]);
        assert_eq!(listed(4, &[]), [0, 4, 5]);
        assert_eq!(listed(5, &[]), [0, 4, 5]);
        assert_eq!(listed(5, &[2..4, 7..4000]), [0, 2, 3, 4, 5, 7]);
    }

    #[test]
    fn a_roster_for_another_world_or_process_is_rejected() {
        let (own, wanted) = (member(3, 1), [0..1, 5..6]);
        let roster = directory(&[0, 0, 1, 1, 2, 2]).roster(3, &wanted);
        assert!(roster.is_for(&own, 6, &wanted));
        assert!(!roster.is_for(&own, 7, &wanted) && !roster.is_for(&own, 6, &[0..1, 4..5]));
        assert!(!roster.is_for(&member(4, 2), 6, &wanted));
        assert!(!roster.is_for(&Member { pid: 1, ..own.clone() }, 6, &wanted));
        type Change = fn(&mut Roster);
        let changes: [Change; 8] = [
            |roster| roster.members.swap(0, 1),
            |roster| drop(roster.members.pop()),
            |roster| roster.members[0].node = roster.members[1].node.clone(),
            |roster| roster.members[1].node = "elsewhere".into(),
            |roster| roster.nodes.push(NodeRun { first: 0, nodes: u32::MAX, ranks: 0 }),
            |roster| roster.nodes[0].ranks = u32::MAX,
            |roster| roster.nodes[0].first = u32::MAX - 1,
            |roster| roster.nodes[0] = NodeRun { first: 0, nodes: 2, ranks: 3 },
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let mut changed = roster.clone();
            change(&mut changed);
            assert!(!changed.is_for(&own, 6, &wanted), "change {index}");
        }
    }

    proptest! {
        #[test]
        fn nodes_are_the_same_after_encoding(numbers in prop::collection::vec(0u32..9, 1..60)) {
            let nodes = directory(&numbers).roster(0, &[]).nodes();
            prop_assert_eq!(nodes.len(), numbers.len());
            for (a, b) in (0..nodes.len()).flat_map(|a| (0..a).map(move |b| (a, b))) {
                prop_assert_eq!(nodes[a] == nodes[b], numbers[a] == numbers[b]);
            }
        }
    }
}
