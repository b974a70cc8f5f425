//! Layouts: the part of a tensor on each device of a placement, as `Split`, `Broadcast` or `Partial` along each axis.
//!
//! SBP is from OneFlow, Yuan et al. 2021, <https://arxiv.org/abs/2110.15032>.

pub(crate) mod choose;
pub(crate) mod cost;
pub mod region;
pub mod rule;

use std::collections::BTreeMap;
use std::fmt;

use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::tensor::{DType, HostData, HostTensor, Region, split_range};

use crate::layout_error::LayoutError;
use crate::placement::Placement;
use region::{copy_box, filled, slice_region};

/// The layout of a tensor along one mesh axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sbp {
    /// Each coordinate holds a part of this dim, divided as in [`split_range`].
    Split(usize),
    /// Each coordinate holds a bit-identical copy of the tensor.
    Broadcast,
    /// Each coordinate holds a term of every element; the reduction of the terms is the tensor.
    Partial(ReduceOp),
}

impl Sbp {
    /// True for [`Sbp::Partial`].
    pub fn is_partial(self) -> bool {
        matches!(self, Self::Partial(_))
    }

    pub(crate) fn split_dim(self) -> Option<usize> {
        if let Self::Split(dim) = self { Some(dim) } else { None }
    }

    fn parse(text: &str) -> Option<Self> {
        match text {
            "B" => Some(Self::Broadcast),
            "P" => Some(Self::Partial(ReduceOp::Sum)),
            "Pmax" => Some(Self::Partial(ReduceOp::Max)),
            _ => text.strip_prefix('S')?.parse().ok().map(Self::Split),
        }
    }
}

impl fmt::Display for Sbp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Split(dim) => write!(f, "S{dim}"),
            Self::Broadcast => f.write_str("B"),
            Self::Partial(ReduceOp::Sum) => f.write_str("P"),
            Self::Partial(ReduceOp::Max) => f.write_str("Pmax"),
        }
    }
}

/// One [`Sbp`] for each axis of a placement. If two axes split one dim, the later axis splits the earlier axis's parts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NdSbp(pub Vec<Sbp>);

impl NdSbp {
    /// The whole tensor on every device.
    pub fn broadcast(axes: usize) -> Self {
        Self(vec![Sbp::Broadcast; axes])
    }

    /// True if the device at these coordinates holds the first copy of its part: no device with a lower index in the
    /// placement has an equal part.
    pub fn is_first_copy(&self, coords: &[usize]) -> bool {
        self.0.iter().zip(coords).all(|(sbp, at)| *sbp != Sbp::Broadcast || *at == 0)
    }

    /// Indices of the `Broadcast` axes. Devices that differ only along these axes hold copies of the same part.
    pub(crate) fn broadcast_axes(&self) -> Vec<usize> {
        (0..self.0.len()).filter(|&axis| self.0[axis] == Sbp::Broadcast).collect()
    }

    /// Parses `(S0, B)`, `S0,B` or, for a placement without axes, `()`.
    ///
    /// # Errors
    /// Returns an error if an entry is not `S<dim>`, `B`, `P` (sum) or `Pmax`.
    pub fn parse(text: &str) -> Result<Self, LayoutError> {
        let inner = text.trim();
        let inner = inner.strip_prefix('(').and_then(|t| t.strip_suffix(')')).unwrap_or(inner).trim();
        if inner.is_empty() {
            return Ok(Self(Vec::new()));
        }
        let syntax = |part: &str| LayoutError::LayoutSyntax { text: text.into(), part: part.into() };
        let entry = |part: &str| Sbp::parse(part.trim()).ok_or_else(|| syntax(part.trim()));
        Ok(Self(inner.split(',').map(entry).collect::<Result<_, _>>()?))
    }

    /// The reduction of the `Partial` axes, if there are any.
    pub fn partial(&self) -> Option<ReduceOp> {
        self.0.iter().find_map(|sbp| if let Sbp::Partial(op) = sbp { Some(*op) } else { None })
    }

    /// True if axes are `Partial` with different reductions. That is invalid: a sum of maxima is not a maximum of sums.
    pub fn mixes_reductions(&self) -> bool {
        self.0.iter().any(|sbp| matches!(sbp, Sbp::Partial(op) if self.partial() != Some(*op)))
    }

    /// The layout after a reduction: each `Partial` becomes `Broadcast`.
    pub fn reduced(&self) -> Self {
        let reduce = |&sbp: &Sbp| if sbp.is_partial() { Sbp::Broadcast } else { sbp };
        Self(self.0.iter().map(reduce).collect())
    }

    /// Checks that a tensor of this shape can have this layout on `placement`.
    ///
    /// # Errors
    /// Returns an error if the layout does not have one entry for each axis, splits a dim that does not exist, or mixes
    /// reductions.
    pub fn check(&self, shape: &[usize], placement: &Placement) -> Result<(), LayoutError> {
        let axes = placement.axes().len();
        let why = if self.mixes_reductions() {
            "it mixes two different reductions".into()
        } else if let Some(dim) = self.0.iter().filter_map(|sbp| sbp.split_dim()).find(|dim| *dim >= shape.len()) {
            format!("the tensor has no dim {dim}")
        } else if self.0.len() != axes {
            format!("expected one entry for each of {axes} mesh axes, got {}", self.0.len())
        } else {
            return Ok(());
        };
        Err(self.error(shape, placement, why))
    }

    /// Checks that a tensor of this type can have this layout.
    fn check_dtype(&self, tensor: &HostTensor, placement: &Placement) -> Result<(), LayoutError> {
        if tensor.as_i32().is_some() && self.partial().is_some() {
            return Err(self.error(&tensor.shape, placement, "integer tensors cannot be partial".into()));
        }
        Ok(())
    }

    fn error(&self, shape: &[usize], placement: &Placement, why: String) -> LayoutError {
        LayoutError::Layout { layout: self.to_string(), shape: shape.to_vec(), mesh: placement.axes_text(), why }
    }
}

impl fmt::Display for NdSbp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries: Vec<String> = self.0.iter().map(Sbp::to_string).collect();
        write!(f, "({})", entries.join(", "))
    }
}

/// A layout with its placement.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlacedLayout {
    /// The devices.
    pub placement: Placement,
    /// One entry for each of the placement's axes.
    pub sbp: NdSbp,
}

impl PlacedLayout {
    /// The region of a tensor of this shape on the device at `index` of the placement, see [`local_region`].
    pub fn region(&self, shape: &[usize], index: usize) -> Region {
        local_region(shape, &self.sbp, &self.placement, index)
    }
}

impl fmt::Display for PlacedLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on {}", self.sbp, self.placement)
    }
}

/// The region of a tensor of this shape on the device at `index`. `Partial` does not restrict the region, because a
/// device holds a term of each element. Parts may be uneven and empty. The layout must have passed [`NdSbp::check`].
pub fn local_region(shape: &[usize], layout: &NdSbp, placement: &Placement, index: usize) -> Region {
    region_at(shape, layout, placement.axes().iter().map(|axis| axis.size), &placement.coords(index))
}

/// Like [`local_region`], for the device with these coordinates on axes of these sizes.
pub(crate) fn region_at(
    shape: &[usize],
    layout: &NdSbp,
    sizes: impl IntoIterator<Item = usize>,
    coords: &[usize],
) -> Region {
    let mut region = Region::whole(shape);
    for ((sbp, size), &coordinate) in layout.0.iter().zip(sizes).zip(coords) {
        if let Sbp::Split(dim) = *sbp {
            let part = split_range(region.size[dim], size, coordinate);
            region.start[dim] += part.start;
            region.size[dim] = part.len();
        }
    }
    region
}

/// Calls `f` for one device of each class, with its regions under two layouts. `sizes` are the sizes of the axes. The
/// first device has coordinate 0 on all axes.
///
/// All devices of a class agree in three sizes: those of the two regions, and that of the regions' common part. Along
/// an axis that neither layout splits, all coordinates are in one class. An axis that splits a dim makes parts of two
/// sizes, larger ones first. So a class begins at the coordinate that equals the remainder of the division. These
/// classes suffice if one layout divides the parts of the other layout, because the smaller region is then the common
/// part. Otherwise the size of the common part depends on the position, and each coordinate is a class.
pub(crate) fn for_each_class(
    shape: &[usize],
    sizes: &[usize],
    [from, to]: [&NdSbp; 2],
    mut f: impl FnMut(Region, Region),
) {
    let coordinates = class_coordinates(shape, sizes, [from, to]);
    // The position in each axis' list of coordinates.
    let mut positions = vec![0; sizes.len()];
    loop {
        let coords: Vec<usize> = coordinates.iter().zip(&positions).map(|(list, &position)| list[position]).collect();
        let region = |layout| region_at(shape, layout, sizes.iter().copied(), &coords);
        f(region(from), region(to));
        let Some(axis) = (0..positions.len()).rev().find(|&a| positions[a] + 1 < coordinates[a].len()) else { return };
        positions[axis] += 1;
        positions[axis + 1..].fill(0);
    }
}

/// For each axis, the first coordinate of each class.
fn class_coordinates(shape: &[usize], sizes: &[usize], layouts: [&NdSbp; 2]) -> Vec<Vec<usize>> {
    let mut coordinates = vec![vec![0]; sizes.len()];
    for (dim, &extent) in shape.iter().enumerate() {
        let axes = layouts.map(|layout| -> Vec<usize> {
            (0..sizes.len()).filter(|&a| sizes[a] > 1 && layout.0[a].split_dim() == Some(dim)).collect()
        });
        let is_nested = axes[0].starts_with(&axes[1]) || axes[1].starts_with(&axes[0]);
        for axes in &axes {
            // The extents of the parts that the next axis divides: one or two different values.
            let mut extents = vec![extent];
            for &axis in axes {
                let size = sizes[axis];
                let boundaries = extents.iter().map(|extent| extent % size);
                coordinates[axis].extend(boundaries.filter(|boundary| *boundary > 0));
                if !is_nested {
                    coordinates[axis].extend(0..size);
                }
                extents = extents.iter().flat_map(|extent| [extent / size, extent.div_ceil(size)]).collect();
                extents.sort_unstable();
                extents.dedup();
            }
        }
    }
    for list in &mut coordinates {
        list.sort_unstable();
        list.dedup();
    }
    coordinates
}

/// Splits a tensor into one shard for each device, by index. The terms of `Partial` floats are random, from `seed`, so
/// tests detect a lost or duplicated term. For `Sum`, the terms are small integers, and the last one completes the
/// value. For `Max`, one of the terms is the value, and the others are smaller. Integers below 2^20 stay exact.
///
/// # Errors
/// Returns an error if the layout does not fit the shape and placement, or is `Partial` for an integer tensor.
pub fn scatter(
    whole: &HostTensor,
    layout: &NdSbp,
    placement: &Placement,
    seed: u64,
) -> Result<Vec<HostTensor>, LayoutError> {
    layout.check(&whole.shape, placement)?;
    layout.check_dtype(whole, placement)?;
    let (devices, region) = (0..placement.device_count(), |index| local_region(&whole.shape, layout, placement, index));
    let (Some(op), Some(values)) = (layout.partial(), whole.as_f32()) else {
        return Ok(devices.map(|index| slice_region(whole, &region(index))).collect());
    };
    let mut terms_by_device = vec![whole.clone(); placement.device_count()];
    let partial_axes: Vec<usize> = (0..layout.0.len()).filter(|&a| layout.0[a].is_partial()).collect();
    // A group of devices that differ only along the partial axes holds the terms of an element. Other groups hold other
    // elements, or copies that must be bit-identical, so each group starts from the same seed.
    for group in placement.group_indices(&partial_axes) {
        let mut state = seed;
        for (element, &value) in values.iter().enumerate() {
            let terms = random_terms(value, op, group.len(), &mut state);
            for (&index, term) in group.iter().zip(terms) {
                if let HostData::F32(data) = &mut terms_by_device[index].data {
                    data[element] = term;
                }
            }
        }
    }
    Ok(devices.map(|index| slice_region(&terms_by_device[index], &region(index))).collect())
}

fn random_terms(value: f32, op: ReduceOp, count: usize, state: &mut u64) -> Vec<f32> {
    let mut next = || {
        // The linear congruential generator of Knuth's MMIX.
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) as usize
    };
    match op {
        ReduceOp::Sum => {
            let mut terms: Vec<f32> = (1..count).map(|_| (next() % 64) as f32 - 32.0).collect();
            terms.push(value - terms.iter().sum::<f32>());
            terms
        }
        ReduceOp::Max => {
            let mut terms: Vec<f32> = (0..count).map(|_| value - 1.0 - (next() % 64) as f32).collect();
            let holder = next() % count;
            terms[holder] = value;
            terms
        }
    }
}

/// Assembles a tensor of this shape from the first copies of its parts, each with its region. Combines terms of the same
/// region in the given order.
pub(crate) fn assemble(
    parts: impl IntoIterator<Item = (Region, HostTensor)>,
    shape: &[usize],
    op: Option<ReduceOp>,
) -> HostTensor {
    let mut sums: BTreeMap<(Vec<usize>, Vec<usize>), HostTensor> = BTreeMap::new();
    for (Region { start, size }, part) in parts {
        let key = (start, size);
        match sums.get_mut(&key) {
            Some(sum) => region::combine(sum, &part, op.unwrap_or(ReduceOp::Sum)),
            None => drop(sums.insert(key, part)),
        }
    }
    let mut whole = filled(shape, sums.values().next().map_or(DType::F32, HostTensor::dtype), 0.0);
    for ((start, size), sum) in sums {
        copy_box(&sum, &Region::whole(&sum.shape), &mut whole, &Region { start, size });
    }
    whole
}

/// Assembles a tensor of this shape from its shards (by index). Combines `Partial` terms in row-major order of the
/// devices. Takes the `Broadcast` copy at coordinate 0.
///
/// # Errors
/// Returns an error if the layout or a shard's shape or type does not fit, or `Broadcast` copies are not bit-identical.
pub fn gather(
    shards: &[HostTensor],
    shape: &[usize],
    layout: &NdSbp,
    placement: &Placement,
) -> Result<HostTensor, LayoutError> {
    layout.check(shape, placement)?;
    let error = |index: usize, expected: String, got: String| LayoutError::Shard {
        index,
        shape: shape.to_vec(),
        layout: layout.to_string(),
        expected,
        got,
    };
    if shards.len() != placement.device_count() {
        return Err(error(shards.len(), format!("{} shards", placement.device_count()), shards.len().to_string()));
    }
    for (index, shard) in shards.iter().enumerate() {
        let size = local_region(shape, layout, placement, index).size;
        if (&shard.shape, shard.dtype()) != (&size, shards[0].dtype()) {
            let text = |shape: &[usize], dtype| format!("{dtype:?} {shape:?}");
            return Err(error(index, text(&size, shards[0].dtype()), text(&shard.shape, shard.dtype())));
        }
    }
    layout.check_dtype(&shards[0], placement)?;
    let copies = placement.group_indices(&layout.broadcast_axes());
    for group in &copies {
        if let Some(index) = group.iter().find(|index| !region::same_bits(&shards[**index], &shards[group[0]])) {
            let first = format!("the same bits as shard {}", group[0]);
            return Err(error(*index, first, "different bits".into()));
        }
    }
    let region = |index| local_region(shape, layout, placement, index);
    let first = copies.iter().map(|group| (region(group[0]), shards[group[0]].clone()));
    Ok(assemble(first, shape, layout.partial()))
}

#[cfg(test)]
mod tests;
