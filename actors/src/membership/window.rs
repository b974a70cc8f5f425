//! Flow control: bounds the unprocessed messages to a peer. Pure.
//!
//! - **WI-1**: at most [`MESSAGES_MAX`] messages and [`BYTES_MAX`] bytes are sent and not yet acknowledged.
//!
//! The layers below queue without bound for a peer that does not read, but a frozen peer must not use up memory. A peer
//! acknowledges after each quarter of the window, so most messages need no acknowledgement.

/// Maximum number of unacknowledged messages to one peer.
pub(crate) const MESSAGES_MAX: u64 = 1024;
/// Maximum number of unacknowledged bytes to one peer.
pub(crate) const BYTES_MAX: u64 = 4 << 20;

/// Totals since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
}

impl Count {
    fn add(&mut self, bytes: usize) {
        self.messages += 1;
        self.bytes += bytes as u64;
    }

    fn minus(self, other: Self) -> Self {
        Self { messages: self.messages - other.messages, bytes: self.bytes - other.bytes }
    }
}

/// The sender's counters.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    sent: Count,
    acknowledged: Count,
}

impl Outbox {
    /// Counts a message; if the window is full, returns the unacknowledged count.
    pub(crate) fn send(&mut self, bytes: usize) -> Result<(), Count> {
        let unacknowledged = self.sent.minus(self.acknowledged);
        if unacknowledged.messages + 1 > MESSAGES_MAX || unacknowledged.bytes + bytes as u64 > BYTES_MAX {
            return Err(unacknowledged);
        }
        self.sent.add(bytes);
        Ok(())
    }

    /// Processes an acknowledgement of a total; false if the total is impossible.
    pub(crate) fn acknowledge(&mut self, total: Count) -> bool {
        let within = |new: u64, old: u64, sent: u64| old <= new && new <= sent;
        let is_valid = within(total.messages, self.acknowledged.messages, self.sent.messages)
            && within(total.bytes, self.acknowledged.bytes, self.sent.bytes);
        if is_valid {
            self.acknowledged = total;
        }
        is_valid
    }
}

/// The receiver's counters.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    processed: Count,
    acknowledged: Count,
}

impl Inbox {
    /// Counts a message; returns the total if an acknowledgement is due.
    pub(crate) fn receive(&mut self, bytes: usize) -> Option<Count> {
        self.processed.add(bytes);
        let pending = self.processed.minus(self.acknowledged);
        (pending.messages >= MESSAGES_MAX / 4 || pending.bytes >= BYTES_MAX / 4).then(|| {
            self.acknowledged = self.processed;
            self.processed
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_processes_nothing_receives_one_window() {
        let mut outbox = Outbox::default();
        let sent = (0..100_000).filter(|_| outbox.send(10).is_ok()).count();
        assert_eq!(sent as u64, MESSAGES_MAX);
        assert_eq!(outbox.send(10), Err(Count { messages: MESSAGES_MAX, bytes: 10 * MESSAGES_MAX }));
        let mut outbox = Outbox::default();
        let sent = (0..100_000).filter(|_| outbox.send(1 << 18).is_ok()).count();
        assert_eq!(sent as u64, BYTES_MAX >> 18);
    }

    #[test]
    fn a_peer_that_processes_all_messages_never_fills_the_window() {
        for bytes in [0, 1, 1000, 100_000, BYTES_MAX as usize / 4] {
            let (mut outbox, mut inbox) = (Outbox::default(), Inbox::default());
            for _ in 0..10_000 {
                outbox.send(bytes).expect("the peer keeps up");
                if let Some(total) = inbox.receive(bytes) {
                    assert!(outbox.acknowledge(total));
                }
            }
        }
    }

    #[test]
    fn impossible_acknowledgements_are_rejected() {
        let mut outbox = Outbox::default();
        outbox.send(8).expect("empty");
        assert!(!outbox.acknowledge(Count { messages: 2, bytes: 8 }));
        assert!(!outbox.acknowledge(Count { messages: 1, bytes: 9 }));
        assert!(outbox.acknowledge(Count { messages: 1, bytes: 8 }));
        assert!(!outbox.acknowledge(Count { messages: 0, bytes: 0 }));
    }
}
