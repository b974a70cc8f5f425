//! Matrix products by the crate `gemm-f32`. Each thread computes a slice of the result.
//!
//! For given inputs, the bits of an element depend only on the length `k` of the summed index (BITS-1), not on slices,
//! caches or vector width. `k` is split into blocks. Each block's sum is a chain of fused multiply-adds, and the sums
//! of the blocks are added in order.
#![allow(unsafe_code)]

use crate::cpu::args::Args;
use crate::cpu::pool::Pool;
use crate::error::Result;
use crate::op::Einsum;
use crate::tensor::split_range;

/// Number of multiply-adds for which another thread pays off: about 2 us of work.
const FORK_MULTIPLIES: usize = 128 * 1024;

/// Slices are multiples of this many rows or columns, so that micro-kernels process whole tiles.
const GRAIN: usize = 16;

/// Maximum length of the summed index per call of `gemm`. `gemm` would split a longer sum into blocks of at least this
/// length, but the exact length would depend on the cache sizes.
const BLOCK_MAX: usize = 512;

/// A matrix in memory. Strides are in elements.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) start: *const f32,
    pub(crate) row: usize,
    pub(crate) column: usize,
}

// SAFETY: a matrix only holds an address; `product`'s contract governs access to the memory.
unsafe impl Sync for Matrix {}
// SAFETY: as for `Sync`.
unsafe impl Send for Matrix {}

impl Matrix {
    pub(crate) fn transposed(self) -> Self {
        Self { start: self.start, row: self.column, column: self.row }
    }

    pub(crate) fn at(self, row: usize, column: usize) -> Self {
        Self { start: self.start.wrapping_add(row * self.row + column * self.column), ..self }
    }
}

/// Computes `out = factor * a b` or, with `accumulate`, `out += factor * a b`; `out` is `[m, n]`, `a` is `[m, k]`.
///
/// # Safety
/// All elements of the three matrices are in live memory. `out` is writable, overlaps neither `a` nor `b`, and is
/// accessed by nothing else. Nothing writes `a` and `b`.
pub(crate) unsafe fn product(
    (m, n, k): (usize, usize, usize),
    out: Matrix,
    accumulate: bool,
    factor: f32,
    a: Matrix,
    b: Matrix,
) {
    if m == 0 || n == 0 {
        return;
    }
    let destination = out.start.cast_mut();
    if k == 0 {
        if !accumulate {
            for place in (0..m).flat_map(|i| (0..n).map(move |j| i * out.row + j * out.column)) {
                // SAFETY: the address is that of an element of `out`.
                unsafe { *destination.add(place) = 0.0 };
            }
        }
        return;
    }
    // The kernels of `gemm` expect results whose columns are contiguous.
    let transpose = out.column < out.row;
    let (m, n, out, a, b) =
        if transpose { (n, m, out.transposed(), b.transposed(), a.transposed()) } else { (m, n, out, a, b) };
    let block = k.div_ceil(k.div_ceil(BLOCK_MAX));
    for start in (0..k).step_by(block) {
        let (a, b) = (a.at(0, start), b.at(start, 0));
        // Conjugation does not change real numbers. It makes `gemm` avoid its code paths for small results and for
        // vectors: `gemm` would choose these paths by the shape of this slice, and they sum in different orders.
        let conjugate_out = true;
        // SAFETY: the contract includes `gemm`'s: the matrices are valid, and access to the destination is exclusive.
        unsafe {
            gemm_f32::gemm::f32::get_gemm_fn()(
                m,
                n,
                block.min(k - start),
                destination,
                out.column as isize,
                out.row as isize,
                accumulate || start > 0,
                a.start,
                a.column as isize,
                a.row as isize,
                b.start,
                b.column as isize,
                b.row as isize,
                1.0,
                factor,
                conjugate_out,
                false,
                false,
                gemm_common::Parallelism::None,
            );
        }
    }
}

/// The matrix of a whole tensor, stored row-major or transposed.
fn stored(start: *const f32, rows: usize, columns: usize, transposed: bool) -> Matrix {
    if transposed { Matrix { start, row: 1, column: rows } } else { Matrix { start, row: columns, column: 1 } }
}

pub(crate) fn einsum(args: &mut Args<'_>, pool: &Pool, einsum: &Einsum) -> Result<()> {
    let dims = einsum.gemm_dims(args.reads[0].shape(), args.reads[1].shape())?;
    let (a, b, out, accumulate) = (args.f32(0)?, args.f32(1)?, args.out(0)?, args.accumulate);
    let (m, n, k) = (dims.m, dims.n, dims.k);
    assert!(a.len() == m * k && b.len() == k * n && out.len() == m * n, "einsum's dims cover its operands");
    let a = stored(a.as_ptr(), m, k, dims.a_transposed);
    let b = stored(b.as_ptr(), k, n, dims.b_transposed);
    let out = stored(out.as_mut_ptr(), m, n, dims.out_transposed);
    let by_rows = m >= n;
    let grains = if by_rows { m } else { n }.div_ceil(GRAIN);
    let worth = (m * n).saturating_mul(k) / FORK_MULTIPLIES;
    let parts = worth.clamp(1, pool.threads()).min(grains);
    pool.run(parts, &|part| {
        let grains = split_range(grains, parts, part);
        let (start, end) = (grains.start * GRAIN, grains.end * GRAIN);
        // SAFETY: all three matrices lie inside their slices (assertion above), which outlive this call; the parts'
        // rows (or columns) of `out` are disjoint, and `Args` gave exclusive access to `out`.
        unsafe {
            if by_rows {
                product((end.min(m) - start, n, k), out.at(start, 0), accumulate, 1.0, a.at(start, 0), b);
            } else {
                product((m, end.min(n) - start, k), out.at(0, start), accumulate, 1.0, a, b.at(0, start));
            }
        }
    });
    Ok(())
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use gemm_common::Parallelism;
    use gemm_common::gemm::gemm_basic_generic;
    use gemm_common::simd::{MixedSimd, V3, V4};
    use gemm_f32::microkernel::{avx512f, fma};

    /// The same call as in `product`, with the kernels of one vector width.
    macro_rules! blocked {
        ($simd:ty, $kernels:ident, $lanes:literal, $packs:literal, $horizontal:literal, $shape:expr, $a:expr, $b:expr, $out:expr) => {{
            use $kernels::f32::{H_UKR, UKR};
            let ((m, n, k), simd) =
                ($shape, <$simd as MixedSimd<f32, f32, f32, f32>>::try_new().expect("instruction set is available"));
            // SAFETY: the shapes match (`a` row-major, `b` and `out` column-major); the machine supports the
            // instructions.
            unsafe {
                gemm_basic_generic::<$simd, f32, $lanes, { $lanes * $packs }, 6, $packs, $horizontal, $horizontal>(
                    simd,
                    m,
                    n,
                    k,
                    $out.as_mut_ptr(),
                    m as isize,
                    1,
                    true,
                    $a.as_ptr(),
                    1,
                    k as isize,
                    $b.as_ptr(),
                    k as isize,
                    1,
                    1.0,
                    0.7,
                    true,
                    false,
                    false,
                    |a, b, c| a * b + c,
                    &UKR,
                    &H_UKR,
                    false,
                    Parallelism::None,
                );
            }
        }};
    }

    /// Tests that `product`'s code path returns the same bits with AVX2 and AVX-512, for whole and partial tiles.
    #[test]
    fn the_vector_width_does_not_change_bits() {
        if !std::arch::is_x86_feature_detected!("avx512f") || !std::arch::is_x86_feature_detected!("fma") {
            println!("SKIPPED: needs AVX-512");
            return;
        }
        let numbers = |len: usize, seed: f32| -> Vec<f32> { (0..len).map(|i| (i as f32 * seed).sin()).collect() };
        for shape in
            [(1, 1, 7), (1, 40, 512), (17, 1, 100), (16, 16, 333), (64, 6, 512), (130, 77, 65), (3, 5, 1), (33, 9, 2)]
        {
            let (m, n, k) = shape;
            let (a, b, before) = (numbers(m * k, 0.37), numbers(k * n, 0.53), numbers(m * n, 0.71));
            let (mut narrow, mut wide) = (before.clone(), before);
            blocked!(V3, fma, 8, 2, 2, shape, a, b, narrow);
            blocked!(V4, avx512f, 16, 4, 4, shape, a, b, wide);
            let differs = narrow.iter().zip(&wide).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differs, None, "{shape:?}");
        }
    }
}
