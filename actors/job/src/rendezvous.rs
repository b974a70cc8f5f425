//! Rendezvous of a world's processes: process 0 compares the [`JoinInfo`] of all processes, then all start.
//!
//! ```text
//! process 0                     process p
//!    ◄── (authenticated) Join ── rank, addresses, restarts, wanted ranks, and facts: version, mesh, plan, ..
//!    ... until all have joined, or the deadline
//!    ── Roster: session, epoch, nodes, some members ──►   p accepts connections of all members
//!    ◄────────────── Ready ──
//!    ... from all
//!    ── Start ──►
//! ```
//!
//! - **RV-1**: no process starts before all are ready. So a member that has started can dial all members of its roster.
//! - **RV-2**: a refusal is sent to all processes. If processes differ in a fact, it names two and their values.
//! - **RV-3**: a process may join again while others wait. The new connection replaces the old one if the old one is
//!   dead, if the new restart count is higher, or if the same process opened both connections.
//! - **RV-4**: process 0 receives a report in two cases: a process fails before it joins and no retry can help, or a
//!   launcher gives up, for example after a signal or the last restart. Process 0 then refuses, with the reported exit
//!   code, every process that waits or joins within `report_within`. The first report wins. If process 0 itself fails,
//!   its launcher refuses the other processes. Without a launcher, `departure::report` refuses them.

use std::time::Instant;

use crate::exit::mark_departed;

pub use config::{RendezvousConfig, local_address};
pub(crate) use coordinator::refuse_callers;
pub(crate) use join::send_failure;

mod config;
mod coordinator;
pub mod facts;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod join;
mod messages;
mod roster;

use messages::Outcome;
pub use messages::{Conflict, Fact, Identity, JoinInfo, RendezvousError, RendezvousRefusal, ranks};
pub use roster::{Apart, Member, NodeRun, ProcessLabel, Roster};

/// Joins the other processes. Usually takes at most a few seconds longer than `timeout`. If process 0 freezes after all
/// have joined, `timeout` applies a second time. Returns this process's roster and its listener. Calls `on_waiting`
/// every `report_every` with a line that names the missing ranks.
pub fn rendezvous(config: &RendezvousConfig, mut on_waiting: impl FnMut(&str)) -> Outcome {
    let deadline = Instant::now() + config.timeout;
    let (process, processes) = (config.process, config.processes);
    if process >= processes || processes > crate::transport::PROCESSES_MAX {
        return Err(RendezvousError::Rank { process, processes });
    }
    let outcome = if process == 0 {
        coordinator::run(config, deadline, &mut on_waiting)
    } else {
        join::join(config, deadline, &mut on_waiting)
    };
    if matches!(&outcome, Err(RendezvousError::Refused(RendezvousRefusal::Failed(report))) if report.departed) {
        mark_departed();
    }
    outcome
}

#[cfg(test)]
mod tests;
