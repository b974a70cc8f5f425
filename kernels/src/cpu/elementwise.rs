//! Elementwise ops, sums over leading dims, and copies.

use half::bf16;

use crate::cpu::args::Args;
use crate::cpu::pool::Pool;
use crate::cpu::simd::{LANES, Operand, dispatch, inlined, map_operand, map_operands, normal};
use crate::error::Result;
use crate::region::for_each_run;
use crate::tensor::{DType, HostElement, Region, element_count};

/// Computes `y[i] = f(x[i])` on the pool's threads. `weight` is the cost of one element, measured in additions.
fn parallel_map(pool: &Pool, x: Operand<'_>, y: &mut [f32], weight: usize, f: impl Fn(f32) -> f32 + Sync) {
    let elements = y.len();
    pool.ranges(y, LANES, elements * weight, |range, y| {
        let x = x.range(range);
        inlined!(dispatch(|| map_operand(x, y, &f)));
    });
}

/// Computes `y[i] = f(a[i], b[i])` on the pool's threads.
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

pub(crate) fn fill(args: &mut Args<'_>, pool: &Pool, value: f32) -> Result<()> {
    let y = args.out(0)?;
    let elements = y.len();
    pool.ranges(y, LANES, elements, |_, y| y.fill(value));
    Ok(())
}

pub(crate) fn copy(args: &mut Args<'_>, pool: &Pool) -> Result<()> {
    match args.writes[0].dtype() {
        DType::F32 => {}
        DType::BF16 => return copy_as::<bf16>(args),
        DType::I32 => return copy_as::<i32>(args),
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

fn copy_as<T: HostElement>(args: &mut Args<'_>) -> Result<()> {
    let x = args.slice(0)?;
    args.take::<T>(0)?.copy_from_slice(x);
    Ok(())
}

pub(crate) fn cast(args: &mut Args<'_>) -> Result<()> {
    if args.writes[0].dtype() == DType::BF16 {
        let (x, y) = (args.f32(0)?, args.take(0)?);
        y.iter_mut().zip(x).for_each(|(y, x)| *y = bf16::from_f32(*x));
    } else {
        let (x, y) = (args.slice::<bf16>(0)?, args.out(0)?);
        y.iter_mut().zip(x).for_each(|(y, x)| *y = x.to_f32());
    }
    Ok(())
}

fn store(y: &mut [f32], x: &[f32], accumulate: bool) {
    if accumulate {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    } else {
        y.copy_from_slice(x);
    }
}

pub(crate) fn copy_region(args: &mut Args<'_>, src: &Region, dst: &Region) -> Result<()> {
    let accumulate = args.accumulate;
    match args.writes[0].dtype() {
        DType::F32 => move_region::<f32>(args, src, dst, |y, x| store(y, x, accumulate)),
        DType::BF16 => move_region::<bf16>(args, src, dst, |y, x| y.copy_from_slice(x)),
        DType::I32 => move_region::<i32>(args, src, dst, |y, x| y.copy_from_slice(x)),
    }
}

fn move_region<T: HostElement>(
    args: &mut Args<'_>,
    src: &Region,
    dst: &Region,
    store: impl Fn(&mut [T], &[T]),
) -> Result<()> {
    let (from, to) = ((args.reads[0].shape(), &src.start[..]), (args.writes[0].shape(), &dst.start[..]));
    let (x, y) = (args.slice(0)?, args.take(0)?);
    for_each_run(from, to, &src.size, |from, to, len| store(&mut y[to..to + len], &x[from..from + len]));
    Ok(())
}

pub(crate) fn add(args: &mut Args<'_>, pool: &Pool) -> Result<()> {
    let (a_shape, b_shape) = (args.reads[0].shape(), args.reads[1].shape());
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

pub(crate) fn scale(args: &mut Args<'_>, pool: &Pool, factor: f32) -> Result<()> {
    let x = args.operand(0, 0)?;
    inlined!(parallel_map(pool, x, args.out(0)?, 1, |x| factor * x));
    Ok(())
}

/// Sums over the leading dims. Each thread sums some of the columns over all rows, in row order, so the bits of the
/// result do not depend on the number of threads (BITS-1).
pub(crate) fn sum_leading(args: &mut Args<'_>, pool: &Pool) -> Result<()> {
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

pub(crate) fn gelu(args: &mut Args<'_>, pool: &Pool) -> Result<()> {
    let x = args.operand(0, 0)?;
    inlined!(parallel_map(pool, x, args.out(0)?, 4, |x| x * normal(x).0));
    Ok(())
}

pub(crate) fn gelu_grad(args: &mut Args<'_>, pool: &Pool) -> Result<()> {
    let inputs = [args.operand(0, 0)?, args.operand(1, 0)?];
    inlined!(parallel_map_two(pool, inputs, args.out(0)?, 4, |dy, x| {
        let (cdf, pdf) = normal(x);
        dy * x.mul_add(pdf, cdf)
    }));
    Ok(())
}
