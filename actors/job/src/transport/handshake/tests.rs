//! Tests the handshake without sockets: valid handshakes succeed, and all others fail.

use proptest::prelude::*;

use super::*;
use crate::secret::sample as secret;

pub(in crate::transport) fn hello() -> Hello {
    let purpose = Purpose::Group { group: 3, member: 1, peer: 2 };
    Hello { session: SessionId([7; 16]), epoch: 4, from: 1, to: 2, sealed: true, purpose }
}

/// Runs a handshake. `change` may modify each of the four messages, by index. Returns the results of both sides.
pub(in crate::transport) fn run_handshake(
    secrets: [&Secret; 2],
    verdict: Result<(), Refusal>,
    mut change: impl FnMut(usize, Vec<u8>) -> Vec<u8>,
) -> [Result<StatelessTransportState, HandshakeError>; 2] {
    let (dialler, first) = Dialler::new(secrets[0]).unwrap();
    let accepted = Acceptor::new(secrets[1], &change(0, first));
    let answer = accepted.as_ref().map_or(head().to_vec(), |(_, answer)| answer.clone());
    let (dialler, hello) = match dialler.introduce(&hello(), &change(1, answer)) {
        Ok(greeted) => greeted,
        Err(error) => return [Err(error), accepted.and(Err(HandshakeError::Proof))],
    };
    let hello = change(2, hello);
    let accepted = accepted.and_then(|(acceptor, _)| {
        let hello = acceptor.verify(&hello)?.map_err(HandshakeError::Refused)?;
        assert_eq!(hello, self::hello());
        acceptor.answer(&verdict)
    });
    let (answer, accepted) = match accepted {
        Ok((answer, keys)) => (answer, Ok(keys)),
        Err(error) => (Vec::new(), Err(error)),
    };
    [dialler.finish(&change(3, answer)), accepted]
}

#[test]
fn both_sides_accept_a_valid_handshake_and_share_keys() {
    let [dialler, acceptor] = run_handshake([&secret(), &secret()], Ok(()), |_, message| {
        assert!(message.len() <= HANDSHAKE_BYTES_MAX);
        message
    });
    let (dialler, acceptor) = (dialler.unwrap(), acceptor.unwrap());
    let (mut sealed, mut plain) = ([0; 3 + TAG_BYTES], [0; 3]);
    dialler.write_message(1, b"abc", &mut sealed).unwrap();
    acceptor.read_message(1, &sealed, &mut plain).unwrap();
    assert_eq!(&plain, b"abc");
    assert!(dialler.read_message(1, &sealed, &mut plain).is_err(), "HS-3");
}

#[test]
fn another_secret_is_denied() {
    let other = Secret::new("another secret of these tests").unwrap();
    let [dialler, acceptor] = run_handshake([&other, &secret()], Ok(()), |_, message| message);
    assert!(matches!(dialler, Err(HandshakeError::Denied)), "{dialler:?}");
    assert!(matches!(acceptor, Err(HandshakeError::Proof)), "{acceptor:?}");
}

/// An acceptor without the secret sends the dialler's own messages back. This does not forge a verdict.
#[test]
fn an_acceptor_that_only_echoes_is_rejected() {
    let (dialler, own_greeting) = Dialler::new(&secret()).unwrap();
    assert!(matches!(dialler.introduce(&hello(), &own_greeting), Err(HandshakeError::Echo)));
    let mut sent = Vec::new();
    let [dialler, _] = run_handshake([&secret(), &secret()], Ok(()), |i, message| {
        if i == 2 {
            sent = message.clone();
        }
        if i == 3 { sent.clone() } else { message }
    });
    assert!(matches!(dialler, Err(HandshakeError::Proof)), "{dialler:?}");
}

#[test]
fn both_sides_reject_a_recorded_handshake() {
    let mut recorded = Vec::new();
    let _ = run_handshake([&secret(), &secret()], Ok(()), |_, message| {
        recorded.push(message.clone());
        message
    });
    // A dialler without the secret replays recorded messages to an acceptor.
    let (acceptor, _) = Acceptor::new(&secret(), &recorded[0]).unwrap();
    assert!(matches!(acceptor.verify(&recorded[2]), Err(HandshakeError::Proof)));
    // An acceptor without the secret replays recorded messages to a dialler.
    let (dialler, _) = Dialler::new(&secret()).unwrap();
    assert!(matches!(dialler.introduce(&hello(), &recorded[1]), Err(HandshakeError::Proof)));
}

#[test]
fn any_flipped_bit_is_detected() {
    let mut lengths = Vec::new();
    let verdict = || Err(Refusal::OldEpoch { acceptor: 5, dialler: 4 });
    let _ = run_handshake([&secret(), &secret()], verdict(), |_, message| {
        lengths.push(message.len());
        message
    });
    assert_eq!(lengths.len(), 4);
    for (index, bytes) in lengths.into_iter().enumerate() {
        // Flips every bit of magic, version and tag, and one bit of each later byte.
        for bit in (0..bytes * 8).filter(|bit| *bit < 48 || bit % 8 == bit / 8 % 8) {
            let [dialler, acceptor] = run_handshake([&secret(), &secret()], verdict(), |i, mut message| {
                if i == index {
                    message[bit / 8] ^= 1 << (bit % 8);
                }
                message
            });
            let at = format!("message {index}, bit {bit}: {dialler:?}, {acceptor:?}");
            // The acceptor has finished before the verdict (message 3) arrives.
            assert!(index == 3 || acceptor.is_err(), "{at}");
            // The dialler never mistakes a modified message for the acceptor's refusal.
            assert!(!matches!(dialler, Ok(_) | Err(HandshakeError::Refused(_))), "{at}");
        }
    }
}

#[test]
fn both_sides_report_a_version_mismatch() {
    let newer = |i: usize| {
        move |index: usize, mut message: Vec<u8>| {
            if index == i {
                message[4..6].copy_from_slice(&(PROTOCOL_VERSION + 1).to_le_bytes());
                message.extend_from_slice(b"fields of the next version");
            }
            message
        }
    };
    let [_, acceptor] = run_handshake([&secret(), &secret()], Ok(()), newer(0));
    let [dialler, _] = run_handshake([&secret(), &secret()], Ok(()), newer(1));
    for error in [acceptor.unwrap_err(), dialler.unwrap_err()] {
        let HandshakeError::Version { own, peer } = error else { panic!("{error}") };
        assert_eq!((own, peer), (PROTOCOL_VERSION, PROTOCOL_VERSION + 1));
    }
}

/// A dialler of a newer build sends an unknown purpose. The refusal is authentic, so the dialler reports the reason.
#[test]
fn an_unknown_purpose_is_refused_after_the_proof() {
    let (dialler, greeting) = Dialler::new(&secret()).unwrap();
    let (acceptor, answer) = Acceptor::new(&secret(), &greeting).unwrap();
    let (greeted, _) = dialler.introduce(&hello(), &answer).unwrap();
    let mut unknown = wire::encode(&hello()).unwrap();
    let purpose_at = unknown.len() - 4;
    unknown[purpose_at] = 200;
    let mut message = vec![0; unknown.len() + TAG_BYTES];
    greeted.0.write_message(0, &unknown, &mut message).unwrap();
    assert_eq!(acceptor.verify(&message).unwrap(), Err(Refusal::Unreadable));
}

#[test]
fn the_policy_accepts_only_members_of_this_epoch() {
    let world = SettledWorld { session: SessionId([7; 16]), epoch: 4, processes: 3 };
    let (before, running) = (AcceptPolicy { process: 2, world: None }, AcceptPolicy { process: 2, world: Some(world) });
    let session = SessionId([8; 16]);
    let rendezvous = Hello { session: SessionId::default(), purpose: Purpose::Rendezvous, ..hello() };
    for (policy, hello, expected) in [
        (before, rendezvous, Ok(())),
        (before, hello(), Err(Refusal::NotStarted)),
        (before, Hello { from: PROCESSES_MAX, ..rendezvous }, Err(Refusal::Process { process: 4096, processes: 4096 })),
        (running, hello(), Ok(())),
        (running, Hello { to: 1, ..hello() }, Err(Refusal::WrongProcess { expected: 1, actual: 2 })),
        (running, Hello { from: 3, ..hello() }, Err(Refusal::Process { process: 3, processes: 3 })),
        (running, Hello { session, ..hello() }, Err(Refusal::Session { acceptor: world.session, dialler: session })),
        (running, Hello { session, epoch: 3, ..hello() }, Err(Refusal::OldEpoch { acceptor: 4, dialler: 3 })),
        (running, Hello { session, epoch: 5, ..hello() }, Err(Refusal::NewEpoch { acceptor: 4, dialler: 5 })),
        (running, rendezvous, Err(Refusal::Late { epoch: 4 })),
        (running, Hello { epoch: 0, ..rendezvous }, Err(Refusal::Late { epoch: 4 })),
        (running, Hello { epoch: 5, ..rendezvous }, Err(Refusal::NewEpoch { acceptor: 4, dialler: 5 })),
    ] {
        assert_eq!(policy.admit(&hello), expected, "{policy:?} {hello:?}");
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_rejected(mut bytes in prop::collection::vec(any::<u8>(), 0..200), magic in any::<bool>()) {
        if magic && bytes.len() >= HEAD_BYTES {
            bytes[..HEAD_BYTES].copy_from_slice(&head());
        }
        prop_assert!(Acceptor::new(&secret(), &bytes).is_err());
        let (dialler, greeting) = Dialler::new(&secret()).unwrap();
        let (acceptor, answer) = Acceptor::new(&secret(), &greeting).unwrap();
        prop_assert!(acceptor.verify(&bytes).is_err());
        let (greeted, _) = dialler.introduce(&hello(), &answer).unwrap();
        prop_assert!(greeted.finish(&bytes).is_err());
        let (dialler, _) = Dialler::new(&secret()).unwrap();
        prop_assert!(dialler.introduce(&hello(), &bytes).is_err());
    }
}
