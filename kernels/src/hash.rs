//! A hash function with the same results in every process and on every machine.

use std::hash::Hasher;

/// FNV-1a, <http://www.isthe.com/chongo/tech/comp/fnv/>. Unlike the standard library's hasher, its results never
/// change.
pub(crate) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
