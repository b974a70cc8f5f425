//! Tests of the lock with a simulated clock.

use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use object_store::memory::InMemory;

use super::*;
use crate::clock::{SimulatedClock, WaitClock};

fn holder(pid: u32, job: &str, epoch: u64) -> Holder {
    let since_ns = 1_700_000_000 * 1_000_000_000 + u64::from(pid);
    let (host, boot, process_ns) = (format!("host-{pid}"), "b".into(), since_ns);
    Holder { host, boot, pid, process_ns, job: Some(job.into()), epoch, since_ns, renewals: 0 }
}

fn on_disk() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().to_str().unwrap()).unwrap();
    (folder, store)
}

fn in_cloud() -> (Arc<SimulatedClock>, Store) {
    let (clock, backend): (Arc<SimulatedClock>, Arc<dyn ObjectStore>) = (Arc::default(), Arc::new(InMemory::new()));
    (clock.clone(), Store::with(backend, "run").unwrap().with_clock(clock))
}

fn files(folder: &tempfile::TempDir) -> Vec<String> {
    files::list(folder.path(), true).unwrap().into_keys().collect()
}

#[test]
fn the_lock_of_a_folder_is_exclusive_and_the_error_names_the_holder() {
    let (folder, store) = on_disk();
    let first = Lock::take_as(&store, holder(1, "a", 3)).unwrap();
    let error = Lock::take_as(&store, holder(2, "b", 9)).unwrap_err();
    let expected = "process 1 on host host-1, job a, epoch 3, since 2023-11-14T22:13:20Z; end that run";
    assert!(error.to_string().contains(expected), "{error}");
    assert_eq!(error.exit_code(), 73);
    first.check().unwrap();
    drop(first);
    assert!(files(&folder).is_empty(), "the lock file is removed");
    drop(Lock::take_as(&store, holder(2, "b", 0)).unwrap());
}

#[test]
fn the_lock_of_a_killed_process_is_taken_at_once() {
    let (folder, store) = on_disk();
    drop(create(&store, 7, &holder(1, "a", 3)).unwrap());
    fs::write(folder.path().join("lock-8.json"), "torn").unwrap();
    let lock = Lock::take_as(&store, holder(2, "b", 0)).unwrap();
    assert_eq!(files(&folder), ["lock-9.json"]);
    lock.check().unwrap();
}

#[test]
fn a_holder_in_a_cloud_store_is_alive_while_it_renews() {
    let (clock, store) = in_cloud();
    let first = Lock::take_as(&store, holder(1, "a", 0)).unwrap();
    let renewing = first.clone();
    // The first holder renews only every 29 s, which is less than three intervals.
    clock.on_wait(move |now| {
        if now.as_secs() % 29 == 0 {
            renewing.renew().unwrap();
        }
    });
    for _ in 0..3 {
        let error = Lock::take_as(&store, holder(2, "b", 0)).unwrap_err();
        assert!(error.to_string().contains("process 1 on host host-1, job a"), "{error}");
    }
    clock.on_wait(|_| {});
    first.check().unwrap();
    // From now on the first holder does not renew.
    let begin = clock.now();
    let second = Lock::take_as(&store, holder(2, "b", 0)).unwrap();
    let waited = clock.now() - begin;
    assert!((RENEWAL * MISSED_MAX..=RENEWAL * MISSED_MAX + 2 * POLL).contains(&waited), "{waited:?}");
    // If the first holder still runs, it detects the loss and changes no file.
    assert!(matches!(first.check(), Err(CheckpointError::Fenced { .. })));
    assert!(matches!(first.renew(), Err(CheckpointError::Fenced { .. })));
    drop(first);
    second.check().unwrap();
}

#[test]
fn a_higher_epoch_takes_the_lock_at_once_and_fences_the_old_holder() {
    let (folder, local) = on_disk();
    let (clock, cloud) = in_cloud();
    for store in [&local, &cloud] {
        let old = Lock::take_as(store, holder(1, "a", 1)).unwrap();
        let new = Lock::take_as(store, holder(2, "a", 2)).unwrap();
        let error = old.check().unwrap_err().to_string();
        assert!(error.contains("held by process 2 on host host-2, job a, epoch 2"), "{error}");
        drop(old);
        new.check().unwrap();
        // A late process of an old epoch does not supersede the holder.
        let late = Lock::take_as(&local, holder(3, "a", 1)).unwrap_err();
        assert!(matches!(late, CheckpointError::Held { .. }), "{late}");
        if store.local.is_none() {
            assert_eq!(clock.now(), Duration::ZERO);
        } else {
            std::mem::forget(new);
        }
    }
    drop(folder);
}

#[test]
fn a_later_saver_of_the_same_process_takes_the_lock() {
    let (_folder, store) = on_disk();
    let first = Lock::take(&store, None, 0).unwrap();
    let second = Lock::take(&store, None, 0).unwrap();
    assert!(first.check().is_err());
    second.check().unwrap();
}

/// Containers of one host may share the host's name, and each container has a process with pid 1.
#[test]
fn a_process_of_another_container_is_another_process() {
    let (_folder, store) = on_disk();
    let first = Lock::take_as(&store, holder(1, "a", 0)).unwrap();
    let other = Holder { process_ns: 7, ..holder(1, "a", 0) };
    assert!(matches!(Lock::take_as(&store, other), Err(CheckpointError::Held { .. })));
    first.check().unwrap();
}

#[test]
fn only_one_of_several_processes_takes_a_dead_holders_lock() {
    let (_folder, store) = on_disk();
    for round in 0..20 {
        drop(create(&store, numbers(&store).unwrap().pop().unwrap_or(0) + 1, &holder(99, "dead", 0)).unwrap());
        let taken = std::thread::scope(|scope| {
            let take = |pid| {
                let store = &store;
                scope.spawn(move || Lock::take_as(store, holder(pid, "a", 0)).ok())
            };
            let threads: Vec<_> = (1..5).map(take).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        let held = taken.iter().filter(|lock| lock.check().is_ok()).count();
        assert_eq!(held, 1, "round {round}: {taken:?}");
    }
}

/// Folders and odd names may come from a copy of the store, or from a user.
#[test]
fn folders_and_odd_names_are_no_locks() {
    let (folder, store) = on_disk();
    for name in ["lock-1.json", "lock-3.json"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    for name in ["lock-18446744073709551615.json", "lock-007.json", "lock-.json", "lock-x.json"] {
        fs::write(folder.path().join(name), "odd").unwrap();
    }
    let lock = Lock::take_as(&store, holder(1, "a", 0)).unwrap();
    assert!(folder.path().join("lock-4.json").is_file());
    fs::create_dir(folder.path().join("lock-9.json")).unwrap();
    lock.check().unwrap();
    drop(lock);
    assert!(!folder.path().join("lock-4.json").exists());
    // No file with a higher number can be created.
    fs::write(folder.path().join("lock-18446744073709551614.json"), "odd").unwrap();
    let error = Lock::take_as(&store, holder(1, "a", 0)).unwrap_err().to_string();
    assert!(
        error.contains("lock-18446744073709551614.json: the number is too large for a lock; delete the file"),
        "{error}"
    );
}

#[test]
fn a_lock_whose_file_is_deleted_is_lost() {
    let (folder, store) = on_disk();
    let lock = Lock::take_as(&store, holder(1, "a", 0)).unwrap();
    fs::remove_file(folder.path().join("lock-1.json")).unwrap();
    assert!(lock.check().unwrap_err().to_string().contains("file was deleted"));
}

/// The shards that a manifest names may become visible late, and so may a manifest that rank 0 has reported.
#[test]
fn a_read_waits_for_files_that_another_process_has_written() {
    use crate::checkpoint::fuzz::sample_manifest;
    use crate::checkpoint::manifest::{Checksum, Cursor, Manifest, Shard};
    use crate::checkpoint::save::commit_manifest;
    let shard = Shard { file: "e0-0/shard-0-of-1.safetensors".into(), bytes: 3, blake3: Checksum::of(b"abc") };
    let cursor = Cursor::from([("sample".into(), "7".into())]);
    let manifest = Manifest { step: 4, cursor, shards: vec![shard], tensors: Vec::new(), ..sample_manifest() };
    let digest = manifest.cursor_digest();
    for (manifest_after, shard_after, is_there) in [(0, 60, true), (60, 0, true), (0, 100, false), (100, 0, false)] {
        let (clock, store) = in_cloud();
        let (writer, store) = (store.clone(), store.with_hidden(Duration::from_secs(90)));
        let manifest = manifest.clone();
        let mut pending: Vec<(u64, bool)> = vec![(manifest_after, true), (shard_after, false)];
        let mut appear = move |now: Duration| {
            pending.retain(|(after, is_manifest)| {
                if now.as_secs() < *after {
                    return true;
                }
                if *is_manifest {
                    commit_manifest(&writer, &manifest).unwrap();
                } else {
                    let file = &manifest.shards[0].file;
                    writer.operations.put(&writer.file(4, file), b"abc".to_vec(), PutMode::Overwrite).unwrap();
                }
                false
            });
        };
        appear(Duration::ZERO);
        clock.on_wait(appear);
        let read = store.read_as(4, digest);
        assert_eq!(read.is_ok(), is_there, "manifest after {manifest_after} s, shard after {shard_after} s: {read:?}");
        let expected = if is_there { 60 } else { 90 };
        assert_eq!(clock.now().as_secs(), expected, "manifest after {manifest_after} s, shard after {shard_after} s");
        if let Err(error) = read {
            let text =
                if shard_after > 0 { "damaged: the file is missing" } else { "no complete checkpoint of step 4" };
            assert!(error.to_string().contains(text), "{error}");
        }
    }
    // The read also waits for the cursor that rank 0 has read, and does not accept another cursor.
    let (clock, store) = in_cloud();
    commit_manifest(&store, &manifest).unwrap();
    let shard = store.file(4, &manifest.shards[0].file);
    store.operations.put(&shard, b"abc".to_vec(), PutMode::Overwrite).unwrap();
    let (writer, changed) = (store.clone(), Cursor::from([("sample".into(), "9".into())]));
    let digest = Manifest { cursor: changed.clone(), ..manifest }.cursor_digest();
    assert!(store.read_as(4, digest).unwrap_err().to_string().contains("its cursor differs from the one"));
    clock.on_wait(move |_| writer.set_cursor(4, changed.clone()).unwrap());
    let reader = store.with_hidden(Duration::from_secs(90)).read_as(4, digest).unwrap();
    assert_eq!(reader.manifest().cursor["sample"], "9");
}
