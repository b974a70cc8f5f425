//! One issue order per device: a device issues collectives in the order of their submissions, across all its streams.
//!
//! - ORDER-1: a device issues a submission's collectives only after it has issued those of all earlier submissions. The
//!   plan fixes one order of submissions for all devices. If all devices receive the submissions in that order, they
//!   also issue all collectives in that order, even if a submission reaches its stream late.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::collective::status::AbortStatus;
use crate::error::Result;

/// How often a waiting thread checks whether the engine was aborted.
const ABORT_CHECK_INTERVAL: Duration = Duration::from_millis(1);

#[derive(Debug, Default)]
pub(crate) struct IssueOrder {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Slots that have not been dropped. The submission with the smallest slot may issue its collectives.
    open: BTreeSet<u64>,
}

/// A submission's position in the issue order. Dropping the slot lets the next submission issue its collectives.
#[derive(Debug)]
pub struct IssueSlot {
    order: Arc<IssueOrder>,
    number: u64,
}

impl IssueOrder {
    pub(crate) fn slot(self: &Arc<Self>) -> IssueSlot {
        let mut state = self.state.lock();
        let number = state.next;
        state.next += 1;
        state.open.insert(number);
        IssueSlot { order: self.clone(), number }
    }
}

impl IssueSlot {
    /// Whether all earlier slots have been dropped.
    pub(crate) fn may_issue(&self) -> bool {
        self.order.state.lock().open.first() == Some(&self.number)
    }

    /// Waits until all earlier slots have been dropped.
    pub(crate) fn wait(&self, abort_statuses: &[AbortStatus]) -> Result<()> {
        let mut state = self.order.state.lock();
        while state.open.first() != Some(&self.number) {
            if let Some(error) = abort_statuses.iter().find_map(AbortStatus::aborted) {
                return Err(error);
            }
            self.order.changed.wait_for(&mut state, ABORT_CHECK_INTERVAL);
        }
        Ok(())
    }
}

impl Drop for IssueSlot {
    fn drop(&mut self) {
        self.order.state.lock().open.remove(&self.number);
        self.order.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::KernelError;

    #[test]
    fn slots_may_issue_in_the_order_in_which_they_were_taken() {
        let order = Arc::new(IssueOrder::default());
        let [first, second, third] = [(); 3].map(|()| order.slot());
        assert_eq!([&first, &second, &third].map(IssueSlot::may_issue), [true, false, false]);
        drop(second);
        assert!(!third.may_issue());
        drop(first);
        assert!(third.may_issue() && third.wait(&[]).is_ok());
        let (late, abort_status) = (order.slot(), AbortStatus::default());
        abort_status.abort("aborted by the test");
        assert_eq!(late.wait(&[abort_status]), Err(KernelError::Aborted { cause: "aborted by the test".to_owned() }));
    }
}
