//! Ops on regions of larger tensors. Merges dims where possible, since the kernels take at most four dims.

use super::args::Args;
use super::kernel::{PACK, Steps, long, pack_of, read, threads, variants};
use crate::cuda::step::{Arg, Operand, Place, Step};
use crate::error::Result;
use crate::op::describe::dropout_threshold;
use crate::tensor::{DType, Region, element_count};

/// Number of dims that a kernel takes. Each index of the other, outer dims needs its own kernel launch.
const DIMS: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Dim {
    size: usize,
    /// Stride in each tensor, in elements.
    steps: [usize; 2],
}

/// Strides of a row-major tensor, in elements.
fn steps(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|d| shape[d + 1..].iter().product()).collect()
}

fn place(shape: &[usize], index: &[usize]) -> usize {
    steps(shape).iter().zip(index).map(|(step, index)| step * index).sum()
}

/// Returns at least one dim. Merges dims that are contiguous in both tensors. The last dim's elements are adjacent.
fn join_dims(size: &[usize], shapes: [&[usize]; 2]) -> Vec<Dim> {
    let [a, b] = shapes.map(steps);
    let mut dims: Vec<Dim> = Vec::new();
    for d in 0..size.len() {
        let dim = Dim { size: size[d], steps: [a[d], b[d]] };
        match dims.last_mut() {
            _ if dim.size == 1 => {}
            Some(outer) if outer.steps == dim.steps.map(|step| step * dim.size) => {
                *outer = Dim { size: outer.size * dim.size, steps: dim.steps };
            }
            _ => dims.push(dim),
        }
    }
    if dims.last().is_none_or(|dim| dim.steps != [1, 1]) {
        dims.push(Dim { size: 1, steps: [1, 1] });
    }
    dims
}

/// For each index of the outer dims, calls `run` with the offsets in both tensors and the innermost four dims.
fn for_each_region(dims: &[Dim], mut run: impl FnMut([usize; 2], [Dim; DIMS]) -> Result<()>) -> Result<()> {
    let (outer, inner) = dims.split_at(dims.len().saturating_sub(DIMS));
    let mut last = [Dim { size: 1, steps: [0, 0] }; DIMS];
    last[DIMS - inner.len()..].copy_from_slice(inner);
    let count: usize = outer.iter().map(|dim| dim.size).product();
    for mut index in 0..count {
        let mut offsets = [0, 0];
        for dim in outer.iter().rev() {
            offsets = [0, 1].map(|t| offsets[t] + index % dim.size * dim.steps[t]);
            index /= dim.size;
        }
        run(offsets, last)?;
    }
    Ok(())
}

/// Returns the number of units of `unit` elements in a region, and the sizes of dims 1 to 3; dim 3 is counted in units.
fn sizes(dims: &[Dim; DIMS], unit: usize) -> [usize; DIMS] {
    let count: usize = dims.iter().map(|dim| dim.size).product();
    [count / unit, dims[1].size, dims[2].size, dims[3].size / unit]
}

fn size_args(dims: &[Dim; DIMS], unit: usize) -> impl Iterator<Item = Arg> {
    let [count, sizes @ ..] = sizes(dims, unit);
    std::iter::once(long(count)).chain(sizes.map(|size| Arg::U64(size as u64)))
}

fn step_args(dims: &[Dim; DIMS], tensor: usize, unit: usize) -> impl Iterator<Item = Arg> {
    dims[..DIMS - 1].iter().map(move |dim| Arg::U64((dim.steps[tensor] / unit) as u64))
}

pub(super) fn copy_region(args: &Args<'_>, src: &Region, dst: &Region) -> Steps {
    let (from, to) = (args.read_shape(0), args.write_shape(0));
    if src.is_empty() {
        return Ok(vec![]);
    }
    let starts = [place(from, &src.start), place(to, &dst.start)];
    let dtype = args.write_dtype(0);
    let bytes = dtype.bytes();
    let mut steps = Vec::new();
    for_each_region(&join_dims(&src.size, [from, to]), |offsets, dims| {
        let offsets = [0, 1].map(|t| starts[t] + offsets[t]);
        let from = Place { operand: Operand::Read(0), offset_bytes: offsets[0] * bytes };
        let to = Place { operand: Operand::Write(0), offset_bytes: offsets[1] * bytes };
        let [count, ..] = sizes(&dims, 1);
        if count == dims[DIMS - 1].size {
            steps.extend(if args.accumulate {
                let arguments = vec![Arg::Pointer(from), Arg::Pointer(to), long(count)];
                threads("add_to_f32", count.div_ceil(PACK), arguments)?
            } else {
                vec![Step::Copy { from, to, bytes: count * bytes }]
            });
            return Ok(());
        }
        let outer_steps = dims[..DIMS - 1].iter().flat_map(|dim| dim.steps);
        let pack = pack_of(dtype);
        let packs = outer_steps.chain(offsets).chain([dims[DIMS - 1].size]).all(|n| n.is_multiple_of(pack));
        let function = match (args.accumulate, dtype == DType::BF16, packs) {
            (false, false, false) => "copy_region_words",
            (false, false, true) => "copy_region_packs",
            (false, true, false) => "copy_region_halves",
            (false, true, true) => "copy_region_half_packs",
            // Additions are always in f32.
            (true, _, false) => "add_region_words",
            (true, _, true) => "add_region_packs",
        };
        let unit = if packs { pack } else { 1 };
        let mut arguments = vec![Arg::Pointer(from), Arg::Pointer(to)];
        arguments.extend(size_args(&dims, unit));
        arguments.extend(step_args(&dims, 0, unit));
        arguments.extend(step_args(&dims, 1, unit));
        steps.extend(threads(function, count / unit, arguments)?);
        Ok(())
    })?;
    Ok(steps)
}

pub(super) fn dropout(args: &Args<'_>, p: f32, seed: u64, shape: &[usize], start: &[usize], stride: usize) -> Steps {
    let local = args.read_shape(0);
    if element_count(local) == 0 {
        return Ok(vec![]);
    }
    let (threshold, kept) = dropout_threshold(p);
    let first = place(shape, start);
    let mut steps = Vec::new();
    for_each_region(&join_dims(local, [local, shape]), |[local_offset, whole_offset], dims| {
        let at = |operand, dtype: DType| Arg::Pointer(Place { operand, offset_bytes: local_offset * dtype.bytes() });
        let (x, y) = (at(Operand::Read(0), args.read_dtype(0)), at(Operand::Write(0), args.write_dtype(0)));
        let mut arguments = vec![x, read(1), y];
        arguments.extend(size_args(&dims, 1));
        arguments.extend(step_args(&dims, 1, 1));
        arguments.extend([(first + whole_offset) as u64, stride as u64, seed].map(Arg::U64));
        arguments.extend([Arg::U32(threshold), Arg::F32(kept)]);
        let [count, ..] = sizes(&dims, 1);
        steps.extend(threads(args.pick(0, 0, variants!("dropout")), count.div_ceil(PACK), arguments)?);
        Ok(())
    })?;
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dim(size: usize, a: usize, b: usize) -> Dim {
        Dim { size, steps: [a, b] }
    }

    #[test]
    fn contiguous_dims_are_merged() {
        assert_eq!(join_dims(&[3, 4], [&[5, 7], &[6, 4]]), [dim(3, 7, 4), dim(4, 1, 1)]);
        assert_eq!(join_dims(&[3, 7], [&[5, 7], &[4, 7]]), [dim(21, 1, 1)]);
        assert_eq!(join_dims(&[2, 2, 1], [&[2, 3, 4], &[2, 2, 2]]), [dim(2, 12, 4), dim(2, 4, 2), dim(1, 1, 1)]);
        assert_eq!(join_dims(&[], [&[], &[]]), [dim(1, 1, 1)]);
        assert_eq!(join_dims(&[1, 1], [&[3, 3], &[1, 1]]), [dim(1, 1, 1)]);
    }

    #[test]
    fn more_than_four_dims_become_several_regions() {
        let dims = join_dims(&[2, 2, 2, 2, 2, 2], [&[3; 6], &[4; 6]]);
        let mut offsets = Vec::new();
        let collected = for_each_region(&dims, |at, inner| {
            assert_eq!(inner.map(|dim| dim.size), [2; 4]);
            offsets.push(at);
            Ok(())
        });
        assert_eq!(collected, Ok(()));
        assert_eq!(offsets, [[0, 0], [81, 256], [243, 1024], [324, 1280]]);
    }
}
