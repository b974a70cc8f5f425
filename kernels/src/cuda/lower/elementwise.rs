//! Elementwise ops.

use super::args::Args;
use super::kernel::{BF16_PACK, PACK, THREADS, blocks, long, pack_of, read, threads, variants, write};
use crate::cuda::step::{Arg, Place, Step};
use crate::error::KernelError;
use crate::tensor::{DType, element_count};

/// Packs of four per thread of AdamW: PACKS_PER_THREAD in optimizer.cu.
const ADAMW_PACKS: usize = 4;

/// One elementwise kernel on `n` elements, `pack` per thread; no step if `n` is 0.
fn over(function: &'static str, n: usize, pack: usize, args: Vec<Arg>) -> Result<Vec<Step>, KernelError> {
    if n == 0 {
        return Ok(vec![]);
    }
    Ok(vec![threads(function, n.div_ceil(pack), args)?])
}

/// An elementwise kernel over write 0, in the variant for the types of read 0 and write 0.
fn map(args: &Args<'_>, names: [&'static str; 3], arguments: Vec<Arg>) -> Result<Vec<Step>, KernelError> {
    // If the types differ, the pack of the wider one.
    let pack = pack_of(args.read_dtype(0)).min(pack_of(args.write_dtype(0)));
    over(args.pick(0, 0, names), args.written(0), pack, arguments)
}

/// The steps that fill write 0 with one value.
pub(super) fn filled(args: &Args<'_>, value: f32) -> Result<Vec<Step>, KernelError> {
    let words = args.written(0);
    if words == 0 {
        return Ok(vec![]);
    }
    if args.write_dtype(0) == DType::BF16 {
        // Two bf16 make a word, but the buffer may begin in the middle of one.
        return over("fill_bf16", words, BF16_PACK, vec![write(0), long(words), Arg::F32(value)]);
    }
    Ok(vec![Step::Fill { to: Place::write(0), word: value.to_bits(), words }])
}

pub(super) fn fill(args: &Args<'_>, value: f32) -> Result<Vec<Step>, KernelError> {
    args.expect_floats(&[])?;
    filled(args, value)
}

pub(super) fn copy(args: &Args<'_>) -> Result<Vec<Step>, KernelError> {
    args.expect_same_count(0)?;
    args.expect_same_dtype(0)?;
    let n = args.written(0);
    if args.accumulate {
        if args.write_dtype(0) == DType::I32 {
            return Err(args.refused("accumulate", "floats", "integers"));
        }
        return over("add_to_f32", n, PACK, vec![read(0), write(0), long(n)]);
    }
    let bytes = n * args.write_dtype(0).bytes();
    let copy = Step::Copy { from: Place::read(0), to: Place::write(0), bytes };
    Ok(if bytes > 0 { vec![copy] } else { vec![] })
}

pub(super) fn cast(args: &Args<'_>) -> Result<Vec<Step>, KernelError> {
    args.expect_writes(&[0], args.read_shape(0))?;
    let function = match (args.read_dtype(0), args.write_dtype(0)) {
        (DType::F32, DType::BF16) => "cast_f32_bf16",
        (DType::BF16, DType::F32) => "cast_bf16_f32",
        (from, to) => return Err(args.refused("dtypes", "F32 to BF16 or BF16 to F32", format!("{from:?} to {to:?}"))),
    };
    let n = args.written(0);
    over(function, n, PACK, vec![read(0), write(0), long(n)])
}

pub(super) fn add(args: &Args<'_>) -> Result<Vec<Step>, KernelError> {
    let (a, b) = (args.read_shape(0), args.read_shape(1));
    args.expect_floats(&[0, 1])?;
    args.expect_writes(&[0], a)?;
    if !a.ends_with(b) {
        return Err(args.refused("shape of read 1", format!("a suffix of {a:?}"), format!("{b:?}")));
    }
    let n = args.written(0);
    if a == b {
        return map(args, variants!("add"), vec![read(0), read(1), write(0), long(n)]);
    }
    map(args, variants!("add_suffix"), vec![read(0), read(1), write(0), long(n), long(element_count(b))])
}

pub(super) fn scale(args: &Args<'_>, factor: f32) -> Result<Vec<Step>, KernelError> {
    args.expect_same_count(0)?;
    args.expect_floats(&[0])?;
    let n = args.written(0);
    map(args, variants!("scale"), vec![read(0), write(0), long(n), Arg::F32(factor)])
}

pub(super) fn gelu(args: &Args<'_>) -> Result<Vec<Step>, KernelError> {
    args.expect_same_count(0)?;
    args.expect_floats(&[0])?;
    let n = args.written(0);
    map(args, variants!("gelu"), vec![read(0), write(0), long(n)])
}

pub(super) fn gelu_grad(args: &Args<'_>) -> Result<Vec<Step>, KernelError> {
    args.expect_same_count(0)?;
    args.expect_same_count(1)?;
    args.expect_floats(&[0, 1])?;
    let n = args.written(0);
    map(args, variants!("gelu_grad"), vec![read(0), read(1), write(0), long(n)])
}

pub(super) fn adamw(
    args: &Args<'_>,
    beta1: f32,
    beta2: f32,
    eps: f32,
    weight_decay: f32,
) -> Result<Vec<Step>, KernelError> {
    args.expect_floats(&[0, 1, 2])?;
    args.expect_reads(&[1], &[2])?;
    args.expect_reads(&[2], &[])?;
    args.expect_writes(&[0, 1, 2], args.read_shape(0))?;
    let n = args.written(0);
    if n == 0 {
        return Ok(vec![]);
    }
    // The kernel computes 1 - beta^step as -expm1(step ln beta), which avoids a power on the device.
    let logarithm = |beta: f32| Arg::F64(f64::from(beta).ln());
    let arguments = vec![
        read(0),
        read(1),
        read(2),
        write(0),
        write(1),
        write(2),
        long(n),
        Arg::F32(beta1),
        Arg::F32(beta2),
        logarithm(beta1),
        logarithm(beta2),
        Arg::F32(eps),
        Arg::F32(weight_decay),
    ];
    Ok(vec![blocks("adamw_f32", n.div_ceil(PACK * ADAMW_PACKS * THREADS), THREADS, 0, arguments)?])
}
