//! The cost of a choice of layouts: boxing between interned layouts (each pair is planned once), and compute.

use std::collections::HashMap;

use shardflow_kernels::tensor::{DType, element_count};

use super::rule::NdSignature;
use super::{NdSbp, PlacedLayout, local_region};
use crate::boxing::table::CostTable;
use crate::boxing::{CostModel, plan};
use crate::placement::Placement;

/// Seconds of an op on the busiest device of a placement under a signature. The unsharded op takes `whole_seconds`. The
/// time is proportional to the smallest local share of an operand, because one operand has all the split factors.
pub fn compute_seconds(
    whole_seconds: f64,
    signature: &NdSignature,
    input_shapes: &[Vec<usize>],
    output_shapes: &[Vec<usize>],
    placement: &Placement,
) -> f64 {
    // The device at index 0 has the largest part of every split.
    let share = |(sbp, shape): (&NdSbp, &Vec<usize>)| {
        let local = local_region(shape, sbp, placement, 0).element_count();
        local as f64 / element_count(shape).max(1) as f64
    };
    let inputs = signature.inputs.iter().zip(input_shapes);
    let operands = inputs.chain(signature.outputs.iter().zip(output_shapes));
    whole_seconds * operands.filter(|o| element_count(o.1) > 0).map(share).fold(1.0, f64::min)
}

/// A cache of boxing costs. Layouts and shapes are interned as indices.
#[derive(Default)]
pub(super) struct CostCache {
    model: CostModel,
    layouts: Vec<PlacedLayout>,
    layout_ids: HashMap<PlacedLayout, usize>,
    /// For each layout, the id of [`NdSbp::reduced`].
    reduced: Vec<usize>,
    shapes: Vec<(Vec<usize>, DType)>,
    tables: HashMap<(usize, Placement), CostTable>,
    /// By shape, source layout and target layout; NaN if not computed yet.
    seconds: Vec<Vec<Vec<f64>>>,
}

impl CostCache {
    pub(super) fn new(model: CostModel) -> Self {
        Self { model, ..Self::default() }
    }

    pub(super) fn layout_id(&mut self, layout: PlacedLayout) -> usize {
        if let Some(&id) = self.layout_ids.get(&layout) {
            return id;
        }
        let id = self.layouts.len();
        self.layouts.push(layout.clone());
        self.layout_ids.insert(layout.clone(), id);
        self.reduced.push(id);
        let sbp = layout.sbp.reduced();
        self.reduced[id] = self.layout_id(PlacedLayout { sbp, ..layout });
        id
    }

    pub(super) fn layout(&self, id: usize) -> &PlacedLayout {
        &self.layouts[id]
    }

    pub(super) fn reduced(&self, id: usize) -> usize {
        self.reduced[id]
    }

    pub(super) fn shape_id(&mut self, shape: &[usize], dtype: DType) -> usize {
        let position = self.shapes.iter().position(|s| s.0 == shape && s.1 == dtype);
        position.unwrap_or_else(|| {
            self.shapes.push((shape.to_vec(), dtype));
            self.shapes.len() - 1
        })
    }

    /// The cost of boxing; infinity if it is impossible.
    pub(super) fn boxing_seconds(&mut self, shape: usize, from: usize, to: usize) -> f64 {
        if from == to {
            return 0.0;
        }
        let cached = self.seconds.get(shape).and_then(|s| s.get(from)?.get(to));
        if let Some(&seconds) = cached.filter(|s| !s.is_nan()) {
            return seconds;
        }
        let seconds = self.planned_seconds(shape, from, to);
        self.seconds.resize_with(self.shapes.len(), Vec::new);
        self.seconds[shape].resize_with(self.layouts.len(), Vec::new);
        self.seconds[shape][from].resize(self.layouts.len(), f64::NAN);
        self.seconds[shape][from][to] = seconds;
        seconds
    }

    fn planned_seconds(&mut self, shape: usize, from: usize, to: usize) -> f64 {
        let (from, to, (dims, dtype)) = (&self.layouts[from], &self.layouts[to], &self.shapes[shape]);
        if from.placement != to.placement {
            return plan(dims, *dtype, from, to, &self.model).map_or(f64::INFINITY, |p| p.cost_seconds);
        }
        let new = || CostTable::new(dims, *dtype, &from.placement, &self.model);
        self.tables.entry((shape, from.placement.clone())).or_insert_with(new).seconds(&from.sbp, &to.sbp)
    }
}
