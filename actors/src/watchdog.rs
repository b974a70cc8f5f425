//! Notices that nothing moves although there is work, and says who waits for whom.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::error::Failure;
use crate::slow::{Slow, Tally};
use crate::supervisor::Session;

/// Called with a report, on the thread that looks; it must not call [`crate::shell::RunningSession::tick`].
pub type OnStall = Arc<dyn Fn(&str) + Send + Sync>;

/// What to do about a session that does not move.
#[derive(Clone)]
pub struct WatchdogOptions {
    /// Time without progress, with firings outstanding, after which the session counts as stalled. It must be longer than
    /// the longest firing, since a firing's kernels show no progress. Once it is known how long steps take
    /// ([`crate::shell::Control::steps_take`]), five times as long, and at least 10 s, is enough, where that is sooner.
    pub stall_after: Duration,
    /// How often the watchdog's thread looks; `None` starts no thread, and [`crate::shell::RunningSession::tick`] drives it.
    pub check_every: Option<Duration>,
    /// Ends the session with [`Failure::Stalled`] after so long without progress; `None` never does. As
    /// [`WatchdogOptions::stall_after`], longer than any firing.
    pub abort_after: Option<Duration>,
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
            abort_after: Some(Duration::from_secs(600)),
            on_stall: None,
            on_slow: None,
        }
    }
}

/// Stands for no limit: small enough that an `Instant` does not overflow.
const NO_LIMIT: Duration = Duration::from_secs(1 << 30);

impl WatchdogOptions {
    /// How long a wait for processes that are alive may take: [`WatchdogOptions::abort_after`]. Those that are dead end it
    /// sooner.
    pub fn wait_max(&self) -> Duration {
        self.abort_after.unwrap_or(NO_LIMIT)
    }
}

impl fmt::Debug for WatchdogOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stall_after, check_every, abort_after, .. } = self;
        write!(f, "WatchdogOptions {{ {stall_after:?}, {check_every:?}, abort_after: {abort_after:?} }}")
    }
}

/// A stall is longer than so many steps, and at least so long.
const STALL_STEPS: u32 = 5;
const STALL_LEAST: Duration = Duration::from_secs(10);

/// Nothing has moved for too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stall {
    idle: Duration,
    aborts: bool,
    /// Not told before.
    is_new: bool,
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

    /// What is too long to be kept quiet.
    fn stall_after(&self, step_p99: Duration) -> Duration {
        let by_steps = if step_p99.is_zero() { Duration::MAX } else { (STALL_STEPS * step_p99).max(STALL_LEAST) };
        by_steps.min(self.options.stall_after)
    }

    /// How long nothing has moved, the first time that this is too long to be kept quiet, and when it is too long to go on.
    fn observe(&mut self, now: Duration, progress: u64, outstanding: bool, step_p99: Duration) -> Option<Stall> {
        if progress != self.progress || !outstanding {
            (self.progress, self.since, self.reported) = (progress, now, false);
            return None;
        }
        let idle = now.saturating_sub(self.since);
        let aborts = self.options.abort_after.is_some_and(|after| idle >= after);
        if !aborts && (self.reported || idle < self.stall_after(step_p99)) {
            return None;
        }
        let is_new = !std::mem::replace(&mut self.reported, true);
        Some(Stall { idle, aborts, is_new })
    }

    /// Looks once; `now` counts from the session's start. Returns the report when the session has just stalled.
    pub(crate) fn tick(&mut self, now: Duration, session: &Session) -> Option<String> {
        if session.has_peers() && session.outstanding() {
            let slow = self.tally.add(session.waits());
            slow.iter().for_each(|slow| self.tell_slow(slow));
        }
        let step_p99 = Duration::from_nanos(session.step_p99_ns.load(Ordering::Relaxed));
        let Stall { idle, aborts, is_new } = self.observe(now, session.progress(), session.outstanding(), step_p99)?;
        if session.first_failure().is_some() {
            return None;
        }
        let (hang, report) = session.explain();
        let cause = hang.as_ref().map_or_else(|| "why is not known".to_owned(), ToString::to_string);
        let idle_ms = idle.as_millis() as u64;
        let failure = Failure::Stalled { idle_ms, cause, process: hang.and_then(|hang| hang.process()), report };
        let text = failure.to_string();
        tracing::error!("{text}");
        if let Some(callback) = self.options.on_stall.as_ref().filter(|_| is_new) {
            callback(&text);
        }
        if aborts {
            session.fail(failure);
        }
        Some(text)
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
        let options = WatchdogOptions { stall_after: at(10), abort_after: Some(at(25)), ..WatchdogOptions::default() };
        let mut dog = Watchdog::new(options);
        let mut observe = |now, progress, outstanding| dog.observe(now, progress, outstanding, Duration::ZERO);
        let stall = |idle, aborts| Some(Stall { idle: at(idle), aborts, is_new: !aborts });
        assert_eq!(observe(at(0), 5, true), None);
        assert_eq!(observe(at(9), 5, true), None);
        assert_eq!(observe(at(10), 5, true), stall(10, false));
        assert_eq!(observe(at(24), 5, true), None, "said once");
        assert_eq!(observe(at(30), 5, true), stall(30, true));
        assert_eq!(observe(at(31), 6, true), None, "moves again");
        assert_eq!(observe(at(40), 6, true), None);
        assert_eq!(observe(at(41), 6, true), stall(10, false));
        // An idle session is no stall, however long.
        assert_eq!(observe(at(42), 7, false), None);
        assert_eq!(observe(at(99), 7, false), None);
        assert_eq!(observe(at(108), 7, true), None, "counts from the end of idleness");
        assert_eq!(observe(at(109), 7, true), stall(10, false));
    }

    #[test]
    fn what_is_too_long_follows_from_what_steps_take() {
        let dog = Watchdog::new(WatchdogOptions::default());
        let is_enough =
            [(0, 60_000), (1, 10_000), (2_000, 10_000), (2_001, 10_005), (11_000, 55_000), (20_000, 60_000)];
        for (step_ms, stall_ms) in is_enough {
            assert_eq!(dog.stall_after(Duration::from_millis(step_ms)), Duration::from_millis(stall_ms));
        }
        let told = WatchdogOptions { stall_after: Duration::from_secs(3), ..WatchdogOptions::default() };
        assert_eq!(Watchdog::new(told).stall_after(Duration::from_secs(1)), Duration::from_secs(3));
    }
}
