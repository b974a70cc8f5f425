//! Extracts, copies and combines boxes of tensors in host memory, for layouts and the interpreter of boxing.

use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::tensor::{DType, HostData, HostTensor, Region, element_count};

/// A tensor with the same value in every element.
pub fn filled(shape: &[usize], dtype: DType, value: f32) -> HostTensor {
    match dtype {
        DType::F32 => HostTensor::f32(shape, vec![value; element_count(shape)]),
        DType::I32 => HostTensor::i32(shape, vec![value as i32; element_count(shape)]),
        DType::BF16 => HostTensor::bf16(shape, &vec![value; element_count(shape)]),
    }
}

/// Returns a box of a tensor as a new tensor.
pub fn slice_region(tensor: &HostTensor, region: &Region) -> HostTensor {
    let mut out = filled(&region.size, tensor.dtype(), 0.0);
    copy_box(tensor, region, &mut out, &Region::whole(&region.size));
    out
}

/// Copies the box `from` of `src` to the box `to` of `dst`; the rest of `dst` is unchanged.
///
/// # Panics
/// Panics if the boxes differ in size or are outside their tensors, or the tensors differ in type: a planner bug.
pub fn copy_box(src: &HostTensor, from: &Region, dst: &mut HostTensor, to: &Region) {
    assert_eq!(from.size, to.size, "the boxes differ in size");
    fn copy<T: Copy>(src: &[T], dst: &mut [T], rows: impl Iterator<Item = (usize, usize)>, width: usize) {
        rows.for_each(|(a, b)| dst[b..b + width].copy_from_slice(&src[a..a + width]));
    }
    let width = from.size.last().copied().unwrap_or(1);
    // Runs consist of complete rows.
    let rows = |shape, region: &Region| region.runs(shape).into_iter().flat_map(move |run| run.step_by(width));
    let rows = rows(&src.shape, from).zip(rows(&dst.shape, to));
    match (&src.data, &mut dst.data) {
        (HostData::F32(src), HostData::F32(dst)) => copy(src, dst, rows, width),
        (HostData::I32(src), HostData::I32(dst)) => copy(src, dst, rows, width),
        (HostData::BF16(src), HostData::BF16(dst)) => copy(src, dst, rows, width),
        _ => panic!("the tensors differ in type"),
    }
}

/// Concatenates tensors along a dim. All tensors must have the same type and the same extents of the other dims.
///
/// # Panics
/// Panics if `parts` is empty.
pub fn concat(parts: &[HostTensor], dim: usize) -> HostTensor {
    let mut shape = parts[0].shape.clone();
    shape[dim] = parts.iter().map(|part| part.shape[dim]).sum();
    let mut whole = filled(&shape, parts[0].dtype(), 0.0);
    let mut start = 0;
    for part in parts {
        let mut target = Region::whole(&part.shape);
        target.start[dim] = start;
        copy_box(part, &Region::whole(&part.shape), &mut whole, &target);
        start += part.shape[dim];
    }
    whole
}

/// `sum = sum op term`, elementwise. Integers, which are never partial, are unchanged.
pub fn combine(sum: &mut HostTensor, term: &HostTensor, op: ReduceOp) {
    if let (HostData::F32(sum), HostData::F32(term)) = (&mut sum.data, &term.data) {
        for (s, t) in sum.iter_mut().zip(term) {
            *s = match op {
                ReduceOp::Sum => *s + t,
                ReduceOp::Max => s.max(*t),
            };
        }
    }
}

/// True if two tensors have the same shape, type and bits.
pub fn same_bits(a: &HostTensor, b: &HostTensor) -> bool {
    (&a.shape, a.dtype(), a.as_bytes()) == (&b.shape, b.dtype(), b.as_bytes())
}

/// True if `inner` is inside `outer`. An empty region is inside every region.
pub fn contains(outer: &Region, inner: &Region) -> bool {
    inner.is_empty() || outer.intersect(inner).as_ref() == Some(inner)
}
