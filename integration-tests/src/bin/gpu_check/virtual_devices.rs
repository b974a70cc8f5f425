//! Four devices of a mesh on one GPU. Whatever the delays on its streams, losses keep their bits; in f32 they are the CPU
//! backend's within a tolerance. Each training is a process of its own, since delays are asked for by the environment.
//! Imports the CUDA backend's variable.

use std::process::Command;

use clap::Args;
use serde_json::{Value, json};
use shardflow_kernels::cuda::spin::SPIN;

use crate::{Found, Result};

/// Relative difference of losses from the CPU backend's: sums in another order, other roundings of exp and erf.
const CPU_MAX: f64 = 1e-4;

const MESHES: [&str; 2] = ["data=2,stage=2", "data=2,tensor=2"];

/// Which GPUs the driver shows.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// See [`run`].
#[derive(Args, Clone, Debug)]
pub struct VirtualArgs {
    /// Trainings with delays, of each mesh and precision.
    #[arg(long, default_value_t = 2)]
    seeds: u64,
    /// The longest delay, in cycles of the GPU's clock.
    #[arg(long, default_value_t = 200_000)]
    cycles: u64,
    #[arg(long, default_value_t = 5)]
    steps: u64,
    /// Tokens of a sample, and features of a token.
    #[arg(long, default_value_t = 128)]
    size: usize,
}

/// Trains on each mesh in each precision.
pub fn run(args: &VirtualArgs) -> Result<Found> {
    let (mut runs, mut wrong) = (Vec::new(), Vec::new());
    for mesh in MESHES {
        for precision in ["f32", "bf16"] {
            let calm = train(args, mesh, precision, "cuda", None)?;
            let mut differ = Vec::new();
            for seed in 1..=args.seeds {
                let delayed = train(args, mesh, precision, "cuda", Some(seed))?;
                if delayed != calm {
                    wrong.push(format!("{mesh}, {precision}: delays of seed {seed} give {delayed:?}, none {calm:?}"));
                    differ.push(seed);
                }
            }
            let cpu = if precision == "f32" { Some(train(args, mesh, precision, "cpu", None)?) } else { None };
            let apart = cpu.map(|cpu| {
                calm.iter().zip(&cpu).map(|(a, b)| (a - b).abs() / a.abs().max(b.abs())).fold(0.0, f64::max)
            });
            if apart.is_some_and(|apart| apart > CPU_MAX) {
                wrong.push(format!("{mesh}: losses are {apart:?} from the CPU backend's, {CPU_MAX} is allowed"));
            }
            runs.push(json!({
                "mesh": mesh, "precision": precision, "losses": calm, "seeds": args.seeds, "seeds_that_differ": differ,
                "from_cpu_relative": apart, "from_cpu_max": CPU_MAX,
            }));
        }
    }
    Ok(Found { json: json!({ "cycles": args.cycles, "runs": runs }), wrong })
}

/// The losses of a training.
fn train(args: &VirtualArgs, mesh: &str, precision: &str, device: &str, spin: Option<u64>) -> Result<Vec<f64>> {
    let mut child = Command::new(std::env::current_exe()?);
    let size = args.size.to_string();
    child.args([
        "train",
        "--mesh",
        mesh,
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
    // On a machine of several GPUs, each device would have its own.
    let visible = std::env::var(VISIBLE).ok().filter(|gpus| !gpus.is_empty());
    child.env(VISIBLE, visible.as_deref().unwrap_or("0").split(',').next().unwrap_or("0"));
    child.envs(spin.map(|seed| (SPIN, format!("{seed}:{}", args.cycles))));
    let output = child.output()?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{mesh}, {precision}, {device}, delays {spin:?}: {}", told.trim()).into());
    }
    let told: Value = serde_json::from_slice(&output.stdout)?;
    let losses = told["losses"].as_array().into_iter().flatten();
    Ok(losses.map(|loss| loss.as_f64().unwrap_or(f64::NAN)).collect())
}
