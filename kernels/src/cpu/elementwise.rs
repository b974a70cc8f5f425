//! Elementwise ops, sums over leading dims, and copies.

use half::bf16;

use crate::cpu::args::Args;
use crate::cpu::pool::Pool;
use crate::cpu::simd::{LANES, Operand, dispatch, inlined, map_operand, map_operands, normal};
use crate::error::KernelError;
use crate::region::{check_inside, for_each_run};
use crate::tensor::{DType, Region, element_count};

/// `y[i] = f(x[i])` on the pool's threads; an element costs `weight` times an addition.
fn parallel_map(pool: &Pool, x: Operand<'_>, y: &mut [f32], weight: usize, f: impl Fn(f32) -> f32 + Sync) {
    let elements = y.len();
    pool.ranges(y, LANES, elements * weight, |range, y| {
        let x = x.range(range);
        inlined!(dispatch(|| map_operand(x, y, &f)));
    });
}

/// `y[i] = f(a[i], b[i])` on the pool's threads.
fn parallel_map_two(
    pool: &Pool,
    [a, b]: [Operand<'_>; 2],
    y: &mut [f32],
    weight: usize,
    f: impl Fn(f32, f32) -> f32 + Sync,
) {
    let elements = y.len();
    pool.ranges(y, LANES, elements * weight, |range, y| {
        let (a, b) = (a.range(range.clone()), b.range(range));
        inlined!(dispatch(|| map_operands(a, b, y, &f)));
    });
}

pub(crate) fn fill(args: &mut Args<'_>, pool: &Pool, value: f32) -> Result<(), KernelError> {
    let y = args.out(0)?;
    let elements = y.len();
    pool.ranges(y, LANES, elements, |_, y| y.fill(value));
    Ok(())
}

pub(crate) fn copy(args: &mut Args<'_>, pool: &Pool) -> Result<(), KernelError> {
    args.expect_same_count(0, 0)?;
    match args.write_dtype(0) {
        DType::F32 => {}
        DType::BF16 => {
            let x = args.bf16(0)?;
            args.out_bf16(0)?.copy_from_slice(x);
            return Ok(());
        }
        DType::I32 if args.accumulate => return Err(args.refused("accumulate", "floats", "integers")),
        DType::I32 => {
            let x = args.i32(0)?;
            args.out_i32(0)?.copy_from_slice(x);
            return Ok(());
        }
    }
    let x = args.operand(0, 0)?;
    let y = args.out(0)?;
    let accumulate = args.accumulate;
    let elements = y.len();
    pool.ranges(y, LANES, elements, |range, y| match x.range(range) {
        Operand::Same if accumulate => y.iter_mut().for_each(|y| *y += *y),
        Operand::Same => {}
        Operand::Other(x) => store(y, x, accumulate),
    });
    Ok(())
}

pub(crate) fn cast(args: &mut Args<'_>) -> Result<(), KernelError> {
    let shape = args.read_shape(0);
    args.expect_writes(&[0], shape)?;
    match (args.read_dtype(0), args.write_dtype(0)) {
        (DType::F32, DType::BF16) => {
            let (x, y) = (args.f32(0)?, args.out_bf16(0)?);
            y.iter_mut().zip(x).for_each(|(y, x)| *y = bf16::from_f32(*x));
            Ok(())
        }
        (DType::BF16, DType::F32) => {
            let (x, y) = (args.bf16(0)?, args.out(0)?);
            y.iter_mut().zip(x).for_each(|(y, x)| *y = x.to_f32());
            Ok(())
        }
        (from, to) => Err(args.refused("dtypes", "F32 to BF16 or BF16 to F32", format!("{from:?} to {to:?}"))),
    }
}

fn store(y: &mut [f32], x: &[f32], accumulate: bool) {
    if accumulate {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    } else {
        y.copy_from_slice(x);
    }
}

pub(crate) fn copy_region(args: &mut Args<'_>, src: &Region, dst: &Region) -> Result<(), KernelError> {
    let (from, to) = (args.read_shape(0), args.write_shape(0));
    check_inside("copy_region", "src", src, from)?;
    check_inside("copy_region", "dst", dst, to)?;
    if src.size != dst.size {
        return Err(args.refused("size of dst", format!("{:?}", src.size), format!("{:?}", dst.size)));
    }
    let (from, to) = ((from, &src.start[..]), (to, &dst.start[..]));
    match args.write_dtype(0) {
        DType::F32 => {}
        DType::BF16 => {
            let (x, y) = (args.bf16(0)?, args.out_bf16(0)?);
            for_each_run(from, to, &src.size, |from, to, len| y[to..to + len].copy_from_slice(&x[from..from + len]));
            return Ok(());
        }
        DType::I32 if args.accumulate => return Err(args.refused("accumulate", "floats", "integers")),
        DType::I32 => {
            let (x, y) = (args.i32(0)?, args.out_i32(0)?);
            for_each_run(from, to, &src.size, |from, to, len| y[to..to + len].copy_from_slice(&x[from..from + len]));
            return Ok(());
        }
    }
    let (x, y, accumulate) = (args.f32(0)?, args.out(0)?, args.accumulate);
    for_each_run(from, to, &src.size, |from, to, len| store(&mut y[to..to + len], &x[from..from + len], accumulate));
    Ok(())
}

pub(crate) fn add(args: &mut Args<'_>, pool: &Pool) -> Result<(), KernelError> {
    let (a_shape, b_shape) = (args.read_shape(0), args.read_shape(1));
    args.expect_writes(&[0], a_shape)?;
    if !a_shape.ends_with(b_shape) {
        return Err(args.refused("shape of read 1", format!("a suffix of {a_shape:?}"), format!("{b_shape:?}")));
    }
    let (a, width) = (args.operand(0, 0)?, element_count(b_shape));
    if a_shape == b_shape {
        let b = args.operand(1, 0)?;
        inlined!(parallel_map_two(pool, [a, b], args.out(0)?, 1, |a, b| a + b));
        return Ok(());
    }
    let (b, y) = (args.f32(1)?, args.out(0)?);
    let (elements, rows) = (y.len(), y.len().checked_div(width).unwrap_or(0));
    pool.rows(rows, elements, [y], |range, [y]| {
        let a = a.range(range.start * width..range.end * width);
        for (i, y) in y.chunks_exact_mut(width).enumerate() {
            let a = a.range(i * width..(i + 1) * width);
            inlined!(dispatch(|| { inlined!(map_operands(a, Operand::Other(b), y, |a, b| a + b)) }));
        }
    });
    Ok(())
}

pub(crate) fn scale(args: &mut Args<'_>, pool: &Pool, factor: f32) -> Result<(), KernelError> {
    args.expect_same_count(0, 0)?;
    let x = args.operand(0, 0)?;
    inlined!(parallel_map(pool, x, args.out(0)?, 1, |x| factor * x));
    Ok(())
}

/// Each thread sums some of the columns over all rows, in order, so the result does not depend on the number of
/// threads.
pub(crate) fn sum_leading(args: &mut Args<'_>, pool: &Pool) -> Result<(), KernelError> {
    let (x_shape, y_shape) = (args.read_shape(0), args.write_shape(0));
    if !x_shape.ends_with(y_shape) {
        return Err(args.refused("shape of write 0", format!("a suffix of {x_shape:?}"), format!("{y_shape:?}")));
    }
    let (x, y, accumulate) = (args.f32(0)?, args.out(0)?, args.accumulate);
    let width = y.len();
    pool.ranges(y, LANES, x.len(), |columns, y| {
        if !accumulate {
            y.fill(0.0);
        }
        inlined!(dispatch(|| {
            for row in x.chunks_exact(width) {
                y.iter_mut().zip(&row[columns.clone()]).for_each(|(y, x)| *y += x);
            }
        }));
    });
    Ok(())
}

pub(crate) fn gelu(args: &mut Args<'_>, pool: &Pool) -> Result<(), KernelError> {
    args.expect_same_count(0, 0)?;
    let x = args.operand(0, 0)?;
    inlined!(parallel_map(pool, x, args.out(0)?, 4, |x| x * normal(x).0));
    Ok(())
}

pub(crate) fn gelu_grad(args: &mut Args<'_>, pool: &Pool) -> Result<(), KernelError> {
    args.expect_same_count(0, 0)?;
    args.expect_same_count(1, 0)?;
    let inputs = [args.operand(0, 0)?, args.operand(1, 0)?];
    inlined!(parallel_map_two(pool, inputs, args.out(0)?, 4, |dy, x| {
        let (cdf, pdf) = normal(x);
        dy * x.mul_add(pdf, cdf)
    }));
    Ok(())
}
