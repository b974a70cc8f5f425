//! Checks values that must be equal on all ranks: in each step the learning rate and the elements that several ranks
//! feed, at each load the tensors. Every rank compares all values, so a difference ends the call on every rank with the
//! same error.
//!
//! A step's numbers share a message with requests to stop. The only cost is a digest of the elements that several ranks
//! feed.

use std::collections::{BTreeMap, BTreeSet};

use shardflow_kernels::tensor::Region;

use super::process_map::ProcessMap;
use super::step::Inputs;
use super::{BETWEEN_STEPS, Session, SessionError};
use crate::checkpoint::error::CheckpointError;
use crate::cluster::world::WAITING;
use crate::graph::builder::RNG_INPUT;
use crate::graph::{NodeOp, Var};
use crate::plan::memory::local_part;
use crate::plan::{ActionKey, Plan};
use crate::sbp::region::contains;
use shardflow_job::rendezvous::ranks;

/// Maximum number of different values that an error lists.
const VALUES_MAX: usize = 4;

/// Numbers of a step before its digests: the request and the learning rate's bits.
const STEP_NUMBERS: usize = 2;

/// Names of a load's numbers that precede the digests of tensors. The first number is 0 if the load failed.
const LOAD_NAMES: [&str; 5] = ["outcome", "number of steps", "number of updates", "seed", "manifest"];

/// Index of the first digest among them.
const MANIFEST: usize = 4;

/// Ranks have different values where all must have the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{context}: the ranks differ in {name}: {}; give every rank the same", list(values))]
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
    var: Var,
    processes: BTreeSet<u32>,
    /// The regions of one micro-batch that all of them feed.
    regions: Vec<Region>,
}

/// The processes that feed each region, by its start and size.
type Feeders = BTreeMap<(Vec<usize>, Vec<usize>), BTreeSet<u32>>;

/// Inputs that several processes of a plan feed; the same list on all processes. Inputs of the same name are one host
/// tensor, which may be fed to several placements, each with its own layout.
pub fn shared_inputs(plan: &Plan, process_map: &ProcessMap) -> Vec<SharedInput> {
    // By name: one of the inputs, and the processes that feed each region.
    let mut fed: BTreeMap<&str, (Var, Feeders)> = BTreeMap::new();
    for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
        for action in actions {
            let (ActionKey::Feed(_), Some(host)) = (action.key, &action.host) else { continue };
            for var in &host.vars {
                let (name, region) = (&plan.graph.producer(*var).name, local_part(&plan.graph, *var, actor.device));
                if name != RNG_INPUT && !region.is_empty() {
                    let (_, regions) = fed.entry(name).or_insert((*var, Feeders::new()));
                    regions
                        .entry((region.start, region.size))
                        .or_default()
                        .insert(process_map.process_of(actor.device));
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
pub fn load_numbers(plan: &Plan) -> usize {
    LOAD_NAMES.len() + residents(plan).count()
}

/// Parameters and optimizer states, in the program's order.
fn residents(plan: &Plan) -> impl Iterator<Item = Var> + '_ {
    let nodes = plan.graph.nodes().iter();
    nodes.filter(|n| matches!(n.op, NodeOp::Parameter { .. } | NodeOp::State)).map(|n| n.outputs[0])
}

/// The first 8 bytes of a BLAKE3 checksum.
fn digest(hasher: &blake3::Hasher) -> u64 {
    let bytes = *hasher.finalize().as_bytes();
    u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
}

/// Digest of bytes.
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

impl Session {
    /// Like [`Session::receive_numbers`], between steps: slow processes are logged, and may take as long as the
    /// watchdog allows.
    pub(super) fn receive_numbers_between_steps(&mut self, ports: &[u32]) -> Result<Vec<Vec<u64>>, SessionError> {
        self.set_activity(WAITING);
        let numbers = self.receive_numbers(ports, Some(self.wait_max));
        self.set_activity(BETWEEN_STEPS);
        numbers
    }

    /// Sends this process's request, learning rate and digests of a step to all processes.
    pub(super) fn send_step_numbers(&self, request: u64, learning_rate: f32, inputs: &Inputs<'_>) {
        let own = self.process_map.process;
        let mut numbers = vec![request, u64::from(learning_rate.to_bits())];
        for input in self.shared_inputs.iter().filter(|input| input.processes.contains(&own)) {
            let mut hasher = blake3::Hasher::new();
            let firings = self.plan.graph.tensor(input.var).rate.per_step(self.plan.micro_batches);
            for micro_batch in 0..firings {
                for region in &input.regions {
                    hasher.update(self.region(input.var, region.clone(), micro_batch, inputs).as_bytes());
                }
            }
            numbers.push(digest(&hasher));
        }
        self.send_numbers(self.ports.steps[own as usize], &numbers);
    }

    /// Compares the numbers of all processes for the step, and returns the largest request. A difference cancels the
    /// update.
    pub(super) fn agree_on_step(&mut self) -> Result<u64, SessionError> {
        let ports = self.ports.clone();
        let all_numbers = self.receive_numbers(&ports.steps, None)?;
        if let Some(difference) = self.difference_in_step(&all_numbers) {
            self.decide(f32::NAN)?;
            return Err(difference.into());
        }
        Ok(all_numbers.iter().filter_map(|numbers| numbers.first().copied()).max().unwrap_or_default())
    }

    fn difference_in_step(&self, all_numbers: &[Vec<u64>]) -> Option<RankDisagreement> {
        let graph = &self.plan.graph;
        let number = |process: u32, index: usize| all_numbers[process as usize].get(index).copied().unwrap_or_default();
        let context = || format!("step {}", self.steps + 1);
        let all = 0..self.process_map.processes;
        if graph.objective.is_some() && all.clone().any(|process| number(process, 1) != number(0, 1)) {
            let value = |process| (process, f32::from_bits(number(process, 1) as u32).to_string());
            return Some(RankDisagreement {
                context: context(),
                name: "learning_rate".into(),
                values: all.map(value).collect(),
            });
        }
        // A process sends only digests of its own inputs, in the order of the list.
        let mut next = vec![STEP_NUMBERS; all_numbers.len()];
        for input in &self.shared_inputs {
            let mut values = Vec::new();
            for process in &input.processes {
                let index = &mut next[*process as usize];
                values.push((*process, number(*process, *index)));
                *index += 1;
            }
            if values.iter().any(|value| value.1 != values[0].1) {
                let name = format!("input {}", graph.producer(input.var).name);
                return Some(RankDisagreement { context: context(), name, values: in_hex(values) });
            }
        }
        None
    }

    /// Compares the loads of all processes before anything is changed. If one process cannot load, no process does.
    pub(super) fn agree_on_load<T>(
        &mut self,
        source: &str,
        summary: impl FnOnce(&T) -> LoadSummary,
        own: Result<T, SessionError>,
    ) -> Result<T, SessionError> {
        if self.process_map.processes == 1 {
            return own;
        }
        let numbers = match &own {
            Ok(own) => {
                let LoadSummary { steps, updates, seed, manifest, tensors } = summary(own);
                let digests = residents(&self.plan).map(|var| tensors.get(&var).copied().unwrap_or_default());
                [1, steps, updates, seed, manifest].into_iter().chain(digests).collect()
            }
            Err(error) => {
                let mut numbers = vec![0; load_numbers(&self.plan)];
                numbers[1] = u64::from(error.exit().code());
                numbers
            }
        };
        let ports = self.ports.clone();
        self.send_numbers(ports.loads[self.process_map.process as usize], &numbers);
        let all_numbers = self.receive_numbers_between_steps(&ports.loads)?;
        let own = own?;
        if let Some((rank, numbers)) = (0..).zip(&all_numbers).find(|(_, numbers)| numbers.first() != Some(&1)) {
            let exit = numbers.get(1).copied().unwrap_or_default() as u8;
            let (place, problem) = (source.into(), "cannot load it".into());
            return Err(CheckpointError::OnRank { place, rank, exit, problem }.into());
        }
        let Some(index) = (0..numbers.len())
            .find(|index| all_numbers.iter().any(|other| other.get(*index) != all_numbers[0].get(*index)))
        else {
            return Ok(own);
        };
        let mut tensors = residents(&self.plan).map(|var| format!("tensor {}", self.plan.graph.tensor(var).name));
        let name = match LOAD_NAMES.get(index) {
            Some(name) => name.to_string(),
            None => tensors.nth(index - LOAD_NAMES.len()).unwrap_or_default(),
        };
        let values =
            (0..).zip(all_numbers.iter().map(|numbers| numbers.get(index).copied().unwrap_or_default())).collect();
        let values = if index < MANIFEST { in_decimal(values) } else { in_hex(values) };
        Err(RankDisagreement { context: source.into(), name, values }.into())
    }
}

fn in_decimal(values: Vec<(u32, u64)>) -> Vec<(u32, String)> {
    values.into_iter().map(|(rank, value)| (rank, value.to_string())).collect()
}

fn in_hex(values: Vec<(u32, u64)>) -> Vec<(u32, String)> {
    values.into_iter().map(|(rank, value)| (rank, format!("{value:016x}"))).collect()
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
            "step 2: the ranks differ in input x: ranks 0, 2 have a; rank 1 has b; give every rank the same"
        );
        assert!(text(&["a", "b", "c", "d", "e", "f", "e"]).contains("rank 3 has d; and 2 more values; give"));
    }
}
