//! Bounds what is under way to a peer. Pure.
//!
//! - **WI-1**: what was sent and not yet taken is at most [`MESSAGES_MAX`] messages and [`BYTES_MAX`] bytes.
//!
//! The layers below queue without bound for a peer that does not read; a frozen one must not cost memory. The peer tells
//! what it has taken each time that it comes to a quarter of the window, so most messages cost no answer.

/// Messages under way to one peer.
pub(crate) const MESSAGES_MAX: u64 = 1024;
/// Bytes under way to one peer.
pub(crate) const BYTES_MAX: u64 = 4 << 20;

/// Counts since the start.
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

/// The sender's side.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    sent: Count,
    taken: Count,
}

impl Outbox {
    /// Counts a message, or refuses it with what is under way.
    pub(crate) fn send(&mut self, bytes: usize) -> Result<(), Count> {
        let waiting = self.sent.minus(self.taken);
        if waiting.messages + 1 > MESSAGES_MAX || waiting.bytes + bytes as u64 > BYTES_MAX {
            return Err(waiting);
        }
        self.sent.add(bytes);
        Ok(())
    }

    /// The peer has taken this much in all; false when it cannot have.
    pub(crate) fn taken(&mut self, taken: Count) -> bool {
        let within = |new: u64, old: u64, sent: u64| old <= new && new <= sent;
        let possible = within(taken.messages, self.taken.messages, self.sent.messages)
            && within(taken.bytes, self.taken.bytes, self.sent.bytes);
        if possible {
            self.taken = taken;
        }
        possible
    }
}

/// The receiver's side.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    taken: Count,
    told: Count,
}

impl Inbox {
    /// Counts a message; the total when the sender should be told.
    pub(crate) fn take(&mut self, bytes: usize) -> Option<Count> {
        self.taken.add(bytes);
        let untold = self.taken.minus(self.told);
        (untold.messages >= MESSAGES_MAX / 4 || untold.bytes >= BYTES_MAX / 4).then(|| {
            self.told = self.taken;
            self.taken
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_takes_nothing_gets_a_window() {
        let mut outbox = Outbox::default();
        let sent = (0..100_000).filter(|_| outbox.send(10).is_ok()).count();
        assert_eq!(sent as u64, MESSAGES_MAX);
        assert_eq!(outbox.send(10), Err(Count { messages: MESSAGES_MAX, bytes: 10 * MESSAGES_MAX }));
        let mut outbox = Outbox::default();
        let sent = (0..100_000).filter(|_| outbox.send(1 << 18).is_ok()).count();
        assert_eq!(sent as u64, BYTES_MAX >> 18);
    }

    #[test]
    fn a_peer_that_takes_all_is_never_refused() {
        for bytes in [0, 1, 1000, 100_000, BYTES_MAX as usize / 4] {
            let (mut outbox, mut inbox) = (Outbox::default(), Inbox::default());
            for _ in 0..10_000 {
                outbox.send(bytes).expect("the peer keeps up");
                if let Some(taken) = inbox.take(bytes) {
                    assert!(outbox.taken(taken));
                }
            }
        }
    }

    #[test]
    fn more_than_was_sent_cannot_be_taken() {
        let mut outbox = Outbox::default();
        outbox.send(8).expect("empty");
        assert!(!outbox.taken(Count { messages: 2, bytes: 8 }));
        assert!(!outbox.taken(Count { messages: 1, bytes: 9 }));
        assert!(outbox.taken(Count { messages: 1, bytes: 8 }));
        assert!(!outbox.taken(Count { messages: 0, bytes: 0 }));
    }
}
