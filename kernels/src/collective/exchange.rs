//! Checks the buffers and terms of a collective, and computes its result by reading other members' memory.
//!
//! - EXCHANGE-1: a member writes only its own y. Between two barriers, it writes no part of y that another member reads
//!   between these barriers.
#![allow(unsafe_code)]

use crate::collective::call::{CollectiveCall, CollectiveKind, ReduceOp};
use crate::collective::order::{Level, levels};
use crate::collective::ranks::Ranks;
use crate::cpu::simd::{dispatch, inlined, map, update};
use crate::error::{KernelError, Result};
use crate::memory::{Arena, View};
use crate::region::{Runs, check_inside, for_each_run, subtract};
use crate::tensor::regions::Regions;
use crate::tensor::{DType, Region, split_range};

/// Number of elements per block. A reduction keeps one block per level in the L1 cache.
const BLOCK: usize = 1024;

/// Copies into a result of at least this many elements bypass the caches, which are too small for the result. In
/// measurements with 2 and 4 processes, bypassing takes 0.3 to 0.9 of the time of copying through the caches if the
/// result has 8 MiB or more. At 4 MiB, the ratio depends on the number of processes.
const STREAM_ELEMENTS_MIN: usize = 1 << 21;

/// Runs of fewer elements than this are copied through the caches.
const STREAM_RUN_MIN: usize = 256;

/// A view without lifetime and shape. It keeps its memory alive. Like all views, it is in bounds and aligned (MEM-1).
#[derive(Clone, Debug)]
pub(crate) struct Posted {
    arena: Arena,
    offset: usize,
    elements: usize,
}

/// The properties that all members of a call must agree on.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct Terms<'a> {
    kind: &'a CollectiveKind,
    ranks: &'a Ranks,
    dtype: DType,
    /// `None` when the regions determine the shape.
    x_shape: Option<&'a [usize]>,
    whole: Option<&'a [usize]>,
}

/// The memory that all members have posted, by member.
pub(crate) struct ExchangeBuffers<'a> {
    pub(crate) call: &'a CollectiveCall,
    pub(crate) x_shape: &'a [usize],
    pub(crate) y_shape: &'a [usize],
    pub(crate) xs: &'a [Posted],
    pub(crate) y: &'a Posted,
    /// Each member's y. Only an all-reduce reads the y of other members.
    pub(crate) ys: &'a [Posted],
}

impl Posted {
    pub(crate) fn of(view: &View<'_>) -> Self {
        Self { arena: view.arena().clone(), offset: view.offset(), elements: view.element_count() }
    }

    /// Memory that another process posted. `None` when the memory is not inside `arena` or is not aligned.
    pub(crate) fn checked(arena: &Arena, offset: usize, elements: usize) -> Option<Self> {
        let end = elements.checked_mul(size_of::<f32>())?.checked_add(offset)?;
        let inside = end <= arena.bytes() && offset.is_multiple_of(align_of::<f32>());
        inside.then(|| Self { arena: arena.clone(), offset, elements })
    }

    pub(crate) fn at(&self, index: usize) -> *mut u32 {
        debug_assert!(index <= self.elements);
        self.arena.host_start().wrapping_add(self.offset).cast::<u32>().wrapping_add(index)
    }

    /// # Safety
    /// The range is inside the view, holds floats, and is not written during `'a`.
    pub(crate) unsafe fn floats<'a>(&self, start: usize, len: usize) -> &'a [f32] {
        debug_assert!(start + len <= self.elements);
        // SAFETY: the range is inside a view, so it is in bounds and aligned (MEM-1). The contract covers the rest.
        unsafe { std::slice::from_raw_parts(self.at(start).cast(), len) }
    }

    /// # Safety
    /// The range is inside the view, holds floats, and is accessed only through the result during `'a`.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn floats_mut<'a>(&self, start: usize, len: usize) -> &'a mut [f32] {
        debug_assert!(start + len <= self.elements);
        // SAFETY: the range is inside a view, so it is in bounds and aligned (MEM-1). By the contract, it is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.at(start).cast(), len) }
    }
}

/// # Safety
/// Both ranges are inside their views, only the caller accesses the target, and the source is not written.
pub(crate) unsafe fn copy_elements(source: &Posted, from: usize, target: &Posted, to: usize, len: usize) {
    debug_assert!(from + len <= source.elements && to + len <= target.elements);
    // SAFETY: both ranges are in bounds and aligned (every dtype has 4 bytes). An in-place call may copy a range onto
    // itself, so this is `copy` and not `copy_nonoverlapping`.
    unsafe { std::ptr::copy(source.at(from), target.at(to), len) };
}

/// # Safety
/// As for [`copy_elements`]. In addition, the ranges do not overlap.
unsafe fn copy_part(source: &Posted, from: usize, target: &Posted, to: usize, len: usize, bypass_caches: bool) {
    debug_assert!(from + len <= source.elements && to + len <= target.elements);
    if !bypass_caches || len < STREAM_RUN_MIN {
        // SAFETY: by the contract.
        return unsafe { copy_elements(source, from, target, to, len) };
    }
    // SAFETY: both ranges are in bounds and aligned, and they do not overlap.
    unsafe { stream(source.at(from), target.at(to), len) };
}

/// Copies with non-temporal stores. Ordinary stores would evict data that is needed later, and would read each cache
/// line before overwriting it.
///
/// # Safety
/// Both ranges are valid and aligned and do not overlap, and only the caller accesses the target.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(source: *const u32, target: *mut u32, len: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    const LINE: usize = 16;
    let head = target.align_offset(LINE * size_of::<u32>()).min(len);
    let tail = (len - head) % LINE;
    // SAFETY: all offsets are below `len`; whole-line stores start at multiples of a line. SSE2 is part of x86-64.
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, head);
        for line in (head..len - tail).step_by(LINE) {
            let from = source.add(line).cast::<__m128i>();
            let to = target.add(line).cast::<__m128i>();
            let values = [0, 1, 2, 3].map(|i| _mm_loadu_si128(from.add(i)));
            (0..4).for_each(|i| _mm_stream_si128(to.add(i), values[i]));
        }
        std::ptr::copy_nonoverlapping(source.add(len - tail), target.add(len - tail), tail);
        // Non-temporal stores are not ordered with other stores. This fence precedes the store that publishes the data.
        _mm_sfence();
    }
}

/// # Safety
/// Both ranges are valid and aligned and do not overlap, and only the caller accesses the target.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn stream(source: *const u32, target: *mut u32, len: usize) {
    // SAFETY: by the contract.
    unsafe { std::ptr::copy_nonoverlapping(source, target, len) };
}

impl<'a> Terms<'a> {
    /// The terms of a call whose buffers were checked.
    pub(crate) fn of(call: &'a CollectiveCall, x_shape: &'a [usize], y_shape: &'a [usize], dtype: DType) -> Self {
        // Regions determine the shapes of the parts. In calls without regions, all members must have the same shapes.
        let (x_shape, whole) = match call.kind {
            CollectiveKind::AllGather { .. } => (None, Some(y_shape)),
            CollectiveKind::AllToAll { .. } => (None, None),
            _ => (Some(x_shape), None),
        };
        Self { kind: &call.kind, ranks: &call.group.ranks, dtype, x_shape, whole }
    }
}

pub(crate) fn describe(call: &CollectiveCall, buffer: Option<(DType, &[usize])>) -> String {
    let buffer = buffer.map_or("nothing".to_owned(), |(dtype, shape)| format!("{dtype:?} {shape:?}"));
    format!("{:?} of {buffer} among ranks {:?}", call.kind, call.group.ranks)
}

/// Calls [`describe`] for unchecked buffers: with the first read or, if there is none, with the first write.
pub(crate) fn describe_views(call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> String {
    describe(call, reads.iter().chain(writes).next().map(|view| (view.dtype(), view.shape())))
}

/// Returns the peer of a point-to-point call. Fails when the call names a member outside the group.
pub(crate) fn check_members(call: &CollectiveCall) -> Result<Option<usize>> {
    let members = call.group.ranks.len();
    let peer = match call.kind {
        CollectiveKind::Send { to: peer } | CollectiveKind::Receive { from: peer } => Some(peer),
        _ => None,
    };
    if call.member < members && peer.is_none_or(|peer| peer < members) {
        return Ok(peer);
    }
    let got = format!("member {}{}", call.member, peer.map_or(String::new(), |peer| format!(" and peer {peer}")));
    Err(KernelError::arguments(call.name(), "members", format!("numbers below {members}"), got))
}

/// Checks that one member's buffers fit its call and lie in host memory.
pub(crate) fn check_buffers(call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<()> {
    reads.iter().chain(writes).try_for_each(|view| view.arena().check_host(call.name()))?;
    check_call(call, reads, writes)
}

/// Checks that one member's buffers, in host or device memory, fit its call.
pub(crate) fn check_call(call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<()> {
    let name = call.name();
    let members = call.group.ranks.len();
    let rejected = |what: &str, expected: String, got: String| Err(KernelError::arguments(name, what, expected, got));
    let (read_count, write_count) = call.kind.arity();
    if (reads.len(), writes.len()) != (read_count, write_count) {
        let expected = format!("{read_count} read, {write_count} written");
        return rejected("buffers", expected, format!("{} read, {} written", reads.len(), writes.len()));
    }
    if writes.iter().any(|view| !view.arena().is_writable()) {
        return rejected("y", "writable memory".to_owned(), "a peer's memory, mapped read-only".to_owned());
    }
    let ([x], [y]) = (reads, writes) else { return Ok(()) };
    let shape = |what: &str, view: &View<'_>, expected: &[usize]| {
        let got = view.shape();
        if got == expected { Ok(()) } else { rejected(what, format!("{expected:?}"), format!("{got:?}")) }
    };
    let in_place = matches!(call.kind, CollectiveKind::AllReduce { .. } | CollectiveKind::Broadcast { .. });
    if x.overlaps(y) && !(in_place && x.same_memory(y)) {
        return rejected("buffers", "x and y that do not overlap".to_owned(), "an overlap".to_owned());
    }
    if x.dtype() != y.dtype() {
        return rejected("dtype of y", format!("{:?}", x.dtype()), format!("{:?}", y.dtype()));
    }
    let reduces = matches!(call.kind, CollectiveKind::AllReduce { .. } | CollectiveKind::ReduceScatter { .. });
    if reduces && x.dtype() != DType::F32 {
        return rejected("dtype", "F32".to_owned(), format!("{:?}", x.dtype()));
    }
    let regions = |what: &str, regions: &Regions, whole: &[usize]| {
        if regions.len() != members {
            return rejected(what, format!("{members} regions"), regions.len().to_string());
        }
        regions.list().iter().try_for_each(|region| check_inside(name, what, region, whole))
    };
    match &call.kind {
        CollectiveKind::Broadcast { root } if *root >= members => {
            rejected("root", format!("a member below {members}"), root.to_string())
        }
        CollectiveKind::AllReduce { .. } | CollectiveKind::Broadcast { .. } => shape("shape of y", y, x.shape()),
        CollectiveKind::AllGather { parts } => {
            regions("parts", parts, y.shape())?;
            shape("shape of the part", x, &parts.region(call.member).size)?;
            check_covered(name, &parts.list(), &Region::whole(y.shape()))
        }
        CollectiveKind::ReduceScatter { parts, .. } => {
            regions("parts", parts, x.shape())?;
            shape("shape of the part", y, &parts.region(call.member).size)
        }
        CollectiveKind::AllToAll { sources, targets } => {
            let larger = |(a, b): (usize, &usize)| a.max(*b);
            let whole: Vec<usize> = sources.bounds().into_iter().zip(&targets.bounds()).map(larger).collect();
            regions("sources", sources, &whole)?;
            regions("targets", targets, &whole)?;
            shape("shape of the source", x, &sources.region(call.member).size)?;
            shape("shape of the target", y, &targets.region(call.member).size)?;
            let sources = sources.list();
            targets.iter().try_for_each(|target| check_covered(name, &sources, &target))
        }
        CollectiveKind::Send { .. } | CollectiveKind::Receive { .. } => Ok(()),
    }
}

fn check_covered(name: &str, sources: &[Region], target: &Region) -> Result<()> {
    let mut rest = vec![target.clone()];
    for source in sources {
        rest = rest.iter().flat_map(|region| subtract(region, source)).collect();
    }
    let Some(missing) = rest.iter().find(|region| !region.is_empty()) else { return Ok(()) };
    let got = format!("no source for {missing:?}");
    Err(KernelError::arguments(name, "sources", "a source member for every element", got))
}

/// Combines `a` and `b`, in this order. This is the only definition of each [`ReduceOp`].
#[inline(always)]
fn combine(op: ReduceOp, a: f32, b: f32) -> f32 {
    match op {
        ReduceOp::Sum => a + b,
        ReduceOp::Max => a.max(b),
    }
}

/// `y[i] = combine(a[i], b[i])`.
pub(crate) fn combine_two(op: ReduceOp, a: &[f32], b: &[f32], y: &mut [f32]) {
    inlined!(dispatch(|| {
        inlined!(map([a, b], y, |[a, b]| combine(op, a, b)));
    }));
}

/// `y[i] = combine(y[i], b[i])`.
pub(crate) fn combine_into(op: ReduceOp, y: &mut [f32], b: &[f32]) {
    inlined!(dispatch(|| {
        inlined!(update(y, [b], |y, [b]| combine(op, y, b)));
    }));
}

/// `y[i] = combine(a[i], y[i])`.
pub(crate) fn combine_onto(op: ReduceOp, a: &[f32], y: &mut [f32]) {
    inlined!(dispatch(|| {
        inlined!(update(y, [a], |y, [a]| combine(op, a, y)));
    }));
}

/// The reduction of all members' x by one member.
struct Reduction<'a> {
    op: ReduceOp,
    xs: &'a [Posted],
    levels: Vec<Level>,
    /// At least one block, and a block for each level, for intermediate values.
    blocks: Vec<f32>,
}

impl<'a> Reduction<'a> {
    fn new(op: ReduceOp, xs: &'a [Posted]) -> Self {
        let levels = levels(xs.len());
        Self { op, xs, blocks: vec![0.0; levels.len().max(1) * BLOCK], levels }
    }

    /// Combines elements `start..start + len` of all members' x in the order of [`crate::collective::order`], and writes
    /// the result to `y` at `to`. `owner` is the member whose y is written.
    ///
    /// # Safety
    /// All ranges are inside their views. Only the caller accesses y's range. No x is written, except where it is also y.
    unsafe fn run(&mut self, owner: usize, (start, len): (usize, usize), y: &Posted, to: usize) {
        let in_place = self.xs[owner].at(start) == y.at(to);
        for block in (0..len).step_by(BLOCK) {
            let range = (start + block, BLOCK.min(len - block));
            // SAFETY: by the contract, the range is inside its view and access is exclusive. If y is also an x, the slice
            // is created only when no other slice of this memory exists.
            let y = || unsafe { y.floats_mut(to + block, range.1) };
            if in_place {
                let (sum, spare) = self.blocks.split_at_mut(BLOCK);
                let sum = &mut sum[..range.1];
                // SAFETY: by the contract.
                unsafe { combine_members(self.op, self.xs, &self.levels, 0, range, sum, spare) };
                y().copy_from_slice(sum);
            } else {
                // SAFETY: by the contract.
                unsafe { combine_members(self.op, self.xs, &self.levels, 0, range, y(), &mut self.blocks) };
            }
        }
    }
}

/// Combines a range `(start, len)` of the x of the members that begin with `first`, over `levels`, into `y`. `spare` has a
/// block for each level but the first.
///
/// # Safety
/// The range is inside each x. No x is written during the call, so `y` overlaps none of them.
unsafe fn combine_members(
    op: ReduceOp,
    xs: &[Posted],
    levels: &[Level],
    first: usize,
    range: (usize, usize),
    y: &mut [f32],
    spare: &mut [f32],
) {
    // SAFETY: by the contract.
    let x = |member: usize| unsafe { xs[member].floats(range.0, range.1) };
    match levels {
        [] => y.copy_from_slice(x(first)),
        [level] => {
            combine_two(op, x(first), x(first + 1), y);
            (2..level.radix).for_each(|digit| combine_into(op, y, x(first + digit)));
        }
        [below @ .., level] => {
            // SAFETY: by the contract.
            unsafe { combine_members(op, xs, below, first, range, y, spare) };
            let (value, spare) = spare.split_at_mut(BLOCK);
            let value = &mut value[..range.1];
            for digit in 1..level.radix {
                // SAFETY: by the contract.
                unsafe { combine_members(op, xs, below, first + digit * level.stride, range, value, spare) };
                combine_into(op, y, value);
            }
        }
    }
}

fn gather(buffers: &ExchangeBuffers<'_>, sources: &[Region], target: &Region) {
    let bypass_caches = buffers.y.elements >= STREAM_ELEMENTS_MIN;
    for (other, boxes) in taken(buffers.call.member, sources, target) {
        let source = &sources[other];
        for common in boxes {
            let from = (&source.size[..], &common.relative_to(source).start[..]);
            let to = (&target.size[..], &common.relative_to(target).start[..]);
            for_each_run(from, to, &common.size, |from, to, len| {
                // SAFETY: both ranges are inside their views, because shapes were checked against regions. Only this
                // member writes its y, and no member writes its x until all members have left the call.
                unsafe { copy_part(&buffers.xs[other], from, buffers.y, to, len, bypass_caches) };
            });
        }
    }
}

/// Splits `target` into disjoint boxes, and returns them by the member that supplies them. If the source of `member`
/// has an element, `member` supplies it. Otherwise, the first member whose source has the element supplies it.
pub(crate) fn taken(member: usize, sources: &[Region], target: &Region) -> Vec<(usize, Vec<Region>)> {
    let mut rest = vec![target.clone()];
    let own_first = std::iter::once(member).chain((0..sources.len()).filter(|&other| other != member));
    let mut all = Vec::new();
    for other in own_first {
        let source = &sources[other];
        let boxes: Vec<Region> = rest.iter().filter_map(|region| region.intersect(source)).collect();
        rest = rest.iter().flat_map(|region| subtract(region, source)).collect();
        if !boxes.is_empty() {
            all.push((other, boxes));
        }
    }
    all
}

/// A member's work between the rendezvous and the final barrier. `barrier` waits for all members.
pub(crate) fn exchange(buffers: &ExchangeBuffers<'_>, barrier: &dyn Fn() -> Result<()>) -> Result<()> {
    let (member, members) = (buffers.call.member, buffers.xs.len());
    let (x, y) = (&buffers.xs[member], buffers.y);
    let bypass_caches = y.elements >= STREAM_ELEMENTS_MIN;
    match &buffers.call.kind {
        CollectiveKind::AllReduce { op } => {
            let own = split_range(y.elements, members, member);
            // SAFETY: before the barrier, each member writes only its own chunk of its own y. If x and y share memory,
            // other members read only their own chunks of it until then.
            unsafe { Reduction::new(*op, buffers.xs).run(member, (own.start, own.len()), y, own.start) };
            barrier()?;
            for (other, other_y) in buffers.ys.iter().enumerate().filter(|(other, _)| *other != member) {
                let chunk = split_range(y.elements, members, other);
                // SAFETY: member `other` wrote its own chunk before the barrier. After the barrier, all members only
                // read that chunk. Only this member accesses chunk `other` of its own y.
                unsafe { copy_part(other_y, chunk.start, y, chunk.start, chunk.len(), bypass_caches) };
            }
        }
        CollectiveKind::ReduceScatter { op, parts } => {
            let part = &parts.region(member);
            let mut reduction = Reduction::new(*op, buffers.xs);
            Runs::new(buffers.x_shape, part).for_each(0..part.element_count(), |from, to, len| {
                // SAFETY: both ranges are in bounds, and y overlaps no x (both checked). Only this member writes y.
                unsafe { reduction.run(member, (from, len), y, to) };
            });
        }
        CollectiveKind::AllGather { parts } => gather(buffers, &parts.list(), &Region::whole(buffers.y_shape)),
        CollectiveKind::AllToAll { sources, targets } => gather(buffers, &sources.list(), &targets.region(member)),
        // The root's x is also its y: there is nothing to copy, and other members read that memory.
        CollectiveKind::Broadcast { root } if member == *root && x.at(0) == y.at(0) => {}
        CollectiveKind::Broadcast { root } => {
            // SAFETY: x and y are whole views of equal size. Nobody writes the root's x: its y is other memory.
            unsafe { copy_part(&buffers.xs[*root], 0, y, 0, y.elements, bypass_caches) };
        }
        CollectiveKind::Send { .. } | CollectiveKind::Receive { .. } => {}
    }
    Ok(())
}

/// Like [`exchange`], but reads copies of x that nobody writes. No member reads another's y, so no barrier is needed.
pub(crate) fn exchange_copies(buffers: &ExchangeBuffers<'_>) -> Result<()> {
    let CollectiveKind::AllReduce { op } = &buffers.call.kind else { return exchange(buffers, &|| Ok(())) };
    let y = buffers.y;
    // SAFETY: both ranges are inside their views. Only this member accesses y, and no x shares memory with y.
    unsafe { Reduction::new(*op, buffers.xs).run(buffers.call.member, (0, y.elements), y, 0) };
    Ok(())
}

#[cfg(test)]
mod tests;
