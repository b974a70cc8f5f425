//! One order of calls on a device: submissions take turns in the order in which they came, over all streams of the device.
//!
//! - TURN-1: a submission's calls are put on its stream only when those of all earlier submissions of the device are. So
//!   where all devices' submissions come in one order, which the plan fixes, all their calls do, however late one of them
//!   comes to its stream.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::collective::AbortStatus;
use crate::error::KernelError;

/// How often whoever waits looks whether the engine was aborted.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// The turns of one device.
#[derive(Debug, Default)]
pub(crate) struct IssueOrder {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Turns that are not over; the least has come.
    open: BTreeSet<u64>,
}

/// A submission's turn; over when dropped.
#[derive(Debug)]
pub struct IssueTicket {
    order: Arc<IssueOrder>,
    number: u64,
}

fn lock(order: &IssueOrder) -> MutexGuard<'_, State> {
    order.state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl IssueOrder {
    /// The next turn.
    pub(crate) fn turn(self: &Arc<Self>) -> IssueTicket {
        let mut state = lock(self);
        let number = state.next;
        state.next += 1;
        state.open.insert(number);
        IssueTicket { order: self.clone(), number }
    }
}

impl IssueTicket {
    /// Whether all earlier ones are over.
    pub(crate) fn has_come(&self) -> bool {
        lock(&self.order).open.first() == Some(&self.number)
    }

    /// Waits until all earlier ones are over.
    ///
    /// # Errors
    /// [`KernelError::Aborted`] once an engine is.
    pub(crate) fn wait(&self, outcomes: &[AbortStatus]) -> Result<(), KernelError> {
        let mut state = lock(&self.order);
        while state.open.first() != Some(&self.number) {
            if let Some(error) = outcomes.iter().find_map(AbortStatus::aborted) {
                return Err(error);
            }
            let waited = self.order.changed.wait_timeout(state, LOOK_EVERY);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for IssueTicket {
    fn drop(&mut self) {
        lock(&self.order).open.remove(&self.number);
        self.order.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_come_in_the_order_in_which_they_were_taken() {
        let order = Arc::new(IssueOrder::default());
        let [first, second, third] = [(); 3].map(|()| order.turn());
        assert_eq!([&first, &second, &third].map(IssueTicket::has_come), [true, false, false]);
        drop(second);
        assert!(!third.has_come());
        drop(first);
        assert!(third.has_come() && third.wait(&[]).is_ok());
        let (late, outcome) = (order.turn(), AbortStatus::default());
        outcome.abort("the test says so");
        assert_eq!(late.wait(&[outcome]), Err(KernelError::Aborted { cause: "the test says so".to_owned() }));
    }
}
