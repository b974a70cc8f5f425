//! Trains on four mesh devices that share one GPU. Losses are bit-identical for any delays on the GPU's streams. In
//! f32, the losses match those of the CPU backend within a tolerance. Each training has its own process, because the
//! environment sets the delays.

use std::process::Command;

use clap::Args;
use serde_json::{Value, json};
use shardflow_kernels::cuda::test_delay::SPIN;

use crate::{Found, Result};

/// Largest relative difference from the CPU backend's losses. The CPU backend adds in another order, and its exp and
/// erf round differently.
const CPU_MAX: f64 = 1e-4;

/// Environment variable that selects the visible GPUs.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// Arguments of [`run`].
#[derive(Args, Clone, Debug)]
pub struct VirtualArgs {
    /// Mesh with four devices.
    #[arg(long)]
    mesh: String,
    /// Number of trainings with delays, in each precision.
    #[arg(long, default_value_t = 2)]
    seeds: u64,
    /// Longest delay, in GPU clock cycles.
    #[arg(long, default_value_t = 200_000)]
    cycles: u64,
    #[arg(long, default_value_t = 5)]
    steps: u64,
    /// Tokens per sample, and features per token.
    #[arg(long, default_value_t = 128)]
    size: usize,
}

/// Trains in each precision. If a training fails, the report has its failure and the results of the other trainings.
pub fn run(args: &VirtualArgs) -> Result<Found> {
    let (mut runs, mut wrong) = (Vec::new(), Vec::new());
    for precision in ["f32", "bf16"] {
        let mut losses = |device, seed| {
            let trained = train(args, precision, device, seed);
            // Print progress, in case the user interrupts the program.
            eprintln!("{precision}, {device}, delays {seed:?}: {trained:?}");
            trained.map_err(|error| wrong.push(error.to_string())).ok()
        };
        let undelayed = losses("cuda", None);
        let delayed: Vec<_> = (1..=args.seeds).map(|seed| (seed, losses("cuda", Some(seed)))).collect();
        let cpu = if precision == "f32" { losses("cpu", None) } else { None };
        let differ: Vec<_> = delayed.iter().filter(|(_, losses)| losses.is_none() || *losses != undelayed).collect();
        wrong.extend(differ.iter().map(|(seed, losses)| {
            format!("{precision}: losses {losses:?} with delay seed {seed}, but {undelayed:?} without delays")
        }));
        let differ: Vec<u64> = differ.into_iter().map(|(seed, _)| *seed).collect();
        let difference = undelayed.iter().flatten().zip(cpu.iter().flatten());
        let difference = difference.map(|(a, b)| (a - b).abs() / a.abs().max(b.abs())).reduce(f64::max);
        if let Some(most) = difference.filter(|most| most.is_nan() || *most > CPU_MAX) {
            wrong.push(format!("losses differ from the CPU backend's by {most:e} (relative), more than {CPU_MAX:e}"));
        }
        runs.push(json!({
            "precision": precision, "losses": undelayed, "seeds": args.seeds, "seeds_that_differ": differ,
            "from_cpu_relative": difference, "from_cpu_max": CPU_MAX,
        }));
    }
    Ok(Found { json: json!({ "mesh": args.mesh, "cycles": args.cycles, "runs": runs }), wrong })
}

/// Runs one training in a child process, and returns its losses.
fn train(args: &VirtualArgs, precision: &str, device: &str, spin: Option<u64>) -> Result<Vec<f64>> {
    let mut child = Command::new(std::env::current_exe()?);
    let size = args.size.to_string();
    child.args([
        "train",
        "--mesh",
        &args.mesh,
        "--precision",
        precision,
        "--device",
        device,
        "--layers",
        "4",
        "--heads",
        "4",
    ]);
    child.args(["--width", &size, "--context", &size, "--vocabulary", "509", "--batch", "8", "--micro-batches", "2"]);
    child.args(["--dropout", "0.1", "--timed", "0", "--steps", &args.steps.to_string()]);
    // With several visible GPUs, each mesh device would use its own GPU.
    let visible = std::env::var(VISIBLE).ok().filter(|gpus| !gpus.is_empty());
    child.env(VISIBLE, visible.as_deref().unwrap_or("0").split(',').next().unwrap_or("0"));
    child.envs(spin.map(|seed| (SPIN, format!("{seed}:{}", args.cycles))));
    let output = child.output()?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{precision}, {device}, delays {spin:?}: {}", stderr.trim()).into());
    }
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let losses = report["losses"].as_array().into_iter().flatten();
    Ok(losses.map(|loss| loss.as_f64().unwrap_or(f64::NAN)).collect())
}
