//! Boxes of tensors, copied from one address to another on a stream, and the parts of collectives that every engine of GPUs
//! has: who gives what to whom, and how much that is.

use super::context::Context;
use super::gpu::Gpu;
use super::lower;
use super::lower::collective::{MEMBERS_MAX, regions, start_of_piece};
use super::raw_stream::{Geometry, PARAMETERS_MAX, RawStream, Rows};
use super::step::{Arg, Operand, SHARED_BYTES_DEFAULT, Step};
use crate::collective::exchange::{all_reduce_foreign, taken};
use crate::collective::{CollectiveCall, CollectiveKind, ReduceOp};
use crate::error::KernelError;
use crate::op::{Buffer, Launch, Op};
use crate::region::for_each_run;
use crate::tensor::{DType, Region, element_count};

/// A tensor on the device, and a box of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StridedRegion<'a> {
    pub(crate) address: u64,
    pub(crate) shape: &'a [usize],
    pub(crate) region: &'a Region,
}

impl StridedRegion<'_> {
    /// Where the box lies when it lies in one piece: the address.
    fn contiguous(&self, dtype: DType) -> Option<u64> {
        start_of_piece(self.shape, self.region).map(|start| self.address + (start * dtype.bytes()) as u64)
    }
}

/// A [`StridedRegion`] that borrows nothing.
#[derive(Clone, Debug)]
pub(crate) struct OwnedRegion {
    pub(crate) address: u64,
    pub(crate) shape: Vec<usize>,
    pub(crate) region: Region,
}

impl OwnedRegion {
    /// A tensor of this shape.
    pub(crate) fn whole(address: u64, shape: &[usize]) -> Self {
        Self { address, shape: shape.to_vec(), region: Region::whole(shape) }
    }

    pub(crate) fn boxed(&self) -> StridedRegion<'_> {
        StridedRegion { address: self.address, shape: &self.shape, region: &self.region }
    }
}

/// Has all kernels loaded that are used here: loaded behind a collective that waits for another GPU, they would wait for it,
/// too. The context is bound.
pub(crate) fn prepare(gpu: &Gpu) -> Result<(), KernelError> {
    ["collective", "region"].iter().try_for_each(|module| gpu.modules().prepare(module))
}

/// Copies a box onto another of the same size.
pub(crate) fn copy_region(
    lane: &RawStream,
    from: StridedRegion<'_>,
    to: StridedRegion<'_>,
    dtype: DType,
) -> Result<(), KernelError> {
    if from.region.is_empty() {
        return Ok(());
    }
    if let (Some(source), Some(target)) = (from.contiguous(dtype), to.contiguous(dtype)) {
        return lane.copy(target, source, from.region.element_count() * dtype.bytes());
    }
    let buffer = |shape: &[usize]| Buffer { base: 0, offset: 0, shape: shape.to_vec(), dtype };
    let launch = Launch {
        op: Op::CopyRegion { src: from.region.clone(), dst: to.region.clone() },
        reads: vec![buffer(from.shape)],
        writes: vec![buffer(to.shape)],
        accumulate: false,
        workspace: None,
    };
    lower::lower(&launch, false, SHARED_BYTES_DEFAULT as usize)?
        .iter()
        .try_for_each(|step| issue(lane, step, from.address, to.address))
}

/// Copies a box of what lies on another GPU: runs of elements that lie together on both sides, all those at equal distances in one
/// call.
pub(crate) fn fetch_region(
    lane: &RawStream,
    source: &Context,
    from: StridedRegion<'_>,
    to: StridedRegion<'_>,
    dtype: DType,
) -> Result<(), KernelError> {
    let (mut rows, mut copied): (Option<Rows>, _) = (None, Ok(()));
    let (read, write) = ((from.shape, &from.region.start[..]), (to.shape, &to.region.start[..]));
    for_each_run(read, write, &from.region.size, |at, there, elements| {
        let bytes = |elements: usize| elements * dtype.bytes();
        let next = Rows::one(from.address + bytes(at) as u64, to.address + bytes(there) as u64, bytes(elements));
        if rows.as_mut().is_some_and(|rows| rows.take(&next)) {
            return;
        }
        if let Some(full) = rows.replace(next)
            && copied.is_ok()
        {
            copied = lane.copy_rows_from(source, &full);
        }
    });
    copied?;
    rows.map_or(Ok(()), |rows| lane.copy_rows_from(source, &rows))
}

/// Issues a step that reads one buffer and writes one.
fn issue(lane: &RawStream, step: &Step, read: u64, write: u64) -> Result<(), KernelError> {
    let refused = |got: String| KernelError::arguments("collective", "step", "a copy of a box", got);
    let at = |place: &super::step::Place| match place.operand {
        Operand::Read(0) => Ok(read + place.offset_bytes as u64),
        Operand::Write(0) => Ok(write + place.offset_bytes as u64),
        _ => Err(refused(format!("{place:?}"))),
    };
    match step {
        Step::Copy { from, to, bytes } => lane.copy(at(to)?, at(from)?, *bytes),
        Step::Kernel(kernel) if kernel.args.len() <= PARAMETERS_MAX => {
            let function = lane.gpu().modules().function(kernel.function, kernel.shared_bytes)?;
            let how = Geometry { grid: kernel.grid, block: kernel.block, shared_bytes: kernel.shared_bytes };
            let mut words = [0; PARAMETERS_MAX];
            for (word, arg) in words.iter_mut().zip(&kernel.args) {
                *word = match arg {
                    Arg::Pointer(place) => at(place)?,
                    other => other.bits().ok_or_else(|| refused(format!("{other:?}")))?,
                };
            }
            lane.launch(function, &how, &words[..kernel.args.len()])
        }
        other => Err(refused(format!("{other:?}"))),
    }
}

/// `y = ((xs[0] + xs[1]) + ..) + xs[last]`, element by element; the last may be y.
pub(crate) fn combine(lane: &RawStream, op: ReduceOp, xs: &[u64], y: u64, elements: usize) -> Result<(), KernelError> {
    const THREADS: usize = 256;
    const BLOCKS_MAX: usize = 1024;
    if elements == 0 {
        return Ok(());
    }
    if let [x] = xs {
        return lane.copy(y, *x, elements * DType::F32.bytes());
    }
    if xs.len() > MEMBERS_MAX {
        let expected = format!("at most {MEMBERS_MAX}");
        return Err(KernelError::arguments("reduce", "members on one GPU", expected, xs.len().to_string()));
    }
    let function = lane.gpu().modules().function("combine_members_f32", 0)?;
    let mut words = [0; MEMBERS_MAX + 4];
    words[0] = y;
    words[1..=xs.len()].copy_from_slice(xs);
    let largest = u64::from(op == ReduceOp::Max);
    words[MEMBERS_MAX + 1..].copy_from_slice(&[xs.len() as u64, largest, elements as u64]);
    let blocks = elements.div_ceil(THREADS).min(BLOCKS_MAX) as u32;
    lane.launch(function, &Geometry { grid: [blocks, 1, 1], block: [THREADS as u32, 1, 1], shared_bytes: 0 }, &words)
}

/// Elements that a member takes from others in a call whose result has this shape.
pub(crate) fn foreign_elements(call: &CollectiveCall, y_shape: &[usize]) -> usize {
    let (members, member) = (call.group.ranks.len(), call.member);
    if let Some((sources, targets)) = regions(&call.kind, y_shape) {
        let boxes = taken(member, sources, &targets[member]);
        let foreign = boxes.iter().filter(|(other, _)| *other != member);
        return foreign.flat_map(|(_, boxes)| boxes).map(Region::element_count).sum();
    }
    let elements = element_count(y_shape);
    match &call.kind {
        CollectiveKind::AllReduce { .. } => all_reduce_foreign(elements, members, member),
        CollectiveKind::ReduceScatter { parts, .. } => (members - 1) * parts[member].element_count(),
        CollectiveKind::Broadcast { root } if *root != member => elements,
        CollectiveKind::Receive { from } if *from != member => elements,
        _ => 0,
    }
}
