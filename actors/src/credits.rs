//! The number of register slots that a pipeline needs to run at full speed. Pure arithmetic.

/// Returns the smallest number of stash slots of stage `stage` of `stages` with which every stage stays busy in the
/// steady state of one-forward-one-backward: at least 1, at most `micro_batches`. Durations have the same unit.
///
/// Every stage repeats a period `T = forward + backward`. Between two neighbours a micro-batch takes `forward + hop` on
/// the way forward and `backward + hop` on the way back. Each delay is a fixed phase modulo `T`, and the two phases
/// cancel, so the round trip is the smallest multiple of `T` that is at least `T + 2 hop`. A slot is held for the sum
/// of the round trips below the stage plus one period: `1 + (stages - 1 - stage) * (1 + ceil(2 hop / T))`. Without
/// latency this is the well-known `stages - stage`; for `0 < hop <= T/2` it is `2 (stages - stage) - 1`.
pub fn pipeline(stages: u32, stage: u32, micro_batches: u32, forward: u64, backward: u64, hop: u64) -> u32 {
    let period = (forward + backward).max(1);
    let below = u64::from(stages.saturating_sub(stage + 1));
    let credits = 1 + below * (1 + (2 * hop).div_ceil(period));
    credits.min(u64::from(micro_batches)).max(1) as u32
}
