//! Frames of a register connection: messages, and headers of register data.
//!
//! [`FRAME_BYTES`] bytes, little-endian. Unused fields are zero, so each frame has exactly one encoding:
//!
//! ```text
//! 0 magic "SF" │ 2 version │ 3 kind │ 4 register │ 8 reader │ 12 slot │ 16 piece │ 24 bytes
//! ```
//!
//! Frames contain neither session nor epoch: the handshake fixes both for a connection.

use crate::protocol::Message;
use crate::spec::RegisterId;

/// Size of a frame in bytes, without the data that follows it.
pub const FRAME_BYTES: usize = 32;
/// Any change to the layout increments it.
pub const FRAME_VERSION: u8 = 1;

const MAGIC: [u8; 2] = *b"SF";
const FILLED: u8 = 1;
const RELEASED: u8 = 2;
const DATA: u8 = 3;
const HOST: u8 = 4;
const READY: u8 = 5;
const BYE: u8 = 6;

/// One message on a register connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the comments of the variants name the fields")]
pub enum Frame {
    /// A message between actors. Before `Filled`, all bytes of the piece have been sent or are in shared memory.
    Message(Message),
    /// `bytes` raw bytes follow: the parts of the slot that the receiver's readers read, in order. If the register uses
    /// a pipe, no bytes follow; the pipe carries them.
    Data { register: RegisterId, slot: u32, piece: u64, bytes: u64 },
    /// `bytes` raw bytes follow: the tensors of a host port, in order.
    Host { port: u32, bytes: u64 },
    /// The sender has sent the bytes of its initial registers for the `round`th time, counted from 1.
    Ready { round: u64 },
    /// The last frame: the sender closes the connection in order.
    Bye,
}

/// A header that no correct peer sends.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the texts describe variants and fields")]
pub enum FrameError {
    /// Not the start of a frame: the stream is out of sync.
    #[error("invalid frame magic {got:02x?}")]
    Magic { got: [u8; 2] },
    #[error("frame version {got}, expected {FRAME_VERSION}")]
    Version { got: u8 },
    #[error("unknown frame kind {kind}")]
    Kind { kind: u8 },
    #[error("frame kind {kind}: field '{field}' is {value}, expected 0")]
    Unused { kind: u8, field: &'static str, value: u64 },
}

impl Frame {
    /// Encodes the frame.
    pub fn encode(&self) -> [u8; FRAME_BYTES] {
        let (kind, register, reader, slot, piece, bytes) = match *self {
            Self::Message(Message::Filled { register, reader, slot, piece }) => {
                (FILLED, register.0, reader, slot, piece, 0)
            }
            Self::Message(Message::Released { register, reader, slot, piece }) => {
                (RELEASED, register.0, reader, slot, piece, 0)
            }
            Self::Data { register, slot, piece, bytes } => (DATA, register.0, 0, slot, piece, bytes),
            Self::Host { port, bytes } => (HOST, port, 0, 0, 0, bytes),
            Self::Ready { round } => (READY, 0, 0, 0, round, 0),
            Self::Bye => (BYE, 0, 0, 0, 0, 0),
        };
        let mut frame = [0; FRAME_BYTES];
        frame[..2].copy_from_slice(&MAGIC);
        frame[2] = FRAME_VERSION;
        frame[3] = kind;
        frame[4..8].copy_from_slice(&register.to_le_bytes());
        frame[8..12].copy_from_slice(&reader.to_le_bytes());
        frame[12..16].copy_from_slice(&slot.to_le_bytes());
        frame[16..24].copy_from_slice(&piece.to_le_bytes());
        frame[24..].copy_from_slice(&bytes.to_le_bytes());
        frame
    }

    /// Decodes a frame. The caller must check that registers, slots and ports exist and that the data has the right
    /// length.
    ///
    /// # Errors
    /// The first invalid field.
    pub fn decode(frame: &[u8; FRAME_BYTES]) -> Result<Self, FrameError> {
        let magic = [frame[0], frame[1]];
        if magic != MAGIC {
            return Err(FrameError::Magic { got: magic });
        }
        if frame[2] != FRAME_VERSION {
            return Err(FrameError::Version { got: frame[2] });
        }
        let (kind, id, reader, slot) = (frame[3], u32_at(frame, 4), u32_at(frame, 8), u32_at(frame, 12));
        let (piece, bytes, register) = (u64_at(frame, 16), u64_at(frame, 24), RegisterId(id));
        let decoded = match kind {
            FILLED => Self::Message(Message::Filled { register, reader, slot, piece }),
            RELEASED => Self::Message(Message::Released { register, reader, slot, piece }),
            DATA => Self::Data { register, slot, piece, bytes },
            HOST => Self::Host { port: id, bytes },
            READY => Self::Ready { round: piece },
            BYE => Self::Bye,
            kind => return Err(FrameError::Kind { kind }),
        };
        let used = decoded.encode();
        let fields = [("register", 4..8), ("reader", 8..12), ("slot", 12..16), ("piece", 16..24), ("bytes", 24..32)];
        match fields.into_iter().find(|(_, at)| used[at.clone()] != frame[at.clone()]) {
            None => Ok(decoded),
            Some((field, at)) => {
                let value = if at.len() == 8 { u64_at(frame, at.start) } else { u32_at(frame, at.start).into() };
                Err(FrameError::Unused { kind, field, value })
            }
        }
    }
}

fn u32_at(frame: &[u8; FRAME_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| frame[at + i]))
}

fn u64_at(frame: &[u8; FRAME_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| frame[at + i]))
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

        /// Each frame has exactly one encoding: a decoded frame encodes to the same bytes.
        #[test]
        fn decodable_bytes_are_the_encoding_of_their_frame(
            mut frame in prop::array::uniform32(any::<u8>()), kind in 0u8..8, zeroed in 0usize..32,
        ) {
            frame[..4].copy_from_slice(&[b'S', b'F', FRAME_VERSION, kind]);
            frame[zeroed.max(4)..].fill(0);
            match Frame::decode(&frame) {
                Ok(decoded) => prop_assert_eq!(decoded.encode(), frame),
                Err(FrameError::Kind { kind: got }) => prop_assert!(got == kind && !(1..=6).contains(&kind)),
                Err(error) => prop_assert!(matches!(error, FrameError::Unused { .. }), "{error}"),
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
        let data = Frame::Data { register: RegisterId(3), slot: 1, piece: 9, bytes: 8 };
        assert_eq!(error_after(Frame::Bye, |b| b[0] = b'X'), FrameError::Magic { got: [b'X', b'F'] });
        assert_eq!(error_after(Frame::Bye, |b| b[2] = 9), FrameError::Version { got: 9 });
        assert_eq!(error_after(Frame::Bye, |b| b[3] = 77), FrameError::Kind { kind: 77 });
        assert_eq!(error_after(Frame::Bye, |b| b[16] = 5), FrameError::Unused { kind: BYE, field: "piece", value: 5 });
        assert_eq!(error_after(data, |b| b[8] = 2), FrameError::Unused { kind: DATA, field: "reader", value: 2 });
    }
}
