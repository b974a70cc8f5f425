//! The input of a schedule: the work of a step, which is a plan's compute segments with their dependencies.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use shardflow_actors::label::Role;
use shardflow_actors::spec::StreamKind;

use crate::graph::Graph;
use crate::plan::segments::{HostTransfer, SegmentId, Segments};

/// The work of a step on the compute streams.
#[derive(Clone, Debug, Default)]
pub struct WorkGraph {
    /// The compute segments.
    pub work: Vec<Work>,
    /// Number of sites. A site is a set of devices that are in the same placements, so they run the same segments.
    pub sites: usize,
    /// Number of micro-batches in a step.
    pub micro_batches: u32,
    /// Ticks from the end of work to the start of work that waits for it on another stream or device.
    pub hop_ticks: u64,
}

/// The work of one compute segment.
#[derive(Clone, Debug)]
pub struct Work {
    /// The segment.
    pub segment: SegmentId,
    /// The segment's role.
    pub role: Role,
    /// The sites that run the segment.
    pub sites: Vec<usize>,
    /// Number of firings in a step: 1, or one for each micro-batch.
    pub firings: u32,
    /// Duration of a firing, in ticks.
    pub ticks: u64,
    /// The work that it waits for, as `(index, true if a hop lies between)`.
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
    let compute: Vec<SegmentId> = segments.ids().filter(|id| segments.get(*id).stream == StreamKind::Compute).collect();
    let index_of: BTreeMap<SegmentId, usize> = compute.iter().enumerate().map(|(index, id)| (*id, index)).collect();
    let (site_of_device, sites_of_placement) = sites(graph, segments);
    let mut needs = Needs { segments, index_of: &index_of, through: HashMap::new(), fetches: fetches(segments) };
    let work = compute.iter().map(|id| {
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
            needs: needs.of(*id).into_iter().collect(),
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
    let mut placements_of = vec![Vec::new(); graph.mesh.device_count()];
    for placement in used {
        for device in graph.placements[placement].devices() {
            placements_of[*device].push(placement);
        }
    }
    let mut known: HashMap<Vec<usize>, usize> = HashMap::new();
    let mut sites_of: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut site_of = Vec::new();
    for placements in placements_of {
        let count = known.len();
        let site = (!placements.is_empty()).then(|| {
            *known.entry(placements.clone()).or_insert_with(|| {
                placements.iter().for_each(|placement| sites_of.entry(*placement).or_default().push(count));
                count
            })
        });
        site_of.push(site);
    }
    (site_of, sites_of)
}

/// All segments in which the host fetches results.
fn fetches(segments: &Segments) -> Vec<SegmentId> {
    segments.ids().filter(|id| segments.get(*id).host == Some(HostTransfer::Fetch)).collect()
}

/// Finds the compute segments that a segment waits for, directly or through segments of other streams.
struct Needs<'a> {
    segments: &'a Segments,
    index_of: &'a BTreeMap<SegmentId, usize>,
    /// For each segment of another stream: the work that it waits for.
    through: HashMap<SegmentId, BTreeSet<usize>>,
    fetches: Vec<SegmentId>,
}

impl Needs<'_> {
    fn of(&mut self, id: SegmentId) -> BTreeSet<(usize, bool)> {
        let mut needs = BTreeSet::new();
        for source in &self.segments.reads[id.index()] {
            match self.index_of.get(source) {
                Some(index) => {
                    needs.insert((*index, false));
                }
                None => needs.extend(self.behind(*source).into_iter().map(|index| (index, true))),
            }
        }
        needs
    }

    /// The work that a segment of another stream waits for.
    fn behind(&mut self, id: SegmentId) -> BTreeSet<usize> {
        if let Some(known) = self.through.get(&id) {
            return known.clone();
        }
        let mut sources: Vec<SegmentId> = self.segments.reads[id.index()].iter().copied().collect();
        if self.segments.get(id).host == Some(HostTransfer::Decide) {
            sources.extend(&self.fetches);
        }
        let mut work = BTreeSet::new();
        for source in sources {
            match self.index_of.get(&source) {
                Some(index) => drop(work.insert(*index)),
                None => work.extend(self.behind(source)),
            }
        }
        self.through.insert(id, work.clone());
        work
    }
}

/// The backward work that reads outputs of a forward segment on the same placement.
fn closed_by(segments: &Segments, index_of: &BTreeMap<SegmentId, usize>, id: SegmentId) -> Vec<usize> {
    let own = segments.get(id);
    if own.label.role != Role::Forward {
        return Vec::new();
    }
    let closes = |(other, _): &(&SegmentId, &usize)| {
        let segment = segments.get(**other);
        segment.label.role == Role::Backward
            && segment.placement == own.placement
            && segments.reads[other.index()].contains(&id)
    };
    index_of.iter().filter(closes).map(|(_, index)| *index).collect()
}
