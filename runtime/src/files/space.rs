//! Free space of a file system.

use std::path::Path;

/// Free bytes for this process in the folder; `None` if the file system does not report them.
pub(crate) fn free_bytes(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    (stat.f_blocks > 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Files that can still be created in the folder; `None` if the file system does not limit them.
pub(crate) fn free_inodes(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    (stat.f_files > 0).then_some(stat.f_favail)
}
