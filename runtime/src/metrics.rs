//! Metrics that this crate publishes through the `metrics` facade: names, labels and meaning are public API. Without a
//! recorder, each value costs a few nanoseconds; [`crate::watch::Watch`] installs a recorder and serves it to
//! Prometheus.
//!
//! | metric | kind | labels | meaning |
//! |---|---|---|---|
//! | `shardflow_build_info` | gauge | `version`, `mesh`, `device`, `process` | 1 |
//! | `shardflow_steps_total` | counter | | steps done |
//! | `shardflow_step` | gauge | | current step of the training, including steps before a loaded checkpoint |
//! | `shardflow_start_timestamp_seconds` | gauge | | start of the session, Unix time |
//! | `shardflow_steps_non_finite_total` | counter | | steps with an Inf or NaN loss or gradient, which updated nothing |
//! | `shardflow_tokens_total` | counter | | tokens trained on, over all processes |
//! | `shardflow_step_duration_seconds` | histogram | | wall time of a step |
//! | `shardflow_loss` | gauge | | loss of the last step |
//! | `shardflow_gradient_norm` | gauge | | global norm of the last step's gradients, before clipping |
//! | `shardflow_learning_rate` | gauge | | learning rate of the last step |
//! | `shardflow_step_flops` | gauge | | operations of a step's matrix products and attention, over all devices ([`crate::plan::flops`]) |
//! | `shardflow_mfu_ratio` | gauge | | `step_flops` divided by the last step's time and the devices' peak, if the peak is known |
//! | `shardflow_training_ratio` | gauge | | time in steps whose updates are part of the model, divided by the total time of the job with its restarts (under `shardflow launch`) or of the session. Steps lost by a restart or a rollback do not count |
//! | `shardflow_actor_firing_seconds` | histogram | `actor`, `action` | time from a firing's launch to its end; the sum is the actor's busy time, including collectives |
//! | `shardflow_actor_wait_seconds` | histogram | `actor`, `reason`, `register` | idle time of an actor before a firing, by the condition that became true last: `input` or `credit` of a register, `host`, `own` |
//! | `shardflow_firings_lost_total` | counter | | firings that no sample has read, because an actor fired more than 4096 times between two samples |
//! | `shardflow_register_slots` | gauge | `register`, `state` | slots that are `free`, being written (`writing`), or `filled` and not released by all readers |
//! | `shardflow_edge_bytes_total` | counter | `from`, `to`, `transport` | bytes of another actor's register pieces that an actor has released; transport is `device`, `process`, `shared_memory`, `socket` or `nccl` |
//! | `shardflow_collective_bytes_total` | counter | `device` | bytes that collectives received from other devices |
//! | `shardflow_memory_bytes` | gauge | `device`, `kind` | `planned` peak, `allocated` now, `peak` in use |
//! | `shardflow_checkpoints_total` | counter | `outcome` | saves that were `committed`, or `failed` |
//! | `shardflow_checkpoint_duration_seconds` | histogram | | time of a save, from the complete snapshot to the outcome |
//! | `shardflow_checkpoint_last_success_timestamp_seconds` | gauge | | time of the last committed save, Unix time |
//! | `shardflow_restarts_total` | counter | `cause` | restarts of the job before this session, by the exit code that caused them |
//! | `shardflow_stalls_total` | counter | | stalls: periods without progress that exceeded the limit |
//! | `shardflow_refused_total` | counter | `reason` | messages refused because they do not belong to this job or attempt |
//!
//! [`shardflow_kernels::metrics`] publishes `shardflow_collective_seconds` (`actor`, `kind`): the part of an actor's
//! busy time that it spends in collectives.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use shardflow_kernels::metrics::COLLECTIVE_SECONDS;

/// Labels describe the session; the value is 1.
pub const BUILD_INFO: &str = "shardflow_build_info";
/// Steps done.
pub const STEPS: &str = "shardflow_steps_total";
/// Current step of the training.
pub const STEP: &str = "shardflow_step";
/// Start of the session, Unix time.
pub const START: &str = "shardflow_start_timestamp_seconds";
/// Steps with an Inf or NaN loss or gradient.
pub const STEPS_NON_FINITE: &str = "shardflow_steps_non_finite_total";
/// Tokens trained on.
pub const TOKENS: &str = "shardflow_tokens_total";
/// Wall time of a step.
pub const STEP_DURATION: &str = "shardflow_step_duration_seconds";
/// Loss of the last step.
pub const LOSS: &str = "shardflow_loss";
/// Gradient norm of the last step.
pub const GRADIENT_NORM: &str = "shardflow_gradient_norm";
/// Learning rate of the last step.
pub const LEARNING_RATE: &str = "shardflow_learning_rate";
/// Operations of a step.
pub const STEP_FLOPS: &str = "shardflow_step_flops";
/// Model FLOPs utilization of the last step.
pub const MFU: &str = "shardflow_mfu_ratio";
/// Share of time in productive steps.
pub const TRAINING_RATIO: &str = "shardflow_training_ratio";
/// Duration of a firing.
pub const FIRING: &str = "shardflow_actor_firing_seconds";
/// Idle time before a firing.
pub const WAIT: &str = "shardflow_actor_wait_seconds";
/// Firings that no sample has read.
pub const FIRINGS_LOST: &str = "shardflow_firings_lost_total";
/// Slots of a register by state.
pub const SLOTS: &str = "shardflow_register_slots";
/// Bytes that crossed from one actor to another.
pub const EDGE_BYTES: &str = "shardflow_edge_bytes_total";
/// Bytes that collectives received.
pub const COLLECTIVE_BYTES: &str = "shardflow_collective_bytes_total";
/// Memory of a device.
pub const MEMORY: &str = "shardflow_memory_bytes";
/// Saves by outcome.
pub const CHECKPOINTS: &str = "shardflow_checkpoints_total";
/// Duration of a save.
pub const CHECKPOINT_DURATION: &str = "shardflow_checkpoint_duration_seconds";
/// Time of the last committed save, Unix time.
pub const CHECKPOINT_LAST_SUCCESS: &str = "shardflow_checkpoint_last_success_timestamp_seconds";
/// Restarts of the job by exit code.
pub const RESTARTS: &str = "shardflow_restarts_total";
/// Stalls.
pub const STALLS: &str = "shardflow_stalls_total";
/// Refused messages by reason.
pub const REFUSED: &str = "shardflow_refused_total";

/// Upper bounds of the buckets for durations of steps and checkpoints.
const LONG_SECONDS: &[f64] = &[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0];
/// Upper bounds of the buckets for firings, waits and collectives; only five, because these metrics have many series.
const SHORT_SECONDS: &[f64] = &[0.0001, 0.001, 0.01, 0.1, 1.0];

/// All histograms, with the upper bounds of their buckets in seconds.
pub const BUCKETS: &[(&str, &[f64])] = &[
    (STEP_DURATION, LONG_SECONDS),
    (CHECKPOINT_DURATION, LONG_SECONDS),
    (FIRING, SHORT_SECONDS),
    (WAIT, SHORT_SECONDS),
    (COLLECTIVE_SECONDS, SHORT_SECONDS),
];

/// Describes each metric to the recorder. Call it once, after installing the recorder.
pub fn describe() {
    describe_gauge!(BUILD_INFO, "Version, mesh, device and process of the session; always 1.");
    describe_counter!(STEPS, "Steps done.");
    describe_gauge!(STEP, "Current step of the training, including steps before a loaded checkpoint.");
    describe_gauge!(START, Unit::Seconds, "Start of the session, Unix time.");
    describe_counter!(STEPS_NON_FINITE, "Steps with an Inf or NaN loss or gradient.");
    describe_counter!(TOKENS, "Tokens trained on, over all processes.");
    describe_histogram!(STEP_DURATION, Unit::Seconds, "Wall time of a step.");
    describe_gauge!(LOSS, "Loss of the last step.");
    describe_gauge!(GRADIENT_NORM, "Global norm of the last step's gradients, before clipping.");
    describe_gauge!(LEARNING_RATE, "Learning rate of the last step.");
    describe_gauge!(STEP_FLOPS, "Operations of a step's matrix products and attention, over all devices.");
    describe_gauge!(MFU, "Model FLOPs utilization of the last step.");
    describe_gauge!(TRAINING_RATIO, "Time in steps that are part of the model, divided by the job's total time.");
    describe_histogram!(FIRING, Unit::Seconds, "Time from a firing's launch to its end.");
    describe_histogram!(
        WAIT,
        Unit::Seconds,
        "Idle time of an actor before a firing, by the condition that became true last."
    );
    describe_counter!(FIRINGS_LOST, "Firings that no sample has read.");
    describe_gauge!(SLOTS, "Slots of a register by state.");
    describe_counter!(EDGE_BYTES, "Bytes of another actor's register pieces that an actor has released.");
    describe_counter!(COLLECTIVE_BYTES, "Bytes that collectives received from other devices.");
    describe_gauge!(MEMORY, Unit::Bytes, "A device's memory.");
    describe_counter!(CHECKPOINTS, "Saves by outcome.");
    describe_histogram!(CHECKPOINT_DURATION, Unit::Seconds, "Time of a save.");
    describe_gauge!(CHECKPOINT_LAST_SUCCESS, Unit::Seconds, "Time of the last committed checkpoint, Unix time.");
    describe_counter!(RESTARTS, "Restarts of the job before this session, by exit code.");
    describe_counter!(STALLS, "Periods without progress that exceeded the limit.");
    describe_counter!(REFUSED, "Messages refused because they do not belong to this job or attempt.");
    describe_histogram!(
        COLLECTIVE_SECONDS,
        Unit::Seconds,
        "Time in a collective: waiting for the other members, and transferring bytes."
    );
}
