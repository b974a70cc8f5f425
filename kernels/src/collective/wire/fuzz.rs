//! What must hold for the decoder of headers, whatever a peer sends; for fuzzing and for tests.

use super::frame::{HEADER_BYTES_MAX, Header, Kind, readable};

/// Headers as peers send them.
pub fn samples() -> Vec<Vec<u8>> {
    let kinds = [Kind::Data, Kind::Waiting, Kind::Mismatch, Kind::LinkLost, Kind::Stopped];
    let sample = |kind| {
        let header = Header { kind, group: 1, sender: 2, sequence: 3, digest: 4, length: 4096 };
        let mut bytes = Vec::new();
        header.encode("all-reduce Sum of F32 [3, 4]\nbroadcast", &mut bytes);
        bytes
    };
    kinds.map(sample).into()
}

/// A header is written in one way only, is not longer than what is read ahead for it, and its text can be shown.
///
/// # Panics
/// When one of these does not hold.
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
    // A byte that is no UTF-8 is shown by a character of three.
    assert!(shown.len() <= 3 * text.len() && !shown.contains(char::is_control));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_for_samples_with_any_byte_changed_and_cut_anywhere() {
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
