//! Adds a valid checksum to an arbitrary body, and decodes the result as a manifest and as a sidecar of a checkpoint.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use shardflow::checkpoint::fuzz::{check, samples};

fuzz_target!(|bytes: &[u8]| check(bytes));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    shardflow_fuzz::mutate(data, size, max_size, seed, samples())
});
