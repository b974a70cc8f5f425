//! Sharded checkpoints. A checkpoint of any mesh and number of processes loads bit for bit on any other mesh and number
//! of processes. A resumed training matches an uninterrupted training.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use shardflow::checkpoint::cli::{CheckpointCommand, run};
use shardflow::checkpoint::convert::export;
use shardflow::checkpoint::{
    CheckpointError, Cursor, ProcessRank, SaveAgreement, SaveOutcome, SaveStart, Saver, SaverOptions, SingleProcess,
    Snapshot, Store, WhenBusy, save_now,
};
use shardflow::passes::CompileOptions;
use shardflow::passes::precision::Precision;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::session::{Session, SessionOptions};
use shardflow_integration_tests::together::save_together;
use shardflow_integration_tests::training::{Model, ONE, Scratch, options, within};
use shardflow_kernels::tensor::{HostTensor, split_range};

fn model() -> Model {
    Model { dropout: 0.1, max_norm: 1.0, ..Model::default() }
}

fn compile_options() -> CompileOptions {
    options(2, OneFOneB)
}

fn session(mesh: &str) -> Session {
    model().session(mesh, &compile_options())
}

fn store(folder: &Path) -> Store {
    Store::open(folder.to_str().expect("a path of UTF-8")).expect("a folder")
}

/// Splits a session's state into the parts that this number of processes would hold.
fn parts(session: &Session, processes: usize) -> Vec<Snapshot> {
    let devices = session.plan().graph.mesh().device_count();
    let part = |p| session.snapshot_of(split_range(devices, processes, p), None).expect("a running session");
    (0..processes).map(part).collect()
}

/// Returns the whole state as one safetensors file, for comparisons.
fn saved(session: &Session, folder: &Path) -> Vec<u8> {
    let path = folder.join("whole.safetensors");
    session.save(&path).expect("saved");
    std::fs::read(&path).expect("a saved file")
}

fn exported(store: &Store, step: u64, folder: &Path) -> Vec<u8> {
    let path = folder.join("exported.safetensors");
    export(&store.read(step).expect("a committed checkpoint"), &path).expect("exported");
    std::fs::read(&path).expect("an exported file")
}

fn save_all(store: &Store, session: &Session, processes: usize) {
    for report in save_together(store, &parts(session, processes), 0, 1) {
        assert_eq!(report.result.expect("saved"), SaveOutcome::Committed);
        assert!(report.prune.is_none());
    }
}

/// Tensors stay bit-identical when a state moves from 4 processes to 2 and then to 8. The layouts are split and
/// broadcast, and the meshes have two or four stages.
#[test]
fn every_mesh_loads_the_checkpoint_of_every_other_mesh() {
    within(60, || {
        let scratch = Scratch::new("checkpoints-meshes");
        let store = store(&scratch.path().join("run"));
        let mut first = session("data=2,tensor=2");
        model().step(&mut first);
        let mut whole = saved(&first, scratch.path());
        save_all(&store, &first, 4);
        assert_eq!(exported(&store, 1, scratch.path()), whole, "the export is the file that `save` writes");
        for (mesh, processes) in [
            ("tensor=2", 2),
            ("data=2,stage=2,tensor=2", 8),
            ("data=2", 2),
            ("tensor=3", 3),
            ("stage=2", 2),
            ("stage=4", 3),
            ("data=3", 2),
            (ONE, 1),
        ] {
            let mut next = session(mesh);
            let restored = next.restore_newest(&store).unwrap_or_else(|e| panic!("mesh {mesh}: {e}"));
            assert_eq!(restored.found.map(|f| f.0), Some(next.steps()));
            assert!(restored.damaged.is_empty(), "mesh {mesh}: {:?}", restored.damaged);
            assert!(saved(&next, scratch.path()) == whole, "mesh {mesh}: the loaded tensors differ");
            model().step(&mut next);
            whole = saved(&next, scratch.path());
            save_all(&store, &next, processes);
            let manifest = store.read(next.steps()).expect("a committed checkpoint");
            assert_eq!(manifest.manifest().shards.len(), processes);
            assert!(exported(&store, next.steps(), scratch.path()) == whole, "mesh {mesh}: the saved tensors differ");
            assert_eq!(store.steps().expect("listed"), [next.steps()], "only the newest is kept");
        }
    });
}

fn saver(store: &Store, epoch: u64, busy: WhenBusy) -> Saver {
    let member = ProcessRank { epoch, ..ProcessRank::ALONE };
    let options = SaverOptions { member, keep: 2, busy, plan: Some("plan".into()), ..SaverOptions::default() };
    Saver::new(store.clone(), Arc::new(SingleProcess), options).expect("a thread")
}

fn cursor(step: u64) -> Cursor {
    Cursor::from([("sample".into(), (12 * step).to_string()), ("file".into(), "sonnets.txt".into())])
}

/// The saver writes while steps continue. After a resume, the losses are bit-identical.
#[test]
fn a_resumed_training_has_the_losses_of_an_uninterrupted_one() {
    within(60, || {
        let bf16 = CompileOptions { precision: Precision::BF16, ..compile_options() };
        for (mesh, resumed_mesh, options) in [
            (ONE, ONE, compile_options()),
            ("data=2,stage=2", "data=2,stage=2", compile_options()),
            ("stage=2", "stage=4", compile_options()),
            ("stage=2", "stage=4", bf16),
        ] {
            let scratch = Scratch::new(&format!("checkpoints-resume-{mesh}"));
            let store = store(scratch.path());
            let mut whole = model().session(mesh, &options);
            let mut saver = saver(&store, 0, WhenBusy::Wait);
            let mut losses = Vec::new();
            for step in 0..6 {
                if step > 0 && step % 2 == 0 {
                    let begun = saver.save(&whole, cursor(step)).expect("a running session");
                    assert!(matches!(begun, SaveStart::Started { .. }));
                }
                losses.push(model().step(&mut whole).loss.map(f32::to_bits));
            }
            let last = saver.wait(Duration::from_secs(20)).expect("in time").expect("a save in progress");
            assert_eq!((last.step, last.result.expect("saved")), (4, SaveOutcome::Committed));
            assert!(saver.wait(Duration::ZERO).expect("no save in progress").is_none());
            // Use another seed and train a step, so that the restore must replace all state.
            let seed = SessionOptions { seed: 7, ..SessionOptions::default() };
            let plan = model().plan(resumed_mesh, &options);
            let mut resumed = Session::start(plan, &seed).expect("started");
            model().step(&mut resumed);
            for from in [2u64, 4] {
                let reader = store.read(from).expect("two kept checkpoints");
                assert_eq!(reader.manifest().cursor, cursor(from));
                assert_eq!(reader.manifest().plan.as_deref(), Some("plan"));
                resumed.restore_checkpoint(&reader).expect("the same model");
                let again: Vec<_> = (from..6).map(|_| model().step(&mut resumed).loss.map(f32::to_bits)).collect();
                assert_eq!(again, losses[from as usize..], "{mesh}, resumed on {resumed_mesh} from step {from}");
            }
        }
    });
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing() {
    within(60, || {
        let scratch = Scratch::new("checkpoints-refused");
        let store = store(&scratch.path().join("run"));
        let mut here = session("tensor=2");
        assert!(here.restore_newest(&store).expect("an empty store is no error").found.is_none());
        let small = Model { width: 16, ..model() }.session(ONE, &options(1, OneFOneB));
        save_all(&store, &small, 1);
        model().step(&mut here);
        let before = saved(&here, scratch.path());
        let error = here.restore_newest(&store).expect_err("another model").to_string();
        assert!(error.contains("manifest.json: tensor") && error.contains("expected F32"), "{error}");
        assert!(saved(&here, scratch.path()) == before, "the failed restore changed the state: {error}");
        let other = Model { layers: 5, width: 16, ..model() };
        let mut here = other.session(ONE, &options(1, OneFOneB));
        let error = here.restore_newest(&store).expect_err("another model").to_string();
        assert!(error.contains("has no tensor"), "{error}");
    });
}

/// Resharding keeps the tensors. The commands print the documented output and return the documented exit codes.
#[test]
fn the_commands_list_verify_reshard_and_export() {
    within(60, || {
        let scratch = Scratch::new("checkpoints-commands");
        let path = |name: &str| scratch.path().join(name).to_str().expect("a path of UTF-8").to_string();
        let command = |command| run(&command);
        let missing = command(CheckpointCommand::Ls { dir: path("run") }).expect_err("no checkpoint exists");
        assert_eq!((missing.exit.code(), missing.to_string().contains("no complete checkpoint")), (65, true));
        assert!(!scratch.path().join("run").exists(), "`ls` created the folder");

        let store = store(&scratch.path().join("run"));
        let mut here = session("data=2,tensor=2");
        for _ in 0..2 {
            model().step(&mut here);
            let reports = save_together(&store, &parts(&here, 4), 0, 5);
            assert!(reports.iter().all(|r| r.result.is_ok()));
        }
        let whole = saved(&here, scratch.path());
        let listed = command(CheckpointCommand::Ls { dir: path("run") }).expect("two checkpoints");
        assert!(listed.lines().count() == 3 && listed.lines().all(|l| !l.contains("damaged")), "{listed}");
        assert!(
            listed.lines().nth(2).is_some_and(|l| l.trim_start().starts_with('2') && l.ends_with("data=2,tensor=2"))
        );

        let mut from = "run".to_string();
        for shards in [2, 8, 1] {
            let to = format!("resharded-{shards}");
            let reshard = CheckpointCommand::Reshard { dir: path(&from), to: path(&to), shards, step: None };
            command(reshard.clone()).expect("resharded");
            assert_eq!(command(reshard).expect_err("is there already").exit.code(), 73);
            let next = Store::open(&path(&to)).expect("a folder");
            assert_eq!(next.read(2).expect("a committed checkpoint").manifest().shards.len(), shards as usize);
            assert!(command(CheckpointCommand::Verify { dir: path(&to), step: None }).is_ok());
            let file = scratch.path().join("model.safetensors");
            let export = CheckpointCommand::Export { dir: path(&to), file: file.clone(), step: Some(2) };
            command(export).expect("exported");
            assert!(std::fs::read(&file).expect("an exported file") == whole, "{shards} shards: the tensors differ");
            let mut there = session("tensor=3");
            assert_eq!(there.restore_newest(&next).expect("restored").found.map(|f| f.0), Some(2));
            assert!(saved(&there, scratch.path()) == whole);
            from = to;
        }

        let export = |file| CheckpointCommand::Export { dir: path("run"), file, step: None };
        let nowhere = command(export(scratch.path().join("no/such/folder"))).expect_err("no folder");
        assert_eq!(nowhere.exit.code(), 73);
        let zero = CheckpointCommand::Reshard { dir: path("run"), to: path("zero"), shards: 0, step: None };
        assert_eq!(command(zero).expect_err("no shards").exit.code(), 2);
        let absent = CheckpointCommand::Verify { dir: path("run"), step: Some(7) };
        assert_eq!(command(absent).expect_err("no such step").exit.code(), 65);
        assert_eq!(
            command(CheckpointCommand::Ls { dir: "ftp://host/x".into() }).expect_err("an unknown scheme").exit.code(),
            2
        );

        // Damage the newest checkpoint. `verify` names it, `ls` shows wrong lengths, and `export` skips it.
        let shard = scratch.path().join("run/step-000000000002/e0-0/shard-2-of-4.safetensors");
        let bytes = std::fs::read(&shard).expect("a shard");
        std::fs::write(&shard, &bytes[..bytes.len() - 1]).expect("written");
        let error = command(CheckpointCommand::Verify { dir: path("run"), step: None }).expect_err("damaged");
        let text = error.to_string();
        assert!(text.contains("step 1: ok") && text.contains("e0-0/shard-2-of-4.safetensors: damaged"), "{text}");
        assert_eq!(error.exit.code(), 65);
        assert!(command(CheckpointCommand::Ls { dir: path("run") }).expect("listed").contains("shard-2-of-4"));
        let output = command(export(scratch.path().join("model.safetensors"))).expect("the older checkpoint");
        assert!(output.contains("warning") && output.contains("step 1:"), "{output}");
    });
}

/// A step is committed once: neither a second save nor a process of an older epoch can commit it again.
#[test]
fn a_committed_step_is_never_committed_again() {
    within(60, || {
        let scratch = Scratch::new("checkpoints-once");
        let store = store(scratch.path());
        let mut here = session("stage=2");
        model().step(&mut here);
        save_all(&store, &here, 2);
        let before = exported(&store, 1, scratch.path());
        // Save other tensors for the same step.
        let mut other = parts(&here, 2);
        other[0].pieces[0].data = filled(&other[0].pieces[0].region.size, 3.0);
        for epoch in [0, 1] {
            for report in save_together(&store, &other, epoch, 1) {
                assert_eq!(report.result.expect("no error"), SaveOutcome::AlreadyThere);
            }
        }
        assert!(exported(&store, 1, scratch.path()) == before);
        // The checkpoint is set aside, as a damaged checkpoint would be. Then the step can be committed again.
        store.set_aside(1).expect("renamed");
        assert!(store.steps().expect("listed").is_empty());
        assert!(save_together(&store, &other, 2, 1).iter().all(|r| matches!(r.result, Ok(SaveOutcome::Committed))));
        assert!(exported(&store, 1, scratch.path()) != before);
        assert!(!scratch.path().join("step-000000000001/e0-0").exists(), "files of other attempts remain");
    });
}

fn filled(shape: &[usize], value: f32) -> HostTensor {
    HostTensor::f32(shape, vec![value; shape.iter().product()])
}

/// If one process cannot write, every process reports this process, and nothing is committed.
#[test]
fn a_checkpoint_is_committed_only_if_all_processes_write() {
    within(60, || {
        let scratch = Scratch::new("checkpoints-all");
        let store = store(scratch.path());
        let mut here = session("stage=2");
        model().step(&mut here);
        let parts = parts(&here, 2);
        // A file blocks the path of the folder of this save.
        std::fs::create_dir_all(scratch.path().join("step-000000000001")).expect("created");
        std::fs::write(scratch.path().join("step-000000000001/e0-0"), "").expect("created");
        for report in save_together(&store, &parts, 0, 1) {
            let error = report.result.expect_err("the folder cannot be created");
            assert_eq!(error.exit_code(), 73);
            assert!(error.to_string().contains("step-000000000001/e0-0/shard-"), "{error}");
        }
        assert!(store.newest().expect("listed").reader.is_none());
        assert!(save_together(&store, &parts, 1, 1).iter().all(|r| matches!(r.result, Ok(SaveOutcome::Committed))));
        // A shard that a process has reported but not written is detected.
        model().step(&mut here);
        let part = here.snapshot(None).expect("a running session");
        let member = ProcessRank { process: 0, processes: 2, epoch: 1 };
        let options = SaverOptions { member, ..SaverOptions::default() };
        let report = save_now(&store, &part, &SingleProcess, &options, 0).expect("valid options");
        let text = report.result.expect_err("the other shard is missing").to_string();
        assert!(text.contains("e1-0/shard-1-of-2.json: damaged: the file is missing"), "{text}");
        assert_eq!(store.steps().expect("listed"), [1]);
    });
}

#[test]
fn conflicting_saver_options_are_refused() {
    let store = Store::open("memory:///run").expect("a store in memory");
    let alone: Arc<dyn SaveAgreement> = Arc::new(SingleProcess);
    let member = ProcessRank { process: 1, processes: 1, epoch: 0 };
    let wrong = |options| Saver::new(store.clone(), alone.clone(), options).err().map(|e| e.exit_code());
    assert_eq!(wrong(SaverOptions { member, ..SaverOptions::default() }), Some(2));
    let member = ProcessRank { process: 1, processes: 2, epoch: 0 };
    assert_eq!(wrong(SaverOptions { member, busy: WhenBusy::Skip, ..SaverOptions::default() }), Some(2));
    assert!(matches!(Store::open("s3://bucket/x"), Err(CheckpointError::Place { .. })), "needs a cargo feature");
}
