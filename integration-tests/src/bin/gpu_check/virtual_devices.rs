//! Four devices of a mesh on one GPU. Whatever the delays on its streams, losses keep their bits; in f32 they are the CPU
//! backend's within a tolerance. Each training is a process of its own, since delays are asked for by the environment.

use std::process::Command;

use clap::Args;
use serde_json::{Value, json};
use shardflow_kernels::cuda::test_delay::SPIN;

use crate::{Found, Result};

/// Relative difference of losses from the CPU backend's: sums in another order, other roundings of exp and erf.
const CPU_MAX: f64 = 1e-4;

/// Which GPUs the driver shows.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// See [`run`].
#[derive(Args, Clone, Debug)]
pub struct VirtualArgs {
    /// How the four devices share the work.
    #[arg(long)]
    mesh: String,
    /// Trainings with delays, in each precision.
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

/// Trains in each precision. A training that fails is told with the others' results.
pub fn run(args: &VirtualArgs) -> Result<Found> {
    let (mut runs, mut wrong) = (Vec::new(), Vec::new());
    for precision in ["f32", "bf16"] {
        let mut losses = |device, seed| {
            let told = train(args, precision, device, seed);
            // Whoever breaks it off sees how far it came.
            eprintln!("{precision}, {device}, delays {seed:?}: {told:?}");
            told.map_err(|error| wrong.push(error.to_string())).ok()
        };
        let calm = losses("cuda", None);
        let delayed: Vec<_> = (1..=args.seeds).map(|seed| (seed, losses("cuda", Some(seed)))).collect();
        let cpu = if precision == "f32" { losses("cpu", None) } else { None };
        let differ: Vec<_> = delayed.iter().filter(|(_, losses)| losses.is_none() || *losses != calm).collect();
        wrong.extend(
            differ
                .iter()
                .map(|(seed, losses)| format!("{precision}: delays of seed {seed} give {losses:?}, none {calm:?}")),
        );
        let differ: Vec<u64> = differ.into_iter().map(|(seed, _)| *seed).collect();
        let apart = calm.iter().flatten().zip(cpu.iter().flatten());
        let apart = apart.map(|(a, b)| (a - b).abs() / a.abs().max(b.abs())).reduce(f64::max);
        if apart.is_some_and(|apart| apart.is_nan() || apart > CPU_MAX) {
            wrong.push(format!("losses are {apart:?} from the CPU backend's, {CPU_MAX} is allowed"));
        }
        runs.push(json!({
            "precision": precision, "losses": calm, "seeds": args.seeds, "seeds_that_differ": differ,
            "from_cpu_relative": apart, "from_cpu_max": CPU_MAX,
        }));
    }
    Ok(Found { json: json!({ "mesh": args.mesh, "cycles": args.cycles, "runs": runs }), wrong })
}

/// The losses of a training.
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
    // On a machine of several GPUs, each device would have its own.
    let visible = std::env::var(VISIBLE).ok().filter(|gpus| !gpus.is_empty());
    child.env(VISIBLE, visible.as_deref().unwrap_or("0").split(',').next().unwrap_or("0"));
    child.envs(spin.map(|seed| (SPIN, format!("{seed}:{}", args.cycles))));
    let output = child.output()?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{precision}, {device}, delays {spin:?}: {}", told.trim()).into());
    }
    let told: Value = serde_json::from_slice(&output.stdout)?;
    let losses = told["losses"].as_array().into_iter().flatten();
    Ok(losses.map(|loss| loss.as_f64().unwrap_or(f64::NAN)).collect())
}
