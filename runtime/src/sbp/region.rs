//! Extracts, copies and combines boxes of tensors in host memory, for layouts and the reference interpreter of boxing.
//! Devices have their own kernels.

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

/// Returns a box of a tensor as a tensor.
pub fn take_box(tensor: &HostTensor, region: &Region) -> HostTensor {
    let mut out = filled(&region.size, tensor.dtype(), 0.0);
    copy_box(tensor, region, &mut out, &Region::whole(&region.size));
    out
}

/// Copies the box `from` of `src` to the box `to` of `dst`; the rest of `dst` is unchanged.
///
/// # Panics
/// When the boxes differ in size or are outside their tensors, or the tensors differ in type: a planner bug.
pub fn copy_box(src: &HostTensor, from: &Region, dst: &mut HostTensor, to: &Region) {
    assert_eq!(from.size, to.size, "the boxes differ in size");
    let rows = rows(&src.shape, from).zip(rows(&dst.shape, to));
    let width = from.size.last().copied().unwrap_or(1);
    match (&src.data, &mut dst.data) {
        (HostData::F32(s), HostData::F32(d)) => {
            rows.for_each(|(a, b)| d[b..b + width].copy_from_slice(&s[a..a + width]));
        }
        (HostData::I32(s), HostData::I32(d)) => {
            rows.for_each(|(a, b)| d[b..b + width].copy_from_slice(&s[a..a + width]));
        }
        (HostData::BF16(s), HostData::BF16(d)) => {
            rows.for_each(|(a, b)| d[b..b + width].copy_from_slice(&s[a..a + width]));
        }
        _ => panic!("the tensors differ in type"),
    }
}

/// Concatenates tensors along a dim; all must have the same type and the same other dims.
///
/// # Panics
/// When `parts` is empty.
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
    let same = match (&a.data, &b.data) {
        (HostData::F32(a), HostData::F32(b)) => a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits())),
        (HostData::I32(a), HostData::I32(b)) => a == b,
        (HostData::BF16(a), HostData::BF16(b)) => a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits())),
        _ => false,
    };
    same && a.shape == b.shape
}

/// True if `inner` is inside `outer`; an empty region is inside any.
pub fn contains(outer: &Region, inner: &Region) -> bool {
    inner.is_empty() || outer.intersect(inner).as_ref() == Some(inner)
}

/// Offsets of the rows of a box in a tensor of this shape. A row runs along the last dim.
fn rows(shape: &[usize], region: &Region) -> impl Iterator<Item = usize> {
    let outer = region.size.len().saturating_sub(1);
    let count = if region.is_empty() { 0 } else { element_count(&region.size[..outer]) };
    let (shape, region) = (shape.to_vec(), region.clone());
    (0..count).map(move |row| {
        let (mut rest, mut stride, mut offset) = (row, 1, 0);
        for d in (0..shape.len()).rev() {
            let mut within = 0;
            if d < outer {
                within = rest % region.size[d];
                rest /= region.size[d];
            }
            offset += (region.start[d] + within) * stride;
            stride *= shape[d];
        }
        offset
    })
}
