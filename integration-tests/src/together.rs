//! Helpers for jobs whose processes are threads or child processes of a test: the rendezvous of the processes, and
//! their agreement on a checkpoint.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use shardflow::checkpoint::{
    AgreeError, ProcessRank, SaveAgreement, SaveId, SaveOutcome, SaveReport, SaverOptions, Snapshot, Store, save_now,
};
use shardflow::cluster::{Cluster, ClusterOptions};
use shardflow::job::env::{Endpoint, LaunchContext, Launched, LaunchedBy, SecretSource};
use shardflow::job::secret::Secret;
use shardflow::session::SessionOptions;

use crate::training::Scratch;

/// Returns the cluster handle of one process. All processes are on one node, and their rendezvous is a Unix socket.
pub fn cluster_at(socket: &Path, process: u32, processes: u32, options: ClusterOptions) -> Cluster {
    let world = Launched {
        process,
        processes,
        local_process: process,
        local_processes: processes,
        node: Some(0),
        endpoint: Endpoint::Unix(socket.into()),
        secret: SecretSource::Text(Secret::new("a secret of these tests").expect("long enough")),
        restart: 0,
        source: LaunchedBy::Shardflow,
        run_id: "tests".into(),
    };
    Cluster::new(LaunchContext::World(world), options)
}

/// Runs `work` on each rank with the options of a session, and returns the results by rank. The ranks are threads.
pub fn run_ranks<T: Send>(
    name: &str,
    processes: u32,
    options: &ClusterOptions,
    work: impl Fn(u32, SessionOptions) -> T + Sync,
) -> Vec<T> {
    let folder = Scratch::new(name);
    let socket = folder.path().join("meet.sock");
    thread::scope(|scope| {
        let start = |process| {
            let cluster = cluster_at(&socket, process, processes, options.clone());
            let work = &work;
            scope.spawn(move || work(process, SessionOptions { cluster, ..SessionOptions::default() }))
        };
        let threads: Vec<_> = (0..processes).map(start).collect();
        threads.into_iter().map(|t| t.join().expect("a failed rank has printed its error")).collect()
    })
}

/// Time limit for waiting for the other processes.
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct SaveState {
    written: Vec<Result<(), String>>,
    decided: Option<Result<SaveOutcome, String>>,
}

/// A [`SaveAgreement`] of processes that share memory.
pub struct SharedMemoryAgreement {
    processes: usize,
    saves: Mutex<BTreeMap<SaveId, SaveState>>,
    changed: Condvar,
}

impl SharedMemoryAgreement {
    /// Creates the agreement for this number of processes.
    pub fn new(processes: usize) -> Self {
        Self { processes, saves: Mutex::default(), changed: Condvar::new() }
    }

    /// Updates the state of a save, then waits until `ready` returns a value.
    fn exchange<T>(
        &self,
        save: SaveId,
        update: impl FnOnce(&mut SaveState),
        ready: impl Fn(&SaveState) -> Option<T>,
    ) -> Result<T, AgreeError> {
        let mut saves = self.saves.lock();
        update(saves.entry(save).or_default());
        self.changed.notify_all();
        let waiting = |saves: &mut BTreeMap<SaveId, SaveState>| saves.get(&save).is_none_or(|s| ready(s).is_none());
        self.changed.wait_while_for(&mut saves, waiting, DEADLINE);
        let late = || AgreeError { process: None, why: format!("not all processes agreed within {DEADLINE:?}") };
        saves.get(&save).and_then(ready).ok_or_else(late)
    }

    /// Waits until a process other than 0 has written its shard.
    pub fn wait_for_another(&self, save: SaveId) {
        let one = |state: &SaveState| (!state.written.is_empty()).then_some(());
        self.exchange(save, |_| (), one).expect("the other process writes in time");
    }
}

impl SaveAgreement for SharedMemoryAgreement {
    fn all_written(&self, save: SaveId, own: Result<(), String>) -> Result<(), AgreeError> {
        let all = |state: &SaveState| (state.written.len() == self.processes).then(|| state.written.clone());
        let results = self.exchange(save, |state| state.written.push(own), all)?;
        let failed = results.into_iter().find_map(Result::err);
        failed.map_or(Ok(()), |why| Err(AgreeError { process: None, why }))
    }

    fn outcome(&self, save: SaveId, decided: Option<Result<SaveOutcome, String>>) -> Result<SaveOutcome, AgreeError> {
        let update = |state: &mut SaveState| state.decided = decided.or(state.decided.take());
        let outcome = self.exchange(save, update, |state| state.decided.clone())?;
        outcome.map_err(|why| AgreeError { process: Some(0), why })
    }
}

/// Saves a checkpoint. Each process has its own thread and writes one part. Returns the reports by rank.
pub fn save_together(store: &Store, parts: &[Snapshot], epoch: u64, keep: usize) -> Vec<SaveReport> {
    let agreement = SharedMemoryAgreement::new(parts.len());
    let processes = parts.len() as u32;
    let save = |(process, part): (usize, &Snapshot)| {
        let member = ProcessRank { process: process as u32, processes, epoch };
        save_now(store, part, &agreement, &SaverOptions { member, keep, ..SaverOptions::default() }, 0)
    };
    std::thread::scope(|scope| {
        let save = &save;
        let threads: Vec<_> = parts.iter().enumerate().map(|part| scope.spawn(move || save(part))).collect();
        threads.into_iter().map(|t| t.join().expect("no panic").expect("valid options")).collect()
    })
}
