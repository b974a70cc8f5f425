//! How structured messages become bytes: the one bincode configuration, and messages behind their length. Tensors do not
//! go this way.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of one message, at most; each reader may allow fewer.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// The length in front of a message: u32, little-endian.
const PREFIX_BYTES: usize = 4;

const CONFIG: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<MESSAGE_BYTES_MAX>,
> = bincode::config::standard().with_limit::<MESSAGE_BYTES_MAX>();

/// A message that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The system failed the read or write; [`io::ErrorKind::UnexpectedEof`] when the other side closed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A length that is not allowed here.
    #[error("a message of {bytes} bytes, at most {bytes_max} are allowed")]
    TooLong {
        /// Bytes announced, or to be sent.
        bytes: usize,
        /// Bytes allowed.
        bytes_max: usize,
    },
    /// Bytes that are not such a message.
    #[error("not a message of this kind: {message}")]
    Malformed {
        /// What the decoder says.
        message: String,
    },
    /// Bytes left over behind a message.
    #[error("{left} bytes are left behind a message of {bytes}")]
    Trailing {
        /// Bytes of the message.
        bytes: usize,
        /// Bytes after it.
        left: usize,
    },
}

impl WireError {
    /// True when a time-out passed.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Io(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
    }
}

/// The bytes of a message.
///
/// # Errors
/// [`WireError::Malformed`] for a value that bincode does not know how to write, such as a path that is not UTF-8.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    bincode::serde::encode_to_vec(value, CONFIG).map_err(|e| WireError::Malformed { message: e.to_string() })
}

/// The message that these bytes, all of them, are. It allocates no more than a small multiple of their number.
///
/// # Errors
/// [`WireError::Malformed`], [`WireError::Trailing`], [`WireError::TooLong`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(WireError::TooLong { bytes: bytes.len(), bytes_max: MESSAGE_BYTES_MAX });
    }
    // A text is allocated at the length that it claims, before its bytes are looked at. So short messages have lower limits:
    // sixteen times their bytes, for a number of one byte counts as eight.
    let decoded = match bytes.len() {
        0..=0x1000 => bincode::serde::decode_from_slice(bytes, CONFIG.with_limit::<0x1_0000>()),
        0x1001..=0x1_0000 => bincode::serde::decode_from_slice(bytes, CONFIG.with_limit::<0x10_0000>()),
        _ => bincode::serde::decode_from_slice(bytes, CONFIG),
    };
    let (value, used) = decoded.map_err(|e| WireError::Malformed { message: e.to_string() })?;
    if used != bytes.len() {
        return Err(WireError::Trailing { bytes: used, left: bytes.len() - used });
    }
    Ok(value)
}

/// Writes a message behind its length, in one call.
///
/// # Errors
/// Those of [`encode`], [`WireError::TooLong`] over `bytes_max`, [`WireError::Io`].
pub fn write_message<T: Serialize>(to: &mut impl Write, value: &T, bytes_max: usize) -> Result<(), WireError> {
    let body = encode(value)?;
    let bytes_max = bytes_max.min(MESSAGE_BYTES_MAX);
    if body.len() > bytes_max {
        return Err(WireError::TooLong { bytes: body.len(), bytes_max });
    }
    let mut message = Vec::with_capacity(PREFIX_BYTES + body.len());
    message.extend_from_slice(&(body.len() as u32).to_le_bytes());
    message.extend_from_slice(&body);
    to.write_all(&message)?;
    Ok(())
}

/// Reads one message that [`write_message`] wrote. Memory grows with what has come, not with the length that is said.
///
/// # Errors
/// Those of [`decode`], [`WireError::TooLong`] over `bytes_max`, [`WireError::Io`].
pub fn read_message<T: DeserializeOwned>(from: &mut impl Read, bytes_max: usize) -> Result<T, WireError> {
    let mut prefix = [0; PREFIX_BYTES];
    from.read_exact(&mut prefix)?;
    let bytes = u32::from_le_bytes(prefix) as usize;
    let bytes_max = bytes_max.min(MESSAGE_BYTES_MAX);
    if bytes > bytes_max {
        return Err(WireError::TooLong { bytes, bytes_max });
    }
    let mut body = Vec::new();
    from.take(bytes as u64).read_to_end(&mut body)?;
    if body.len() < bytes {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    decode(&body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Sample = (u64, String, Vec<(u32, Option<bool>)>);

    fn sample() -> Sample {
        (7, "seven".into(), vec![(1, None), (2, Some(true))])
    }

    #[test]
    fn a_message_comes_back_and_two_do_not_run_into_each_other() {
        let mut pipe = Vec::new();
        write_message(&mut pipe, &sample(), 100).unwrap();
        write_message(&mut pipe, &1u8, 100).unwrap();
        let mut from = &pipe[..];
        assert_eq!(read_message::<Sample>(&mut from, 100).unwrap(), sample());
        assert_eq!(read_message::<u8>(&mut from, 100).unwrap(), 1);
        assert!(
            matches!(read_message::<u8>(&mut from, 100), Err(WireError::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof)
        );
    }

    #[test]
    fn lengths_are_checked_before_they_are_believed() {
        assert!(matches!(write_message(&mut Vec::new(), &sample(), 5), Err(WireError::TooLong { bytes_max: 5, .. })));
        let announced = u32::MAX.to_le_bytes();
        let too_long = read_message::<Sample>(&mut &announced[..], usize::MAX);
        assert!(matches!(too_long, Err(WireError::TooLong { bytes_max: MESSAGE_BYTES_MAX, .. })));
        // A string that claims to be as long as the address space.
        let mut bytes = vec![253];
        bytes.extend_from_slice(&(u64::MAX / 2).to_le_bytes());
        assert!(matches!(decode::<String>(&bytes), Err(WireError::Malformed { .. })));
        assert!(matches!(decode::<Vec<u64>>(&bytes), Err(WireError::Malformed { .. })));
        // Or a few MiB, in a message of a few bytes.
        let bytes = [&[252][..], &(5u32 << 20).to_le_bytes()].concat();
        assert!(matches!(decode::<String>(&bytes), Err(WireError::Malformed { message }) if message.contains("Limit")));
        let numbers: Vec<u64> = vec![1; 4000];
        assert_eq!(decode::<Vec<u64>>(&encode(&numbers).unwrap()).unwrap(), numbers);
        let mut bytes = encode(&sample()).unwrap();
        bytes.push(0);
        assert!(matches!(decode::<Sample>(&bytes), Err(WireError::Trailing { left: 1, .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode::<Sample>(&bytes);
            let _ = read_message::<Sample>(&mut &bytes[..], 32);
        }

        #[test]
        fn a_cut_message_is_refused(cut in 0usize..20) {
            let bytes = encode(&sample()).unwrap();
            let cut = cut.min(bytes.len() - 1);
            prop_assert!(decode::<Sample>(&bytes[..cut]).is_err());
        }
    }
}
