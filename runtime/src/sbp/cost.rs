//! The cost of a choice of layouts: boxing between interned layouts, and compute.

use std::collections::HashMap;

use shardflow_kernels::tensor::{DType, element_count};

use super::rule::NdSignature;
use super::{NdSbp, PlacedLayout, local_region};
use crate::boxing::Planner;
use crate::placement::Placement;

/// Seconds of an op on the busiest device of a placement under a signature. The unsharded op takes `whole_seconds`. The
/// time is proportional to the smallest share of an operand on that device, because one operand has all split factors.
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

/// Boxing costs between interned layouts of interned shapes. Each cost is looked up in the planner once.
pub(super) struct CostCache<'a> {
    planner: &'a mut Planner,
    placement_ids: HashMap<Placement, usize>,
    layouts: Vec<PlacedLayout>,
    /// Ids of layouts, by placement and layout.
    layout_ids: HashMap<(usize, NdSbp), usize>,
    /// For each layout, the id of [`NdSbp::reduced`].
    reduced: Vec<usize>,
    shapes: Vec<(Vec<usize>, DType)>,
    shape_ids: HashMap<(Vec<usize>, DType), usize>,
    /// Boxing costs, by shape, source layout and target layout.
    seconds: HashMap<(usize, usize, usize), f64>,
}

impl<'a> CostCache<'a> {
    pub(super) fn new(planner: &'a mut Planner) -> Self {
        Self {
            planner,
            placement_ids: HashMap::new(),
            layouts: Vec::new(),
            layout_ids: HashMap::new(),
            reduced: Vec::new(),
            shapes: Vec::new(),
            shape_ids: HashMap::new(),
            seconds: HashMap::new(),
        }
    }

    pub(super) fn placement_id(&mut self, placement: &Placement) -> usize {
        let next = self.placement_ids.len();
        *self.placement_ids.entry(placement.clone()).or_insert(next)
    }

    /// The id of a layout on this placement, whose own id is `placement_id`.
    pub(super) fn layout_id(&mut self, placement: &Placement, placement_id: usize, sbp: &NdSbp) -> usize {
        if let Some(&id) = self.layout_ids.get(&(placement_id, sbp.clone())) {
            return id;
        }
        let id = self.layouts.len();
        self.layouts.push(PlacedLayout { placement: placement.clone(), sbp: sbp.clone() });
        self.layout_ids.insert((placement_id, sbp.clone()), id);
        self.reduced.push(id);
        self.reduced[id] = self.layout_id(placement, placement_id, &sbp.reduced());
        id
    }

    pub(super) fn layout(&self, id: usize) -> &PlacedLayout {
        &self.layouts[id]
    }

    pub(super) fn reduced(&self, id: usize) -> usize {
        self.reduced[id]
    }

    pub(super) fn shape_id(&mut self, shape: &[usize], dtype: DType) -> usize {
        let key = (shape.to_vec(), dtype);
        *self.shape_ids.entry(key).or_insert_with_key(|key| {
            self.shapes.push(key.clone());
            self.shapes.len() - 1
        })
    }

    /// The cost of boxing; infinity if it is impossible.
    pub(super) fn boxing_seconds(&mut self, shape: usize, from: usize, to: usize) -> f64 {
        if from == to {
            return 0.0;
        }
        let Self { planner, layouts, shapes, seconds, .. } = self;
        let (dims, dtype) = &shapes[shape];
        let planned = || planner.seconds(dims, *dtype, &layouts[from], &layouts[to]);
        *seconds.entry((shape, from, to)).or_insert_with(planned)
    }
}
