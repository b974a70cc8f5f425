//! What a submission is while it is under way: whom to tell, and what is looked at before.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::record::RecordSlot;
use crate::collective::AbortStatus;
use crate::error::KernelError;
use crate::op::Program;
use crate::stream::{Notification, Notify};

/// See the module.
pub(crate) struct InFlight {
    pub(crate) program: Arc<Program>,
    pub(crate) repeat: bool,
    notify: Mutex<Notify>,
    /// Of the engine, where the program calls collectives: one that was aborted has not done what it seems to have done.
    outcomes: Arc<[AbortStatus]>,
    /// Where the stream's record of an index out of range is copied to.
    slot: Mutex<Option<RecordSlot>>,
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("program", &self.program.name).finish()
    }
}

impl InFlight {
    pub(crate) fn new(program: Arc<Program>, repeat: bool, notify: Notify, outcomes: Arc<[AbortStatus]>) -> Self {
        Self { program, repeat, notify: Mutex::new(notify), outcomes, slot: Mutex::default() }
    }

    pub(crate) fn tell(&self, notice: Notification) {
        (self.notify.lock().unwrap_or_else(PoisonError::into_inner))(notice);
    }

    pub(crate) fn signal(&self, tag: u32) {
        // What an aborted collective left behind is not to be passed on.
        if self.aborted().is_none() {
            self.tell(Notification::Signal(tag));
        }
    }

    /// Where the record goes; it is looked at before the end is told.
    pub(crate) fn keep_record(&self, slot: RecordSlot) {
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(slot);
    }

    fn aborted(&self) -> Option<KernelError> {
        self.outcomes.iter().find_map(AbortStatus::aborted)
    }

    /// Everything on the stream is done, or has failed.
    pub(crate) fn end(&self, result: Result<(), KernelError>) {
        let recorded = self.slot.lock().unwrap_or_else(PoisonError::into_inner).take().and_then(|slot| slot.read());
        let found = recorded.map(|record| {
            let launch = self.program.launches.get(record.launch as usize);
            record.error(launch.map_or("unknown", |launch| launch.op.name()))
        });
        let error = match result {
            Err(error) => Some(error),
            Ok(()) => self.aborted().or(found),
        };
        self.tell(error.map_or(Notification::Done, Notification::Failed));
    }
}
