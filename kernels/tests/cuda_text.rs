//! The CUDA text's numbers, without a GPU: each op is lowered, its kernels run on the host through g++ and a shim, and
//! what they leave is compared with the CPU backend. Sizes are odd, outputs poisoned, and fences stand around buffers.
//! Imports the public API of kernels.

use shardflow_kernels::cuda::lower::{fuse, lower};
use shardflow_kernels::cuda::step::{Arg, ErrorRecord, Place, Step};
use shardflow_kernels::op::{Buffer, Einsum, Launch, Op};
use shardflow_kernels::tensor::{DType, HostTensor, Region, element_count};

#[path = "cuda_text/machine.rs"]
mod machine;
#[path = "cuda_text/trial.rs"]
mod trial;

use machine::{LAUNCH_INDEX, Machine, compiler};
use trial::{Initial, Trial, Types, assert_close, halved};

const SIZES: [usize; 7] = [0, 1, 3, 16, 65, 1000, 5003];
const CLOSE: f64 = 2e-6;
const CLOSE_SUM: f64 = 2e-5;
/// bf16 has eight bits.
const CLOSE_HALF: f64 = 1e-2;

const TYPES: [Types; 3] = [Types::Floats, Types::Halves, Types::Widening];

/// `close` for what is written in f32, what bf16 can tell for the rest.
fn close(types: Types, close: f64) -> f64 {
    if types == Types::Halves { CLOSE_HALF } else { close }
}

/// Numbers that look random and are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Uniform in `-size .. size`.
    fn tensor(&mut self, shape: &[usize], size: f32) -> HostTensor {
        let unit = |bits: u64| (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        HostTensor::f32(shape, (0..element_count(shape)).map(|_| size * unit(self.next())).collect())
    }

    fn indices(&mut self, shape: &[usize], below: usize) -> HostTensor {
        HostTensor::i32(shape, (0..element_count(shape)).map(|_| (self.next() % below as u64) as i32).collect())
    }
}

fn poison(shape: &[usize]) -> Initial {
    Initial::Poison(shape.to_vec())
}

/// Over poison; and, where the op can accumulate, added to values.
fn check(machine: &mut Machine, op: Op, reads: Vec<HostTensor>, shapes: &[&[usize]], tolerance: f64, types: Types) {
    let writes: Vec<Initial> = shapes.iter().map(|shape| poison(shape)).collect();
    let sum = op.can_accumulate();
    let mut trial = Trial::new(op, reads, writes);
    trial.clone().typed(types).check(machine, tolerance);
    if let Some(sum) = sum {
        trial.accumulate = true;
        trial.writes[sum] = Initial::Values(Numbers(9).tensor(shapes[sum], 1.0));
        // A copy changes no type, so its sum of f32 is one of f32.
        let types = if matches!(trial.op, Op::Copy) { Types::Floats } else { types };
        trial.typed(types).check(machine, tolerance);
    }
}

/// The result takes the memory of a read, so it is of its type.
fn check_in_place(machine: &mut Machine, op: Op, reads: Vec<HostTensor>, read: usize, tolerance: f64, types: Types) {
    if types != Types::Widening {
        Trial::new(op, reads, vec![Initial::Read(read)]).typed(types).check(machine, tolerance);
    }
}

#[test]
fn elementwise_ops() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(1));
    for n in SIZES {
        let (x, dy) = (numbers.tensor(&[n], 8.0), numbers.tensor(&[n], 2.0));
        for types in TYPES {
            let close = close(types, CLOSE);
            check(&mut machine, Op::Fill { value: -1.5 }, vec![], &[&[n]], 0.0, types);
            for op in [Op::Scale { factor: -0.3 }, Op::Gelu] {
                check(&mut machine, op.clone(), vec![x.clone()], &[&[n]], close, types);
                check_in_place(&mut machine, op, vec![x.clone()], 0, close, types);
            }
            for op in [Op::GeluGrad, Op::Add] {
                check(&mut machine, op.clone(), vec![dy.clone(), x.clone()], &[&[n]], close, types);
                check_in_place(&mut machine, op.clone(), vec![dy.clone(), x.clone()], 0, close, types);
                check_in_place(&mut machine, op, vec![dy.clone(), x.clone()], 1, close, types);
            }
        }
        let half = halved(&x);
        let [narrow, wide] = [halved(&dy), dy.clone()].map(Initial::Values);
        Trial::new(Op::Cast, vec![x], vec![narrow]).check(&mut machine, 0.0);
        Trial::new(Op::Cast, vec![half], vec![wide]).check(&mut machine, 0.0);
    }
    for (leading, suffix) in
        [(3, vec![]), (3, vec![5]), (1, vec![2, 17]), (0, vec![4]), (4, vec![0]), (70, vec![65]), (9, vec![64])]
    {
        let (a, b) = (numbers.tensor(&[&[leading], &suffix[..]].concat(), 1.0), numbers.tensor(&suffix, 1.0));
        for types in TYPES {
            let (shape, close) = (a.shape.clone(), close(types, CLOSE));
            check(&mut machine, Op::Add, vec![a.clone(), b.clone()], &[&shape], close, types);
            check_in_place(&mut machine, Op::Add, vec![a.clone(), b.clone()], 0, close, types);
        }
    }
    // What is not finite comes out as on the CPU.
    let odd = HostTensor::f32(&[5], vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0]);
    for types in TYPES {
        check(&mut machine, Op::Gelu, vec![odd.clone()], &[&[5]], CLOSE, types);
        check(&mut machine, Op::GeluGrad, vec![odd.clone(), odd.clone()], &[&[5]], CLOSE, types);
    }
}

#[test]
fn copies() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(2));
    for n in SIZES {
        for types in [Types::Floats, Types::Halves] {
            check(&mut machine, Op::Copy, vec![numbers.tensor(&[n], 1.0)], &[&[1, n]], 0.0, types);
        }
        let ints = Initial::Values(HostTensor::i32(&[n], vec![-7; n]));
        Trial::new(Op::Copy, vec![numbers.indices(&[n], 99)], vec![ints]).check(&mut machine, 0.0);
    }
    type Box = (Vec<usize>, Vec<usize>, Vec<usize>, Vec<usize>, Vec<usize>);
    let boxes: [Box; 10] = [
        (vec![5, 24], vec![1, 8], vec![3, 16], vec![6, 32], vec![2, 0]),
        (vec![5, 7], vec![1, 2], vec![3, 4], vec![6, 4], vec![2, 0]),
        (vec![5, 7], vec![1, 0], vec![3, 7], vec![4, 7], vec![1, 0]),
        (vec![5, 12], vec![1, 4], vec![3, 8], vec![6, 16], vec![2, 4]),
        (vec![2, 3, 4], vec![0, 1, 3], vec![2, 2, 1], vec![2, 2, 2], vec![0, 0, 1]),
        (vec![3, 4, 5, 8], vec![1, 0, 2, 4], vec![2, 3, 2, 4], vec![2, 4, 3, 12], vec![0, 1, 1, 8]),
        (vec![3; 6], vec![1, 0, 1, 0, 1, 0], vec![2; 6], vec![4, 3, 2, 3, 4, 3], vec![2, 1, 0, 1, 2, 1]),
        (vec![3], vec![1], vec![0], vec![2], vec![2]),
        (vec![3, 70, 9], vec![0, 3, 1], vec![3, 61, 7], vec![4, 80, 7], vec![1, 19, 0]),
        (vec![], vec![], vec![], vec![], vec![]),
    ];
    for (from_shape, from, size, to_shape, to) in boxes {
        let (x, y) = (numbers.tensor(&from_shape, 1.0), numbers.tensor(&to_shape, 1.0));
        let op = Op::CopyRegion { src: Region { start: from, size: size.clone() }, dst: Region { start: to, size } };
        for accumulate in [false, true] {
            let mut trial = Trial::new(op.clone(), vec![x.clone()], vec![Initial::Values(y.clone())]);
            trial.accumulate = accumulate;
            trial.check(&mut machine, 0.0);
            if !accumulate {
                trial.typed(Types::Halves).check(&mut machine, 0.0);
            }
        }
        let ints = |shape: &[usize], first: i32| HostTensor::i32(shape, (first..).take(element_count(shape)).collect());
        let writes = vec![Initial::Values(ints(&to_shape, 1000))];
        Trial::new(op, vec![ints(&from_shape, 0)], writes).check(&mut machine, 0.0);
    }
}

#[test]
fn sums() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(3));
    for (rows, width) in [(0, 3), (1, 1), (3, 17), (65, 1), (33, 65), (900, 130), (5, 0), (70, 264), (5000, 2)] {
        let x = numbers.tensor(&[rows, width], 1.0);
        for types in TYPES {
            check(&mut machine, Op::SumLeading, vec![x.clone()], &[&[width]], close(types, CLOSE_SUM), types);
            check(&mut machine, Op::SumLeading, vec![x.clone()], &[&[]], close(types, CLOSE_SUM), types);
        }
    }
    for n in SIZES.into_iter().chain([70_003]) {
        let before = Initial::Values(HostTensor::f32(&[3], vec![1.0, 2.0, 3.0]));
        let trial = Trial::new(Op::SumSquares { index: 1 }, vec![numbers.tensor(&[n], 1.0)], vec![before]);
        trial.check(&mut machine, 1e-6);
    }
    let sums = |values: &[f32]| vec![HostTensor::f32(&[values.len()], values.to_vec())];
    for max_norm in [1.0, 6.0, f32::INFINITY] {
        for values in [vec![], vec![9.0, 16.0, 0.0], vec![1.0; 777], vec![1.0, f32::NAN], vec![f32::INFINITY, 1.0]] {
            check(&mut machine, Op::ClipScale { max_norm }, sums(&values), &[&[], &[]], CLOSE, Types::Floats);
        }
    }
    let mut bad = numbers.tensor(&[40_000], 1.0);
    if let shardflow_kernels::tensor::HostData::F32(values) = &mut bad.data {
        values[30_001] = f32::INFINITY;
    }
    let zero = Initial::Values(HostTensor::f32(&[1], vec![0.0]));
    Trial::new(Op::SumSquares { index: 0 }, vec![bad], vec![zero]).check(&mut machine, 0.0);
}

#[test]
fn products() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(4));
    let cases: [(&str, &[usize], &[usize]); 12] = [
        ("mk,kn->mn", &[1, 1], &[1, 1]),
        ("mk,kn->mn", &[3, 17], &[17, 65]),
        ("mk,nk->mn", &[65, 3], &[17, 3]),
        ("km,kn->mn", &[17, 65], &[17, 3]),
        ("km,nk->mn", &[17, 3], &[65, 17]),
        ("mk,kn->nm", &[17, 3], &[3, 65]),
        ("km,nk->nm", &[3, 65], &[17, 3]),
        ("mk,kn->mn", &[0, 3], &[3, 5]),
        ("mk,kn->mn", &[4, 0], &[0, 5]),
        ("btc,hdc->bthd", &[2, 3, 5], &[2, 4, 5]),
        ("bthd,btc->hdc", &[2, 3, 2, 4], &[2, 3, 5]),
        ("k,k->", &[65], &[65]),
    ];
    for (text, a, b) in cases {
        let einsum = Einsum::parse(text).expect("an einsum");
        let shape = einsum.output_shape(a, b).expect("a shape");
        let reads = vec![numbers.tensor(a, 1.0), numbers.tensor(b, 1.0)];
        for types in TYPES {
            check(&mut machine, Op::Einsum(einsum.clone()), reads.clone(), &[&shape], close(types, CLOSE_SUM), types);
        }
    }
}

#[test]
fn embeddings() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(5));
    for (tokens, vocab, width, start) in [
        (0, 3, 2, 0),
        (1, 1, 1, 0),
        (17, 5, 3, 0),
        (17, 5, 4, 4),
        (65, 0, 3, 2),
        (9, 3, 0, 0),
        (300, 65, 65, 20),
        (700, 9, 264, 0),
        (1100, 97, 5, 0),
    ] {
        let ids = numbers.indices(&[1, tokens], 100.min(start + vocab + 2));
        let (table, dy) = (numbers.tensor(&[vocab, width], 1.0), numbers.tensor(&[1, tokens, width], 1.0));
        for types in [Types::Floats, Types::Halves] {
            let op = Op::Embedding { vocab_start: start, vocab: 100 };
            check(&mut machine, op, vec![ids.clone(), table.clone()], &[&[1, tokens, width]], 0.0, types);
            let op = Op::EmbeddingGrad { vocab_start: start };
            // The same sums in the same order: the same bits.
            check(&mut machine, op, vec![ids.clone(), dy.clone()], &[&[vocab, width]], 0.0, types);
        }
    }
}

#[test]
fn indices_out_of_range_are_noted() {
    if !compiler() {
        return;
    }
    let mut machine = Machine::default();
    for bad in [-1, i32::MIN, 20, i32::MAX] {
        let mut ids = vec![3; 700];
        (ids[601], ids[650]) = (bad, 77);
        let ids = HostTensor::i32(&[700], ids);
        let record = Some(ErrorRecord { launch: LAUNCH_INDEX, index: bad, position: 601, limit: 20 });
        let op = Op::Embedding { vocab_start: 2, vocab: 20 };
        let reads = vec![ids.clone(), Numbers(1).tensor(&[5, 3], 1.0)];
        let embedding = Trial::new(op, reads, vec![poison(&[700, 3])]);
        let op = Op::SumExpTarget { vocab_start: 2, vocab: 20 };
        let reads = vec![Numbers(1).tensor(&[700, 5], 1.0), Numbers(2).tensor(&[700], 1.0), ids];
        let loss = Trial::new(op, reads, vec![poison(&[700]), poison(&[700])]);
        for trial in [embedding, loss] {
            let (_, got) = trial.on_device(&mut machine, true).expect("it runs");
            assert_eq!(got, record);
            let on_cpu = trial.on_cpu().expect_err("refused on the CPU too");
            let error = got.expect("an error").error(trial.op.name());
            assert_eq!(on_cpu, format!("Ok(Failed({error:?}))"));
        }
    }
}

#[test]
fn layer_norms() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(6));
    for (rows, width) in [(0, 5), (1, 1), (3, 17), (65, 3), (2, 65), (5, 16), (71, 65), (6, 264), (3, 2100), (2, 2104)]
    {
        let (x, dy) = (numbers.tensor(&[1, rows, width], 3.0), numbers.tensor(&[1, rows, width], 1.0));
        let weight = numbers.tensor(&[width], 2.0);
        let shapes: [&[usize]; 3] = [&[1, rows, width], &[1, rows], &[1, rows]];
        // A row of one element has no variance: its rstd is 316 and amplifies rounding.
        let scale = if width == 1 { 5.0 } else { 1.0 };
        let op = Op::LayerNorm { eps: 1e-5 };
        let reads = vec![x.clone(), weight.clone()];
        let stats = Trial::new(op.clone(), reads.clone(), shapes.map(poison).to_vec()).on_cpu().expect("statistics");
        for types in TYPES {
            let tolerance = scale * close(types, CLOSE_SUM);
            check(&mut machine, op.clone(), reads.clone(), &shapes, tolerance, types);
        }
        let reads = vec![dy, x, weight, stats[1].clone(), stats[2].clone()];
        let shapes: [&[usize]; 2] = [&[1, rows, width], &[width]];
        for types in TYPES {
            let tolerance = if types == Types::Floats { 10.0 * CLOSE_SUM } else { CLOSE_HALF };
            check(&mut machine, Op::LayerNormGrad, reads.clone(), &shapes, scale * tolerance, types);
        }
    }
}

/// Attention and its gradient on one shape.
fn attention(machine: &mut Machine, numbers: &mut Numbers, shape: [usize; 4], types: Types) {
    // Probabilities are operands in bf16, too.
    let tolerance = if types == Types::Floats { CLOSE_SUM } else { 2.0 * CLOSE_HALF };
    let [q, k, v, d_o] = [2.0, 2.0, 1.0, 1.0].map(|size| numbers.tensor(&shape, size));
    let scale = 1.0 / (shape[3].max(1) as f32).sqrt();
    let lse = [shape[0], shape[2], shape[1]];
    let reads = vec![q.clone(), k.clone(), v.clone()];
    let op = Op::Attention { scale };
    let saved = Trial::new(op.clone(), reads.clone(), vec![poison(&shape), poison(&lse)]).on_cpu().expect("o and lse");
    check(machine, op, reads, &[&shape, &lse], tolerance, types);
    let reads = vec![d_o, q, k, v, saved[0].clone(), saved[1].clone()];
    check(machine, Op::AttentionGrad { scale }, reads, &[&shape, &shape, &shape], tolerance, types);
}

#[test]
fn attention_on_floats() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(7));
    let shapes = [
        [1, 1, 1, 1],
        [2, 3, 2, 5],
        [1, 17, 3, 1],
        [1, 65, 1, 17],
        [3, 70, 2, 16],
        [1, 200, 2, 8],
        [1, 130, 1, 64],
        [2, 67, 1, 80],
        [1, 97, 1, 128],
        [1, 33, 2, 130],
        [1, 4, 1, 300],
        [1, 3, 2, 0],
        [0, 3, 1, 2],
        [2, 0, 1, 2],
        [1, 3, 0, 2],
    ];
    for shape in shapes {
        attention(&mut machine, &mut numbers, shape, Types::Floats);
    }
}

#[test]
fn attention_in_bf16() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(8));
    for shape in [
        [1, 1, 1, 8],
        [2, 70, 2, 16],
        [1, 150, 1, 64],
        [1, 65, 2, 40],
        [1, 80, 1, 96],
        [2, 33, 1, 128],
        [1, 9, 1, 13],
        [1, 5, 1, 136],
    ] {
        attention(&mut machine, &mut numbers, shape, Types::Halves);
        attention(&mut machine, &mut numbers, shape, Types::Widening);
    }
}

/// Scores of minus infinity for a whole tile, and no number, come out as on the CPU.
#[test]
fn attention_of_odd_scores() {
    if !compiler() {
        return;
    }
    let mut machine = Machine::default();
    let shape = [1, 80, 1, 8];
    let filled = |f: &dyn Fn(usize) -> f32| HostTensor::f32(&shape, (0..640).map(|i| f(i / 8)).collect());
    let v = Numbers(1).tensor(&shape, 1.0);
    // The first 66 keys are infinitely far from every query; the last query is no number.
    let q = filled(&|t| if t == 79 { f32::NAN } else { 1.0 });
    let k = filled(&|t| if t < 66 { f32::NEG_INFINITY } else { t as f32 / 80.0 });
    let writes = vec![poison(&shape), poison(&[1, 1, 80])];
    let trial = Trial::new(Op::Attention { scale: 0.3 }, vec![q, k, v], writes);
    let expected = trial.on_cpu().expect("the CPU's");
    for types in TYPES {
        let (got, _) = trial.clone().typed(types).on_device(&mut machine, true).expect("it runs");
        let rows = |tensor: &HostTensor, rows: std::ops::Range<usize>| {
            HostTensor::f32(&[8 * rows.len()], tensor.to_f32().expect("floats")[8 * rows.start..8 * rows.end].to_vec())
        };
        for range in [0..66, 66..79, 79..80] {
            assert_close("odd scores", &rows(&got[0], range.clone()), &rows(&expected[0], range), 2.0 * CLOSE_HALF);
        }
    }
}

#[test]
fn cross_entropies() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(9));
    for (tokens, width, start) in
        [(0, 3, 0), (1, 1, 0), (3, 17, 0), (17, 5, 3), (65, 65, 0), (60, 130, 7), (3, 0, 4), (4, 3001, 0), (1100, 3, 0)]
    {
        let vocab = start + width + 3;
        let logits = numbers.tensor(&[tokens, width], 5.0);
        let targets = numbers.indices(&[tokens], vocab);
        let trial = Trial::new(Op::RowMax, vec![logits.clone()], vec![poison(&[tokens])]);
        let max = if width == 0 { numbers.tensor(&[tokens], 1.0) } else { trial.on_cpu().expect("maxima").remove(0) };
        let op = Op::SumExpTarget { vocab_start: start, vocab };
        let reads = vec![logits.clone(), max.clone(), targets.clone()];
        let writes = vec![poison(&[tokens]), poison(&[tokens])];
        let [sums, chosen] =
            Trial::new(op.clone(), reads.clone(), writes).on_cpu().expect("sums").try_into().expect("2");
        for types in TYPES {
            let close = close(types, CLOSE_SUM);
            check(&mut machine, Op::RowMax, vec![logits.clone()], &[&[tokens]], 0.0, types);
            check(&mut machine, op.clone(), reads.clone(), &[&[tokens], &[tokens]], CLOSE_SUM, types);
            let grad = Op::CrossEntropyGrad { vocab_start: start, scale: 0.5 };
            let one = HostTensor::f32(&[], vec![0.7]);
            let positive = HostTensor::f32(
                &[tokens],
                sums.as_f32().expect("floats").iter().map(|sum| if *sum > 0.0 { *sum } else { 1.0 }).collect(),
            );
            let reads = vec![one, logits.clone(), max.clone(), positive, targets.clone()];
            check(&mut machine, grad.clone(), reads.clone(), &[&[tokens, width]], close, types);
            check_in_place(&mut machine, grad, reads, 1, close, types);
        }
        let reads = vec![max, sums, chosen];
        if width > 0 {
            check(&mut machine, Op::TokenLoss { scale: 0.01 }, reads, &[&[]], CLOSE_SUM, Types::Floats);
        }
    }
    let odd = HostTensor::f32(&[2, 3], vec![1.0, f32::NAN, 2.0, f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0]);
    check(&mut machine, Op::RowMax, vec![odd.clone()], &[&[2]], 0.0, Types::Floats);
    let reads = vec![odd, HostTensor::f32(&[2], vec![2.0, 0.0]), HostTensor::i32(&[2], vec![0, 1])];
    check(&mut machine, Op::SumExpTarget { vocab_start: 0, vocab: 3 }, reads, &[&[2], &[2]], CLOSE, Types::Floats);
}

#[test]
fn optimizer() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(10));
    let op = Op::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-3, weight_decay: 0.1 };
    for n in SIZES {
        for (rate, step, scale) in
            [(0.02, 1.0, 0.5), (0.3, 1000.0, 1.0), (f32::NAN, 1.0, 1.0), (0.1, 1.0, f32::INFINITY)]
        {
            let hyper = HostTensor::f32(&[2], vec![rate, step]);
            let reads = vec![numbers.tensor(&[n], 1.0), hyper, HostTensor::f32(&[], vec![scale])];
            let positive = numbers.tensor(&[n], 1.0).as_f32().expect("floats").iter().map(|v| v.abs()).collect();
            let state = [numbers.tensor(&[n], 1.0), numbers.tensor(&[n], 1.0), HostTensor::f32(&[n], positive)];
            let writes = state.map(Initial::Values).to_vec();
            Trial::new(op.clone(), reads, writes).check(&mut machine, CLOSE);
        }
    }
}

#[test]
fn dropout_has_the_mask_of_the_cpu() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(11));
    type Part = (Vec<usize>, Vec<usize>, Vec<usize>);
    let parts: [Part; 8] = [
        (vec![4, 5, 6], vec![0, 0, 0], vec![4, 5, 6]),
        (vec![4, 5, 6], vec![1, 2, 3], vec![2, 3, 3]),
        (vec![4, 5, 16], vec![1, 2, 4], vec![2, 3, 8]),
        (vec![7], vec![2], vec![5]),
        (vec![], vec![], vec![]),
        (vec![3, 0], vec![0, 0], vec![3, 0]),
        (vec![3; 6], vec![1, 0, 1, 0, 1, 0], vec![2; 6]),
        (vec![2, 3, 1000], vec![0, 1, 0], vec![2, 2, 1000]),
    ];
    for (shape, start, local) in parts {
        for (p, rng) in [(0.0, [0, 0]), (0.3, [5, 2_000_000_000]), (0.9, [-3, -1]), (1.0, [1, 0])] {
            let reads = vec![numbers.tensor(&local, 1.0), HostTensor::i32(&[2], rng.to_vec())];
            let op = Op::Dropout { p, seed: 0x1234_5678_9abc_def0, shape: shape.clone(), start: start.clone() };
            for types in TYPES {
                check(&mut machine, op.clone(), reads.clone(), &[&local], 0.0, types);
                check_in_place(&mut machine, op.clone(), reads.clone(), 0, 0.0, types);
            }
        }
    }
}

/// Buffers of bases of their own.
fn buffers(list: &[(usize, &HostTensor)]) -> Vec<Buffer> {
    let buffer = |&(base, tensor): &(usize, &HostTensor)| {
        let (shape, dtype) = (tensor.shape.clone(), tensor.dtype());
        Buffer { base, offset: 0, shape, dtype }
    };
    list.iter().map(buffer).collect()
}

fn launch(op: Op, reads: &[(usize, &HostTensor)], writes: &[(usize, &HostTensor)]) -> Launch {
    Launch { op, reads: buffers(reads), writes: buffers(writes), accumulate: false, workspace: None }
}

/// Runs a pair's steps, which write what `expected` has, over poison.
fn check_pair(machine: &mut Machine, steps: &[Step], reads: &[&HostTensor], expected: &[&HostTensor], tolerance: f64) {
    let poisoned = |tensor: &&HostTensor| match tensor.dtype() {
        DType::BF16 => Initial::Values(HostTensor::bf16(&tensor.shape, &vec![f32::NAN; tensor.elements_held()])),
        _ => poison(&tensor.shape),
    };
    let writes = expected.iter().map(poisoned).collect();
    let trial = Trial::new(Op::Add, reads.iter().map(|&read| read.clone()).collect(), writes);
    for aligned in [true, false] {
        let (got, record) = trial.run_steps(machine, steps, aligned, 0).expect("it runs");
        assert_eq!(record, None);
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            assert_close(&format!("{steps:?}, write {i}"), got, expected, tolerance);
        }
    }
}

#[test]
fn fused_pairs_are_what_both_launches_are() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(12));
    let nothing = |_: &Buffer, _: &Buffer| false;
    let typed = |op: Op, reads: &[&HostTensor], shapes: &[&[usize]], types| {
        let reads = reads.iter().map(|&read| read.clone()).collect();
        let trial = Trial::new(op, reads, shapes.iter().map(|shape| poison(shape)).collect()).typed(types);
        (trial.on_cpu().expect("the CPU's"), trial.reads)
    };
    for (rows, width) in [(1, 1), (7, 17), (9, 64), (3, 1100)] {
        let (shape, suffix, row) = ([rows, width], [width], [rows]);
        let (a, b, w) = (numbers.tensor(&shape, 2.0), numbers.tensor(&shape, 2.0), numbers.tensor(&suffix, 2.0));
        for types in [Types::Floats, Types::Halves] {
            // Residual and layer norm. A variance of nothing but rounding is not the same in bf16.
            let norm = Op::LayerNorm { eps: if types == Types::Halves { 1.0 } else { 1e-2 } };
            let (sums, added) = typed(Op::Add, &[&a, &b], &[&shape], types);
            let (normed, _) = typed(norm.clone(), &[&sums[0], &w], &[&shape, &row, &row], types);
            let first = launch(Op::Add, &[(0, &added[0]), (1, &added[1])], &[(3, &sums[0])]);
            let writes = [(4, &normed[0]), (5, &normed[1]), (6, &normed[2])];
            let second = launch(norm, &[(3, &sums[0]), (2, &w)], &writes);
            let fused = fuse(&first, &second, &nothing).expect("steps").expect("a fused pair");
            let expected = [&sums[0], &normed[0], &normed[1], &normed[2]];
            let close_norm = close(types, CLOSE_SUM);
            check_pair(&mut machine, &fused.steps, &[&added[0], &added[1], &w], &expected, close_norm);
            // Bias and GELU.
            let (sums, added) = typed(Op::Add, &[&a, &w], &[&shape], types);
            let (active, _) = typed(Op::Gelu, &[&sums[0]], &[&shape], types);
            let first = launch(Op::Add, &[(0, &added[0]), (1, &added[1])], &[(2, &sums[0])]);
            let second = launch(Op::Gelu, &[(2, &sums[0])], &[(3, &active[0])]);
            let fused = fuse(&first, &second, &nothing).expect("steps").expect("a fused pair");
            let expected = [&sums[0], &active[0]];
            check_pair(&mut machine, &fused.steps, &[&added[0], &added[1]], &expected, close(types, CLOSE));
            // A result that takes memory which the first launch still reads.
            let clash = |a: &Buffer, b: &Buffer| (a.base, b.base) == (0, 3);
            assert!(fuse(&first, &second, &clash).expect("no error").is_none());
            // A result of another type has no kernel.
            let mut wide = second;
            wide.writes[0].dtype = DType::F32;
            let found = fuse(&first, &wide, &nothing).expect("no error");
            assert_eq!(found.is_some(), types == Types::Floats);
        }
    }
}

#[test]
fn maximum_and_sum_of_a_row_in_one_pass() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(14));
    let infinite = f32::INFINITY;
    let mut odd = vec![-infinite; 7 * 5];
    // A row of nothing but minus infinities, then: no number, infinity, both infinities, numbers behind and before.
    (odd[7], odd[14], odd[21], odd[22], odd[34]) = (f32::NAN, infinite, infinite, 1.0, 3.0);
    (odd[8], odd[13], odd[28]) = (1.0, 2.0, -infinite);
    let mut cases = vec![HostTensor::f32(&[5, 7], odd)];
    for (rows, width) in [(1, 1), (3, 0), (65, 17), (4, 3001), (9, 512)] {
        cases.push(numbers.tensor(&[rows, width], 40.0));
    }
    for logits in cases.into_iter().flat_map(|logits| [halved(&logits), logits]) {
        let (rows, width) = (logits.shape[0], logits.shape[1]);
        let targets = numbers.indices(&[rows], width + 9);
        let op = Op::SumExpTarget { vocab_start: 4, vocab: width + 9 };
        let none = || poison(&[rows]);
        let max = Trial::new(Op::RowMax, vec![logits.clone()], vec![none()]).on_cpu().expect("maxima").remove(0);
        let reads = vec![logits.clone(), max.clone(), targets.clone()];
        let sums = Trial::new(op.clone(), reads, vec![none(), none()]).on_cpu().expect("sums");
        let first = launch(Op::RowMax, &[(0, &logits)], &[(2, &max)]);
        let writes = [(3, &sums[0]), (4, &sums[1])];
        let second = launch(op, &[(0, &logits), (2, &max), (1, &targets)], &writes);
        let fused = fuse(&first, &second, &|_, _| false).expect("steps").expect("a fused pair");
        check_pair(&mut machine, &fused.steps, &[&logits, &targets], &[&max, &sums[0], &sums[1]], CLOSE_SUM);
    }
}

/// What no op asks for: the parameter in bf16, kept up to date.
#[test]
fn adamw_with_a_copy() {
    if !compiler() {
        return;
    }
    let (mut machine, mut numbers) = (Machine::default(), Numbers(13));
    let n = 103;
    let hyper = HostTensor::f32(&[2], vec![0.02, 3.0]);
    let reads = vec![numbers.tensor(&[n], 1.0), hyper, HostTensor::f32(&[], vec![0.5])];
    let state = [numbers.tensor(&[n], 1.0), numbers.tensor(&[n], 1.0), HostTensor::f32(&[n], vec![0.3; n])];
    let op = Op::AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-3, weight_decay: 0.1 };
    let numbered = |tensors: &[HostTensor]| buffers(&tensors.iter().enumerate().collect::<Vec<_>>());
    let (reads_of, writes_of) = (numbered(&reads), numbered(&state));
    let launch = Launch { op: op.clone(), reads: reads_of, writes: writes_of, accumulate: false, workspace: None };
    let mut steps = lower(&launch, false, 227 << 10).expect("steps");
    let Step::Kernel(kernel) = &mut steps[0] else { panic!("{steps:?}") };
    let place = kernel.args.iter().position(|arg| *arg == Arg::Null).expect("no copy is asked for");
    kernel.args[place] = Arg::Pointer(Place::write(3));
    let writes: Vec<Initial> = state.map(Initial::Values).to_vec();
    let expected = Trial::new(op.clone(), reads.clone(), writes.clone()).on_cpu().expect("the CPU's");
    let copy = Initial::Values(HostTensor::bf16(&[n], &vec![f32::NAN; n]));
    let trial = Trial::new(op, reads, [writes, vec![copy]].concat());
    for aligned in [true, false] {
        let (got, _) = trial.run_steps(&mut machine, &steps, aligned, 0).expect("it runs");
        for (got, expected) in got.iter().zip(&expected) {
            assert_close("adamw", got, expected, CLOSE);
        }
        assert_eq!(got[3], halved(&got[0]));
    }
}
