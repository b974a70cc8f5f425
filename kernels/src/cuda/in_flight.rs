//! A submission in flight: its program, its notifications, and the checks before the final notification.

use std::sync::Arc;

use parking_lot::Mutex;

use super::poller::Completion;
use super::record::RecordSlot;
use crate::collective::AbortStatus;
use crate::error::{KernelError, Result};
use crate::memory::Base;
use crate::op::Program;
use crate::submission::{Notification, Notify};

pub(crate) struct InFlight {
    pub(crate) program: Arc<Program>,
    pub(crate) repeat: bool,
    notify: Mutex<Notify>,
    /// Empty if the program has no collectives. Checked because an aborted collective looks complete on the stream.
    abort_statuses: Arc<[AbortStatus]>,
    slot: Mutex<Option<RecordSlot>>,
}

impl InFlight {
    pub(crate) fn new(program: Arc<Program>, repeat: bool, notify: Notify, abort_statuses: Arc<[AbortStatus]>) -> Self {
        Self { program, repeat, notify: Mutex::new(notify), abort_statuses, slot: Mutex::default() }
    }

    pub(crate) fn send(&self, notification: Notification) {
        (self.notify.lock())(notification);
    }

    pub(crate) fn signal(self: Arc<Self>, tag: u32) -> Completion {
        Box::new(move |failed| {
            // Do not signal after an abort, because the results of an aborted collective are invalid.
            if failed.is_none() && self.aborted().is_none() {
                self.send(Notification::Signal(tag));
            }
        })
    }

    /// Returns the completion that ends the submission. The completion first releases the submission's memory and then
    /// sends the final notification, because the receiver may rely on the release.
    pub(crate) fn end(self: Arc<Self>, bases: Vec<Base>, result: Result<()>) -> Completion {
        Box::new(move |failed| {
            bases.iter().for_each(|base| base.arena.mark_released());
            drop(bases);
            self.finish(failed.map_or(result, |error| Err(error.clone())));
        })
    }

    pub(crate) fn set_record_slot(&self, slot: RecordSlot) {
        *self.slot.lock() = Some(slot);
    }

    fn aborted(&self) -> Option<KernelError> {
        self.abort_statuses.iter().find_map(AbortStatus::aborted)
    }

    /// Sends the final notification. The submission's work on the stream must be done or have failed.
    pub(crate) fn finish(&self, result: Result<()>) {
        let record = self.slot.lock().take().and_then(|slot| slot.read());
        let record_error = record.map(|record| {
            let launch = self.program.launches.get(record.launch as usize);
            record.error(launch.map_or("unknown", |launch| launch.op.name()))
        });
        let error = match result {
            Err(error) => Some(error),
            Ok(()) => self.aborted().or(record_error),
        };
        self.send(error.map_or(Notification::Done, Notification::Failed));
    }
}
