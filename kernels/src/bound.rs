//! Resolves and checks a launch's buffers (MEM-1, MEM-2, MEM-4) for every backend, and runs custom kernels on the host.
#![allow(unsafe_code)]

use crate::error::{KernelError, Result};
use crate::memory::{Base, View};
use crate::op::{CpuArgs, CpuRead, CpuSlice, CpuSliceMut, CpuWrite, CustomKernel, Launch};
use crate::tensor::DType;

#[derive(Debug)]
pub(crate) struct Bound<'a> {
    pub(crate) name: &'a str,
    pub(crate) reads: Vec<View<'a>>,
    pub(crate) writes: Vec<View<'a>>,
    pub(crate) workspace: Option<View<'a>>,
}

impl<'a> Bound<'a> {
    /// Resolves the buffers. `workspace_bytes` returns the size of the workspace that the backend needs.
    pub(crate) fn resolve(
        launch: &'a Launch,
        bases: &'a [Base],
        workspace_bytes: impl FnOnce(&[&[usize]]) -> usize,
    ) -> Result<Self> {
        let name = launch.op.name();
        let resolve = |buffer| View::resolve(name, buffer, bases);
        let reads = launch.reads.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
        let writes = launch.writes.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
        let workspace = launch.workspace.as_ref().map(resolve).transpose()?;
        launch.check_op(launch.accumulate)?;
        let bound = Self { name, reads, writes, workspace };
        bound.check(workspace_bytes)?;
        Ok(bound)
    }

    /// Checks write access (MEM-4), overlaps (MEM-2) and the workspace.
    fn check(&self, workspace_bytes: impl FnOnce(&[&[usize]]) -> usize) -> Result<()> {
        if self.writes.iter().chain(&self.workspace).any(|write| !write.arena().is_writable()) {
            return Err(self.refused("write", "writable memory", "a peer's memory, mapped read-only"));
        }
        for (i, write) in self.writes.iter().enumerate() {
            let has_overlap = self.reads.iter().any(|read| write.overlaps(read) && !write.same_memory(read))
                || self.writes[..i].iter().any(|other| write.overlaps(other))
                || self.workspace.as_ref().is_some_and(|workspace| write.overlaps(workspace));
            if has_overlap {
                let expected = "memory that no other buffer overlaps";
                return Err(self.refused(&format!("write {i}"), expected, "an overlap with another buffer"));
            }
        }
        let shapes: Vec<&[usize]> = self.reads.iter().map(View::shape).collect();
        let needed = workspace_bytes(&shapes);
        let given = self.workspace.as_ref().map_or(0, View::bytes);
        let has_overlap = self.workspace.iter().any(|workspace| self.reads.iter().any(|read| read.overlaps(workspace)));
        if needed > given || has_overlap {
            let expected = format!("{needed} bytes that no other buffer overlaps");
            let overlap = if has_overlap { ", which a read overlaps" } else { "" };
            return Err(self.refused("workspace", expected, format!("{given} bytes{overlap}")));
        }
        Ok(())
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &View<'a>> {
        self.reads.iter().chain(&self.writes).chain(&self.workspace)
    }

    fn refused(&self, what: &str, expected: impl Into<String>, got: impl Into<String>) -> KernelError {
        KernelError::arguments(self.name, what, expected, got)
    }
}

/// # Safety
/// No two writes overlap, and nothing else accesses the buffers during the call.
pub(crate) unsafe fn run_custom(
    kernel: &dyn CustomKernel,
    name: &str,
    reads: &[View<'_>],
    writes: &[View<'_>],
    accumulate: bool,
) -> Result<()> {
    if let Some(i) = reads.iter().position(|read| writes.iter().any(|write| write.overlaps(read))) {
        let (what, got) = (format!("read {i}"), "written memory");
        return Err(KernelError::arguments(name, &what, "memory that is not written", got));
    }
    let half = |what, i| KernelError::arguments(name, &format!("dtype of {what} {i}"), "F32 or I32", "BF16");
    let mut args = CpuArgs { reads: Vec::new(), writes: Vec::new(), accumulate };
    for (i, view) in reads.iter().enumerate() {
        // SAFETY: the dtype matches; no write overlaps this read (just checked).
        let data = unsafe {
            match view.dtype() {
                DType::F32 => CpuSlice::F32(view.slice()),
                DType::I32 => CpuSlice::I32(view.slice()),
                DType::BF16 => return Err(half("read", i)),
            }
        };
        args.reads.push(CpuRead { shape: view.shape(), data });
    }
    for (i, view) in writes.iter().enumerate() {
        // SAFETY: the dtype matches; no read (just checked) and no other write (the contract) overlaps this write.
        let data = unsafe {
            match view.dtype() {
                DType::F32 => CpuSliceMut::F32(view.slice_mut()),
                DType::I32 => CpuSliceMut::I32(view.slice_mut()),
                DType::BF16 => return Err(half("write", i)),
            }
        };
        args.writes.push(CpuWrite { shape: view.shape(), data });
    }
    kernel.run_cpu(args)
}
