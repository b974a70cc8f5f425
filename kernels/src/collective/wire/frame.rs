//! The header that precedes every transfer, and its encoding. All functions are pure and do not trust received bytes.
//!
//! ```text
//! offset  0  magic u32         8  group u32       16  sequence u64     32  length u64
//!         4  version u16      12  sender u32      24  digest u64       40  text (UTF-8)
//!         6  kind u8, text's length u8                                     (all little-endian)
//! ```

const MAGIC: u32 = u32::from_le_bytes(*b"sfwr");

/// Incremented with every change of the wire format.
const VERSION: u16 = 1;

/// Bytes of a header without its text.
const FIXED_BYTES: usize = 40;

pub(super) const TEXT_BYTES_MAX: usize = 200;

pub(super) const HEADER_BYTES_MAX: usize = FIXED_BYTES + TEXT_BYTES_MAX;

/// What a header announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `length` bytes of a call follow; the text describes the call.
    Data = 1,
    /// The sender has waited for a while in the call that the text describes. No bytes follow.
    Waiting = 2,
    /// The sender has failed: the member in field `length` makes a different call. The text is the expected call, a
    /// newline, and the member's call.
    Mismatch = 3,
    /// The sender has failed because the link from the rank in field `digest` to the rank in field `length` broke. The
    /// text is the cause.
    LinkLost = 4,
    /// The sender has failed for the reason in the text.
    Stopped = 5,
}

impl Kind {
    pub(super) const ALL: [Self; 5] = [Self::Data, Self::Waiting, Self::Mismatch, Self::LinkLost, Self::Stopped];
}

/// A header without its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) group: u32,
    pub(super) sender: u32,
    /// Number of calls that sender and receiver completed together before this call.
    pub(super) sequence: u64,
    /// Hash of what sender and receiver must agree on.
    pub(super) digest: u64,
    pub(super) length: u64,
}

impl Header {
    /// Appends the header's bytes, truncating the text to [`TEXT_BYTES_MAX`].
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u8>) {
        let text = &text[..text.floor_char_boundary(TEXT_BYTES_MAX)];
        out.extend(MAGIC.to_le_bytes());
        out.extend(VERSION.to_le_bytes());
        out.extend([self.kind as u8, text.len() as u8]);
        out.extend(self.group.to_le_bytes());
        out.extend(self.sender.to_le_bytes());
        out.extend(self.sequence.to_le_bytes());
        out.extend(self.digest.to_le_bytes());
        out.extend(self.length.to_le_bytes());
        out.extend(text.as_bytes());
    }

    /// Decodes the header at the start of `bytes`, and its text. Returns `None` when more bytes are needed.
    pub(super) fn decode(bytes: &[u8]) -> Result<Option<(Self, &[u8])>, String> {
        let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED_BYTES>() else {
            // Rejects garbage at its first bytes, without waiting for a whole header.
            let seen = bytes.len().min(4);
            return if bytes[..seen] == MAGIC.to_le_bytes()[..seen] { Ok(None) } else { Err(bad_magic(bytes)) };
        };
        let u32_at = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u32_at(0) != MAGIC {
            return Err(bad_magic(bytes));
        }
        let version = u16::from_le_bytes([fixed[4], fixed[5]]);
        if version != VERSION {
            return Err(format!("the header has version {version}, not {VERSION}; run the same binary on all ranks"));
        }
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u8 == fixed[6]);
        let kind = kind.ok_or_else(|| format!("unknown header kind {}", fixed[6]))?;
        let text_len = usize::from(fixed[7]);
        if text_len > TEXT_BYTES_MAX {
            return Err(format!("the header's text has {text_len} bytes; the maximum is {TEXT_BYTES_MAX}"));
        }
        let Some(text) = rest.get(..text_len) else { return Ok(None) };
        let header = Self {
            kind,
            group: u32_at(8),
            sender: u32_at(12),
            sequence: u64_at(16),
            digest: u64_at(24),
            length: u64_at(32),
        };
        Ok(Some((header, text)))
    }

    pub(super) fn bytes(text: &[u8]) -> usize {
        FIXED_BYTES + text.len()
    }
}

fn bad_magic(bytes: &[u8]) -> String {
    format!("received bytes that are not a transfer header: {:02x?}", &bytes[..bytes.len().min(8)])
}

/// Replaces control characters in a peer's text, so that it can be displayed.
pub(super) fn readable(text: &[u8]) -> String {
    String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header =
        Header { kind: Kind::LinkLost, group: 7, sender: 3, sequence: 1 << 40, digest: u64::MAX - 1, length: 12 };

    #[test]
    fn decoding_reverses_encoding() {
        for text in ["", "all_reduce of 3", &"ü".repeat(150)] {
            let mut bytes = Vec::new();
            HEADER.encode(text, &mut bytes);
            assert!(bytes.len() <= HEADER_BYTES_MAX);
            for cut in 0..bytes.len() {
                assert_eq!(Header::decode(&bytes[..cut]), Ok(None), "{cut}");
            }
            let (header, read) = Header::decode(&bytes).unwrap().unwrap();
            assert_eq!(header, HEADER);
            assert!(text.as_bytes().starts_with(read) && Header::bytes(read) == bytes.len());
            bytes.push(0);
            assert_eq!(Header::decode(&bytes).unwrap().unwrap().1.len(), bytes.len() - 1 - FIXED_BYTES);
        }
    }

    #[test]
    fn invalid_headers_are_rejected() {
        let mut bytes = Vec::new();
        HEADER.encode("text", &mut bytes);
        for (at, value) in [(0, b'x'), (4, 9), (6, 0), (6, 6), (7, 201)] {
            let mut bad = bytes.clone();
            bad[at] = value;
            assert!(Header::decode(&bad).is_err(), "byte {at} = {value}");
        }
        assert!(Header::decode(b"GE").is_err());
    }
}
