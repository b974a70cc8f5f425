//! Memory that processes of one node share: a sealed memfd and a mapping of it.
//!
//! - SHARED-1: a mapping's size never exceeds the file's, and the file's size is sealed, so that no access faults,
//!   whatever a peer does. A peer that writes what it should not can give wrong numbers, but no fault.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::ALIGNMENT;
use crate::error::KernelError;

/// The size is fixed, and so are the seals.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// What may be done with memory that a peer passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only reading; writing is refused.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// A mapped memfd; unmapped and closed when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    file: OwnedFd,
    start: NonNull<u8>,
    bytes: usize,
    access: Access,
}

// SAFETY: the mapping belongs to the process and any thread may unmap it; access to its contents from several threads,
// or processes, is ruled by MEM-3.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Fresh zeroed memory. As with a heap's, the system finds its pages when they are first written: reserving them here
    /// (`fallocate`) would call the out-of-memory killer where a size is too large, instead of failing.
    pub(super) fn create(bytes: usize) -> io::Result<Self> {
        let file = memfd_create("shardflow", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let length = u64::try_from(bytes).unwrap_or(u64::MAX);
        ftruncate(&file, length)?;
        fcntl_add_seals(&file, SEALS)?;
        Ok(Self::map(file, bytes, Access::ReadWrite)?)
    }

    /// What a peer made by [`Mapping::create`]; refused when it has another size, or could still change it.
    pub(super) fn of_peer(file: OwnedFd, bytes: usize, access: Access) -> Result<Self, KernelError> {
        let refused =
            |what: &str, expected: String, got: String| KernelError::arguments("map_peer", what, expected, got);
        let failed = |cause: rustix::io::Errno| {
            refused("a peer's memory", format!("a sealed memfd of {bytes} bytes"), cause.to_string())
        };
        let size = fstat(&file).map_err(failed)?.st_size;
        if u64::try_from(size).ok() != u64::try_from(bytes).ok() {
            return Err(refused("size of a peer's memory", format!("{bytes} bytes"), format!("{size} bytes")));
        }
        let seals = fcntl_get_seals(&file).map_err(failed)?;
        if !seals.contains(SEALS) {
            return Err(refused("seals of a peer's memory", format!("{SEALS:?}"), format!("{seals:?}")));
        }
        Self::map(file, bytes, access).map_err(failed)
    }

    fn map(file: OwnedFd, bytes: usize, access: Access) -> rustix::io::Result<Self> {
        if bytes == 0 {
            // Never dereferenced for more than zero bytes; aligned so that empty slices are well formed.
            let start = NonNull::without_provenance(std::num::NonZeroUsize::new(ALIGNMENT).expect("64 is not zero"));
            return Ok(Self { file, start, bytes, access });
        }
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: a new mapping at an address that the system picks takes no memory from anybody.
        let start = unsafe { mmap(null_mut(), bytes, protection, MapFlags::SHARED, &file, 0)? };
        let start = NonNull::new(start.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { file, start, bytes, access })
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: mapped in `map` with this size, unmapped once, and the arena that lent it out is gone. An error
            // could only mean that it is not mapped.
            let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        }
    }
}

#[cfg(test)]
mod tests;
