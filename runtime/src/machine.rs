//! Resources of this machine for a process: memory, cores, addresses, a folder for temporary files.

use std::env;
use std::io::ErrorKind;
use std::path::PathBuf;

use shardflow_actors::transport::PrivateFolder;

mod addresses;
mod cores;
mod memory;

pub(crate) use addresses::{Targets, address_towards, hidden_name, parse_ip};
pub use cores::threads_per_device;
pub(crate) use cores::{affinity, cores_text};
pub(crate) use memory::meminfo;
pub use memory::{FreeMemory, MemoryBound, free_memory};

/// `TMPDIR`, or `/tmp` without it, cannot be used. Ends with code 78.
#[derive(Debug, thiserror::Error)]
#[error("TMPDIR={}: cannot make a folder there: {cause}; set TMPDIR to a folder that exists and can be written to", .folder.display())]
pub struct TemporaryError {
    /// The folder for temporary files.
    pub folder: PathBuf,
    /// The system's error.
    pub cause: ErrorKind,
}

/// A new folder for this user only, below `TMPDIR`; it is removed with the value.
///
/// # Errors
/// [`TemporaryError`].
pub fn temporary_folder(prefix: &str) -> Result<PrivateFolder, TemporaryError> {
    // The library's error names a random path below it.
    PrivateFolder::new(prefix).map_err(|error| TemporaryError { folder: env::temp_dir(), cause: error.kind() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_temporary_folder_that_cannot_be_made_is_named() {
        let folder = temporary_folder("shardflow-test-").unwrap();
        assert_eq!(fs::metadata(folder.path()).unwrap().permissions().mode() & 0o777, 0o700);
        let message = TemporaryError { folder: "/no/such".into(), cause: ErrorKind::NotFound }.to_string();
        assert!(message.starts_with("TMPDIR=/no/such: cannot make a folder there: "), "{message}");
    }
}
