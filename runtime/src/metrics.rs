//! Metrics that this crate publishes through the `metrics` facade. Names, labels and meanings are public API. Without a
//! recorder, recording a value takes nanoseconds. [`crate::watch::Watch`] installs a recorder and serves its values to
//! Prometheus.
//!
//! [`shardflow_kernels::metrics`] publishes `shardflow_collective_seconds`: an actor's busy time in collectives.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use shardflow_kernels::metrics::COLLECTIVE_SECONDS;

/// Defines the names of metrics, and [`describe`].
macro_rules! define {
    ($($(#[$more:meta])* $describe:ident $name:ident = $text:literal $(, $unit:ident)?, $help:literal;)*) => {
        $(#[doc = $help]
        $(#[$more])*
        pub const $name: &str = $text;)*

        /// Describes each metric to the recorder. Call it once, after installing the recorder.
        pub fn describe() {
            $($describe!($name $(, Unit::$unit)?, $help);)*
            const COLLECTIVE_HELP: &str = "Time in a collective: waiting for the other members, and transferring bytes.";
            describe_histogram!(COLLECTIVE_SECONDS, Unit::Seconds, COLLECTIVE_HELP);
        }
    };
}

define! {
    describe_gauge BUILD_INFO = "shardflow_build_info", "Version, mesh, device and process of the session; always 1.";
    describe_counter STEPS = "shardflow_steps_total", "Completed steps.";
    describe_gauge STEP = "shardflow_step", "Current step of the training, including steps before a loaded checkpoint.";
    describe_gauge START = "shardflow_start_timestamp_seconds", Seconds, "Unix time of the session's start.";
    describe_counter STEPS_NON_FINITE = "shardflow_steps_non_finite_total", "Steps with an Inf or NaN loss or gradient.";
    describe_counter TOKENS = "shardflow_tokens_total", "Tokens that the model was trained on, over all processes.";
    describe_histogram STEP_DURATION = "shardflow_step_duration_seconds", Seconds, "Wall time of a step.";
    describe_gauge LOSS = "shardflow_loss", "Loss of the last step.";
    describe_gauge GRADIENT_NORM = "shardflow_gradient_norm", "Global norm of the last step's gradients, before clipping.";
    describe_gauge LEARNING_RATE = "shardflow_learning_rate", "Learning rate of the last step.";
    describe_gauge STEP_FLOPS = "shardflow_step_flops", "Operations of a step's matrix products and attention, over all devices.";
    /// `step_flops` divided by the last step's time and the devices' peak, if the peak is known.
    describe_gauge MFU = "shardflow_mfu_ratio", "Model FLOPs utilization of the last step.";
    /// Under `shardflow launch`, the ratio covers the job with its restarts; otherwise it covers only the session. Lost
    /// steps do not count.
    describe_gauge TRAINING_RATIO = "shardflow_training_ratio", "Time in steps whose updates the model contains, divided by the job's total time.";
    /// Labels: `actor` and `action`. The sum is the actor's busy time, including collectives.
    describe_histogram FIRING = "shardflow_actor_firing_seconds", Seconds, "Time from a firing's launch to its end.";
    /// Labels: `actor` and `reason` (`input`, `credit`, `host` or `own`). For `input` and `credit`, also `register`.
    describe_histogram WAIT = "shardflow_actor_wait_seconds", Seconds, "Idle time of an actor before a firing, by the condition that became true last.";
    /// Increases if an actor fires more than 4096 times between two samples.
    describe_counter FIRINGS_LOST = "shardflow_firings_lost_total", "Firings that no sample has read.";
    /// Labels: `register` and `state`, which is `free`, `writing` or `filled` (not yet released by all readers).
    describe_gauge SLOTS = "shardflow_register_slots", "Slots of a register by state.";
    /// Labels: `from`, `to` and `transport` (`device`, `process`, `shared_memory`, `socket` or `nccl`).
    describe_counter EDGE_BYTES = "shardflow_edge_bytes_total", "Bytes of the pieces that an actor has read from another actor and released.";
    /// Label: `device`.
    describe_counter COLLECTIVE_BYTES = "shardflow_collective_bytes_total", "Bytes that collectives received from other devices.";
    /// Labels: `device` and `kind`: `planned` (planned peak), `allocated` (allocated now) or `peak` (peak in use).
    describe_gauge MEMORY = "shardflow_memory_bytes", Bytes, "A device's memory.";
    /// Label: `outcome` (`committed` or `failed`).
    describe_counter CHECKPOINTS = "shardflow_checkpoints_total", "Saves by outcome.";
    /// Measured from the complete snapshot to the outcome.
    describe_histogram CHECKPOINT_DURATION = "shardflow_checkpoint_duration_seconds", Seconds, "Time of a save.";
    describe_gauge CHECKPOINT_LAST_SUCCESS = "shardflow_checkpoint_last_success_timestamp_seconds", Seconds, "Unix time of the last committed checkpoint.";
    /// Label: `cause`, which is the exit code.
    describe_counter RESTARTS = "shardflow_restarts_total", "Restarts of the job before this session, by exit code.";
    describe_counter STALLS = "shardflow_stalls_total", "Periods without progress that exceeded the limit.";
    /// Label: `reason`.
    describe_counter REFUSED = "shardflow_refused_total", "Messages refused because they do not belong to this job or attempt.";
}

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
