//! Tests the handshake without sockets: valid handshakes succeed, all others fail.

use proptest::prelude::*;

use super::*;
use crate::transport::Purpose;

fn secret() -> SharedKey {
    SharedKey::from_text("a secret of these tests").unwrap()
}

fn hello() -> Hello {
    let purpose = Purpose::Group { group: 3, member: 1, peer: 2 };
    Hello { session: SessionId([7; 16]), epoch: 4, from: 1, to: 2, purpose }
}

/// Runs a handshake; `change` may modify each of the four messages by index. Returns the results of both sides.
fn run_handshake(
    dialler_key: &SharedKey,
    acceptor_key: &SharedKey,
    nonces: [Nonce; 2],
    verdict: Result<(), Refusal>,
    mut change: impl FnMut(usize, Vec<u8>) -> Vec<u8>,
) -> (Result<(), HandshakeError>, Result<Hello, HandshakeError>) {
    let (dialler, first) = Dialler::new(&nonces[0]);
    let first = change(0, first.to_vec());
    let acceptor = Acceptor::new(&nonces[1], &first);
    let second = change(1, greeting(&nonces[1]).to_vec());
    let (proved, third) = match dialler.prove(dialler_key, &hello(), &second) {
        Ok(proved) => proved,
        Err(error) => return (Err(error), Err(HandshakeError::Proof)),
    };
    let third = change(2, third);
    let accepted = acceptor.and_then(|acceptor| acceptor.verify(acceptor_key, third));
    let (fourth, accepted) = match accepted {
        Ok((verified, hello)) => {
            (verified.answer(acceptor_key, &verdict).unwrap(), hello.map_err(HandshakeError::Refused))
        }
        Err(error) => (Vec::new(), Err(error)),
    };
    (proved.finish(dialler_key, &change(3, fourth)), accepted)
}

fn nonces() -> [Nonce; 2] {
    [[1; 32], [2; 32]]
}

#[test]
fn both_sides_accept_a_valid_handshake() {
    let (dialler, acceptor) = run_handshake(&secret(), &secret(), nonces(), Ok(()), |_, message| {
        assert!(message.len() <= HANDSHAKE_BYTES_MAX);
        message
    });
    dialler.unwrap();
    assert_eq!(acceptor.unwrap(), hello());
}

#[test]
fn another_secret_is_denied() {
    let other = SharedKey::from_text("another secret of these tests").unwrap();
    let (dialler, acceptor) = run_handshake(&other, &secret(), nonces(), Ok(()), |_, message| message);
    assert!(matches!(dialler, Err(HandshakeError::Denied)), "{dialler:?}");
    assert!(matches!(acceptor, Err(HandshakeError::Proof)), "{acceptor:?}");
}

/// An acceptor without the secret cannot forge a verdict by returning messages.
#[test]
fn an_acceptor_that_only_echoes_is_rejected() {
    let (dialler, own_greeting) = Dialler::new(&[1; 32]);
    assert!(matches!(dialler.prove(&secret(), &hello(), &own_greeting), Err(HandshakeError::Echo)));
    let mut proof = Vec::new();
    let (dialler, _) = run_handshake(&secret(), &secret(), nonces(), Ok(()), |i, message| {
        if i == 2 {
            proof = message.clone();
        }
        if i == 3 { proof.clone() } else { message }
    });
    assert!(matches!(dialler, Err(HandshakeError::Proof)), "{dialler:?}");
}

#[test]
fn both_sides_reject_a_recorded_handshake() {
    let mut recorded = Vec::new();
    let _ = run_handshake(&secret(), &secret(), nonces(), Ok(()), |_, message| {
        recorded.push(message.clone());
        message
    });
    // A dialler without the secret replays to an acceptor.
    let acceptor = Acceptor::new(&[3; 32], &recorded[0]).unwrap();
    assert!(matches!(acceptor.verify(&secret(), recorded[2].clone()), Err(HandshakeError::Proof)));
    // An acceptor without the secret replays to a dialler.
    let (dialler, _) = Dialler::new(&[4; 32]);
    let (proved, _) = dialler.prove(&secret(), &hello(), &recorded[1]).unwrap();
    assert!(matches!(proved.finish(&secret(), &recorded[3]), Err(HandshakeError::Proof)));
}

#[test]
fn any_flipped_bit_is_detected() {
    let mut lengths = Vec::new();
    let verdict = || Err(Refusal::OldEpoch { acceptor: 5, dialler: 4 });
    let _ = run_handshake(&secret(), &secret(), nonces(), verdict(), |_, message| {
        lengths.push(message.len());
        message
    });
    assert_eq!(lengths.len(), 4);
    for (index, bytes) in lengths.into_iter().enumerate() {
        for bit in 0..bytes * 8 {
            let (dialler, acceptor) = run_handshake(&secret(), &secret(), nonces(), verdict(), |i, mut message| {
                if i == index {
                    message[bit / 8] ^= 1 << (bit % 8);
                }
                message
            });
            let at = format!("message {index}, bit {bit}: {dialler:?}, {acceptor:?}");
            // The acceptor has finished before the verdict (message 3) arrives.
            assert!(index == 3 || acceptor.is_err(), "{at}");
            // A modified message is never taken for the acceptor's refusal.
            assert!(!matches!(dialler, Ok(()) | Err(HandshakeError::Refused(_))), "{at}");
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
    let (_, acceptor) = run_handshake(&secret(), &secret(), nonces(), Ok(()), newer(0));
    let (dialler, _) = run_handshake(&secret(), &secret(), nonces(), Ok(()), newer(1));
    for error in [acceptor.unwrap_err(), dialler.unwrap_err()] {
        let HandshakeError::Version { own, peer } = error else { panic!("{error}") };
        assert_eq!((own, peer), (PROTOCOL_VERSION, PROTOCOL_VERSION + 1));
    }
}

/// A dialler of a newer build proves an unknown purpose: the refusal is under a MAC, so that it learns the reason.
#[test]
fn an_unknown_purpose_is_refused_after_the_proof() {
    let mut body = wire::encode(&hello()).unwrap();
    let purpose_at = body.len() - 4;
    body[purpose_at] = 200;
    let greetings = nonces().map(|nonce| greeting(&nonce));
    let mac = secret().mac(DIALLER, &[&greetings[0], &greetings[1], &body]);
    body.extend_from_slice(mac.as_bytes());
    let acceptor = Acceptor::new(&nonces()[1], &greetings[0]).unwrap();
    let (_, hello) = acceptor.verify(&secret(), body).unwrap();
    assert_eq!(hello, Err(Refusal::Unreadable));
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
    /// Arbitrary bytes are never accepted and never cause a panic.
    #[test]
    fn arbitrary_bytes_are_rejected(mut bytes in prop::collection::vec(any::<u8>(), 0..200), magic in any::<bool>()) {
        if magic && bytes.len() >= 6 {
            bytes[..6].copy_from_slice(&greeting(&[0; 32])[..6]);
        }
        let greeted = Acceptor::new(&[2; 32], &bytes);
        prop_assert_eq!(greeted.is_ok(), bytes.len() == GREETING_BYTES && magic);
        let acceptor = Acceptor::new(&[2; 32], &greeting(&[1; 32])).unwrap();
        prop_assert!(acceptor.verify(&secret(), bytes.clone()).is_err());
        let (dialler, _) = Dialler::new(&[1; 32]);
        let (proved, _) = dialler.prove(&secret(), &hello(), &greeting(&[2; 32])).unwrap();
        prop_assert!(proved.finish(&secret(), &bytes).is_err());
    }
}
