//! Determines the first cause among failed processes, and whether to restart. All functions are pure.

use std::time::Duration;

use crate::exit::{Exit, Report, unix_ns};

#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) rank: u32,
    pub(super) exit: Exit,
    /// When the launcher detected the process's end: Unix time in nanoseconds.
    pub(super) time_unix_ns: u64,
    pub(super) report: Option<Report>,
    /// The first of the error lines at the end of the process's log.
    pub(super) error_line: Option<String>,
    /// True if the launcher had sent the process a signal to end.
    pub(super) signaled: bool,
}

impl Ended {
    /// A process that presumably ended because of the launcher's signal.
    pub(super) fn by_signal(rank: u32, signal: u8) -> Self {
        let (exit, time_unix_ns) = (Exit::Signal(signal), unix_ns());
        Self { rank, exit, time_unix_ns, report: None, error_line: None, signaled: true }
    }

    /// The failure of a process that ended with code 0 although others wait for it. A restart cannot help.
    pub(super) fn missed(&self) -> Self {
        let cause = "it ended with code 0, but other ranks wait for it to join; start the same program with the same \
                     flags on all ranks";
        let exit = Exit::Refused;
        let report = Report { cause: cause.into(), exit: exit.code(), ..self.report() };
        Self { exit, report: Some(report), ..self.clone() }
    }

    /// 0: the failure began in this process. 1: the process blames another one. 2: the launcher ended the process.
    fn class(&self) -> u8 {
        match &self.report {
            Some(report) if report.is_own_failure() => 0,
            Some(_) => 1,
            None if self.signaled => 2,
            None if self.exit.is_caused_by_peer() => 1,
            None => 0,
        }
    }

    /// True if the process ended on request and must not be restarted here: see [`crate::departure::report`].
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
        let derived = || Report { rank, exit, time_unix_ns, cause: cause().into(), ..Report::default() };
        self.report.clone().map_or_else(derived, |report| Report { exit, ..report })
    }

    pub(super) fn describe(&self) -> String {
        let reported = self.report.as_ref().map(|report| report.cause.as_str());
        let how = match (reported.or(self.error_line.as_deref()), self.exit) {
            (Some(cause), exit) => exit.after(cause.trim().trim_start_matches("error: ")),
            (None, Exit::Signal(_)) => format!("killed by a signal ({})", self.exit),
            (None, exit) => format!("ended ({exit}) and printed no error"),
        };
        format!("rank {}: {how}", self.rank)
    }
}

/// The process in which the failure began: the earliest one that reports its own failure, or else the earliest one that
/// blames another process.
pub(super) fn first_cause(ended: &[Ended]) -> Option<&Ended> {
    ended.iter().filter(|e| e.exit != Exit::Done).min_by_key(|e| (e.class(), e.time(), e.rank))
}

/// The launcher's exit after `signal`, and the process whose failure determines this exit, if a process failed.
pub(super) fn exit_after_signal(ended: &[Ended], signal: u8) -> (Exit, Option<&Ended>) {
    // A process has not failed if `signal` or the launcher's own signal ended it, or if it ended because others ended.
    let is_expected = |e: &&Ended| match e.exit {
        Exit::Done => true,
        Exit::Signal(by) => e.signaled || by == signal || by == 15,
        exit => exit.is_caused_by_peer(),
    };
    let failed: Vec<Ended> = ended.iter().filter(|e| !is_expected(e)).cloned().collect();
    match first_cause(&failed) {
        Some(cause) => (cause.exit, ended.iter().find(|e| e.rank == cause.rank)),
        None if ended.iter().all(|e| e.exit == Exit::Done) => (Exit::Done, None),
        None => (Exit::Signal(signal), None),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Restart,
    /// The processes would fail again, or a restart is not allowed.
    WouldNotHelp,
    Exhausted,
    /// Several restarts in a row have not committed a higher step.
    NoProgress,
}

/// The launcher gives up after this many restarts in a row that do not commit a higher step.
pub(super) const RESTARTS_WITHOUT_PROGRESS_MAX: u32 = 2;

const RESTART_WAIT_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Restarts {
    pub(super) max: u64,
    pub(super) made: u64,
    /// Highest committed step of all attempts.
    pub(super) committed: Option<u64>,
    without_progress: u32,
}

impl Restarts {
    pub(super) fn new(max: u64) -> Restarts {
        Restarts { max, ..Restarts::default() }
    }

    /// Pause before the next attempt: 0 before the first restart, and `first` before the second. Each later pause is
    /// twice the previous one, but at most the larger of [`RESTART_WAIT_MAX`] and `first`.
    pub(super) fn pause(&self, first: Duration) -> Duration {
        match self.made {
            0 | 1 => Duration::ZERO,
            made => first.saturating_mul(2u32.saturating_pow(made.min(34) as u32 - 2)).min(RESTART_WAIT_MAX.max(first)),
        }
    }

    /// Decides what follows an attempt that failed with `exit`. `committed` is the last committed step.
    pub(super) fn next(&mut self, exit: Exit, committed: Option<u64>) -> Decision {
        if committed > self.committed {
            self.committed = committed;
            self.without_progress = 0;
        } else if self.made > 0 {
            self.without_progress += 1;
        }
        if !exit.worth_a_retry() {
            Decision::WouldNotHelp
        } else if self.made >= self.max {
            Decision::Exhausted
        } else if self.without_progress >= RESTARTS_WITHOUT_PROGRESS_MAX {
            Decision::NoProgress
        } else {
            self.made += 1;
            Decision::Restart
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(rank: u32, code: u8, time_unix_ns: u64) -> Ended {
        Ended { rank, exit: Exit::from_code(code), time_unix_ns, report: None, error_line: None, signaled: false }
    }

    fn reported(ended: Ended, first_cause_rank: Option<u32>, time_unix_ns: u64) -> Ended {
        let (rank, exit) = (ended.rank, ended.exit.code());
        let report =
            Some(Report { rank, time_unix_ns, exit, cause: "it".into(), first_cause_rank, ..Report::default() });
        Ended { report, ..ended }
    }

    #[test]
    fn the_first_cause_is_the_earliest_own_failure() {
        let first = |all: &[Ended]| first_cause(all).map(|e| e.rank);
        assert_eq!(first(&[]), None);
        assert_eq!(first(&[ended(0, 0, 1)]), None);
        assert_eq!(first(&[ended(0, 0, 1), ended(1, 70, 5), ended(2, 70, 4)]), Some(2), "the earliest failure");
        assert_eq!(first(&[ended(0, 69, 1), ended(1, 75, 2), ended(2, 137, 3)]), Some(2), "own failures come first");
        assert_eq!(first(&[ended(0, 69, 2), ended(1, 75, 1)]), Some(1), "the earliest, if all blame a peer");
        let killed = Ended { signaled: true, ..ended(1, 137, 1) };
        assert_eq!(first(&[ended(0, 69, 2), killed.clone()]), Some(0), "rank 1 was killed by the launcher");
        assert_eq!(first(&[ended(0, 70, 2), reported(killed, Some(1), 1)]), Some(1), "rank 1 reported a failure first");
        let blaming = reported(ended(0, 70, 1), Some(2), 1);
        assert_eq!(first(&[blaming.clone(), ended(2, 79, 9)]), Some(2), "a report overrides the exit code");
        let own = reported(ended(3, 69, 7), Some(3), 2);
        assert_eq!(first(&[ended(2, 79, 3), blaming, own]), Some(3), "the time of the report counts");
    }

    #[test]
    fn the_description_prefers_the_report_to_the_log_to_the_exit_code() {
        assert_eq!(ended(0, 137, 0).describe(), "rank 0: killed by a signal (code 137: SIGKILL)");
        assert_eq!(ended(0, 1, 0).describe(), "rank 0: ended (code 1) and printed no error");
        let line = Ended { error_line: Some("error: no file".into()), ..ended(0, 2, 0) };
        assert_eq!(line.describe(), "rank 0: no file (code 2: usage)");
        assert_eq!(reported(line, None, 0).describe(), "rank 0: it (code 2: usage)");
        let refused = Ended { error_line: Some("error: rank 1 ended (code 2: usage)".into()), ..ended(0, 2, 0) };
        assert_eq!(refused.describe(), "rank 0: rank 1 ended (code 2: usage)", "the code appears once");
    }

    #[test]
    fn an_end_by_the_requested_signal_is_not_a_failure() {
        let exit = |all: &[Ended]| exit_after_signal(all, 15).0.code();
        assert_eq!(exit(&[ended(0, 143, 1), ended(1, 143, 1)]), 143);
        assert_eq!(exit(&[ended(0, 0, 1), ended(1, 0, 1)]), 0, "all processes exited with 0");
        assert_eq!(exit(&[ended(0, 0, 1), ended(1, 69, 1)]), 143);
        assert_eq!(exit(&[ended(0, 143, 1), ended(1, 73, 1)]), 73, "rank 1 failed with 73");
        assert_eq!(exit(&[ended(0, 143, 1), ended(1, 137, 1)]), 137);
        assert_eq!(exit(&[ended(0, 143, 1), Ended { signaled: true, ..ended(1, 137, 1) }]), 143);
        assert_eq!(exit_after_signal(&[ended(0, 130, 1)], 2).0.code(), 130);
    }

    /// The decision after each attempt. Every attempt fails with `code`; `committed` lists their last committed steps.
    fn decisions(max: u64, code: u8, committed: &[Option<u64>]) -> Vec<Decision> {
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
        assert_eq!([1, 2, 3].map(|made| pause(made, 90_000)), [0, 90_000, 90_000], "the given pause exceeds the limit");
        assert_eq!(pause(9, 0), 0);
    }

    #[test]
    fn restarts_are_limited() {
        use Decision::*;
        assert_eq!(decisions(0, 137, &[None]), [Exhausted]);
        assert_eq!(decisions(2, 137, &[Some(1), Some(2), Some(3)]), [Restart, Restart, Exhausted]);
        assert_eq!(decisions(9, 78, &[Some(1)]), [WouldNotHelp]);
        assert_eq!(decisions(9, 137, &[None, None, None]), [Restart, Restart, NoProgress]);
        assert_eq!(decisions(9, 69, &[Some(5), Some(5), Some(5)]), [Restart, Restart, NoProgress]);
        // Progress resets the count of restarts without progress.
        let steps = [Some(5), Some(5), Some(6), Some(6), Some(7), Some(7), Some(4)];
        assert_eq!(decisions(9, 69, &steps), [Restart, Restart, Restart, Restart, Restart, Restart, NoProgress]);
    }
}
