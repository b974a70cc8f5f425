//! Runs programs with and without a planted mistake. Under every policy and seed, the device finds each mistake.
//! Without its mistake, a program has no findings.

use shardflow_software_cuda::POLICIES;

use crate::api::{self, findings};
use crate::{child, cuda};

/// Number of seeds per policy; `SOFTWARE_CUDA_TEST_SEEDS` sets it for longer manual runs.
fn seeds() -> u64 {
    std::env::var("SOFTWARE_CUDA_TEST_SEEDS").map_or(4, |seeds| seeds.parse().expect("the number of seeds is a number"))
}

/// A program that can run with or without a mistake.
pub struct Bug {
    /// Name of the mistake in messages.
    pub name: &'static str,
    /// At least one finding of these kinds must occur. A colon and a part of the finding's message may follow a kind.
    pub kinds: &'static [&'static str],
    /// Runs the program, with the mistake if the second argument is true.
    pub run: fn(&LoadedKernels, bool),
}

/// The kernels loaded on each device.
pub struct LoadedKernels {
    modules: Vec<cudarc::driver::sys::CUmodule>,
}

impl LoadedKernels {
    fn new(devices: i32) -> LoadedKernels {
        let modules = (0..devices)
            .map(|device| {
                api::use_device(device);
                api::module()
            })
            .collect();
        api::use_device(0);
        LoadedKernels { modules }
    }

    /// Returns a kernel of the current device.
    pub fn kernel(&self, name: &str) -> cudarc::driver::sys::CUfunction {
        let mut device = 0;
        cuda!(cuCtxGetDevice(&mut device));
        api::function(self.modules[device as usize], name)
    }
}

/// Runs each program of a list with and without its mistake.
pub fn run_all(bugs: &[Bug], devices: i32) {
    let loaded = LoadedKernels::new(devices);
    for bug in bugs {
        for (policy, _) in POLICIES {
            for seed in 0..seeds() {
                for planted in [true, false] {
                    api::use_device(0);
                    api::begin(policy, seed * 7919 + 13);
                    (bug.run)(&loaded, planted);
                    let found = findings();
                    let matches = |expected: &str, kind: &str, message: &str| match expected.split_once(": ") {
                        Some((wanted, part)) => wanted == kind && message.contains(part),
                        None => expected == kind,
                    };
                    let is_found = found.iter().any(|(kind, text)| bug.kinds.iter().any(|k| matches(k, kind, text)));
                    let (name, variant) = (bug.name, if planted { "with" } else { "without" });
                    assert!(
                        if planted { is_found } else { found.is_empty() },
                        "wrong findings for {name:?} {variant} its mistake, under {policy}, seed {seed}: {found:?}"
                    );
                }
            }
        }
        println!("{}: found", bug.name);
    }
    api::begin("in-order", 1);
}

/// In the parent: checks that the child finds all mistakes and succeeds.
pub fn expect_found(case: &str, devices: usize) {
    let (output, report) = child::start(case, devices, "in-order", 1, &[("SOFTWARE_CUDA_DEADLOCK_MS", "250")]);
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let tail: Vec<&str> = text.lines().filter(|l| !l.starts_with("software-cuda:") && !l.starts_with("  ")).collect();
    assert!(output.status.success(), "{case} failed:\n{}", tail.join("\n"));
    assert!(report.executed > 0);
}
