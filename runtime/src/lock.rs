//! The lock of a checkpoint store: only one training job writes to the store at a time.
//!
//! The lock is a file `lock-<n>.json` that names the holder. A holder is alive while it holds `flock` on its file. On
//! network file systems and in cloud stores, other writers may not see `flock`, so the holder also renews the file.
//!
//! - LK-1: the process that created the file of the highest n holds the lock. Each file is created by an operation that
//!   fails if the file exists, so two processes never hold the lock at the same time.
//! - LK-2: a holder whose `flock` is held is alive. If its `flock` is free and visible to the waiting process, it is
//!   dead. Otherwise it is dead if it misses three renewals by the clock of the waiting process.
//! - LK-3: a higher epoch of the same job, or a later saver of the same process, takes the lock without waiting.
//! - LK-4: a process checks LK-1 before a commit, a deletion or a change of the cursor. If it loses the lock between
//!   the check and a commit, it may still commit a checkpoint of a step that has none. It replaces no manifest (ST-1).

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use object_store::{Error, PutMode};
use serde::{Deserialize, Serialize};

use crate::checkpoint::error::{CheckpointError, StoreOperation};
use crate::checkpoint::io::Operations;
use crate::checkpoint::store::Store;
use crate::files;

const RENEWAL: Duration = Duration::from_secs(10);
/// Poll interval for the lock of another process.
const POLL: Duration = Duration::from_secs(1);
/// A holder that misses this number of consecutive renewals counts as dead.
const MISSED_MAX: u32 = 3;
/// Maximum number of attempts to take the lock. Another process may win each attempt.
const ATTEMPTS_MAX: u32 = 100;
/// All numbers of locks are lower than this number. Entries with this number are ignored.
const NUMBER_END: u64 = u64::MAX;
/// Size of a lock file, in bytes. Its text is padded with spaces to this size, so that one write replaces the whole
/// file.
const FILE_BYTES: usize = 1024;
const RELEASE_TIMEOUT: Duration = Duration::from_millis(500);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    host: String,
    boot: String,
    pid: u32,
    /// Unix time in nanoseconds of the process's first lock. Distinguishes equal pids of two containers.
    process_ns: u64,
    job: Option<String>,
    epoch: u64,
    /// Unix time in nanoseconds at which this process created the lock.
    since_ns: u64,
    renewals: u64,
}

impl Holder {
    fn of_this_process(job: Option<String>, epoch: u64) -> Self {
        let read = |name: &str| fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default();
        let [host, boot] = ["hostname", "random/boot_id"].map(|name| read(name).trim().chars().take(256).collect());
        static FIRST_NS: OnceLock<u64> = OnceLock::new();
        let since_ns = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let (pid, process_ns) = (std::process::id(), *FIRST_NS.get_or_init(|| since_ns));
        let job = job.map(|job| job.chars().take(256).collect());
        Self { host, boot, pid, process_ns, job, epoch, since_ns, renewals: 0 }
    }

    fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(self).unwrap_or_default();
        text.resize(text.len().max(FILE_BYTES), b' ');
        text
    }

    fn is_on_host_of(&self, other: &Self) -> bool {
        (&self.host, &self.boot) == (&other.host, &other.boot)
    }

    /// LK-3: true if this process may take the lock from `other` without waiting.
    fn supersedes(&self, other: &Self) -> bool {
        let later = self.job.is_some() && self.job == other.job && self.epoch > other.epoch;
        later || (self.is_on_host_of(other) && (self.pid, self.process_ns) == (other.pid, other.process_ns))
    }
}

fn describe(text: &[u8]) -> String {
    let Ok(holder) = serde_json::from_slice::<Holder>(text) else { return "an unknown process".into() };
    let Holder { host, pid, job, epoch, since_ns, .. } = holder;
    let job = job.map(|job| format!(", job {job}")).unwrap_or_default();
    let since = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_nanos(since_ns));
    format!("process {pid} on host {host}{job}, epoch {epoch}, since {since}")
}

/// The held lock of a store. Dropping it releases the lock.
#[derive(Debug)]
pub(crate) struct Lock {
    pub(crate) store: Store,
    number: u64,
    holder: Holder,
    renewals: AtomicU64,
    /// Local folders that did not exist before this lock, innermost first.
    created: Vec<PathBuf>,
    /// The open lock file with its `flock`; `None` if the file could not be locked.
    file: Option<File>,
    /// Dropping the sender ends the renewing thread.
    _renewing: Option<Sender<()>>,
}

impl Lock {
    /// Takes the lock for a job and its epoch. If a holder's `flock` is not visible, waits up to 30 s for a renewal.
    pub(crate) fn take(store: &Store, job: Option<String>, epoch: u64) -> Result<Arc<Self>, CheckpointError> {
        Self::take_as(store, Holder::of_this_process(job, epoch))
    }

    fn take_as(store: &Store, holder: Holder) -> Result<Arc<Self>, CheckpointError> {
        let folders = store.local.iter().flat_map(|folder| folder.ancestors());
        let created: Vec<PathBuf> = folders.take_while(|folder| !folder.exists()).map(PathBuf::from).collect();
        for _ in 0..ATTEMPTS_MAX {
            let taken = entries(store)?;
            let newest = taken.iter().rev().find(|(_, is_file)| *is_file).map(|(number, _)| *number);
            if let Some(other) = newest.map(|number| live_holder(store, number, &holder)).transpose()?.flatten() {
                return Err(CheckpointError::Held { place: store.place().into(), holder: describe(&other) });
            }
            let number = taken.last().map_or(1, |(last, _)| last + 1);
            if number == NUMBER_END {
                let (place, last) = (store.place(), file_name(number - 1));
                let text =
                    format!("{place}/{last}: the number is too large for a lock; delete the file if no run uses it");
                return Err(CheckpointError::Refused(text));
            }
            let Some(file) = create(store, number, &holder)? else { continue };
            let numbers = numbers(store)?;
            // Read the file back: if the store returns other bytes, the lock cannot be checked.
            let is_own = read(store, number)?.as_deref() == Some(&holder.encode()[..]);
            if is_own && numbers.last() == Some(&number) {
                numbers.iter().filter(|older| **older < number).try_for_each(|older| delete(store, *older))?;
                let (store, renewals) = (store.clone(), 0.into());
                return Ok(Self { store, number, holder, renewals, created, file, _renewing: None }.renewed());
            }
        }
        let message = format!("{}: other processes took the lock first in all {ATTEMPTS_MAX} attempts", store.place());
        Err(CheckpointError::Refused(message))
    }

    /// Starts the renewing thread, if other processes rely on renewals.
    fn renewed(mut self) -> Arc<Self> {
        if is_flock_visible_to_all(&self.store) && self.file.is_some() {
            return Arc::new(self);
        }
        let (end, ended) = bounded(0);
        self._renewing = Some(end);
        let lock = Arc::new(self);
        let weak = Arc::downgrade(&lock);
        let renew = move || {
            while ended.recv_timeout(RENEWAL) == Err(RecvTimeoutError::Timeout) {
                let Some(lock) = weak.upgrade() else { return };
                match lock.renew() {
                    Ok(()) => {}
                    Err(CheckpointError::Fenced { .. }) => return,
                    Err(error) => tracing::warn!("cannot renew the lock of the checkpoints: {error}"),
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("checkpoint-lock".into()).spawn(renew) {
            tracing::warn!("no thread renews the lock of the checkpoints: {error}");
        }
        lock
    }

    fn renew(&self) -> Result<(), CheckpointError> {
        self.check()?;
        let renewals = self.renewals.fetch_add(1, Ordering::Relaxed) + 1;
        let text = Holder { renewals, ..self.holder.clone() }.encode();
        let at = self.store.top(&file_name(self.number));
        match self.file.as_ref().map(File::try_clone) {
            // Write in place, because a new file would have no `flock`.
            Some(file) => {
                let write = move || {
                    let file = file?;
                    file.write_all_at(&text, 0).and_then(|()| file.sync_data())
                };
                self.store.operations.run_local(&at.name, StoreOperation::Write, write)
            }
            None => self.store.operations.put(&at, text, PutMode::Overwrite),
        }
    }

    /// LK-4: checks that this process still holds the lock.
    pub(crate) fn check(&self) -> Result<(), CheckpointError> {
        let newest = numbers(&self.store)?.pop();
        let text = newest.map(|number| read(&self.store, number)).transpose()?.flatten();
        let current = text.as_deref().and_then(|text| serde_json::from_slice::<Holder>(text).ok());
        if current.is_some_and(|current| Holder { renewals: 0, ..current } == self.holder) {
            return Ok(());
        }
        let holder = text.map_or_else(|| "no process: the lock's file was deleted".into(), |text| describe(&text));
        Err(CheckpointError::Fenced { place: self.store.place().into(), holder })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.store.operations.deadline = self.store.operations.deadline.min(RELEASE_TIMEOUT);
        if let Err(error) = self.check().and_then(|()| delete(&self.store, self.number)) {
            tracing::debug!("could not release the lock of the checkpoints: {error}");
        }
        // Delete the created folders that are empty, so that a refused run leaves no folder.
        let created = std::mem::take(&mut self.created);
        let remove = move || {
            let _ = created.iter().try_for_each(fs::remove_dir);
            Ok(())
        };
        let _ = self.store.operations.run_local(self.store.place(), StoreOperation::Delete, remove);
    }
}

/// True if every process that can write to the store sees `flock`.
fn is_flock_visible_to_all(store: &Store) -> bool {
    store.local.as_deref().is_some_and(files::is_of_one_machine)
}

fn file_name(number: u64) -> String {
    format!("lock-{number}.json")
}

/// The number of each entry that is named like a lock, and whether the entry is a file. Numbers are in ascending order.
fn entries(store: &Store) -> Result<Vec<(u64, bool)>, CheckpointError> {
    let entry = |(name, bytes): (String, Option<u64>)| {
        let number = name.strip_prefix("lock-")?.strip_suffix(".json")?.parse().ok()?;
        (number < NUMBER_END && name == file_name(number)).then_some((number, bytes.is_some()))
    };
    let mut entries: Vec<(u64, bool)> = store.list(None, false)?.into_iter().filter_map(entry).collect();
    entries.sort_unstable();
    Ok(entries)
}

/// Numbers of all lock files, in ascending order.
fn numbers(store: &Store) -> Result<Vec<u64>, CheckpointError> {
    Ok(entries(store)?.into_iter().filter_map(|(number, is_file)| is_file.then_some(number)).collect())
}

fn read(store: &Store, number: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
    store.operations.get(&store.top(&file_name(number)), FILE_BYTES as u64 * 8)
}

fn delete(store: &Store, number: u64) -> Result<(), CheckpointError> {
    store.operations.delete(&store.top(&file_name(number)))
}

/// Creates a lock file. Returns `None` if another process was faster. Otherwise returns the file if it could be locked.
fn create(store: &Store, number: u64, holder: &Holder) -> Result<Option<Option<File>>, CheckpointError> {
    let (at, text) = (store.top(&file_name(number)), holder.encode());
    let Some(folder) = store.local.clone() else {
        return match store.operations.put(&at, text, PutMode::Create) {
            Ok(()) => Ok(Some(None)),
            Err(error) if error.is_there() => Ok(None),
            Err(CheckpointError::Store { source, .. })
                if matches!(*source, Error::NotImplemented { .. } | Error::NotSupported { .. }) =>
            {
                let why = format!("the store lacks conditional puts, which commits and locks require: {source}");
                Err(CheckpointError::Place { place: store.place().into(), why })
            }
            Err(error) => Err(error),
        };
    };
    store.operations.run_local(&at.name, StoreOperation::Write, move || {
        fs::create_dir_all(&folder)?;
        let file = match OpenOptions::new().write(true).create_new(true).open(folder.join(file_name(number))) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(None),
            file => file?,
        };
        let is_locked = match file.try_lock() {
            Ok(()) => true,
            // Another process locked the new file first, and considers this process dead.
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(_)) => false,
        };
        // If the disk is full, leave no lock behind.
        let written = file.write_all_at(&text, 0).and_then(|()| file.sync_data());
        written.inspect_err(|_| drop(fs::remove_file(folder.join(file_name(number)))))?;
        Ok(Some(is_locked.then_some(file)))
    })
}

/// The lock file's text, if its holder is alive and not superseded by `own`.
fn live_holder(store: &Store, number: u64, own: &Holder) -> Result<Option<Vec<u8>>, CheckpointError> {
    let Some(first) = read(store, number)? else { return Ok(None) };
    let holder = serde_json::from_slice::<Holder>(&first).ok();
    if holder.as_ref().is_some_and(|holder| own.supersedes(holder)) {
        return Ok(None);
    }
    if let Some(folder) = store.local.clone() {
        let lock = move || match File::open(folder.join(file_name(number))) {
            // The lock was released in the meantime.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Ok(())),
            file => Ok(file?.try_lock()),
        };
        let file = store.top(&file_name(number)).name;
        let locked = match store.operations.run_local(&file, StoreOperation::Read, lock)? {
            Ok(()) => Some(false),
            Err(TryLockError::WouldBlock) => Some(true),
            Err(TryLockError::Error(_)) => None,
        };
        let is_near = is_flock_visible_to_all(store) || holder.is_some_and(|holder| holder.is_on_host_of(own));
        match locked {
            Some(true) => return Ok(Some(first)),
            Some(false) if is_near => return Ok(None),
            _ => {}
        }
    }
    let Operations { clock, .. } = &store.operations;
    let (begin, limit) = (clock.now(), RENEWAL * MISSED_MAX);
    tracing::warn!("{}: {} holds the lock; waiting up to {limit:?} for a renewal", store.place(), describe(&first));
    while clock.now() - begin <= limit {
        clock.wait(POLL);
        match read(store, number)? {
            Some(text) if text == first => {}
            renewed => return Ok(renewed),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
