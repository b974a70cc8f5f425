//! Which of several processes that failed was the first cause, and whether to start again: pure functions of how they
//! ended.

use std::time::Duration;

use crate::exit::{Exit, Report, unix_ns};

/// How one process ended.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) rank: u32,
    pub(super) exit: Exit,
    /// When the launcher saw it, in nanoseconds since 1970.
    pub(super) time_unix_ns: u64,
    /// What it said itself.
    pub(super) report: Option<Report>,
    /// The first of its log's last lines that begin with `error:`.
    pub(super) error_line: Option<String>,
    /// The launcher had told it to end.
    pub(super) told: bool,
}

impl Ended {
    /// One that was told to end by a signal, and is taken to have done so.
    pub(super) fn told(rank: u32, signal: u8) -> Self {
        let (exit, time_unix_ns) = (Exit::Signal(signal), unix_ns());
        Self { rank, exit, time_unix_ns, report: None, error_line: None, told: true }
    }

    /// 0: it failed by itself. 1: it says that another one did. 2: the launcher ended it.
    fn class(&self) -> u8 {
        match &self.report {
            Some(report) if report.blames_itself() => 0,
            Some(_) => 1,
            None if self.told => 2,
            None if self.exit.blames_a_peer() => 1,
            None => 0,
        }
    }

    /// Whether it ended on request, so that it is not restarted here: see [`crate::exit::report`].
    pub(super) fn ended_on_request(&self) -> bool {
        self.exit == Exit::Retry
            && self.report.as_ref().is_some_and(|report| report.first_cause_rank == Some(self.rank))
    }

    fn time(&self) -> u64 {
        self.report.as_ref().map_or(self.time_unix_ns, |report| report.time_unix_ns.min(self.time_unix_ns))
    }

    /// The process's report, or one derived from its exit status.
    pub(super) fn report(&self) -> Report {
        let (rank, exit, time_unix_ns) = (self.rank, self.exit.code(), self.time_unix_ns);
        let cause =
            || self.error_line.as_deref().map_or("it printed no error", |line| line.trim_start_matches("error: "));
        let bare = || Report { rank, exit, time_unix_ns, cause: cause().into(), ..Report::default() };
        self.report.clone().map_or_else(bare, |report| Report { exit, ..report })
    }

    /// What happened to it, in words, without its rank.
    pub(super) fn story(&self) -> String {
        let said = self.report.as_ref().map(|report| report.cause.as_str());
        match (said.or(self.error_line.as_deref()), self.exit) {
            (Some(cause), exit) => format!("{} ({exit})", cause.trim().trim_start_matches("error: ")),
            (None, Exit::Signal(_)) => format!("killed by a signal ({})", self.exit),
            (None, exit) => format!("ended ({exit}) and printed no error"),
        }
    }
}

/// The process with which the failure began: one that failed by itself before those that accuse another, and the
/// earliest of these. None when all ended well.
pub(super) fn first_cause(ended: &[Ended]) -> Option<&Ended> {
    ended.iter().filter(|e| e.exit != Exit::Done).min_by_key(|e| (e.class(), e.time(), e.rank))
}

/// How the launcher ends after somebody asked it to by `signal`, and the process that says so when it is a failure.
pub(super) fn exit_when_asked(ended: &[Ended], signal: u8) -> (Exit, Option<&Ended>) {
    // To end by the signal, by the one that the launcher ends others with, or because the others end, is what was asked
    // for.
    let obeyed = |e: &&Ended| match e.exit {
        Exit::Done => true,
        Exit::Signal(by) => e.told || by == signal || by == 15,
        exit => exit.blames_a_peer(),
    };
    let failed: Vec<Ended> = ended.iter().filter(|e| !obeyed(e)).cloned().collect();
    match first_cause(&failed) {
        Some(cause) => (cause.exit, ended.iter().find(|e| e.rank == cause.rank)),
        None if ended.iter().all(|e| e.exit == Exit::Done) => (Exit::Done, None),
        None => (Exit::Signal(signal), None),
    }
}

/// What to do after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Start again.
    Restart,
    /// The code says that it would fail again.
    NotWorthIt,
    /// All restarts are used.
    Exhausted,
    /// Restarts do not get anywhere.
    NoProgress,
}

/// Restarts in a row without a higher committed step, after which the launcher gives up.
pub(super) const RESTARTS_WITHOUT_PROGRESS_MAX: u32 = 2;

/// The longest pause between two attempts, unless the first is longer.
const RESTART_WAIT_MAX: Duration = Duration::from_secs(60);

/// Counts restarts.
#[derive(Debug, Default)]
pub(super) struct Restarts {
    /// At most so many.
    pub(super) max: u64,
    /// So many were made.
    pub(super) made: u64,
    /// Highest step that was committed in any attempt.
    pub(super) committed: Option<u64>,
    without_progress: u32,
}

impl Restarts {
    pub(super) fn new(max: u64) -> Restarts {
        Restarts { max, ..Restarts::default() }
    }

    /// How long to wait before the next attempt: not at all before the first restart, `first` before the second, then twice
    /// as long each time, up to [`RESTART_WAIT_MAX`] or to `first` if that is longer.
    pub(super) fn pause(&self, first: Duration) -> Duration {
        match self.made {
            0 | 1 => Duration::ZERO,
            made => first.saturating_mul(2u32.saturating_pow(made.min(34) as u32 - 2)).min(RESTART_WAIT_MAX.max(first)),
        }
    }

    /// An attempt failed with `exit`, and `committed` is the last step that anybody committed.
    pub(super) fn next(&mut self, exit: Exit, committed: Option<u64>) -> Verdict {
        if committed > self.committed {
            self.committed = committed;
            self.without_progress = 0;
        } else if self.made > 0 {
            self.without_progress += 1;
        }
        if !exit.worth_a_retry() {
            Verdict::NotWorthIt
        } else if self.made >= self.max {
            Verdict::Exhausted
        } else if self.without_progress >= RESTARTS_WITHOUT_PROGRESS_MAX {
            Verdict::NoProgress
        } else {
            self.made += 1;
            Verdict::Restart
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(rank: u32, code: u8, time_unix_ns: u64) -> Ended {
        Ended { rank, exit: Exit::from_code(code), time_unix_ns, report: None, error_line: None, told: false }
    }

    fn reported(ended: Ended, first_cause_rank: Option<u32>, time_unix_ns: u64) -> Ended {
        let (rank, exit) = (ended.rank, ended.exit.code());
        let report = Some(Report { rank, time_unix_ns, exit, cause: "it".into(), first_cause_rank, joined: false });
        Ended { report, ..ended }
    }

    #[test]
    fn the_first_cause() {
        let first = |all: &[Ended]| first_cause(all).map(|e| e.rank);
        assert_eq!(first(&[]), None);
        assert_eq!(first(&[ended(0, 0, 1)]), None);
        assert_eq!(first(&[ended(0, 0, 1), ended(1, 70, 5), ended(2, 70, 4)]), Some(2), "the earliest");
        assert_eq!(first(&[ended(0, 69, 1), ended(1, 75, 2), ended(2, 137, 3)]), Some(2), "not who accuses");
        assert_eq!(first(&[ended(0, 69, 2), ended(1, 75, 1)]), Some(1), "the earliest accuser, if all accuse");
        let told = Ended { told: true, ..ended(1, 137, 1) };
        assert_eq!(first(&[ended(0, 69, 2), told.clone()]), Some(0), "not who was killed by us");
        assert_eq!(first(&[ended(0, 70, 2), reported(told, Some(1), 1)]), Some(1), "unless it says so");
        let accuser = reported(ended(0, 70, 1), Some(2), 1);
        assert_eq!(first(&[accuser.clone(), ended(2, 79, 9)]), Some(2), "a report weighs more than its code");
        let own = reported(ended(3, 69, 7), Some(3), 2);
        assert_eq!(first(&[ended(2, 79, 3), accuser, own]), Some(3), "the report's time counts");
    }

    #[test]
    fn stories() {
        assert_eq!(ended(0, 137, 0).story(), "killed by a signal (code 137: SIGKILL)");
        assert_eq!(ended(0, 1, 0).story(), "ended (code 1) and printed no error");
        let line = Ended { error_line: Some("error: no file".into()), ..ended(0, 2, 0) };
        assert_eq!(line.story(), "no file (code 2: usage)");
        assert_eq!(reported(line, None, 0).story(), "it (code 2: usage)");
    }

    #[test]
    fn what_was_asked_for_is_no_failure() {
        let exit = |all: &[Ended]| exit_when_asked(all, 15).0.code();
        assert_eq!(exit(&[ended(0, 143, 1), ended(1, 143, 1)]), 143);
        assert_eq!(exit(&[ended(0, 0, 1), ended(1, 0, 1)]), 0, "it was done");
        assert_eq!(exit(&[ended(0, 0, 1), ended(1, 69, 1)]), 143);
        assert_eq!(exit(&[ended(0, 143, 1), ended(1, 73, 1)]), 73, "the checkpoint was not written");
        assert_eq!(exit(&[ended(0, 143, 1), ended(1, 137, 1)]), 137);
        assert_eq!(exit(&[ended(0, 143, 1), Ended { told: true, ..ended(1, 137, 1) }]), 143);
        assert_eq!(exit_when_asked(&[ended(0, 130, 1)], 2).0.code(), 130);
    }

    /// What becomes of attempts that all fail with `code` and have committed these steps.
    fn verdicts(max: u64, code: u8, committed: &[Option<u64>]) -> Vec<Verdict> {
        let mut restarts = Restarts::new(max);
        committed.iter().map(|step| restarts.next(Exit::from_code(code), *step)).collect()
    }

    #[test]
    fn pauses_between_restarts_double_up_to_a_limit() {
        let pause =
            |made, first| Restarts { made, ..Restarts::new(100) }.pause(Duration::from_millis(first)).as_millis();
        assert_eq!([0, 1, 2, 3, 4, 5].map(|made| pause(made, 1000)), [0, 0, 1000, 2000, 4000, 8000]);
        assert_eq!(
            [7, 8, 9, 33, 34, 35, 1 << 40].map(|made| pause(made, 1000)),
            [32_000, 60_000, 60_000, 60_000, 60_000, 60_000, 60_000]
        );
        assert_eq!([1, 2, 3].map(|made| pause(made, 90_000)), [0, 90_000, 90_000], "as long as was asked for");
        assert_eq!(pause(9, 0), 0);
    }

    #[test]
    fn restarts_are_limited() {
        use Verdict::*;
        assert_eq!(verdicts(0, 137, &[None]), [Exhausted]);
        assert_eq!(verdicts(2, 137, &[Some(1), Some(2), Some(3)]), [Restart, Restart, Exhausted]);
        assert_eq!(verdicts(9, 78, &[Some(1)]), [NotWorthIt]);
        assert_eq!(verdicts(9, 137, &[None, None, None]), [Restart, Restart, NoProgress]);
        assert_eq!(verdicts(9, 69, &[Some(5), Some(5), Some(5)]), [Restart, Restart, NoProgress]);
        // One restart without progress is forgiven, each time.
        let steps = [Some(5), Some(5), Some(6), Some(6), Some(7), Some(7), Some(4)];
        assert_eq!(verdicts(9, 69, &steps), [Restart, Restart, Restart, Restart, Restart, Restart, NoProgress]);
    }
}
