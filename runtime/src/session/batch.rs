//! The input tensors of a step (the whole batch, or this data rank's part of it), their checks, and each device's part.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use shardflow_job::membership::MergeRule;
use shardflow_kernels::tensor::{HostTensor, Region, element_count};

use super::agreement::{SharedInput, digest, rules_of_step, shared_inputs};
use super::error::SessionError;
use super::tokens::{check_ids, vocabularies};
use crate::graph::builder::{HYPER_INPUT, RNG_INPUT};
use crate::graph::{Graph, Node, NodeOp, TensorInfo, Var};
use crate::plan::Plan;
use crate::plan::instance::Instance;
use crate::process_map::ProcessMap;
use crate::sbp::region::{concat, slice_region};
use crate::sbp::{NdSbp, Sbp, local_region};

/// The mesh axis along which ranks have their own samples.
const DATA_AXIS: &str = "data";

/// The inputs of a step, by name.
#[derive(Clone, Copy, Debug)]
pub enum Batch<'a> {
    /// Whole tensors; every rank supplies all of them.
    Whole(&'a [(&'a str, HostTensor)]),
    /// This data rank's part of each input. A dim that is split over the mesh axis `data` (or an axis before it) has
    /// only the elements of this rank's devices; other dims are whole. The parts of micro-batches are joined in order.
    /// Leave out an input that no device of this rank reads. [`crate::session::Session::local_batch`] cuts such parts.
    Local(&'a [(&'a str, HostTensor)]),
}

impl<'a, T: AsRef<[(&'a str, HostTensor)]> + ?Sized> From<&'a T> for Batch<'a> {
    fn from(inputs: &'a T) -> Self {
        Self::Whole(inputs.as_ref())
    }
}

/// The tensors of a valid batch by name.
pub(super) struct Inputs<'a> {
    tensors: BTreeMap<&'a str, &'a HostTensor>,
    is_local: bool,
}

/// A part of an input: a region of a tensor.
pub(super) type Part<'a> = (Cow<'a, HostTensor>, Region);

/// What a plan requires of a batch, and which part of the batch each device gets.
pub(super) struct BatchRules {
    plan: Arc<Instance>,
    /// Inputs that hold token ids, with the size of the vocabulary.
    vocabularies: BTreeMap<String, usize>,
    /// Inputs that several processes feed; the same list on all processes.
    pub(super) shared_inputs: Vec<SharedInput>,
    /// The part of a micro-batch that a local batch holds, by input name.
    local_parts: BTreeMap<String, Region>,
    /// How the processes combine the numbers of a step, which include digests of the shared inputs.
    pub(super) agreement: Arc<[MergeRule]>,
}

impl BatchRules {
    pub(super) fn new(plan: &Arc<Instance>, process_map: &ProcessMap) -> Self {
        let shared_inputs = shared_inputs(plan, process_map);
        Self {
            plan: plan.clone(),
            vocabularies: vocabularies(&plan.graph),
            local_parts: local_parts(plan, process_map),
            agreement: rules_of_step(plan, &shared_inputs),
            shared_inputs,
        }
    }

    /// The inputs that a whole batch holds, by name.
    fn expected(&self) -> BTreeMap<&str, Var> {
        let is_fed = |n: &&Node| matches!(n.op, NodeOp::Input) && n.name != RNG_INPUT && n.name != HYPER_INPUT;
        self.plan.graph.nodes().iter().filter(is_fed).map(|n| (n.name.as_str(), n.outputs[0])).collect()
    }

    /// Refuses missing and unknown inputs, wrong shapes and types, and tokens outside the vocabulary.
    pub(super) fn check<'a>(&self, batch: Batch<'a>) -> Result<Inputs<'a>, SessionError> {
        let (graph, is_local) = (&self.plan.graph, matches!(batch, Batch::Local(_)));
        let (Batch::Whole(inputs) | Batch::Local(inputs)) = batch;
        let expected = self.expected();
        let wrong =
            |name: &str, expected: String, got: String| SessionError::Input { name: name.into(), expected, got };
        let mut tensors = BTreeMap::new();
        for (name, tensor) in inputs {
            if tensors.insert(*name, tensor).is_some() {
                return Err(wrong(name, "one tensor".into(), "two".into()));
            }
            let (elements, held) = (element_count(&tensor.shape), tensor.elements_held());
            if elements != held {
                return Err(wrong(name, format!("{elements} elements for shape {:?}", tensor.shape), held.to_string()));
            }
            if !expected.contains_key(name) {
                let known: Vec<&str> = expected.keys().copied().collect();
                return Err(wrong(name, format!("one of {known:?}"), "an unknown name".into()));
            }
        }
        for (name, var) in expected {
            let info = graph.tensor(var);
            let part = self.local_parts.get(name).filter(|_| is_local);
            let found = tensors.get(name);
            if is_local && part.is_none() {
                if found.is_none() {
                    continue;
                }
                return Err(wrong(name, "no tensor (no device of this rank reads it)".into(), "a tensor".into()));
            }
            let mut shape = part.map_or_else(|| info.shape.clone(), |part| part.size.clone());
            if let Some(rows) = batch_dim(info).and_then(|dim| shape.get_mut(dim)) {
                *rows *= self.plan.micro_batches;
            }
            let place = part.map_or("", |_| " as this rank's part of the batch");
            let wanted = format!("{:?} {shape:?}{place}", info.dtype);
            let Some(tensor) = found.filter(|t| (&t.shape, t.dtype()) == (&shape, info.dtype)) else {
                let got = found.map_or("nothing".into(), |t| format!("{:?} {:?}", t.dtype(), t.shape));
                return Err(wrong(name, wanted, got));
            };
            self.vocabularies.get(name).map_or(Ok(()), |tokens| check_ids(name, tensor, *tokens))?;
        }
        Ok(Inputs { tensors, is_local })
    }

    /// A part of an input. `region` is relative to the start of the micro-batch.
    pub(super) fn part<'a>(&self, var: Var, mut region: Region, micro_batch: usize, inputs: &Inputs<'a>) -> Part<'a> {
        let (info, name) = (self.plan.graph.tensor(var), self.plan.graph.producer(var).name.as_str());
        let part = self.local_parts.get(name).filter(|_| inputs.is_local);
        let held = part.map_or(&info.shape, |part| &part.size);
        if let Some(part) = part {
            region.start.iter_mut().zip(&part.start).for_each(|(start, first)| *start -= first);
        }
        if let Some(dim) = batch_dim(info).filter(|dim| *dim < info.shape.len()) {
            region.start[dim] += micro_batch * held[dim];
        }
        (Cow::Borrowed(inputs.tensors[name]), region)
    }

    fn region(&self, var: Var, region: Region, micro_batch: usize, inputs: &Inputs<'_>) -> HostTensor {
        let (tensor, region) = self.part(var, region, micro_batch, inputs);
        slice_region(&tensor, &region)
    }

    /// A digest of each shared input that this process feeds, for the comparison with other processes.
    pub(super) fn digests(&self, process: u32, inputs: &Inputs<'_>) -> Vec<Vec<u64>> {
        let digest = |input: &SharedInput| {
            if input.processes.binary_search(&process).is_err() {
                return Vec::new();
            }
            let mut hasher = blake3::Hasher::new();
            let firings = self.plan.graph.tensor(input.var).rate.per_step(self.plan.micro_batches);
            for micro_batch in 0..firings {
                for region in &input.regions {
                    hasher.update(self.region(input.var, region.clone(), micro_batch, inputs).as_bytes());
                }
            }
            vec![digest(&hasher)]
        };
        self.shared_inputs.iter().map(digest).collect()
    }

    /// See [`Session::local_batch`](super::Session::local_batch).
    pub(super) fn local_batch<'a>(
        &self,
        whole: &[(&'a str, HostTensor)],
    ) -> Result<Vec<(&'a str, HostTensor)>, SessionError> {
        let inputs = self.check(Batch::Whole(whole))?;
        let (expected, count) = (self.expected(), self.plan.micro_batches);
        let part = |name: &'a str| {
            let (region, var) = (self.local_parts.get(name)?, *expected.get(name)?);
            let part = |micro_batch| self.region(var, region.clone(), micro_batch, &inputs);
            let tensor = match batch_dim(self.plan.graph.tensor(var)) {
                Some(dim) if count > 1 => concat(&(0..count).map(part).collect::<Vec<_>>(), dim),
                _ => part(0),
            };
            Some((name, tensor))
        };
        Ok(whole.iter().filter_map(|(name, _)| part(name)).collect())
    }
}

/// The part of a micro-batch that [`Batch::Local`] holds on this process, by input name. A part contains the elements
/// of all devices of this process. Inputs that this process does not feed have no entry.
pub(super) fn local_parts(plan: &Plan, process_map: &ProcessMap) -> BTreeMap<String, Region> {
    let mut parts: BTreeMap<String, Region> = BTreeMap::new();
    for var in plan.segments.fed(&plan.graph) {
        let (name, placement) = (&plan.graph.producer(var).name, plan.graph.placement_of(var));
        let is_fed = |device: &usize| plan.graph.placements[placement].index_of(*device).is_some();
        for device in process_map.own().filter(is_fed).filter(|_| name != RNG_INPUT) {
            let part = data_part(&plan.graph, var, device);
            parts.entry(name.clone()).and_modify(|known| *known = hull(known, &part)).or_insert(part);
        }
    }
    parts
}

/// The part of a tensor that the devices of this device's data rank hold together.
fn data_part(graph: &Graph, var: Var, device: usize) -> Region {
    let placement = &graph.placements[graph.placement_of(var)];
    let last = placement.axes().iter().position(|axis| axis.name == DATA_AXIS);
    let is_outer = |axis: usize| last.is_some_and(|last| axis <= last);
    let sbp = |(axis, sbp): (usize, &Sbp)| if is_outer(axis) { *sbp } else { Sbp::Broadcast };
    let layout = NdSbp(graph.layout(var).0.iter().enumerate().map(sbp).collect());
    // The placement includes the device, because the host feeds the tensor to this device.
    local_region(graph.shape(var), &layout, placement, placement.index_of(device).unwrap_or(0))
}

/// The smallest region that contains both regions.
fn hull(a: &Region, b: &Region) -> Region {
    let start: Vec<usize> = a.start.iter().zip(&b.start).map(|(a, b)| *a.min(b)).collect();
    let ends = (0..start.len()).map(|dim| (a.start[dim] + a.size[dim]).max(b.start[dim] + b.size[dim]));
    let size = ends.zip(&start).map(|(end, start)| end - start).collect();
    Region { start, size }
}

/// The dim along which micro-batches split an input.
fn batch_dim(input: &TensorInfo) -> Option<usize> {
    if let Some(Sbp::Split(dim)) = input.loop_sbp { Some(dim) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hull_contains_both_regions() {
        let region = |start: &[usize], size: &[usize]| Region { start: start.into(), size: size.into() };
        assert_eq!(hull(&region(&[2, 0], &[2, 4]), &region(&[4, 1], &[1, 2])), region(&[2, 0], &[3, 4]));
    }
}
