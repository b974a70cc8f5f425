//! Checkpoints in shards: any mesh and any number of processes loads what any other wrote, bit for bit, and a resumed
//! training goes on as if it had not been interrupted.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use shardflow::checkpoint::cli::{CheckpointArgs, CheckpointCommand, run};
use shardflow::checkpoint::convert::{export, reshard};
use shardflow::checkpoint::{
    Agree, Alone, Begun, CheckpointError, Cursor, Member, Saved, Saver, SaverOptions, Snapshot, Store, save_now,
};
use shardflow::plan::Schedule::OneFOneB;
use shardflow::session::{Session, SessionError, SessionOptions};
use shardflow_integration_tests::together::save_together;
use shardflow_integration_tests::training::{Model, ONE, Scratch, options, within};
use shardflow_kernels::tensor::split_range;

fn model() -> Model {
    Model { dropout: 0.1, max_norm: 1.0, ..Model::default() }
}

fn session(mesh: &str) -> Session {
    model().session(mesh, &options(2, OneFOneB))
}

fn store(folder: &Path) -> Store {
    Store::open(folder.to_str().expect("a path of UTF-8")).expect("a folder")
}

/// What each of some processes holds of a session's devices.
fn parts(session: &Session, processes: usize) -> Vec<Snapshot> {
    let devices = session.plan().graph.mesh().device_count();
    let part = |p| session.snapshot_of(split_range(devices, processes, p), None).expect("nothing failed");
    (0..processes).map(part).collect()
}

/// The whole model as one safetensors file, for comparison.
fn saved(session: &Session, folder: &Path) -> Vec<u8> {
    let path = folder.join("whole.safetensors");
    session.save(&path).expect("can be saved");
    std::fs::read(&path).expect("was saved")
}

fn exported(store: &Store, step: u64, folder: &Path) -> Vec<u8> {
    let path = folder.join("exported.safetensors");
    export(&store.read(step).expect("was committed"), &path).expect("can be exported");
    std::fs::read(&path).expect("was exported")
}

fn save_all(store: &Store, session: &Session, processes: usize) {
    for report in save_together(store, &parts(session, processes), 0, 1) {
        assert_eq!(report.result.expect("can be saved"), Saved::Committed);
        assert!(report.prune.is_none());
    }
}

/// 4 -> 2 -> 8 processes, split and broadcast, two stages and four: tensors stay, bit for bit.
#[test]
fn every_mesh_loads_every_other_meshs_checkpoint() {
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
            assert!(saved(&next, scratch.path()) == whole, "mesh {mesh}: other tensors were loaded");
            model().step(&mut next);
            whole = saved(&next, scratch.path());
            save_all(&store, &next, processes);
            let manifest = store.read(next.steps()).expect("was committed");
            assert_eq!(manifest.manifest().shards.len(), processes);
            assert!(exported(&store, next.steps(), scratch.path()) == whole, "mesh {mesh}: other tensors were saved");
            assert_eq!(store.steps().expect("can be listed"), [next.steps()], "one is kept");
        }
    });
}
