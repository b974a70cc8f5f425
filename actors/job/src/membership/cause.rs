//! Decides which of several reports is the first cause of a session's end. It is pure: the caller supplies the time.
//!
//! One failure causes many reports. The failed process reports itself. Its peers report lost connections, and later
//! missing heartbeats. Processes that end because of the failure are also reported as lost. Reports contain no times,
//! because clocks differ. The class of a report depends on its kind, and on whether the reporter already knew of
//! another report. The first cause is in the first of these four classes that has a report:
//!
//! 1. this process's own failure, unless this process already knew of a peer's own failure;
//! 2. a peer's own failure, unless that peer already knew of another process's own failure;
//! 3. secondary failures: the reporter already knew of another process's failure;
//! 4. symptoms (lost connection, missing heartbeats): the process with the most first-hand accusers wins. These are the
//!    reporters that knew of no report about another process. A tie goes to the process with the most accusers in all.
//!
//! If a tie remains, the lower process number wins. A process with a failure of class 1 immediately decides on itself.
//! Any other process waits for a grace window after its first report, so that reports of a better class can arrive.
//! So processes without a failure of class 1 that receive the same reports, in any order, decide on the same cause.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The first cause of a session's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstCause {
    /// The process that failed or was lost.
    pub process: u32,
    /// What happened to that process, and which process observed it.
    pub cause: String,
    /// The exit code of the failed process, or 69 if the process was lost.
    pub exit: u8,
}

impl fmt::Display for FirstCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}: {}", self.process, self.cause)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// The reporter itself failed.
    Failed,
    /// The reporter lost another process.
    Lost,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) by: u32,
    /// The process that failed; equal to `by` for [`Kind::Failed`].
    pub(crate) about: u32,
    pub(crate) kind: Kind,
    /// True if the reporter already knew of a failure or loss of another process, which may have caused this one.
    pub(crate) follows: bool,
    /// Empty if the report arrived in a heartbeat, which has no room for text. A control message brings the text later.
    pub(crate) cause: String,
    pub(crate) exit: u8,
}

impl Report {
    fn key(&self) -> (u32, u32, Kind) {
        (self.by, self.about, self.kind)
    }
}

/// Text of the cause if the report arrived only in a heartbeat.
const UNKNOWN_CAUSE: &str = "it was lost; the message with the reason did not arrive";

/// Collects reports and makes one decision.
#[derive(Debug)]
pub(crate) struct Arbiter {
    own: u32,
    processes: u32,
    grace: Duration,
    /// When the grace window ends; `None` before the first report.
    decide_at: Option<Duration>,
    /// Reports by reporter, accused process and kind. This key bounds the number of reports.
    reports: BTreeMap<(u32, u32, Kind), Report>,
    closed: bool,
    /// For each report that this process has passed on: whether it contained the text of the cause.
    relayed: BTreeMap<(u32, u32, Kind), bool>,
    /// The best (lowest) class of the reports that were passed on, as [`Arbiter::relays`] computes it.
    best_relayed: u8,
}

impl Arbiter {
    pub(crate) fn new(own: u32, processes: u32, grace: Duration) -> Self {
        let (reports, relayed) = (BTreeMap::new(), BTreeMap::new());
        Self { own, processes, grace, decide_at: None, reports, closed: false, relayed, best_relayed: u8::MAX }
    }

    /// Closes the arbiter after this process has left cleanly. The arbiter then ignores later reports.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    pub(crate) fn own_failure(&self, cause: String, exit: u8) -> Report {
        let follows = self.reports.values().any(|r| r.kind == Kind::Failed && r.by != self.own);
        Report { by: self.own, about: self.own, kind: Kind::Failed, follows, cause, exit }
    }

    pub(crate) fn own_symptom(&self, about: u32, cause: String, exit: u8) -> Report {
        let follows = self.reports.values().any(|r| r.about != about);
        Report { by: self.own, about, kind: Kind::Lost, follows, cause, exit }
    }

    /// The process that this process lost when it knew of no report about a third process. Of several such processes,
    /// the one with the lowest number.
    pub(crate) fn lost_by_own(&self) -> Option<u32> {
        let lost = self.reports.values().find(|r| r.by == self.own && r.kind == Kind::Lost && !r.follows);
        lost.map(|r| r.about)
    }

    /// All accepted reports.
    pub(crate) fn reports(&self) -> impl Iterator<Item = &Report> {
        self.reports.values()
    }

    fn is_valid(&self, report: &Report) -> bool {
        let exist = report.by < self.processes && report.about < self.processes;
        exist && (report.by == report.about) == (report.kind == Kind::Failed)
    }

    /// True if this process must pass the report on, even after its own decision. It passes each report on once, and
    /// again if the text of the cause arrives later. If it has already passed on a report of a better class, `report`
    /// cannot be the first cause and is dropped.
    pub(crate) fn relays(&mut self, report: &Report) -> bool {
        let rank = match report.kind {
            Kind::Failed if !report.follows => 0,
            Kind::Failed => 1,
            Kind::Lost => 2,
        };
        let (key, has_cause) = (report.key(), !report.cause.is_empty());
        let is_known = self.relayed.get(&key).is_some_and(|had_cause| *had_cause || !has_cause);
        if is_known || rank > self.best_relayed || !self.is_valid(report) {
            return false;
        }
        self.best_relayed = rank;
        self.relayed.insert(key, has_cause);
        true
    }

    /// Adds a report. Returns false if the report is known, too late or invalid.
    pub(crate) fn report(&mut self, now: Duration, report: Report) -> bool {
        if self.closed || !self.is_valid(&report) {
            return false;
        }
        let key = report.key();
        if let Some(known) = self.reports.get_mut(&key) {
            if known.cause.is_empty() {
                *known = report;
            }
            return false;
        }
        let is_final = report.by == self.own && report.kind == Kind::Failed && !report.follows;
        let decide_at = if is_final { now } else { now + self.grace };
        self.decide_at = Some(self.decide_at.map_or(decide_at, |at| at.min(decide_at)));
        self.reports.insert(key, report);
        true
    }

    pub(crate) fn is_deciding(&self) -> bool {
        self.decide_at.is_some() && !self.closed
    }

    /// Returns the first cause when the grace window has ended. Later calls return `None`.
    pub(crate) fn tick(&mut self, now: Duration) -> Option<FirstCause> {
        if self.closed || now < self.decide_at? {
            return None;
        }
        self.closed = true;
        let first = self.reports.values().min_by_key(|r| self.order(r))?;
        let cause = if first.cause.is_empty() { UNKNOWN_CAUSE } else { &first.cause };
        let cause = match (first.kind, first.by == self.own) {
            (Kind::Failed, _) => cause.to_owned(),
            (Kind::Lost, true) => format!("{cause} (seen by process {}, this one)", first.by),
            (Kind::Lost, false) => format!("{cause} (seen by process {})", first.by),
        };
        Some(FirstCause { process: first.about, cause, exit: first.exit })
    }

    /// The sort key of a report; the report with the smallest key is the first cause.
    fn order(&self, report: &Report) -> impl Ord + use<> {
        let class = match report.kind {
            Kind::Failed if report.follows => 2,
            Kind::Failed if report.by == self.own => 0,
            Kind::Failed => 1,
            Kind::Lost => 3,
        };
        let accusers = |first_hand: bool| {
            let same = self.reports.values().filter(|r| r.kind == report.kind && r.about == report.about);
            Reverse(same.filter(|r| !(first_hand && r.follows)).count())
        };
        // The text names one accuser: this process if it is an accuser, or else the accuser with the lowest number.
        (class, accusers(true), accusers(false), report.about, report.follows, report.by != self.own, report.by)
    }
}

#[cfg(test)]
mod tests;
