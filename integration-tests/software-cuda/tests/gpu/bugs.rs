//! Planted mistakes: each is found under every policy and seed, and the same program without it is clean.

use shardflow_software_cuda::POLICIES;

use crate::api::{self, findings};
use crate::{child, cuda};

/// Seeds of each policy: a few, or as many as `SOFTWARE_CUDA_TEST_SEEDS` says, for longer runs by hand.
fn seeds() -> u64 {
    std::env::var("SOFTWARE_CUDA_TEST_SEEDS").map_or(4, |seeds| seeds.parse().expect("a number of seeds"))
}

/// A program that can be run with a mistake in it.
pub struct Bug {
    /// For messages.
    pub name: &'static str,
    /// Kinds of findings, one of which names the mistake; with a part of the message, after a colon, where that matters.
    pub kinds: &'static [&'static str],
    /// Runs it; true plants the mistake.
    pub run: fn(&Lab, bool),
}

/// What programs share.
pub struct Lab {
    modules: Vec<cudarc::driver::sys::CUmodule>,
}

impl Lab {
    fn new(devices: i32) -> Lab {
        let modules = (0..devices)
            .map(|device| {
                api::use_device(device);
                api::module()
            })
            .collect();
        api::use_device(0);
        Lab { modules }
    }

    /// A kernel of the current device.
    pub fn kernel(&self, name: &str) -> cudarc::driver::sys::CUfunction {
        let mut device = 0;
        cuda!(cuCtxGetDevice(&mut device));
        api::function(self.modules[device as usize], name)
    }
}

/// Runs all mistakes of a list, and the programs without them.
pub fn run_all(bugs: &[Bug], devices: i32) {
    let lab = Lab::new(devices);
    for bug in bugs {
        for (policy, _) in POLICIES {
            for seed in 0..seeds() {
                for planted in [true, false] {
                    api::use_device(0);
                    api::begin(policy, seed * 7919 + 13);
                    (bug.run)(&lab, planted);
                    let found = findings();
                    let is_it = |wanted: &str, kind: &str, message: &str| match wanted.split_once(": ") {
                        Some((wanted, says)) => wanted == kind && message.contains(says),
                        None => wanted == kind,
                    };
                    let names_it = found.iter().any(|(kind, text)| bug.kinds.iter().any(|k| is_it(k, kind, text)));
                    let (name, what) = (bug.name, if planted { "with" } else { "without" });
                    assert!(
                        if planted { names_it } else { found.is_empty() },
                        "{name} {what} its mistake, under {policy}, seed {seed}: {found:?}"
                    );
                }
            }
        }
        println!("{}: found", bug.name);
    }
    api::begin("in-order", 1);
}

/// In the parent: the child finds all, and its process ends well.
pub fn expect_found(case: &str, devices: usize) {
    let (output, report) = child::start(case, devices, "in-order", 1, &[("SOFTWARE_CUDA_DEADLOCK_MS", "250")]);
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let tail: Vec<&str> = text.lines().filter(|l| !l.starts_with("software-cuda:") && !l.starts_with("  ")).collect();
    assert!(output.status.success(), "{case}:\n{}", tail.join("\n"));
    assert!(report.executed > 0);
}
