//! What a submission is while it is under way: whom to tell, and what is looked at before. Imports `stream`, `op`,
//! `collective`, `cuda::step` and `cuda::record`.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::record::Slot;
use crate::collective::Outcome;
use crate::error::KernelError;
use crate::op::Program;
use crate::stream::{Notice, Notify};

/// See the module.
pub(crate) struct Ticket {
    pub(crate) program: Arc<Program>,
    pub(crate) repeat: bool,
    notify: Mutex<Notify>,
    /// Of the engine, where the program calls collectives: one that was aborted has not done what it seems to have done.
    outcomes: Arc<[Outcome]>,
    /// Where the stream's record of an index out of range is copied to.
    slot: Mutex<Option<Slot>>,
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("program", &self.program.name).finish()
    }
}

impl Ticket {
    pub(crate) fn new(program: Arc<Program>, repeat: bool, notify: Notify, outcomes: Arc<[Outcome]>) -> Self {
        Self { program, repeat, notify: Mutex::new(notify), outcomes, slot: Mutex::default() }
    }

    pub(crate) fn tell(&self, notice: Notice) {
        (self.notify.lock().unwrap_or_else(PoisonError::into_inner))(notice);
    }

    pub(crate) fn signal(&self, tag: u32) {
        // What an aborted collective left behind is not to be passed on.
        if self.aborted().is_none() {
            self.tell(Notice::Signal(tag));
        }
    }

    /// Where the record goes; it is looked at before the end is told.
    pub(crate) fn keep_record(&self, slot: Slot) {
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(slot);
    }

    fn aborted(&self) -> Option<KernelError> {
        self.outcomes.iter().find_map(Outcome::aborted)
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
        self.tell(error.map_or(Notice::Done, Notice::Failed));
    }
}
