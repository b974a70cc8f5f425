//! Encodes structured messages, with a length prefix if needed. Tensors are not sent this way.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Maximum size of a message in bytes. A reader may have a lower limit.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Size of the length prefix, a little-endian u32.
const PREFIX_BYTES: usize = 4;

const CONFIG: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<MESSAGE_BYTES_MAX>,
> = bincode::config::standard().with_limit::<MESSAGE_BYTES_MAX>();

/// Why a message could not be read or written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the error texts explain variants and fields")]
pub enum WireError {
    /// The read or write failed. The kind is [`io::ErrorKind::UnexpectedEof`] if the peer closed the connection.
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("a message of {bytes} bytes exceeds the maximum of {bytes_max} bytes")]
    TooLong { bytes: usize, bytes_max: usize },
    #[error("malformed message: {message}")]
    Malformed { message: String },
    #[error("{left} trailing bytes after a message of {bytes} bytes")]
    Trailing { bytes: usize, left: usize },
}

impl WireError {
    /// True if the error is a timeout.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Io(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
    }
}

/// Encodes a message.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    bincode::serde::encode_to_vec(value, CONFIG).map_err(|e| WireError::Malformed { message: e.to_string() })
}

/// Decodes a message from exactly these bytes. Allocates at most a small multiple of their size.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(WireError::TooLong { bytes: bytes.len(), bytes_max: MESSAGE_BYTES_MAX });
    }
    // bincode allocates memory for a text of the claimed length before it reads the text. So a message of at most 4 KiB
    // has a limit of 64 KiB, and one of at most 64 KiB has a limit of 1 MiB. A factor below 8 would be too small,
    // because bincode counts a number that is encoded in one byte as eight bytes.
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

/// Writes a message with its length prefix in one call.
pub fn write_message<T: Serialize>(to: &mut impl Write, value: &T, bytes_max: usize) -> Result<(), WireError> {
    let body = encode(value)?;
    let bytes_max = bytes_max.min(MESSAGE_BYTES_MAX);
    if body.len() > bytes_max {
        return Err(WireError::TooLong { bytes: body.len(), bytes_max });
    }
    to.write_all(&[&(body.len() as u32).to_le_bytes()[..], &body].concat())?;
    Ok(to.flush()?)
}

/// Reads a message of [`write_message`]. Memory use grows with the bytes received, not with the announced length.
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
    fn consecutive_messages_are_read_as_written() {
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
    fn lengths_are_checked_before_use() {
        assert!(matches!(write_message(&mut Vec::new(), &sample(), 5), Err(WireError::TooLong { bytes_max: 5, .. })));
        let announced = u32::MAX.to_le_bytes();
        let too_long = read_message::<Sample>(&mut &announced[..], usize::MAX);
        assert!(matches!(too_long, Err(WireError::TooLong { bytes_max: MESSAGE_BYTES_MAX, .. })));
        // The claimed length of this string exceeds the address space.
        let mut bytes = vec![253];
        bytes.extend_from_slice(&(u64::MAX / 2).to_le_bytes());
        assert!(matches!(decode::<String>(&bytes), Err(WireError::Malformed { .. })));
        assert!(matches!(decode::<Vec<u64>>(&bytes), Err(WireError::Malformed { .. })));
        // This message has a few bytes, but claims a string of several MiB.
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
        fn decoding_arbitrary_bytes_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode::<Sample>(&bytes);
            let _ = read_message::<Sample>(&mut &bytes[..], 32);
        }

        #[test]
        fn a_truncated_message_is_rejected(cut in 0usize..20) {
            let bytes = encode(&sample()).unwrap();
            let cut = cut.min(bytes.len() - 1);
            prop_assert!(decode::<Sample>(&bytes[..cut]).is_err());
        }
    }
}
