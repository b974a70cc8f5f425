//! Memory that processes of one node share: a sealed memfd, and a mapping of this memfd.
//!
//! - SHARED-1: a mapping is never larger than its file, and the file's size is sealed. So a peer with write access can
//!   corrupt values, but no peer can cause a memory fault.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::ptr::{NonNull, null_mut};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::heap::empty_start;
use crate::error::{KernelError, Result};

/// Seals that make the file's size, and the seals themselves, unchangeable.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// The permitted access to a peer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read-only; writes are rejected.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// A mapped memfd. Dropping it unmaps and closes the memfd.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) file: OwnedFd,
    pub(super) start: NonNull<u8>,
    pub(super) bytes: usize,
    pub(super) access: Access,
}

// SAFETY: the mapping belongs to the process, and any thread may unmap it; MEM-3 governs concurrent access.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Creates zeroed memory. As for heap memory, the system allocates a page at the first write to the page.
    /// `fallocate` is not used, because it would reserve all pages now: for too large a size, it triggers the
    /// out-of-memory killer instead of returning an error.
    pub(super) fn create(bytes: usize) -> io::Result<Self> {
        let file = memfd_create("shardflow", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let length = u64::try_from(bytes).unwrap_or(u64::MAX);
        ftruncate(&file, length)?;
        fcntl_add_seals(&file, SEALS)?;
        Ok(Self::map(file, bytes, Access::ReadWrite)?)
    }

    /// Maps the memory of a peer's [`Mapping::create`]. Rejects a memfd whose size is not `bytes`, or whose size the
    /// peer can still change.
    pub(super) fn of_peer(file: OwnedFd, bytes: usize, access: Access) -> Result<Self> {
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
            return Ok(Self { file, start: empty_start(), bytes, access });
        }
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: a new mapping at an address that the system chooses does not replace an existing mapping.
        let start = unsafe { mmap(null_mut(), bytes, protection, MapFlags::SHARED, &file, 0)? };
        let start = NonNull::new(start.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { file, start, bytes, access })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: `map` mapped this size, it is unmapped only once, and the arena that used the mapping is gone.
            // The only possible error is that the memory is not mapped.
            let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        }
    }
}

#[cfg(test)]
mod tests;
