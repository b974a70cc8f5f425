//! Notices that nothing moves although there is work, and says who waits for whom. Imports `supervisor` and `error`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Failure;
use crate::slow::{Slow, Tally};
use crate::supervisor::Session;

/// Called with a report, on the thread that looks; it must not call [`crate::shell::Running::tick`].
pub type OnStall = Arc<dyn Fn(&str) + Send + Sync>;

/// What to do about a session that does not move.
#[derive(Clone)]
pub struct WatchdogOptions {
    /// Time without progress, with firings outstanding, after which the session counts as stalled. It must be longer than
    /// the longest firing, since a firing's kernels show no progress.
    pub stall_after: Duration,
    /// How often the watchdog's thread looks; `None` starts no thread, and [`crate::shell::Running::tick`] drives it.
    pub check_every: Option<Duration>,
    /// Ends the session with [`Failure::Stalled`].
    pub abort_on_stall: bool,
    /// Gets the report, besides the log.
    pub on_stall: Option<OnStall>,
    /// Gets a line, besides the log, about another process that this one waits for most of the time: at 8 of the last 10
    /// looks no stream of this process had anything to do, for want of what that process, or the way to it, brings late.
    /// Told again every 60 looks.
    pub on_slow: Option<OnStall>,
}

impl Default for WatchdogOptions {
    fn default() -> Self {
        Self {
            stall_after: Duration::from_secs(60),
            check_every: Some(Duration::from_secs(1)),
            abort_on_stall: false,
            on_stall: None,
            on_slow: None,
        }
    }
}

impl fmt::Debug for WatchdogOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stall_after, check_every, abort_on_stall, .. } = self;
        write!(f, "WatchdogOptions {{ {stall_after:?}, {check_every:?}, abort_on_stall: {abort_on_stall} }}")
    }
}

/// The watchdog's memory. Time is what the caller says.
#[derive(Debug)]
pub(crate) struct Watchdog {
    options: WatchdogOptions,
    progress: u64,
    since: Duration,
    reported: bool,
    tally: Tally,
}

impl Watchdog {
    pub(crate) fn new(options: WatchdogOptions) -> Self {
        Self { options, progress: 0, since: Duration::ZERO, reported: false, tally: Tally::default() }
    }

    /// How long nothing has moved, the first time that this is too long.
    fn observe(&mut self, now: Duration, progress: u64, outstanding: bool) -> Option<Duration> {
        if progress != self.progress || !outstanding {
            (self.progress, self.since, self.reported) = (progress, now, false);
            return None;
        }
        let idle = now.saturating_sub(self.since);
        if self.reported || idle < self.options.stall_after {
            return None;
        }
        self.reported = true;
        Some(idle)
    }

    /// Looks once; `now` counts from the session's start. Returns the report when the session has just stalled.
    pub(crate) fn tick(&mut self, now: Duration, session: &Session) -> Option<String> {
        if session.has_peers() && session.outstanding() {
            let slow = self.tally.add(session.waits());
            slow.iter().for_each(|slow| self.tell_slow(slow));
        }
        let idle = self.observe(now, session.progress(), session.outstanding())?;
        let report = session.report();
        let idle_ms = idle.as_millis() as u64;
        tracing::error!(idle_ms, "no progress\n{report}");
        if let Some(callback) = &self.options.on_stall {
            callback(&report);
        }
        if self.options.abort_on_stall {
            session.fail(Failure::Stalled { idle_ms, report: report.clone() });
        }
        Some(report)
    }

    fn tell_slow(&self, Slow { process, waits, of, what }: &Slow) {
        let text = format!("waiting for rank {process} at {waits} of the last {of} looks, now for {what}");
        tracing::warn!("{text}");
        if let Some(callback) = &self.options.on_slow {
            callback(&text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_outstanding_work_that_does_not_move_is_a_stall_and_once() {
        let at = Duration::from_secs;
        let mut dog = Watchdog::new(WatchdogOptions { stall_after: at(10), ..WatchdogOptions::default() });
        assert_eq!(dog.observe(at(0), 5, true), None);
        assert_eq!(dog.observe(at(9), 5, true), None);
        assert_eq!(dog.observe(at(10), 5, true), Some(at(10)));
        assert_eq!(dog.observe(at(30), 5, true), None, "said once");
        assert_eq!(dog.observe(at(31), 6, true), None, "moves again");
        assert_eq!(dog.observe(at(40), 6, true), None);
        assert_eq!(dog.observe(at(41), 6, true), Some(at(10)));
        // An idle session is no stall, however long.
        assert_eq!(dog.observe(at(42), 7, false), None);
        assert_eq!(dog.observe(at(99), 7, false), None);
        assert_eq!(dog.observe(at(108), 7, true), None, "counts from the end of idleness");
        assert_eq!(dog.observe(at(109), 7, true), Some(at(10)));
    }
}
