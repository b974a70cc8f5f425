//! One step of a layout change: its kind, the work of each device, and the bytes that each device receives.

use std::fmt;

use shardflow_kernels::collective::{CollectiveKind, ReduceOp};
use shardflow_kernels::tensor::{DType, Region, split_range};

use crate::placement::Placement;
use crate::sbp::{NdSbp, PlacedLayout, Sbp, local_region};

/// The kind of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StepKind {
    /// Each device keeps a part of its shard (or the whole shard, if only the layout's notation changes).
    Slice,
    /// Each device extends its shard to a partial term: the rest is zero (`Sum`) or minus infinity (`Max`).
    Pad(ReduceOp),
    /// `Partial` to `Broadcast`.
    AllReduce(ReduceOp),
    /// `Partial` to `Split`.
    ReduceScatter(ReduceOp),
    /// `Split` to `Broadcast`.
    AllGather,
    /// Any other change among `Split` and `Broadcast`.
    AllToAll,
    /// A copy to another placement.
    Transfer,
}

impl StepKind {
    /// Rounds of messages, each of which costs one latency. An all-reduce is a reduce-scatter and an all-gather.
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
    /// Layout before.
    pub from: PlacedLayout,
    /// Layout after.
    pub to: PlacedLayout,
    /// The axes of the groups; empty for a transfer.
    pub axes: Vec<usize>,
    /// Bytes that each device of `to.placement` receives from others, by index.
    pub bytes_received: Vec<usize>,
    /// The cost by the cost model.
    pub cost_seconds: f64,
}

/// The work of one device in a step.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the comments of the variants name the fields")]
pub enum LocalStep {
    /// The shard is unchanged: the output may be the input's buffer.
    Keep,
    /// Fill the output with `fill`, if given, then copy a box of the input shard to one of the output, if given.
    Local { fill: Option<f32>, copy: Option<(Region, Region)> },
    /// Call a collective that reads the input shard and writes the output shard.
    Call(GroupCall),
    /// Copy boxes from devices of the source placement, maybe this one; together they fill the output shard.
    Pull(Vec<Pull>),
}

/// One member's call of a collective; the plan adds the group's id to make it a `CollectiveCall`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupCall {
    /// Ranks of the members, in order.
    pub ranks: Vec<usize>,
    /// Index of this device in `ranks`.
    pub member: usize,
    /// The collective; its regions are relative to the tensor that the group shares.
    pub kind: CollectiveKind,
}

/// A box that a device copies from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pull {
    /// Rank of the source device.
    pub from_device: usize,
    /// The box in the source device's shard.
    pub src: Region,
    /// The box in this device's target shard.
    pub dst: Region,
}

/// Returns the kind and the group axes of a layout change on one placement, if a single step makes it.
pub(super) fn classify(placement: &Placement, from: &NdSbp, to: &NdSbp) -> Option<(StepKind, Vec<usize>)> {
    let changed: Vec<usize> = (0..from.0.len()).filter(|&a| from.0[a] != to.0[a]).collect();
    if changed.iter().all(|&a| placement.axes()[a].size == 1) {
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

/// Adds to `changed` each later axis that splits the same dim as a changed axis, in `from` or in `to`. After the change
/// the later axis divides different parts of that dim, so elements also move between its coordinates.
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

/// Bytes that each device of `to.placement` receives, by its regions; formulas as in `shardflow_kernels::collective`.
pub(super) fn bytes_received(
    kind: StepKind,
    dtype: DType,
    groups: &[Vec<usize>],
    from: &[Region],
    to: &[Region],
) -> Vec<usize> {
    let mut bytes = vec![0; to.len()];
    for group in groups {
        for (member, &index) in group.iter().enumerate() {
            let (before, after, n) = (from[index].element_count(), to[index].element_count(), group.len());
            let elements = match kind {
                StepKind::Slice | StepKind::Pad(_) | StepKind::Transfer => 0,
                StepKind::AllReduce(_) => {
                    let chunk = split_range(before, n, member).len();
                    (n - 1) * chunk + before - chunk
                }
                StepKind::ReduceScatter(_) => (n - 1) * after,
                StepKind::AllGather | StepKind::AllToAll => after - common_elements(&from[index], &to[index]),
            };
            bytes[index] = elements * dtype.bytes();
        }
    }
    bytes
}

/// [`bytes_received`] for a transfer, given each target device's index in the source placement, if it is in both.
pub(super) fn bytes_pulled(dtype: DType, own_index: &[Option<usize>], from: &[Region], to: &[Region]) -> Vec<usize> {
    let bytes = |(region, own_index): (&Region, &Option<usize>)| {
        let held = own_index.map_or(0, |index| common_elements(&from[index], region));
        (region.element_count() - held) * dtype.bytes()
    };
    to.iter().zip(own_index).map(bytes).collect()
}

fn common_elements(a: &Region, b: &Region) -> usize {
    a.intersect(b).map_or(0, |r| r.element_count())
}

impl BoxingStep {
    /// Shape of the output shard of the device at this index of `to.placement`.
    pub fn output_shape(&self, index: usize) -> Vec<usize> {
        self.to.region(&self.shape, index).size
    }

    /// The work of the device at this index of `to.placement`. In a transfer, devices that are only in `from.placement`
    /// do nothing, but must not change their shard while others read it.
    pub fn local(&self, index: usize) -> LocalStep {
        match self.kind {
            StepKind::Transfer => LocalStep::Pull(self.pulls().swap_remove(index)),
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
        let mut groups = placement.group_indices(&self.axes);
        let position = groups.iter().position(|g| g.contains(&index)).unwrap_or(0);
        let group = groups.swap_remove(position);
        // The other axes determine the part of the whole tensor that a group shares.
        let mut others = self.from.sbp.clone();
        self.axes.iter().for_each(|&a| others.0[a] = Sbp::Broadcast);
        let outer = local_region(&self.shape, &others, placement, index);
        let parts = |layout: &PlacedLayout| -> Vec<Region> {
            let part = |&i: &usize| layout.region(&self.shape, i).relative_to(&outer);
            group.iter().map(part).collect()
        };
        let kind = match self.kind {
            StepKind::AllReduce(op) => CollectiveKind::AllReduce { op },
            StepKind::ReduceScatter(op) => CollectiveKind::ReduceScatter { op, parts: parts(&self.to) },
            StepKind::AllGather => CollectiveKind::AllGather { parts: parts(&self.from) },
            _ => CollectiveKind::AllToAll { sources: parts(&self.from), targets: parts(&self.to) },
        };
        let member = group.iter().position(|&i| i == index).unwrap_or(0);
        GroupCall { ranks: group.iter().map(|&i| placement.devices()[i]).collect(), member, kind }
    }

    /// The boxes that each target device pulls, by index. Of several holders of a box, the source is the target itself,
    /// else the device at its coordinates, else the device from which the fewest elements are pulled so far.
    fn pulls(&self) -> Vec<Vec<Pull>> {
        let (source, target) = (&self.from.placement, &self.to.placement);
        let same_axes = source.axes().iter().map(|a| a.size).eq(target.axes().iter().map(|a| a.size));
        // Source regions are either equal or disjoint, so each distinct region has a list of holders.
        let mut holders: Vec<(Region, Vec<usize>)> = Vec::new();
        for index in 0..source.device_count() {
            let region = self.from.region(&self.shape, index);
            match holders.iter_mut().find(|h| h.0 == region) {
                Some((_, indices)) => indices.push(index),
                None => holders.push((region, vec![index])),
            }
        }
        let mut pulled = vec![0; source.device_count()];
        let mut all = Vec::new();
        for (index, &device) in target.devices().iter().enumerate() {
            let region = self.to.region(&self.shape, index);
            let mut pulls = Vec::new();
            for (held, indices) in &holders {
                let Some(common) = held.intersect(&region) else { continue };
                let own = source.index_of(device).filter(|i| indices.contains(i));
                let same_coords = Some(index).filter(|i| same_axes && indices.contains(i));
                let least = indices.iter().copied().min_by_key(|&i| (pulled[i], i));
                let Some(holder) = own.or(same_coords).or(least) else { continue };
                if own.is_none() {
                    pulled[holder] += common.element_count();
                }
                let (src, dst) = (common.relative_to(held), common.relative_to(&region));
                pulls.push(Pull { from_device: source.devices()[holder], src, dst });
            }
            all.push(pulls);
        }
        all
    }
}

impl fmt::Display for BoxingStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axes: Vec<&str> = self.axes.iter().map(|&a| self.from.placement.axes()[a].name.as_str()).collect();
        let most = self.bytes_received.iter().max().copied().unwrap_or(0);
        match self.kind {
            StepKind::Transfer => write!(f, "transfer: {} -> {}", self.from, self.to)?,
            kind => write!(f, "{} over {}: {} -> {}", kind.name(), axes.join("+"), self.from.sbp, self.to.sbp)?,
        }
        write!(f, ", {most} bytes")
    }
}
