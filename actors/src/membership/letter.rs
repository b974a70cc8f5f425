//! Messages of the control plane, encoded with a version and limits.
//!
//! A control message is `version u8 | header (bincode) | payload`; the payload is raw, because bincode copies single
//! bytes.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use ractor::message::{BoxedDowncastErr, SerializedMessage};
use serde::{Deserialize, Serialize};

/// Maximum size of an application's message in bytes.
pub const MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Maximum size of a cause's text in bytes; longer texts are truncated.
pub(crate) const CAUSE_BYTES_MAX: usize = 4 << 10;

const VERSION: u8 = 1;
const HEADER_BYTES_MAX: usize = CAUSE_BYTES_MAX + 256;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<HEADER_BYTES_MAX>> =
    bincode::config::legacy().with_limit::<HEADER_BYTES_MAX>();

/// A control message with its sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ControlMessage {
    pub(crate) epoch: u64,
    pub(crate) from: u32,
    pub(crate) body: Body,
    #[serde(skip)]
    pub(crate) payload: Vec<u8>,
}

/// The content of a control message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Body {
    /// An application's message; its bytes are the payload.
    Message { topic: u16 },
    /// The sender itself failed. Acknowledged with `Processed` at once.
    Failed { follows: bool, cause: String, exit: u8 },
    /// The sender lost another process. Acknowledged with `Processed` at once.
    Lost { about: u32, follows: bool, cause: String, exit: u8 },
    /// The sender leaves in order. Acknowledged with `Processed` at once.
    Leaving,
    /// Acknowledgement: the sender's totals of processed messages, their bytes, and other control messages since the
    /// start.
    Processed { messages: u64, bytes: u64, urgent: u64 },
}

/// A message of the member actor.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Message(ControlMessage),
    /// Bytes that are not a valid control message, with the reason; counted.
    Garbled(&'static str),
}

impl ControlMessage {
    pub(crate) fn write(&self) -> Result<Vec<u8>, BoxedDowncastErr> {
        let mut bytes = vec![VERSION];
        let header = bincode::serde::encode_into_std_write(self, &mut bytes, CONFIG);
        header.map_err(|_| BoxedDowncastErr)?;
        bytes.extend_from_slice(&self.payload);
        Ok(bytes)
    }

    pub(crate) fn read(bytes: &[u8]) -> Result<Self, &'static str> {
        let Some((&VERSION, rest)) = bytes.split_first() else {
            return Err("unknown version");
        };
        let (mut message, read): (Self, usize) =
            bincode::serde::decode_from_slice(rest, CONFIG).map_err(|_| "malformed header")?;
        message.payload = rest[read..].to_vec();
        let payload_max = if matches!(message.body, Body::Message { .. }) { MESSAGE_BYTES_MAX } else { 0 };
        if message.payload.len() > payload_max {
            return Err("payload too long");
        }
        Ok(message)
    }
}

impl ractor::Message for Received {
    fn serializable() -> bool {
        true
    }

    fn serialize(self) -> Result<SerializedMessage, BoxedDowncastErr> {
        let Self::Message(message) = self else { return Err(BoxedDowncastErr) };
        Ok(SerializedMessage::Cast { variant: String::new(), args: message.write()?, metadata: None })
    }

    fn deserialize(message: SerializedMessage) -> Result<Self, BoxedDowncastErr> {
        let SerializedMessage::Cast { args, .. } = message else {
            return Ok(Self::Garbled("unexpected call"));
        };
        Ok(ControlMessage::read(&args).map_or_else(Self::Garbled, Self::Message))
    }
}

/// Truncates a text to [`CAUSE_BYTES_MAX`] bytes.
pub(crate) fn truncate(mut cause: String) -> String {
    if cause.len() > CAUSE_BYTES_MAX {
        let end = (0..=CAUSE_BYTES_MAX).rev().find(|i| cause.is_char_boundary(*i)).unwrap_or(0);
        cause.truncate(end);
    }
    cause
}

#[cfg(test)]
mod tests {
    use ractor::Message;

    use super::*;

    fn message(body: Body, payload: &[u8]) -> ControlMessage {
        ControlMessage { epoch: 3, from: 1, body, payload: payload.to_vec() }
    }

    fn all() -> Vec<ControlMessage> {
        let cause = || "out of memory: 3 GiB".to_string();
        vec![
            message(Body::Message { topic: 7 }, b"step 4"),
            message(Body::Message { topic: 7 }, b""),
            message(Body::Failed { follows: true, cause: cause(), exit: 71 }, b""),
            message(Body::Lost { about: 2, follows: false, cause: cause(), exit: 69 }, b""),
            message(Body::Leaving, b""),
            message(Body::Processed { messages: 1, bytes: 2, urgent: 3 }, b""),
        ]
    }

    fn over_the_wire(message: ControlMessage) -> Received {
        Received::deserialize(Received::Message(message).serialize().expect("encodes")).expect("never fails")
    }

    #[test]
    fn control_messages_arrive_as_sent() {
        for message in all() {
            assert_eq!(over_the_wire(message.clone()), Received::Message(message));
        }
        let cause = truncate("é".repeat(CAUSE_BYTES_MAX));
        let longest = message(Body::Failed { follows: true, cause, exit: 71 }, b"");
        assert_eq!(over_the_wire(longest.clone()), Received::Message(longest));
    }

    #[test]
    fn invalid_bytes_are_garbled() {
        for message in all() {
            let bytes = message.write().expect("short");
            let payload = message.payload.len();
            for length in 0..bytes.len() - payload {
                assert!(ControlMessage::read(&bytes[..length]).is_err(), "{message:?} truncated to {length}");
            }
            if !matches!(message.body, Body::Message { .. }) {
                assert_eq!(ControlMessage::read(&[&bytes[..], &[0]].concat()), Err("payload too long"));
            }
            assert_eq!(ControlMessage::read(&[&[VERSION + 1], &bytes[1..]].concat()), Err("unknown version"));
        }
        let long = message(Body::Message { topic: 0 }, &vec![0; MESSAGE_BYTES_MAX + 1]);
        assert_eq!(over_the_wire(long), Received::Garbled("payload too long"));
    }

    proptest::proptest! {
        /// Decoding arbitrary bytes terminates and does not panic.
        #[test]
        fn decoding_arbitrary_bytes_never_panics(mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = ControlMessage::read(&bytes);
            if let Some(first) = bytes.first_mut() {
                *first = VERSION;
            }
            let _ = ControlMessage::read(&bytes);
        }
    }
}
