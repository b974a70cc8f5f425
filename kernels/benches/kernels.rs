//! Measures the throughput of the kernels that dominate a transformer's step, for two model sizes, on 1 and 2 threads.
//! `cargo bench -p shardflow-kernels` prints GFLOP/s for products and attention, ns per element for other kernels, and
//! an estimate for a whole step (forward, backward, AdamW). Pass a number of threads to measure only with that number.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::Base;
use shardflow_kernels::op::{Buffer, Einsum, Launch, Op, Program};
use shardflow_kernels::stream::{Stream, Submission};
use shardflow_kernels::tensor::{DType, HostTensor, element_count};

/// Number of consecutive launches of a kernel in one measurement. The fastest of several measurements counts.
const LAUNCHES: usize = 10;

struct Model {
    layers: usize,
    width: usize,
    heads: usize,
    context: usize,
    batch: usize,
    vocab: usize,
}

struct Bench {
    stream: Stream,
    device: Device,
}

impl Bench {
    /// Returns the milliseconds per launch. Float buffers contain small values, and integer buffers contain zeros.
    fn measure(&self, op: Op, reads: &[(&[usize], DType)], writes: &[&[usize]]) -> f64 {
        let mut end = 0;
        let mut place = |shape: &[usize], dtype: DType| {
            let offset = end;
            end += (element_count(shape) * dtype.bytes()).next_multiple_of(64);
            Buffer { base: 0, offset, shape: shape.to_vec(), dtype }
        };
        let reads: Vec<Buffer> = reads.iter().map(|&(shape, dtype)| place(shape, dtype)).collect();
        let writes: Vec<Buffer> = writes.iter().map(|&shape| place(shape, DType::F32)).collect();
        let arena = self.device.arena(end).expect("memory");
        for read in reads.iter().filter(|read| read.dtype == DType::F32) {
            let values = (0..element_count(&read.shape)).map(|i| 0.1 + (i % 17) as f32 * 0.01).collect();
            arena.write_host(read.offset, &HostTensor::f32(&read.shape, values)).expect("in bounds");
        }
        let launch = Launch { op, reads, writes, accumulate: false, workspace: None };
        let program = Arc::new(Program { name: "bench".to_owned(), launches: vec![launch; LAUNCHES], signals: vec![] });
        let once = || {
            let (sender, ends) = channel();
            let began = Instant::now();
            let bases = vec![Base { arena: arena.clone(), offset: 0 }];
            let notify = Box::new(move |notification| drop(sender.send(notification)));
            let submission = Submission { program: program.clone(), bases, repeat: false, notify };
            self.stream.submit(submission).expect("an open stream");
            let notification = ends.recv().expect("an end");
            assert_eq!(notification, shardflow_kernels::stream::Notification::Done);
            began.elapsed().as_secs_f64() * 1e3 / LAUNCHES as f64
        };
        (0..7).map(|_| once()).fold(f64::INFINITY, f64::min)
    }

    fn product(&self, what: &str, text: &str, a: &[usize], b: &[usize]) -> f64 {
        let einsum = Einsum::parse(text).expect("a product");
        let (dims, out) = (einsum.gemm_dims(a, b).expect("fits"), einsum.output_shape(a, b).expect("fits"));
        let ms = self.measure(Op::Einsum(einsum), &[(a, DType::F32), (b, DType::F32)], &[&out]);
        let flops = 2.0 * (dims.m * dims.n * dims.k) as f64;
        println!("  {what:28} {:8.3} ms {:8.1} GFLOP/s", ms, flops / ms / 1e6);
        ms
    }

    /// Measures a linear layer and its two gradients.
    fn linear(&self, what: &str, rows: usize, inputs: usize, outputs: usize) -> f64 {
        self.product(&format!("{what} forward"), "rc,oc->ro", &[rows, inputs], &[outputs, inputs])
            + self.product(&format!("{what} dx"), "ro,oc->rc", &[rows, outputs], &[outputs, inputs])
            + self.product(&format!("{what} dw"), "ro,rc->oc", &[rows, outputs], &[rows, inputs])
    }

    fn light(&self, what: &str, op: Op, reads: &[&[usize]], writes: &[&[usize]]) -> f64 {
        let typed: Vec<_> = reads.iter().map(|&shape| (shape, DType::F32)).collect();
        let ms = self.measure(op, &typed, writes);
        let elements = reads.iter().chain(writes).map(|shape| element_count(shape)).max().unwrap_or(1);
        println!("  {what:28} {:8.3} ms {:8.3} ns/element", ms, ms * 1e6 / elements as f64);
        ms
    }

    /// Estimates the milliseconds of a whole step from the times of its kernels.
    fn step(&self, model: &Model) -> f64 {
        let &Model { layers, width: c, heads, context, batch, vocab } = model;
        let (rows, depth) = (batch * context, c / heads);
        println!("{layers} layers of {c}, context {context}, batch {batch}, {} threads", self.stream.threads());
        let mut layer = self.linear("qkv", rows, c, 3 * c);
        layer += self.linear("projection", rows, c, c);
        layer += self.linear("up", rows, c, 4 * c);
        layer += self.linear("down", rows, 4 * c, c);
        let (heads4, lse) = ([batch, context, heads, depth], [batch, heads, context]);
        let scale = 1.0 / (depth as f32).sqrt();
        for (what, op, reads, writes, products) in [
            ("attention", Op::Attention { scale }, vec![&heads4[..]; 3], vec![&heads4[..], &lse], 2.0),
            (
                "attention grad",
                Op::AttentionGrad { scale },
                [vec![&heads4[..]; 5], vec![&lse[..]]].concat(),
                vec![&heads4[..]; 3],
                5.0,
            ),
        ] {
            let typed: Vec<_> = reads.into_iter().map(|shape| (shape, DType::F32)).collect();
            let ms = self.measure(op, &typed, &writes);
            // Counts only the causal half of the scores.
            let flops = products * (batch * heads * context * context * depth) as f64;
            println!("  {what:28} {ms:8.3} ms {:8.1} GFLOP/s", flops / ms / 1e6);
            layer += ms;
        }
        let (x, weight, rows1, wide) = ([rows, c], [c], [rows], [rows, 4 * c]);
        layer += self.light("gelu", Op::Gelu, &[&wide], &[&wide]);
        layer += self.light("gelu grad", Op::GeluGrad, &[&wide, &wide], &[&wide]);
        layer += 2.0 * self.light("layer norm", Op::LayerNorm { eps: 1e-5 }, &[&x, &weight], &[&x, &rows1, &rows1]);
        let reads = [&x[..], &x, &weight, &rows1, &rows1];
        layer += 2.0 * self.light("layer norm grad", Op::LayerNormGrad, &reads, &[&x, &weight]);
        layer += 4.0 * self.light("add", Op::Add, &[&x, &x], &[&x]);
        layer += 2.0 * self.light("add bias", Op::Add, &[&wide, &[4 * c]], &[&wide]);
        layer += 2.0 * self.light("sum leading", Op::SumLeading, &[&wide], &[&[4 * c]]);
        let p = [12 * c * c];
        let adamw = Op::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        layer += self.light("adamw", adamw, &[&p, &[2], &[]], &[&p, &p, &p]);
        layer += self.light("sum of squares", Op::SumSquares { index: 0 }, &[&p], &[&[1, 2]]);
        let mut ends = self.linear("head", rows, c, vocab);
        let logits = [rows, vocab];
        ends += self.light("row max", Op::RowMax, &[&logits], &[&rows1]);
        let sum_exp = Op::SumExpTarget { vocab_start: 0, vocab };
        let integers = [(&logits[..], DType::F32), (&rows1, DType::F32), (&rows1, DType::I32)];
        ends += self.measure(sum_exp, &integers, &[&rows1, &rows1]);
        let grad = Op::CrossEntropyGrad { vocab_start: 0, scale: 1.0 };
        let floats = |shape| (shape, DType::F32);
        let reads = [floats(&[][..]), floats(&logits), floats(&rows1), floats(&rows1), (&rows1, DType::I32)];
        ends += self.measure(grad, &reads, &[&logits]);
        let step = layers as f64 * layer + ends;
        println!("  {:28} {step:8.1} ms", "whole step (estimate)");
        step
    }
}

fn main() {
    let models = [
        Model { layers: 4, width: 128, heads: 4, context: 64, batch: 12, vocab: 65 },
        Model { layers: 6, width: 384, heads: 6, context: 256, batch: 8, vocab: 65 },
    ];
    let threads: Vec<usize> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let threads = if threads.is_empty() { vec![1, 2] } else { threads };
    for threads in threads {
        let device = Device::cpu(0, threads, Arc::new(InProcess::new()));
        let stream = device.stream("bench", threads).expect("a thread");
        let bench = Bench { stream, device };
        for model in &models {
            bench.step(model);
        }
    }
}
