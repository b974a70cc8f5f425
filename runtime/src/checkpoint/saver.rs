//! The saver: writes snapshots on a thread of its own while training goes on, one at a time.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use metrics::{Counter, counter, gauge, histogram};

use super::agreement::{ProcessRank, SaveAgreement};
use super::error::{CheckpointError, StoreOperation};
use super::manifest::Cursor;
use super::save::{Attempt, SaveReport, check_member, save};
use super::snapshot::Snapshot;
use super::store::Store;
use crate::lock::Lock;
use crate::metrics as names;
use crate::session::{Session, SessionError};

/// What a save does while another is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenBusy {
    /// It waits for the other.
    Wait,
    /// It is left out. Only for a job of one process: several must leave out the same saves.
    Skip,
}

/// How a saver saves.
#[derive(Clone, Debug)]
pub struct SaverOptions {
    /// Which process this is.
    pub member: ProcessRank,
    /// Complete checkpoints that are kept, 1 or more.
    pub keep: usize,
    /// Checkpoints of steps that are multiples of this are kept for good.
    pub keep_every: Option<u64>,
    /// Number of saves the program will make, if known: the check of free space assumes no more.
    pub saves_max: Option<u64>,
    /// What a save does while another is going on.
    pub busy: WhenBusy,
    /// Hash of the plan, for the manifest.
    pub plan: Option<String>,
    /// The job's name, unique to it and the same for all its incarnations: a later incarnation takes the store's lock at once.
    pub job: Option<String>,
}

impl Default for SaverOptions {
    fn default() -> Self {
        Self {
            member: ProcessRank::ALONE,
            keep: 3,
            keep_every: None,
            saves_max: None,
            busy: WhenBusy::Wait,
            plan: None,
            job: None,
        }
    }
}

/// What [`Saver::save`] did.
#[derive(Debug)]
pub enum SaveStart {
    /// The snapshot is taken and being written.
    Started {
        /// How the one before went, if it had not been told yet.
        before: Option<Box<SaveReport>>,
    },
    /// Another save is going on, and [`WhenBusy::Skip`] says not to wait.
    Skipped,
}

struct Job {
    attempt: Attempt,
    snapshot: Snapshot,
}

/// Saves in the background. At most one save is going on, and at most two snapshots are in memory. Dropping it waits for
/// nothing: a save that goes on may still be committed while the process lives.
pub struct Saver {
    jobs: Sender<Job>,
    reports: Receiver<(SaveReport, Snapshot)>,
    /// A save whose report has not come yet.
    is_busy: bool,
    /// The buffers of the last snapshot.
    spare: Option<Snapshot>,
    next_attempt: u32,
    busy: WhenBusy,
    place: String,
    /// Held by process 0 until the saver is dropped and its last save has ended.
    lock: Option<Arc<Lock>>,
}

impl Saver {
    /// Takes the store's lock, on process 0, and starts the thread. [`Session::saver`] does so, and checks the store first.
    ///
    /// # Errors
    /// [`CheckpointError::Held`] when another training writes to the store; or when the options contradict each other, or no
    /// thread can be started.
    pub fn new(store: Store, agree: Arc<dyn SaveAgreement>, options: SaverOptions) -> Result<Self, CheckpointError> {
        let SaverOptions { member, busy, .. } = options;
        check_member(member)?;
        // So that the first that fails is seen as one more.
        outcomes().iter().for_each(|outcome| outcome.absolute(0));
        if busy == WhenBusy::Skip && member.processes > 1 {
            let why = "processes that skip saves on their own do not skip the same ones; use Busy::Wait";
            return Err(CheckpointError::Refused(why.into()));
        }
        let lock = (member.process == 0).then(|| Lock::take(&store, options.job.clone(), member.epoch)).transpose()?;
        let place = store.place().to_string();
        let (jobs, work) = bounded::<Job>(1);
        let (done, reports) = bounded(1);
        let run = move || {
            for Job { attempt, snapshot } in work {
                let report = save(&store, &snapshot, &options, &attempt, &*agree);
                count(&report);
                // Before the report, so that dropping the saver after it releases the lock at once.
                drop(attempt);
                if done.send((report, snapshot)).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(run);
        thread.map_err(|source| CheckpointError::Io { path: place.clone().into(), source })?;
        Ok(Self { jobs, reports, is_busy: false, spare: None, next_attempt: 0, busy, place, lock })
    }

    /// Takes a snapshot of the session between two steps and begins to write it. In a job of several processes all call
    /// this after the same steps.
    ///
    /// # Errors
    /// When the session has failed, or the saver's thread has. How the writing goes is told later.
    pub fn save(&mut self, session: &Session, cursor: Cursor) -> Result<SaveStart, SessionError> {
        let spare = self.spare.take();
        // While a save goes on, its snapshot is the only one there is, and this is the second.
        let busy_before = self.is_busy && self.reports.is_empty();
        if busy_before && self.busy == WhenBusy::Skip {
            self.spare = spare;
            return Ok(SaveStart::Skipped);
        }
        let mut snapshot = session.snapshot(spare)?;
        snapshot.cursor = cursor;
        let replaces = session.is_known_damaged(snapshot.step);
        let mut before = None;
        if self.is_busy {
            let (report, spare) = self.reports.recv().map_err(|_| self.panicked())?;
            (before, self.spare) = (Some(Box::new(report)), Some(spare));
        }
        let attempt = Attempt { number: self.next_attempt, replaces, lock: self.lock.clone() };
        self.jobs.send(Job { attempt, snapshot }).map_err(|_| self.panicked())?;
        self.next_attempt += 1;
        self.is_busy = true;
        Ok(SaveStart::Started { before })
    }

    fn panicked(&self) -> CheckpointError {
        CheckpointError::Refused(format!("{}: the thread that saves has panicked", self.place))
    }

    /// The report of the last save, once, when it is done; never waits.
    pub fn poll(&mut self) -> Option<SaveReport> {
        let (report, spare) = self.reports.try_recv().ok()?;
        (self.is_busy, self.spare) = (false, Some(spare));
        Some(report)
    }

    /// Waits for the save that goes on; gives its report, or `None` when there is none.
    ///
    /// # Errors
    /// [`CheckpointError::Stalled`] when it takes longer than `limit`; it goes on.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<SaveReport>, CheckpointError> {
        if !self.is_busy {
            return Ok(None);
        }
        match self.reports.recv_timeout(limit) {
            Ok((report, spare)) => {
                (self.is_busy, self.spare) = (false, Some(spare));
                Ok(Some(report))
            }
            Err(RecvTimeoutError::Timeout) => {
                let (file, seconds) = (self.place.clone(), limit.as_secs_f64());
                Err(CheckpointError::Stalled { file, doing: StoreOperation::Write, seconds })
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.panicked()),
        }
    }
}

/// Saves a snapshot now and waits for the outcome, as a [`Saver`] does on its thread. It takes no lock: nothing else may write to
/// the store.
///
/// # Errors
/// When the options do not go together. How the writing went is in the report.
pub fn save_now(
    store: &Store,
    snapshot: &Snapshot,
    agree: &dyn SaveAgreement,
    options: &SaverOptions,
    attempt: u32,
) -> Result<SaveReport, CheckpointError> {
    check_member(options.member)?;
    let report = save(store, snapshot, options, &Attempt { number: attempt, ..Attempt::default() }, agree);
    count(&report);
    Ok(report)
}

/// Tells the `metrics` facade of a save.
fn count(report: &SaveReport) {
    let [committed, failed] = outcomes();
    histogram!(names::CHECKPOINT_DURATION).record(report.seconds);
    if report.result.is_err() {
        return failed.increment(1);
    }
    committed.increment(1);
    if let Ok(now) = SystemTime::now().duration_since(UNIX_EPOCH) {
        gauge!(names::CHECKPOINT_LAST_SUCCESS).set(now.as_secs_f64());
    }
}

/// Counters of saves that were committed, and that failed. Both are there once either is asked for.
fn outcomes() -> [Counter; 2] {
    ["committed", "failed"].map(|outcome| counter!(names::CHECKPOINTS, "outcome" => outcome))
}
