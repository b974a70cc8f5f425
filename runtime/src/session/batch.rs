//! The tensors of a step: the whole batch, or this data rank's part of it.

use std::collections::BTreeMap;

use shardflow_kernels::tensor::{HostTensor, Region};

use crate::graph::builder::RNG_INPUT;
use crate::graph::{Graph, Var};
use crate::plan::Plan;
use crate::process_map::ProcessMap;
use crate::sbp::{NdSbp, Sbp, local_region};

/// The mesh axis along which ranks have their own samples.
const DATA_AXIS: &str = "data";

/// The inputs of a step, by name.
#[derive(Clone, Copy, Debug)]
pub enum Batch<'a> {
    /// Whole tensors; every rank supplies all of them.
    Whole(&'a [(&'a str, HostTensor)]),
    /// This data rank's part of each input. A dim that is split over the mesh axis `data` (or an axis before it) has
    /// only the elements of this rank's devices; other dims are whole. The parts of micro-batches follow in order.
    /// Leave out an input that no device of this rank reads. [`crate::session::Session::local_batch`] cuts such parts.
    Local(&'a [(&'a str, HostTensor)]),
}

impl<'a> From<&'a [(&'a str, HostTensor)]> for Batch<'a> {
    fn from(inputs: &'a [(&'a str, HostTensor)]) -> Self {
        Self::Whole(inputs)
    }
}

impl<'a, const N: usize> From<&'a [(&'a str, HostTensor); N]> for Batch<'a> {
    fn from(inputs: &'a [(&'a str, HostTensor); N]) -> Self {
        Self::Whole(inputs)
    }
}

impl<'a> From<&'a Vec<(&'a str, HostTensor)>> for Batch<'a> {
    fn from(inputs: &'a Vec<(&'a str, HostTensor)>) -> Self {
        Self::Whole(inputs)
    }
}

impl<'a> Batch<'a> {
    pub(super) fn tensors(self) -> &'a [(&'a str, HostTensor)] {
        match self {
            Self::Whole(inputs) | Self::Local(inputs) => inputs,
        }
    }
}

/// A step's tensors by name.
pub(super) struct Inputs<'a> {
    pub(super) tensors: BTreeMap<&'a str, &'a HostTensor>,
    pub(super) is_local: bool,
}

impl<'a> From<Batch<'a>> for Inputs<'a> {
    fn from(batch: Batch<'a>) -> Self {
        let tensors = batch.tensors().iter().map(|(name, tensor)| (*name, tensor)).collect();
        Self { tensors, is_local: matches!(batch, Batch::Local(_)) }
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

/// The part of a tensor that a device shares with the other devices of its data rank.
fn data_part(graph: &Graph, var: Var, device: usize) -> Region {
    let placement = &graph.placements[graph.placement_of(var)];
    let last = placement.axes().iter().position(|axis| axis.name == DATA_AXIS);
    let is_outer = |axis: usize| last.is_some_and(|last| axis <= last);
    let sbp = |(axis, sbp): (usize, &Sbp)| if is_outer(axis) { *sbp } else { Sbp::Broadcast };
    let layout = NdSbp(graph.layout(var).0.iter().enumerate().map(sbp).collect());
    // The placement includes the device, because the host feeds the tensor to it.
    local_region(graph.shape(var), &layout, placement, placement.index_of(device).unwrap_or(0))
}

/// The smallest region that contains both regions.
fn hull(a: &Region, b: &Region) -> Region {
    let start: Vec<usize> = a.start.iter().zip(&b.start).map(|(a, b)| *a.min(b)).collect();
    let ends = (0..start.len()).map(|dim| (a.start[dim] + a.size[dim]).max(b.start[dim] + b.size[dim]));
    let size = ends.zip(&start).map(|(end, start)| end - start).collect();
    Region { start, size }
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
