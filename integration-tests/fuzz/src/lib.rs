//! Begins from messages in good order instead of from files.

use libfuzzer_sys::fuzzer_mutate;

/// One input in so many is a sample anew; the others are changed from inputs that reached something new.
const FRESH: u32 = 64;

/// For `fuzz_mutator!`: mutates `data`, or a sample that takes its place.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32, samples: Vec<Vec<u8>>) -> usize {
    let sample = seed.is_multiple_of(FRESH).then(|| &samples[(seed / FRESH) as usize % samples.len()]);
    let size = match sample.filter(|sample| sample.len() <= max_size) {
        Some(sample) => {
            data[..sample.len()].copy_from_slice(sample);
            sample.len()
        }
        None => size,
    };
    fuzzer_mutate(data, size, max_size)
}
