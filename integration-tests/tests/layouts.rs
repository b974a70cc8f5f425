//! In every layout that an op's rule permits, the op's result equals its result on whole tensors. The meshes have one
//! axis of 2, 3 or 4 devices, or two axes of 2x2 or 2x3 devices. Dims do not divide evenly, and shards are empty if a
//! dim is shorter than a mesh axis.

use std::sync::Arc;

use shardflow::graph::ops;
use shardflow::init::mix;
use shardflow::placement::{Mesh, Placement};
use shardflow::sbp::rule::{NdSignature, Rule};
use shardflow::sbp::{NdSbp, Sbp, gather, local_region, scatter};
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::Base;
use shardflow_kernels::op::{Buffer, Einsum, Launch, Op, Program};
use shardflow_kernels::stream::{Notification, Stream, Submission};
use shardflow_kernels::tensor::{DType, HostTensor, Region};

/// Returns values between about -1 and 1. Different keys give different values.
fn values(shape: &[usize], key: u64) -> HostTensor {
    let count = shape.iter().product::<usize>() as u64;
    let unit = |i: u64| (mix(key * 1_000_003 + i) >> 40) as f32 / (1 << 23) as f32 - 1.0;
    HostTensor::f32(shape, (0..count).map(unit).collect())
}

fn ids(shape: &[usize], below: u64, key: u64) -> HostTensor {
    let count = shape.iter().product::<usize>() as u64;
    HostTensor::i32(shape, (0..count).map(|i| (mix(key + i) % below) as i32).collect())
}

/// Runs ops on one CPU stream.
struct Runner {
    device: Device,
    stream: Stream,
}

impl Runner {
    fn new() -> Self {
        let device = Device::cpu(0, 1, Arc::new(InProcess::new()));
        let stream = device.stream("layouts", 1).expect("a thread");
        Self { device, stream }
    }

    /// Runs an op. `before` is the initial content of the outputs, for an op that updates its outputs in place.
    fn run(&self, op: &Op, reads: &[HostTensor], before: Vec<HostTensor>) -> Vec<HostTensor> {
        let (mut end, mut buffers) = (0, Vec::new());
        for tensor in reads.iter().chain(&before) {
            let (shape, dtype) = (tensor.shape.clone(), tensor.dtype());
            buffers.push(Buffer { base: 0, offset: end, shape, dtype });
            end = (end + tensor.shape.iter().product::<usize>() * 4).next_multiple_of(64);
        }
        let arena = self.device.arena(end).expect("memory");
        for (tensor, buffer) in reads.iter().chain(&before).zip(&buffers) {
            arena.write_host(buffer.offset, tensor).expect("in bounds");
        }
        let (reads, writes) = buffers.split_at(reads.len());
        let launch = Launch {
            op: op.clone(),
            reads: reads.to_vec(),
            writes: writes.to_vec(),
            accumulate: false,
            workspace: None,
        };
        let program = Arc::new(Program { name: op.name().to_string(), launches: vec![launch], signals: Vec::new() });
        let (sender, receiver) = std::sync::mpsc::channel();
        let notify = Box::new(move |notice| drop(sender.send(notice)));
        let bases = vec![Base { arena: arena.clone(), offset: 0 }];
        self.stream.submit(Submission { program, bases, repeat: false, notify }).expect("the stream is open");
        assert_eq!(receiver.recv(), Ok(Notification::Done), "{op:?}");
        writes.iter().map(|w| arena.read_host(w.offset, &w.shape, w.dtype).expect("in bounds")).collect()
    }
}

/// An op, its whole inputs, and the initial content of its outputs.
struct Case {
    op: Op,
    rule: Rule,
    inputs: Vec<HostTensor>,
    before: Vec<HostTensor>,
}

fn poisoned(shape: &[usize]) -> HostTensor {
    HostTensor::f32(shape, vec![f32::NAN; shape.iter().product()])
}

fn case(op: Op, inputs: Vec<HostTensor>) -> Case {
    let shapes: Vec<&[usize]> = inputs.iter().map(|t| t.shape.as_slice()).collect();
    let rule = ops::rule(&op, &shapes).expect("a rule");
    let outputs = rule.infer_shapes(&shapes).expect("shapes that fit");
    let before = outputs.iter().map(|shape| match (&op, inputs[0].dtype()) {
        (Op::Copy, DType::I32) => HostTensor::i32(shape, vec![-1; shape.iter().product()]),
        _ => poisoned(shape),
    });
    Case { before: before.collect(), op, rule, inputs }
}

fn einsum(spec: &str, a: &[usize], b: &[usize]) -> Case {
    case(Op::Einsum(Einsum::parse(spec).expect("a product")), vec![values(a, 1), values(b, 2)])
}

/// Returns every op that a graph can contain, with uneven shapes. The dim `b` may be shorter than a mesh axis.
fn cases(runner: &Runner) -> Vec<Case> {
    let (b, t, c, h, d, v) = (3, 5, 7, 3, 4, 11);
    let (btc, bt, bthd, btv) = ([b, t, c], [b, t], [b, t, h, d], [b, t, v]);
    let targets = || ids(&bt, v as u64, 9);
    let mut all = vec![
        case(Op::Copy, vec![values(&btc, 1)]),
        case(Op::Copy, vec![ids(&bt, 9, 1)]),
        case(Op::Scale { factor: -1.5 }, vec![values(&btc, 1)]),
        case(Op::Add, vec![values(&btc, 1), values(&btc, 2)]),
        case(Op::Add, vec![values(&btc, 1), values(&[t, c], 2)]),
        case(Op::Gelu, vec![values(&btc, 1)]),
        case(Op::GeluGrad, vec![values(&btc, 1), values(&btc, 2)]),
        case(Op::Embedding { vocab_start: 0, vocab: v }, vec![targets(), values(&[v, c], 2)]),
        einsum("btc,oc->bto", &btc, &[6, c]),
        einsum("btc,hdc->bthd", &btc, &[h, d, c]),
        einsum("bthd,chd->btc", &bthd, &[c, h, d]),
        einsum("bthd,hdc->btc", &bthd, &[h, d, c]),
        einsum("bthd,btc->hdc", &bthd, &btc),
        einsum("btc,bthd->chd", &btc, &bthd),
        case(
            Op::Dropout { p: 0.3, seed: 5, shape: btc.to_vec(), start: vec![0; 3], stride: t * c },
            vec![values(&btc, 1), HostTensor::i32(&[2], vec![7, 12])],
        ),
    ];
    // In the gradients of a broadcast sum and of the embedding, some dims exist only in the output.
    let mut sum = case(Op::Copy, vec![values(&btc, 1)]);
    (sum.op, sum.rule, sum.before) = (Op::SumLeading, ops::sum_leading(3, 2).expect("a rule"), vec![poisoned(&[t, c])]);
    all.push(sum);
    let grad = Op::EmbeddingGrad { vocab_start: 0 };
    let rule = ops::rule(&grad, &[&bt, &btc]).and_then(|r| r.size('v', v)).expect("a rule");
    all.push(Case { op: grad, rule, inputs: vec![targets(), values(&btc, 2)], before: vec![poisoned(&[v, c])] });

    let norm = case(Op::LayerNorm { eps: 1e-5 }, vec![values(&btc, 1), values(&[c], 2)]);
    let made = runner.run(&norm.op, &norm.inputs, norm.before.clone());
    let (x, weight) = (norm.inputs[0].clone(), norm.inputs[1].clone());
    all.push(case(Op::LayerNormGrad, vec![values(&btc, 3), x, weight, made[1].clone(), made[2].clone()]));
    all.push(norm);

    let attention = case(Op::Attention { scale: 0.5 }, vec![values(&bthd, 1), values(&bthd, 2), values(&bthd, 3)]);
    let made = runner.run(&attention.op, &attention.inputs, attention.before.clone());
    let mut inputs = vec![values(&bthd, 4)];
    inputs.extend(attention.inputs.iter().chain(&made).cloned());
    all.push(case(Op::AttentionGrad { scale: 0.5 }, inputs));
    all.push(attention);

    let logits = values(&btv, 1);
    let row_max = case(Op::RowMax, vec![logits.clone()]);
    let max = runner.run(&row_max.op, &row_max.inputs, row_max.before.clone()).remove(0);
    all.push(row_max);
    let sums = case(Op::SumExpTarget { vocab_start: 0, vocab: v }, vec![logits.clone(), max.clone(), targets()]);
    let stats = runner.run(&sums.op, &sums.inputs, sums.before.clone());
    all.push(sums);
    all.push(case(Op::TokenLoss { scale: 0.25 }, vec![max.clone(), stats[0].clone(), stats[1].clone()]));
    let grad = Op::CrossEntropyGrad { vocab_start: 0, scale: 0.25 };
    all.push(case(grad, vec![values(&[], 4), logits, max, stats[0].clone(), targets()]));

    let adamw = Op::AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
    let hyper = HostTensor::f32(&[2], vec![1e-2, 3.0]);
    let mut update = case(adamw, vec![values(&[v, c], 1), hyper, HostTensor::f32(&[], vec![0.5])]);
    let squares = values(&[v, c], 4).as_f32().expect("floats").iter().map(|x| x * x).collect();
    update.before = vec![values(&[v, c], 2), values(&[v, c], 3), HostTensor::f32(&[v, c], squares)];
    all.push(update);
    all
}

/// Runs an op in the layouts of one signature, and compares the result. Returns false if an integer tensor has a
/// partial layout, because such a layout cannot exist.
fn check(runner: &Runner, case: &Case, whole: &[HostTensor], signature: &NdSignature, placement: &Placement) -> bool {
    let integer_partial = |(t, l): (&HostTensor, &NdSbp)| t.dtype() == DType::I32 && l.partial().is_some();
    if case.inputs.iter().zip(&signature.inputs).any(integer_partial) {
        return false;
    }
    let inputs: Vec<Vec<HostTensor>> = case
        .inputs
        .iter()
        .zip(&signature.inputs)
        .enumerate()
        .map(|(i, (t, l))| scatter(t, l, placement, i as u64).expect("a layout that fits"))
        .collect();
    // Tensors that are updated in place have the layout of the output. In a partial layout, they start as NaN.
    let before = |index: usize| -> Vec<HostTensor> {
        let part = |(t, l): (&HostTensor, &NdSbp)| {
            let region = local_region(&t.shape, l, placement, index);
            shardflow::sbp::region::slice_region(t, &region)
        };
        case.before.iter().zip(&signature.outputs).map(part).collect()
    };
    let regions = |tensors: &[HostTensor], layouts: &[NdSbp], index: usize| -> Vec<Region> {
        tensors.iter().zip(layouts).map(|(t, l)| local_region(&t.shape, l, placement, index)).collect()
    };
    let mut outputs: Vec<Vec<HostTensor>> = vec![Vec::new(); case.before.len()];
    for index in 0..placement.device_count() {
        let (ins, outs) =
            (regions(&case.inputs, &signature.inputs, index), regions(&case.before, &signature.outputs, index));
        let op = ops::localize(&case.op, &ins, &outs);
        let reads: Vec<HostTensor> = inputs.iter().map(|shards| shards[index].clone()).collect();
        for (all, made) in outputs.iter_mut().zip(runner.run(&op, &reads, before(index))) {
            all.push(made);
        }
    }
    // Partial inputs have random integer terms much larger than the values, so sums of them are less precise.
    let has_terms = signature.inputs.iter().any(|l| l.partial().is_some());
    let tolerance = if has_terms { 5e-4 } else { 1e-5 };
    for ((expected, layout), parts) in whole.iter().zip(&signature.outputs).zip(&outputs) {
        let got = gather(parts, &expected.shape, layout, placement);
        let got = got.unwrap_or_else(|e| panic!("{} as {signature} on {placement}: {e}", case.op.name()));
        let Some(values) = expected.as_f32() else {
            assert_eq!(got, *expected, "{} as {signature} on {placement}", case.op.name());
            continue;
        };
        let scale = values.iter().fold(1.0f32, |m, v| m.max(v.abs()));
        for (i, (a, b)) in got.as_f32().expect("floats").iter().zip(values).enumerate() {
            let close = (a - b).abs() <= tolerance * scale || a == b;
            assert!(close, "{} as {signature} on {placement}: element {i} is {a}, but {b} unsharded", case.op.name());
        }
    }
    true
}

#[test]
fn every_op_in_every_derivable_layout_equals_the_unsharded_op() {
    let runner = Runner::new();
    let meshes = ["a=2", "a=3", "a=4", "a=2,b=2", "a=2,b=3"].map(|m| Mesh::parse(m).expect("a mesh").whole());
    let (mut checked, mut split) = (0, 0);
    for case in cases(&runner) {
        let whole = runner.run(&case.op, &case.inputs, case.before.clone());
        for placement in &meshes {
            for signature in case.rule.signatures(placement.axes().len()) {
                if check(&runner, &case, &whole, &signature, placement) {
                    checked += 1;
                    split +=
                        usize::from(signature.inputs.iter().any(|l| l.0.iter().any(|s| matches!(s, Sbp::Split(_)))));
                }
            }
        }
    }
    // The number of derivable layouts falls only if a rule permits fewer layouts.
    assert!(checked > 1500 && split > 1000, "{checked} layouts checked, {split} with a split");
}
