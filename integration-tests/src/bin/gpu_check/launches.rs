//! Times each launch of a training step, and compares the outputs of each launch with the CPU backend's.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::{Value, json};
use shardflow::plan::Plan;
use shardflow::prelude::{DType, DeviceKind};
use shardflow_actors::spec::StreamKind;
use shardflow_kernels::op::{Buffer, Launch, Op};
use shardflow_kernels::tensor::element_count;

use crate::bench::Bench;
use crate::model::ModelArgs;
use crate::{Found, Result};

/// Tolerance for sums in another order, relative to the magnitude of the element plus the mean magnitude.
const CLOSE: f64 = 1e-4;
/// Tolerance with bf16 operands.
const CLOSE_BF16: f64 = 2e-2;

/// Returns each distinct launch of the compute streams in a step, and how often it occurs.
fn distinct(plan: &Plan) -> Vec<(Launch, usize)> {
    let mut found: BTreeMap<String, (Launch, usize)> = BTreeMap::new();
    for action in plan.clone().instance().actions.values().flatten() {
        let segment = plan.segments.get(action.segment);
        if segment.stream != StreamKind::Compute {
            continue;
        }
        let times = segment.rate.per_step(plan.micro_batches);
        for launch in &action.launches {
            if matches!(launch.op, Op::Collective(_) | Op::Custom(_)) {
                continue;
            }
            let typed = |buffers: &[Buffer]| buffers.iter().map(|b| (b.shape.clone(), b.dtype)).collect::<Vec<_>>();
            let op = match &launch.op {
                // Omit `index`, the row of the result: launches that differ only in this row count as equal.
                Op::SumSquares { .. } => launch.op.name().to_owned(),
                op => format!("{op:?}"),
            };
            let key = format!("{op} {:?} {:?}", typed(&launch.reads), typed(&launch.writes));
            found.entry(key).or_insert_with(|| (launch.clone(), 0)).1 += times;
        }
    }
    found.into_values().collect()
}

/// Returns the floating-point operations of a launch, or 0 if it only moves memory. For attention, counts only the
/// causal half.
fn flops(launch: &Launch) -> f64 {
    let products = match &launch.op {
        Op::Einsum(einsum) => {
            let dims = einsum.gemm_dims(&launch.reads[0].shape, &launch.reads[1].shape);
            return dims.map_or(0.0, |d| 2.0 * (d.m * d.n * d.k) as f64);
        }
        Op::Attention { .. } => 2.0,
        Op::AttentionGrad { .. } => 5.0,
        _ => return 0.0,
    };
    // The first tensor that is read (q forward, the gradient `do` backward) has the shape [b, t, h, d].
    let shape = &launch.reads[0].shape;
    products * (element_count(shape) * shape[1]) as f64
}

fn buffers(buffers: &[Buffer]) -> Value {
    let one = |b: &Buffer| json!({ "shape": b.shape, "type": format!("{:?}", b.dtype).to_lowercase() });
    buffers.iter().map(one).collect()
}

fn describe(launch: &Launch) -> Value {
    let spec = match &launch.op {
        Op::Einsum(e) => format!("{},{}->{}", e.a, e.b, e.out).into(),
        _ => Value::Null,
    };
    json!({ "op": launch.op.name(), "spec": spec, "reads": buffers(&launch.reads), "writes": buffers(&launch.writes) })
}

/// Arguments of [`time`].
#[derive(Args, Clone, Debug)]
pub struct LaunchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Time only the ops whose names start with this text, such as attention.
    #[arg(long, default_value = "")]
    op: String,
}

/// Times the launches and sorts them by their total time per step.
pub fn time(LaunchArgs { model: args, op }: &LaunchArgs) -> Result<Found> {
    let (plan, batch) = args.compile()?;
    let bench = Bench::open(plan.device)?;
    let mut rows: Vec<(f64, Value)> = Vec::new();
    for (launch, count) in distinct(&plan).into_iter().filter(|(launch, _)| launch.op.name().starts_with(op)) {
        let ms = bench.measure(&launch)?;
        let all = launch.reads.iter().chain(&launch.writes);
        let bytes: usize = all.map(|b| element_count(&b.shape) * b.dtype.bytes()).sum();
        let mut row = describe(&launch);
        row["count"] = count.into();
        row["ms"] = ms.into();
        row["ms_per_step"] = (ms * count as f64).into();
        row["gb_per_s"] = (bytes as f64 / ms / 1e6).into();
        row["tflops"] = (flops(&launch) / ms / 1e9).into();
        rows.push((ms * count as f64, row));
    }
    rows.sort_by(|a, b| b.0.total_cmp(&a.0));
    let sum: f64 = rows.iter().map(|row| row.0).sum();
    let launches: Vec<Value> = rows.into_iter().map(|row| row.1).collect();
    let counts: BTreeMap<_, _> = bench.counts().into_iter().collect();
    Ok(json!({ "model": args.json(batch), "sum_ms_per_step": sum, "counts": counts, "launches": launches }).into())
}

/// Runs each launch on the device and on the CPU with the same inputs.
pub fn compare(args: &ModelArgs) -> Result<Found> {
    let (plan, batch) = args.compile()?;
    let (device, cpu) = (Bench::open(plan.device)?, Bench::open(DeviceKind::Cpu)?);
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for (launch, _) in distinct(&plan) {
        let mut all = launch.reads.iter().chain(&launch.writes);
        let close = if all.any(|buffer| buffer.dtype == DType::BF16) { CLOSE_BF16 } else { CLOSE };
        let (got, want) = (device.outputs(&launch)?, cpu.outputs(&launch)?);
        let floats = got.iter().zip(&want).filter_map(|(got, want)| Some((got.to_f32()?, want.to_f32()?)));
        let difference = floats.map(|(got, want)| largest_difference(&got, &want)).fold(0.0, nan_max);
        let mut row = describe(&launch);
        row["relative"] = difference.into();
        row["allowed"] = close.into();
        if difference.is_nan() || difference > close {
            wrong.push(format!("{row}"));
        }
        rows.push(row);
    }
    Ok(Found { json: json!({ "model": args.json(batch), "launches": rows }), wrong })
}

/// Returns the larger value, or NaN if either value is NaN.
fn nan_max(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Returns the largest difference between an element of `got` and that of `want`, relative to the magnitude of the
/// latter plus the mean magnitude of `want`.
fn largest_difference(got: &[f32], want: &[f32]) -> f64 {
    let mean = want.iter().map(|w| f64::from(w.abs())).sum::<f64>() / want.len().max(1) as f64;
    let relative = |(got, want): (&f32, &f32)| {
        let (got, want) = (f64::from(*got), f64::from(*want));
        if got == want { 0.0 } else { (got - want).abs() / (want.abs() + mean) }
    };
    got.iter().zip(want).map(relative).fold(0.0, nan_max)
}
