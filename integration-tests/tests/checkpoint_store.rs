//! Checkpoint stores in unsuitable locations: shared with another run, without hard links, read-only, full, or with
//! files that become visible late. Also tests which checkpoints are kept and replaced.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use shardflow::checkpoint::cli::{CheckpointCommand, run};
use shardflow::checkpoint::{
    CheckpointError, Cursor, SaveOutcome, SaveSchedule, Saver, SaverOptions, SimulatedClock, SingleProcess, Snapshot,
    Store, WaitClock, save_now,
};
use shardflow::plan::Schedule::OneFOneB;
use shardflow::session::{Session, SessionError};
use shardflow_integration_tests::faulty::{FaultyStore, StoreFault};
use shardflow_integration_tests::together::save_together;
use shardflow_integration_tests::training::{Model, Scratch, options, within};
use shardflow_kernels::tensor::HostTensor;

fn session() -> Session {
    Model::default().session("data=2", &options(1, OneFOneB))
}

fn open(folder: &Path) -> Store {
    Store::open(folder.to_str().expect("a path of UTF-8")).expect("a folder")
}

fn saver(session: &mut Session, store: &Store) -> Result<Saver, SessionError> {
    session.saver(store, SaverOptions { keep: 2, ..SaverOptions::default() })
}

/// Trains a step, saves, and returns the outcome of the save.
fn step_and_save(session: &mut Session, saver: &mut Saver) -> Result<SaveOutcome, CheckpointError> {
    Model::default().step(session);
    saver.save(session, Cursor::new()).expect("a running session");
    saver.wait(Duration::from_secs(20)).expect("in time").expect("a save in progress").result
}

fn whole(session: &Session) -> Vec<Snapshot> {
    vec![session.snapshot(None).expect("a running session")]
}

fn parts(session: &Session) -> Vec<Snapshot> {
    (0..2).map(|device| session.snapshot_of(device..device + 1, None).expect("a running session")).collect()
}

fn checkpoint_error(result: Result<Saver, SessionError>) -> CheckpointError {
    match result {
        Err(SessionError::Checkpoint(error)) => error,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("expected a checkpoint error"),
    }
}

#[test]
fn a_symbolic_link_to_a_missing_folder_is_reported() {
    let scratch = Scratch::new("store-dangling");
    let link = scratch.path().join("link");
    std::os::unix::fs::symlink("missing", &link).expect("a link");
    for place in [link.clone(), link.join("checkpoints")] {
        let error = Store::open(place.to_str().expect("UTF-8")).expect_err("no folder").to_string();
        assert!(error.contains(&format!("{} is a symbolic link to missing, which ", link.display())), "{error}");
    }
}

/// Returns the names in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<String> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_second_saver_fences_the_first() {
    within(60, || {
        let scratch = Scratch::new("store-fence");
        let store = open(scratch.path());
        let (mut first, mut second) = (session(), session());
        let mut old = saver(&mut first, &store).expect("a usable store");
        assert_eq!(step_and_save(&mut first, &mut old).expect("the owner saves"), SaveOutcome::Committed);
        second.restore_newest(&store).expect("readers need no lock");
        let mut new = saver(&mut second, &store).expect("the same process takes over");
        let error = step_and_save(&mut first, &mut old).expect_err("fenced");
        assert!(matches!(error, CheckpointError::Fenced { .. }), "{error}");
        assert_eq!(store.steps().expect("listed"), [1]);
        assert_eq!(step_and_save(&mut second, &mut new).expect("the owner saves"), SaveOutcome::Committed);
        drop((old, new));
        assert_eq!(names(scratch.path()), ["step-000000000001", "step-000000000002"], "the lock remains");
    });
}

#[test]
fn a_store_without_conditional_puts_is_refused_and_named() {
    let faulty = FaultyStore::new(Arc::new(InMemory::new()), StoreFault::NoConditionalPut, usize::MAX, None);
    let store = Store::with(Arc::new(faulty), "run").expect("a store");
    let error = Saver::new(store, Arc::new(SingleProcess), SaverOptions::default())
        .err()
        .expect("no lock without conditional puts");
    assert!(error.to_string().contains("lacks conditional puts"), "{error}");
}

/// Without hard links, each step is still committed only once, even if a writer died between claim and commit.
#[test]
fn a_file_system_without_hard_links_is_enough() {
    within(60, || {
        let scratch = Scratch::new("store-links");
        let local = LocalFileSystem::new().with_fsync(true);
        let faulty = FaultyStore::new(Arc::new(local), StoreFault::NoLinks, usize::MAX, None);
        let store = Store::in_folder(Arc::new(faulty), scratch.path(), "run").expect("a folder");
        let mut here = session();
        let mut saver = saver(&mut here, &store).expect("a usable store");
        assert_eq!(step_and_save(&mut here, &mut saver).expect("saved"), SaveOutcome::Committed);
        let again = save_together(&store, &parts(&here), 5, 2);
        assert!(again.iter().all(|report| matches!(report.result, Ok(SaveOutcome::AlreadyThere))), "{again:?}");
        let claim = scratch.path().join("step-000000000002/manifest.json.claim");
        std::fs::create_dir_all(&claim).expect("created");
        std::fs::write(claim.join("1"), "torn").expect("created");
        assert_eq!(step_and_save(&mut here, &mut saver).expect("the stale claim is replaced"), SaveOutcome::Committed);
        store.read(2).and_then(|reader| reader.verify()).expect("whole");
        assert_eq!(names(&scratch.path().join("step-000000000002")), ["e0-1", "manifest.json"], "other files remain");
        // Two jobs save at the same time, each with its own tensors.
        Model::default().step(&mut here);
        let mut other = parts(&here);
        for piece in other.iter_mut().flat_map(|part| &mut part.pieces) {
            piece.data = HostTensor::f32(&piece.region.size, vec![3.0; piece.region.element_count()]);
        }
        let reports = std::thread::scope(|scope| {
            let jobs = [(6, parts(&here)), (7, other)];
            let jobs = jobs.map(|(epoch, parts)| {
                scope.spawn({
                    let store = store.clone();
                    move || save_together(&store, &parts, epoch, 9)
                })
            });
            jobs.map(|job| job.join().expect("no panic"))
        });
        let committed =
            reports.iter().filter(|reports| matches!(reports[0].result, Ok(SaveOutcome::Committed))).count();
        assert_eq!(committed, 1, "{reports:?}");
        store.read(3).and_then(|reader| reader.verify()).expect("whole");
    });
}

/// Process 0 sees the files of process 1 a minute later. This can happen if two nodes share a network file system.
#[test]
fn a_file_with_delayed_visibility_is_not_damage() {
    within(60, || {
        for (hidden, late, is_saved) in [(90, 60, true), (90, 120, false), (0, 60, false)] {
            let scratch = Scratch::new(&format!("store-late-{hidden}-{late}"));
            let (here, there) = (scratch.path().join("here"), scratch.path().join("there"));
            let clock = Arc::new(SimulatedClock::default());
            let store = open(&here).with_hidden(Duration::from_secs(hidden)).with_clock(clock.clone());
            let mut session = session();
            Model::default().step(&mut session);
            // Until process 0 may see the files of process 1, they are in another folder.
            let files = "step-000000000001/e0-0";
            let (from, to) = (there.join(files), here.join(files));
            clock.on_wait(move |now: Duration| {
                for name in ["shard-1-of-2.safetensors", "shard-1-of-2.json"] {
                    if now >= Duration::from_secs(late) && !to.join(name).exists() {
                        std::fs::copy(from.join(name), to.join(name)).expect("an existing file");
                    }
                }
            });
            let agreement = shardflow_integration_tests::together::SharedMemoryAgreement::new(2);
            let stores = [store.clone(), open(&there)];
            let results = std::thread::scope(|scope| {
                let jobs: Vec<_> = parts(&session)
                    .into_iter()
                    .zip(stores)
                    .enumerate()
                    .map(|(process, (part, store))| {
                        let agreement = &agreement;
                        scope.spawn(move || {
                            let member =
                                shardflow::checkpoint::ProcessRank { process: process as u32, processes: 2, epoch: 0 };
                            let options = SaverOptions { member, ..SaverOptions::default() };
                            save_now(&store, &part, agreement, &options, 0).expect("valid options").result
                        })
                    })
                    .collect();
                jobs.into_iter().map(|job| job.join().expect("no panic")).collect::<Vec<_>>()
            });
            match &results[0] {
                Ok(saved) => assert!(is_saved && *saved == SaveOutcome::Committed, "limit {hidden} s, late {late} s"),
                Err(error) => {
                    assert!(!is_saved, "limit {hidden} s, late {late} s: {error}");
                    assert!(error.to_string().contains("shard-1-of-2.json: damaged: the file is missing"), "{error}");
                }
            }
            let expected = if is_saved { late } else { hidden };
            assert_eq!(clock.now().as_secs(), expected, "limit {hidden} s, late {late} s");
        }
    });
}

#[test]
fn some_checkpoints_are_kept_for_good() {
    within(60, || {
        let scratch = Scratch::new("store-keep");
        let store = open(scratch.path());
        let mut here = session();
        for _ in 0..10 {
            Model::default().step(&mut here);
            let options = SaverOptions { keep: 2, keep_every: Some(4), ..SaverOptions::default() };
            let report = save_now(&store, &whole(&here)[0], &SingleProcess, &options, 0).expect("valid options");
            assert!(report.result.is_ok() && report.prune.is_none(), "{report:?}");
        }
        assert_eq!(store.steps().expect("listed"), [4, 8, 9, 10]);
        store.prune(u64::MAX, 1, Some(4)).expect("deleted");
        assert_eq!(store.steps().expect("listed"), [4, 8, 10]);
    });
}

/// A replaced cursor applies immediately, but only to its own checkpoint, not to another checkpoint of the same step.
#[test]
fn a_replaced_cursor_takes_effect_immediately() {
    within(60, || {
        let scratch = Scratch::new("store-cursor");
        let store = open(scratch.path());
        let mut here = session();
        let mut saver = saver(&mut here, &store).expect("a usable store");
        step_and_save(&mut here, &mut saver).expect("saved");
        let cursor = Cursor::from([("sample".to_string(), "36".to_string())]);
        store.set_cursor(1, cursor.clone()).expect("written");
        assert_eq!(session().restore_newest(&store).expect("loads").found, Some((1, cursor.clone())));
        step_and_save(&mut here, &mut saver).expect("saved");
        assert_eq!(store.read(1).expect("a kept checkpoint").manifest().cursor, cursor, "pruning keeps the cursor");
        // A torn cursor file is reported as damage. A cursor file that belongs to another manifest is ignored.
        let file = scratch.path().join("step-000000000001/cursor.json");
        let text = std::fs::read(&file).expect("an existing file");
        std::fs::write(&file, &text[..text.len() / 2]).expect("written");
        let error = store.read(1).expect_err("torn");
        assert!(error.is_damage() && error.to_string().contains("step-000000000001/cursor.json: damaged"), "{error}");
        std::fs::write(scratch.path().join("step-000000000002/cursor.json"), &text).expect("written");
        assert!(store.read(2).expect("whole").manifest().cursor.is_empty());
    });
}

/// A damaged checkpoint is replaced when training reaches its step again. The damage is in the manifest, or in a shard,
/// where only a full verification finds it.
#[test]
fn a_damaged_checkpoint_is_replaced_when_its_step_is_repeated() {
    within(60, || {
        for (file, is_cut) in
            [("e0-1/shard-0-of-1.safetensors", false), ("e0-1/shard-0-of-1.safetensors", true), ("manifest.json", true)]
        {
            let scratch = Scratch::new("store-damaged");
            let store = open(scratch.path());
            let mut here = session();
            let mut first = saver(&mut here, &store).expect("a usable store");
            for _ in 0..2 {
                step_and_save(&mut here, &mut first).expect("saved");
            }
            drop(first);
            let path = scratch.path().join("step-000000000002").join(file);
            let mut bytes = std::fs::read(&path).expect("a file");
            *bytes.last_mut().expect("bytes") ^= 1;
            bytes.truncate(if is_cut { bytes.len() / 2 } else { bytes.len() });
            std::fs::write(&path, bytes).expect("written");
            let mut again = session();
            let restored = again.restore_newest(&store).expect("the older one");
            assert_eq!((restored.found.map(|f| f.0), restored.damaged.len()), (Some(1), 1), "{file}");
            let mut second = saver(&mut again, &store).expect("a usable store");
            assert_eq!(step_and_save(&mut again, &mut second).expect("replaced"), SaveOutcome::Committed, "{file}");
            store.read(2).and_then(|reader| reader.verify()).unwrap_or_else(|e| panic!("{file}: {e}"));
            assert_eq!(session().restore_newest(&store).expect("loads").found.map(|f| f.0), Some(2));
        }
    });
}

#[test]
fn file_names_that_are_not_utf_8_are_ignored() {
    within(60, || {
        let scratch = Scratch::new("store-names");
        let store = open(scratch.path());
        let mut here = session();
        let mut saver = saver(&mut here, &store).expect("a usable store");
        step_and_save(&mut here, &mut saver).expect("saved");
        let odd = std::ffi::OsStr::from_bytes(b"caf\xe9");
        std::fs::write(scratch.path().join(odd), "").expect("created");
        std::fs::create_dir(scratch.path().join("step-000000000001").join(odd)).expect("created");
        std::fs::write(scratch.path().join("step-000000000001/e0-0").join(odd), "").expect("created");
        let dir = scratch.path().to_str().expect("UTF-8").to_string();
        let listed = run(&CheckpointCommand::Ls { dir: dir.clone() }).expect("listed");
        assert_eq!(listed.lines().count(), 2, "{listed}");
        run(&CheckpointCommand::Verify { dir, step: None }).expect("verified");
        assert_eq!(session().restore_newest(&store).expect("loads").found.map(|f| f.0), Some(1));
        assert_eq!(step_and_save(&mut here, &mut saver).expect("saved"), SaveOutcome::Committed);
    });
}

#[test]
fn a_store_without_space_is_refused_before_training() {
    within(60, || {
        let scratch = Scratch::new("store-room");
        let mut here = session();
        let options = SaverOptions { keep: usize::MAX, ..SaverOptions::default() };
        let error = checkpoint_error(here.saver(&open(scratch.path()), options.clone()));
        assert!(matches!(error, CheckpointError::NoRoom { .. }) && error.exit_code() == 73, "{error}");
        assert!(error.to_string().contains("bytes are free"), "{error}");
        assert!(names(scratch.path()).is_empty(), "files remain: {:?}", names(scratch.path()));
        // The store needs free space only for the planned saves.
        let schedule = |steps| Some(SaveSchedule { every: 1, steps });
        here.saver(&open(scratch.path()), SaverOptions { schedule: schedule(2), ..options }).expect("space for two");
        // Checkpoints that are kept permanently also need space.
        let options = SaverOptions { keep: 1, schedule: schedule(u64::MAX), ..SaverOptions::default() };
        here.saver(&open(scratch.path()), options.clone()).expect("space for two");
        let error =
            checkpoint_error(here.saver(&open(scratch.path()), SaverOptions { keep_every: Some(1), ..options }));
        assert!(matches!(error, CheckpointError::NoRoom { .. }), "{error}");
        assert!(names(scratch.path()).is_empty(), "files remain: {:?}", names(scratch.path()));
    });
}

/// Sets or clears the immutable attribute of a file. Returns false if that is not permitted.
fn set_immutable(path: &Path, sign: &str) -> bool {
    Command::new("chattr").arg(format!("{sign}i")).arg(path).output().is_ok_and(|output| output.status.success())
}

#[test]
fn a_store_that_is_not_writable_is_refused_before_training() {
    within(60, || {
        let mut here = session();
        // procfs does not permit new folders.
        let error = checkpoint_error(saver(&mut here, &open(Path::new("/proc/self/checkpoints"))));
        assert_eq!(error.exit_code(), 73, "{error}");
        assert!(error.to_string().contains("/proc/self/checkpoints"), "{error}");
        let scratch = Scratch::new("store-immutable");
        if !set_immutable(scratch.path(), "+") {
            println!("SKIPPED: chattr +i is not permitted here");
            return;
        }
        let error = checkpoint_error(saver(&mut here, &open(scratch.path())));
        assert!(set_immutable(scratch.path(), "-"));
        assert_eq!((error.exit_code(), error.io_kind()), (73, Some(std::io::ErrorKind::PermissionDenied)), "{error}");
    });
}
