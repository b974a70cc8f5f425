//! What this crate tells on the `metrics` facade: names, labels and meaning are public API. Until a program installs a recorder
//! it costs a few nanoseconds for each number; [`crate::watch::Watch`] installs one and serves it to Prometheus.
//!
//! | metric | kind | labels | meaning |
//! |---|---|---|---|
//! | `shardflow_build_info` | gauge | `version`, `mesh`, `device`, `process` | 1 |
//! | `shardflow_steps_total` | counter | | steps done |
//! | `shardflow_step` | gauge | | the step that the training has come to, those before a checkpoint that was loaded among them |
//! | `shardflow_start_timestamp_seconds` | gauge | | when the session began, Unix time |
//! | `shardflow_steps_non_finite_total` | counter | | steps whose loss or gradients were not finite: nothing was updated |
//! | `shardflow_tokens_total` | counter | | tokens of these steps, of all processes together |
//! | `shardflow_step_duration_seconds` | histogram | | wall time of a step |
//! | `shardflow_loss` | gauge | | loss of the last step |
//! | `shardflow_gradient_norm` | gauge | | global norm of the last step's gradients, before clipping |
//! | `shardflow_learning_rate` | gauge | | of the last step |
//! | `shardflow_step_flops` | gauge | | operations of a step's products and attention, of all devices together ([`crate::plan::flops`]) |
//! | `shardflow_mfu_ratio` | gauge | | `step_flops` over the last step's time and the devices' peak, where that was given |
//! | `shardflow_training_ratio` | gauge | | time in steps that made the model what it is, over all time: of the job, over its restarts, under `shardflow launch`, else of the session. What a restart or a rollback throws away is not counted in steps |
//! | `shardflow_actor_firing_seconds` | histogram | `actor`, `action` | a firing from its launch to its end: its sum is how long the actor was busy, collectives among it |
//! | `shardflow_actor_wait_seconds` | histogram | `actor`, `reason`, `register` | how long an actor stood idle before a firing, by what it waited for last: `input` or `credit` of a register, `host`, `own` |
//! | `shardflow_firings_lost_total` | counter | | firings that no sample has seen: those of more than 4096 of an actor between two |
//! | `shardflow_register_slots` | gauge | `register`, `state` | slots that are `free`, being written (`writing`), or `filled` and not released by all readers |
//! | `shardflow_edge_bytes_total` | counter | `from`, `to`, `transport` | bytes of registers' pieces that an actor has released of another's: over `device`, `process`, `shared_memory`, `socket` or `nccl` |
//! | `shardflow_collective_bytes_total` | counter | `device` | bytes that collectives brought in from other devices |
//! | `shardflow_memory_bytes` | gauge | `device`, `kind` | `planned` peak, `allocated` now, `peak` in use |
//! | `shardflow_checkpoints_total` | counter | `outcome` | saves that were `committed`, or `failed` |
//! | `shardflow_checkpoint_duration_seconds` | histogram | | of a save, from the snapshot's end to the outcome |
//! | `shardflow_checkpoint_last_success_timestamp_seconds` | gauge | | when the last one was committed, Unix time |
//! | `shardflow_restarts_total` | counter | `cause` | restarts of the job before this session, by the exit code that caused them |
//! | `shardflow_stalls_total` | counter | | times that nothing moved for too long |
//! | `shardflow_refused_total` | counter | `reason` | datagrams and letters of others that were refused |
//!
//! `shardflow_collective_seconds` (`actor`, `kind`) is [`shardflow_kernels::metrics`]'s: of the time that an actor is busy, what it is
//! held up by collectives.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use shardflow_kernels::metrics::COLLECTIVE_SECONDS;

/// See the module.
pub const BUILD_INFO: &str = "shardflow_build_info";
/// See the module.
pub const STEPS: &str = "shardflow_steps_total";
/// See the module.
pub const STEP: &str = "shardflow_step";
/// See the module.
pub const START: &str = "shardflow_start_timestamp_seconds";
/// See the module.
pub const STEPS_NON_FINITE: &str = "shardflow_steps_non_finite_total";
/// See the module.
pub const TOKENS: &str = "shardflow_tokens_total";
/// See the module.
pub const STEP_DURATION: &str = "shardflow_step_duration_seconds";
/// See the module.
pub const LOSS: &str = "shardflow_loss";
/// See the module.
pub const GRADIENT_NORM: &str = "shardflow_gradient_norm";
/// See the module.
pub const LEARNING_RATE: &str = "shardflow_learning_rate";
/// See the module.
pub const STEP_FLOPS: &str = "shardflow_step_flops";
/// See the module.
pub const MFU: &str = "shardflow_mfu_ratio";
/// See the module.
pub const TRAINING_RATIO: &str = "shardflow_training_ratio";
/// See the module.
pub const FIRING: &str = "shardflow_actor_firing_seconds";
/// See the module.
pub const WAIT: &str = "shardflow_actor_wait_seconds";
/// See the module.
pub const FIRINGS_LOST: &str = "shardflow_firings_lost_total";
/// See the module.
pub const SLOTS: &str = "shardflow_register_slots";
/// See the module.
pub const EDGE_BYTES: &str = "shardflow_edge_bytes_total";
/// See the module.
pub const COLLECTIVE_BYTES: &str = "shardflow_collective_bytes_total";
/// See the module.
pub const MEMORY: &str = "shardflow_memory_bytes";
/// See the module.
pub const CHECKPOINTS: &str = "shardflow_checkpoints_total";
/// See the module.
pub const CHECKPOINT_DURATION: &str = "shardflow_checkpoint_duration_seconds";
/// See the module.
pub const CHECKPOINT_LAST_SUCCESS: &str = "shardflow_checkpoint_last_success_timestamp_seconds";
/// See the module.
pub const RESTARTS: &str = "shardflow_restarts_total";
/// See the module.
pub const STALLS: &str = "shardflow_stalls_total";
/// See the module.
pub const REFUSED: &str = "shardflow_refused_total";

/// Upper bounds of the buckets of what takes a step, or a checkpoint.
const LONG_SECONDS: &[f64] = &[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0];
/// The same of firings, waits and collectives, of which there are many series.
const SHORT_SECONDS: &[f64] = &[0.0001, 0.001, 0.01, 0.1, 1.0];

/// The histograms, with the upper bounds of their buckets in seconds.
pub const BUCKETS: &[(&str, &[f64])] = &[
    (STEP_DURATION, LONG_SECONDS),
    (CHECKPOINT_DURATION, LONG_SECONDS),
    (FIRING, SHORT_SECONDS),
    (WAIT, SHORT_SECONDS),
    (COLLECTIVE_SECONDS, SHORT_SECONDS),
];

/// Gives the recorder that is installed the meaning of each metric. To be called once, after that.
pub fn describe() {
    describe_gauge!(BUILD_INFO, "What runs: always 1.");
    describe_counter!(STEPS, "Steps done.");
    describe_gauge!(STEP, "The step that the training has come to.");
    describe_gauge!(START, Unit::Seconds, "When the session began, Unix time.");
    describe_counter!(STEPS_NON_FINITE, "Steps whose loss or gradients were not finite.");
    describe_counter!(TOKENS, "Tokens trained on, by all processes together.");
    describe_histogram!(STEP_DURATION, Unit::Seconds, "Wall time of a step.");
    describe_gauge!(LOSS, "Loss of the last step.");
    describe_gauge!(GRADIENT_NORM, "Global norm of the last step's gradients, before clipping.");
    describe_gauge!(LEARNING_RATE, "Learning rate of the last step.");
    describe_gauge!(STEP_FLOPS, "Operations of a step's products and attention, of all devices together.");
    describe_gauge!(MFU, "Model FLOPs utilisation of the last step.");
    describe_gauge!(TRAINING_RATIO, "Time in steps that made the model what it is, over all time of the job.");
    describe_histogram!(FIRING, Unit::Seconds, "A firing from its launch to its end.");
    describe_histogram!(
        WAIT,
        Unit::Seconds,
        "How long an actor stood idle before a firing, by what it waited for last."
    );
    describe_counter!(FIRINGS_LOST, "Firings that no sample has seen.");
    describe_gauge!(SLOTS, "Slots of a register by state.");
    describe_counter!(EDGE_BYTES, "Bytes of registers' pieces that an actor has released of another's.");
    describe_counter!(COLLECTIVE_BYTES, "Bytes that collectives brought in from other devices.");
    describe_gauge!(MEMORY, Unit::Bytes, "A device's memory.");
    describe_counter!(CHECKPOINTS, "Saves by outcome.");
    describe_histogram!(CHECKPOINT_DURATION, Unit::Seconds, "Time of a save.");
    describe_gauge!(CHECKPOINT_LAST_SUCCESS, Unit::Seconds, "When the last checkpoint was committed, Unix time.");
    describe_counter!(RESTARTS, "Restarts of the job before this session, by exit code.");
    describe_counter!(STALLS, "Times that nothing moved for too long.");
    describe_counter!(REFUSED, "Datagrams and letters of others that were refused.");
    describe_histogram!(
        COLLECTIVE_SECONDS,
        Unit::Seconds,
        "In a collective: waiting for the other members, and moving bytes."
    );
}
