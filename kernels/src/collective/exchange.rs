//! What the members of a collective do, apart from how they meet: checks of buffers, what they must agree on, and the
//! reading of each other's memory. Engines call it.
//!
//! - EXCHANGE-1: a member writes only its own y, and of it, between two barriers, nothing that another reads then.
#![allow(unsafe_code)]

use crate::collective::{CollectiveCall, CollectiveKind, ReduceOp};
use crate::cpu::simd;
use crate::error::KernelError;
use crate::memory::{Arena, View};
use crate::region::{check_inside, for_each_run, subtract};
use crate::tensor::{DType, Region, split_range};

/// Elements that a reduction holds in L1 at once.
const BLOCK: usize = 1024;

/// A result of at least so many elements is written past the caches, which it would not fit in. Measured with 2 and 4
/// processes: from 8 MiB on that takes 0.3 to 0.9 of the time; at 4 MiB it depends on the number of processes.
const STREAM_ELEMENTS_MIN: usize = 1 << 21;

/// Shorter runs of one are copied in the usual way.
const STREAM_RUN_MIN: usize = 256;

/// A view without its lifetime and shape; keeps the memory alive. Inside its arena and aligned, as views are (MEM-1).
#[derive(Clone, Debug)]
pub(crate) struct Posted {
    arena: Arena,
    offset: usize,
    elements: usize,
}

/// What all members of a call must agree on.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(crate) struct Terms<'a> {
    kind: &'a CollectiveKind,
    ranks: &'a [usize],
    dtype: DType,
    /// Where no regions tell it.
    x_shape: Option<&'a [usize]>,
    whole: Option<&'a [usize]>,
}

/// The memory of all members once they have met, by member.
pub(crate) struct Met<'a> {
    pub(crate) call: &'a CollectiveCall,
    /// Shape of this member's x.
    pub(crate) x_shape: &'a [usize],
    /// Shape of this member's y.
    pub(crate) y_shape: &'a [usize],
    pub(crate) xs: &'a [Posted],
    /// This member's.
    pub(crate) y: &'a Posted,
    /// For an all-reduce; others need not read each other's y.
    pub(crate) ys: &'a [Posted],
}

impl Posted {
    pub(crate) fn of(view: &View<'_>) -> Self {
        Self { arena: view.arena().clone(), offset: view.offset(), elements: view.element_count() }
    }

    /// What another posted, which may be wrong: `None` when it does not lie inside `arena`, or is not aligned.
    pub(crate) fn checked(arena: &Arena, offset: usize, elements: usize) -> Option<Self> {
        let end = elements.checked_mul(size_of::<f32>())?.checked_add(offset)?;
        let inside = end <= arena.bytes() && offset.is_multiple_of(align_of::<f32>());
        inside.then(|| Self { arena: arena.clone(), offset, elements })
    }

    /// Where element `index` lies.
    pub(crate) fn at(&self, index: usize) -> *mut u32 {
        debug_assert!(index <= self.elements);
        self.arena.host_start().wrapping_add(self.offset).cast::<u32>().wrapping_add(index)
    }

    /// # Safety
    /// The range is inside, of floats, and written by nobody for `'a`.
    pub(crate) unsafe fn floats<'a>(&self, start: usize, len: usize) -> &'a [f32] {
        debug_assert!(start + len <= self.elements);
        // SAFETY: inside a view, which MEM-1 holds to be in bounds and aligned; the rest is the contract.
        unsafe { std::slice::from_raw_parts(self.at(start).cast(), len) }
    }

    /// # Safety
    /// The range is inside, of floats, and touched by nobody else for `'a`.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn floats_mut<'a>(&self, start: usize, len: usize) -> &'a mut [f32] {
        debug_assert!(start + len <= self.elements);
        // SAFETY: inside a view, which MEM-1 holds to be in bounds and aligned; the rest is the contract.
        unsafe { std::slice::from_raw_parts_mut(self.at(start).cast(), len) }
    }
}

/// # Safety
/// Both ranges are inside, the target's is touched by nobody else and the source's is not written.
pub(crate) unsafe fn copy_elements(source: &Posted, from: usize, target: &Posted, to: usize, len: usize) {
    debug_assert!(from + len <= source.elements && to + len <= target.elements);
    // SAFETY: both are in bounds and aligned (every dtype has 4 bytes). `copy` and not `copy_nonoverlapping`, since an
    // in-place call may copy a range onto itself.
    unsafe { std::ptr::copy(source.at(from), target.at(to), len) };
}

/// [`copy_elements`], past the caches where the result is large.
///
/// # Safety
/// As there; the ranges do not overlap.
unsafe fn copy_part(source: &Posted, from: usize, target: &Posted, to: usize, len: usize, large: bool) {
    debug_assert!(from + len <= source.elements && to + len <= target.elements);
    if !large || len < STREAM_RUN_MIN {
        // SAFETY: by the contract.
        return unsafe { copy_elements(source, from, target, to, len) };
    }
    // SAFETY: both are in bounds, aligned and apart.
    unsafe { stream(source.at(from), target.at(to), len) };
}

/// Copies past the caches: a result larger than they are would only push out what is still to be read, and each of its
/// lines would be read before it is overwritten.
///
/// # Safety
/// Both ranges are valid and aligned, do not overlap, and the target's is touched by nobody else.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(source: *const u32, target: *mut u32, len: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    const LINE: usize = 16;
    let head = target.align_offset(LINE * size_of::<u32>()).min(len);
    let tail = (len - head) % LINE;
    // SAFETY: all offsets are below `len`; stores of whole lines start at multiples of a line. SSE2 is part of x86-64.
    unsafe {
        std::ptr::copy_nonoverlapping(source, target, head);
        for line in (head..len - tail).step_by(LINE) {
            let from = source.add(line).cast::<__m128i>();
            let to = target.add(line).cast::<__m128i>();
            let values = [0, 1, 2, 3].map(|i| _mm_loadu_si128(from.add(i)));
            (0..4).for_each(|i| _mm_stream_si128(to.add(i), values[i]));
        }
        std::ptr::copy_nonoverlapping(source.add(len - tail), target.add(len - tail), tail);
        // Streamed stores are not ordered with others: what publishes them must come after this.
        _mm_sfence();
    }
}

/// # Safety
/// Both ranges are valid and aligned, do not overlap, and the target's is touched by nobody else.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn stream(source: *const u32, target: *mut u32, len: usize) {
    // SAFETY: the contract.
    unsafe { std::ptr::copy_nonoverlapping(source, target, len) };
}

impl<'a> Terms<'a> {
    /// Of a call whose buffers were checked.
    pub(crate) fn of(call: &'a CollectiveCall, x_shape: &'a [usize], y_shape: &'a [usize], dtype: DType) -> Self {
        // Regions tell the shapes of parts; where there are none, shapes must be the same everywhere.
        let (x_shape, whole) = match call.kind {
            CollectiveKind::AllGather { .. } => (None, Some(y_shape)),
            CollectiveKind::AllToAll { .. } => (None, None),
            _ => (Some(x_shape), None),
        };
        Self { kind: &call.kind, ranks: &call.group.ranks, dtype, x_shape, whole }
    }
}

/// A call as text for errors.
pub(crate) fn describe(call: &CollectiveCall, buffer: Option<(DType, &[usize])>) -> String {
    let buffer = buffer.map_or("nothing".to_owned(), |(dtype, shape)| format!("{dtype:?} {shape:?}"));
    format!("{:?} of {buffer} among ranks {:?}", call.kind, call.group.ranks)
}

/// [`describe`] of a call whose buffers need not fit: its first read, or else its first write.
pub(crate) fn describe_views(call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> String {
    describe(call, reads.iter().chain(writes).next().map(|view| (view.dtype(), view.shape())))
}

/// The other side of a point-to-point call; an error when a member that the call names is none.
pub(crate) fn check_members(call: &CollectiveCall) -> Result<Option<usize>, KernelError> {
    let members = call.group.ranks.len();
    let peer = match call.kind {
        CollectiveKind::Send { to: peer } | CollectiveKind::Receive { from: peer } => Some(peer),
        _ => None,
    };
    if call.member < members && peer.is_none_or(|peer| peer < members) {
        return Ok(peer);
    }
    let got = format!("member {}, peer {peer:?}", call.member);
    Err(KernelError::arguments(call.name(), "member", format!("below {members}"), got))
}

/// Whether one member's buffers fit its call, and lie in the host's memory.
pub(crate) fn check_buffers(call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<(), KernelError> {
    reads.iter().chain(writes).try_for_each(|view| view.check_host(call.name()))?;
    check_call(call, reads, writes)
}

/// Whether one member's buffers, wherever they lie, fit its call.
pub(crate) fn check_call(call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<(), KernelError> {
    let name = call.name();
    let members = call.group.ranks.len();
    let refused = |what: &str, expected: String, got: String| Err(KernelError::arguments(name, what, expected, got));
    let (reads_wanted, writes_wanted) = match call.kind {
        CollectiveKind::Send { .. } => (1, 0),
        CollectiveKind::Receive { .. } => (0, 1),
        _ => (1, 1),
    };
    if (reads.len(), writes.len()) != (reads_wanted, writes_wanted) {
        let expected = format!("{reads_wanted} read, {writes_wanted} written");
        return refused("buffers", expected, format!("{} read, {} written", reads.len(), writes.len()));
    }
    if writes.iter().any(|view| !view.arena().is_writable()) {
        return refused("y", "memory that may be written".to_owned(), "a peer's, mapped to be read".to_owned());
    }
    let ([x], [y]) = (reads, writes) else { return Ok(()) };
    let shape = |what: &str, view: &View<'_>, expected: &[usize]| {
        if view.shape() == expected {
            Ok(())
        } else {
            refused(what, format!("{expected:?}"), format!("{:?}", view.shape()))
        }
    };
    let in_place = matches!(call.kind, CollectiveKind::AllReduce { .. } | CollectiveKind::Broadcast { .. });
    if x.overlaps(y) && !(in_place && x.same_memory(y)) {
        return refused("buffers", "no overlap of x and y".to_owned(), "an overlap".to_owned());
    }
    if x.dtype() != y.dtype() {
        return refused("dtype of y", format!("{:?}", x.dtype()), format!("{:?}", y.dtype()));
    }
    if reduces(&call.kind) && x.dtype() != DType::F32 {
        return refused("dtype", "F32".to_owned(), format!("{:?}", x.dtype()));
    }
    let regions = |what: &str, regions: &[Region], whole: &[usize]| {
        if regions.len() != members {
            return refused(what, format!("{members} regions"), regions.len().to_string());
        }
        regions.iter().try_for_each(|region| check_inside(name, what, region, whole))
    };
    match &call.kind {
        CollectiveKind::AllReduce { .. } => shape("shape of y", y, x.shape()),
        CollectiveKind::Broadcast { root } if *root >= members => {
            refused("root", format!("a member below {members}"), root.to_string())
        }
        CollectiveKind::Broadcast { .. } => shape("shape of y", y, x.shape()),
        CollectiveKind::AllGather { parts } => {
            regions("parts", parts, y.shape())?;
            shape("shape of the part", x, &parts[call.member].size)?;
            check_covered(name, parts, &Region::whole(y.shape()))
        }
        CollectiveKind::ReduceScatter { parts, .. } => {
            regions("parts", parts, x.shape())?;
            shape("shape of the part", y, &parts[call.member].size)
        }
        CollectiveKind::AllToAll { sources, targets } => {
            let all = || sources.iter().chain(targets);
            let rank = sources.first().map_or(0, |region| region.start.len());
            let end = |r: &Region, d: usize| r.start.get(d).zip(r.size.get(d)).map_or(0, |(a, b)| a.saturating_add(*b));
            let whole: Vec<usize> = (0..rank).map(|d| all().map(|r| end(r, d)).max().unwrap_or(0)).collect();
            regions("sources", sources, &whole)?;
            regions("targets", targets, &whole)?;
            shape("shape of the source", x, &sources[call.member].size)?;
            shape("shape of the target", y, &targets[call.member].size)?;
            targets.iter().try_for_each(|target| check_covered(name, sources, target))
        }
        CollectiveKind::Send { .. } | CollectiveKind::Receive { .. } => Ok(()),
    }
}

fn reduces(kind: &CollectiveKind) -> bool {
    matches!(kind, CollectiveKind::AllReduce { .. } | CollectiveKind::ReduceScatter { .. })
}

fn check_covered(name: &str, sources: &[Region], target: &Region) -> Result<(), KernelError> {
    let mut rest = vec![target.clone()];
    for source in sources {
        rest = rest.iter().flat_map(|region| subtract(region, source)).collect();
    }
    rest.retain(|region| !region.is_empty());
    match rest.first() {
        None => Ok(()),
        Some(missing) => {
            let expected = "every element held by a member".to_owned();
            Err(KernelError::arguments(name, "sources", expected, format!("none holds {missing:?}")))
        }
    }
}

/// `a` and then `b`, combined. The one place that says what a [`ReduceOp`] does.
#[inline(always)]
fn combine(op: ReduceOp, a: f32, b: f32) -> f32 {
    match op {
        ReduceOp::Sum => a + b,
        ReduceOp::Max => a.max(b),
    }
}

/// `y[i] = a[i] and then b[i]`, combined.
pub(crate) fn combine_two(op: ReduceOp, a: &[f32], b: &[f32], y: &mut [f32]) {
    simd::dispatch(
        #[inline(always)]
        || {
            simd::map(
                [a, b],
                y,
                #[inline(always)]
                |[a, b]| combine(op, a, b),
            );
        },
    );
}

/// `y[i] = y[i] and then b[i]`, combined.
pub(crate) fn combine_into(op: ReduceOp, y: &mut [f32], b: &[f32]) {
    simd::dispatch(
        #[inline(always)]
        || {
            simd::update(
                y,
                [b],
                #[inline(always)]
                |y, [b]| combine(op, y, b),
            );
        },
    );
}

/// `y[i] = a[i] and then y[i]`, combined.
pub(crate) fn combine_onto(op: ReduceOp, a: &[f32], y: &mut [f32]) {
    simd::dispatch(
        #[inline(always)]
        || {
            simd::update(
                y,
                [a],
                #[inline(always)]
                |y, [a]| combine(op, a, y),
            );
        },
    );
}

/// `y`, from `to`, becomes all members' x from `start` on for `len` elements, combined in the order of
/// [`crate::collective::Group`]: the member after the owner first, the owner last.
///
/// # Safety
/// Ranges are inside; nobody else touches y's, and of the x only what is y's own memory is written.
unsafe fn reduce(op: ReduceOp, xs: &[Posted], owner: usize, (start, len): (usize, usize), y: &Posted, to: usize) {
    let n = xs.len();
    if n == 1 {
        // SAFETY: inside and exclusive by the contract.
        return unsafe { copy_elements(&xs[0], start, y, to, len) };
    }
    let mut sum = [0f32; BLOCK];
    let in_place = xs[owner].at(start) == y.at(to);
    for block in (0..len).step_by(BLOCK) {
        let block_len = BLOCK.min(len - block);
        // SAFETY: inside by the contract; y is written only after this block was read from everyone.
        let x = |i: usize| unsafe { xs[(owner + i) % n].floats(start + block, block_len) };
        let sum = &mut sum[..block_len];
        let mut before = x(1);
        if n > 2 {
            combine_two(op, before, x(2), sum);
            (3..n).for_each(|i| combine_into(op, sum, x(i)));
            before = sum;
        }
        // SAFETY: inside and exclusive by the contract. Where it is the owner's own x, no other slice of that is made.
        let y = unsafe { y.floats_mut(to + block, block_len) };
        if in_place { combine_onto(op, before, y) } else { combine_two(op, before, x(n), y) }
    }
}

/// Copies the member's target together from the members' sources; returns the elements taken from others.
fn gather(met: &Met<'_>, sources: &[Region], target: &Region) -> usize {
    let member = met.call.member;
    let mut rest = vec![target.clone()];
    let mut foreign = 0;
    let large = met.y.elements >= STREAM_ELEMENTS_MIN;
    let own_first = std::iter::once(member).chain((0..met.xs.len()).filter(|&other| other != member));
    for other in own_first {
        let source = &sources[other];
        for common in rest.iter().filter_map(|region| region.intersect(source)) {
            if other != member {
                foreign += common.element_count();
            }
            let from = (&source.size[..], &common.relative_to(source).start[..]);
            let to = (&target.size[..], &common.relative_to(target).start[..]);
            for_each_run(from, to, &common.size, |from, to, len| {
                // SAFETY: inside, since shapes were checked against regions; only this member writes its target, and
                // nobody writes sources until all have left.
                unsafe { copy_part(&met.xs[other], from, met.y, to, len, large) };
            });
        }
        rest = rest.iter().flat_map(|region| subtract(region, source)).collect();
    }
    foreign
}

/// Boxes that `target` takes from each member, in the order in which members are asked: itself, then 0, 1, ...
/// What one has given is not asked of a later one.
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

/// What a member does between the meeting and the leaving of all; returns the elements that it took from others.
/// `barrier` waits for all members.
pub(crate) fn exchange(met: &Met<'_>, barrier: &dyn Fn() -> Result<(), KernelError>) -> Result<usize, KernelError> {
    let (call, member, members) = (met.call, met.call.member, met.xs.len());
    let (x, y) = (&met.xs[member], met.y);
    let foreign = match &call.kind {
        CollectiveKind::AllReduce { op } => {
            let own = split_range(y.elements, members, member);
            // SAFETY: each member writes only its own chunk of its own memory, which others do not read in this phase
            // (they read their chunks of it).
            unsafe { reduce(*op, met.xs, member, (own.start, own.len()), y, own.start) };
            barrier()?;
            let large = y.elements >= STREAM_ELEMENTS_MIN;
            for (other, theirs) in met.ys.iter().enumerate().filter(|(other, _)| *other != member) {
                let chunk = split_range(y.elements, members, other);
                // SAFETY: chunk `other` of its owner was written before the barrier and is only read from then on;
                // chunk `other` of this member is written by it alone and read by nobody.
                unsafe { copy_part(theirs, chunk.start, y, chunk.start, chunk.len(), large) };
            }
            all_reduce_foreign(y.elements, members, member)
        }
        CollectiveKind::ReduceScatter { op, parts } => {
            let part = &parts[member];
            let zeros = vec![0; part.size.len()];
            let (from, to) = ((met.x_shape, &part.start[..]), (&part.size[..], &zeros[..]));
            for_each_run(from, to, &part.size, |from, to, len| {
                // SAFETY: inside, since the part was checked; y overlaps no x (checked), and only this member writes it.
                unsafe { reduce(*op, met.xs, member, (from, len), y, to) };
            });
            (members - 1) * part.element_count()
        }
        CollectiveKind::AllGather { parts } => gather(met, parts, &Region::whole(met.y_shape)),
        CollectiveKind::AllToAll { sources, targets } => gather(met, sources, &targets[member]),
        CollectiveKind::Broadcast { root } => {
            let large = y.elements >= STREAM_ELEMENTS_MIN;
            // In place on the root there is nothing to do, and its memory is being read.
            if member != *root || x.at(0) != y.at(0) {
                // SAFETY: whole views of one size; the root's x is not written, as its y is elsewhere or left alone.
                unsafe { copy_part(&met.xs[*root], 0, y, 0, y.elements, large) };
            }
            if member == *root { 0 } else { y.elements }
        }
        CollectiveKind::Send { .. } | CollectiveKind::Receive { .. } => 0,
    };
    Ok(foreign)
}

pub(crate) fn all_reduce_foreign(elements: usize, members: usize, member: usize) -> usize {
    let own = split_range(elements, members, member).len();
    (members - 1) * own + (elements - own)
}

/// [`exchange`] where every x is a copy that nobody will write: a member needs nothing of the others' y, so there is no
/// barrier. Counts as if it took from them what [`exchange`] does.
pub(crate) fn exchange_copies(met: &Met<'_>) -> Result<usize, KernelError> {
    let CollectiveKind::AllReduce { op } = &met.call.kind else { return exchange(met, &|| Ok(())) };
    let (members, y) = (met.xs.len(), met.y);
    for owner in 0..members {
        let chunk = split_range(y.elements, members, owner);
        // SAFETY: inside; y is this member's alone, and no x is y's memory.
        unsafe { reduce(*op, met.xs, owner, (chunk.start, chunk.len()), y, chunk.start) };
    }
    Ok(all_reduce_foreign(y.elements, members, met.call.member))
}

#[cfg(test)]
mod tests;
