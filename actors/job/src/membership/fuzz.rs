//! Checks of the decoders of heartbeats and control messages with arbitrary input, for fuzzing and tests.
use super::cause::{Kind, Report};
use super::control_message::{Body, ControlMessage, MESSAGE_BYTES_MAX};
use super::datagram::{BYTES, Codec, Rejection};
use super::reduce::{MergeRule, Partial, Reduced};
use super::tree::ControlTree;

const EPOCH: u64 = 3;
const PROCESSES: u32 = 4;

fn codec(key: u8) -> Codec {
    Codec::new(&[key; 32], [9; 16], EPOCH, PROCESSES)
}

pub(super) fn bodies() -> [Body; 9] {
    let cause = "out of memory".to_string();
    let failed = Report { by: 1, about: 1, kind: Kind::Failed, follows: true, cause, exit: 71 };
    let lost = Report { about: 2, kind: Kind::Lost, follows: false, exit: 69, ..failed.clone() };
    [
        Body::Message { from: 1, to: 2, topic: 7 },
        Body::Report(failed),
        Body::Report(lost),
        Body::Leaving { processes: vec![1, 3] },
        Body::Joined,
        Body::Complete,
        Body::Received { urgent: 3 },
        Body::Round { topic: 4, round: 9 },
        Body::Missing { topic: 4, round: 9, process: 2 },
    ]
}

fn rules() -> [MergeRule; 3] {
    [MergeRule::Max { words: 2 }, MergeRule::First { words: 1 }, MergeRule::Same(None)]
}

fn own_numbers(rules: &[MergeRule], word: u64) -> Partial {
    Partial::new(rules, &[vec![1, 2], vec![3], vec![word]])
}

/// Valid control messages, a heartbeat signed with another key, and the numbers of a round.
pub fn samples() -> Vec<Vec<u8>> {
    let messages = bodies().map(|body| ControlMessage::from(body).write());
    messages
        .into_iter()
        .chain([codec(8).write(2, 5, Some(1), None).to_vec(), own_numbers(&rules(), 4).write()])
        .collect()
}

/// Checks that datagrams without the key are rejected. Checks that every accepted datagram has this epoch, comes from
/// an existing process, has exactly one encoding, and is accepted only once. Panics if a check fails.
pub fn check_datagram(bytes: &[u8]) {
    let mut codec = codec(7);
    let forged = codec.read(bytes);
    assert!(matches!(forged, Err(Rejection::Format | Rejection::Mac)), "{forged:?}");
    let Ok(mut datagram) = <[u8; BYTES]>::try_from(bytes) else { return };
    codec.sign(&mut datagram);
    if let Ok(heartbeat) = codec.read(&datagram) {
        assert!(heartbeat.epoch == EPOCH && heartbeat.process < PROCESSES);
        let written = codec.write(heartbeat.process, heartbeat.sequence, heartbeat.lost, heartbeat.most_silent);
        assert_eq!(written, datagram);
        assert_eq!(codec.read(&datagram), Err(Rejection::Replay));
    }
}

/// Checks that a decoded control message has exactly one encoding and a payload within the limit. Also reads the bytes
/// as numbers of a round. Checks that these have exactly one encoding, and that they combine with a process's own
/// numbers to a valid result.
///
/// # Panics
/// Panics if one of these checks fails.
pub fn check_control_message(bytes: &[u8]) {
    if let Ok(message) = ControlMessage::read(bytes) {
        assert!(message.payload.len() <= MESSAGE_BYTES_MAX);
        assert_eq!(message.write(), bytes, "{message:?}");
    }
    let (tree, rules) = (ControlTree::new(&[0; PROCESSES as usize]), rules());
    let _ = Reduced::read(bytes, &rules);
    if let Some(partial) = Partial::read(bytes) {
        assert_eq!(partial.write(), bytes, "{partial:?}");
        if partial.is_valid(&rules, &tree, 1) {
            let combined = own_numbers(&rules, 0).combine(&rules, &tree, 0, vec![(1, partial)]);
            assert!(combined.is_valid(&rules, &tree, 0), "{combined:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_properties_hold_for_modified_samples(
            index in 0usize..11, at in any::<prop::sample::Index>(), bytes in prop::collection::vec(any::<u8>(), 0..8),
        ) {
            let mut changed = samples().swap_remove(index);
            let at = at.index(changed.len());
            let end = (at + bytes.len()).min(changed.len());
            changed.splice(at..end, bytes);
            check_datagram(&changed);
            check_control_message(&changed);
        }
    }
}
