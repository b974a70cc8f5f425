//! Resources of this machine: memory, cores, addresses, and a folder for temporary files.

use std::env;
use std::io::ErrorKind;
use std::path::PathBuf;

use crate::transport::PrivateFolder;

mod addresses;
mod cores;
mod memory;

pub(crate) use addresses::{Targets, address_towards};
pub use addresses::{hidden_name, parse_ip};
pub use cores::{affinity, cores_text, threads_per_device};
pub use memory::{CGROUPS_MAX, CgroupId, FreeMemory, MemoryBound, MemoryClaim, free_memory, meminfo, memory_bounds};

/// No folder can be made in `TMPDIR`, or in `/tmp` if that variable is not set. The process exits with code 78.
#[derive(Debug, thiserror::Error)]
#[error("TMPDIR={}: cannot make a folder there: {cause}; set TMPDIR to an existing folder that is writable", .folder.display())]
pub struct TemporaryError {
    /// The folder for temporary files.
    pub folder: PathBuf,
    /// The error that the system returned.
    pub cause: ErrorKind,
}

/// Creates a folder that only this user can access, below `TMPDIR`. Dropping the value removes the folder.
pub fn temporary_folder(prefix: &str) -> Result<PrivateFolder, TemporaryError> {
    // The error of `PrivateFolder` contains a random path below `TMPDIR`. So this error contains `TMPDIR` instead.
    PrivateFolder::new(prefix).map_err(|error| TemporaryError { folder: env::temp_dir(), cause: error.kind() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_temporary_folder_is_private_and_an_error_names_tmpdir() {
        let folder = temporary_folder("shardflow-test-").unwrap();
        assert_eq!(fs::metadata(folder.path()).unwrap().permissions().mode() & 0o777, 0o700);
        let error = temporary_folder("shardflow-no-such/folder-").unwrap_err();
        assert_eq!((&error.folder, error.cause), (&env::temp_dir(), ErrorKind::NotFound));
        let message = TemporaryError { folder: "/no/such".into(), ..error }.to_string();
        assert!(message.starts_with("TMPDIR=/no/such: cannot make a folder there: "), "{message}");
    }
}
