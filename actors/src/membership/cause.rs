//! Which of several reports is the first cause of a session's end. Pure: time is what the caller says.
//!
//! A failure is seen by many: the process that fails says so, its peers lose their connections to it, later their heartbeats,
//! and processes that stop because of it are lost to others in turn. Reports carry no times, since clocks differ; what
//! orders them is their kind, and whether the reporter knew of another report already:
//!
//! 1. this process's own failure, unless it knew that a peer had failed by itself;
//! 2. a peer's report about itself, likewise;
//! 3. failures that follow: the reporter knew of another process's failure before;
//! 4. symptoms (a connection lost, a heartbeat missed): the process that most accuse, those first who knew of no other.
//!
//! Ties go to the lower process. After the first report a grace window lets better ones arrive, so processes that got the
//! same reports, in whatever order, name the same cause. Only a failure of our own is final at once.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// The one cause that a session ended for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstCause {
    /// The process that failed, or that was lost.
    pub process: u32,
    /// What happened to it, and who saw it.
    pub cause: String,
    /// The exit code that goes with it: the failed process's own, or 69 when it was lost.
    pub exit: u8,
}

impl fmt::Display for FirstCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}: {}", self.process, self.cause)
    }
}

/// What a report says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// The reporter failed by itself.
    Failed,
    /// The reporter lost another process.
    Lost,
}

/// One process's word on why the session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) by: u32,
    /// The one that failed; `by` itself when the kind is [`Kind::Failed`].
    pub(crate) about: u32,
    pub(crate) kind: Kind,
    /// The reporter knew of another report that may have led to this one.
    pub(crate) follows: bool,
    /// Empty in one that came by a heartbeat, which has no room for it; a letter's takes its place.
    pub(crate) cause: String,
    pub(crate) exit: u8,
}

/// Stands for the cause of a report that only a heartbeat brought.
const UNTOLD: &str = "it is lost; why did not get through";

/// Collects reports and decides once.
#[derive(Debug)]
pub(crate) struct Arbiter {
    own: u32,
    processes: u32,
    grace: Duration,
    /// When the grace window ends.
    decide_at: Option<Duration>,
    /// One for each reporter, accused and kind, so their number is bounded.
    reports: BTreeMap<(u32, u32, Kind), Report>,
    closed: bool,
}

impl Arbiter {
    pub(crate) fn new(own: u32, processes: u32, grace: Duration) -> Self {
        Self { own, processes, grace, decide_at: None, reports: BTreeMap::new(), closed: false }
    }

    /// This process has ended in order: nothing that happens now is a failure of its session.
    pub(crate) fn close(&mut self) {
        self.closed = true;
    }

    /// The report of a failure of this process.
    pub(crate) fn own_failure(&self, cause: String, exit: u8) -> Report {
        let follows = self.reports.values().any(|r| r.kind == Kind::Failed && r.by != self.own);
        Report { by: self.own, about: self.own, kind: Kind::Failed, follows, cause, exit }
    }

    /// The report that this process lost another.
    pub(crate) fn own_symptom(&self, about: u32, cause: String, exit: u8) -> Report {
        let follows = self.reports.values().any(|r| r.about != about);
        Report { by: self.own, about, kind: Kind::Lost, follows, cause, exit }
    }

    /// The process that this one has lost for no report that it knew of; the first by number.
    pub(crate) fn lost_by_own(&self) -> Option<u32> {
        let lost = self.reports.values().find(|r| r.by == self.own && r.kind == Kind::Lost && !r.follows);
        lost.map(|r| r.about)
    }

    /// Takes a report in; false for one that is known, comes after the decision, or makes no sense.
    pub(crate) fn report(&mut self, now: Duration, report: Report) -> bool {
        let names = report.by < self.processes && report.about < self.processes;
        if self.closed || !names || (report.by == report.about) != (report.kind == Kind::Failed) {
            return false;
        }
        let key = (report.by, report.about, report.kind);
        if let Some(known) = self.reports.get_mut(&key) {
            if known.cause.is_empty() {
                *known = report;
            }
            return false;
        }
        let best_possible = report.by == self.own && report.kind == Kind::Failed && !report.follows;
        let decide_at = if best_possible { now } else { now + self.grace };
        self.decide_at = Some(self.decide_at.map_or(decide_at, |at| at.min(decide_at)));
        self.reports.insert(key, report);
        true
    }

    /// True while a grace window is open.
    pub(crate) fn is_deciding(&self) -> bool {
        self.decide_at.is_some() && !self.closed
    }

    /// The first cause, once, when the grace window is over.
    pub(crate) fn tick(&mut self, now: Duration) -> Option<FirstCause> {
        if self.closed || now < self.decide_at? {
            return None;
        }
        self.closed = true;
        let first = self.reports.values().min_by_key(|r| self.order(r))?;
        let cause = if first.cause.is_empty() { UNTOLD } else { &first.cause };
        let cause = match (first.kind, first.by == self.own) {
            (Kind::Failed, _) => cause.to_owned(),
            (Kind::Lost, true) => format!("{cause} (seen by this process, {})", first.by),
            (Kind::Lost, false) => format!("{cause} (seen by process {})", first.by),
        };
        Some(FirstCause { process: first.about, cause, exit: first.exit })
    }

    /// Smaller is nearer to the cause.
    fn order(&self, report: &Report) -> impl Ord + use<> {
        let class = match report.kind {
            Kind::Failed if report.follows => 2,
            Kind::Failed if report.by == self.own => 0,
            Kind::Failed => 1,
            Kind::Lost => 3,
        };
        let accusers = |unled: bool| {
            let same = self.reports.values().filter(|r| r.kind == report.kind && r.about == report.about);
            Reverse(same.filter(|r| !(unled && r.follows)).count())
        };
        // Among the accusers of one process we quote ourselves, then the lowest.
        (class, accusers(true), accusers(false), report.about, report.follows, report.by != self.own, report.by)
    }
}

#[cfg(test)]
mod tests;
