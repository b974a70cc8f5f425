//! Host memory of one process: a zeroed heap allocation, or memory from a backend.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::clock::ReleaseClocks;

/// The start of every arena is a multiple of this many bytes.
pub const ALIGNMENT: usize = 64;

/// Allocation counters of a device. The device's arenas update them.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) bytes: AtomicUsize,
    pub(crate) bytes_peak: AtomicUsize,
    pub(crate) allocations: AtomicUsize,
}

impl Tally {
    pub(crate) fn add(&self, bytes: usize) {
        self.allocations.fetch_add(1, Ordering::Relaxed);
        let now = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.bytes_peak.fetch_max(now, Ordering::Relaxed);
    }
}

/// Start address of empty memory. It is never dereferenced, and is aligned so that empty slices are valid.
pub(super) fn empty_start() -> NonNull<u8> {
    NonNull::without_provenance(NonZeroUsize::new(ALIGNMENT).expect("64 is not zero"))
}

#[derive(Debug)]
pub(super) struct HostMemory {
    pub(super) start: NonNull<u8>,
    pub(super) bytes: usize,
    owner: Owner,
}

#[derive(Debug)]
enum Owner {
    Heap(Arc<Tally>),
    Backend { _memory: Box<dyn Any + Send + Sync>, releases: ReleaseClocks },
}

// SAFETY: the memory has one owner, and any thread may free it; MEM-3 governs concurrent access.
unsafe impl Send for HostMemory {}
// SAFETY: as for `Send`.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Allocates zeroed memory. `None` if the system has no memory.
    pub(super) fn allocate(bytes: usize, tally: &Arc<Tally>) -> Option<Self> {
        let layout = Layout::from_size_align(bytes, ALIGNMENT).ok()?;
        // SAFETY: the layout's size is not zero.
        let start = if bytes == 0 { empty_start() } else { NonNull::new(unsafe { alloc_zeroed(layout) })? };
        tally.add(bytes);
        Some(Self { start, bytes, owner: Owner::Heap(tally.clone()) })
    }

    pub(super) fn of_backend(start: NonNull<u8>, bytes: usize, owner: Box<dyn Any + Send + Sync>) -> Self {
        Self { start, bytes, owner: Owner::Backend { _memory: owner, releases: ReleaseClocks::default() } }
    }

    pub(super) fn is_pinned(&self) -> bool {
        matches!(self.owner, Owner::Backend { .. })
    }

    pub(super) fn mark_released(&self) {
        if let Owner::Backend { releases, .. } = &self.owner {
            releases.add();
        }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let tally = match &self.owner {
            Owner::Heap(tally) => tally,
            Owner::Backend { releases, .. } => return releases.join(),
        };
        if let (Ok(layout), true) = (Layout::from_size_align(self.bytes, ALIGNMENT), self.bytes > 0) {
            // SAFETY: `allocate` allocated the memory with the same layout; it is freed only once.
            unsafe { dealloc(self.start.as_ptr(), layout) };
        }
        tally.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
