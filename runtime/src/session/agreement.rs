//! Checks values that must be equal on all ranks: per step the learning rate and elements that several ranks feed, per
//! load the tensors. Each rank compares all values, so all report the same error. A step's numbers share a message with
//! requests to stop; the only cost is a digest of the shared elements.

use std::collections::{BTreeMap, BTreeSet};

use shardflow_kernels::tensor::Region;

use super::outcome::Outcome;
use crate::graph::Var;
use crate::graph::builder::RNG_INPUT;
use crate::plan::memory::local_part;
use crate::plan::{HostTransfer, Instance};
use crate::process_map::ProcessMap;
use crate::sbp::region::contains;
use shardflow_job::rendezvous::ranks;

/// Maximum number of different values that an error lists.
const VALUES_MAX: usize = 4;

/// Numbers of a step before its digests: the request and the learning rate's bits.
const STEP_NUMBERS: usize = 2;

/// Names of a load's numbers that precede the digests of tensors. The first two are an [`Outcome`].
const LOAD_NAMES: [&str; 5] = ["outcome", "number of steps", "number of updates", "seed", "manifest"];

/// Index of the first digest among them.
const MANIFEST: usize = 4;

/// Ranks have different values where all must have the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{context}: the ranks differ in {name}: {}; give every rank the same value", list(values))]
pub struct RankDisagreement {
    /// The step, or the file or checkpoint that was loaded.
    pub context: String,
    /// The learning rate, an input or a parameter.
    pub name: String,
    /// Each rank's value, or a digest of it.
    pub values: Vec<(u32, String)>,
}

/// Lists ranks by value, in the order of the first rank that has it.
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

/// Elements of an input that the same two or more processes feed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedInput {
    pub(super) var: Var,
    pub(super) processes: BTreeSet<u32>,
    /// The regions of one micro-batch that all of them feed.
    pub(super) regions: Vec<Region>,
}

/// The processes that feed each region, by its start and size.
type Feeders = BTreeMap<(Vec<usize>, Vec<usize>), BTreeSet<u32>>;

/// Inputs that several processes of a plan feed; the same list on all processes. Inputs of the same name are one host
/// tensor, which may be fed to several placements, each with its own layout.
pub fn shared_inputs(plan: &Instance, process_map: &ProcessMap) -> Vec<SharedInput> {
    // By name: one of the inputs, and the processes that feed each region.
    let mut fed: BTreeMap<&str, (Var, Feeders)> = BTreeMap::new();
    for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
        for action in actions {
            let Some(host) = action.host.as_ref().filter(|host| host.transfer == HostTransfer::Feed) else { continue };
            for var in &host.vars {
                let (name, region) = (&plan.graph.producer(*var).name, local_part(&plan.graph, *var, actor.device));
                if name != RNG_INPUT && !region.is_empty() {
                    let (_, regions) = fed.entry(name).or_insert((*var, Feeders::new()));
                    let feeders = regions.entry((region.start, region.size)).or_default();
                    feeders.insert(process_map.process_of(actor.device));
                }
            }
        }
    }
    let mut shared: BTreeMap<(Var, BTreeSet<u32>), Vec<Region>> = BTreeMap::new();
    for (var, regions) in fed.into_values() {
        let regions: Vec<(Region, BTreeSet<u32>)> =
            regions.into_iter().map(|((start, size), processes)| (Region { start, size }, processes)).collect();
        for cell in cells(regions.iter().map(|(region, _)| region)) {
            let feeding = regions.iter().filter(|(region, _)| contains(region, &cell));
            let processes: BTreeSet<u32> = feeding.flat_map(|(_, processes)| processes).copied().collect();
            if processes.len() > 1 {
                shared.entry((var, processes)).or_default().push(cell);
            }
        }
    }
    shared.into_iter().map(|((var, processes), regions)| SharedInput { var, processes, regions }).collect()
}

/// The boxes into which the borders of all regions divide a tensor.
fn cells<'a>(regions: impl Iterator<Item = &'a Region> + Clone) -> Vec<Region> {
    let mut cells = vec![Region::whole(&[])];
    for dim in 0..regions.clone().next().map_or(0, |region| region.size.len()) {
        let borders = regions.clone().flat_map(|region| [region.start[dim], region.start[dim] + region.size[dim]]);
        let borders: Vec<usize> = borders.collect::<BTreeSet<_>>().into_iter().collect();
        let extended = |cell: &Region, border: &[usize]| {
            let mut cell = cell.clone();
            cell.start.push(border[0]);
            cell.size.push(border[1] - border[0]);
            cell
        };
        let along = |cell| borders.windows(2).map(move |border| extended(cell, border)).collect::<Vec<_>>();
        cells = cells.iter().flat_map(along).collect();
    }
    cells
}

/// Number of values that a process sends in a step.
pub fn step_numbers(shared: &[SharedInput], process: u32) -> usize {
    STEP_NUMBERS + shared.iter().filter(|input| input.processes.contains(&process)).count()
}

/// Number of values that a process sends at a load.
pub fn load_numbers(plan: &Instance) -> usize {
    LOAD_NAMES.len() + plan.graph.residents().count()
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

/// The numbers that a process sends at a load: of what it has read, or of its error's exit code.
pub(super) fn numbers_of_load(plan: &Instance, summary: Result<LoadSummary, u8>) -> Vec<u64> {
    let outcome = summary.as_ref().map_or_else(|exit| Outcome::Failed(*exit), |summary| Outcome::Good(summary.steps));
    let LoadSummary { updates, seed, manifest, tensors, .. } = summary.unwrap_or_default();
    let digests = plan.graph.residents().map(|var| tensors.get(&var).copied().unwrap_or_default());
    outcome.to_pair().into_iter().chain([updates, seed, manifest]).chain(digests).collect()
}

/// The difference between the numbers of all processes for a step, if there is one. `steps`: the steps done before.
pub(super) fn difference_in_step(
    plan: &Instance,
    shared: &[SharedInput],
    steps: u64,
    all_numbers: &[Vec<u64>],
) -> Option<RankDisagreement> {
    let number = |process: u32, index: usize| all_numbers[process as usize].get(index).copied().unwrap_or_default();
    let disagreement = |name, values| Some(RankDisagreement { context: format!("step {}", steps + 1), name, values });
    let all = 0..all_numbers.len() as u32;
    if plan.graph.objective.is_some() && all.clone().any(|process| number(process, 1) != number(0, 1)) {
        let value = |process| (process, f32::from_bits(number(process, 1) as u32).to_string());
        return disagreement("learning_rate".into(), all.map(value).collect());
    }
    // A process sends only digests of its own inputs, in the order of the list.
    let mut next = vec![STEP_NUMBERS; all_numbers.len()];
    for input in shared {
        let mut values = Vec::new();
        for process in &input.processes {
            let index = &mut next[*process as usize];
            values.push((*process, number(*process, *index)));
            *index += 1;
        }
        if values.iter().any(|value| value.1 != values[0].1) {
            return disagreement(format!("input {}", plan.graph.producer(input.var).name), in_hex(values));
        }
    }
    None
}

/// The difference between the numbers of all processes for a load, none of which failed.
pub(super) fn difference_in_load(plan: &Instance, source: &str, all_numbers: &[Vec<u64>]) -> Option<RankDisagreement> {
    let differs = |index: &usize| all_numbers.iter().any(|other| other.get(*index) != all_numbers[0].get(*index));
    let index = (0..load_numbers(plan)).find(differs)?;
    let mut tensors = plan.graph.residents().map(|var| format!("tensor {}", plan.graph.tensor(var).name));
    let name = match LOAD_NAMES.get(index) {
        Some(name) => name.to_string(),
        None => tensors.nth(index - LOAD_NAMES.len()).unwrap_or_default(),
    };
    let values = (0..).zip(all_numbers.iter().map(|numbers| numbers.get(index).copied().unwrap_or_default())).collect();
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
