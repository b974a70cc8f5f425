//! What processes say to each other over the control plane, as bytes with a version and limits.
//!
//! A letter is `version u8 | header (bincode) | payload`; the payload is raw, since bincode copies bytes one by one.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use ractor::message::{BoxedDowncastErr, SerializedMessage};
use serde::{Deserialize, Serialize};

/// Bytes of an application's message, at most.
pub const MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Bytes of a cause's text, at most; the rest is cut off.
pub(crate) const CAUSE_BYTES_MAX: usize = 4 << 10;

const VERSION: u8 = 1;
const HEADER_BYTES_MAX: usize = CAUSE_BYTES_MAX + 256;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<HEADER_BYTES_MAX>> =
    bincode::config::legacy().with_limit::<HEADER_BYTES_MAX>();

/// A message with its sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Letter {
    pub(crate) epoch: u64,
    pub(crate) from: u32,
    pub(crate) body: Body,
    #[serde(skip)]
    pub(crate) payload: Vec<u8>,
}

/// What a letter says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Body {
    /// The application's; its bytes are the payload.
    Told { topic: u16 },
    /// The sender failed by itself. Answered with `Taken` at once.
    Failed { follows: bool, cause: String, exit: u8 },
    /// The sender lost another process. Answered with `Taken` at once.
    Lost { about: u32, follows: bool, cause: String, exit: u8 },
    /// The sender ends in order. Answered with `Taken` at once.
    Leaving,
    /// What the sender has taken in from the receiver since the start: messages told, their bytes, and other letters.
    Taken { messages: u64, bytes: u64, urgent: u64 },
}

/// What the member actor gets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Mail {
    Letter(Letter),
    /// Bytes that are no letter; told so that they can be counted.
    Garbled(&'static str),
}

impl Letter {
    pub(crate) fn write(&self) -> Result<Vec<u8>, BoxedDowncastErr> {
        let mut bytes = vec![VERSION];
        let header = bincode::serde::encode_into_std_write(self, &mut bytes, CONFIG);
        header.map_err(|_| BoxedDowncastErr)?;
        bytes.extend_from_slice(&self.payload);
        Ok(bytes)
    }

    pub(crate) fn read(bytes: &[u8]) -> Result<Self, &'static str> {
        let Some((&VERSION, rest)) = bytes.split_first() else {
            return Err("another version");
        };
        let (mut letter, read): (Self, usize) =
            bincode::serde::decode_from_slice(rest, CONFIG).map_err(|_| "a header that cannot be read")?;
        letter.payload = rest[read..].to_vec();
        let payload_max = if matches!(letter.body, Body::Told { .. }) { MESSAGE_BYTES_MAX } else { 0 };
        if letter.payload.len() > payload_max {
            return Err("too many bytes");
        }
        Ok(letter)
    }
}

impl ractor::Message for Mail {
    fn serializable() -> bool {
        true
    }

    fn serialize(self) -> Result<SerializedMessage, BoxedDowncastErr> {
        let Self::Letter(letter) = self else { return Err(BoxedDowncastErr) };
        Ok(SerializedMessage::Cast { variant: String::new(), args: letter.write()?, metadata: None })
    }

    fn deserialize(message: SerializedMessage) -> Result<Self, BoxedDowncastErr> {
        let SerializedMessage::Cast { args, .. } = message else {
            return Ok(Self::Garbled("a call, which no member makes"));
        };
        Ok(Letter::read(&args).map_or_else(Self::Garbled, Self::Letter))
    }
}

/// The text within [`CAUSE_BYTES_MAX`].
pub(crate) fn bounded(mut cause: String) -> String {
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

    fn letter(body: Body, payload: &[u8]) -> Letter {
        Letter { epoch: 3, from: 1, body, payload: payload.to_vec() }
    }

    fn all() -> Vec<Letter> {
        let cause = || "out of memory: 3 GiB".to_string();
        vec![
            letter(Body::Told { topic: 7 }, b"step 4"),
            letter(Body::Told { topic: 7 }, b""),
            letter(Body::Failed { follows: true, cause: cause(), exit: 71 }, b""),
            letter(Body::Lost { about: 2, follows: false, cause: cause(), exit: 69 }, b""),
            letter(Body::Leaving, b""),
            letter(Body::Taken { messages: 1, bytes: 2, urgent: 3 }, b""),
        ]
    }

    fn over_the_wire(letter: Letter) -> Mail {
        Mail::deserialize(Mail::Letter(letter).serialize().expect("a letter")).expect("always something")
    }

    #[test]
    fn letters_arrive_as_sent() {
        for letter in all() {
            assert_eq!(over_the_wire(letter.clone()), Mail::Letter(letter));
        }
        let cause = bounded("é".repeat(CAUSE_BYTES_MAX));
        let longest = letter(Body::Failed { follows: true, cause, exit: 71 }, b"");
        assert_eq!(over_the_wire(longest.clone()), Mail::Letter(longest));
    }

    #[test]
    fn what_is_no_letter_is_garbled() {
        for letter in all() {
            let bytes = letter.write().expect("short");
            let payload = letter.payload.len();
            for length in 0..bytes.len() - payload {
                assert!(Letter::read(&bytes[..length]).is_err(), "{letter:?} cut to {length}");
            }
            if !matches!(letter.body, Body::Told { .. }) {
                assert_eq!(Letter::read(&[&bytes[..], &[0]].concat()), Err("too many bytes"));
            }
            assert_eq!(Letter::read(&[&[VERSION + 1], &bytes[1..]].concat()), Err("another version"));
        }
        let long = letter(Body::Told { topic: 0 }, &vec![0; MESSAGE_BYTES_MAX + 1]);
        assert_eq!(over_the_wire(long), Mail::Garbled("too many bytes"));
    }

    proptest::proptest! {
        /// Whatever a peer sends, reading ends, and takes no more memory than the bytes that came.
        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = Letter::read(&bytes);
            if let Some(first) = bytes.first_mut() {
                *first = VERSION;
            }
            let _ = Letter::read(&bytes);
        }
    }
}
