//! Computes matrix products in plain loops with f32 accumulators, through the checked memory.
//!
//! `D = epilogue(alpha * op(A) op(B) + beta * C)`; the bias has one element per row of D, as in cuBLASLt.
#![allow(unsafe_code)]

use cudarc::cublaslt::sys::cudaDataType;

use crate::nccl::data::to_bf16;
use crate::shadow::{Access, Accessor};

/// Bits of an epilogue.
pub mod epilogue {
    /// `max(x, 0)`.
    pub const RELU: u32 = 2;
    /// Adds a bias.
    pub const BIAS: u32 = 4;
    /// Writes the sum of each row of the result.
    pub const BIAS_GRADIENT: u32 = 16;
    /// `gelu(x)`, computed with tanh.
    pub const GELU: u32 = 32;
    /// Multiplies by the derivative of gelu at the elements of the auxiliary matrix.
    pub const GELU_GRADIENT: u32 = 64;
    /// Reads or writes the auxiliary matrix, which contains the input of gelu.
    pub const AUXILIARY: u32 = 128;
    /// Writes the sums over k of op(A).
    pub const BIAS_GRADIENT_A: u32 = 256;
    /// Writes the sums over k of op(B).
    pub const BIAS_GRADIENT_B: u32 = 512;
    /// All supported combinations of these bits.
    pub const KNOWN: &[u32] = &[
        1,
        RELU,
        BIAS,
        RELU | BIAS,
        GELU,
        GELU | BIAS,
        GELU | AUXILIARY,
        GELU | AUXILIARY | BIAS,
        GELU_GRADIENT | AUXILIARY,
        GELU_GRADIENT | AUXILIARY | BIAS_GRADIENT,
        BIAS_GRADIENT_A,
        BIAS_GRADIENT_B,
    ];
}

/// Layout of a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Type of the elements.
    pub dtype: cudaDataType,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Number of elements from one column to the next. In a row-major matrix, from one row to the next.
    pub leading: usize,
    /// Whether the matrix is row-major.
    pub by_rows: bool,
    /// Number of matrices in the batch.
    pub batch: usize,
    /// Number of elements from one matrix of the batch to the next.
    pub stride: usize,
}

/// A matrix product.
#[derive(Clone, Debug)]
pub(crate) struct Product {
    /// Addresses of the matrices A, B, C and D.
    pub addresses: [usize; 4],
    /// Layouts of A, B, C and D.
    pub layouts: [Layout; 4],
    /// Whether A and B are transposed.
    pub transposed: [bool; 2],
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of C.
    pub beta: f32,
    /// Bits of [`epilogue`].
    pub epilogue: u32,
    /// The bias: address, element type, and number of elements from one bias of the batch to the next.
    pub bias: (usize, cudaDataType, usize),
    /// Address of the auxiliary matrix.
    pub auxiliary: usize,
    /// Layout of the auxiliary matrix. It has the size of D, but its own type and strides.
    pub auxiliary_layout: Layout,
    /// Address of the algorithm's workspace, and its size in bytes.
    pub workspace: (usize, usize),
}

/// Returns the bytes of an element, or `None` if its type is not supported.
pub fn element_bytes(dtype: cudaDataType) -> Option<usize> {
    match dtype {
        cudaDataType::CUDA_R_32F => Some(4),
        cudaDataType::CUDA_R_16BF => Some(2),
        _ => None,
    }
}

/// Runs a product.
pub fn run(accessor: &mut Accessor, product: &Product) {
    let mut pointers = product.addresses.to_vec();
    pointers.extend([product.bias.0, product.auxiliary, product.workspace.0]);
    accessor.allow_only(&pointers);
    if product.workspace.1 > 0 && !accessor.touch(product.workspace.0, product.workspace.1, Access::Write) {
        return;
    }
    for batch in 0..product.layouts[3].batch {
        if run_one(accessor, product, batch).is_none() {
            return;
        }
    }
}

fn run_one(accessor: &mut Accessor, p: &Product, batch: usize) -> Option<()> {
    let [la, lb, lc, ld] = p.layouts;
    let (m, n) = (ld.rows, ld.cols);
    let a = row_major(load(accessor, p.addresses[0], &la, batch)?, &la, p.transposed[0]);
    let b = row_major(load(accessor, p.addresses[1], &lb, batch)?, &lb, p.transposed[1]);
    let k = if p.transposed[0] { la.rows } else { la.cols };
    let mut out = multiply(&a, &b, (m, n, k));
    out.iter_mut().for_each(|x| *x *= p.alpha);
    if p.beta != 0.0 {
        let c = load(accessor, p.addresses[2], &lc, batch)?;
        out.iter_mut().zip(&c).for_each(|(x, c)| *x += p.beta * c);
    }
    let bits = p.epilogue;
    if bits & epilogue::BIAS != 0 {
        let bias = load(accessor, p.bias.0, &vector(p, m), batch)?;
        out.chunks_exact_mut(n).zip(&bias).for_each(|(row, bias)| row.iter_mut().for_each(|x| *x += bias));
    }
    if bits & epilogue::RELU != 0 {
        out.iter_mut().for_each(|x| *x = x.max(0.0));
    }
    if bits & epilogue::GELU != 0 {
        if bits & epilogue::AUXILIARY != 0 {
            store(accessor, p.auxiliary, &p.auxiliary_layout, batch, &out)?;
        }
        out.iter_mut().for_each(|x| *x = gelu(*x));
    }
    if bits & epilogue::GELU_GRADIENT != 0 {
        let inputs = load(accessor, p.auxiliary, &p.auxiliary_layout, batch)?;
        out.iter_mut().zip(&inputs).for_each(|(x, input)| *x *= gelu_gradient(*input));
    }
    if bits & epilogue::BIAS_GRADIENT != 0 {
        let sums: Vec<f32> = out.chunks_exact(n).map(|row| row.iter().sum()).collect();
        store(accessor, p.bias.0, &vector(p, m), batch, &sums)?;
    }
    if bits & epilogue::BIAS_GRADIENT_A != 0 {
        let sums: Vec<f32> = a.chunks_exact(k).map(|row| row.iter().sum()).collect();
        store(accessor, p.bias.0, &vector(p, m), batch, &sums)?;
    }
    if bits & epilogue::BIAS_GRADIENT_B != 0 {
        let mut sums = vec![0.0; n];
        b.chunks_exact(n).for_each(|row| sums.iter_mut().zip(row).for_each(|(s, x)| *s += x));
        store(accessor, p.bias.0, &vector(p, n), batch, &sums)?;
    }
    store(accessor, p.addresses[3], &ld, batch, &out)
}

fn vector(p: &Product, length: usize) -> Layout {
    let (_, dtype, stride) = p.bias;
    Layout { dtype, rows: length, cols: 1, leading: length, by_rows: false, batch: 1, stride }
}

/// Multiplies row-major matrices: `a` is m by k, and `b` is k by n.
fn multiply(a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f32> {
    let mut out = vec![0.0f32; m * n];
    for (row, a_row) in out.chunks_exact_mut(n.max(1)).zip(a.chunks_exact(k.max(1))) {
        for (factor, b_row) in a_row.iter().zip(b.chunks_exact(n.max(1))) {
            row.iter_mut().zip(b_row).for_each(|(x, b)| *x += factor * b);
        }
    }
    out
}

fn row_major(matrix: Vec<f32>, layout: &Layout, transposed: bool) -> Vec<f32> {
    if !transposed {
        return matrix;
    }
    let (rows, cols) = (layout.rows, layout.cols);
    let mut out = vec![0.0; matrix.len()];
    for i in 0..rows {
        for j in 0..cols {
            out[j * rows + i] = matrix[i * cols + j];
        }
    }
    out
}

/// Calls `f` with the address, the index and the length of each contiguous row or column.
fn lines(
    address: usize,
    layout: &Layout,
    batch: usize,
    mut f: impl FnMut(usize, usize, usize) -> Option<()>,
) -> Option<()> {
    let bytes = element_bytes(layout.dtype)?;
    let (count, length) = if layout.by_rows { (layout.rows, layout.cols) } else { (layout.cols, layout.rows) };
    (0..count).try_for_each(|line| f(address + (batch * layout.stride + line * layout.leading) * bytes, line, length))
}

/// Reads a matrix and returns its elements in row-major order.
fn load(accessor: &mut Accessor, address: usize, layout: &Layout, batch: usize) -> Option<Vec<f32>> {
    let bytes = element_bytes(layout.dtype)?;
    let mut out = vec![0.0f32; layout.rows * layout.cols];
    lines(address, layout, batch, |at, line, length| {
        if !accessor.touch(at, length * bytes, Access::Read) {
            return None;
        }
        // SAFETY: the line was checked above.
        let raw = unsafe { std::slice::from_raw_parts(at as *const u8, length * bytes) };
        for (i, element) in raw.chunks_exact(bytes).enumerate() {
            let value = match *element {
                [a, b] => f32::from_bits(u32::from(u16::from_le_bytes([a, b])) << 16),
                [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                _ => unreachable!("elements have two or four bytes"),
            };
            let place = if layout.by_rows { line * layout.cols + i } else { i * layout.cols + line };
            out[place] = value;
        }
        Some(())
    })?;
    Some(out)
}

fn store(accessor: &mut Accessor, address: usize, layout: &Layout, batch: usize, values: &[f32]) -> Option<()> {
    let bytes = element_bytes(layout.dtype)?;
    lines(address, layout, batch, |at, line, length| {
        if !accessor.touch(at, length * bytes, Access::Write) {
            return None;
        }
        // SAFETY: the line was checked above. Only operations access it, and operations run one at a time.
        let raw = unsafe { std::slice::from_raw_parts_mut(at as *mut u8, length * bytes) };
        for (i, element) in raw.chunks_exact_mut(bytes).enumerate() {
            let place = if layout.by_rows { line * layout.cols + i } else { i * layout.cols + line };
            match bytes {
                2 => element.copy_from_slice(&to_bf16(values[place]).to_le_bytes()),
                _ => element.copy_from_slice(&values[place].to_le_bytes()),
            }
        }
        Some(())
    })
}

const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBE: f32 = 0.044_715;

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + (GELU_SCALE * (x + GELU_CUBE * x * x * x)).tanh())
}

fn gelu_gradient(x: f32) -> f32 {
    let t = (GELU_SCALE * (x + GELU_CUBE * x * x * x)).tanh();
    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * GELU_SCALE * (1.0 + 3.0 * GELU_CUBE * x * x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_match_hand_computed_values() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 0.0, 2.0, 1.0, 0.0, 3.0]);
        assert_eq!(multiply(&a, &b, (2, 2, 3)), [5.0, 11.0, 14.0, 23.0]);
        let layout = Layout {
            dtype: cudaDataType::CUDA_R_32F,
            rows: 2,
            cols: 3,
            leading: 2,
            by_rows: false,
            batch: 1,
            stride: 0,
        };
        assert_eq!(row_major(a.to_vec(), &layout, true), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }

    #[test]
    fn the_gradient_of_gelu_matches_finite_differences() {
        for x in [-3.0f32, -0.5, 0.0, 0.7, 2.5] {
            let slope = (gelu(x + 1e-2) - gelu(x - 1e-2)) / 2e-2;
            assert!((slope - gelu_gradient(x)).abs() < 1e-3, "{x}: got {}, expected {slope}", gelu_gradient(x));
        }
    }
}
