//! Timing and medians for benchmarks.

use std::time::Instant;

/// Runs `work`, and returns the seconds that it took.
pub fn timed(work: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    work();
    begin.elapsed().as_secs_f64()
}

/// Returns the median, or `None` if there are no values. For an even number of values, this is the upper median.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
