//! A hash that is the same in every process and on every machine.

use std::hash::Hasher;

/// FNV-1a, <http://www.isthe.com/chongo/tech/comp/fnv/>: always the same, as the standard library's hasher promises not to be.
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
