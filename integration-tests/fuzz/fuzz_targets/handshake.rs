//! Runs the handshake with a peer that sends arbitrary bytes and does not know the secret. Neither side may accept such
//! a peer. Also decodes arbitrary bytes as the plaintext of authenticated messages.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shardflow::job::secret::Secret;
use shardflow::job::transport::handshake::{Acceptor, Dialler, GREETING_BYTES};
use shardflow::job::transport::{Hello, Purpose, Refusal, SessionId, wire};

const HELLO: Hello =
    Hello { session: SessionId([1; 16]), epoch: 1, from: 1, to: 0, sealed: true, purpose: Purpose::Control };

fuzz_target!(|input: (&[u8], &[u8])| {
    let (input_greeting, rest) = input;
    let secret = Secret::new("a secret of the fuzzer").expect("long enough");
    assert!(Acceptor::new(&secret, input_greeting).is_err());
    let (dialler, greeting) = Dialler::new(&secret).expect("random numbers");
    assert_eq!(greeting.len(), GREETING_BYTES);
    // Send a valid greeting, so that the fuzzer's bytes reach the later messages.
    let (acceptor, answer) = Acceptor::new(&secret, &greeting).expect("valid");
    assert!(acceptor.verify(rest).is_err());
    let (greeted, _) = dialler.introduce(&HELLO, &answer).expect("valid");
    assert!(greeted.finish(rest).is_err());
    let (dialler, _) = Dialler::new(&secret).expect("random numbers");
    assert!(dialler.introduce(&HELLO, input_greeting).is_err());
    if let Ok(hello) = wire::decode::<Hello>(rest) {
        let bytes = wire::encode(&hello).expect("a decoded message can be encoded");
        assert_eq!(wire::decode::<Hello>(&bytes).expect("an encoded message can be decoded"), hello);
    }
    let _ = wire::decode::<Result<(), Refusal>>(rest);
    let _ = wire::read_message::<Vec<String>>(&mut &rest[..], 1 << 10);
});
