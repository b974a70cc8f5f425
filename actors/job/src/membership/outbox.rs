//! Control messages that wait until they are written to a peer's connection.
//!
//! - **OB-1**: at most [`MESSAGES_MAX`] application messages wait, with at most [`BYTES_MAX`] bytes in total. So if a
//!   peer reads no messages, this process uses at most this memory for the peer, besides the buffers of the socket.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::control_message::{Body, ControlMessage};

/// Maximum number of application messages that wait for one peer.
pub(crate) const MESSAGES_MAX: u64 = 1024;
pub(crate) const BYTES_MAX: u64 = 4 << 20;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unsent {
    /// The connection has ended.
    Closed,
    /// The outbox is full (OB-1).
    Full(Count),
}

#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) bytes: Vec<u8>,
    /// Size in bytes of the application message; `None` for other messages.
    message_bytes: Option<u64>,
}

#[derive(Debug)]
pub(crate) struct Outbox {
    messages: UnboundedSender<Queued>,
    count: Arc<Mutex<Count>>,
}

#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) messages: UnboundedReceiver<Queued>,
    count: Arc<Mutex<Count>>,
}

impl Outbox {
    pub(crate) fn new() -> (Self, Waiting) {
        let ((sender, messages), count) = (unbounded_channel(), Arc::default());
        (Self { messages: sender, count: Arc::clone(&count) }, Waiting { messages, count })
    }

    /// Queues a control message. Only application messages are limited, because there are few other messages.
    pub(crate) fn send(&self, message: &ControlMessage) -> Result<(), Unsent> {
        let is_message = matches!(message.body, Body::Message { .. });
        let message_bytes = is_message.then_some(message.payload.len() as u64);
        if let Some(bytes) = message_bytes {
            let mut count = self.count.lock();
            if count.messages == MESSAGES_MAX || count.bytes + bytes > BYTES_MAX {
                return Err(Unsent::Full(*count));
            }
            (count.messages, count.bytes) = (count.messages + 1, count.bytes + bytes);
        }
        self.messages.send(Queued { bytes: message.write(), message_bytes }).map_err(|_| Unsent::Closed)
    }
}

impl Waiting {
    /// Records that a message has been written and no longer waits.
    pub(crate) fn written(&self, message: &Queued) {
        if let Some(bytes) = message.message_bytes {
            let mut count = self.count.lock();
            (count.messages, count.bytes) = (count.messages - 1, count.bytes - bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: usize) -> ControlMessage {
        ControlMessage { body: Body::Message { from: 0, to: 1, topic: 1 }, payload: vec![0; bytes] }
    }

    #[test]
    fn messages_are_limited_and_urgent_ones_are_not() {
        let (outbox, mut waiting) = Outbox::new();
        let sent = (0..10_000).filter(|_| outbox.send(&message(10)).is_ok()).count();
        assert_eq!(sent as u64, MESSAGES_MAX);
        let full = Count { messages: MESSAGES_MAX, bytes: 10 * MESSAGES_MAX };
        assert_eq!(outbox.send(&message(10)), Err(Unsent::Full(full)));
        assert_eq!(outbox.send(&Body::Joined.into()), Ok(()));
        let first = waiting.messages.try_recv().expect("waits");
        waiting.written(&first);
        assert_eq!(outbox.send(&message(10)), Ok(()));
        drop(waiting);
        assert_eq!(outbox.send(&Body::Joined.into()), Err(Unsent::Closed));
        let (outbox, _waiting) = Outbox::new();
        let sent = (0..10_000).filter(|_| outbox.send(&message(1 << 18)).is_ok()).count();
        assert_eq!(sent as u64, BYTES_MAX >> 18);
    }
}
