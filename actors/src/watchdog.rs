//! Detects sessions that make no progress although work is left, and reports what each actor waits for.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::error::Failure;
use crate::slow::Tally;
use crate::supervisor::Session;

/// Receives a report on the checking thread. Must not call [`crate::shell::RunningSession::check_progress`].
pub type OnStall = Arc<dyn Fn(&str) + Send + Sync>;

/// Options of the watchdog.
#[derive(Clone)]
pub struct WatchdogOptions {
    /// Time without progress, with firings outstanding, after which the session counts as stalled. The time must exceed
    /// that of the longest firing, since kernels in flight show no progress. Once the step time is known
    /// ([`crate::shell::Control::set_step_p99`]), the limit is five step times, at least 10 s and at most this value.
    pub stall_after: Duration,
    /// Interval of checks. With `None`, the host calls [`crate::shell::RunningSession::check_progress`].
    pub check_every: Option<Duration>,
    /// Time without progress after which the session fails with [`Failure::Stalled`]. The time must exceed that of any
    /// firing. `None` means no limit.
    pub abort_after: Option<Duration>,
    /// Receives stall reports, in addition to the log.
    pub on_stall: Option<OnStall>,
    /// Receives a line about each slow process, in addition to the log. A process is slow if, in 8 of the last 10
    /// checks, all streams of this process were idle and waited for the slow one. The line is repeated every 60 checks.
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

/// Stands for "no limit". The value is small enough that adding it to an `Instant` does not overflow.
const NO_LIMIT: Duration = Duration::from_secs(1 << 30);

impl WatchdogOptions {
    /// The timeout of a wait for live processes: [`WatchdogOptions::abort_after`]. A dead process ends a wait sooner.
    pub fn wait_max(&self) -> Duration {
        self.abort_after.unwrap_or(NO_LIMIT).min(NO_LIMIT)
    }
}

impl fmt::Debug for WatchdogOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stall_after, check_every, abort_after, .. } = self;
        write!(f, "WatchdogOptions {{ {stall_after:?}, {check_every:?}, abort_after: {abort_after:?} }}")
    }
}

/// Minimum duration of a stall, as a number of steps and as a time. Both limits apply.
const STALL_STEPS: u32 = 5;
const STALL_MIN: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stall {
    idle: Duration,
    aborts: bool,
    /// True if this stall was not reported before.
    is_new: bool,
}

/// The watchdog's state. The caller supplies the time.
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

    fn stall_after(&self, step_p99: Duration) -> Duration {
        let by_steps =
            if step_p99.is_zero() { Duration::MAX } else { step_p99.saturating_mul(STALL_STEPS).max(STALL_MIN) };
        by_steps.min(self.options.stall_after)
    }

    /// Returns a stall when it is first detected. From the abort time on, returns the stall at every check.
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

    /// Runs one check; `now` counts from the session's start. Returns the report of a new stall or of an abort.
    pub(crate) fn check(&mut self, now: Duration, session: &Session) -> Option<String> {
        if session.has_peers() && session.steps.outstanding() {
            for text in self.tally.add(session.waits()) {
                tracing::warn!("{text}");
                self.options.on_slow.iter().for_each(|callback| callback(&text));
            }
        }
        let step_p99 = Duration::from_nanos(session.hints.step_p99_ns.load(Ordering::Relaxed));
        let Stall { idle, aborts, is_new } =
            self.observe(now, session.activity.events(), session.steps.outstanding(), step_p99)?;
        if session.first_failure().is_some() {
            return None;
        }
        let (hang, report) = session.explain();
        let cause = hang.as_ref().map_or_else(|| "the cause is unknown".to_owned(), ToString::to_string);
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_can_be_added_to_an_instant() {
        for abort_after in [None, Some(Duration::MAX), Some(Duration::from_secs(i64::MAX as u64))] {
            let options = WatchdogOptions { abort_after, ..WatchdogOptions::default() };
            assert!(std::time::Instant::now().checked_add(options.wait_max()).is_some(), "{abort_after:?}");
        }
        let watchdog = Watchdog::new(WatchdogOptions { stall_after: Duration::MAX, ..WatchdogOptions::default() });
        assert_eq!(watchdog.stall_after(Duration::MAX), Duration::MAX);
    }

    #[test]
    fn outstanding_work_without_progress_is_one_stall() {
        let at = Duration::from_secs;
        let options = WatchdogOptions { stall_after: at(10), abort_after: Some(at(25)), ..WatchdogOptions::default() };
        let mut watchdog = Watchdog::new(options);
        let mut observe = |now, progress, outstanding| watchdog.observe(now, progress, outstanding, Duration::ZERO);
        let stall = |idle, aborts| Some(Stall { idle: at(idle), aborts, is_new: !aborts });
        assert_eq!(observe(at(0), 5, true), None);
        assert_eq!(observe(at(9), 5, true), None);
        assert_eq!(observe(at(10), 5, true), stall(10, false));
        assert_eq!(observe(at(24), 5, true), None, "a stall is reported once");
        assert_eq!(observe(at(30), 5, true), stall(30, true));
        assert_eq!(observe(at(31), 6, true), None, "progress ends the stall");
        assert_eq!(observe(at(40), 6, true), None);
        assert_eq!(observe(at(41), 6, true), stall(10, false));
        // A session without outstanding work never stalls.
        assert_eq!(observe(at(42), 7, false), None);
        assert_eq!(observe(at(99), 7, false), None);
        assert_eq!(observe(at(108), 7, true), None, "the time counts from the start of the work");
        assert_eq!(observe(at(109), 7, true), stall(10, false));
    }

    #[test]
    fn the_stall_time_follows_from_the_step_time() {
        let watchdog = Watchdog::new(WatchdogOptions::default());
        let cases = [(0, 60_000), (1, 10_000), (2_000, 10_000), (2_001, 10_005), (11_000, 55_000), (20_000, 60_000)];
        for (step_ms, stall_ms) in cases {
            assert_eq!(watchdog.stall_after(Duration::from_millis(step_ms)), Duration::from_millis(stall_ms));
        }
        let shorter = WatchdogOptions { stall_after: Duration::from_secs(3), ..WatchdogOptions::default() };
        assert_eq!(Watchdog::new(shorter).stall_after(Duration::from_secs(1)), Duration::from_secs(3));
    }
}
