//! Reports a failure before the rendezvous to the processes that would wait for this one.
use std::ops::Range;

use shardflow_actors::transport::{self, TransportError};

use super::env::{self, LaunchContext, Secret};
use super::rendezvous::{Identity, RendezvousConfig, refuse_callers, send_failure};
use super::{Cluster, ClusterOptions, world};
use crate::exit::Report;

/// How to reach the other processes.
#[derive(Clone, Debug)]
pub(crate) struct Departure(RendezvousConfig);

impl Departure {
    pub(crate) fn new(
        endpoint: &env::Endpoint,
        secret: &Secret,
        options: &ClusterOptions,
        processes: u32,
    ) -> Result<Self, TransportError> {
        let secret = transport::SharedKey::from_text(secret.text())?;
        Ok(Self(RendezvousConfig {
            processes,
            interface: options.interface,
            report_within: options.report_within,
            ..RendezvousConfig::new(world::address(endpoint), secret, Identity::default())
        }))
    }

    /// Reports that `ranks` will not join: for rank 0 it refuses the processes that connect, for other ranks it connects to
    /// rank 0. Returns within [`ClusterOptions::report_within`]: true if a process waited for them.
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

/// Reports the failure of this process, if it is one of several.
pub(crate) fn report(report: &Report) {
    let Ok(Cluster { launch: LaunchContext::World(world), options, .. }) = Cluster::from_env() else { return };
    let Ok(secret) = world.secret.read() else { return };
    if let Ok(departure) = Departure::new(&world.endpoint, &secret, &options, world.processes) {
        let rank = world.process;
        departure.report(rank..rank + 1, &Report { rank, ..report.clone() });
    }
}
