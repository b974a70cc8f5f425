//! Divides a graph into segments, the units of work. The nodes of a segment run as one action on each device.
//!
//! In program order, a node joins the newest segment of its placement, stream, rate and role. But if an input of the
//! node depends on that segment through another segment, the node opens a new segment: a further chunk of the
//! placement. So the graph of segments has no cycle, whatever the placements are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use shardflow_actors::label::{Label, Role};
use shardflow_actors::spec::StreamKind;

use crate::boxing::step::StepKind;
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
    /// The stream that runs the segment.
    pub stream: StreamKind,
    /// How often the segment runs.
    pub rate: Rate,
    /// Role, chunk and program.
    pub label: Label,
    /// The name in plans and errors, such as `forward`; unique on each device.
    pub name: String,
    /// What the host does, if this is a segment of the host.
    pub host: Option<HostTransfer>,
    /// The nodes, in program order.
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
    /// The segment with this id.
    pub fn get(&self, id: SegmentId) -> &Segment {
        &self.list[id.index()]
    }

    /// The inputs that the host feeds before a step's results arrive, in the order of the program.
    pub fn fed<'a>(&'a self, graph: &'a Graph) -> impl Iterator<Item = Var> {
        let feeds = self.list.iter().filter(|segment| segment.host == Some(HostTransfer::Feed));
        let nodes = feeds.flat_map(|segment| &segment.nodes).map(|node| &graph.nodes[node.index()]);
        nodes.filter(|node| matches!(node.op, NodeOp::Input)).map(|node| node.outputs[0])
    }

    /// All ids, in order.
    pub fn ids(&self) -> impl Iterator<Item = SegmentId> + use<> {
        (0..self.list.len() as u32).map(SegmentId)
    }
}

/// What the nodes of a segment have in common. Each transfer or bucket has its own segment, so its node is in the key.
type Key = (usize, StreamKind, Rate, Role, Option<NodeId>);

fn key(id: NodeId, node: &Node) -> Key {
    let (stream, own) = match &node.op {
        NodeOp::Boxing(step) if step.kind == StepKind::Transfer => (StreamKind::Copy, Some(id)),
        NodeOp::Input | NodeOp::Fetch => (StreamKind::Copy, None),
        NodeOp::Bucket { .. } => (StreamKind::Communication, Some(id)),
        _ => (StreamKind::Compute, None),
    };
    (node.placement, stream, node.rate, node.role, own)
}

/// Divides a graph on which all passes have run. `program` is a part of each segment's label.
pub fn divide(graph: &Graph, program: &Arc<str>) -> Segments {
    let mut builder = Builder { of_node: vec![None; graph.nodes.len()], ..Builder::default() };
    for (index, node) in graph.nodes.iter().enumerate() {
        let id = NodeId(index as u32);
        if !node.op.is_resident() {
            builder.add(graph, id, node);
        }
    }
    for var in untrained_parameters(graph) {
        let update = (graph.placement_of(var), StreamKind::Compute, Rate::Step, Role::Update, None);
        if !builder.newest.contains_key(&update) {
            builder.open(update);
        }
    }
    let Builder { keys, nodes, of_node, reads, .. } = builder;
    let mut namer = Namer { graph, alike: HashMap::new() };
    let segments = keys.into_iter().zip(nodes).map(|(key, nodes)| namer.segment(key, nodes, program));
    Segments { list: segments.collect(), of_node, reads }
}

#[derive(Default)]
struct Builder {
    keys: Vec<Key>,
    nodes: Vec<Vec<NodeId>>,
    of_node: Vec<Option<SegmentId>>,
    reads: Vec<BTreeSet<SegmentId>>,
    readers: Vec<Vec<SegmentId>>,
    /// A segment's level is above the levels of all segments that it reads, so a search for a path can stop early.
    levels: Vec<u32>,
    newest: HashMap<Key, SegmentId>,
}

impl Builder {
    fn add(&mut self, graph: &Graph, id: NodeId, node: &Node) {
        let key = key(id, node);
        let producers = node.inputs.iter().filter_map(|input| self.of_node[graph.tensor(*input).producer.index()]);
        let sources: BTreeSet<SegmentId> = producers.collect();
        let joins = |segment: &SegmentId| {
            let new =
                sources.iter().filter(|source| *source != segment && !self.reads[segment.index()].contains(source));
            new.into_iter().all(|source| !self.depends(*source, *segment))
        };
        let segment = self.newest.get(&key).copied().filter(joins).unwrap_or_else(|| self.open(key));
        self.nodes[segment.index()].push(id);
        self.of_node[id.index()] = Some(segment);
        for source in sources.into_iter().filter(|source| *source != segment) {
            if self.reads[segment.index()].insert(source) {
                self.readers[source.index()].push(segment);
                self.raise(segment, self.levels[source.index()] + 1);
            }
        }
    }

    fn open(&mut self, key: Key) -> SegmentId {
        let id = SegmentId(self.keys.len() as u32);
        self.keys.push(key);
        self.nodes.push(Vec::new());
        self.reads.push(BTreeSet::new());
        self.readers.push(Vec::new());
        self.levels.push(0);
        self.newest.insert(key, id);
        id
    }

    /// True if `segment` reads from `on`, directly or indirectly.
    fn depends(&self, segment: SegmentId, on: SegmentId) -> bool {
        let (mut open, mut seen) = (vec![segment], BTreeSet::new());
        while let Some(at) = open.pop() {
            if at == on {
                return true;
            }
            if self.levels[at.index()] > self.levels[on.index()] && seen.insert(at) {
                open.extend(&self.reads[at.index()]);
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

/// Parameters that other placements read and nothing updates. Their register needs a producer, which is the update
/// segment of their placement. If the placement has none, [`divide`] adds an empty one.
fn untrained_parameters(graph: &Graph) -> BTreeSet<Var> {
    let updated: BTreeSet<Var> = graph.nodes.iter().flat_map(|node| &node.updates).copied().collect();
    let is_transfer = |node: &&Node| matches!(&node.op, NodeOp::Boxing(step) if step.kind == StepKind::Transfer);
    let read = graph.nodes.iter().filter(is_transfer).map(|node| node.inputs[0]);
    read.filter(|var| graph.producer(*var).op.is_resident() && !updated.contains(var)).collect()
}

/// Gives segments their names and chunk numbers.
struct Namer<'a> {
    graph: &'a Graph,
    /// By role and name without the chunk: the placement and chunk of each segment so far.
    alike: HashMap<(Role, String), Vec<(usize, u16)>>,
}

impl Namer<'_> {
    fn segment(&mut self, key: Key, nodes: Vec<NodeId>, program: &Arc<str>) -> Segment {
        let (placement, stream, rate, role, own) = key;
        let graph = self.graph;
        let first = nodes.first().map(|id| &graph.nodes[id.index()]);
        let host = match first.map(|node| &node.op) {
            Some(NodeOp::Input) if role == Role::Update => Some(HostTransfer::Decide),
            Some(NodeOp::Input) => Some(HostTransfer::Feed),
            Some(NodeOp::Fetch) => Some(HostTransfer::Fetch),
            _ => None,
        };
        let (role, name) = match first.map(|node| (&node.op, node)) {
            _ if host == Some(HostTransfer::Decide) => (Role::Host, "decide".to_owned()),
            Some((NodeOp::Input, _)) => (Role::Host, format!("feed ({rate})")),
            Some((NodeOp::Fetch, _)) => (Role::Host, format!("fetch ({rate})")),
            Some((NodeOp::Bucket { .. }, node)) => (Role::Communication, format!("all-reduce {}", node.name)),
            Some((_, node)) if own.is_some() => {
                (Role::Communication, format!("pull {}", graph.tensor(node.inputs[0]).name))
            }
            _ => (role, role.to_string()),
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
        Segment { placement, stream, rate, label: Label { role, chunk, program: program.clone() }, name, host, nodes }
    }
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
