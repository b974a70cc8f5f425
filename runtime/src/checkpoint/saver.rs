//! The saver writes snapshots, one at a time, on its own thread while training continues.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use metrics::{Counter, counter, gauge, histogram};

use super::agreement::SaveAgreement;
use super::error::{CheckpointError, StoreOperation};
use super::manifest::Cursor;
use super::options::{SaverOptions, WhenBusy};
use super::save::{Attempt, SaveReport, check_member, save};
use super::snapshot::Snapshot;
use super::store::Store;
use crate::lock::Lock;
use crate::metrics as names;

/// Result of [`Saver::save`].
#[derive(Debug)]
pub enum SaveStart {
    /// The snapshot is complete, and the saver's thread writes it.
    Started {
        /// Report of the previous save, if no earlier call has returned the report.
        before: Option<Box<SaveReport>>,
    },
    /// Another save is running, and the saver's option is [`WhenBusy::Skip`].
    Skipped,
}

/// Saves in the background. At most one save is running, and at most two snapshots are in memory. Dropping the saver
/// does not wait: a running save may still be committed if the process stays alive.
pub struct Saver {
    jobs: Sender<(Attempt, Snapshot)>,
    reports: Receiver<(SaveReport, Snapshot)>,
    /// True from the start of a save until its report is received.
    is_busy: bool,
    /// Buffers of the last snapshot; the next snapshot reuses them.
    pub(crate) spare: Option<Snapshot>,
    next_attempt: u32,
    busy: WhenBusy,
    place: String,
    /// The store's lock. Process 0 holds it until the saver is dropped and the last save has ended.
    lock: Option<Arc<Lock>>,
}

impl Saver {
    /// On process 0, checks the lock and calls [`Store::set_cursor`]. Does nothing on other processes.
    pub(crate) fn set_cursor(&self, step: u64, cursor: Cursor) -> Result<(), CheckpointError> {
        let Some(lock) = &self.lock else { return Ok(()) };
        lock.check()?;
        lock.store.set_cursor(step, cursor)
    }

    /// Takes the store's lock on process 0, and starts the thread. Does not check the store, because
    /// [`crate::session::Session::saver`] checks it.
    ///
    /// # Errors
    /// [`CheckpointError::Held`] if another run holds the lock. Also fails if the options contradict each other, or if
    /// no thread can be started.
    pub fn new(store: Store, agree: Arc<dyn SaveAgreement>, options: SaverOptions) -> Result<Self, CheckpointError> {
        let SaverOptions { member, busy, .. } = options;
        check_member(member)?;
        // Create both counters now, so that the first failure is visible as an increase.
        outcome_counters().iter().for_each(|counter| counter.absolute(0));
        if busy == WhenBusy::Skip && member.processes > 1 {
            let why = "WhenBusy::Skip is only for single-process jobs: several processes would skip different saves; \
                       use WhenBusy::Wait";
            return Err(CheckpointError::Refused(why.into()));
        }
        let lock = (member.process == 0).then(|| Lock::take(&store, options.job.clone(), member.epoch)).transpose()?;
        let place = store.place().to_string();
        let (jobs, work) = bounded::<(Attempt, Snapshot)>(1);
        let (done, reports) = bounded(1);
        let run = move || {
            for (attempt, snapshot) in work {
                let report = save(&store, &snapshot, &options, &attempt, &*agree);
                publish_metrics(&report);
                // Drop this reference to the lock first: a caller that has the report must be able to release the lock.
                drop(attempt);
                if done.send((report, snapshot)).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(run);
        thread.map_err(CheckpointError::Thread)?;
        Ok(Self { jobs, reports, is_busy: false, spare: None, next_attempt: 0, busy, place, lock })
    }

    pub(crate) fn must_skip(&self) -> bool {
        self.is_busy && self.reports.is_empty() && self.busy == WhenBusy::Skip
    }

    /// Waits for the running save, then starts to write a snapshot. `replaces` is [`Attempt::replaces`].
    pub(crate) fn start(&mut self, snapshot: Snapshot, replaces: bool) -> Result<SaveStart, CheckpointError> {
        let mut before = None;
        if self.is_busy {
            let (report, spare) = self.reports.recv().map_err(|_| self.panicked())?;
            (before, self.spare) = (Some(Box::new(report)), Some(spare));
        }
        let attempt = Attempt { number: self.next_attempt, replaces, lock: self.lock.clone() };
        self.jobs.send((attempt, snapshot)).map_err(|_| self.panicked())?;
        self.next_attempt += 1;
        self.is_busy = true;
        Ok(SaveStart::Started { before })
    }

    fn panicked(&self) -> CheckpointError {
        CheckpointError::Refused(format!("{}: the saver's thread has panicked", self.place))
    }

    /// Returns the report of the last save, if the save has ended and no earlier call returned it. Never waits.
    pub fn poll(&mut self) -> Option<SaveReport> {
        self.wait(Duration::ZERO).ok().flatten()
    }

    /// Waits for the running save and returns its report, or `None` if there is none.
    ///
    /// # Errors
    /// [`CheckpointError::Stalled`] if the save takes longer than `limit`. The save continues.
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

/// Saves a snapshot on the caller's thread. Takes no lock, so the caller must exclude other writers to the store.
///
/// # Errors
/// If the options contradict each other. A failed write is not an error of this call: the report contains it.
pub fn save_now(
    store: &Store,
    snapshot: &Snapshot,
    agree: &dyn SaveAgreement,
    options: &SaverOptions,
    attempt: u32,
) -> Result<SaveReport, CheckpointError> {
    check_member(options.member)?;
    let report = save(store, snapshot, options, &Attempt { number: attempt, ..Attempt::default() }, agree);
    publish_metrics(&report);
    Ok(report)
}

fn publish_metrics(report: &SaveReport) {
    let [committed, failed] = outcome_counters();
    histogram!(names::CHECKPOINT_DURATION).record(report.seconds);
    if report.result.is_err() {
        return failed.increment(1);
    }
    committed.increment(1);
    if let Ok(now) = SystemTime::now().duration_since(UNIX_EPOCH) {
        gauge!(names::CHECKPOINT_LAST_SUCCESS).set(now.as_secs_f64());
    }
}

/// Counters of committed and failed saves; always registers both.
fn outcome_counters() -> [Counter; 2] {
    ["committed", "failed"].map(|outcome| counter!(names::CHECKPOINTS, "outcome" => outcome))
}
