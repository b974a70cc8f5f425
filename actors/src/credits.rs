//! Computes the number of register slots that a pipeline needs to run at full speed.

/// Returns the smallest number of stash slots that stage `stage` of `stages` needs so that every stage stays busy in
/// the steady state of one-forward-one-backward. The result is in `1..=micro_batches`. All durations share one unit.
///
/// A micro-batch holds a slot from the start of its forward to the end of its backward. Every stage alternates forwards
/// and backwards without gaps, with the period `T = forward + backward`, so this time is a multiple of `T`. On the last
/// stage, it is `T`. On each earlier stage, it exceeds that of the next stage by `forward + hop + backward + hop`,
/// rounded up to a multiple of `T`. A stage needs one slot per `T`: `1 + (stages - 1 - stage) * (1 + ceil(2 hop / T))`.
/// Without latency, this is the well-known `stages - stage`. For `0 < hop <= T/2`, it is `2 (stages - stage) - 1`.
pub fn pipeline(stages: u32, stage: u32, micro_batches: u32, forward: u64, backward: u64, hop: u64) -> u32 {
    let period = (forward + backward).max(1);
    let below = u64::from(stages.saturating_sub(stage + 1));
    let credits = 1 + below * (1 + (2 * hop).div_ceil(period));
    credits.min(u64::from(micro_batches)).max(1) as u32
}
