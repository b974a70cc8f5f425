//! Checks properties of the header decoder that must hold for any bytes from a peer. Used by fuzzing and by tests.

use super::frame::{HEADER_BYTES_MAX, Header, Kind, readable};

/// Valid headers of every kind.
pub fn samples() -> Vec<Vec<u8>> {
    let sample = |kind| {
        let header = Header { kind, group: 1, sender: 2, sequence: 3, digest: 4, length: 4096 };
        let mut bytes = Vec::new();
        header.encode("all-reduce Sum of F32 [3, 4]\nbroadcast", &mut bytes);
        bytes
    };
    Kind::ALL.map(sample).into()
}

/// Checks that a header has only one encoding, of at most [`HEADER_BYTES_MAX`] bytes, and that its text is displayable.
///
/// # Panics
/// When one of these properties does not hold.
pub fn check(bytes: &[u8]) {
    let Ok(Some((header, text))) = Header::decode(bytes) else { return };
    let used = Header::bytes(text);
    assert!(used <= HEADER_BYTES_MAX.min(bytes.len()));
    if let Ok(text) = str::from_utf8(text) {
        let mut written = Vec::new();
        header.encode(text, &mut written);
        assert_eq!(written, bytes[..used]);
    }
    let shown = readable(text);
    // An invalid UTF-8 byte is displayed as a character of three bytes.
    assert!(shown.len() <= 3 * text.len() && !shown.contains(char::is_control));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_hold_for_truncated_and_corrupted_samples() {
        for sample in samples() {
            for at in 0..sample.len() {
                check(&sample[..at]);
                for value in 0..=u8::MAX {
                    let mut changed = sample.clone();
                    changed[at] = value;
                    check(&changed);
                }
            }
        }
    }
}
