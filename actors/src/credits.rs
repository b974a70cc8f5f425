//! How many slots registers need for a pipeline to run at full speed. Pure arithmetic.

/// Slots of the stash of stage `stage` of `stages` in one-forward-one-backward: the least with which every stage is busy all
/// the time in the steady state. Durations are in the same unit.
///
/// Every stage repeats a period `T = forward + backward`. Between two neighbours a micro-batch travels forward for
/// `forward + hop` and comes back for `backward + hop`, and each delay is a fixed phase modulo `T`; the two phases cancel, so
/// the round trip is the least multiple of `T` that is not below `T + 2 hop`. A slot is held for the sum of the
/// round trips below the stage and one period more:
/// `1 + (stages - 1 - stage) * (1 + ceil(2 hop / T))`.
/// Without latency this is the well-known `stages - stage`; with any up to `T/2` it is `2 (stages - stage) - 1`.
///
/// Never more than `micro_batches`, nor less than 1.
pub fn pipeline(stages: u32, stage: u32, micro_batches: u32, forward: u64, backward: u64, hop: u64) -> u32 {
    let period = (forward + backward).max(1);
    let below = u64::from(stages.saturating_sub(stage + 1));
    let credits = 1 + below * (1 + (2 * hop).div_ceil(period));
    credits.min(u64::from(micro_batches)).max(1) as u32
}

/// Slots of the registers between a stage and the next, activation and gradient alike, given the slots of the earlier
/// stage's stash: as many.
///
/// That never costs time: a micro-batch that holds a slot of either register also holds one of the earlier stage's stash, or
/// its release is under way and arrives before any micro-batch that takes its place in the stash can reach the register.
pub fn boundary_slots(stash_slots: u32) -> u32 {
    stash_slots
}
