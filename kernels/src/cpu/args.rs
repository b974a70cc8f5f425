//! The buffers of a launch on the CPU: resolves and checks them, and gives kernels access to their elements.
#![allow(unsafe_code)]

use crate::bound::Bound;
use crate::cpu::simd::Operand;
use crate::error::{KernelError, Result};
use crate::memory::{Base, View};
use crate::op::Launch;
use crate::tensor::{DType, HostElement};

pub(crate) struct Args<'a> {
    pub(super) launch: &'a Launch,
    pub(super) reads: Vec<View<'a>>,
    pub(super) writes: Vec<View<'a>>,
    /// Which writes have been handed out as slices. Each write is handed out once, so its slice is exclusive.
    taken: Vec<bool>,
    /// The parts of the stream's scratch memory for its threads.
    pub(super) scratch: Option<View<'a>>,
    pub(crate) accumulate: bool,
}

impl<'a> Args<'a> {
    pub(crate) fn resolve(launch: &'a Launch, bases: &'a [Base], repeat: bool) -> Result<Self> {
        let bound = Bound::resolve(launch, bases, |_| 0)?;
        bound.all().try_for_each(|view| view.arena().check_host(bound.name))?;
        let (Bound { reads, writes, .. }, accumulate) = (bound, launch.accumulate && repeat);
        launch.check_buffers(accumulate)?;
        let taken = vec![false; writes.len()];
        Ok(Self { launch, taken, reads, writes, scratch: None, accumulate })
    }

    /// Returns read `i` as indices, which must all be below `limit`.
    pub(crate) fn indices(&self, i: usize, limit: usize) -> Result<&'a [i32]> {
        let indices = self.i32(i)?;
        let inside = |index: &i32| usize::try_from(*index).is_ok_and(|index| index < limit);
        match indices.iter().position(|index| !inside(index)) {
            None => Ok(indices),
            Some(position) => {
                let what = format!("index {} at position {position} is not in 0..{limit}", indices[position]);
                Err(KernelError::Data { op: self.launch.op.name().to_owned(), what })
            }
        }
    }

    /// Returns read `i`, which must not also be a write.
    pub(crate) fn slice<T: HostElement>(&self, i: usize) -> Result<&'a [T]> {
        self.launch.expect_dtype("read", i, self.reads[i].dtype(), T::DTYPE)?;
        if self.writes.iter().any(|write| write.overlaps(&self.reads[i])) {
            return Err(self.launch.refused(&format!("read {i}"), "memory that is not written", "written memory"));
        }
        // SAFETY: the type matches; no write overlaps this read (just checked); MEM-3 covers other streams.
        Ok(unsafe { self.reads[i].slice() })
    }

    pub(crate) fn f32(&self, i: usize) -> Result<&'a [f32]> {
        self.slice(i)
    }

    pub(crate) fn i32(&self, i: usize) -> Result<&'a [i32]> {
        self.slice(i)
    }

    /// Returns read `i` of an elementwise op. The read is either separate memory, or the memory of write `w`.
    pub(crate) fn operand(&self, i: usize, w: usize) -> Result<Operand<'a>> {
        let (read, write) = (&self.reads[i], &self.writes[w]);
        self.launch.expect_dtype("read", i, read.dtype(), DType::F32)?;
        if read.same_memory(write) && read.element_count() > 0 {
            return Ok(Operand::Same);
        }
        self.f32(i).map(Operand::Other)
    }

    /// Returns write `i`. Each write can be taken only once.
    pub(crate) fn take<T: HostElement>(&mut self, i: usize) -> Result<&'a mut [T]> {
        self.launch.expect_dtype("write", i, self.writes[i].dtype(), T::DTYPE)?;
        assert!(!std::mem::replace(&mut self.taken[i], true), "write {i} taken twice");
        // SAFETY: the type matches, the write is taken once, no other write overlaps (`Bound` has checked that), and
        // `slice` and `operand` make no slice of an overlapping read; MEM-3 covers other streams.
        Ok(unsafe { self.writes[i].slice_mut() })
    }

    pub(crate) fn out(&mut self, i: usize) -> Result<&'a mut [f32]> {
        self.take(i)
    }

    /// Returns the threads' parts of the scratch memory, or an empty slice if the op needs none. Call this only once.
    pub(crate) fn take_scratch(&mut self) -> &'a mut [f32] {
        let Some(view) = self.scratch.take() else { return &mut [] };
        // SAFETY: the memory holds f32, is taken once, and belongs to this stream. The only buffers of the program in
        // this memory are widened tensors, which lie after the threads' parts.
        unsafe { view.slice_mut() }
    }
}
