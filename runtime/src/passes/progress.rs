//! Reports which part of a slow compilation runs.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Receives the time since the start of the compilation, and the name of the running part.
pub type OnSlow = fn(Duration, &'static str);

/// The name of the running part.
pub type RunningPart = Mutex<&'static str>;

/// Runs `work`, which sets the name of its running part. Calls `on_slow` after each `interval` until `work` ends.
pub fn report<T>(
    on_slow: Option<impl Fn(Duration, &'static str) + Send>,
    interval: Duration,
    work: impl FnOnce(&RunningPart) -> T,
) -> T {
    let (part, begin) = (&RunningPart::default(), Instant::now());
    let Some(on_slow) = on_slow else { return work(part) };
    let (working, ended) = channel::<()>();
    let wait = move || {
        // The sender is dropped when `work` ends, also by a panic.
        while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
            let name = *part.lock();
            on_slow(begin.elapsed(), name);
        }
    };
    thread::scope(|scope| {
        let _working = working;
        // If the system allows no more threads, the compilation runs without reports.
        let _ = thread::Builder::new().spawn_scoped(scope, wait);
        work(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_part_is_reported_until_the_work_ends() {
        let (reported, reports) = channel();
        let on_slow = move |took, part| _ = reported.send((took, part));
        let result = report(Some(on_slow), Duration::from_millis(1), |running| {
            for part in ["layouts", "checks"] {
                *running.lock() = part;
                while reports.recv().unwrap().1 != part {}
            }
            7
        });
        assert_eq!(result, 7);
        // The reporting thread has ended, so no report comes any more.
        while reports.recv().is_ok() {}
        // Fast work is not reported.
        let on_slow = |_, part| panic!("reported {part}");
        assert_eq!(report(Some(on_slow), Duration::from_secs(3600), |_| 7), 7);
        assert_eq!(report(None::<OnSlow>, Duration::ZERO, |_| 7), 7);
    }
}
