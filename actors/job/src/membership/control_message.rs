//! Encodes control messages as `header (bincode) | payload`. The payload is raw, because bincode copies byte by byte.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use serde::{Deserialize, Serialize};

use super::cause::Report;

/// Maximum size of an application's message in bytes.
pub const MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Maximum size of a cause's text in bytes; longer texts are truncated.
pub(crate) const CAUSE_BYTES_MAX: usize = 4 << 10;
pub(crate) const CONTROL_BYTES_MAX: usize = HEADER_BYTES_MAX + MESSAGE_BYTES_MAX;

const HEADER_BYTES_MAX: usize = CAUSE_BYTES_MAX + 256;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<HEADER_BYTES_MAX>> =
    bincode::config::legacy().with_limit::<HEADER_BYTES_MAX>();

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControlMessage {
    pub(crate) body: Body,
    pub(crate) payload: Vec<u8>,
}

/// Maximum number of processes in one [`Body::Leaving`].
pub(crate) const LISTED_MAX: usize = 512;
/// Value of `to` in a message to all processes.
pub(crate) const TO_ALL: u32 = u32::MAX;

/// The kinds of control messages. Reports and `Leaving` are urgent: the receiver answers with `Received`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Body {
    /// The first message. It reports that the sender's membership runs.
    Joined,
    /// All processes on the sender's side of the tree edge to the receiver have joined.
    Complete,
    /// A message of the application, from one process to another or to all processes. The payload contains its bytes.
    Message { from: u32, to: u32, topic: u16 },
    /// A process has failed, or has lost another process.
    Report(Report),
    /// These processes have left the session cleanly.
    Leaving { processes: Vec<u32> },
    /// How many urgent control messages the sender has received since the start.
    Received { urgent: u64 },
    /// Numbers of a topic's round. A payload to the parent combines the numbers of the sender's subtree. A payload to a
    /// child combines the numbers of all processes.
    Round { topic: u16, round: u64 },
    /// The topic's round waits for the numbers of `process`.
    Missing { topic: u16, round: u64, process: u32 },
}

impl Body {
    /// Maximum size of the payload in bytes.
    fn payload_bytes_max(&self) -> usize {
        if matches!(self, Self::Message { .. } | Self::Round { .. }) { MESSAGE_BYTES_MAX } else { 0 }
    }
}

impl From<Body> for ControlMessage {
    fn from(body: Body) -> Self {
        Self { body, payload: Vec::new() }
    }
}

impl ControlMessage {
    pub(crate) fn write(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64 + self.payload.len());
        // Writing to a vector does not fail, and `truncated` keeps texts within the limit.
        let _ = bincode::serde::encode_into_std_write(&self.body, &mut bytes, CONFIG);
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    pub(crate) fn read(bytes: &[u8]) -> Result<Self, &'static str> {
        let (body, read): (Body, usize) =
            bincode::serde::decode_from_slice(bytes, CONFIG).map_err(|_| "the header cannot be decoded")?;
        let payload = bytes[read..].to_vec();
        if payload.len() > body.payload_bytes_max() {
            return Err("the payload is too long");
        }
        Ok(Self { body, payload })
    }
}

pub(crate) fn truncated(mut cause: String) -> String {
    cause.truncate(cause.floor_char_boundary(CAUSE_BYTES_MAX));
    cause
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::cause::Kind;
    use crate::membership::fuzz::bodies;

    fn all() -> Vec<ControlMessage> {
        let step = ControlMessage { body: Body::Message { from: 1, to: 0, topic: 7 }, payload: b"step 4".to_vec() };
        bodies().map(ControlMessage::from).into_iter().chain([step]).collect()
    }

    #[test]
    fn messages_arrive_as_sent() {
        let cause = truncated("é".repeat(CAUSE_BYTES_MAX));
        let report = Report { by: 1, about: 1, kind: Kind::Failed, follows: true, cause, exit: 71 };
        let longest = ControlMessage::from(Body::Report(report));
        let largest = ControlMessage {
            body: Body::Message { from: 2, to: TO_ALL, topic: 1 },
            payload: vec![1; MESSAGE_BYTES_MAX],
        };
        let most = ControlMessage::from(Body::Leaving { processes: vec![7; LISTED_MAX] });
        for message in all().into_iter().chain([longest, largest, most]) {
            let bytes = message.write();
            assert!(bytes.len() <= CONTROL_BYTES_MAX);
            assert_eq!(ControlMessage::read(&bytes), Ok(message));
        }
    }

    #[test]
    fn messages_that_are_cut_or_too_long_are_refused() {
        for message in all() {
            let bytes = message.write();
            let payload = message.payload.len();
            for length in 0..bytes.len() - payload {
                assert!(ControlMessage::read(&bytes[..length]).is_err(), "{message:?} cut to {length}");
            }
            if message.body.payload_bytes_max() == 0 {
                assert_eq!(ControlMessage::read(&[&bytes[..], &[0]].concat()), Err("the payload is too long"));
            }
        }
        let long = ControlMessage {
            body: Body::Message { from: 1, to: 0, topic: 0 },
            payload: vec![0; MESSAGE_BYTES_MAX + 1],
        };
        assert_eq!(ControlMessage::read(&long.write()), Err("the payload is too long"));
    }

    proptest::proptest! {
        /// For any bytes from a peer, reading terminates and uses no more memory than those bytes.
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = ControlMessage::read(&bytes);
        }
    }
}
