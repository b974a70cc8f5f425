//! A handshake with a peer that holds no secret and sends any bytes: neither side ever believes it. The messages under the
//! MAC are decoded too, as if their MAC were right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shardflow_actors::transport::handshake::{Acceptor, Dialler, GREETING_BYTES, check_greeting, greeting};
use shardflow_actors::transport::{Hello, Purpose, Refusal, SessionId, SharedKey, wire};

const HELLO: Hello = Hello { session: SessionId([1; 16]), epoch: 1, from: 1, to: 0, purpose: Purpose::Control };

fuzz_target!(|input: (&[u8], &[u8])| {
    let (theirs, rest) = input;
    let secret = SharedKey::from_text("a secret of the fuzzer").expect("it is long enough");
    if let Ok(greeted) = check_greeting(theirs) {
        assert_eq!(greeted.len(), GREETING_BYTES);
    }
    // Both sides take a greeting of the peer's, or one in good order so as to get further.
    for theirs in [theirs, &greeting(&[2; 32])] {
        if let Ok(acceptor) = Acceptor::new(&[3; 32], theirs) {
            assert!(acceptor.verify(&secret, rest.to_vec()).is_err());
        }
        let (dialler, _) = Dialler::new(&[4; 32]);
        if let Ok((proved, _)) = dialler.prove(&secret, &HELLO, theirs) {
            assert!(proved.finish(&secret, rest).is_err());
        }
    }
    if let Ok(hello) = wire::decode::<Hello>(rest) {
        let bytes = wire::encode(&hello).expect("what was decoded can be encoded");
        assert_eq!(wire::decode::<Hello>(&bytes).expect("what was encoded can be decoded"), hello);
    }
    let _ = wire::decode::<Result<(), Refusal>>(rest);
    let _ = wire::read_message::<Vec<String>>(&mut &rest[..], 1 << 10);
});
