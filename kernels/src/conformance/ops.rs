//! Tests every op against its f64 reference.

use half::bf16;

use super::harness::{BF16_ROUNDING, Initial, Numbers, Report, Trial, Types, filled, flat, narrow, wide};
use super::reference as exact;
use crate::device::Device;
use crate::op::{Einsum, GemmDims, Op, SQUARES_SCALE};
use crate::tensor::{DType, HostTensor, Region, element_count, split_range};

/// Numbers of elements: none, one, some around the width of a vector, and enough for several threads.
const SIZES: [usize; 8] = [0, 1, 3, 16, 17, 65, 1000, 70_003];

/// Tolerance of f32 kernels for results of about 1.
const CLOSE: f64 = 2e-6;

/// Tolerance for long sums.
const CLOSE_SUM: f64 = 2e-5;

/// Launches with fewer elements than this are also tested on unaligned buffers.
const UNALIGNED_ELEMENTS_MAX: usize = 5000;

pub(super) fn run(report: &mut Report, device: &Device) {
    for types in [Types::Floats, Types::Halves, Types::Widening] {
        let numbers = Numbers::new(1, types != Types::Floats);
        let mut suite = Suite { report, device, numbers, types };
        suite.elementwise();
        suite.sums();
        suite.einsums();
        suite.layer_norms();
        suite.attentions();
        suite.cross_entropies();
        if types == Types::Widening {
            suite.widening_dropout();
            // The other ops do not convert, or are already tested with all dtypes that they support.
            continue;
        }
        suite.embeddings();
        suite.dropouts();
        suite.copies();
        if types == Types::Halves {
            suite.casts();
        } else {
            suite.optimizers();
            suite.rejections();
        }
    }
}

pub(super) fn run_attentions(report: &mut Report, device: &Device) {
    for types in [Types::Floats, Types::Halves, Types::Widening] {
        let numbers = Numbers::new(1, types != Types::Floats);
        Suite { report, device, numbers, types }.attentions();
    }
}

struct Suite<'a> {
    report: &'a mut Report,
    device: &'a Device,
    numbers: Numbers,
    /// Dtypes of activations and gradients.
    types: Types,
}

/// The shape of a write, and its expected elements.
type Expected = (Vec<usize>, Vec<f64>);

impl Suite<'_> {
    /// Tests the op on writes that start as NaN. If the op can accumulate, also tests it on writes that start with
    /// values, with and without `repeat`.
    fn check(&mut self, what: &str, op: Op, reads: &[HostTensor], expected: &[Expected], tolerance: f64) {
        let shapes: Vec<_> = reads.iter().map(|read| &read.shape).collect();
        let check = format!("{} {what} {shapes:?}{}", op.name(), self.suffix());
        let poison: Vec<Initial> = expected.iter().map(|(shape, _)| Initial::Poison(shape.clone())).collect();
        self.compare(&check, &self.trial(op.clone(), reads, &poison), expected, tolerance);
        let Some(sum) = op.can_accumulate() else { return };
        let before = self.numbers.tensor(&expected[sum].0, 1.0);
        let mut writes = poison;
        writes[sum] = Initial::Values(before.clone());
        // A copy does not convert, and an accumulated sum is F32.
        let types = if matches!(op, Op::Copy) { Types::Floats } else { self.types };
        let trial = Trial { accumulate: true, types, ..Trial::new(op, reads, &writes) };
        self.compare(&format!("{check}, first of a sum"), &trial, expected, tolerance);
        let mut added = expected.to_vec();
        added[sum].1.iter_mut().zip(wide(&before)).for_each(|(sum, before)| *sum += before);
        self.compare(&format!("{check}, added"), &Trial { repeat: true, ..trial }, &added, tolerance);
    }

    fn suffix(&self) -> &'static str {
        match self.types {
            Types::Floats => "",
            Types::Halves => " in BF16",
            Types::Widening => " from BF16",
        }
    }

    fn trial<'a>(&self, op: Op, reads: &'a [HostTensor], writes: &'a [Initial]) -> Trial<'a> {
        Trial { types: self.types, ..Trial::new(op, reads, writes) }
    }

    /// Compares the result. Also tests on unaligned buffers if that takes little time.
    fn compare(&mut self, check: &str, trial: &Trial<'_>, expected: &[Expected], tolerance: f64) {
        let elements: usize = trial.reads.iter().map(|read| element_count(&read.shape)).sum();
        for unaligned in [false, true].into_iter().filter(|unaligned| !unaligned || elements < UNALIGNED_ELEMENTS_MAX) {
            match (Trial { unaligned, ..trial.clone() }).launch(self.device) {
                Err(error) => self.report.fail(check, error),
                Ok(got) => {
                    for (i, (got, (_, expected))) in got.iter().zip(expected).enumerate() {
                        let check = format!("{check}, write {i}{}", if unaligned { ", unaligned" } else { "" });
                        self.report.close(&check, got, expected, tolerance);
                    }
                }
            }
        }
    }

    /// Runs `check` for a result of read 0's shape. Repeats it for each read whose memory the result may overwrite.
    fn check_in_place(&mut self, op: Op, reads: &[HostTensor], in_place: &[usize], expected: Vec<f64>, tolerance: f64) {
        let expected = [(reads[in_place[0]].shape.clone(), expected)];
        self.check("", op.clone(), reads, &expected, tolerance);
        // A write may overwrite a read's memory only if both have the same dtype.
        let in_place = if self.types == Types::Widening { &[] } else { in_place };
        for &read in in_place {
            let check = format!("{} in place of read {read}, {:?}", op.name(), reads[read].shape);
            self.compare(&check, &self.trial(op.clone(), reads, &[Initial::Read(read)]), &expected, tolerance);
        }
    }

    fn launch(&mut self, check: &str, op: Op, reads: &[HostTensor], writes: &[Initial]) -> Option<Vec<HostTensor>> {
        let result = self.trial(op, reads, writes).launch(self.device);
        result.map_err(|error| self.report.fail(check, error)).ok()
    }

    fn elementwise(&mut self) {
        for n in SIZES {
            // The range of x includes both tails of GELU.
            let x = self.numbers.tensor(&[n], 8.0);
            let dy = self.numbers.tensor(&[n], 2.0);
            let (x_wide, dy_wide) = (wide(&x), wide(&dy));
            self.check("", Op::Fill { value: -1.5 }, &[], &[(vec![n], vec![-1.5; n])], 0.0);
            let scaled = x_wide.iter().map(|x| -0.3 * x).collect();
            self.check_in_place(Op::Scale { factor: -0.3 }, std::slice::from_ref(&x), &[0], scaled, CLOSE);
            let gelu = x_wide.iter().map(|&x| exact::gelu(x)).collect();
            self.check_in_place(Op::Gelu, std::slice::from_ref(&x), &[0], gelu, CLOSE);
            let slope = |(dy, x): (&f64, &f64)| dy * exact::derivative(exact::gelu, *x);
            let gelu_grad = dy_wide.iter().zip(&x_wide).map(slope).collect();
            self.check_in_place(Op::GeluGrad, &[dy.clone(), x.clone()], &[0, 1], gelu_grad, CLOSE);
            let sum = x_wide.iter().zip(&dy_wide).map(|(a, b)| a + b).collect();
            self.check_in_place(Op::Add, &[x, dy], &[0, 1], sum, CLOSE);
        }
        for (leading, suffix) in
            [(3, vec![]), (3, vec![5]), (1, vec![2, 17]), (0, vec![4]), (4, vec![0]), (700, vec![65])]
        {
            let a = self.numbers.tensor(&[&[leading], &suffix[..]].concat(), 1.0);
            let b = self.numbers.tensor(&suffix, 1.0);
            let repeated = wide(&b).into_iter().cycle();
            let sum = wide(&a).into_iter().zip(repeated).map(|(a, b)| a + b).collect();
            self.check_in_place(Op::Add, &[a, b], &[0], sum, CLOSE);
        }
    }

    fn copies(&mut self) {
        for n in SIZES {
            let x = self.numbers.tensor(&[n], 1.0);
            let expected = [(vec![1, n], wide(&x))];
            self.check("", Op::Copy, &[x], &expected, 1e-7);
            let x = self.numbers.indices(&[n], 99);
            let writes = [Initial::Values(HostTensor::i32(&[n], vec![-7; n]))];
            if let Some(got) = self.launch("copy of integers", Op::Copy, std::slice::from_ref(&x), &writes) {
                self.report.expect("copy of integers", got[0] == x, "the copy differs");
            }
        }
        let boxes = [
            (vec![5, 7], vec![1, 2], vec![3, 4], vec![6, 4], vec![2, 0]),
            (vec![5, 7], vec![1, 0], vec![3, 7], vec![4, 7], vec![1, 0]),
            (vec![2, 3, 4], vec![0, 1, 3], vec![2, 2, 1], vec![2, 2, 2], vec![0, 0, 1]),
            // A case in which all runs are whole vectors.
            (vec![3, 16, 24], vec![1, 8, 8], vec![2, 8, 16], vec![2, 16, 32], vec![0, 8, 16]),
            (vec![2, 3, 2, 3, 5], vec![0, 1, 1, 0, 2], vec![2, 2, 1, 2, 3], vec![2, 2, 2, 3, 4], vec![0, 0, 1, 1, 1]),
            (vec![3], vec![1], vec![0], vec![2], vec![2]),
            (vec![], vec![], vec![], vec![], vec![]),
        ];
        for (from_shape, from, size, to_shape, to) in boxes {
            let (x, y) = (self.numbers.tensor(&from_shape, 1.0), self.numbers.tensor(&to_shape, 1.0));
            let (src, dst) = (Region { start: from, size: size.clone() }, Region { start: to, size });
            let op = Op::CopyRegion { src: src.clone(), dst: dst.clone() };
            for (accumulate, repeat) in [(false, false), (true, true), (true, false)] {
                let mut expected = wide(&y);
                for index in 0..src.element_count() {
                    let (from, to) = (flat(index, &src, &from_shape), flat(index, &dst, &to_shape));
                    let kept = if accumulate && repeat { expected[to] } else { 0.0 };
                    expected[to] = kept + wide(&x)[from];
                }
                let check = format!("copy_region {src:?} {dst:?} accumulate {accumulate} repeat {repeat}");
                // A sum and its terms have dtype F32.
                let before = match y.as_f32() {
                    Some(values) if self.types == Types::Halves && !accumulate => HostTensor::bf16(&y.shape, values),
                    _ => y.clone(),
                };
                let (reads, writes) = ([x.clone()], [Initial::Values(before)]);
                let trial = Trial { accumulate, repeat, ..Trial::new(op.clone(), &reads, &writes) };
                let trial = Trial { types: if accumulate { Types::Floats } else { self.types }, ..trial };
                self.compare(&check, &trial, &[(to_shape.clone(), expected)], 1e-6);
            }
        }
    }

    fn sums(&mut self) {
        for (rows, width) in [(0, 3), (1, 1), (3, 17), (65, 1), (33, 65), (900, 130), (5, 0)] {
            let x = self.numbers.tensor(&[rows, width], 1.0);
            let mut sums = vec![0.0; width];
            wide(&x).iter().enumerate().for_each(|(i, x)| sums[i % width] += x);
            self.check("", Op::SumLeading, std::slice::from_ref(&x), &[(vec![width], sums)], CLOSE_SUM);
            let total = wide(&x).iter().sum();
            self.check("to a scalar", Op::SumLeading, &[x], &[(vec![], vec![total])], CLOSE_SUM);
        }
    }

    fn einsums(&mut self) {
        let cases: [(&str, &[usize], &[usize]); 15] = [
            ("mk,kn->mn", &[1, 1], &[1, 1]),
            ("mk,kn->mn", &[3, 17], &[17, 65]),
            ("mk,nk->mn", &[65, 3], &[17, 3]),
            ("km,kn->mn", &[17, 65], &[17, 3]),
            ("km,nk->mn", &[17, 3], &[65, 17]),
            ("mk,kn->nm", &[17, 3], &[3, 65]),
            ("km,nk->nm", &[3, 65], &[17, 3]),
            ("mk,kn->mn", &[129, 67], &[67, 131]),
            ("mk,nk->mn", &[33, 65], &[300, 65]),
            ("mk,kn->mn", &[0, 3], &[3, 5]),
            ("mk,kn->mn", &[4, 0], &[0, 5]),
            ("mk,kn->mn", &[4, 3], &[3, 0]),
            ("btc,hdc->bthd", &[2, 3, 5], &[2, 4, 5]),
            ("bthd,btc->hdc", &[2, 3, 2, 4], &[2, 3, 5]),
            ("k,k->", &[65], &[65]),
        ];
        for (text, a_shape, b_shape) in cases {
            let (a, b) = (self.numbers.tensor(a_shape, 1.0), self.numbers.tensor(b_shape, 1.0));
            let parsed = Einsum::parse(text).and_then(|einsum| {
                Ok((einsum.gemm_dims(a_shape, b_shape)?, einsum.output_shape(a_shape, b_shape)?, einsum))
            });
            let (GemmDims { m, n, k, a_transposed, b_transposed, out_transposed }, shape, einsum) = match parsed {
                Ok(parsed) => parsed,
                Err(error) => return self.report.fail(text, error),
            };
            let plain = |x: Vec<f64>, transposed, (rows, columns)| {
                if transposed { exact::transpose(&x, rows, columns) } else { x }
            };
            let (a_plain, b_plain) = (plain(wide(&a), a_transposed, (k, m)), plain(wide(&b), b_transposed, (n, k)));
            let product = plain(exact::matmul(&a_plain, &b_plain, (m, n, k)), out_transposed, (m, n));
            self.check(text, Op::Einsum(einsum), &[a, b], &[(shape, product)], CLOSE_SUM);
        }
    }

    fn embeddings(&mut self) {
        for (tokens, vocab, width, start) in [
            (0, 3, 2, 0),
            (1, 1, 1, 0),
            (17, 5, 3, 0),
            (17, 5, 3, 4),
            (65, 0, 3, 2),
            (9, 3, 0, 0),
            (9, 5, 264, 0),
            (1000, 65, 65, 20),
        ] {
            let ids = self.numbers.indices(&[1, tokens], 100.min(start + vocab + 2));
            let table = self.numbers.tensor(&[vocab, width], 1.0);
            let dy = self.numbers.tensor(&[1, tokens, width], 1.0);
            let (mut y, mut dtable) = (vec![0.0; tokens * width], vec![0.0; vocab * width]);
            for (token, id) in wide(&ids).into_iter().enumerate() {
                let Some(row) = (id as usize).checked_sub(start).filter(|&row| row < vocab) else { continue };
                for c in 0..width {
                    y[token * width + c] = wide(&table)[row * width + c];
                    dtable[row * width + c] += wide(&dy)[token * width + c];
                }
            }
            let op = Op::Embedding { vocab_start: start, vocab: 100 };
            self.check("", op, &[ids.clone(), table], &[(vec![1, tokens, width], y)], 0.0);
            let op = Op::EmbeddingGrad { vocab_start: start };
            self.check("", op, &[ids, dy], &[(vec![vocab, width], dtable)], CLOSE_SUM);
        }
        // The ids of this shard's three rows are far apart, between many ids of another shard.
        const TOKENS: usize = 9000;
        let mut ids = vec![90; TOKENS];
        let places = [(0, 1), (255, 1), (256, 1), (2047, 0), (2048, 2), (2600, 1), (4095, 1), (8191, 0), (8999, 2)];
        places.iter().for_each(|&(place, id)| ids[place] = id);
        let dy = self.numbers.tensor(&[TOKENS, 5], 1.0);
        let mut dtable = vec![0.0; 15];
        for (place, id) in places {
            (0..5).for_each(|c| dtable[5 * id as usize + c] += wide(&dy)[5 * place + c]);
        }
        let op = Op::EmbeddingGrad { vocab_start: 0 };
        self.check("few of many", op, &[HostTensor::i32(&[TOKENS], ids), dy], &[(vec![3, 5], dtable)], CLOSE_SUM);
    }

    fn layer_norms(&mut self) {
        let eps = 1e-5;
        for (rows, width) in [(0, 5), (1, 1), (3, 17), (65, 3), (2, 65), (5, 16), (701, 65), (3, 2100), (2, 2104)] {
            let x = self.numbers.tensor(&[1, rows, width], 3.0);
            let weight = self.numbers.tensor(&[width], 2.0);
            let dy = self.numbers.tensor(&[1, rows, width], 1.0);
            let [y, mean, rstd] = exact::layer_norm(&wide(&x), &wide(&weight), eps);
            let leading = vec![1, rows];
            let expected = [(x.shape.clone(), y), (leading.clone(), mean.clone()), (leading.clone(), rstd.clone())];
            let op = Op::LayerNorm { eps: eps as f32 };
            // A row of one element has zero variance, so its rstd is 316. This amplifies rounding errors.
            let tolerance = if width == 1 { 1e-4 } else { CLOSE_SUM };
            self.check("", op, &[x.clone(), weight.clone()], &expected, tolerance);
            let [dx, dweight] = exact::layer_norm_grad(&wide(&dy), &wide(&x), &wide(&weight), eps);
            let reads = [dy, x.clone(), weight, narrow(&leading, &mean), narrow(&leading, &rstd)];
            let expected = [(x.shape, dx), (vec![width], dweight)];
            self.check("", Op::LayerNormGrad, &reads, &expected, 10.0 * tolerance);
        }
    }

    fn attentions(&mut self) {
        let shapes = [
            [1, 1, 1, 1],
            [2, 3, 2, 5],
            [1, 17, 3, 1],
            [1, 65, 1, 17],
            [3, 70, 2, 16],
            [1, 200, 2, 8],
            [2, 34, 2, 24],
            [1, 130, 2, 64],
            [1, 70, 1, 64],
            [1, 33, 1, 128],
            [1, 70, 1, 96],
            [1, 21, 1, 136],
            [0, 3, 1, 2],
            [2, 0, 1, 2],
            [1, 3, 0, 2],
        ];
        for shape in shapes {
            let [q, k, v, d_o] = [2.0, 2.0, 1.0, 1.0].map(|size| self.numbers.tensor(&shape, size));
            let scale = 0.6;
            let [o, lse] = exact::attention(&wide(&q), &wide(&k), &wide(&v), shape, scale);
            let lse_shape = vec![shape[0], shape[2], shape[1]];
            let expected = [(shape.to_vec(), o.clone()), (lse_shape.clone(), lse.clone())];
            let op = Op::Attention { scale: scale as f32 };
            // Tensor cores read the probabilities as BF16.
            let tolerance = if self.types == Types::Floats { CLOSE_SUM } else { BF16_ROUNDING };
            self.check("", op, &[q.clone(), k.clone(), v.clone()], &expected, tolerance);
            let grads = exact::attention_grad(&wide(&d_o), [&wide(&q), &wide(&k), &wide(&v)], shape, scale);
            let reads = [d_o, q, k, v, narrow(&shape, &o), narrow(&lse_shape, &lse)];
            let expected = grads.map(|grad| (shape.to_vec(), grad));
            // The gradients inherit o's rounding error.
            let tolerance = if self.types == Types::Floats { CLOSE_SUM } else { 0.02 };
            self.check("", Op::AttentionGrad { scale: scale as f32 }, &reads, &expected, tolerance);
        }
    }

    /// Tests whole vocabularies, and vocabularies split over two shards. This function combines the shards' results.
    fn cross_entropies(&mut self) {
        for (tokens, vocab) in [(0, 3), (1, 1), (3, 17), (17, 5), (65, 65), (600, 130), (1100, 3)] {
            let logits = self.numbers.tensor(&[tokens, vocab], 5.0);
            let targets = self.numbers.indices(&[tokens], vocab);
            let scale = 1.0 / tokens.max(1) as f64;
            let target_columns: Vec<usize> = wide(&targets).iter().map(|&target| target as usize).collect();
            let loss = exact::cross_entropy(&wide(&logits), &target_columns, scale);
            for shards in [1, 2] {
                self.cross_entropy(&logits, &targets, scale, shards, loss);
            }
        }
        // A shard without columns.
        let empty = HostTensor::f32(&[3, 0], vec![]);
        let minus_infinity = vec![f64::NEG_INFINITY; 3];
        self.check("no columns", Op::RowMax, std::slice::from_ref(&empty), &[(vec![3], minus_infinity)], 0.0);
        let reads = [empty, self.numbers.tensor(&[3], 1.0), self.numbers.indices(&[3], 9)];
        let zeros = (vec![3], vec![0.0; 3]);
        self.check("no columns", Op::SumExpTarget { vocab_start: 4, vocab: 9 }, &reads, &[zeros.clone(), zeros], 0.0);
    }

    fn cross_entropy(&mut self, logits: &HostTensor, targets: &HostTensor, scale: f64, shards: usize, loss: f64) {
        let (tokens, vocab) = (logits.shape[0], logits.shape[1]);
        let check = format!("cross entropy of {tokens} tokens, {vocab} words, {shards} shards");
        let columns = |shard: usize| split_range(vocab, shards, shard);
        let part = |shard: usize| {
            let data = logits.as_f32().into_iter().flat_map(|data| data.chunks_exact(vocab));
            let data = data.flat_map(|row| row[columns(shard)].to_vec()).collect();
            HostTensor::f32(&[tokens, columns(shard).len()], data)
        };
        let poison = || Initial::Poison(vec![tokens]);
        let combine = |parts: Vec<HostTensor>, f: fn(f32, f32) -> f32| {
            let parts: Vec<&[f32]> = parts.iter().filter_map(HostTensor::as_f32).collect();
            let at = |i: usize| parts.iter().map(|part| part[i]).reduce(f).unwrap_or_default();
            HostTensor::f32(&[tokens], (0..tokens).map(at).collect())
        };
        let mut maxima = Vec::new();
        for shard in 0..shards {
            let Some(mut got) = self.launch(&check, Op::RowMax, &[part(shard)], &[poison()]) else { return };
            maxima.append(&mut got);
        }
        let max = combine(maxima, f32::max);
        let (mut sums, mut chosen) = (Vec::new(), Vec::new());
        for shard in 0..shards {
            let op = Op::SumExpTarget { vocab_start: columns(shard).start, vocab };
            let reads = [part(shard), max.clone(), targets.clone()];
            let Some(mut got) = self.launch(&check, op, &reads, &[poison(), poison()]) else { return };
            chosen.extend(got.pop());
            sums.extend(got.pop());
        }
        let (sum, target) = (combine(sums, |a, b| a + b), combine(chosen, |a, b| a + b));
        let op = Op::TokenLoss { scale: scale as f32 };
        self.check(&check, op, &[max.clone(), sum.clone(), target], &[(vec![], vec![loss])], CLOSE_SUM);
        for shard in 0..shards {
            let op = Op::CrossEntropyGrad { vocab_start: columns(shard).start, scale: scale as f32 };
            let reads = [HostTensor::f32(&[], vec![0.7]), part(shard), max.clone(), sum.clone(), targets.clone()];
            let expected = softmax_grad(&wide(logits), &wide(targets), vocab, 0.7 * scale);
            let expected = expected.chunks_exact(vocab).flat_map(|row| row[columns(shard)].to_vec()).collect();
            self.check_in_place(op, &reads, &[1], expected, CLOSE);
        }
    }

    fn optimizers(&mut self) {
        for n in SIZES {
            // With the last two scales, a float's range is too small for the squares, which overflow or underflow.
            for scale in [1.0, 1e30, 1e-30] {
                let x = self.numbers.tensor(&[n], scale);
                let squares: f64 = wide(&x).iter().map(|x| x * x).sum();
                let before = Initial::Values(HostTensor::f32(&[3, 2], vec![1.0, 2.0, 3.0, 4e-3, 5.0, 6.0]));
                let reads = [x];
                let trial = Trial::new(Op::SumSquares { index: 1 }, &reads, std::slice::from_ref(&before));
                let [plain, scaled] = [3.0 + squares, 4e-3 + squares * SQUARES_SCALE];
                let plain = if plain > f64::from(f32::MAX) { f64::INFINITY } else { plain };
                let expected = [(vec![3, 2], vec![1.0, 2.0, plain, scaled, 5.0, 6.0])];
                self.compare(&format!("sum_squares of {n} values of about {scale}"), &trial, &expected, 1e-6);
            }
            self.adamw(n);
        }
        let sums = HostTensor::f32(&[3, 2], vec![9.0, 1.0, 16.0, 2.0, 0.0, 4.0]);
        for (max_norm, scale) in [(1.0, 1.0 / (5.0 + 1e-6)), (6.0, 1.0), (f32::INFINITY, 1.0)] {
            let expected = [(vec![], vec![scale]), (vec![], vec![5.0])];
            self.check("", Op::ClipScale { max_norm }, std::slice::from_ref(&sums), &expected, CLOSE);
        }
        // The norm is 1e21. Its square overflows a float.
        let squares = 1e42 * SQUARES_SCALE;
        let sums = narrow(&[2, 2], &[f64::INFINITY, 0.75 * squares, 1e38, 0.25 * squares]);
        let expected = [(vec![], vec![0.1]), (vec![], vec![1e21])];
        self.check("of a large norm", Op::ClipScale { max_norm: 1e20 }, &[sums], &expected, CLOSE);
        self.updates_with_a_norm_or_rate_that_is_not_finite();
    }

    /// Checks that an update changes nothing if the norm or the learning rate is not finite.
    fn updates_with_a_norm_or_rate_that_is_not_finite(&mut self) {
        for bad in [f32::NAN, f32::INFINITY] {
            let sums = HostTensor::f32(&[2, 2], vec![1.0, 0.0, bad, bad]);
            let outs = [Initial::Poison(vec![]), Initial::Poison(vec![])];
            let got = self.launch("clip_scale", Op::ClipScale { max_norm: 1.0 }, &[sums], &outs).unwrap_or_default();
            let is_nan = got.first().is_some_and(|scale| wide(scale)[0].is_nan());
            self.report.expect("clip_scale", is_nan, "the scale is not NaN for a norm that is not finite");
            for (rate, scale) in [(0.1, bad), (bad, 1.0)] {
                let grad = HostTensor::f32(&[2], vec![bad, 1.0]);
                let reads = [grad, HostTensor::f32(&[2], vec![rate, 1.0]), HostTensor::f32(&[], vec![scale])];
                let op = Op::AdamW { beta1: 0.9, beta2: 0.9, eps: 1e-8, weight_decay: 0.1 };
                let state = [1.0f32, 2.0, 3.0].map(|v| Initial::Values(HostTensor::f32(&[2], vec![v, -v])));
                let got = self.launch("adamw", op, &reads, &state).unwrap_or_default();
                let kept = got.iter().flat_map(wide).eq([1.0, -1.0, 2.0, -2.0, 3.0, -3.0]);
                self.report.expect("adamw", kept, "a skipped update changes values");
            }
        }
    }

    fn adamw(&mut self, n: usize) {
        let (beta1, beta2, eps, decay, rate, scale) = (0.9, 0.95, 1e-3, 0.1, 0.02, 0.5);
        let start = self.numbers.tensor(&[n], 1.0);
        let zeros = HostTensor::f32(&[n], vec![0.0; n]);
        let mut state = vec![start.clone(), zeros.clone(), zeros];
        let [mut p, mut m, mut v] = [wide(&start), vec![0.0; n], vec![0.0; n]];
        for step in 1..=3 {
            let grad = self.numbers.tensor(&[n], 1.0);
            for (i, grad) in wide(&grad).into_iter().enumerate() {
                let g: f64 = scale * grad;
                p[i] *= 1.0 - rate * decay;
                m[i] = beta1 * m[i] + (1.0 - beta1) * g;
                v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
                let (m_hat, v_hat) = (m[i] / (1.0 - beta1.powi(step)), v[i] / (1.0 - beta2.powi(step)));
                p[i] -= rate * m_hat / (v_hat.sqrt() + eps);
            }
            let reads = [grad, narrow(&[2], &[rate, f64::from(step)]), narrow(&[], &[scale])];
            let op =
                Op::AdamW { beta1: beta1 as f32, beta2: beta2 as f32, eps: eps as f32, weight_decay: decay as f32 };
            let check = format!("adamw of {n} elements, step {step}");
            let writes: Vec<Initial> = state.iter().cloned().map(Initial::Values).collect();
            let Some(got) = self.launch(&check, op, &reads, &writes) else { return };
            for (got, expected) in got.iter().zip([&p, &m, &v]) {
                self.report.close(&check, got, expected, CLOSE);
            }
            state = got;
        }
    }

    fn dropout(
        &mut self,
        x: &HostTensor,
        (p, seed): (f32, u64),
        rng: [i32; 2],
        (shape, start, stride): (&[usize], &[usize], usize),
    ) -> Vec<f32> {
        let op = Op::Dropout { p, seed, shape: shape.to_vec(), start: start.to_vec(), stride };
        let reads = [x.clone(), HostTensor::i32(&[2], rng.to_vec())];
        let writes = [Initial::Poison(x.shape.clone())];
        let check = format!("dropout {p} of {:?} at {start:?} in {shape:?}", x.shape);
        let got = self.launch(&check, op.clone(), &reads, &writes).unwrap_or_default();
        let in_place = self.launch(&check, op, &reads, &[Initial::Read(0)]).unwrap_or_default();
        self.report.expect(&check, got == in_place, "the result in place differs");
        got.first().and_then(HostTensor::to_f32).unwrap_or_default()
    }

    /// Tests that widening changes no bits: the mask does not depend on dtypes, and F32 can represent every BF16 value.
    fn widening_dropout(&mut self) {
        let reads = [self.numbers.tensor(&[3, 70], 1.0), HostTensor::i32(&[2], vec![5, 0])];
        let writes = [Initial::Poison(vec![3, 70])];
        let op = Op::Dropout { p: 0.3, seed: 7, shape: vec![3, 70], start: vec![0, 0], stride: 0 };
        let [floats, widening] = [Types::Floats, Types::Widening]
            .map(|types| Trial { types, ..Trial::new(op.clone(), &reads, &writes) }.launch(self.device));
        let same = matches!((&floats, &widening), (Ok(floats), Ok(widening)) if floats == widening);
        self.report.expect("dropout of BF16 to F32", same, format!("got {widening:?}, expected {floats:?}"));
    }

    /// Tests casts to BF16 and back, with values that round up, down and to even, and launches that must be rejected.
    fn casts(&mut self) {
        let one_ulp = 2f32.powi(-7);
        let cases = [
            (0.0, 0.0),
            (-1.5, -1.5),
            (1.0 + one_ulp / 2.0, 1.0),
            (1.0 + 1.5 * one_ulp, 1.0 + 2.0 * one_ulp),
            (1.0 + 0.51 * one_ulp, 1.0 + one_ulp),
            (-1.0 - 0.49 * one_ulp, -1.0),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
            (1e-40, f32::from_bits((1e-40f32.to_bits() + 0x8000) & 0xffff_0000)),
        ];
        for n in SIZES {
            let (x, y): (Vec<f32>, Vec<f32>) = (0..n).map(|i| cases[i % cases.len()]).unzip();
            let (x, y) = (HostTensor::f32(&[n], x), HostTensor::f32(&[n], y));
            let halves = HostTensor::bf16(&[n], y.as_f32().unwrap_or_default());
            let poison = [Initial::Values(filled(&[n], DType::BF16, f32::NAN))];
            let got = Trial::new(Op::Cast, std::slice::from_ref(&x), &poison).launch(self.device);
            self.report.expect("cast to BF16", got.as_ref().is_ok_and(|got| got[0] == halves), format!("got {got:?}"));
            let got = Trial::new(Op::Cast, &[halves], &[Initial::Poison(vec![n])]).launch(self.device);
            self.report.expect("cast to F32", got.as_ref().is_ok_and(|got| got[0] == y), format!("got {got:?}"));
        }
        let nan = [HostTensor::f32(&[1], vec![f32::NAN])];
        let zero = [Initial::Values(HostTensor::bf16(&[1], &[0.0]))];
        let got = Trial::new(Op::Cast, &nan, &zero).launch(self.device);
        let is_nan = got.as_ref().is_ok_and(|got| wide(&got[0])[0].is_nan());
        self.report.expect("cast of NaN", is_nan, format!("got {got:?}"));
        let x = [HostTensor::bf16(&[2], &[1.0, 2.0])];
        let half_sum = [Initial::Values(HostTensor::bf16(&[2], &[0.0; 2]))];
        let trial = Trial { accumulate: true, ..Trial::new(Op::Copy, &x, &half_sum) };
        self.report.expect("a sum in BF16", trial.launch(self.device).is_err(), "the launch was accepted");
        let squares = [Initial::Values(HostTensor::f32(&[1, 2], vec![0.0; 2]))];
        let trial = Trial::new(Op::SumSquares { index: 0 }, &x, &squares);
        self.report.expect("a norm of BF16", trial.launch(self.device).is_err(), "the launch was accepted");
    }

    fn dropouts(&mut self) {
        let (shape, p) = ([6, 70, 33], 0.3f32);
        let ones = filled(&shape, DType::F32, 1.0);
        let whole = self.dropout(&ones, (p, 7), [5, 0], (&shape, &[0, 0, 0], 0));
        let scale = 1.0 / (1.0 - p);
        let kept_value = if self.types == Types::Halves { bf16::from_f32(scale).to_f32() } else { scale };
        let kept = whole.iter().filter(|&&y| y == kept_value).count();
        let zeros = whole.iter().filter(|&&y| y == 0.0).count();
        self.report.expect("dropout", kept + zeros == whole.len(), "a value is neither 0 nor x / (1 - p)");
        // The tolerance is five standard deviations of a binomial count.
        let (n, q) = (whole.len() as f64, f64::from(1.0 - p));
        let far = (kept as f64 - n * q).abs() > 5.0 * (n * q * (1.0 - q)).sqrt();
        self.report.expect("dropout", !far, format!("kept {kept} of {n} at p = {p}"));
        let regions =
            [([0, 0, 0], [6, 70, 17]), ([2, 0, 0], [3, 70, 33]), ([1, 13, 5], [4, 50, 28]), ([0, 3, 0], [6, 0, 33])];
        for (start, size) in regions {
            let region = Region { start: start.to_vec(), size: size.to_vec() };
            let got = self.dropout(&filled(&size, DType::F32, 1.0), (p, 7), [5, 0], (&shape, &start, 0));
            let same = got.iter().enumerate().all(|(i, y)| *y == whole[flat(i, &region, &shape)]);
            self.report.expect(&format!("dropout of {region:?}"), same, "differs from the same part of the whole");
        }
        // Splits the tensor into micro-batches along each dim, and into two shards along the last dim.
        for (dim, count) in [(0, 2), (0, 3), (1, 2), (1, 7), (2, 3)] {
            let mut size = shape;
            size[dim] /= count;
            let stride = size[dim] * element_count(&shape[dim + 1..]);
            let cut = size[2] / 2;
            for (micro_batch, columns) in (0..count).flat_map(|m| [(m, 0..cut), (m, cut..size[2])]) {
                let (mut start, mut size) = ([0, 0, columns.start], size);
                size[2] = columns.len();
                let part = filled(&size, DType::F32, 1.0);
                let got = self.dropout(&part, (p, 7), [5, micro_batch as i32], (&shape, &start, stride));
                start[dim] += micro_batch * shape[dim] / count;
                let region = Region { start: start.to_vec(), size: size.to_vec() };
                let same = got.iter().enumerate().all(|(i, y)| *y == whole[flat(i, &region, &shape)])
                    && got.len() == element_count(&size);
                let check = format!("dropout of micro-batch {micro_batch} of {count} along dim {dim}, {region:?}");
                self.report.expect(&check, same, "differs from the same part of the step's tensor");
            }
        }
        for (what, seed, step) in [("seed", 8, 5), ("step", 7, 6)] {
            let other = self.dropout(&ones, (p, seed), [step, 0], (&shape, &[0, 0, 0], 0));
            let same = other.iter().zip(&whole).filter(|(a, b)| a == b).count() as f64 / n;
            let expected = q * q + (1.0 - q) * (1.0 - q);
            let message = format!("a fraction of {same} of the mask is the same, expected {expected}");
            self.report.expect(&format!("dropout with a different {what}"), (same - expected).abs() < 0.03, message);
        }
        let x = self.numbers.tensor(&[5], 1.0);
        let [none, all] = [0.0, 1.0].map(|p| self.dropout(&x, (p, 1), [1, 0], (&[5], &[0], 0)));
        self.report.expect("dropout with p = 0", Some(&none[..]) == x.as_f32(), "x was changed");
        self.report.expect("dropout with p = 1", all == [0.0; 5], "an element was kept");
    }

    fn rejections(&mut self) {
        let x = self.numbers.tensor(&[2, 3], 1.0);
        let ids = HostTensor::i32(&[2], vec![1, -1]);
        let far = HostTensor::i32(&[2], vec![1, 2]);
        let poison = |shape: &[usize]| Initial::Poison(shape.to_vec());
        let embedding = Op::Embedding { vocab_start: 0, vocab: 2 };
        let einsum = Einsum { a: "mk".to_owned(), b: "kn".to_owned(), out: "mn".to_owned() };
        let cases: Vec<(&str, Op, Vec<HostTensor>, Vec<Initial>)> = vec![
            ("a missing read", Op::Add, vec![x.clone()], vec![poison(&[2, 3])]),
            ("shapes that differ", Op::Gelu, vec![x.clone()], vec![poison(&[2, 4])]),
            ("integers", Op::Gelu, vec![ids.clone()], vec![poison(&[2])]),
            ("inner extents that differ", Op::Einsum(einsum), vec![x.clone(), x.clone()], vec![poison(&[2, 3])]),
            ("a negative id", embedding.clone(), vec![ids, x.clone()], vec![poison(&[2, 3])]),
            // The op must not take this id for an id of another shard, for which the result would be zeros.
            ("an id outside the table", embedding, vec![far, x.clone()], vec![poison(&[2, 3])]),
            ("a reduction in place", Op::RowMax, vec![x.clone()], vec![Initial::Read(0)]),
        ];
        for (what, op, reads, writes) in cases {
            let accepted = Trial::new(op.clone(), &reads, &writes).launch(self.device).is_ok();
            self.report.expect(&format!("{} rejects {what}", op.name()), !accepted, "it was accepted");
        }
        let (reads, writes) = ([x], [poison(&[2, 3])]);
        let trial = Trial { accumulate: true, ..Trial::new(Op::Gelu, &reads, &writes) };
        self.report.expect("gelu rejects accumulate", trial.launch(self.device).is_err(), "it was accepted");
    }
}

fn softmax_grad(logits: &[f64], targets: &[f64], vocab: usize, factor: f64) -> Vec<f64> {
    let row_grad = |(row, target): (&[f64], &f64)| {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|logit| (logit - max).exp()).sum();
        let hit = |column: usize| if column as f64 == *target { 1.0 } else { 0.0 };
        row.iter().enumerate().map(|(i, l)| factor * ((l - max).exp() / sum - hit(i))).collect::<Vec<_>>()
    };
    logits.chunks_exact(vocab).zip(targets).flat_map(row_grad).collect()
}
