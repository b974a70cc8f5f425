//! Places that a program will write to, checked before the work whose result goes there. Imports nothing of this crate.

use std::io;
use std::path::{Path, PathBuf};

/// A file that could not be written later.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}: {cause}")]
pub struct PlaceError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub cause: io::Error,
}

/// Checks that a file can be made at `path`, and leaves nothing there: a file that is there already stays as it is.
///
/// # Errors
/// `path` is a folder or has no file name, or its folder is missing or may not be written to.
pub fn check_writable(path: &Path) -> Result<(), PlaceError> {
    let error = |cause| PlaceError { path: path.into(), cause };
    if path.is_dir() {
        return Err(error(io::ErrorKind::IsADirectory.into()));
    }
    // Saving moves a new file to this place, which would take that of a device or a pipe: `--save /dev/null`, say.
    if path.exists() && !path.is_file() {
        return Err(error(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a free place for one")));
    }
    let mut name = path.file_name().ok_or_else(|| error(io::ErrorKind::InvalidInput.into()))?.to_os_string();
    name.push(format!(".{}.probe", std::process::id()));
    let probe = path.with_file_name(name);
    std::fs::File::create(&probe).and_then(|_| std::fs::remove_file(&probe)).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_checked_and_left_alone() {
        let folder = std::env::temp_dir().join(format!("shardflow-files-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let file = folder.join("model");
        check_writable(&file).unwrap();
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        std::fs::write(&file, "kept").unwrap();
        check_writable(&file).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        for wrong in [folder.clone(), folder.join("no/such/model"), file.join("inside"), "..".into(), "".into()] {
            let error = check_writable(&wrong).unwrap_err().to_string();
            assert!(error.starts_with(&format!("cannot write {}: ", wrong.display())), "{error}");
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        // As `/dev/null` is, which nobody should risk here.
        let socket = folder.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(check_writable(&socket).unwrap_err().to_string().contains("neither a file nor a free place"));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
