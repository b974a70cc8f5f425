//! What must hold for the decoders of heartbeats and letters, whatever a peer sends; for fuzzing and for tests.
use super::datagram::{BYTES, Codec, Refusal};
use super::letter::{Body, Letter, MESSAGE_BYTES_MAX};

const EPOCH: u64 = 3;
const PROCESSES: u32 = 4;

fn codec(key: u8) -> Codec {
    Codec::new(&[key; 32], [9; 16], EPOCH, PROCESSES)
}

/// Letters as peers send them, and a heartbeat that was signed with another key.
pub fn samples() -> Vec<Vec<u8>> {
    let cause = || "rank 1: out of memory".to_string();
    let bodies = [
        Body::Message { topic: 7 },
        Body::Failed { follows: true, cause: cause(), exit: 71 },
        Body::Lost { about: 2, follows: false, cause: cause(), exit: 69 },
        Body::Leaving,
        Body::Received { urgent: 3 },
    ];
    let letters = bodies.map(|body| Letter::from(body).write());
    letters.into_iter().chain([codec(8).write(2, 5, 77, Some(1)).to_vec()]).collect()
}

/// A datagram without the key is never taken. With it, what is taken is of this epoch, from a process that there is, is
/// written in one way only, and is taken once.
///
/// # Panics
/// When one of these does not hold.
pub fn check_datagram(bytes: &[u8]) {
    let mut codec = codec(7);
    let forged = codec.read(bytes);
    assert!(matches!(forged, Err(Refusal::Format | Refusal::Mac)), "{forged:?}");
    let Ok(mut datagram) = <[u8; BYTES]>::try_from(bytes) else { return };
    codec.sign(&mut datagram);
    if let Ok(beat) = codec.read(&datagram) {
        assert!(beat.epoch == EPOCH && beat.process < PROCESSES);
        assert_eq!(codec.write(beat.process, beat.sequence, beat.step, beat.lost), datagram);
        assert_eq!(codec.read(&datagram), Err(Refusal::Replay));
    }
}

/// A letter is written in one way only, and its payload has at most as many bytes as are allowed.
///
/// # Panics
/// When one of these does not hold.
pub fn check_letter(bytes: &[u8]) {
    if let Ok(letter) = Letter::read(bytes) {
        assert!(letter.payload.len() <= MESSAGE_BYTES_MAX);
        assert_eq!(letter.write(), bytes, "{letter:?}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn holds_for_samples_with_changes(
            index in 0usize..6, at in any::<prop::sample::Index>(), bytes in prop::collection::vec(any::<u8>(), 0..8),
        ) {
            let mut changed = samples().swap_remove(index);
            let at = at.index(changed.len());
            let end = (at + bytes.len()).min(changed.len());
            changed.splice(at..end, bytes);
            check_datagram(&changed);
            check_letter(&changed);
        }
    }
}
