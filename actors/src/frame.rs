//! Frames of a register connection: messages, and headers of register data.
//!
//! Each frame has [`FRAME_BYTES`] bytes: magic "SF", the version, the [`Frame`] value as bincode with fixed-size
//! little-endian numbers, and padding zeros. Each value has exactly one encoding. Frames omit session and epoch: the
//! handshake fixes both.

use bincode::config::{Configuration, Fixint, LittleEndian, legacy};
use serde::{Deserialize, Serialize};

use crate::protocol::Message;
use crate::spec::RegisterId;

/// Size of a frame in bytes, without the data that follows it.
pub const FRAME_BYTES: usize = 32;
/// Version of the frame layout. Every change to the layout increments it.
pub const FRAME_VERSION: u8 = 2;

const MAGIC: [u8; 2] = *b"SF";
const HEAD_BYTES: usize = 3;
const CONFIG: Configuration<LittleEndian, Fixint> = legacy();

/// One message on a register connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the comments of the variants name the fields")]
pub enum Frame {
    /// A message between actors. `Filled` is sent only after all bytes of the piece were sent or are in shared memory.
    Message(Message),
    /// Announces `bytes` raw bytes: the parts of the slot that the receiver's readers read, in the plan's order. If the
    /// register uses a pipe (a direct transfer between GPUs), the pipe carries them. Otherwise, they follow this frame.
    Data { register: RegisterId, slot: u32, piece: u64, bytes: u64 },
    /// `bytes` raw bytes follow: the tensors of a host port, in the order in which the port lists them.
    Host { port: u32, bytes: u64 },
    /// The sender has sent the bytes of its initial registers for the `round`th time, counted from 1.
    Ready { round: u64 },
    /// The last frame before the sender closes the connection in an orderly way.
    Bye,
}

/// Why a frame is invalid. No correct peer sends such a frame.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the texts describe variants and fields")]
pub enum FrameError {
    /// The bytes are not the start of a frame, because the stream is out of sync.
    #[error("invalid frame magic {got:02x?}")]
    Magic { got: [u8; 2] },
    #[error("frame version {got}, expected {FRAME_VERSION}")]
    Version { got: u8 },
    #[error("malformed frame: {message}")]
    Malformed { message: String },
}

impl Frame {
    /// Encodes the frame.
    pub fn encode(&self) -> [u8; FRAME_BYTES] {
        let mut frame = [0; FRAME_BYTES];
        frame[..2].copy_from_slice(&MAGIC);
        frame[2] = FRAME_VERSION;
        bincode::serde::encode_into_slice(self, &mut frame[HEAD_BYTES..], CONFIG).expect("the longest frame fits");
        frame
    }

    /// Decodes a frame. The caller must check the data's length, and check that registers, slots and ports exist.
    pub fn decode(frame: &[u8; FRAME_BYTES]) -> Result<Self, FrameError> {
        let &[first, second, version, ref body @ ..] = frame;
        if [first, second] != MAGIC {
            return Err(FrameError::Magic { got: [first, second] });
        }
        if version != FRAME_VERSION {
            return Err(FrameError::Version { got: version });
        }
        let malformed = |message| FrameError::Malformed { message };
        let (decoded, used) =
            bincode::serde::decode_from_slice(body, CONFIG).map_err(|error| malformed(error.to_string()))?;
        match body[used..].iter().find(|byte| **byte != 0) {
            None => Ok(decoded),
            Some(byte) => Err(malformed(format!("an unused byte is {byte}, expected 0"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let ids = (any::<u32>(), any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>());
        (0..6, ids).prop_map(|(kind, (id, reader, slot, piece, bytes))| {
            let register = RegisterId(id);
            match kind {
                0 => Frame::Message(Message::Filled { register, reader, slot, piece }),
                1 => Frame::Message(Message::Released { register, reader, slot, piece }),
                2 => Frame::Data { register, slot, piece, bytes },
                3 => Frame::Host { port: id, bytes },
                4 => Frame::Ready { round: piece },
                _ => Frame::Bye,
            }
        })
    }

    proptest! {
        #[test]
        fn a_decoded_frame_equals_the_encoded_one(frame in frames()) {
            prop_assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
        }

        #[test]
        fn decodable_bytes_are_the_encoding_of_their_frame(
            mut frame in prop::array::uniform32(any::<u8>()), kind in 0u8..8, zeroed in 0usize..32,
        ) {
            frame[..7].copy_from_slice(&[b'S', b'F', FRAME_VERSION, kind, 0, 0, 0]);
            frame[zeroed.max(7)..].fill(0);
            match Frame::decode(&frame) {
                Ok(decoded) => prop_assert_eq!(decoded.encode(), frame),
                Err(error) => prop_assert!(matches!(error, FrameError::Malformed { .. }), "{error}"),
            }
        }
    }

    #[test]
    fn errors_name_the_invalid_field() {
        let error_after = |frame: Frame, change: fn(&mut [u8; FRAME_BYTES])| {
            let mut bytes = frame.encode();
            change(&mut bytes);
            Frame::decode(&bytes).unwrap_err()
        };
        let malformed = |error| matches!(error, FrameError::Malformed { .. });
        assert_eq!(error_after(Frame::Bye, |b| b[0] = b'X'), FrameError::Magic { got: [b'X', b'F'] });
        assert_eq!(error_after(Frame::Bye, |b| b[2] = 9), FrameError::Version { got: 9 });
        assert!(malformed(error_after(Frame::Bye, |b| b[3] = 77)), "an unknown kind is accepted");
        assert!(malformed(error_after(Frame::Bye, |b| b[16] = 5)), "a wrong unused byte is accepted");
        assert!(malformed(error_after(Frame::Ready { round: 1 }, |b| b[31] = 2)), "a wrong last byte is accepted");
    }
}
