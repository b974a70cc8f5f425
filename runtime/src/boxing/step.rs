//! One step of a layout change: its kind, the work of each device, and the bytes that each device receives.

use std::fmt;

use shardflow_kernels::collective::{CollectiveKind, Ranks, ReduceOp};
use shardflow_kernels::tensor::regions::{Regions, SplitAxis};
use shardflow_kernels::tensor::{DType, Region, split_range};

use crate::sbp::{NdSbp, PlacedLayout, Sbp, for_each_class, local_region};

/// The kind of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StepKind {
    /// Each device keeps a part of its shard (or the whole shard, if only the layout's notation changes).
    Slice,
    /// Each device extends its shard to a partial term. The added elements are zero (`Sum`) or minus infinity (`Max`).
    Pad(ReduceOp),
    /// Changes `Partial` to `Broadcast`.
    AllReduce(ReduceOp),
    /// Changes `Partial` to `Split`.
    ReduceScatter(ReduceOp),
    /// Changes `Split` to `Broadcast`.
    AllGather,
    /// Any other change between layouts without `Partial`.
    AllToAll,
    /// A copy to another placement.
    Transfer,
}

impl StepKind {
    /// Number of rounds of messages. Each round costs one latency. An all-reduce takes the rounds of a reduce-scatter
    /// and of an all-gather.
    pub fn rounds(self) -> usize {
        match self {
            Self::Slice | Self::Pad(_) => 0,
            Self::AllReduce(_) => 2,
            _ => 1,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Slice => "slice",
            Self::Pad(_) => "pad",
            Self::AllReduce(_) => "all-reduce",
            Self::ReduceScatter(_) => "reduce-scatter",
            Self::AllGather => "all-gather",
            Self::AllToAll => "all-to-all",
            Self::Transfer => "transfer",
        }
    }
}

/// One step: a collective over each group of devices, a local copy, or a transfer.
#[derive(Clone, Debug, PartialEq)]
pub struct BoxingStep {
    /// The kind of step.
    pub kind: StepKind,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// Element type of the tensor.
    pub dtype: DType,
    /// Layout before the step.
    pub from: PlacedLayout,
    /// Layout after the step.
    pub to: PlacedLayout,
    /// The axes along which the members of a group differ; empty for a transfer.
    pub axes: Vec<usize>,
    /// Elements that the busiest device of `to.placement` receives from other devices.
    pub elements_max: usize,
    /// Duration of the step according to the cost model.
    pub cost_seconds: f64,
}

/// The work of one device in a step.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the comments of the variants name the fields")]
pub enum LocalStep {
    /// The shard is unchanged, so the output may use the input's buffer.
    Keep,
    /// Fill the output with `fill`, if given. Then copy the input's box to the output's box, if `copy` is given.
    Local { fill: Option<f32>, copy: Option<(Region, Region)> },
    /// Call a collective that reads the input shard and writes the output shard.
    Call(GroupCall),
    /// Copy boxes from source devices, possibly including this device. Together, the boxes fill the output shard.
    Pull(Vec<Pull>),
}

/// One member's call of a collective; the plan adds the group's id to make it a `CollectiveCall`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupCall {
    /// Ranks of the members, in order.
    pub ranks: Ranks,
    /// Index of this device in `ranks`.
    pub member: usize,
    /// The collective; its regions are relative to the part of the tensor that the group shares.
    pub kind: CollectiveKind,
}

/// A box that a device copies from a source device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pull {
    /// Rank of the source device.
    pub from_device: usize,
    /// The box in the source device's shard.
    pub src: Region,
    /// The box in this device's target shard.
    pub dst: Region,
}

/// Returns the kind and the group axes of a layout change on one placement, if a single step can make this change.
pub(super) fn classify(sizes: &[usize], from: &NdSbp, to: &NdSbp) -> Option<(StepKind, Vec<usize>)> {
    let changed: Vec<usize> = (0..from.0.len()).filter(|&a| from.0[a] != to.0[a]).collect();
    if changed.iter().all(|&a| sizes[a] == 1) {
        return Some((StepKind::Slice, changed));
    }
    let axes = add_nested_axes(&changed, from, to);
    let all = |layout: &NdSbp, test: fn(Sbp) -> bool| changed.iter().all(|&a| test(layout.0[a]));
    let is_split = |sbp| matches!(sbp, Sbp::Split(_));
    let kind = match (all(from, Sbp::is_partial), all(to, Sbp::is_partial)) {
        (true, false) => {
            let op = from.partial()?;
            match () {
                () if all(to, |s| s == Sbp::Broadcast) => StepKind::AllReduce(op),
                () if all(to, is_split) && axes == changed => StepKind::ReduceScatter(op),
                () => return None,
            }
        }
        (false, true) if all(from, |s| !s.is_partial()) && axes == changed => StepKind::Pad(to.partial()?),
        (false, false) if all(from, |s| !s.is_partial()) && all(to, |s| !s.is_partial()) => match () {
            () if axes != changed => StepKind::AllToAll,
            () if all(from, |s| s == Sbp::Broadcast) => StepKind::Slice,
            () if all(from, is_split) && all(to, |s| s == Sbp::Broadcast) => StepKind::AllGather,
            () => StepKind::AllToAll,
        },
        _ => return None,
    };
    Some((kind, axes))
}

/// Returns `changed` and each later axis that splits the same dim as a changed axis, in `from` or in `to`. After the
/// change, the later axis divides different parts of that dim, so elements also move along the later axis.
fn add_nested_axes(changed: &[usize], from: &NdSbp, to: &NdSbp) -> Vec<usize> {
    let splits = |axis: usize, dim: usize| from.0[axis] == Sbp::Split(dim) || to.0[axis] == Sbp::Split(dim);
    let nested = |axis: usize| {
        changed.iter().any(|&c| {
            let mut dims = [from.0[c], to.0[c]].into_iter().filter_map(Sbp::split_dim);
            c < axis && dims.any(|dim| splits(axis, dim))
        })
    };
    (0..from.0.len()).filter(|&a| changed.contains(&a) || nested(a)).collect()
}

/// Number of elements that a device receives in a collective of `members` devices, computed from the device's regions
/// before and after the collective. The formulas are those of `shardflow_kernels::collective`.
fn elements_received(kind: StepKind, (member, members): (usize, usize), before: &Region, after: &Region) -> usize {
    match kind {
        StepKind::Slice | StepKind::Pad(_) => 0,
        StepKind::AllReduce(_) => {
            let chunk = split_range(before.element_count(), members, member).len();
            (members - 1) * chunk + before.element_count() - chunk
        }
        StepKind::ReduceScatter(_) => (members - 1) * after.element_count(),
        StepKind::AllGather | StepKind::AllToAll | StepKind::Transfer => after.element_count() - common(before, after),
    }
}

/// Number of elements that the busiest device of a placement receives. `sizes` are the sizes of all axes of the
/// placement, and `axes` are the axes of the group.
pub(super) fn elements_max(
    kind: StepKind,
    axes: &[usize],
    shape: &[usize],
    sizes: &[usize],
    layouts: [&NdSbp; 2],
) -> usize {
    if matches!(kind, StepKind::Slice | StepKind::Pad(_)) {
        return 0;
    }
    let members = axes.iter().map(|&axis| sizes[axis]).product();
    let mut max = 0;
    // The first member of a group has the largest chunk.
    for_each_class(shape, sizes, layouts, |before, after| {
        max = max.max(elements_received(kind, (0, members), &before, &after));
    });
    max
}

pub(super) fn common(a: &Region, b: &Region) -> usize {
    a.intersect(b).map_or(0, |r| r.element_count())
}

impl BoxingStep {
    /// Shape of the output shard of the device at this index of `to.placement`.
    pub fn output_shape(&self, index: usize) -> Vec<usize> {
        self.to.region(&self.shape, index).size
    }

    /// Bytes that the busiest device of `to.placement` receives from other devices.
    pub fn bytes_received_max(&self) -> usize {
        self.elements_max * self.dtype.bytes()
    }

    /// Bytes that the device at this index of `to.placement` receives from other devices.
    pub fn bytes_received(&self, index: usize) -> usize {
        let after = self.to.region(&self.shape, index);
        let elements = if self.kind == StepKind::Transfer {
            let own = self.from.placement.index_of(self.to.placement.devices()[index]);
            after.element_count() - own.map_or(0, |own| common(&self.from.region(&self.shape, own), &after))
        } else {
            let placement = &self.from.placement;
            let own = (placement.group_member(index, &self.axes), placement.group_len(&self.axes));
            elements_received(self.kind, own, &self.from.region(&self.shape, index), &after)
        };
        elements * self.dtype.bytes()
    }

    /// True if [`BoxingStep::local`] is [`LocalStep::Keep`] on all devices.
    pub fn is_kept_everywhere(&self) -> bool {
        let is_copied = |&axis: &usize| self.from.sbp.0[axis] == Sbp::Broadcast && self.axis_size(axis) > 1;
        match self.kind {
            StepKind::Slice => {}
            StepKind::Pad(op) if op == ReduceOp::Max || !self.axes.iter().any(is_copied) => {}
            _ => return false,
        }
        let sizes: Vec<usize> = self.from.placement.axes().iter().map(|axis| axis.size).collect();
        let mut is_kept = true;
        for_each_class(&self.shape, &sizes, [&self.from.sbp, &self.to.sbp], |before, after| {
            is_kept &= before == after;
        });
        is_kept
    }

    fn axis_size(&self, axis: usize) -> usize {
        self.from.placement.axes()[axis].size
    }

    /// The work of the device at this index of `to.placement`. In a transfer, devices that are only in `from.placement`
    /// do nothing, but must not change their shard while other devices read it.
    pub fn local(&self, index: usize) -> LocalStep {
        match self.kind {
            StepKind::Transfer => LocalStep::Pull(pulls(self, index)),
            StepKind::Slice => self.slice(index),
            StepKind::Pad(op) => self.pad(index, op),
            _ => LocalStep::Call(self.call(index)),
        }
    }

    fn slice(&self, index: usize) -> LocalStep {
        let (before, after) = (self.from.region(&self.shape, index), self.to.region(&self.shape, index));
        if before == after {
            return LocalStep::Keep;
        }
        let copy = (!after.is_empty()).then(|| (after.relative_to(&before), Region::whole(&after.size)));
        LocalStep::Local { fill: None, copy }
    }

    fn pad(&self, index: usize, op: ReduceOp) -> LocalStep {
        let (before, after) = (self.from.region(&self.shape, index), self.to.region(&self.shape, index));
        // A sum must not count copies twice: along an axis with copies, only coordinate 0 keeps its copy.
        let coords = self.from.placement.coords(index);
        let is_extra_copy = |&axis: &usize| self.from.sbp.0[axis] == Sbp::Broadcast && coords[axis] > 0;
        let is_term = op == ReduceOp::Max || !self.axes.iter().any(is_extra_copy);
        if is_term && before == after {
            return LocalStep::Keep;
        }
        let fill = match op {
            ReduceOp::Sum => 0.0,
            ReduceOp::Max => f32::NEG_INFINITY,
        };
        let copy = (is_term && !before.is_empty()).then(|| (Region::whole(&before.size), before.relative_to(&after)));
        LocalStep::Local { fill: Some(fill), copy }
    }

    fn call(&self, index: usize) -> GroupCall {
        let placement = &self.from.placement;
        // The axes outside the group determine the part of the whole tensor that the group shares.
        let mut others = self.from.sbp.clone();
        self.axes.iter().for_each(|&a| others.0[a] = Sbp::Broadcast);
        let outer = local_region(&self.shape, &others, placement, index);
        // No axis outside the group divides parts of the group ([`add_nested_axes`]).
        let parts = |layout: &PlacedLayout| {
            let axes = (0..placement.axes().len()).filter(|a| self.axes.contains(a));
            let axis = |a: usize| SplitAxis { count: self.axis_size(a), dim: layout.sbp.0[a].split_dim() };
            Regions::split(&outer.size, axes.map(axis))
        };
        let kind = match self.kind {
            StepKind::AllReduce(op) => CollectiveKind::AllReduce { op },
            StepKind::ReduceScatter(op) => CollectiveKind::ReduceScatter { op, parts: parts(&self.to) },
            StepKind::AllGather => CollectiveKind::AllGather { parts: parts(&self.from) },
            _ => CollectiveKind::AllToAll { sources: parts(&self.from), targets: parts(&self.to) },
        };
        let (ranks, member) = (placement.group_ranks(index, &self.axes), placement.group_member(index, &self.axes));
        GroupCall { ranks, member, kind }
    }
}

impl fmt::Display for BoxingStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axes: Vec<&str> = self.axes.iter().map(|&a| self.from.placement.axes()[a].name.as_str()).collect();
        let most = self.bytes_received_max();
        match self.kind {
            StepKind::Transfer => write!(f, "transfer: {} -> {}", self.from, self.to)?,
            kind => write!(f, "{} over {}: {} -> {}", kind.name(), axes.join("+"), self.from.sbp, self.to.sbp)?,
        }
        write!(f, ", {most} bytes")
    }
}

/// The devices that hold one region. They have the same coordinates on the axes that split the tensor.
struct Holders {
    region: Region,
    /// Coordinates of the holder with the lowest index.
    coords: Vec<usize>,
}

impl Holders {
    fn contain(&self, layout: &PlacedLayout, index: usize) -> bool {
        let coords = layout.placement.coords(index).into_iter().zip(&self.coords);
        coords.zip(&layout.sbp.0).all(|((a, b), sbp)| a == *b || sbp.split_dim().is_none())
    }

    /// The indices of the holders, in order.
    fn indices(&self, layout: &PlacedLayout) -> Vec<usize> {
        let axes: Vec<usize> = (0..self.coords.len()).filter(|&a| layout.sbp.0[a].split_dim().is_none()).collect();
        layout.placement.group_of(layout.placement.index_at(&self.coords), &axes)
    }
}

/// The holders of each region that overlaps `wanted`, in the order of their lowest indices.
fn holders_of(wanted: &Region, shape: &[usize], layout: &PlacedLayout) -> Vec<Holders> {
    let mut all = vec![Holders { region: Region::whole(shape), coords: Vec::new() }];
    for (axis, sbp) in layout.placement.axes().iter().zip(&layout.sbp.0) {
        let mut divided = Vec::new();
        for holders in all {
            let coordinates = if let Sbp::Split(_) = sbp { 0..axis.size } else { 0..1 };
            for coordinate in coordinates {
                let mut region = holders.region.clone();
                if let Sbp::Split(dim) = *sbp {
                    let part = split_range(region.size[dim], axis.size, coordinate);
                    region.start[dim] += part.start;
                    region.size[dim] = part.len();
                }
                if region.intersect(wanted).is_some() {
                    let coords = holders.coords.iter().copied().chain([coordinate]).collect();
                    divided.push(Holders { region, coords });
                }
            }
        }
        all = divided;
    }
    all.retain(|holders| holders.region.intersect(wanted).is_some());
    all
}

/// The boxes that the device at `index` of the target placement pulls. The source of a box is a holder: preferably the
/// target device itself, else the source device at the target's coordinates, else the result of `least_pulled`.
fn pulls(step: &BoxingStep, index: usize) -> Vec<Pull> {
    let region = step.to.region(&step.shape, index);
    let mut pulls = Vec::new();
    for holders in holders_of(&region, &step.shape, &step.from) {
        let Some(common) = holders.region.intersect(&region) else { continue };
        let holder = preferred(step, &holders, index).unwrap_or_else(|| least_pulled(step, &holders, index));
        let (src, dst) = (common.relative_to(&holders.region), common.relative_to(&region));
        pulls.push(Pull { from_device: step.from.placement.devices()[holder], src, dst });
    }
    pulls
}

/// The target device itself if it is a holder, else the source device at the target's coordinates if it is a holder.
fn preferred(step: &BoxingStep, holders: &Holders, index: usize) -> Option<usize> {
    let (source, target) = (&step.from.placement, &step.to.placement);
    let own = source.index_of(target.devices()[index]).filter(|&own| holders.contain(&step.from, own));
    own.or_else(|| {
        let same_axes = source.axes().iter().map(|a| a.size).eq(target.axes().iter().map(|a| a.size));
        Some(index).filter(|&index| same_axes && holders.contain(&step.from, index))
    })
}

/// The holder from which the target devices before `index` pull the fewest elements. Computes the choices of these
/// devices again to count the elements.
fn least_pulled(step: &BoxingStep, holders: &Holders, index: usize) -> usize {
    let indices = holders.indices(&step.from);
    let mut pulled = vec![0; indices.len()];
    let readers = holders_of(&holders.region, &step.shape, &step.to);
    let mut readers: Vec<usize> = readers.iter().flat_map(|reader| reader.indices(&step.to)).collect();
    readers.sort_unstable();
    for reader in readers {
        let least = || (0..pulled.len()).min_by_key(|&position| pulled[position]).unwrap_or(0);
        if reader == index {
            return indices[least()];
        }
        let preferred = preferred(step, holders, reader);
        let position = preferred.and_then(|holder| indices.binary_search(&holder).ok()).unwrap_or_else(least);
        let is_own = step.from.placement.devices()[indices[position]] == step.to.placement.devices()[reader];
        if !is_own {
            let common = step.to.region(&step.shape, reader).intersect(&holders.region);
            pulled[position] += common.map_or(0, |common| common.element_count());
        }
    }
    indices[0]
}
