//! Several processes of a job, played by threads: what they need to agree on a checkpoint, and a save by all of them.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use shardflow::checkpoint::{
    AgreeError, ProcessRank, SaveAgreement, SaveId, SaveOutcome, SaveReport, SaverOptions, Snapshot, Store, save_now,
};

/// How long the others are waited for.
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Said {
    written: Vec<Result<(), String>>,
    decided: Option<Result<SaveOutcome, String>>,
}

/// The agreement of processes that share memory.
pub struct Together {
    processes: usize,
    said: Mutex<BTreeMap<SaveId, Said>>,
    changed: Condvar,
}

impl Together {
    /// Of this many processes.
    pub fn new(processes: usize) -> Self {
        Self { processes, said: Mutex::default(), changed: Condvar::new() }
    }

    /// Says something, then waits until `ready` finds what it looks for.
    fn exchange<T>(
        &self,
        save: SaveId,
        say: impl FnOnce(&mut Said),
        ready: impl Fn(&Said) -> Option<T>,
    ) -> Result<T, AgreeError> {
        let mut said = self.said.lock().expect("nobody panics with it");
        say(said.entry(save).or_default());
        self.changed.notify_all();
        let waiting = |said: &mut BTreeMap<SaveId, Said>| said.get(&save).is_none_or(|s| ready(s).is_none());
        let (said, _) = self.changed.wait_timeout_while(said, DEADLINE, waiting).expect("nobody panics with it");
        let late = || AgreeError { process: None, why: format!("not all said so within {DEADLINE:?}") };
        said.get(&save).and_then(ready).ok_or_else(late)
    }

    /// Waits until a process other than 0 has written its shard.
    pub fn wait_for_another(&self, save: SaveId) {
        let one = |said: &Said| (!said.written.is_empty()).then_some(());
        self.exchange(save, |_| (), one).expect("it says so in time");
    }
}

impl SaveAgreement for Together {
    fn all_written(&self, save: SaveId, mine: Result<(), String>) -> Result<(), AgreeError> {
        let all = |said: &Said| (said.written.len() == self.processes).then(|| said.written.clone());
        let results = self.exchange(save, |said| said.written.push(mine), all)?;
        let failed = results.into_iter().find_map(Result::err);
        failed.map_or(Ok(()), |why| Err(AgreeError { process: None, why }))
    }

    fn outcome(&self, save: SaveId, decided: Option<Result<SaveOutcome, String>>) -> Result<SaveOutcome, AgreeError> {
        let say = |said: &mut Said| said.decided = decided.or(said.decided.take());
        let outcome = self.exchange(save, say, |said| said.decided.clone())?;
        outcome.map_err(|why| AgreeError { process: Some(0), why })
    }
}

/// Saves the parts of a checkpoint that as many processes hold, each on a thread; gives the reports by rank.
pub fn save_together(store: &Store, parts: &[Snapshot], epoch: u64, keep: usize) -> Vec<SaveReport> {
    let together = Together::new(parts.len());
    let processes = parts.len() as u32;
    let save = |(process, part): (usize, &Snapshot)| {
        let member = ProcessRank { process: process as u32, processes, epoch };
        save_now(store, part, &together, &SaverOptions { member, keep, ..SaverOptions::default() }, 0)
    };
    std::thread::scope(|scope| {
        let save = &save;
        let threads: Vec<_> = parts.iter().enumerate().map(|part| scope.spawn(move || save(part))).collect();
        threads.into_iter().map(|t| t.join().expect("does not panic").expect("good options")).collect()
    })
}
