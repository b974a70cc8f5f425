//! Decodes arbitrary bytes as frame headers of the register connection. A decoded frame must encode to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shardflow_actors::frame::{FRAME_BYTES, Frame};

fuzz_target!(|input: [u8; FRAME_BYTES]| {
    let mut bytes = input;
    // Keep the random magic number and version in one of 256 inputs.
    if bytes[0] != 0 {
        bytes[..3].copy_from_slice(&Frame::Bye.encode()[..3]);
    }
    if let Ok(frame) = Frame::decode(&bytes) {
        assert_eq!(frame.encode(), bytes);
    }
});
