//! Tests Inf and NaN inputs, invalid indices and dropout's choice of elements. All backends must give the same results.

use std::hash::Hasher;

use super::harness::{Initial, Layout, Numbers, Outcome, Report, Trial, Types, filled, launch, run_program, wide};
use super::reference as exact;
use crate::device::Device;
use crate::hash::Fnv;
use crate::op::{Buffer, Op};
use crate::tensor::{DType, HostTensor, element_count};

/// Tolerance for results of about 1. Some intermediate values are rounded to BF16.
const CLOSE: f64 = 2e-2;

/// A value that never occurs in a result.
const UNWRITTEN: f32 = -7.0;

pub(super) fn run(report: &mut Report, device: &Device) {
    rows(report, device);
    attention(report, device);
    indices(report, device);
    masks(report, device);
}

/// True if the two values are close or equal, or if both are NaN.
fn is_same(got: f32, expected: f64, tolerance: f64) -> bool {
    let got = f64::from(got);
    let close = expected.is_finite() && (got - expected).abs() <= tolerance * (1.0 + expected.abs());
    close || got == expected || got.is_nan() && expected.is_nan()
}

/// Tests row maxima (which ignore NaN) and sums of exponentials (which propagate NaN), in one program and in two.
fn rows(report: &mut Report, device: &Device) {
    const NAN: f32 = f32::NAN;
    const INFINITY: f32 = f32::INFINITY;
    let mut numbers = Numbers::new(5, true);
    let special = [
        // Each row has a different mixture of finite values, Inf, -Inf and NaN.
        [-INFINITY; 7],
        [NAN, 1.0, -INFINITY, -INFINITY, -INFINITY, -INFINITY, 2.0],
        [INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY],
        [INFINITY, 1.0, -INFINITY, -INFINITY, -INFINITY, -INFINITY, NAN],
        [1.0, 2.0, -INFINITY, 0.0, 0.0, 0.0, 3.0],
        [3.0, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, NAN],
    ];
    let mut cases = vec![HostTensor::f32(&[special.len(), 7], special.concat())];
    // These rows consist of whole vectors. In each row, the special value has a different position in its vector.
    for special_value in [NAN, INFINITY, -INFINITY] {
        let mut values = numbers.tensor(&[16, 64], 4.0).as_f32().unwrap_or_default().to_vec();
        (0..16).for_each(|row| values[row * 64 + 32 + row] = special_value);
        cases.push(HostTensor::f32(&[16, 64], values));
    }
    cases.extend([[1, 1], [3, 0], [65, 17], [4, 3001], [9, 512]].map(|shape| numbers.tensor(&shape, 40.0)));
    for logits in cases {
        for (half, separate) in [(false, false), (false, true), (true, false), (true, true)] {
            rows_of(report, device, &logits, half, separate);
        }
    }
}

fn rows_of(report: &mut Report, device: &Device, logits: &HostTensor, half: bool, separate: bool) {
    let (rows, width) = (logits.shape[0], logits.shape[1]);
    let variant = [if half { " in BF16" } else { "" }, if separate { ", separate programs" } else { "" }].concat();
    let check = format!("maximum and sum of {rows} rows of {width}{variant}");
    let values = logits.as_f32().unwrap_or_default();
    let typed = if half { HostTensor::bf16(&logits.shape, values) } else { logits.clone() };
    let targets = HostTensor::i32(&[rows], (0..rows).map(|row| (7 * row % (width + 9)) as i32).collect());
    let mut layout = Layout::default();
    let (x, indices) = (layout.place(&typed.shape, typed.dtype()), layout.place(&targets.shape, DType::I32));
    let [max, sum, chosen] = [(); 3].map(|()| layout.place(&[rows], DType::F32));
    let op = Op::SumExpTarget { vocab_start: 4, vocab: width + 9 };
    let launches = [
        launch(Op::RowMax, vec![x.clone()], vec![max.clone()]),
        launch(op, vec![x.clone(), max.clone(), indices.clone()], vec![sum.clone(), chosen.clone()]),
    ];
    let mut got = || -> Outcome<[HostTensor; 3]> {
        let stream = device.stream("conformance", device.threads_per_stream())?;
        let arena = layout.arena(device)?;
        arena.write_host(x.offset, &typed)?;
        arena.write_host(indices.offset, &targets)?;
        // The buffer does not start as NaN, because NaN may be a correct result here.
        let unwritten = filled(&[rows], DType::F32, UNWRITTEN);
        for write in [&max, &sum, &chosen] {
            arena.write_host(write.offset, &unwritten)?;
        }
        let mut programs = launches.chunks(if separate { 1 } else { 2 });
        programs.try_for_each(|part| run_program(&stream, part.to_vec(), &[&arena], false))?;
        layout.check_fences(&arena)?;
        let read = |write: &Buffer| arena.read_host(write.offset, &write.shape, write.dtype);
        Ok([read(&max)?, read(&sum)?, read(&chosen)?])
    };
    let [maxima, sums, chosen] = match got() {
        Ok(got) => got.map(|tensor| tensor.to_f32().unwrap_or_default()),
        Err(error) => return report.fail(&check, error),
    };
    let values = wide(&typed);
    for row in 0..rows {
        let logits = &values[row * width..(row + 1) * width];
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
        let target = (7 * row % (width + 9)).checked_sub(4).and_then(|column| logits.get(column)).unwrap_or(&0.0);
        let is_correct =
            is_same(maxima[row], max, 0.0) && is_same(sums[row], sum, 2e-5) && is_same(chosen[row], *target, 0.0);
        let (expected, got) = ([max, sum, *target], [maxima[row], sums[row], chosen[row]]);
        report.expect(&check, is_correct, format!("row {row}: expected {expected:?}, got {got:?}"));
    }
}

/// Tests that keys with a score of -Inf have no influence, even if they fill whole tiles. A NaN query must give NaN.
fn attention(report: &mut Report, device: &Device) {
    const SHAPE: [usize; 4] = [1, 80, 1, 8];
    let by_time = |f: &dyn Fn(usize) -> f32| HostTensor::f32(&SHAPE, (0..640).map(|i| f(i / 8)).collect());
    let v = Numbers::new(1, true).tensor(&SHAPE, 1.0);
    let q = by_time(&|t| if t == 79 { f32::NAN } else { 1.0 });
    // Attention libraries write BF16. If all scores of a tile are -Inf, a library's result is undefined.
    for (types, far, first) in [(Types::Floats, 66, 0), (Types::Widening, 66, 0), (Types::Halves, 10, 10 * 8)] {
        let k = by_time(&|t| if t < far { f32::NEG_INFINITY } else { t as f32 / 64.0 });
        let [o, _] = exact::attention(&wide(&q), &wide(&k), &wide(&v), SHAPE, 0.3);
        let reads = [q.clone(), k, v.clone()];
        let o_type = if types == Types::Halves { DType::BF16 } else { DType::F32 };
        let writes = [Initial::Values(filled(&SHAPE, o_type, UNWRITTEN)), Initial::Poison(vec![1, 1, 80])];
        let check = format!("attention of special scores, {types:?}");
        match (Trial { types, ..Trial::new(Op::Attention { scale: 0.3 }, &reads, &writes) }).launch(device) {
            Err(error) => report.fail(&check, error),
            Ok(got) => {
                let got = got[0].to_f32().unwrap_or_default();
                let mismatch = (first..640).find(|&i| !is_same(got[i], o[i], CLOSE));
                let message = mismatch.map(|i| format!("element {i}: expected {}, got {}", o[i], got[i]));
                report.expect(&check, message.is_none(), message.unwrap_or_default());
            }
        }
    }
}

/// Tests that the error reports the first invalid index and its position.
fn indices(report: &mut Report, device: &Device) {
    let mut numbers = Numbers::new(0, false);
    let [table, logits, max] = [&[5, 3][..], &[700, 5], &[700]].map(|shape| numbers.tensor(shape, 1.0));
    for bad in [-1, i32::MIN, 20, i32::MAX] {
        let mut ids = vec![3; 700];
        (ids[601], ids[650]) = (bad, 77);
        let ids = HostTensor::i32(&[700], ids);
        let line = || Initial::Poison(vec![700]);
        let embedding = Op::Embedding { vocab_start: 2, vocab: 20 };
        let loss = Op::SumExpTarget { vocab_start: 2, vocab: 20 };
        for (op, reads, writes) in [
            (embedding, vec![ids.clone(), table.clone()], vec![Initial::Poison(vec![700, 3])]),
            (loss, vec![logits.clone(), max.clone(), ids], vec![line(), line()]),
        ] {
            let check = format!("{} of index {bad}", op.name());
            let got = Trial::new(op, &reads, &writes).launch(device);
            let expected = format!("index {bad} at position 601 is not in 0..20");
            let is_reported = got.as_ref().is_err_and(|error| error.to_string().contains(&expected));
            report.expect(&check, is_reported, format!("got {got:?}"));
        }
    }
}

/// Tests that dropout keeps the same elements in all backends and versions, so that training resumes bit-exactly.
fn masks(report: &mut Report, device: &Device) {
    type Part<'a> = (&'a [usize], &'a [usize], &'a [usize], u64);
    let parts: [Part<'_>; 5] = [
        (&[4, 5, 6], &[0, 0, 0], &[4, 5, 6], 0x45f9_c95c_05e5_20a2),
        (&[4, 5, 16], &[1, 2, 4], &[2, 3, 8], 0xf00c_f7ca_d5e9_d75a),
        (&[7], &[2], &[5], 0x8aec_8aa7_7923_68e8),
        (&[3; 6], &[1, 0, 1, 0, 1, 0], &[2; 6], 0x5ff2_ff62_37c1_841c),
        (&[2, 3, 1000], &[0, 1, 0], &[2, 2, 1000], 0xcfe3_89ca_ccab_00ee),
    ];
    for (shape, start, local, expected) in parts {
        let mut hash = Fnv::default();
        for (p, rng) in [(0.3, [5, 2_000_000_000]), (0.9, [-3, -1])] {
            let reads = [filled(local, DType::F32, 1.0), HostTensor::i32(&[2], rng.to_vec())];
            let (shape, start, stride) = (shape.to_vec(), start.to_vec(), element_count(&shape[1..]));
            let op = Op::Dropout { p, seed: 0x1234_5678_9abc_def0, shape, start, stride };
            let writes = [Initial::Poison(local.to_vec())];
            match Trial::new(op, &reads, &writes).launch(device) {
                Err(error) => return report.fail("dropout's mask", error),
                Ok(got) => wide(&got[0]).iter().for_each(|y| hash.write_u8(u8::from(*y != 0.0))),
            }
        }
        let hash = hash.finish();
        let message = format!("part at {start:?} of shape {shape:?}: got hash {hash:#018x}, expected {expected:#018x}");
        report.expect("dropout's mask", hash == expected, message);
    }
}
