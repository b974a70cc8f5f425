//! Groups of devices that call collectives together. A pattern is a placement with some of its axes: the devices that
//! differ only along these axes form a group. The id of a group follows from the pattern and a member by arithmetic.

use std::sync::Arc;

use shardflow_actors::spec::StreamKind;
use shardflow_kernels::collective::{Group, Ranks};

use crate::boxing::step::StepKind;
use crate::graph::{Graph, Node, NodeOp};

/// The groups along some axes of a placement, on one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// The stream that calls the collectives.
    pub stream: StreamKind,
    /// Index into [`Graph::placements`].
    pub placement: usize,
    pub axes: Vec<usize>,
    pub first_id: u32,
}

/// All patterns of a plan, in the order of the program.
#[derive(Clone, Debug, Default)]
pub struct Patterns(pub Vec<Pattern>);

/// The stream and the axes of a node's collective; `None` if the node does not call one.
pub fn collective_axes(graph: &Graph, node: &Node) -> Option<(StreamKind, Vec<usize>)> {
    let all = || (0..graph.placements[node.placement].axes().len()).collect();
    match &node.op {
        NodeOp::Boxing(step) if !matches!(step.kind, StepKind::Slice | StepKind::Pad(_) | StepKind::Transfer) => {
            Some((StreamKind::Compute, step.axes.clone()))
        }
        NodeOp::Bucket { axes } => Some((StreamKind::Communication, axes.clone())),
        NodeOp::NormTotal => Some((StreamKind::Compute, all())),
        _ => None,
    }
}

/// Number of groups along some axes of a placement.
fn group_count(graph: &Graph, placement: usize, axes: &[usize]) -> u32 {
    let placement = &graph.placements[placement];
    (placement.device_count() / placement.group_len(axes)) as u32
}

impl Patterns {
    /// The patterns of a graph after all passes.
    pub fn of(graph: &Graph) -> Self {
        let (mut patterns, mut first_id) = (Self::default(), 0);
        for node in &graph.nodes {
            let Some((stream, axes)) = collective_axes(graph, node) else { continue };
            let placement = node.placement;
            let is_known = |p: &Pattern| (p.stream, p.placement, &p.axes) == (stream, placement, &axes);
            if !patterns.0.iter().any(is_known) {
                let groups = group_count(graph, placement, &axes);
                patterns.0.push(Pattern { stream, placement, axes, first_id });
                first_id += groups;
            }
        }
        patterns
    }

    /// Number of groups. All their ids are less than this number.
    pub fn count(&self, graph: &Graph) -> u32 {
        self.0.last().map_or(0, |last| last.first_id + group_count(graph, last.placement, &last.axes))
    }

    pub fn ranks(&self, graph: &Graph, id: u32) -> Option<Ranks> {
        let last = self.0.iter().rev().find(|pattern| pattern.first_id <= id)?;
        let (placement, axes) = (&graph.placements[last.placement], &last.axes);
        let of_group = |index: &usize| placement.group_number(*index, axes) == id - last.first_id;
        (0..placement.device_count()).find(of_group).map(|index| placement.group_ranks(index, axes))
    }

    pub fn groups_of(&self, graph: &Graph, device: usize) -> impl Iterator<Item = Arc<Group>> {
        let is_member = move |pattern: &&Pattern| graph.placements[pattern.placement].index_of(device).is_some();
        let group = move |p: &Pattern| self.group(graph, (p.stream, &p.axes), p.placement, device);
        self.0.iter().filter(is_member).map(group)
    }

    /// The group of a device. If several patterns of one stream contain this group, the first one gives its id.
    pub fn group(
        &self,
        graph: &Graph,
        (stream, axes): (StreamKind, &[usize]),
        placement: usize,
        device: usize,
    ) -> Arc<Group> {
        let number_and_ranks = |placement: usize, axes: &[usize]| {
            let placement = &graph.placements[placement];
            let index = placement.index_of(device)?;
            Some((placement.group_number(index, axes), placement.group_ranks(index, axes)))
        };
        let (_, ranks) = number_and_ranks(placement, axes).expect("a device calls collectives only in its own groups");
        let same = |pattern: &Pattern| {
            let (number, others) = number_and_ranks(pattern.placement, &pattern.axes)?;
            (pattern.stream == stream && others == ranks).then_some(pattern.first_id + number)
        };
        let id = self.0.iter().find_map(same).expect("the pattern of every collective is known");
        Arc::new(Group { id, ranks })
    }
}
