//! What processes send each other over the control plane, as bytes with a version and limits.
//!
//! An opening is `version u8 | session | epoch u64 | process u32 | MAC of all that`, once at the start of each direction. A control message
//! is `header (bincode) | payload`; the payload is raw, because bincode copies bytes one by one.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use serde::{Deserialize, Serialize};

use super::datagram::Rejection;

/// Bytes of an application's message, at most.
pub const MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Bytes of a cause's text, at most; the rest is cut off.
pub(crate) const CAUSE_BYTES_MAX: usize = 4 << 10;
/// Bytes of a control message, at most.
pub(crate) const CONTROL_BYTES_MAX: usize = HEADER_BYTES_MAX + MESSAGE_BYTES_MAX;
/// Bytes of an opening.
pub(crate) const OPENING_BYTES: usize = OPENING_TEXT_BYTES + 32;

const VERSION: u8 = 2;
const HEADER_BYTES_MAX: usize = CAUSE_BYTES_MAX + 256;
const OPENING_TEXT_BYTES: usize = 1 + 16 + 8 + 4;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<HEADER_BYTES_MAX>> =
    bincode::config::legacy().with_limit::<HEADER_BYTES_MAX>();

/// The first bytes of each direction of a control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opening {
    pub(crate) session: [u8; 16],
    pub(crate) epoch: u64,
    /// The sender.
    pub(crate) from: u32,
}

impl Opening {
    /// The key of the MAC, from the job's.
    pub(crate) fn key(job: &[u8; 32]) -> [u8; 32] {
        blake3::derive_key("shardflow control opening v2", job)
    }

    pub(crate) fn write(&self, key: &[u8; 32]) -> [u8; OPENING_BYTES] {
        let mut bytes = [0; OPENING_BYTES];
        bytes[0] = VERSION;
        bytes[1..17].copy_from_slice(&self.session);
        bytes[17..25].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[25..OPENING_TEXT_BYTES].copy_from_slice(&self.from.to_le_bytes());
        let mac = blake3::keyed_hash(key, &bytes[..OPENING_TEXT_BYTES]);
        bytes[OPENING_TEXT_BYTES..].copy_from_slice(mac.as_bytes());
        bytes
    }

    /// Whether a peer sent what is expected of it, or why not.
    pub(crate) fn check(&self, bytes: &[u8; OPENING_BYTES], key: &[u8; 32]) -> Result<(), Rejection> {
        let (text, mac) = bytes.split_at(OPENING_TEXT_BYTES);
        if text[0] != VERSION {
            return Err(Rejection::Format);
        }
        // `Hash` compares in constant time.
        if blake3::keyed_hash(key, text) != *mac {
            return Err(Rejection::Mac);
        }
        if text[1..17] != self.session || text[25..] != self.from.to_le_bytes() {
            return Err(Rejection::Session);
        }
        let epoch = text[17..25].iter().rev().fold(0, |epoch, byte| epoch << 8 | u64::from(*byte));
        match epoch.cmp(&self.epoch) {
            std::cmp::Ordering::Less => Err(Rejection::OldEpoch),
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => Err(Rejection::NewerEpoch),
        }
    }
}

/// One control message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControlMessage {
    pub(crate) body: Body,
    pub(crate) payload: Vec<u8>,
}

/// The kinds of control messages. All but `Message` and `Received` are urgent: the receiver answers with `Received` at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Body {
    /// The application's; the payload is its bytes.
    Message { topic: u16 },
    /// The sender failed.
    Failed { follows: bool, cause: String, exit: u8 },
    /// The sender lost another process.
    Lost { about: u32, follows: bool, cause: String, exit: u8 },
    /// The sender ends in order.
    Leaving,
    /// How many urgent control messages the sender has received since the start.
    Received { urgent: u64 },
}

impl From<Body> for ControlMessage {
    fn from(body: Body) -> Self {
        Self { body, payload: Vec::new() }
    }
}

impl ControlMessage {
    pub(crate) fn write(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(64 + self.payload.len());
        // Writing to a vector does not fail, and `truncate` keeps texts within the limit.
        let _ = bincode::serde::encode_into_std_write(&self.body, &mut bytes, CONFIG);
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    pub(crate) fn read(bytes: &[u8]) -> Result<Self, &'static str> {
        let (body, read): (Body, usize) =
            bincode::serde::decode_from_slice(bytes, CONFIG).map_err(|_| "a header that cannot be read")?;
        let payload = bytes[read..].to_vec();
        let payload_max = if matches!(body, Body::Message { .. }) { MESSAGE_BYTES_MAX } else { 0 };
        if payload.len() > payload_max {
            return Err("too many bytes");
        }
        Ok(Self { body, payload })
    }
}

/// The text within [`CAUSE_BYTES_MAX`].
pub(crate) fn truncate(mut cause: String) -> String {
    if cause.len() > CAUSE_BYTES_MAX {
        let end = (0..=CAUSE_BYTES_MAX).rev().find(|i| cause.is_char_boundary(*i)).unwrap_or(0);
        cause.truncate(end);
    }
    cause
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<ControlMessage> {
        let cause = || "out of memory: 3 GiB".to_string();
        vec![
            ControlMessage { body: Body::Message { topic: 7 }, payload: b"step 4".to_vec() },
            Body::Message { topic: 7 }.into(),
            Body::Failed { follows: true, cause: cause(), exit: 71 }.into(),
            Body::Lost { about: 2, follows: false, cause: cause(), exit: 69 }.into(),
            Body::Leaving.into(),
            Body::Received { urgent: 3 }.into(),
        ]
    }

    #[test]
    fn letters_arrive_as_sent() {
        let cause = truncate("é".repeat(CAUSE_BYTES_MAX));
        let longest = ControlMessage::from(Body::Failed { follows: true, cause, exit: 71 });
        let largest = ControlMessage { body: Body::Message { topic: 1 }, payload: vec![1; MESSAGE_BYTES_MAX] };
        for message in all().into_iter().chain([longest, largest]) {
            let bytes = message.write();
            assert!(bytes.len() <= CONTROL_BYTES_MAX);
            assert_eq!(ControlMessage::read(&bytes), Ok(message));
        }
    }

    #[test]
    fn letters_that_are_cut_or_too_long_are_refused() {
        for message in all() {
            let bytes = message.write();
            let payload = message.payload.len();
            for length in 0..bytes.len() - payload {
                assert!(ControlMessage::read(&bytes[..length]).is_err(), "{message:?} cut to {length}");
            }
            if !matches!(message.body, Body::Message { .. }) {
                assert_eq!(ControlMessage::read(&[&bytes[..], &[0]].concat()), Err("too many bytes"));
            }
        }
        let long = ControlMessage { body: Body::Message { topic: 0 }, payload: vec![0; MESSAGE_BYTES_MAX + 1] };
        assert_eq!(ControlMessage::read(&long.write()), Err("too many bytes"));
    }

    #[test]
    fn an_opening_fits_one_session_epoch_process_and_key() {
        let (key, own) = (Opening::key(&[5; 32]), Opening { session: [6; 16], epoch: 3, from: 1 });
        let check = |sent: Opening, key: &[u8; 32]| own.check(&sent.write(key), &Opening::key(&[5; 32]));
        assert_eq!(check(own, &key), Ok(()));
        assert_eq!(check(own, &Opening::key(&[4; 32])), Err(Rejection::Mac));
        assert_eq!(check(Opening { session: [7; 16], ..own }, &key), Err(Rejection::Session));
        assert_eq!(check(Opening { from: 2, ..own }, &key), Err(Rejection::Session));
        assert_eq!(check(Opening { epoch: 2, ..own }, &key), Err(Rejection::OldEpoch));
        assert_eq!(check(Opening { epoch: 4, ..own }, &key), Err(Rejection::NewerEpoch));
        for at in 0..OPENING_BYTES {
            let mut bytes = own.write(&key);
            bytes[at] ^= 1;
            let refusal = if at == 0 { Rejection::Format } else { Rejection::Mac };
            assert_eq!(own.check(&bytes, &key), Err(refusal), "byte {at}");
        }
    }

    proptest::proptest! {
        /// Whatever a peer sends, reading ends, and takes no more memory than the bytes that came.
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = ControlMessage::read(&bytes);
        }
    }
}
