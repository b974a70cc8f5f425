//! Checks values that must be equal on all ranks: in each step, the learning rate and the elements that several ranks
//! feed; in each load, the tensors, the counters and the seed. Processes compare the values on the way up the control
//! tree, and all ranks report the same error. A step's numbers share a message with stop requests, so the only cost is
//! a digest of the shared elements.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shardflow_kernels::tensor::Region;

use super::outcome::{Outcome, Worst};
use crate::graph::Var;
use crate::graph::builder::RNG_INPUT;
use crate::plan::Plan;
use crate::plan::instance::Instance;
use crate::plan::memory::local_part;
use crate::process_map::ProcessMap;
use shardflow_job::membership::{Difference, MergeRule, Reduced};
use shardflow_job::rendezvous::ranks;

/// Maximum number of different values that an error lists.
const VALUES_MAX: usize = 4;

/// Names of the first fields of a load; the digests of tensors follow. For the field `outcome`, see [`Worst`].
const LOAD_NAMES: [&str; 5] = ["outcome", "number of steps", "number of updates", "seed", "manifest"];

/// Index of the manifest in [`LOAD_NAMES`]. From this index on, all fields are digests.
const MANIFEST: usize = 4;

/// Maximum number of fields in a message.
pub(super) const FIELDS_MAX: usize = 4096;

/// Ranks differ in a value that must be equal on all ranks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{context}: the ranks differ in {name}: {}; give every rank the same value", list(values))]
pub struct RankDisagreement {
    /// The step, or the file or checkpoint that was loaded.
    pub context: String,
    /// The learning rate, an input, or a value of a load, such as a tensor or the seed.
    pub name: String,
    /// Each rank's value, or a digest of it.
    pub values: Vec<(u32, String)>,
}

/// Lists the values with their ranks, in the order of each value's first rank.
fn list(values: &[(u32, String)]) -> String {
    let mut groups: Vec<(&str, Vec<u32>)> = Vec::new();
    for (rank, value) in values {
        match groups.iter_mut().find(|(other, _)| other == value) {
            Some((_, ranks)) => ranks.push(*rank),
            None => groups.push((value, vec![*rank])),
        }
    }
    let more = groups.len().saturating_sub(VALUES_MAX);
    let more = if more > 0 { format!("; and {more} more values") } else { String::new() };
    let verb = |of: &[u32]| if of.len() == 1 { "has" } else { "have" };
    let listed = groups.iter().take(VALUES_MAX).map(|(value, of)| format!("{} {} {value}", ranks(of), verb(of)));
    format!("{}{more}", listed.collect::<Vec<_>>().join("; "))
}

/// Elements of an input that several processes feed. Each of these processes feeds all of these elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedInput {
    pub(super) var: Var,
    /// Ranks of these processes, in order.
    pub(super) processes: Arc<[u32]>,
    /// The regions of one micro-batch that all these processes feed.
    pub(super) regions: Vec<Region>,
}

/// The processes that feed each region, by the region's start and size.
type Feeders = BTreeMap<(Vec<usize>, Vec<usize>), BTreeSet<u32>>;

/// Inputs that several processes of a plan feed; the same list on all processes. Inputs of the same name are one host
/// tensor. Several placements may read it, each with its own layout.
pub fn shared_inputs(plan: &Plan, process_map: &ProcessMap) -> Vec<SharedInput> {
    // For each name: one of the inputs with this name, and the processes that feed each region.
    let mut fed: BTreeMap<&str, (Var, Feeders)> = BTreeMap::new();
    for var in plan.segments.fed(&plan.graph) {
        let name = &plan.graph.producer(var).name;
        let devices = plan.graph.placements[plan.graph.placement_of(var)].devices();
        for device in devices.iter().filter(|_| name != RNG_INPUT) {
            let region = local_part(&plan.graph, var, *device);
            if !region.is_empty() {
                let (_, regions) = fed.entry(name).or_insert((var, Feeders::new()));
                let feeders = regions.entry((region.start, region.size)).or_default();
                feeders.insert(process_map.process_of(*device));
            }
        }
    }
    let mut shared: BTreeMap<(Var, BTreeSet<u32>), Vec<Region>> = BTreeMap::new();
    for (var, feeders) in fed.into_values() {
        for (cell, processes) in cells(&feeders).into_iter().filter(|(_, processes)| processes.len() > 1) {
            shared.entry((var, processes)).or_default().push(cell);
        }
    }
    let shared = shared.into_iter();
    shared.map(|((var, all), regions)| SharedInput { var, processes: all.into_iter().collect(), regions }).collect()
}

/// The boxes into which the borders of all regions divide a tensor, and the processes that feed each box.
fn cells(feeders: &Feeders) -> Vec<(Region, BTreeSet<u32>)> {
    let dims = feeders.keys().next().map_or(0, |(start, _)| start.len());
    let borders_of = |dim: usize| feeders.keys().flat_map(move |(start, size)| [start[dim], start[dim] + size[dim]]);
    let borders: Vec<BTreeSet<usize>> = (0..dims).map(|dim| borders_of(dim).collect()).collect();
    let mut cells: BTreeMap<Vec<usize>, BTreeSet<u32>> = BTreeMap::new();
    for ((start, size), processes) in feeders {
        let mut starts = vec![Vec::new()];
        for (dim, borders) in borders.iter().enumerate() {
            let inside = borders.range(start[dim]..start[dim] + size[dim]);
            starts = starts.iter().flat_map(|cell| inside.clone().map(|at| [&cell[..], &[*at]].concat())).collect();
        }
        starts.into_iter().for_each(|cell| cells.entry(cell).or_default().extend(processes));
    }
    let next = |(dim, start): (usize, &usize)| borders[dim].range(start + 1..).next().expect("a border ends the cell");
    let size = |start: &[usize]| start.iter().enumerate().map(|at| next(at) - at.1).collect();
    cells.into_iter().map(|(start, processes)| (Region { size: size(&start), start }, processes)).collect()
}

/// The first 8 bytes of a BLAKE3 checksum.
pub(super) fn digest(hasher: &blake3::Hasher) -> u64 {
    let bytes = *hasher.finalize().as_bytes();
    u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
}

pub(super) fn digest_of(bytes: &[u8]) -> u64 {
    digest(blake3::Hasher::new().update(bytes))
}

/// Values of a load that processes compare.
#[derive(Clone, Debug, Default)]
pub(super) struct LoadSummary {
    pub(super) steps: u64,
    pub(super) updates: u64,
    pub(super) seed: u64,
    /// Digest of a checkpoint's manifest.
    pub(super) manifest: u64,
    /// Digests of whole tensors.
    pub(super) tensors: BTreeMap<Var, u64>,
}

/// How processes combine the numbers of a step: they take the largest request, and require equal learning rates and,
/// for each shared input, equal digests.
pub(super) fn rules_of_step(plan: &Instance, shared: &[SharedInput]) -> Arc<[MergeRule]> {
    let rate = plan.graph.objective.map(|_| MergeRule::Same(None));
    let digests = shared.iter().map(|input| MergeRule::Same(Some(input.processes.clone())));
    [MergeRule::Max { words: 1 }].into_iter().chain(rate).chain(digests).collect()
}

/// A process's numbers for [`rules_of_step`]. Without an objective, the learning rate is left out.
pub(super) fn fields_of_step(
    plan: &Instance,
    request: u64,
    learning_rate: f32,
    digests: Vec<Vec<u64>>,
) -> Vec<Vec<u64>> {
    let rate = plan.graph.objective.map(|_| vec![u64::from(learning_rate.to_bits())]);
    [vec![request]].into_iter().chain(rate).chain(digests).collect()
}

/// Describes a difference between the processes' numbers of a step. `steps` is the number of steps done before it.
pub(super) fn difference_in_step(
    plan: &Instance,
    shared: &[SharedInput],
    steps: u64,
    difference: &Difference,
) -> RankDisagreement {
    let (context, values) = (format!("step {}", steps + 1), difference.values.clone());
    let before = 1 + usize::from(plan.graph.objective.is_some());
    let input = (difference.field as usize).checked_sub(before).and_then(|index| shared.get(index));
    match input {
        Some(input) => {
            let name = format!("input {}", plan.graph.producer(input.var).name);
            RankDisagreement { context, name, values: in_hex(values) }
        }
        None => {
            let values = as_text(values, |bits| f32::from_bits(bits as u32).to_string());
            RankDisagreement { context, name: "learning_rate".into(), values }
        }
    }
}

/// The rules and the numbers of a message, by field.
pub(super) type Numbers = (Arc<[MergeRule]>, Vec<Vec<u64>>);

/// A process's numbers of a load with their rules, in parts that fit in messages. The numbers identify the
/// data that the process has read. If it could not read them, they contain the exit code of its error.
pub(super) fn numbers_of_load(plan: &Instance, process: u32, summary: Result<LoadSummary, u8>) -> Vec<Numbers> {
    let outcome = summary.as_ref().map_or_else(|exit| Outcome::Failed(*exit), |_| Outcome::Good(0));
    let LoadSummary { steps, updates, seed, manifest, tensors } = summary.unwrap_or_default();
    let words = [Worst::words(process, outcome).to_vec()];
    let fields = words.into_iter().chain([steps, updates, seed, manifest].map(|number| vec![number]));
    let digests = plan.graph.residents().map(|var| vec![tensors.get(&var).copied().unwrap_or_default()]);
    let fields: Vec<Vec<u64>> = fields.chain(digests).collect();
    let rule =
        |words: &Vec<u64>| if words.len() > 1 { MergeRule::Max { words: words.len() } } else { MergeRule::Same(None) };
    fields.chunks(FIELDS_MAX).map(|fields| (fields.iter().map(rule).collect(), fields.to_vec())).collect()
}

/// Finds a difference between the processes' numbers of a load, if no process has failed. `parts` has the result of
/// each message.
pub(super) fn difference_in_load(plan: &Instance, source: &str, parts: &[Reduced]) -> Option<RankDisagreement> {
    let (part, difference) = parts.iter().enumerate().find_map(|(part, all)| Some((part, all.difference.clone()?)))?;
    let index = part * FIELDS_MAX + difference.field as usize;
    let mut tensors = plan.graph.residents().map(|var| format!("tensor {}", plan.graph.tensor(var).name));
    let name = match LOAD_NAMES.get(index) {
        Some(name) => name.to_string(),
        None => tensors.nth(index - LOAD_NAMES.len()).unwrap_or_default(),
    };
    let values = difference.values;
    let values = if index < MANIFEST { as_text(values, |value| value.to_string()) } else { in_hex(values) };
    Some(RankDisagreement { context: source.into(), name, values })
}

fn in_hex(values: Vec<(u32, u64)>) -> Vec<(u32, String)> {
    as_text(values, |value| format!("{value:016x}"))
}

fn as_text(values: Vec<(u32, u64)>, text: impl Fn(u64) -> String) -> Vec<(u32, String)> {
    values.into_iter().map(|(rank, value)| (rank, text(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_lists_ranks_by_value() {
        let values = |values: &[&str]| (0..).zip(values.iter().map(ToString::to_string)).collect();
        let text = |of: &[&str]| {
            let (context, name) = ("step 2".into(), "input x".into());
            RankDisagreement { context, name, values: values(of) }.to_string()
        };
        assert_eq!(
            text(&["a", "b", "a"]),
            "step 2: the ranks differ in input x: ranks 0, 2 have a; rank 1 has b; give every rank the same value"
        );
        assert!(text(&["a", "b", "c", "d", "e", "f", "e"]).contains("rank 3 has d; and 2 more values; give"));
    }
}
