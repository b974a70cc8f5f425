//! A typed snapshot of a running session. Imports `session` and the actors' shell.

use super::Session;

/// One device's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMetrics {
    /// Rank in the mesh.
    pub device: usize,
    /// What the plan says is the most that is in use at once, bytes.
    pub planned_peak_bytes: usize,
    /// What was in use at once so far: fixed tensors, scratch, and the most slots of each register held at one time, bytes.
    pub measured_peak_bytes: usize,
    /// Bytes in arenas.
    pub allocated_bytes: usize,
    /// Arenas made so far; does not grow after the start.
    pub allocations: usize,
    /// Bytes that collectives brought in from other devices.
    pub collective_bytes: u64,
}

/// One actor's work.
#[derive(Clone, Debug, PartialEq)]
pub struct ActorMetrics {
    /// As in the plan.
    pub name: String,
    /// Seconds in which a launch was in flight.
    pub busy_seconds: f64,
    /// Actions done.
    pub firings: u64,
    /// What it waits for, as text; empty while it works.
    pub waiting: String,
}

/// One register's slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterMetrics {
    /// As in the plan.
    pub name: String,
    /// Slots that it has.
    pub slots: u32,
    /// The most that were in use at once.
    pub slots_peak: u32,
    /// Bytes of one slot.
    pub slot_bytes: usize,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq)]
pub struct Metrics {
    /// Steps done.
    pub steps: u64,
    /// By rank.
    pub devices: Vec<DeviceMetrics>,
    /// In the plan's order.
    pub actors: Vec<ActorMetrics>,
    /// In the plan's order.
    pub registers: Vec<RegisterMetrics>,
}
