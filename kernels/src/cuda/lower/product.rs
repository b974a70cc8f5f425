//! Lowers an einsum to one cuBLASLt product. cuBLASLt matrices are column-major: a row-major matrix is the transpose of
//! the column-major matrix in the same memory.

use super::args::Args;
use super::elementwise::fill;
use super::kernel::Steps;
use crate::cuda::step::{Matrix, Place, Product, Step};
use crate::op::{Einsum, GemmDims};
use crate::tensor::DType;

/// The column-major view of a row-major `[rows, columns]` matrix, or of its transpose if `transposed`.
fn stored(place: Place, dtype: DType, rows: usize, columns: usize, transposed: bool) -> Matrix {
    let (slow, fast) = if transposed { (columns, rows) } else { (rows, columns) };
    Matrix { place, dtype, rows: fast as u64, columns: slow as u64, leading: fast as i64 }
}

/// `out[m, n] = A[m, k] B[k, n]`, computed as transposes (`out' = B' A'`) unless `out` is stored transposed.
pub(super) fn product(dims: GemmDims, operands: DType, result: DType, beta: f32) -> Product {
    let GemmDims { m, n, k, a_transposed, b_transposed, out_transposed } = dims;
    let a = stored(Place::read(0), operands, m, k, a_transposed);
    let b = stored(Place::read(1), operands, k, n, b_transposed);
    let d = stored(Place::write(0), result, m, n, out_transposed);
    let direct = Product {
        m: m as u64,
        n: n as u64,
        k: k as u64,
        // As a column-major matrix, `a` is A' unless A is stored transposed.
        a_transposed: !a_transposed,
        b_transposed: !b_transposed,
        a,
        b,
        d,
        beta,
    };
    if out_transposed {
        return direct;
    }
    // Otherwise, the first operand is B', which is the column-major view of an untransposed B.
    Product { m: n as u64, n: m as u64, a: b, b: a, a_transposed: b_transposed, b_transposed: a_transposed, ..direct }
}

pub(super) fn einsum(args: &Args<'_>, einsum: &Einsum) -> Steps {
    let dims = einsum.gemm_dims(args.read_shape(0), args.read_shape(1))?;
    if dims.m * dims.n == 0 {
        return Ok(vec![]);
    }
    if dims.k == 0 {
        // cuBLASLt refuses an empty sum.
        return if args.accumulate { Ok(vec![]) } else { fill(args, 0.0) };
    }
    let beta = if args.accumulate { 1.0 } else { 0.0 };
    Ok(vec![Step::Product(product(dims, args.read_dtype(0), args.write_dtype(0), beta))])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Element of `op(matrix)` in column-major memory.
    fn at(memory: &[f32], matrix: &Matrix, transposed: bool, row: u64, column: u64) -> f32 {
        let (row, column) = if transposed { (column, row) } else { (row, column) };
        assert!(row < matrix.rows && column < matrix.columns);
        memory[(row + column * matrix.leading as u64) as usize]
    }

    #[test]
    fn every_combination_of_transposed_operands_gives_the_same_product() {
        let (m, n, k) = (2, 3, 4);
        let a = |i: usize, l: usize| (i * 7 + l * 3) as f32 % 5.0;
        let b = |l: usize, j: usize| (l * 5 + j * 2) as f32 % 7.0;
        let store = |rows: usize, columns: usize, transposed: bool, f: &dyn Fn(usize, usize) -> f32| -> Vec<f32> {
            let (slow, fast) = if transposed { (columns, rows) } else { (rows, columns) };
            let places = (0..slow).flat_map(|s| (0..fast).map(move |t| if transposed { (t, s) } else { (s, t) }));
            places.map(|(row, column)| f(row, column)).collect()
        };
        let c = |i: usize, j: usize| (0..k).map(|l| a(i, l) * b(l, j)).sum::<f32>();
        for case in 0..8 {
            let [a_transposed, b_transposed, out_transposed] = [1, 2, 4].map(|bit| case & bit != 0);
            let product =
                product(GemmDims { m, n, k, a_transposed, b_transposed, out_transposed }, DType::F32, DType::F32, 0.0);
            let memory = [store(m, k, a_transposed, &a), store(k, n, b_transposed, &b)];
            let of = |matrix: &Matrix| &memory[usize::from(matrix.place == Place::read(1))][..];
            let mut d = vec![f32::NAN; m * n];
            for column in 0..product.n {
                for row in 0..product.m {
                    let term = |l| {
                        at(of(&product.a), &product.a, product.a_transposed, row, l)
                            * at(of(&product.b), &product.b, product.b_transposed, l, column)
                    };
                    d[(row + column * product.d.leading as u64) as usize] = (0..product.k).map(term).sum();
                }
            }
            assert_eq!((product.d.rows, product.d.columns), (product.m, product.n));
            assert_eq!(d, store(m, n, out_transposed, &c), "case {case}");
        }
    }
}
