//! Headers of the register connection from any bytes: a frame within the limit that is written in just this way, or an
//! error. Imports `actors::transport`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shardflow_actors::transport::{FRAME_BYTES, Frame};

fuzz_target!(|input: ([u8; FRAME_BYTES], u64)| {
    let (mut bytes, limit) = input;
    // Magic and version are left to chance now and then only.
    if bytes[0] != 0 {
        bytes[..3].copy_from_slice(&Frame::Bye.encode()[..3]);
    }
    if let Ok(frame) = Frame::decode(&bytes, limit) {
        assert_eq!(frame.encode(), bytes);
        if let Frame::Data { offset, bytes, .. } = frame {
            assert!(offset.checked_add(bytes).is_some_and(|end| end <= limit));
        }
        if let Some(message) = frame.message() {
            assert_eq!(Frame::from(message), frame);
        }
    }
});
