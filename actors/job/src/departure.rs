//! Reports a failure that happened before the rendezvous to all other processes, so that these do not wait in vain.

use std::ops::Range;
use std::path::Path;
use std::{env, io};

use crate::env::{Endpoint, LaunchContext, detect, process_variables};
use crate::exit::{CAUSE_BYTES_MAX, ERROR_FILE, Exit, Report, is_departed, mark_joined, own_rank, unix_ns};
use crate::options::ClusterOptions;
use crate::rendezvous::{Identity, RendezvousConfig, refuse_callers, send_failure};
use crate::secret::Secret;

/// How to reach the other processes.
#[derive(Clone, Debug)]
pub(crate) struct Departure(RendezvousConfig);

impl Departure {
    pub(crate) fn new(endpoint: &Endpoint, secret: Secret, options: &ClusterOptions, processes: u32) -> Self {
        let config = RendezvousConfig::new(endpoint.address(), secret, Identity::default(), options);
        // Ignores `config.interface`: the failure may be that this node does not have that interface.
        Self(RendezvousConfig { processes, interface: None, ..config })
    }

    /// For at most `report_within`, reports that `ranks` will not join. Returns true if a process waited for them.
    pub(crate) fn report(&self, ranks: Range<u32>, report: &Report) -> bool {
        let reported = match ranks.start {
            0 => refuse_callers(&self.0, ranks, report),
            _ => send_failure(&self.0, ranks, report),
        };
        reported.unwrap_or_else(|error| {
            tracing::debug!(%error, "could not report a failure to the other processes");
            false
        })
    }
}

/// Reports why this process is about to end with `exit`. `first_cause_rank` is the rank that failed first, if it is
/// known. [`Exit::Retry`] with this process's own rank as the first cause means that the end was requested: the
/// launcher does not restart the process.
///
/// Under `shardflow launch` the launcher receives the report. Otherwise, if this process has not joined yet and no
/// retry would help, this process reports to the others for at most `SHARDFLOW_REPORT_WAIT_MS`: as rank 0, it refuses
/// each process that connects; as any other rank, it sends the report to rank 0. Only a process's first report counts.
pub fn report(exit: Exit, cause: &str, first_cause_rank: Option<u32>) -> io::Result<()> {
    let path = env::var_os(ERROR_FILE);
    if path.as_ref().is_some_and(|path| Path::new(path).exists()) {
        return Ok(());
    }
    let rank = own_rank();
    let cause = cause[..cause.floor_char_boundary(CAUSE_BYTES_MAX)].into();
    let (time_unix_ns, joined, departed) = (unix_ns(), mark_joined(), is_departed());
    let report = Report { rank, time_unix_ns, exit: exit.code(), cause, first_cause_rank, joined, departed };
    match path {
        Some(path) => report.write(Path::new(&path)),
        None => {
            if report.concerns_all() {
                report_to_others(&report);
            }
            Ok(())
        }
    }
}

fn report_to_others(report: &Report) {
    let variables = process_variables();
    let Ok(LaunchContext::World(world)) = detect(&variables) else { return };
    let Ok(secret) = world.secret.read() else { return };
    // If the failure is an invalid option, the default options apply.
    let options = ClusterOptions::read(&variables).unwrap_or_default();
    let rank = world.process;
    let departure = Departure::new(&world.endpoint, secret, &options, world.processes);
    departure.report(rank..rank + 1, &Report { rank, ..report.clone() });
}
