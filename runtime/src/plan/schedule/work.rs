//! The input of a schedule: the work of a step, which is a plan's compute segments with their dependencies.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use shardflow_actors::label::Role;
use shardflow_actors::spec::StreamKind;

use crate::graph::Graph;
use crate::plan::segments::{HostTransfer, SegmentId, Segments};

/// The work of a step on the compute streams.
#[derive(Clone, Debug, Default)]
pub struct WorkGraph {
    pub work: Vec<Work>,
    /// Number of sites. A site is a set of devices that are in the same placements, so they run the same segments.
    pub sites: usize,
    pub micro_batches: u32,
    /// Ticks from the end of work to the start of work that waits for it on another stream or device.
    pub hop_ticks: u64,
}

#[derive(Clone, Debug)]
pub struct Work {
    pub segment: SegmentId,
    pub role: Role,
    pub sites: Vec<usize>,
    /// Number of firings in a step: 1, or one for each micro-batch.
    pub firings: u32,
    /// Duration of a firing, in ticks.
    pub ticks: u64,
    /// The work that this work waits for, as `(index, true if a hop lies between them)`.
    pub needs: Vec<(usize, bool)>,
    /// Indices of the backward work on the same sites that reads outputs of this work.
    pub closed_by: Vec<usize>,
}

/// Relative durations in ticks: forward and backward of one micro-batch in one stage, work of the whole step, and a hop
/// (see [`WorkGraph::hop_ticks`]).
const FORWARD: u64 = 10;
const BACKWARD: u64 = 20;
const STEP: u64 = 1;
const HOP: u64 = 1;

/// The compute segments of a graph as work, and the site of each device that has work.
pub fn work_graph(graph: &Graph, segments: &Segments, micro_batches: usize) -> (WorkGraph, Vec<Option<usize>>) {
    let compute = segments.ids().filter(|id| segments.get(*id).stream == StreamKind::Compute);
    let index_of: BTreeMap<SegmentId, usize> = compute.zip(0..).collect();
    let (site_of_device, sites_of_placement) = sites(graph, segments);
    let own = index_of.iter().map(|(id, index)| (*id, BTreeSet::from([*index])));
    let mut needs = Needs { segments, through: own.collect() };
    let work = index_of.keys().map(|id| {
        let segment = segments.get(*id);
        Work {
            segment: *id,
            role: segment.label.role,
            sites: sites_of_placement[&segment.placement].clone(),
            firings: segment.rate.per_step(micro_batches) as u32,
            ticks: match segment.label.role {
                Role::Forward => FORWARD,
                Role::Backward => BACKWARD,
                _ => STEP,
            },
            needs: needs.of(*id),
            closed_by: closed_by(segments, &index_of, *id),
        }
    });
    let work = work.collect();
    let sites = sites_of_placement.values().flatten().max().map_or(0, |last| last + 1);
    (WorkGraph { work, sites, micro_batches: micro_batches as u32, hop_ticks: HOP }, site_of_device)
}

/// Groups devices into sites by their placements. Only placements with compute segments count. Returns the site of each
/// device, and the sites of each placement.
fn sites(graph: &Graph, segments: &Segments) -> (Vec<Option<usize>>, BTreeMap<usize, Vec<usize>>) {
    let used: BTreeSet<usize> =
        segments.list.iter().filter(|s| s.stream == StreamKind::Compute).map(|s| s.placement).collect();
    let mut known: HashMap<Vec<usize>, usize> = HashMap::new();
    let mut sites_of: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let site = |device: usize| {
        let is_on = |placement: &usize| graph.placements[*placement].index_of(device).is_some();
        let placements: Vec<usize> = used.iter().copied().filter(is_on).collect();
        let next = known.len();
        let mut new_site = |placements: &Vec<usize>| {
            placements.iter().for_each(|placement| sites_of.entry(*placement).or_default().push(next));
            next
        };
        (!placements.is_empty()).then(|| *known.entry(placements).or_insert_with_key(&mut new_site))
    };
    ((0..graph.mesh.device_count()).map(site).collect(), sites_of)
}

/// Finds the compute segments that a segment waits for, directly or through segments of other streams.
struct Needs<'a> {
    segments: &'a Segments,
    /// For each compute segment: its work. For each segment of another stream that was visited: the work that it waits
    /// for.
    through: HashMap<SegmentId, BTreeSet<usize>>,
}

impl Needs<'_> {
    fn of(&mut self, id: SegmentId) -> Vec<(usize, bool)> {
        let mut needs = BTreeSet::new();
        for source in &self.segments.reads[id.index()] {
            let hop = self.segments.get(*source).stream != StreamKind::Compute;
            needs.extend(self.behind(*source).into_iter().map(|index| (index, hop)));
        }
        needs.into_iter().collect()
    }

    /// The segment's own work or, if it is of another stream, the work that it waits for.
    fn behind(&mut self, id: SegmentId) -> BTreeSet<usize> {
        if let Some(known) = self.through.get(&id) {
            return known.clone();
        }
        let segments = self.segments;
        let decides = segments.get(id).host == Some(HostTransfer::Decide);
        let fetches = segments.of_host(HostTransfer::Fetch).filter(|_| decides);
        let sources = segments.reads[id.index()].iter().copied().chain(fetches);
        let work: BTreeSet<usize> = sources.flat_map(|source| self.behind(source)).collect();
        self.through.insert(id, work.clone());
        work
    }
}

/// The backward work that reads outputs of a forward segment on the same placement.
fn closed_by(segments: &Segments, index_of: &BTreeMap<SegmentId, usize>, id: SegmentId) -> Vec<usize> {
    let own = segments.get(id);
    let closes = |(other, _): &(&SegmentId, &usize)| {
        let segment = segments.get(**other);
        (own.label.role, segment.label.role) == (Role::Forward, Role::Backward)
            && segment.placement == own.placement
            && segments.reads[other.index()].contains(&id)
    };
    index_of.iter().filter(closes).map(|(_, index)| *index).collect()
}
