//! Checkpoints under faults: a process killed during a save, altered and truncated files, a full disk, a hanging store.
//! The newest complete checkpoint always loads, a torn checkpoint never loads, and training continues.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::{ObjectStore, ObjectStoreExt};
use shardflow::checkpoint::manifest::{Manifest, StoredTensor, TensorKind, TensorMeta};
use shardflow::checkpoint::snapshot::SnapshotPiece;
use shardflow::checkpoint::{
    CheckpointError, CheckpointReader, ProcessRank, SaveId, SaveOutcome, SaveReport, SaveStart, Saver, SaverOptions,
    SingleProcess, Snapshot, Store, WhenBusy, save_now,
};
use shardflow::init::mix;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::session::Session;
use shardflow_integration_tests::faulty::{FaultyStore, StoreFault};
use shardflow_integration_tests::together::{SharedMemoryAgreement, save_together};
use shardflow_integration_tests::training::{Model, Scratch, options, within};
use shardflow_kernels::tensor::{HostTensor, Region, split_range};

/// Shape of the tensor in the tests that need no session.
const SHAPE: [usize; 2] = [40, 16];

/// Returns the parts that two processes write at a step. The values are unique to this step.
fn parts(step: u64) -> Vec<Snapshot> {
    let info = TensorMeta {
        name: "weight".into(),
        kind: TensorKind::Parameter,
        dtype: shardflow_kernels::tensor::DType::F32,
        shape: SHAPE.to_vec(),
        saved_shape: SHAPE.to_vec(),
        layout: "(S0)".into(),
        axes: "data=2".into(),
        devices: vec![0, 1],
    };
    let part = |process| {
        let rows = split_range(SHAPE[0], 2, process);
        let region = Region { start: vec![rows.start, 0], size: vec![rows.len(), SHAPE[1]] };
        let value = |i: usize| (step as f32) + ((rows.start * SHAPE[1] + i) as f32) / 4096.0;
        let data = HostTensor::f32(&region.size, (0..region.element_count()).map(value).collect());
        let (updates, mesh) = (Some(step), "data=2".into());
        let tensors = vec![StoredTensor { info: info.clone(), pieces: Vec::new() }];
        let manifest = Manifest { step, updates, seed: 1, mesh, tensors, ..Manifest::default() };
        Snapshot { manifest, pieces: vec![SnapshotPiece { tensor: 0, region, data }] }
    };
    (0..2).map(part).collect()
}

/// Checks that the checkpoint holds the exact values of its step.
fn check_contents(reader: &CheckpointReader) {
    let step = reader.manifest().step;
    let whole = reader.tensor("weight", &Region::whole(&SHAPE)).expect("a verified checkpoint");
    let expected = |i: usize| (step as f32) + (i as f32) / 4096.0;
    assert!(whole.as_f32().expect("floats").iter().enumerate().all(|(i, v)| *v == expected(i)), "step {step}");
}

/// Sets a low part size. Each shard then needs several parts.
fn small_parts(store: Store) -> Store {
    store.with_part_bytes(512)
}

/// Saves the step as two processes. Process 1 finishes writing before process 0 begins, so the order of operations is
/// fixed.
fn save_in_order(store: &Store, step: u64, epoch: u64) -> Vec<SaveReport> {
    let (agreement, parts) = (SharedMemoryAgreement::new(2), parts(step));
    let save = |process: u32| {
        let options =
            SaverOptions { member: ProcessRank { process, processes: 2, epoch }, keep: 2, ..SaverOptions::default() };
        save_now(store, &parts[process as usize], &agreement, &options, 0).expect("valid options")
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| save(1));
        agreement.wait_for_another(SaveId { epoch, step, attempt: 0 });
        vec![save(0), other.join().expect("no panic")]
    })
}

const CHILD: &str = "SHARDFLOW_TEST_CHECKPOINT_KILL";

/// The child process of the next test. It does nothing when it is run directly.
#[test]
fn child_that_saves_until_it_is_killed() {
    let Ok(arguments) = std::env::var(CHILD) else { return };
    let (folder, at) = arguments.split_once(' ').expect("a folder and a number");
    let inner = LocalFileSystem::new_with_prefix(folder).expect("the folder is there").with_fsync(true);
    let faulty =
        FaultyStore::new(Arc::new(inner), StoreFault::Kill, at.parse().expect("a number"), Some(folder.into()));
    let store = small_parts(Store::with(Arc::new(faulty), "").expect("a store"));
    let reports = save_in_order(&store, 4, 1);
    assert!(reports.iter().all(|r| r.result.is_ok() && r.prune.is_none()));
}

/// Runs the child above, and returns whether it was killed before it finished.
fn run_child_killed_at(folder: &Path, at: usize) -> bool {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child.args(["--exact", "child_that_saves_until_it_is_killed"]);
    child.env(CHILD, format!("{} {at}", folder.display()));
    let status = child.stdout(std::process::Stdio::null()).status().expect("started");
    assert!(status.success() || status.signal() == Some(9), "operation {at}: the child ended with {status}");
    !status.success()
}

fn committed(folder: &Path) -> Vec<u64> {
    let store = open(folder);
    store.steps().expect("listed")
}

fn open(folder: &Path) -> Store {
    small_parts(Store::open(folder.to_str().expect("a path of UTF-8")).expect("a folder"))
}

/// A save by two processes is killed (`kill -9`) before one of its operations, and leaves half-written files. Each case
/// selects another operation. Every listed checkpoint is complete, the commit is atomic, and the next start of the job
/// saves and removes the half-written files.
#[test]
fn a_save_killed_at_any_operation_is_complete_or_absent() {
    within(120, || {
        let scratch = Scratch::new("checkpoint-kill");
        let (mut at, mut seen) = (0, [0, 0]);
        loop {
            let folder = scratch.path().join(at.to_string());
            std::fs::create_dir(&folder).expect("created");
            for step in [1, 2] {
                save_in_order(&open(&folder), step, 0);
            }
            let is_killed = run_child_killed_at(&folder, at);
            let newest = open(&folder).newest_verified().expect("listed");
            assert!(newest.damaged.is_empty(), "operation {at}: {:?}", newest.damaged);
            let reader = newest.reader.expect("at least the previous checkpoint");
            check_contents(&reader);
            assert!([2, 4].contains(&reader.manifest().step), "operation {at}: got step {}", reader.manifest().step);
            for step in committed(&folder) {
                let whole = open(&folder).read(step).and_then(|reader| reader.verify());
                whole.unwrap_or_else(|e| panic!("operation {at}: step {step} is listed but incomplete: {e}"));
            }
            seen[usize::from(reader.manifest().step == 4)] += 1;
            // After a restart, the job may reach the same step again. The job then continues.
            for (step, epoch) in [(4, 2), (6, 2)] {
                for report in save_in_order(&open(&folder), step, epoch) {
                    assert!(report.result.is_ok() && report.prune.is_none(), "operation {at}: {report:?}");
                }
            }
            assert_eq!(committed(&folder), [4, 6], "operation {at}: committed steps");
            check_contents(&open(&folder).read(4).expect("a kept checkpoint"));
            assert_eq!(files(&folder), 2 * 5, "operation {at}: leftovers and torn files remain");
            if !is_killed {
                break;
            }
            at += 1;
        }
        // The operations include shards in parts, sidecars, the manifest and deletions.
        assert!(at > 30 && seen[0] > 15 && seen[1] > 10, "{at} operations, {seen:?}");
    });
}

/// A job freezes before one operation of a save; each case selects another operation. The job's successor commits the
/// same step, and then the frozen job continues. The first commit stays complete, and only the job that made this
/// commit reports a commit.
#[test]
fn a_job_that_resumes_after_a_freeze_commits_nothing_twice() {
    within(60, || {
        for at in 0.. {
            let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let healthy = small_parts(Store::with(memory.clone(), "run").expect("a store"));
            let (successor, (sender, results)) = (healthy.clone(), std::sync::mpsc::channel());
            let work = move || {
                let reports = save_in_order(&successor, 4, 2);
                let _ = sender.send(reports.into_iter().map(|r| r.result.expect("nothing fails")).collect::<Vec<_>>());
            };
            let faulty = Arc::new(FaultyStore::meanwhile(memory, at, Box::new(work)));
            let store = small_parts(Store::with(faulty, "run").expect("a store"));
            let frozen = save_in_order(&store, 4, 1);
            let Ok(saved) = results.try_recv() else {
                assert!(at > 20, "{at} operations");
                return;
            };
            let reader = healthy.read(4).expect("a committed checkpoint");
            reader.verify().unwrap_or_else(|e| panic!("operation {at}: {e}"));
            check_contents(&reader);
            let winner = if saved[0] == SaveOutcome::Committed { 2 } else { 1 };
            assert_eq!(reader.manifest().epoch, winner, "operation {at}: successor {saved:?}, frozen job {frozen:?}");
            for report in frozen {
                // The frozen job reports files as missing if its successor has deleted them as leftovers.
                let is_winner = matches!(report.result, Ok(SaveOutcome::Committed));
                assert_eq!(is_winner, winner == 1, "operation {at}: {:?}", report.result);
            }
        }
    });
}

/// Returns the number of files below a folder.
fn files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").path());
    entries.map(|path| if path.is_dir() { files(&path) } else { 1 }).sum()
}

/// The disk fills up at one operation of a save; each case selects another operation. The error names the file, no
/// checkpoint is listed, and the next save succeeds after there is space again.
#[test]
fn a_full_disk_fails_only_the_save() {
    within(60, || {
        let mut at = 0;
        loop {
            let faulty = FaultyStore::new(Arc::new(InMemory::new()), StoreFault::Full, usize::MAX, None);
            let healthy = small_parts(Store::with(Arc::new(faulty.clone()), "run").expect("a store"));
            assert!(save_in_order(&healthy, 2, 0).iter().all(|r| r.result.is_ok()));
            let before = faulty.operations();
            let failing = FaultyStore::new(Arc::new(faulty.clone()), StoreFault::Full, at, None);
            let store = small_parts(Store::with(Arc::new(failing.clone()), "run").expect("a store"));
            let reports = save_in_order(&store, 4, 0);
            let is_committed = healthy.steps().expect("listed").contains(&4);
            for report in &reports {
                match &report.result {
                    Ok(saved) => assert!(is_committed && *saved == SaveOutcome::Committed),
                    Err(error) => {
                        let text = error.to_string();
                        assert!(!is_committed && error.exit_code() == 73, "{text}");
                        assert!(
                            text.contains("No space left on device") && text.contains("/step-000000000004/"),
                            "{text}"
                        );
                    }
                }
            }
            check_contents(&healthy.newest_verified().expect("listed").reader.expect("a checkpoint"));
            failing.heal();
            assert!(save_in_order(&store, 6, 0).iter().all(|r| r.result.is_ok()));
            check_contents(&store.read(6).expect("a committed checkpoint"));
            assert!(faulty.operations() > before);
            if is_committed {
                break;
            }
            at += 1;
        }
        assert!(at > 15, "{at} operations");
    });
}

/// A training commits newer checkpoints and deletes older checkpoints at one operation of a read; each case selects
/// another operation. The read returns the old checkpoint or a newer one, and never reports damage.
#[test]
fn a_checkpoint_that_is_deleted_during_a_read_is_not_damaged() {
    within(60, || {
        let (mut deleted, mut newer) = (0, 0);
        for at in 0.. {
            let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let writer = small_parts(Store::with(memory.clone(), "run").expect("a store"));
            assert!(save_in_order(&writer, 2, 0).iter().all(|report| report.result.is_ok()));
            let training = writer.clone();
            let replace = move || {
                assert!(save_in_order(&training, 4, 0).iter().all(|report| report.result.is_ok()));
                training.prune(4, 1, None).expect("pruned");
                assert_eq!(training.steps().expect("listed"), [4]);
            };
            let reading = FaultyStore::meanwhile(memory, at, Box::new(replace));
            let store = small_parts(Store::with(Arc::new(reading.clone()), "run").expect("a store"));
            let newest = store.newest().expect("listed");
            assert!(newest.damaged.is_empty(), "operation {at}: {:?}", newest.damaged);
            let reader = newest.reader.unwrap_or_else(|| panic!("operation {at}: no checkpoint"));
            newer += usize::from(reader.manifest().step == 4);
            match reader.verify() {
                Ok(()) => {}
                Err(CheckpointError::Deleted { step: 2, .. }) => deleted += 1,
                Err(error) => panic!("operation {at}: {error}"),
            }
            if reading.operations() <= at {
                break;
            }
        }
        assert!(deleted > 0 && newer > 1, "{deleted} reads of deleted checkpoints, {newer} of newer ones");
    });
}

/// The store hangs from one operation on; each case selects another operation. The save ends by its deadline, its error
/// names the file, and the previous checkpoint still loads.
#[test]
fn a_stalled_store_ends_the_save_by_its_deadline() {
    within(60, || {
        let count = |store: FaultyStore| {
            save_in_order(&small_parts(Store::with(Arc::new(store.clone()), "run").expect("a store")), 4, 0);
            store.operations()
        };
        let operations = count(FaultyStore::new(Arc::new(InMemory::new()), StoreFault::Stall, usize::MAX, None));
        assert!(operations > 20, "{operations}");
        // All cases run at the same time, because they only wait.
        let stall_at = |at| {
            let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let healthy = Store::with(memory.clone(), "run").expect("a store");
            save_in_order(&healthy, 2, 0);
            let faulty = Arc::new(FaultyStore::new(memory, StoreFault::Stall, at, None));
            let deadline = Duration::from_millis(800);
            let store = small_parts(Store::with(faulty, "run").expect("a store").with_deadline(deadline));
            let reports = save_in_order(&store, 4, 0);
            let is_committed = healthy.steps().expect("listed").contains(&4);
            for report in reports {
                let stalled = report.result.err().map(|e| e.to_string());
                assert_eq!(stalled.is_none(), is_committed, "operation {at}: {stalled:?}");
                let named = stalled.iter().all(|t| t.contains("/step-000000000004/") && t.contains("no response"));
                assert!(named, "operation {at}: {stalled:?}");
                let pruned = report.prune.map(|e| e.to_string());
                assert!(pruned.iter().all(|text| text.contains("no response")), "operation {at}: {pruned:?}");
            }
            check_contents(&healthy.newest_verified().expect("listed").reader.expect("a checkpoint"));
            is_committed
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..operations).map(|at| scope.spawn(move || stall_at(at))).collect();
            let committed = threads.into_iter().map(|t| t.join().expect("no assertion failed"));
            let committed: Vec<bool> = committed.collect();
            assert!(committed.is_sorted(), "exactly one operation must decide about the commit: {committed:?}");
            assert!(!committed[0] && committed[operations - 1]);
        });
    });
}

fn model() -> Model {
    Model { layers: 1, heads: 2, width: 8, context: 8, batch: 4, dropout: 0.1, ..Model::default() }
}

fn session(mesh: &str) -> Session {
    model().session(mesh, &options(1, OneFOneB))
}

/// The store fills up or stalls while a training runs. No step waits for the store, and the losses do not change.
#[test]
fn training_continues_while_saves_fail() {
    within(60, || {
        let mut undisturbed = session("data=2");
        let losses: Vec<_> = (0..30).map(|_| model().step(&mut undisturbed).loss.map(f32::to_bits)).collect();
        for (fault, message) in [(StoreFault::Full, "No space left"), (StoreFault::Stall, "no response")] {
            let faulty = FaultyStore::new(Arc::new(InMemory::new()), fault, 12, None);
            let store = Store::with(Arc::new(faulty.clone()), "run").expect("a store");
            let store = store.with_deadline(Duration::from_secs(2));
            let options = SaverOptions { busy: WhenBusy::Skip, ..SaverOptions::default() };
            let mut saver = Saver::new(store.clone(), Arc::new(SingleProcess), options).expect("a thread");
            let mut here = session("data=2");
            let (mut failed, mut skipped, mut again) = (None, 0, Vec::new());
            for step in 0..30 {
                let begun = saver.save(&here, BTreeMap::new()).expect("a running session");
                skipped += usize::from(matches!(begun, SaveStart::Skipped));
                if let SaveStart::Started { before: Some(report) } = begun {
                    failed = failed.or(report.result.err());
                }
                again.push(model().step(&mut here).loss.map(f32::to_bits));
                failed = failed.or(saver.poll().and_then(|report| report.result.err()));
                assert!(step < 29 || fault == StoreFault::Full || skipped > 0, "training waited for a stalled save");
            }
            assert_eq!(again, losses);
            if failed.is_none() {
                let report = saver.wait(Duration::from_secs(20)).expect("the save ends").expect("a save in progress");
                failed = report.result.err();
            }
            let error = failed.expect("the store failed").to_string();
            assert!(error.contains(message) && error.contains("faulty://run/step-0000"), "{error}");
            let begin = Instant::now();
            drop(saver);
            assert!(begin.elapsed() < Duration::from_secs(1), "dropping the saver must not wait");
            faulty.heal();
            let report = save_now(
                &store,
                &here.snapshot(None).expect("a running session"),
                &SingleProcess,
                &SaverOptions::default(),
                99,
            );
            assert_eq!(report.expect("valid options").result.expect("the healed store"), SaveOutcome::Committed);
            let mut resumed = session("stage=1");
            assert_eq!(resumed.restore_newest(&store).expect("loads").found.map(|f| f.0), Some(30));
        }
    });
}

/// Returns all files of a store.
fn all_files(memory: &InMemory) -> BTreeMap<object_store::path::Path, Vec<u8>> {
    let list = async {
        let metas: Vec<_> = memory.list(None).try_collect().await.expect("listed");
        let mut files = BTreeMap::new();
        for meta in metas {
            let bytes =
                memory.get(&meta.location).await.expect("an existing file").bytes().await.expect("an existing file");
            files.insert(meta.location, bytes.to_vec());
        }
        files
    };
    blocking(list)
}

fn blocking<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(work)
}

/// Returns the bits of parameters and optimizer state.
fn state(session: &Session) -> Vec<Vec<u32>> {
    let pieces = session.snapshot(None).expect("a running session").pieces;
    pieces.iter().map(|p| p.data.as_f32().expect("floats").iter().map(|v| v.to_bits()).collect()).collect()
}

/// In 200 cases one bit of a file is flipped, and in another 200 cases a file is truncated. The loaded state is always
/// correct, and the result names each checkpoint that was skipped.
#[test]
fn altered_and_cut_files_are_found_and_named() {
    within(120, || {
        let memory = Arc::new(InMemory::new());
        let store = Store::with(memory.clone(), "").expect("a store");
        let mut writer = session("data=2,stage=1,tensor=2");
        let mut expected = BTreeMap::new();
        for step in [1u64, 2] {
            model().step(&mut writer);
            let parts: Vec<Snapshot> =
                (0..4).map(|d| writer.snapshot_of(d..d + 1, None).expect("a running session")).collect();
            assert!(save_together(&store, &parts, 0, 2).iter().all(|r| r.result.is_ok()));
            let mut reader = session("tensor=2");
            reader.restore_checkpoint(&store.read(step).expect("a committed checkpoint")).expect("fits");
            expected.insert(step, state(&reader));
        }
        let files = all_files(&memory);
        let newest: Vec<_> =
            files.keys().filter(|path| path.as_ref().starts_with("step-000000000002")).cloned().collect();
        assert_eq!(newest.len(), 4 + 4 + 1, "shards, sidecars, manifest");
        let mut reader = session("tensor=2");
        let (mut seed, mut skipped) = (1, 0);
        let mut random = |below: usize| {
            seed = mix(seed);
            (seed % below as u64) as usize
        };
        for case in 0..400 {
            let path = &newest[random(newest.len())];
            let mut bytes = files[path].clone();
            let at = random(bytes.len());
            if case % 2 == 0 {
                bytes[at] ^= 1 << random(8)
            } else {
                bytes.truncate(at)
            }
            blocking(memory.put(path, bytes.into())).expect("written");

            let matters = !path.as_ref().contains("shard-") || !path.as_ref().ends_with(".json");
            let text = format!("case {case}: {path} changed at byte {at}");
            let verified = store.newest_verified().expect("listed");
            let found = verified.reader.expect("the older checkpoint").manifest().step;
            assert_eq!(found, if matters { 1 } else { 2 }, "{text}");
            assert!(
                verified.damaged.iter().all(|e| e.to_string().contains(path.as_ref())),
                "{text}: {:?}",
                verified.damaged
            );
            assert_eq!(verified.damaged.len(), usize::from(matters), "{text}");

            let restored = reader.restore_newest(&store).unwrap_or_else(|e| panic!("{text}: {e}"));
            let step = restored.found.expect("the older checkpoint").0;
            assert!(state(&reader) == expected[&step], "{text}: wrong bits of step {step}");
            assert_eq!(restored.damaged.len(), usize::from(step == 1), "{text}");
            let named = |e: &CheckpointError| e.is_damage() && e.to_string().contains(path.as_ref());
            assert!(restored.damaged.iter().all(named), "{text}: {:?}", restored.damaged);
            skipped += usize::from(step == 1);
            blocking(memory.put(path, files[path].clone().into())).expect("written");
        }
        assert!(skipped > 150, "only {skipped} of 400 damaged checkpoints were skipped");
        // If all checkpoints are damaged, the restore fails, because a new training would later delete all of them.
        for path in files.keys().filter(|path| path.as_ref().ends_with("safetensors")) {
            blocking(memory.delete(path)).expect("deleted");
        }
        let error = reader.restore_newest(&store).expect_err("only damaged checkpoints").to_string();
        assert!(error.contains("step-000000000002/") && error.contains("the file is missing"), "{error}");
    });
}
