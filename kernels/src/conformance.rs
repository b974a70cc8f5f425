//! The conformance suite that every backend must pass: [`run`] returns no failures. The suite compares each op with a
//! simple f64 reference on irregular sizes, in memory that is filled with NaN and surrounded by canaries.

use std::sync::Arc;

use crate::collective::Group;
use crate::device::Device;

mod collectives;
mod harness;
mod odd;
mod ops;
mod reference;
mod streams;

use collectives::EngineRequirements;
pub use collectives::{Make, SummationOrder};
pub use harness::ConformanceFailure;
use harness::Report;

/// Runs the whole suite. `make(n)` creates n devices with ranks `0..n` that share one new collective engine.
pub fn run(make: &dyn Fn(usize) -> Vec<Device>) -> Vec<ConformanceFailure> {
    let with_arena = |device: Device| device.arena(collectives::ARENA_BYTES).map(|arena| (device, arena));
    let mut failures = make(1).first().map_or(Vec::new(), run_alone);
    failures.extend(run_collectives(&|n| make(n).into_iter().map(with_arena).collect()));
    failures
}

fn failures(check: impl FnOnce(&mut Report)) -> Vec<ConformanceFailure> {
    let mut report = Report::default();
    check(&mut report);
    report.failures
}

/// Runs the part of the suite that tests ops and streams on one device.
pub fn run_alone(device: &Device) -> Vec<ConformanceFailure> {
    failures(|report| {
        ops::run(report, device);
        odd::run(report, device);
        streams::run(report, device);
    })
}

/// Runs the attention part of the suite on one device, which may use any attention library.
pub fn run_attentions(device: &Device) -> Vec<ConformanceFailure> {
    failures(|report| ops::run_attentions(report, device))
}

/// Runs the collectives part of the suite. Some engines need to know the memory and the groups in advance. So `make(n)`
/// creates devices `0..n`, each with an arena of [`COLLECTIVES_ARENA_BYTES`] and a new engine that was created for
/// [`collectives_groups`].
pub fn run_collectives(make: &Make<'_>) -> Vec<ConformanceFailure> {
    let requirements = EngineRequirements::of(6, SummationOrder::InOrder);
    failures(|report| collectives::run(report, make, &requirements))
}

/// Like [`run_collectives`], but for engines that may sum in any order, do not compare the members' calls, and require
/// that all members call the groups in the same order. The largest group has `members` members.
pub fn run_collectives_unordered(make: &Make<'_>, members: usize) -> Vec<ConformanceFailure> {
    let requirements = EngineRequirements {
        compares_calls: false,
        any_order: false,
        ..EngineRequirements::of(members, SummationOrder::InAnyOrder)
    };
    failures(|report| collectives::run(report, make, &requirements))
}

/// Runs the collectives part of the suite in one of several processes. All processes call this at the same time, each
/// for its own members of groups. The largest group has `members` members. Does not test aborts, since nothing can run
/// after an abort. `make(n)` creates devices as for [`run_collectives`], but only this process's devices (or none).
pub fn run_collectives_apart(make: &Make<'_>, members: usize, sums: SummationOrder) -> Vec<ConformanceFailure> {
    let requirements = EngineRequirements { single_process: false, ..EngineRequirements::of(members, sums) };
    failures(|report| collectives::run(report, make, &requirements))
}

/// Size in bytes of each arena that [`run_collectives`] needs.
pub const COLLECTIVES_ARENA_BYTES: usize = collectives::ARENA_BYTES;

/// The groups that [`run_collectives`] calls on n devices.
pub fn collectives_groups(n: usize) -> Vec<Arc<Group>> {
    (1..=collectives::GROUPS).map(|id| Arc::new(Group { id, ranks: (0..n).collect() })).collect()
}
