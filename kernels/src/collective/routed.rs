//! Forwards each group's calls to an engine that fits the group, which may span one process, one node or several nodes.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::collective::issue_order::IssueSlot;
use crate::collective::{AbortStatus, Collective, CollectiveCall, DeviceCollective, MemberWait};
use crate::error::Result;
use crate::memory::View;

/// An engine that forwards each group's calls to the engine of that group.
#[derive(Debug)]
pub struct Routed {
    by_group: BTreeMap<u32, Arc<dyn Collective>>,
    default: Arc<dyn Collective>,
}

impl Routed {
    /// `engines` maps group ids to engines. Groups without an entry use `default`. One engine may serve many groups.
    pub fn new(engines: BTreeMap<u32, Arc<dyn Collective>>, default: Arc<dyn Collective>) -> Self {
        Self { by_group: engines, default }
    }

    fn engine_of(&self, call: &CollectiveCall) -> &Arc<dyn Collective> {
        self.by_group.get(&call.group.id).unwrap_or(&self.default)
    }

    fn engines(&self) -> Vec<&Arc<dyn Collective>> {
        let mut all: Vec<&Arc<dyn Collective>> = Vec::new();
        for engine in self.by_group.values().chain([&self.default]) {
            if !all.iter().any(|other| Arc::ptr_eq(other, engine)) {
                all.push(engine);
            }
        }
        all
    }
}

impl Collective for Routed {
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<()> {
        self.engine_of(call).run(call, reads, writes)
    }

    fn abort(&self, cause: &str) {
        self.engines().into_iter().for_each(|engine| engine.abort(cause));
    }

    fn waits(&self) -> Vec<MemberWait> {
        self.engines().into_iter().flat_map(|engine| engine.waits()).collect()
    }

    fn knows_waits(&self) -> bool {
        self.engines().into_iter().all(|engine| engine.knows_waits())
    }

    fn abort_statuses(&self) -> Vec<AbortStatus> {
        self.engines().into_iter().flat_map(|engine| engine.abort_statuses()).collect()
    }

    fn issue_slot(&self, rank: usize) -> Option<IssueSlot> {
        self.engines().into_iter().find_map(|engine| engine.issue_slot(rank))
    }

    fn on_device(&self, call: &CollectiveCall) -> Option<DeviceCollective<'_>> {
        self.engine_of(call).on_device(call)
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        self.engines().into_iter().map(|engine| engine.bytes_received(rank)).sum()
    }
}
