//! Random delays on streams, for tests on real GPUs: a missing wait for another stream then shows as wrong results.

use std::env;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{KernelError, Result};
use crate::hash::{GOLDEN_GAMMA, mix64};

/// Environment variable for tests: `SEED:CYCLES` delays about half of all steps, each by fewer than CYCLES GPU cycles.
pub const SPIN: &str = "SHARDFLOW_CUDA_SPIN";

/// Maximum value of CYCLES, which takes about a second. A longer delay could make a stream count as lost.
const CYCLES_MAX: u64 = 1 << 30;

#[derive(Debug)]
pub(crate) struct TestDelays {
    state: AtomicU64,
    cycles_max: u64,
}

impl TestDelays {
    pub(crate) fn from_environment() -> Result<Option<Self>> {
        env::var_os(SPIN).map(|text| Self::parse(&text.to_string_lossy())).transpose()
    }

    fn parse(text: &str) -> Result<Self> {
        let parsed = text.split_once(':').and_then(|(seed, cycles)| Some((seed.parse().ok()?, cycles.parse().ok()?)));
        let parsed = parsed.filter(|(_, cycles_max)| (1..=CYCLES_MAX).contains(cycles_max));
        let (seed, cycles_max): (u64, u64) = parsed.ok_or_else(|| {
            KernelError::arguments("cuda", SPIN, format!("SEED:CYCLES with 1 to {CYCLES_MAX} cycles"), text)
        })?;
        Ok(Self { state: AtomicU64::new(seed.wrapping_mul(GOLDEN_GAMMA)), cycles_max })
    }

    /// Cycles to delay the next step of any stream; `None` for about half of the steps.
    pub(crate) fn next(&self) -> Option<u64> {
        let z = mix64(self.state.fetch_add(GOLDEN_GAMMA, Ordering::Relaxed));
        (z & 1 == 1).then(|| (z >> 1) % self.cycles_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_steps_are_delayed_within_the_limit() {
        let draws = |text: &str| {
            let delays = TestDelays::parse(text).unwrap();
            (0..1000).map(|_| delays.next()).collect::<Vec<_>>()
        };
        let drawn = draws("7:5000");
        let delayed = drawn.iter().flatten().count();
        assert!((400..600).contains(&delayed), "{delayed}");
        assert!(drawn.iter().flatten().all(|cycles| *cycles < 5000));
        assert_eq!(drawn, draws("7:5000"));
        assert_ne!(drawn, draws("8:5000"));
    }

    #[test]
    fn the_variable_is_optional_and_invalid_values_are_refused() {
        assert!(env::var_os(SPIN).is_some() || TestDelays::from_environment().unwrap().is_none());
        for text in ["", "7", "x:5", "7:0", "7:1073741825"] {
            let message = TestDelays::parse(text).unwrap_err().to_string();
            assert!(message.contains("SHARDFLOW_CUDA_SPIN: expected SEED:CYCLES"), "{message}");
        }
    }
}
