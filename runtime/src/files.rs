//! Local file systems: which belong to one machine, free space, listings, and files that are created once without hard links.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;

/// File systems of one machine, by `f_type` of statfs(2): writes are visible to all processes at once, and `flock` works.
/// Overlay, tmpfs, ext2 to 4, XFS, btrfs, ZFS, F2FS, bcachefs.
const OF_ONE_MACHINE: [u64; 8] =
    [0x794c_7630, 0x0102_1994, 0xef53, 0x5846_5342, 0x9123_683e, 0x2fc1_2fc1, 0xf2f5_2010, 0xca45_1a4e];
/// Most times that a claim is taken from another writer.
const CLAIMS_MAX: u32 = 10;

/// False for network file systems and unknown ones.
pub(crate) fn is_of_one_machine(folder: &Path) -> bool {
    let there = folder.ancestors().find(|path| path.exists());
    let kind = there.and_then(|path| rustix::fs::statfs(path).ok()).map(|stat| stat.f_type as u64);
    kind.is_some_and(|kind| OF_ONE_MACHINE.contains(&(kind & 0xffff_ffff)))
}

/// Free bytes for this process in the folder; `None` where the file system does not report them.
pub fn free_bytes(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    (stat.f_blocks > 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Names in a folder, with the sizes of files; folders have none. With `deep`, all files below it instead. Names that are not
/// UTF-8 are skipped, as are files that are deleted meanwhile.
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
                found.extend(
                    list(&entry.path(), true)?.into_iter().map(|(file, bytes)| (format!("{name}/{file}"), bytes)),
                );
            }
        }
    }
    Ok(found)
}

/// Deletes a file, or a folder with all that is in it, if it is there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// The system's error in the chain of another.
pub(crate) fn system_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    let below = |error: &&'a (dyn std::error::Error + 'static)| error.source();
    std::iter::successors(Some(error), below).filter_map(|error| error.downcast_ref()).last()
}

/// True when a file could not be created because the file system has no hard links.
pub(crate) fn lacks_links(error: &(dyn std::error::Error + 'static)) -> bool {
    let code = system_error(error).and_then(Errno::from_io_error);
    code.is_some_and(|code| [Errno::PERM, Errno::OPNOTSUPP, Errno::NOSYS, Errno::MLINK].contains(&code))
}

/// Creates a file, whole and synced, if there is none: without hard links. A folder with the content is moved to the name of
/// the claim, which fails while another writer's is there; the content is then moved from inside the claim to its place. A
/// claim may be taken at any time, from a writer that died or is slow: that writer then has nothing to move. So a writer
/// that finds the place free while it holds the claim is the only one that can fill it.
pub(crate) fn create_by_claim(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = |ending: &str| {
        let mut name = path.as_os_str().to_os_string();
        name.push(ending);
        PathBuf::from(name)
    };
    let nanoseconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let unique = format!("{}{nanoseconds}", std::process::id());
    // Object stores do not list names that end so.
    let (mine, taken, claim) = (beside(&format!("#{unique}")), beside(&format!("#{unique}0")), beside(".claim"));
    fs::create_dir(&mine)?;
    let mut file = File::create(mine.join(&unique))?;
    file.write_all(bytes).and_then(|()| file.sync_all())?;
    for _ in 0..CLAIMS_MAX {
        match fs::rename(&mine, &claim) {
            Ok(()) => {
                let free = if path.exists() { Err(ErrorKind::AlreadyExists.into()) } else { Ok(()) };
                let moved = free.and_then(|()| fs::rename(claim.join(&unique), path));
                let _ = fs::remove_file(claim.join(&unique));
                let _ = fs::remove_dir(&claim);
                return moved.and_then(|()| File::open(path.parent().unwrap_or(path))?.sync_all());
            }
            Err(error) if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {
                // If this fails, the other writer has just finished.
                let _ = fs::rename(&claim, &taken).and_then(|()| fs::remove_dir_all(&taken));
            }
            Err(error) => return Err(error),
        }
    }
    let _ = fs::remove_dir_all(&mine);
    Err(io::Error::new(ErrorKind::ResourceBusy, "other writers keep claiming the same file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a folder")
    }

    #[test]
    fn a_claimed_file_is_created_once() {
        let folder = folder();
        let path = folder.path().join("manifest.json");
        create_by_claim(&path, b"first").unwrap();
        let again = create_by_claim(&path, b"second").unwrap_err();
        assert_eq!((again.kind(), fs::read(&path).unwrap()), (ErrorKind::AlreadyExists, b"first".to_vec()));
        assert_eq!(list(folder.path(), false).unwrap().into_keys().collect::<Vec<_>>(), ["manifest.json"]);
    }

    #[test]
    fn a_writer_that_died_with_the_claim_is_not_in_the_way() {
        let folder = folder();
        let path = folder.path().join("manifest.json");
        fs::create_dir(folder.path().join("manifest.json.claim")).unwrap();
        fs::write(folder.path().join("manifest.json.claim/1"), "torn").unwrap();
        create_by_claim(&path, b"next").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"next");
        assert_eq!(list(folder.path(), true).unwrap().len(), 1);
    }

    #[test]
    fn of_many_writers_one_creates_the_file() {
        let folder = folder();
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
    fn names_that_are_not_utf_8_are_passed_over() {
        use std::os::unix::ffi::OsStrExt;
        let folder = folder();
        let odd = std::ffi::OsStr::from_bytes(b"\xff");
        fs::create_dir_all(folder.path().join("a").join(odd)).unwrap();
        fs::write(folder.path().join(odd), "").unwrap();
        fs::write(folder.path().join("a/b"), "xy").unwrap();
        assert_eq!(list(folder.path(), false).unwrap(), BTreeMap::from([("a".into(), None)]));
        assert_eq!(list(folder.path(), true).unwrap(), BTreeMap::from([("a/b".into(), Some(2))]));
        assert!(list(&folder.path().join("none"), true).unwrap().is_empty());
    }
}
