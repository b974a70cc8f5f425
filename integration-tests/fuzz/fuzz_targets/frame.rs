//! Headers of the register connection from any bytes: a frame that is written in just this way, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shardflow_actors::transport::{FRAME_BYTES, Frame};

fuzz_target!(|input: [u8; FRAME_BYTES]| {
    let mut bytes = input;
    // Magic and version are left to chance now and then only.
    if bytes[0] != 0 {
        bytes[..3].copy_from_slice(&Frame::Bye.encode()[..3]);
    }
    if let Ok(frame) = Frame::decode(&bytes) {
        assert_eq!(frame.encode(), bytes);
    }
});
