//! Delays on streams, for tests on a real GPU: what fails to wait for another stream's work then shows in the numbers.

use std::env;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::KernelError;

/// `SEED:CYCLES`: about half of the steps of a stream wait behind a kernel that spins for up to so many cycles of the GPU's clock.
/// For tests; without it there are no such kernels.
pub const SPIN: &str = "SHARDFLOW_CUDA_SPIN";

/// The most cycles that are allowed, about a second: a stream that does not move for long counts as lost.
const CYCLES_MAX: u64 = 1 << 30;

/// See [`SPIN`].
#[derive(Debug)]
pub(crate) struct TestDelays {
    state: AtomicU64,
    cycles_max: u64,
}

impl TestDelays {
    /// As the environment says.
    pub(crate) fn from_environment() -> Result<Option<Self>, KernelError> {
        env::var_os(SPIN).map(|text| Self::parse(&text.to_string_lossy())).transpose()
    }

    fn parse(text: &str) -> Result<Self, KernelError> {
        let parsed = text.split_once(':').and_then(|(seed, cycles)| Some((seed.parse().ok()?, cycles.parse().ok()?)));
        let parsed = parsed.filter(|(_, cycles_max)| (1..=CYCLES_MAX).contains(cycles_max));
        let (seed, cycles_max): (u64, u64) = parsed.ok_or_else(|| {
            KernelError::arguments("cuda", SPIN, format!("SEED:CYCLES with 1 to {CYCLES_MAX} cycles"), text)
        })?;
        Ok(Self { state: AtomicU64::new(seed.wrapping_mul(GOLDEN)), cycles_max })
    }

    /// Cycles to spin before the next step of any stream; none before half of them.
    pub(crate) fn next(&self) -> Option<u64> {
        // SplitMix64: Steele, Lea and Flood 2014, <https://doi.org/10.1145/2660193.2660195>.
        let mut z = self.state.fetch_add(GOLDEN, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z & 1 == 1).then(|| (z >> 1) % self.cycles_max)
    }
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_steps_wait_and_none_for_too_long() {
        let draws = |text: &str| {
            let spins = TestDelays::parse(text).unwrap();
            (0..1000).map(|_| spins.next()).collect::<Vec<_>>()
        };
        let drawn = draws("7:5000");
        let waits = drawn.iter().flatten().count();
        assert!((400..600).contains(&waits), "{waits}");
        assert!(drawn.iter().flatten().all(|cycles| *cycles < 5000));
        assert_eq!(drawn, draws("7:5000"));
        assert_ne!(drawn, draws("8:5000"));
    }

    #[test]
    fn without_the_variable_nothing_spins_and_what_makes_no_sense_is_told() {
        assert!(env::var_os(SPIN).is_some() || TestDelays::from_environment().unwrap().is_none());
        for text in ["", "7", "x:5", "7:0", "7:1073741825"] {
            let told = TestDelays::parse(text).unwrap_err().to_string();
            assert!(told.contains("SHARDFLOW_CUDA_SPIN: expected SEED:CYCLES"), "{told}");
        }
    }
}
