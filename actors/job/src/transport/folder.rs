//! Private folders for sockets, inside the system's temporary folder.
//!
//! The owner locks the file `lock` in the folder. The kernel releases the lock when the owner dies for any reason, so
//! later owners can remove the folders of killed processes.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;

const PREFIX: &str = "shardflow-";
const LOCK: &str = "lock";

/// A folder that only this user can access. Dropping the value removes the folder.
#[derive(Debug)]
pub struct PrivateFolder {
    folder: TempDir,
    /// `None` on a file system without locks. There, a killed owner's folder is never removed.
    _lock: Option<File>,
}

impl PrivateFolder {
    /// Creates a folder named `prefix` (must be `shardflow-*`) plus random letters. Removes the folders of dead owners.
    pub fn new(prefix: &str) -> io::Result<Self> {
        remove_dead(&std::env::temp_dir());
        let private = Permissions::from_mode(0o700);
        let folder = tempfile::Builder::new().prefix(prefix).permissions(private).tempdir()?;
        let lock = lock(folder.path()).ok();
        Ok(Self { folder, _lock: lock })
    }

    /// Path of the folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Creates the lock file. It gets its final name only after it is locked, so the owner of an unlocked file is dead.
fn lock(folder: &Path) -> io::Result<File> {
    let (new, named) = (folder.join("lock.new"), folder.join(LOCK));
    let file = File::create(&new)?;
    file.try_lock()?;
    fs::rename(new, named)?;
    Ok(file)
}

/// An empty folder of this age has no owner, because an owner creates the lock file immediately.
const EMPTY_AGE: Duration = Duration::from_secs(600);

/// Removes this user's folders whose owners are dead. Skips folders that cannot be read or removed.
fn remove_dead(temporary: &Path) {
    let own = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(temporary).into_iter().flatten().flatten() {
        let is_named = entry.file_name().to_string_lossy().starts_with(PREFIX);
        // Reads the entry's own metadata, so symbolic links are not followed.
        let Some(data) = entry.metadata().ok().filter(|data| is_named && data.is_dir() && data.uid() == own) else {
            continue;
        };
        if data.modified().is_ok_and(|at| at.elapsed().is_ok_and(|age| age > EMPTY_AGE)) {
            // The owner was killed before it created the lock file. The call fails if the folder is not empty.
            let _ = fs::remove_dir(entry.path());
        }
        let is_dead = File::open(entry.path().join(LOCK)).is_ok_and(|file| file.try_lock().is_ok());
        if is_dead && let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::debug!(folder = %entry.path().display(), %error, "cannot remove the folder of a killed process");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_of_dead_owners_are_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = temporary.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let (living, dead, without, other) = (make("shardflow-a"), make("shardflow-b"), make("shardflow-c"), make("d"));
        let held = lock(&living).unwrap();
        // Dropping a file releases its lock, as the kernel does when the owner ends.
        drop(lock(&dead).unwrap());
        drop(lock(&other).unwrap());
        fs::write(dead.join("0.sock"), "").unwrap();
        remove_dead(temporary.path());
        let left = [&living, &dead, &without, &other].map(|path| path.exists());
        assert_eq!(left, [true, false, true, true]);
        drop(held);
        remove_dead(temporary.path());
        assert!(!living.exists());
    }

    #[test]
    fn an_old_empty_folder_without_a_lock_is_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let make = |name: &str, seconds: u64| {
            let path = temporary.path().join(name);
            fs::create_dir(&path).unwrap();
            (path, std::time::SystemTime::now() - Duration::from_secs(seconds))
        };
        let folders =
            [make("shardflow-old", 700), make("shardflow-new", 60), make("shardflow-full", 700), make("other", 700)];
        fs::write(folders[2].0.join("file"), "").unwrap();
        for (path, modified) in &folders {
            File::open(path).unwrap().set_modified(*modified).unwrap();
        }
        remove_dead(temporary.path());
        assert_eq!(folders.map(|(path, _)| path.exists()), [false, true, true, true]);
    }

    #[test]
    fn a_folder_is_removed_when_its_owner_is_dropped() {
        let folder = PrivateFolder::new("shardflow-test-").unwrap();
        let path = folder.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        // Creating another folder does not remove this one, because its owner is alive.
        drop(PrivateFolder::new("shardflow-test-").unwrap());
        assert!(path.join(LOCK).exists());
        drop(folder);
        assert!(!path.exists());
    }
}
