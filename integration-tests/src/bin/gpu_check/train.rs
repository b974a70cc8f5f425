//! Trains for some steps and reports losses, speed and memory.

use std::collections::BTreeMap;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use shardflow::prelude::*;
use shardflow_integration_tests::measure::median;
use shardflow_kernels::cuda::gpu::Gpu;

use crate::model::{ModelArgs, On};
use crate::{Found, Result};

/// Arguments of [`run`].
#[derive(Args, Clone, Debug)]
pub struct TrainArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Number of warm-up steps. Their losses are reported.
    #[arg(long, default_value_t = 10)]
    pub steps: u64,
    /// Number of timed steps after the warm-up.
    #[arg(long, default_value_t = 30)]
    pub timed: usize,
    #[arg(long, default_value_t = 3e-4)]
    pub lr: f32,
}

/// Trains, and returns the report.
pub fn run(args: &TrainArgs) -> Result<Found> {
    let begin = Instant::now();
    let model = &args.model;
    // Open the GPU before the first reading of free memory, so the training's memory does not include the context.
    let gpu = if model.device == On::Cuda { Some(Gpu::open(0)?) } else { None };
    let free = || gpu.as_ref().map(|gpu| gpu.memory().map(|(free, _)| free)).transpose();
    let free_before = free()?;
    let (plan, batch) = model.compile()?;
    let weights: usize = plan.graph.parameters().iter().map(|v| plan.graph.shape(*v).iter().product::<usize>()).sum();
    let planned_bytes: usize = plan.memories().map(|memory| memory.total_bytes()).sum();
    let mut session = Session::start(plan, &SessionOptions::default())?;
    let started_s = begin.elapsed().as_secs_f64();
    let mut losses = Vec::new();
    for step in 0..args.steps {
        losses.push(session.step(&model.batch(step, batch), args.lr)?.loss);
    }
    let mut ms = Vec::new();
    for step in args.steps..args.steps + args.timed as u64 {
        let inputs = model.batch(step, batch);
        let begin = Instant::now();
        session.step(&inputs, args.lr)?;
        ms.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let driver_bytes = free_before.zip(free()?).map(|(before, now)| before.saturating_sub(now));
    // Devices that share a GPU report the same counters.
    let counts: BTreeMap<_, _> = session.metrics().devices.iter().flat_map(|device| device.counts.clone()).collect();
    session.shutdown()?;
    let median = median(ms);
    let tokens_per_s = median.map(|ms| (batch * model.context) as f64 / ms * 1e3);
    let wrong = losses.iter().position(|loss| !loss.is_some_and(f32::is_finite));
    let wrong = wrong.map(|step| format!("the loss of step {step} is missing, Inf or NaN"));
    let json = json!({
        "program": "shardflow", "model": model.json(batch), "weights": weights, "lr": args.lr, "losses": losses,
        "ms_per_step": median, "timed_steps": args.timed, "tokens_per_s": tokens_per_s, "started_s": started_s,
        "counts": counts,
        "memory": { "planned_bytes": planned_bytes, "driver_bytes": driver_bytes },
    });
    Ok(Found { json, wrong: wrong.into_iter().collect() })
}
