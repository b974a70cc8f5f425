//! Local files: listings, output paths, free space, kinds of file systems, and exclusive creation without hard links.

mod output;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;

pub use output::{OutputFileError, check_appendable, check_room, check_writable, hint, is_full, resolved};
pub(crate) use output::{folder_of, free_bytes, free_inodes};

/// `f_type` (statfs(2)) of the file systems that belong to one machine: all processes of the machine see writes
/// immediately, and `flock` works. The order is overlay, tmpfs, ext2 to 4, XFS, btrfs, ZFS, F2FS, bcachefs.
const OF_ONE_MACHINE: [u64; 8] =
    [0x794c_7630, 0x0102_1994, 0xef53, 0x5846_5342, 0x9123_683e, 0x2fc1_2fc1, 0xf2f5_2010, 0xca45_1a4e];
/// Maximum number of attempts to take a claim from other writers.
const CLAIMS_MAX: u32 = 10;

/// True for a file system of one machine; false for network and unknown file systems.
pub(crate) fn is_of_one_machine(folder: &Path) -> bool {
    let existing = folder.ancestors().find(|path| path.exists());
    let kind = existing.and_then(|path| rustix::fs::statfs(path).ok()).map(|stat| stat.f_type as u64);
    kind.is_some_and(|kind| OF_ONE_MACHINE.contains(&(kind & 0xffff_ffff)))
}

/// Lists files with sizes, and folders with `None`. If `deep` is set, lists the files in all subfolders instead of the
/// folders. Skips names that are not UTF-8, and entries that were deleted meanwhile.
pub(crate) fn list(folder: &Path, deep: bool) -> io::Result<BTreeMap<String, Option<u64>>> {
    let mut found = BTreeMap::new();
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let (Ok(name), Ok(meta)) = (entry.file_name().into_string(), fs::metadata(entry.path())) else { continue };
        match (meta.is_dir(), deep) {
            (false, _) => drop(found.insert(name, Some(meta.len()))),
            (true, false) => drop(found.insert(name, None)),
            (true, true) => {
                let inside = list(&entry.path(), true)?.into_iter();
                found.extend(inside.map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
            }
        }
    }
    Ok(found)
}

/// Deletes a file, or a folder with its content, if it exists.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// The innermost `io::Error` in an error's source chain.
pub(crate) fn system_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    let source = |error: &&'a (dyn std::error::Error + 'static)| error.source();
    std::iter::successors(Some(error), source).filter_map(|error| error.downcast_ref()).last()
}

/// True if a file could not be created because the file system has no hard links.
pub(crate) fn lacks_links(error: &(dyn std::error::Error + 'static)) -> bool {
    let code = system_error(error).and_then(Errno::from_io_error);
    code.is_some_and(|code| [Errno::PERM, Errno::OPNOTSUPP, Errno::NOSYS, Errno::MLINK].contains(&code))
}

/// Creates a synced file with its whole content if no file exists at `path`. Needs no hard links. The writer puts the
/// content into a folder of its own, and renames this folder to `<path>.claim`, the claim. This rename fails while the
/// claim has content. If `path` is still free, the writer then renames the content from the claim to `path`. Other
/// writers may delete the claim's content at any time, because the writer of that content may have died. A slow writer
/// then has nothing to rename. Hence a writer creates the file only if it finds `path` free while its own content is in
/// the claim. No writer moves the claim's folder, because a rename in progress would still find the content.
pub(crate) fn create_by_claim(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let with_suffix = |suffix: &str| {
        let mut name = path.as_os_str().to_os_string();
        name.push(suffix);
        PathBuf::from(name)
    };
    let nanoseconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let unique = format!("{}{nanoseconds}", std::process::id());
    // Object stores do not list names that end with `#` and digits.
    let [own, claim] = [format!("#{unique}"), ".claim".into()].map(|s| with_suffix(&s));
    fs::create_dir(&own)?;
    let mut file = File::create(own.join(&unique))?;
    file.write_all(bytes).and_then(|()| file.sync_all())?;
    for _ in 0..CLAIMS_MAX {
        match fs::rename(&own, &claim) {
            Ok(()) => {
                let free = if path.exists() { Err(ErrorKind::AlreadyExists.into()) } else { Ok(()) };
                let moved = free.and_then(|()| fs::rename(claim.join(&unique), path));
                let _ = fs::remove_file(claim.join(&unique));
                let _ = fs::remove_dir(&claim);
                return moved.and_then(|()| File::open(path.parent().unwrap_or(path))?.sync_all());
            }
            Err(error) if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {
                // Ignore errors: they mean that the other writer has just finished.
                for entry in fs::read_dir(&claim).into_iter().flatten().flatten() {
                    let _ = fs::remove_file(entry.path());
                }
            }
            Err(error) => return Err(error),
        }
    }
    let _ = fs::remove_dir_all(&own);
    Err(io::Error::new(ErrorKind::ResourceBusy, "other writers keep claiming the same file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claimed_file_is_created_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifest.json");
        create_by_claim(&path, b"first").unwrap();
        let again = create_by_claim(&path, b"second").unwrap_err();
        assert_eq!((again.kind(), fs::read(&path).unwrap()), (ErrorKind::AlreadyExists, b"first".to_vec()));
        assert_eq!(list(folder.path(), false).unwrap().into_keys().collect::<Vec<_>>(), ["manifest.json"]);
    }

    #[test]
    fn the_claim_of_a_dead_writer_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifest.json");
        fs::create_dir(folder.path().join("manifest.json.claim")).unwrap();
        fs::write(folder.path().join("manifest.json.claim/1"), "torn").unwrap();
        create_by_claim(&path, b"next").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"next");
        assert_eq!(list(folder.path(), true).unwrap().len(), 1);
    }

    #[test]
    fn only_one_of_several_writers_creates_the_file() {
        let folder = tempfile::tempdir().unwrap();
        for round in 0..50 {
            let path = folder.path().join(format!("{round}.json"));
            let created = std::thread::scope(|scope| {
                let create = |writer: u8| {
                    scope.spawn({
                        let path = path.clone();
                        move || create_by_claim(&path, &[writer; 100]).is_ok().then_some(writer)
                    })
                };
                let writers: Vec<_> = (0..4).map(create).collect();
                writers.into_iter().filter_map(|writer| writer.join().unwrap()).collect::<Vec<_>>()
            });
            assert_eq!(created.len(), 1, "round {round}: {created:?}");
            assert_eq!(fs::read(&path).unwrap(), [created[0]; 100]);
        }
    }

    #[test]
    fn names_that_are_not_utf_8_are_skipped() {
        use std::os::unix::ffi::OsStrExt;
        let folder = tempfile::tempdir().unwrap();
        let odd = std::ffi::OsStr::from_bytes(b"\xff");
        fs::create_dir_all(folder.path().join("a").join(odd)).unwrap();
        fs::write(folder.path().join(odd), "").unwrap();
        fs::write(folder.path().join("a/b"), "xy").unwrap();
        assert_eq!(list(folder.path(), false).unwrap(), BTreeMap::from([("a".into(), None)]));
        assert_eq!(list(folder.path(), true).unwrap(), BTreeMap::from([("a/b".into(), Some(2))]));
        assert!(list(&folder.path().join("none"), true).unwrap().is_empty());
    }
}
