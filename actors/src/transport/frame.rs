//! The header of the register connection: what goes before a register's bytes, and the messages that have none. Imports
//! `spec` (ids) and `protocol`'s message.
//!
//! [`FRAME_BYTES`] bytes, little-endian; bytes that a kind does not use are zero, so a frame is written in one way only:
//!
//! ```text
//! 0 magic "SF" │ 2 version │ 3 kind │ 4 register │ 8 reader │ 12 slot │ 16 piece │ 24 offset │ 32 bytes
//! ```
//!
//! Session and epoch are not in it: a connection belongs to one of each, from its handshake on.

use crate::protocol::Message;
use crate::spec::RegisterId;

/// Bytes of every frame, without what follows it.
pub const FRAME_BYTES: usize = 40;
/// Goes up with any change to the layout.
pub const FRAME_VERSION: u8 = 1;

const MAGIC: [u8; 2] = *b"SF";
const FILLED: u8 = 1;
const RELEASED: u8 = 2;
const DATA: u8 = 3;
const BYE: u8 = 4;

/// One message on a register connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// [`Message::Filled`]: its bytes have all been sent, or lie in shared memory.
    Filled {
        /// The register.
        register: RegisterId,
        /// Index in the register's readers.
        reader: u32,
        /// Where the piece lies.
        slot: u32,
        /// Its number.
        piece: u64,
    },
    /// [`Message::Released`].
    Released {
        /// The register.
        register: RegisterId,
        /// Index in the register's readers.
        reader: u32,
        /// Where the piece lies.
        slot: u32,
        /// Its number.
        piece: u64,
    },
    /// `bytes` raw bytes follow, to be put at `offset` into the slot.
    Data {
        /// The register.
        register: RegisterId,
        /// Where the piece lies.
        slot: u32,
        /// Its number.
        piece: u64,
        /// Place in the slot, in bytes.
        offset: u64,
        /// Bytes that follow.
        bytes: u64,
    },
    /// Nothing will follow: the sender ends the connection in order.
    Bye,
}

/// A header that no correct peer sends.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// Not a frame: the two sides have lost each other's place.
    #[error("no frame begins with {got:02x?}")]
    Magic {
        /// The first bytes.
        got: [u8; 2],
    },
    /// A frame of another version.
    #[error("frame version {theirs}, expected {FRAME_VERSION}")]
    Version {
        /// The version.
        theirs: u8,
    },
    /// A kind that there is not.
    #[error("unknown frame kind {kind}")]
    Kind {
        /// The kind.
        kind: u8,
    },
    /// More bytes than a slot of this connection can hold.
    #[error("register {register}: {bytes} bytes at offset {offset}, a slot has {bytes_max} at most")]
    TooLong {
        /// The register.
        register: u32,
        /// Place in the slot.
        offset: u64,
        /// Bytes announced.
        bytes: u64,
        /// Bytes of the largest slot.
        bytes_max: u64,
    },
    /// A field that this kind does not have is not zero.
    #[error("frame kind {kind}: field '{field}' is {value}, expected 0")]
    Unused {
        /// The kind.
        kind: u8,
        /// Which field.
        field: &'static str,
        /// What stands there.
        value: u64,
    },
}

impl Frame {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; FRAME_BYTES] {
        // kind, register, reader, slot, piece, offset, bytes
        let (kind, register, reader, slot, piece, offset, bytes) = match *self {
            Self::Filled { register, reader, slot, piece } => (FILLED, register.0, reader, slot, piece, 0, 0),
            Self::Released { register, reader, slot, piece } => (RELEASED, register.0, reader, slot, piece, 0, 0),
            Self::Data { register, slot, piece, offset, bytes } => (DATA, register.0, 0, slot, piece, offset, bytes),
            Self::Bye => (BYE, 0, 0, 0, 0, 0, 0),
        };
        let mut frame = [0; FRAME_BYTES];
        frame[..2].copy_from_slice(&MAGIC);
        frame[2] = FRAME_VERSION;
        frame[3] = kind;
        frame[4..8].copy_from_slice(&register.to_le_bytes());
        frame[8..12].copy_from_slice(&reader.to_le_bytes());
        frame[12..16].copy_from_slice(&slot.to_le_bytes());
        frame[16..24].copy_from_slice(&piece.to_le_bytes());
        frame[24..32].copy_from_slice(&offset.to_le_bytes());
        frame[32..].copy_from_slice(&bytes.to_le_bytes());
        frame
    }

    /// The frame that these bytes are. Data must end within `bytes_max`, the size of the largest slot; that the register and
    /// the slot exist, and have room, is for the caller to check.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn decode(frame: &[u8; FRAME_BYTES], bytes_max: u64) -> Result<Self, FrameError> {
        let magic = [frame[0], frame[1]];
        if magic != MAGIC {
            return Err(FrameError::Magic { got: magic });
        }
        if frame[2] != FRAME_VERSION {
            return Err(FrameError::Version { theirs: frame[2] });
        }
        let (kind, register, reader, slot) = (frame[3], u32_at(frame, 4), u32_at(frame, 8), u32_at(frame, 12));
        let (piece, offset, bytes) = (u64_at(frame, 16), u64_at(frame, 24), u64_at(frame, 32));
        let unused = |fields: &[(&'static str, u64)]| match fields.iter().find(|(_, value)| *value != 0) {
            Some(&(field, value)) => Err(FrameError::Unused { kind, field, value }),
            None => Ok(()),
        };
        let id = RegisterId(register);
        match kind {
            FILLED => {
                unused(&[("offset", offset), ("bytes", bytes)])?;
                Ok(Self::Filled { register: id, reader, slot, piece })
            }
            RELEASED => {
                unused(&[("offset", offset), ("bytes", bytes)])?;
                Ok(Self::Released { register: id, reader, slot, piece })
            }
            DATA => {
                unused(&[("reader", reader.into())])?;
                if offset.checked_add(bytes).is_none_or(|end| end > bytes_max) {
                    return Err(FrameError::TooLong { register, offset, bytes, bytes_max });
                }
                Ok(Self::Data { register: id, slot, piece, offset, bytes })
            }
            BYE => {
                let ids = [("register", register), ("reader", reader), ("slot", slot)];
                unused(&ids.map(|(field, value)| (field, value.into())))?;
                unused(&[("piece", piece), ("offset", offset), ("bytes", bytes)])?;
                Ok(Self::Bye)
            }
            kind => Err(FrameError::Kind { kind }),
        }
    }

    /// The protocol's message that this frame carries; `None` for data and the end.
    pub fn message(&self) -> Option<Message> {
        match *self {
            Self::Filled { register, reader, slot, piece } => Some(Message::Filled { register, reader, slot, piece }),
            Self::Released { register, reader, slot, piece } => {
                Some(Message::Released { register, reader, slot, piece })
            }
            Self::Data { .. } | Self::Bye => None,
        }
    }
}

impl From<Message> for Frame {
    fn from(message: Message) -> Self {
        match message {
            Message::Filled { register, reader, slot, piece } => Self::Filled { register, reader, slot, piece },
            Message::Released { register, reader, slot, piece } => Self::Released { register, reader, slot, piece },
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
        let ids = (any::<u32>(), any::<u32>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<u64>());
        (0..4, ids).prop_map(|(kind, (register, reader, slot, piece, offset, bytes))| {
            let register = RegisterId(register);
            match kind {
                0 => Frame::Filled { register, reader, slot, piece },
                1 => Frame::Released { register, reader, slot, piece },
                2 => Frame::Data { register, slot, piece, offset, bytes: bytes.min(u64::MAX - offset) },
                _ => Frame::Bye,
            }
        })
    }

    proptest! {
        #[test]
        fn a_frame_comes_back(frame in frames()) {
            prop_assert_eq!(Frame::decode(&frame.encode(), u64::MAX), Ok(frame));
            if let Some(message) = frame.message() {
                prop_assert_eq!(Frame::from(message), frame);
            }
        }

        /// One way only to write a frame: whatever decodes, encodes to the same bytes.
        #[test]
        fn any_bytes_are_that_frame_or_an_error(
            mut bytes in prop::array::uniform32(any::<u8>()), tail in any::<u64>(), kind in 0u8..6, limit in any::<u64>(),
            zeroed in 0usize..32,
        ) {
            bytes[..4].copy_from_slice(&[b'S', b'F', FRAME_VERSION, kind]);
            bytes[zeroed.max(4)..].fill(0);
            let mut frame = [0; FRAME_BYTES];
            frame[..32].copy_from_slice(&bytes);
            frame[32..].copy_from_slice(&(if zeroed % 2 == 0 { 0 } else { tail }).to_le_bytes());
            match Frame::decode(&frame, limit) {
                Ok(decoded) => {
                    prop_assert_eq!(decoded.encode(), frame);
                    if let Frame::Data { offset, bytes, .. } = decoded {
                        prop_assert!(offset + bytes <= limit);
                    }
                }
                Err(FrameError::Kind { kind: got }) => prop_assert!(got == kind && !(1..=4).contains(&kind)),
                Err(error) => {
                    let expected = matches!(error, FrameError::TooLong { .. } | FrameError::Unused { .. });
                    prop_assert!(expected, "{error}");
                }
            }
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let data = |offset, bytes| Frame::Data { register: RegisterId(3), slot: 1, piece: 9, offset, bytes };
        let check = |frame: Frame, change: fn(&mut [u8; FRAME_BYTES])| {
            let mut bytes = frame.encode();
            change(&mut bytes);
            Frame::decode(&bytes, 100).unwrap_err()
        };
        assert_eq!(check(Frame::Bye, |b| b[0] = b'X'), FrameError::Magic { got: [b'X', b'F'] });
        assert_eq!(check(Frame::Bye, |b| b[2] = 9), FrameError::Version { theirs: 9 });
        assert_eq!(check(Frame::Bye, |b| b[3] = 77), FrameError::Kind { kind: 77 });
        assert_eq!(check(Frame::Bye, |b| b[16] = 5), FrameError::Unused { kind: BYE, field: "piece", value: 5 });
        assert_eq!(check(data(0, 8), |b| b[8] = 2), FrameError::Unused { kind: DATA, field: "reader", value: 2 });
        let too_long = |offset, bytes| FrameError::TooLong { register: 3, offset, bytes, bytes_max: 100 };
        assert_eq!(check(data(60, 41), |_| {}), too_long(60, 41));
        // The sum wraps round.
        assert_eq!(check(data(u64::MAX, 2), |_| {}), too_long(u64::MAX, 2));
        assert!(Frame::decode(&data(60, 40).encode(), 100).is_ok());
    }
}
