//! Seeds the fuzzer with valid messages instead of corpus files.

use libfuzzer_sys::fuzzer_mutate;

/// One input out of this number starts from a sample. The others are mutations of inputs that reached new code.
const FRESH: u32 = 64;

/// Mutates `data`. Sometimes first replaces `data` with a sample. The macro `fuzz_mutator!` calls this function.
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
