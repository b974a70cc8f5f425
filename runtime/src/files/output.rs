//! Checks output paths and free space before the work that produces the output.

use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::io::Errno;

/// The error of a file that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}: {cause}")]
pub struct OutputFileError {
    pub path: PathBuf,
    pub cause: io::Error,
}

/// Checks that a file can be created or replaced at `path`. Leaves no new file and changes no existing file.
///
/// # Errors
/// If `path` is a folder, ends with a slash or has no file name; if its folder is missing or not writable; or if the
/// existing file cannot be replaced. A file cannot be replaced if it is immutable or a mount point, or if it belongs to
/// another user and its folder has the sticky bit.
pub fn check_writable(path: &Path) -> Result<(), OutputFileError> {
    let error = |cause| OutputFileError { path: path.into(), cause };
    if path.is_dir() {
        return Err(error(io::ErrorKind::IsADirectory.into()));
    }
    // Unlike the system, `Path::file_name` ignores a slash at the end.
    if path.file_name().is_some_and(|name| !path.as_os_str().as_bytes().ends_with(name.as_bytes())) {
        return Err(error(io::Error::new(io::ErrorKind::IsADirectory, "it ends with a slash, like a folder")));
    }
    // Saving renames a new file to this path. The rename would replace a device or a pipe, as with `--save /dev/null`.
    if path.exists() && !path.is_file() {
        return Err(error(io::Error::new(io::ErrorKind::InvalidInput, "it exists and is not a regular file")));
    }
    check_replaceable(path).map_err(error)?;
    let mut name = path.file_name().ok_or_else(|| error(io::ErrorKind::InvalidInput.into()))?.to_os_string();
    name.push(format!(".{}.probe", std::process::id()));
    let probe = path.with_file_name(name);
    let created = std::fs::File::create(&probe).and_then(|mut file| file.write_all(b"a probe"));
    let removed = std::fs::remove_file(&probe);
    created.and(removed).map_err(error)
}

/// Largest number of symbolic links that [`resolved`] follows.
const LINKS_MAX: usize = 40;

/// The path of the file that a write to `path` creates or replaces, without symbolic links. The file may not exist yet.
pub fn resolved(path: &Path) -> PathBuf {
    let mut path = path.to_path_buf();
    for _ in 0..LINKS_MAX {
        let folder = folder_of(&path).canonicalize();
        let (Ok(folder), Some(name)) = (folder, path.file_name()) else { break };
        path = folder.join(name);
        let Ok(target) = path.read_link() else { break };
        path = folder.join(target);
    }
    path
}

pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Checks that a rename can replace the file at `path`, if there is one. A rename can replace a write-protected file.
fn check_replaceable(path: &Path) -> io::Result<()> {
    let Ok(existing) = path.canonicalize() else { return Ok(()) };
    // Without O_TRUNC, opening changes nothing. EPERM, unlike EACCES, means an immutable or append-only file.
    match std::fs::OpenOptions::new().write(true).open(&existing) {
        Err(error) if [Errno::PERM, Errno::ROFS].map(|e| Some(e.raw_os_error())).contains(&error.raw_os_error()) => {
            return Err(error);
        }
        _ => {}
    }
    let attributes = statx(CWD, &existing, AtFlags::empty(), StatxFlags::BASIC_STATS).map(|stat| stat.stx_attributes);
    if attributes.is_ok_and(|bits| bits.contains(StatxAttributes::MOUNT_ROOT)) {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, "it is a mount point, which no file can replace"));
    }
    let (Some(folder), user) = (existing.parent(), rustix::process::geteuid()) else { return Ok(()) };
    let (folder, file) = (folder.metadata()?, existing.metadata()?);
    if folder.mode() & 0o1000 != 0 && ![file.uid(), folder.uid(), 0].contains(&user.as_raw()) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "it belongs to another user, in a folder with the sticky bit",
        ));
    }
    Ok(())
}

/// Checks that lines can be appended to `path`. Changes no file, and opens no pipe or terminal because that may block.
///
/// # Errors
/// The errors of [`check_writable`]. Also fails if the file system is full.
pub fn check_appendable(path: &Path) -> Result<(), OutputFileError> {
    match path.metadata() {
        Ok(existing) if existing.is_file() => {
            let opened = std::fs::OpenOptions::new().append(true).open(path);
            opened.map_err(|cause| OutputFileError { path: path.into(), cause })?;
            check_room(&path.canonicalize().unwrap_or_else(|_| path.into()), 1)
        }
        Ok(existing) if !existing.is_dir() => Ok(()),
        _ => check_writable(path),
    }
}

/// True if `cause` is a full disk or a file that would be too large.
pub fn is_full(cause: io::ErrorKind) -> bool {
    matches!(cause, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

/// What the user can change so that a file can be written; empty if there is no hint.
pub fn hint(cause: io::ErrorKind) -> &'static str {
    use io::ErrorKind as Kind;
    match cause {
        Kind::StorageFull | Kind::QuotaExceeded => "free up space there, or give another path",
        Kind::FileTooLarge => "raise the limit on the size of files (`ulimit -f`)",
        Kind::PermissionDenied | Kind::ReadOnlyFilesystem => {
            "give a path that this user may write to; `lsattr` lists files and folders that are immutable"
        }
        Kind::NotFound | Kind::NotADirectory => "give a file in a folder that exists",
        Kind::IsADirectory => "give a file, not a folder",
        Kind::ResourceBusy | Kind::InvalidInput => "give another file",
        _ => "",
    }
}

/// Checks that the file system of `path` has `bytes` bytes of free space.
pub fn check_room(path: &Path, bytes: u64) -> Result<(), OutputFileError> {
    let Some(free) = free_bytes(folder_of(path)) else { return Ok(()) };
    if free >= bytes {
        return Ok(());
    }
    let cause = io::Error::new(io::ErrorKind::StorageFull, format!("{free} bytes are free, but {bytes} are needed"));
    Err(OutputFileError { path: path.into(), cause })
}

/// Bytes that this process can still write in the folder; `None` if the file system does not report them.
pub(crate) fn free_bytes(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    (stat.f_blocks > 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Number of files that can still be created in the folder; `None` if the file system does not limit them.
pub(crate) fn free_inodes(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    (stat.f_files > 0).then_some(stat.f_favail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_changes_no_file() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path();
        let file = folder.join("model");
        check_writable(&file).unwrap();
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), 0);
        std::fs::write(&file, "kept").unwrap();
        check_writable(&file).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        let slash = [folder.join("new/"), folder.join("new/."), file.join("")];
        for wrong in [folder.into(), folder.join("no/such/model"), file.join("inside"), "..".into(), "".into()]
            .into_iter()
            .chain(slash)
        {
            let error = check_writable(&wrong).unwrap_err().to_string();
            assert!(error.starts_with(&format!("cannot write {}: ", wrong.display())), "{error}");
        }
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1);
        // A socket stands in for `/dev/null`, which a test should not put at risk.
        let socket = folder.join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(check_writable(&socket).unwrap_err().to_string().contains("not a regular file"));
    }

    #[test]
    fn a_file_that_a_rename_cannot_replace_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path();
        let file = folder.join("model");
        std::fs::write(&file, "kept").unwrap();
        let chattr = |flag: &str| std::process::Command::new("chattr").arg(flag).arg(&file).output();
        if chattr("+i").is_ok_and(|output| output.status.success()) {
            let (error, link) = (check_writable(&file).unwrap_err(), folder.join("link"));
            std::os::unix::fs::symlink(&file, &link).unwrap();
            let link_error = check_writable(&link).unwrap_err();
            assert!(chattr("-i").is_ok_and(|output| output.status.success()));
            assert_eq!(error.cause.raw_os_error(), Some(Errno::PERM.raw_os_error()));
            assert_eq!(link_error.cause.raw_os_error(), Some(Errno::PERM.raw_os_error()));
        } else {
            println!("SKIPPED: chattr +i is not permitted here");
        }
        // A write-protected file can be replaced.
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
        check_writable(&file).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        // Containers have files that are mount points.
        match ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"].iter().find(|path| is_mount_point(path)) {
            Some(path) => drop(check_writable(Path::new(path)).unwrap_err()),
            None => println!("SKIPPED: no file is a mount point here"),
        }
    }

    fn is_mount_point(path: &str) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        mounts.lines().any(|line| line.split(' ').nth(1) == Some(path))
    }

    #[test]
    fn appendable_paths_are_checked() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path();
        let file = folder.join("log");
        check_appendable(&file).unwrap();
        assert!(!file.exists(), "a probe is removed");
        std::fs::write(&file, "kept").unwrap();
        check_appendable(&file).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        check_appendable(Path::new("/dev/null")).unwrap();
        let kind = |path: &Path| check_appendable(path).unwrap_err().cause.kind();
        assert_eq!(kind(folder), io::ErrorKind::IsADirectory);
        assert_eq!(kind(&folder.join("no/log")), io::ErrorKind::NotFound);
        assert_eq!(kind(&file.join("log")), io::ErrorKind::NotADirectory);
    }

    #[test]
    fn paths_of_one_file_are_resolved_to_one_path() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path();
        std::fs::create_dir_all(folder.join("sub")).unwrap();
        let link = |target: &str, name: &str| std::os::unix::fs::symlink(target, folder.join(name)).unwrap();
        link("../file", "sub/dangling");
        link("sub", "alias");
        link("loop", "loop");
        let file = folder.canonicalize().unwrap().join("file");
        for path in ["file", "./file", "sub/../file", "sub/dangling", "alias/dangling"] {
            assert_eq!(resolved(&folder.join(path)), file, "{path}");
        }
        assert_ne!(resolved(&folder.join("sub/file")), file);
        assert!(resolved(&folder.join("loop")).ends_with("loop"));
        assert_eq!(resolved(Path::new("x")), std::env::current_dir().unwrap().canonicalize().unwrap().join("x"));
        assert_eq!(resolved(Path::new("no/such/x")), Path::new("no/such/x"));
    }

    #[test]
    fn hints_fit_the_cause() {
        let hint_of = |errno: Errno| hint(io::Error::from(errno).kind());
        for (errno, expected) in [
            (Errno::PERM, "immutable"),
            (Errno::ACCESS, "this user may write"),
            (Errno::ROFS, "may write to"),
            (Errno::NOSPC, "free up space"),
            (Errno::DQUOT, "free up space"),
            (Errno::NOENT, "a folder that exists"),
            (Errno::NOTDIR, "a folder that exists"),
            (Errno::ISDIR, "not a folder"),
        ] {
            assert!(hint_of(errno).contains(expected), "{errno}: {}", hint_of(errno));
        }
        assert_eq!(hint_of(Errno::IO), "", "an unknown cause has no hint");
    }

    #[test]
    fn free_space_is_checked() {
        check_room(Path::new("model"), 1).unwrap();
        let error = check_room(&std::env::temp_dir().join("model"), u64::MAX).unwrap_err();
        assert_eq!(error.cause.kind(), io::ErrorKind::StorageFull, "{error}");
    }
}
