//! Tests cuBLASLt on the software device: the results of products and epilogues.

use std::ffi::c_void;
use std::ptr::null_mut;

use cudarc::cublaslt::sys::{self, cublasComputeType_t, cublasStatus_t, cudaDataType_t};
use cudarc::driver::sys::CUstream;

use crate::api::{self, alloc, filled, free, read, stream, wait};
use crate::{child, cuda};

macro_rules! lt {
    ($name:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: pointers point to values of the function's types; handles come from the library.
        let code = unsafe { sys::$name($($arg),*) };
        assert_eq!(code, cublasStatus_t::CUBLAS_STATUS_SUCCESS, "{}", stringify!($name));
    }};
}

/// The product `D = A B + beta D` with an epilogue, column-major in f32.
#[derive(Clone, Copy)]
pub struct Gemm {
    pub a: u64,
    pub b: u64,
    pub d: u64,
    pub dims: (u64, u64, u64),
    pub leading_a: i64,
    pub transposed: (i32, i32),
    pub beta: f32,
    pub epilogue: u32,
    pub bias: u64,
    pub auxiliary: u64,
    pub workspace: (u64, u64),
    pub batch: i32,
}

impl Gemm {
    /// Returns a product of `n` by `n` matrices.
    pub fn square(a: u64, b: u64, d: u64, n: u64) -> Gemm {
        Gemm {
            a,
            b,
            d,
            dims: (n, n, n),
            leading_a: n as i64,
            transposed: (0, 0),
            beta: 0.0,
            epilogue: 1,
            bias: 0,
            auxiliary: 0,
            workspace: (0, 0),
            batch: 1,
        }
    }

    /// Plans the product and runs it once.
    pub fn run(&self, s: CUstream) {
        let (m, n, k) = self.dims;
        let (mut handle, mut desc, mut pref) = (null_mut(), null_mut(), null_mut());
        lt!(cublasLtCreate(&mut handle));
        let f32_type = cudaDataType_t::CUDA_R_32F;
        lt!(cublasLtMatmulDescCreate(&mut desc, cublasComputeType_t::CUBLAS_COMPUTE_32F, f32_type));
        use sys::cublasLtMatmulDescAttributes_t::*;
        let set = |attribute, value: &dyn Attribute| {
            lt!(cublasLtMatmulDescSetAttribute(desc, attribute, value.pointer(), value.bytes()));
        };
        set(CUBLASLT_MATMUL_DESC_TRANSA, &self.transposed.0);
        set(CUBLASLT_MATMUL_DESC_TRANSB, &self.transposed.1);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, &self.epilogue);
        set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &self.bias);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &self.auxiliary);
        set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &(m as i64));
        let layout = |(rows, cols): (u64, u64), transposed: i32, leading: Option<i64>| {
            let mut layout = null_mut();
            let (rows, cols) = if transposed == 1 { (cols, rows) } else { (rows, cols) };
            lt!(cublasLtMatrixLayoutCreate(&mut layout, f32_type, rows, cols, leading.unwrap_or(rows as i64)));
            use sys::cublasLtMatrixLayoutAttribute_t::*;
            let stride = (rows * cols) as i64;
            let (count, offset) = (CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);
            lt!(cublasLtMatrixLayoutSetAttribute(layout, count, self.batch.pointer(), 4));
            lt!(cublasLtMatrixLayoutSetAttribute(layout, offset, stride.pointer(), 8));
            layout
        };
        let la = layout((m, k), self.transposed.0, Some(self.leading_a));
        let (lb, ld) = (layout((k, n), self.transposed.1, None), layout((m, n), 0, None));
        lt!(cublasLtMatmulPreferenceCreate(&mut pref));
        let limit = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        lt!(cublasLtMatmulPreferenceSetAttribute(pref, limit, self.workspace.1.pointer(), 8));
        // SAFETY: a structure of numbers may consist of zero bytes.
        let (mut found, mut count) = (unsafe { std::mem::zeroed::<sys::cublasLtMatmulHeuristicResult_t>() }, 0);
        lt!(cublasLtMatmulAlgoGetHeuristic(handle, desc, la, lb, ld, ld, pref, 1, &mut found, &mut count));
        assert_eq!(count, 1);
        let (alpha, work) = (1.0f32, self.workspace);
        let (a, b, d) = (self.a as *const c_void, self.b as *const c_void, self.d as *mut c_void);
        let (alpha, beta) = (alpha.pointer(), self.beta.pointer());
        let (algo, space, stream) = (&raw const found.algo, work.0 as *mut c_void, s.cast());
        lt!(cublasLtMatmul(
            handle,
            desc,
            alpha,
            a,
            la,
            b,
            lb,
            beta,
            d,
            ld,
            d,
            ld,
            algo,
            space,
            work.1 as usize,
            stream
        ));
        lt!(cublasLtMatmulPreferenceDestroy(pref));
        for layout in [la, lb, ld] {
            lt!(cublasLtMatrixLayoutDestroy(layout));
        }
        lt!(cublasLtMatmulDescDestroy(desc));
        lt!(cublasLtDestroy(handle));
    }
}

/// A value for an attribute of a descriptor.
trait Attribute {
    fn pointer(&self) -> *const c_void;
    fn bytes(&self) -> usize;
}

impl<T: Copy> Attribute for T {
    fn pointer(&self) -> *const c_void {
        std::ptr::from_ref(self).cast()
    }
    fn bytes(&self) -> usize {
        size_of::<T>()
    }
}

fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + (0.797_884_6 * (x + 0.044_715 * x * x * x)).tanh())
}

fn assert_close(got: &[f32], expected: &[f32], case: &str) {
    assert_eq!(got.len(), expected.len());
    let worst = got
        .iter()
        .zip(expected)
        .map(|(g, e)| (g - e).abs())
        .fold(0.0, |a: f32, b| if b > a || b.is_nan() { b } else { a });
    assert!(worst < 1e-4, "{case}: the largest error is {worst}");
}

/// In the child: checks the results of all epilogues and layouts.
pub fn check() {
    api::use_device(0);
    let s = stream();
    let (m, n, k) = (8usize, 3usize, 5usize);
    let (av, bv): (Vec<f32>, Vec<f32>) = (
        (0..m * k).map(|i| (i % 7) as f32 / 4.0 - 0.5).collect(),
        (0..k * n).map(|i| (i % 5) as f32 / 3.0 - 0.7).collect(),
    );
    let bias_v: Vec<f32> = (0..m).map(|i| i as f32 / 10.0).collect();
    let (a, b, d) = (filled(&av), filled(&bv), filled(&vec![1.0; m * n]));
    let (bias, aux) = (filled(&bias_v), filled(&vec![0.25; m * n]));
    let dims = (m as u64, n as u64, k as u64);
    let gemm = Gemm { dims, ..Gemm::square(a, b, d, m as u64) };
    // All matrices are column-major: A[i, l] is at l * m + i.
    let product: Vec<f32> = (0..m * n).map(|p| (0..k).map(|l| av[l * m + p % m] * bv[p / m * k + l]).sum()).collect();
    let biased: Vec<f32> = product.iter().enumerate().map(|(p, x)| x + bias_v[p % m]).collect();
    let check = |gemm: Gemm, at: u64, expected: &[f32], case: &str| {
        gemm.run(s);
        assert_close(&read(at, expected.len(), s), expected, case);
    };
    check(gemm, d, &product, "plain");
    check(Gemm { beta: 2.0, ..gemm }, d, &product.iter().map(|x| 3.0 * x).collect::<Vec<_>>(), "beta");
    check(Gemm { epilogue: 4, bias, ..gemm }, d, &biased, "bias");
    let activated: Vec<f32> = biased.iter().map(|x| gelu(*x)).collect();
    check(Gemm { epilogue: 164, bias, auxiliary: aux, ..gemm }, d, &activated, "gelu, bias and auxiliary");
    assert_close(&read(aux, m * n, s), &biased, "the auxiliary matrix");
    let slope = |x: f32| (gelu(x + 1e-2) - gelu(x - 1e-2)) / 2e-2;
    let backward: Vec<f32> = product.iter().zip(&biased).map(|(g, x)| g * slope(*x)).collect();
    let assert_roughly = |got: Vec<f32>, expected: &[f32], case: &str| {
        assert!(got.iter().zip(expected).all(|(g, e)| (g - e).abs() < 2e-3), "{case}: {got:?} is not {expected:?}");
    };
    let grad = alloc(m);
    Gemm { epilogue: 208, bias: grad, auxiliary: aux, ..gemm }.run(s);
    assert_roughly(read(d, m * n, s), &backward, "the gradient of gelu");
    let sums: Vec<f32> = (0..m).map(|i| (0..n).map(|j| backward[j * m + i]).sum()).collect();
    assert_roughly(read(grad, m, s), &sums, "the gradient of the bias");
    let rows: Vec<f32> = (0..m).map(|i| (0..k).map(|l| av[l * m + i]).sum()).collect();
    check(Gemm { epilogue: 256, bias: grad, ..gemm }, grad, &rows, "sums of A");
    let columns: Vec<f32> = (0..n).map(|j| (0..k).map(|l| bv[j * k + l]).sum()).collect();
    check(Gemm { epilogue: 512, bias: grad, ..gemm }, grad, &columns, "sums of B");
    // For the transposed product, A is stored as k by m.
    let transposed: Vec<f32> = (0..m * k).map(|p| av[p % k * m + p / k]).collect();
    let at = filled(&transposed);
    check(Gemm { a: at, transposed: (1, 0), leading_a: k as i64, ..gemm }, d, &product, "transposed");
    let (batch_a, batch_b) = (filled(&[&av[..], &av[..]].concat()), filled(&[bv.clone(), vec![0.0; k * n]].concat()));
    let batch_d = alloc(2 * m * n);
    let expected = [product.clone(), vec![0.0; m * n]].concat();
    check(Gemm { a: batch_a, b: batch_b, d: batch_d, batch: 2, ..gemm }, batch_d, &expected, "a batch");
    wait(s);
    for address in [a, b, d, bias, aux, grad, at, batch_a, batch_b, batch_d] {
        free(address);
    }
    cuda!(cuStreamDestroy_v2(s));
}

#[test]
fn products_and_epilogues_are_right() {
    child::expect_clean("products", 1, "random", 1);
}
