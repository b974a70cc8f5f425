//! Divides a graph into segments, the units of work. The nodes of a segment run as one action on each device.
//!
//! In program order, a node joins the newest segment of its placement, stream, rate and role. But if an input of the
//! node depends on that segment through another segment, the node opens a new segment: a further chunk of the
//! placement. So the graph of segments has no cycle, whatever the placements are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use shardflow_actors::label::{Label, Role};
use shardflow_actors::spec::StreamKind;

use crate::graph::{Graph, Node, NodeId, NodeOp, Rate, Var};

/// Index of a segment in [`Segments::list`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentId(pub u32);

impl SegmentId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What the host does in an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostTransfer {
    /// The host feeds inputs.
    Feed,
    /// The host reads a step's results, then feeds the values that the update needs, such as the learning rate.
    Decide,
    /// The host fetches outputs.
    Fetch,
}

/// Nodes that run as one action of each device of a placement.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Index into [`Graph::placements`].
    pub placement: usize,
    pub stream: StreamKind,
    pub rate: Rate,
    /// Role, chunk and program.
    pub label: Label,
    /// The name in plans and errors, such as `forward`; unique on each device.
    pub name: String,
    /// What the host does, if this is a segment of the host.
    pub host: Option<HostTransfer>,
    pub nodes: Vec<NodeId>,
}

/// The segments of a graph and their dependencies within an iteration or a step.
#[derive(Clone, Debug, Default)]
pub struct Segments {
    /// The segments, by [`SegmentId`].
    pub list: Vec<Segment>,
    /// For each node: the segment that runs it; `None` for resident tensors.
    pub of_node: Vec<Option<SegmentId>>,
    /// For each segment: the segments whose tensors it reads.
    pub reads: Vec<BTreeSet<SegmentId>>,
}

impl Segments {
    pub fn get(&self, id: SegmentId) -> &Segment {
        &self.list[id.index()]
    }

    /// The inputs that the host feeds before a step's results arrive, in the order of the program.
    pub fn fed<'a>(&'a self, graph: &'a Graph) -> impl Iterator<Item = Var> {
        let nodes = self.of_host(HostTransfer::Feed).flat_map(|id| &self.get(id).nodes);
        let nodes = nodes.map(|node| &graph.nodes[node.index()]);
        nodes.filter(|node| matches!(node.op, NodeOp::Input)).map(|node| node.outputs[0])
    }

    /// The segments in which the host does this, in order.
    pub fn of_host(&self, transfer: HostTransfer) -> impl Iterator<Item = SegmentId> {
        self.ids().filter(move |id| self.get(*id).host == Some(transfer))
    }

    pub fn ids(&self) -> impl Iterator<Item = SegmentId> + use<> {
        (0..self.list.len() as u32).map(SegmentId)
    }
}

/// What the nodes of a segment have in common. Each transfer or bucket has its own segment, so its node is in the key.
type Key = (usize, StreamKind, Rate, Role, Option<NodeId>);

fn key(id: NodeId, node: &Node) -> Key {
    let (stream, own) = match &node.op {
        op if op.is_transfer() => (StreamKind::Copy, Some(id)),
        NodeOp::Input | NodeOp::Fetch => (StreamKind::Copy, None),
        NodeOp::Bucket { .. } => (StreamKind::Communication, Some(id)),
        _ => (StreamKind::Compute, None),
    };
    (node.placement, stream, node.rate, node.role, own)
}

/// Divides a graph on which all passes have run. `program` is a part of each segment's label.
pub fn divide(graph: &Graph, program: &Arc<str>) -> Segments {
    let out = Segments { of_node: vec![None; graph.nodes.len()], ..Segments::default() };
    let (readers, levels, newest, alike) = Default::default();
    let mut builder = Builder { graph, program, out, readers, levels, newest, alike };
    for (index, node) in graph.nodes.iter().enumerate().filter(|(_, node)| !node.op.is_resident()) {
        builder.add(NodeId(index as u32), node);
    }
    for var in untrained_parameters(graph) {
        let update = (graph.placement_of(var), StreamKind::Compute, Rate::Step, Role::Update, None);
        if !builder.newest.contains_key(&update) {
            builder.open(update, None);
        }
    }
    builder.out
}

struct Builder<'a> {
    graph: &'a Graph,
    program: &'a Arc<str>,
    out: Segments,
    readers: Vec<Vec<SegmentId>>,
    /// A segment's level is above the levels of all segments that it reads, so a search for a path can stop early.
    levels: Vec<u32>,
    newest: HashMap<Key, SegmentId>,
    /// For each role and name without chunk number: the placement and chunk of each segment so far.
    alike: HashMap<(Role, String), Vec<(usize, u16)>>,
}

impl Builder<'_> {
    fn add(&mut self, id: NodeId, node: &Node) {
        let key = key(id, node);
        let producer = |input: &Var| self.out.of_node[self.graph.tensor(*input).producer.index()];
        let sources: BTreeSet<SegmentId> = node.inputs.iter().filter_map(producer).collect();
        let joins = |segment: &SegmentId| {
            let known = &self.out.reads[segment.index()];
            let mut new = sources.iter().filter(|source| *source != segment && !known.contains(source));
            new.all(|source| !self.depends(*source, *segment))
        };
        let segment = self.newest.get(&key).copied().filter(joins).unwrap_or_else(|| self.open(key, Some(node)));
        self.out.list[segment.index()].nodes.push(id);
        self.out.of_node[id.index()] = Some(segment);
        for source in sources.into_iter().filter(|source| *source != segment) {
            if self.out.reads[segment.index()].insert(source) {
                self.readers[source.index()].push(segment);
                self.raise(segment, self.levels[source.index()] + 1);
            }
        }
    }

    /// Opens a segment. `first` is its first node.
    fn open(&mut self, key: Key, first: Option<&Node>) -> SegmentId {
        let id = SegmentId(self.out.list.len() as u32);
        let segment = self.segment(key, first);
        self.out.list.push(segment);
        self.out.reads.push(BTreeSet::new());
        self.readers.push(Vec::new());
        self.levels.push(0);
        self.newest.insert(key, id);
        id
    }

    /// The segment with its name and chunk number, without nodes.
    fn segment(&mut self, (placement, stream, rate, role, own): Key, first: Option<&Node>) -> Segment {
        let graph = self.graph;
        let (host, role, name) = match first.map(|node| (&node.op, node)) {
            Some((NodeOp::Input, _)) if role == Role::Update => {
                (Some(HostTransfer::Decide), Role::Host, "decide".to_owned())
            }
            Some((NodeOp::Input, _)) => (Some(HostTransfer::Feed), Role::Host, format!("feed ({rate})")),
            Some((NodeOp::Fetch, _)) => (Some(HostTransfer::Fetch), Role::Host, format!("fetch ({rate})")),
            Some((NodeOp::Bucket { .. }, node)) => (None, Role::Communication, format!("all-reduce {}", node.name)),
            Some((_, node)) if own.is_some() => {
                (None, Role::Communication, format!("pull {}", graph.tensor(node.inputs[0]).name))
            }
            _ => (None, role, role.to_string()),
        };
        let alike = self.alike.entry((role, name.clone())).or_default();
        let overlaps = |other: usize| {
            let is_in_other = |device: &usize| graph.placements[other].index_of(*device).is_some();
            other == placement || graph.placements[placement].devices().iter().any(is_in_other)
        };
        let last = alike.iter().filter(|(other, _)| overlaps(*other)).map(|(_, chunk)| *chunk).max();
        let chunk = last.map_or(0, |chunk| chunk + 1);
        alike.push((placement, chunk));
        let name = if chunk == 0 { name } else { format!("{name} {chunk}") };
        let label = Label { role, chunk, program: self.program.clone() };
        Segment { placement, stream, rate, label, name, host, nodes: Vec::new() }
    }

    /// True if `segment` reads from `on`, directly or indirectly.
    fn depends(&self, segment: SegmentId, on: SegmentId) -> bool {
        let (mut open, mut seen) = (vec![segment], BTreeSet::new());
        while let Some(at) = open.pop() {
            if at == on {
                return true;
            }
            if self.levels[at.index()] > self.levels[on.index()] && seen.insert(at) {
                open.extend(&self.out.reads[at.index()]);
            }
        }
        false
    }

    fn raise(&mut self, segment: SegmentId, level: u32) {
        let mut open = vec![(segment, level)];
        while let Some((at, level)) = open.pop() {
            if self.levels[at.index()] < level {
                self.levels[at.index()] = level;
                open.extend(self.readers[at.index()].iter().map(|reader| (*reader, level + 1)));
            }
        }
    }
}

/// Parameters that other placements read and nothing updates. The register of such a parameter needs a producer, so the
/// update segment of its placement is its producer. If the placement has none, [`divide`] adds an empty one.
fn untrained_parameters(graph: &Graph) -> BTreeSet<Var> {
    let updated: BTreeSet<Var> = graph.nodes.iter().flat_map(|node| &node.updates).copied().collect();
    let read = graph.nodes.iter().filter(|node| node.op.is_transfer()).map(|node| node.inputs[0]);
    read.filter(|var| graph.producer(*var).op.is_resident() && !updated.contains(var)).collect()
}

/// The segment that makes each tensor or, if the tensor is resident, updates it.
pub fn producers(graph: &Graph, segments: &Segments) -> BTreeMap<Var, SegmentId> {
    let mut producers = BTreeMap::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        if let Some(segment) = segments.of_node[index] {
            producers.extend(node.outputs.iter().chain(&node.updates).map(|var| (*var, segment)));
        }
    }
    for var in untrained_parameters(graph) {
        let placement = graph.placement_of(var);
        let is_update = |id: &SegmentId| {
            let Segment { stream, label, placement: at, .. } = segments.get(*id);
            (*stream, label.role, *at) == (StreamKind::Compute, Role::Update, placement)
        };
        producers.extend(segments.ids().find(is_update).map(|segment| (var, segment)));
    }
    producers
}
