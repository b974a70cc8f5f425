//! Runs the handshake with a peer that has no secret and sends arbitrary bytes: neither side accepts it. Also decodes
//! the authenticated messages as if their MAC were valid.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shardflow_actors::transport::handshake::{Acceptor, Dialler, GREETING_BYTES, check_greeting, greeting};
use shardflow_actors::transport::{Hello, Purpose, Refusal, SessionId, SharedKey, wire};

const HELLO: Hello = Hello { session: SessionId([1; 16]), epoch: 1, from: 1, to: 0, purpose: Purpose::Control };

fuzz_target!(|input: (&[u8], &[u8])| {
    let (input_greeting, rest) = input;
    let secret = SharedKey::from_text("a secret of the fuzzer").expect("long enough");
    if let Ok(greeted) = check_greeting(input_greeting) {
        assert_eq!(greeted.len(), GREETING_BYTES);
    }
    // Each side gets the peer's greeting, and then a valid one to reach the later messages.
    for peer_greeting in [input_greeting, &greeting(&[2; 32])] {
        if let Ok(acceptor) = Acceptor::new(&[3; 32], peer_greeting) {
            assert!(acceptor.verify(&secret, rest.to_vec()).is_err());
        }
        let (dialler, _) = Dialler::new(&[4; 32]);
        if let Ok((pending, _)) = dialler.prove(&secret, &HELLO, peer_greeting) {
            assert!(pending.finish(&secret, rest).is_err());
        }
    }
    if let Ok(hello) = wire::decode::<Hello>(rest) {
        let bytes = wire::encode(&hello).expect("a decoded message can be encoded");
        assert_eq!(wire::decode::<Hello>(&bytes).expect("an encoded message can be decoded"), hello);
    }
    let _ = wire::decode::<Result<(), Refusal>>(rest);
    let _ = wire::read_message::<Vec<String>>(&mut &rest[..], 1 << 10);
});
