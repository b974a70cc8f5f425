//! Decodes heartbeats and control messages from arbitrary bytes.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use shardflow::job::membership::fuzz::{check_control_message, check_datagram, samples};

fuzz_target!(|bytes: &[u8]| {
    check_datagram(bytes);
    check_control_message(bytes);
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    shardflow_fuzz::mutate(data, size, max_size, seed, samples())
});
