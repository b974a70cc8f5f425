//! The bits that a CPU kernel writes do not depend on its number of threads (BITS-1). Tests every op on shapes that no
//! tested number of threads divides, from one element to many times the size from which several threads pay off.

use std::sync::Arc;
use std::sync::mpsc::channel;

use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::device::{Device, DeviceKind};
use shardflow_kernels::hash::SplitMix64;
use shardflow_kernels::memory::Base;
use shardflow_kernels::op::{Buffer, Einsum, Launch, Op, Program};
use shardflow_kernels::stream::{Notification, Stream, Submission};
use shardflow_kernels::tensor::{DType, HostTensor, Region, element_count};

/// A launch, and the contents of its buffers before the launch.
struct Case {
    op: Op,
    reads: Vec<HostTensor>,
    writes: Vec<HostTensor>,
}

struct Random(SplitMix64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0.draw()
    }

    fn one_of(&mut self, from: &[usize]) -> usize {
        from[self.next() as usize % from.len()]
    }

    fn floats(&mut self, shape: &[usize]) -> HostTensor {
        let value = |bits: u64| (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        HostTensor::f32(shape, (0..element_count(shape)).map(|_| value(self.next())).collect())
    }

    fn indices(&mut self, shape: &[usize], below: usize) -> HostTensor {
        HostTensor::i32(shape, (0..element_count(shape)).map(|_| (self.next() % below as u64) as i32).collect())
    }

    fn case(&mut self, op: Op, reads: Vec<HostTensor>, writes: &[&[usize]]) -> Case {
        let writes = writes.iter().map(|shape| self.floats(shape)).collect();
        Case { op, reads, writes }
    }

    /// A product. Each of its operands and its result is stored plain or transposed.
    fn product(&mut self, [m, n, k]: [usize; 3]) -> Case {
        let pick =
            |one: [char; 2], other: bool| -> String { if other { [one[1], one[0]] } else { one }.iter().collect() };
        let bits = self.next();
        let [a, b, out] =
            [(['m', 'k'], 1), (['k', 'n'], 2), (['m', 'n'], 4)].map(|(dims, bit)| pick(dims, bits & bit > 0));
        let extent = |dims: &str| -> Vec<usize> {
            let of = |dim| {
                if dim == 'm' {
                    m
                } else if dim == 'n' {
                    n
                } else {
                    k
                }
            };
            dims.chars().map(of).collect()
        };
        let op = Op::Einsum(Einsum::parse(&format!("{a},{b}->{out}")).expect("a product"));
        let reads = vec![self.floats(&extent(&a)), self.floats(&extent(&b))];
        self.case(op, reads, &[&extent(&out)])
    }

    /// A case of each op on `rows` rows of `width` elements.
    fn rows(&mut self, rows: usize, width: usize) -> Vec<Case> {
        let (x, row, line): (&[usize], &[usize], &[usize]) = (&[rows, width], &[rows], &[width]);
        let [a, b, weight] = [self.floats(x), self.floats(x), self.floats(line)];
        let [mean, rstd, max] = [self.floats(row), self.floats(row), self.floats(row)];
        let vocab = 37;
        let (ids, targets, table) = (self.indices(row, vocab), self.indices(row, width), self.floats(&[vocab, width]));
        let region = Region { start: vec![0, 0], size: x.to_vec() };
        let dropout = Op::Dropout { p: 0.3, seed: 7, shape: x.to_vec(), start: vec![0, 0], stride: 0 };
        let adamw = Op::AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
        let one = |value| HostTensor::f32(&[], vec![value]);
        let step = HostTensor::f32(&[2], vec![1e-3, 3.0]);
        vec![
            self.case(Op::Fill { value: 0.3 }, vec![], &[x]),
            self.case(Op::Copy, vec![a.clone()], &[x]),
            self.case(Op::CopyRegion { src: region.clone(), dst: region }, vec![a.clone()], &[x]),
            self.case(Op::Add, vec![a.clone(), b.clone()], &[x]),
            self.case(Op::Add, vec![a.clone(), weight.clone()], &[x]),
            self.case(Op::SumLeading, vec![a.clone()], &[line]),
            self.case(Op::SumLeading, vec![a.clone()], &[&[]]),
            self.case(Op::Scale { factor: 0.7 }, vec![a.clone()], &[x]),
            self.case(Op::Embedding { vocab_start: 0, vocab }, vec![ids.clone(), table], &[x]),
            self.case(Op::EmbeddingGrad { vocab_start: 0 }, vec![ids, a.clone()], &[&[vocab, width]]),
            self.case(Op::LayerNorm { eps: 1e-5 }, vec![a.clone(), weight.clone()], &[x, row, row]),
            self.case(Op::LayerNormGrad, vec![a.clone(), b.clone(), weight, mean, rstd.clone()], &[x, line]),
            self.case(Op::Gelu, vec![a.clone()], &[x]),
            self.case(Op::GeluGrad, vec![a.clone(), b.clone()], &[x]),
            self.case(Op::RowMax, vec![a.clone()], &[row]),
            self.case(
                Op::SumExpTarget { vocab_start: 0, vocab: width },
                vec![a.clone(), max.clone(), targets.clone()],
                &[row, row],
            ),
            self.case(Op::TokenLoss { scale: 0.1 }, vec![max.clone(), positive(&rstd), max.clone()], &[&[]]),
            self.case(
                Op::CrossEntropyGrad { vocab_start: 0, scale: 0.1 },
                vec![one(1.5), a.clone(), max, positive(&rstd), targets],
                &[x],
            ),
            self.case(dropout, vec![a.clone(), HostTensor::i32(&[2], vec![5, 0])], &[x]),
            self.case(Op::SumSquares { index: 1 }, vec![a.clone()], &[&[2, 2]]),
            Case {
                op: adamw,
                reads: vec![a.clone(), step, one(0.5)],
                writes: vec![b.clone(), a.clone(), positive(&b)],
            },
        ]
    }

    fn attention(&mut self, [batch, time, heads, depth]: [usize; 4]) -> [Case; 2] {
        let (x, lse): (&[usize], &[usize]) = (&[batch, time, heads, depth], &[batch, heads, time]);
        let [q, k, v, o, d_o] = [0; 5].map(|_| self.floats(x));
        let line = self.floats(lse);
        [
            self.case(Op::Attention { scale: 0.3 }, vec![q.clone(), k.clone(), v.clone()], &[x, lse]),
            self.case(Op::AttentionGrad { scale: 0.3 }, vec![d_o, q, k, v, o, line], &[x; 3]),
        ]
    }
}

fn positive(x: &HostTensor) -> HostTensor {
    HostTensor::f32(&x.shape, x.as_f32().expect("floats").iter().map(|x| x * x + 1e-3).collect())
}

/// Returns the bits that the case writes. The first run overwrites the initial values. If the op can accumulate, a
/// second run adds to the initial values.
fn bits(stream: &Stream, device: &Device, case: &Case) -> Vec<Vec<u32>> {
    let mut end = 0;
    let tensors: Vec<&HostTensor> = case.reads.iter().chain(&case.writes).collect();
    let mut buffers: Vec<Buffer> = Vec::new();
    for tensor in &tensors {
        buffers.push(Buffer { base: 0, offset: end, shape: tensor.shape.clone(), dtype: tensor.dtype() });
        end = (end + element_count(&tensor.shape) * 4).next_multiple_of(64);
    }
    let writes = buffers.split_off(case.reads.len());
    let accumulate = case.op.can_accumulate().is_some();
    let launch = Launch { op: case.op.clone(), reads: buffers, writes, accumulate, workspace: None };
    assert_eq!(DeviceKind::Cpu.workspace_bytes(&launch), 0, "the arena must not depend on threads");
    let arena = device.arena(end).expect("memory");
    let mut out = Vec::new();
    for repeat in [false, true].into_iter().take(1 + usize::from(accumulate)) {
        for (buffer, tensor) in launch.reads.iter().chain(&launch.writes).zip(&tensors) {
            arena.write_host(buffer.offset, tensor).expect("in bounds");
        }
        let program = Program { name: "threads".to_owned(), launches: vec![launch.clone()], signals: vec![] };
        let (sender, notifications) = channel();
        let notify = Box::new(move |notification| drop(sender.send(notification)));
        let bases = vec![Base { arena: arena.clone(), offset: 0 }];
        stream.submit(Submission { program: Arc::new(program), bases, repeat, notify }).expect("an open stream");
        assert_eq!(notifications.recv(), Ok(Notification::Done), "{:?}", case.op);
        let read = |w: &Buffer| arena.read_host(w.offset, &w.shape, DType::F32).expect("in bounds");
        let tensors = launch.writes.iter().map(read);
        out.extend(tensors.map(|t| t.as_f32().expect("floats").iter().map(|x| x.to_bits()).collect::<Vec<u32>>()));
    }
    out
}

/// Runs each case on 1, 2, 3 and 5 threads.
fn check(cases: impl IntoIterator<Item = Case>) {
    let streams = [1, 2, 3, 5].map(|threads| {
        let device = Device::cpu(0, threads, Arc::new(InProcess::new()));
        (threads, device.stream("threads", threads).expect("threads"), device)
    });
    for case in cases {
        let mut results = streams.iter().map(|(threads, stream, device)| (threads, bits(stream, device, &case)));
        let (_, one) = results.next().expect("a first");
        for (threads, got) in results {
            let shapes: Vec<_> = case.reads.iter().map(|read| &read.shape).collect();
            let differ = |(i, (a, b)): (usize, (&Vec<u32>, &Vec<u32>))| {
                a.iter().zip(b).position(|(a, b)| a != b).map(|at| format!("write {i}, element {at}"))
            };
            let place = one.iter().zip(&got).enumerate().find_map(differ);
            assert!(place.is_none(), "{} of {shapes:?} on {threads} threads: {place:?} differs", case.op.name());
        }
    }
}

#[test]
fn ops_on_rows() {
    let mut random = Random(SplitMix64(1));
    for (rows, width) in [(1, 1), (3, 5), (17, 16), (130, 65), (1031, 33), (5, 70_001), (523, 384), (70_001, 1)] {
        check(random.rows(rows, width));
    }
}

#[test]
fn attention() {
    let mut random = Random(SplitMix64(2));
    for shape in [[1, 1, 1, 1], [3, 17, 5, 8], [2, 65, 3, 32], [7, 130, 1, 5], [1, 600, 3, 4]] {
        check(random.attention(shape));
    }
}

/// Tests shapes for which matrix libraries switch algorithms: vectors, small results, short and long sums.
#[test]
fn products() {
    let mut random = Random(SplitMix64(3));
    let sizes = [1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 65, 129, 200];
    let depths = [1, 2, 3, 16, 63, 257, 512, 513, 1030, 2000];
    let small = (0..250).map(|_| [random.one_of(&sizes), random.one_of(&sizes), random.one_of(&depths)]);
    // Slices of these products are vectors or small matrices, or the sums are split into blocks.
    let chosen = [[17, 1, 40_000], [1, 17, 40_000], [33, 16, 2000], [16, 33, 2000], [769, 129, 130], [70_001, 1, 3]];
    let shapes: Vec<[usize; 3]> = small.chain(chosen).collect();
    for shape in shapes {
        check([random.product(shape)]);
    }
}
