//! The functions of cuBLASLt.
//!
//! Two kinds of requests fail as "not supported": those that cuBLASLt refuses, and those that this library does not
//! emulate. A message on standard error names the request.
#![allow(unsafe_code, non_snake_case)]

pub mod product;

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::sync::{Mutex, OnceLock};

use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t,
    cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
    cublasLtMatrixLayout_t, cublasLtMatrixLayoutAttribute_t, cublasStatus_t, cudaDataType, cudaDataType_t,
    cudaStream_t,
};

use crate::cublaslt::product::{Layout, Product, element_bytes, epilogue};
use crate::export::{exports, plain_exports};
use crate::nvrtc::static_text;
use crate::world::{OpKind, lock, machine};

const VERSION: usize = 130_000;
/// Size in bytes of the workspace that the only algorithm uses if the caller's limit permits it. The accesses to this
/// workspace show whether two streams share it.
const WORKSPACE_BYTES: usize = 4096;
/// Number that marks the algorithms that this library returns.
const ALGORITHM: u64 = 0x736f_6674_6375_6461;

#[derive(Clone)]
struct Description {
    transposed: [bool; 2],
    epilogue: u32,
    bias: usize,
    bias_dtype: Option<cudaDataType>,
    bias_stride: usize,
    auxiliary: usize,
    auxiliary_leading: usize,
    auxiliary_stride: usize,
    auxiliary_dtype: Option<cudaDataType>,
}

#[derive(Default)]
struct Objects {
    handles: HashMap<u64, ()>,
    descriptions: HashMap<u64, Description>,
    layouts: HashMap<u64, Layout>,
    preferences: HashMap<u64, usize>,
}

fn objects() -> &'static Mutex<Objects> {
    static OBJECTS: OnceLock<Mutex<Objects>> = OnceLock::new();
    OBJECTS.get_or_init(Mutex::default)
}

fn new_handle() -> u64 {
    machine().state().handle()
}

/// # Safety
///
/// `buffer` points to `bytes` readable bytes.
unsafe fn number(buffer: *const c_void, bytes: usize) -> Result<u64, cublasStatus_t> {
    if !matches!(bytes, 4 | 8) || buffer.is_null() {
        return Err(cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE);
    }
    let mut wide = [0; 8];
    // SAFETY: the caller keeps the contract above.
    wide[..bytes].copy_from_slice(unsafe { std::slice::from_raw_parts(buffer.cast(), bytes) });
    Ok(u64::from_le_bytes(wide))
}

fn dtype(number: u64) -> Result<cudaDataType, cublasStatus_t> {
    match number {
        0 => Ok(cudaDataType_t::CUDA_R_32F),
        14 => Ok(cudaDataType_t::CUDA_R_16BF),
        _ => refuse(&format!("elements of type {number}")),
    }
}

fn refuse<T>(request: &str) -> Result<T, cublasStatus_t> {
    eprintln!("software-cuda: cuBLASLt: not supported: {request}");
    Err(cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)
}

/// Builds a product whose addresses and factors are still missing. Fails if the parts are inconsistent.
fn build_product(
    objects: &Objects,
    description: cublasLtMatmulDesc_t,
    layouts: [cublasLtMatrixLayout_t; 4],
) -> Result<Product, cublasStatus_t> {
    let invalid = cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE;
    let d = objects.descriptions.get(&(description as u64)).ok_or(invalid)?;
    let mut found = [None; 4];
    for (to, handle) in found.iter_mut().zip(layouts) {
        *to = Some(*objects.layouts.get(&(handle as u64)).ok_or(invalid)?);
    }
    let [a, b, c, out] = found.map(|l| l.expect("all four layouts"));
    let oriented_dims = |l: &Layout, t: bool| if t { (l.cols, l.rows) } else { (l.rows, l.cols) };
    let ((m, k), (k2, n)) = (oriented_dims(&a, d.transposed[0]), oriented_dims(&b, d.transposed[1]));
    let shape = |l: &Layout| (l.rows, l.cols, l.dtype);
    if k != k2 || (m, n) != (out.rows, out.cols) || shape(&c) != shape(&out) || [m, n, k].contains(&0) {
        return Err(invalid);
    }
    for l in [&a, &b, &c, &out] {
        let needed = if l.by_rows { l.cols } else { l.rows };
        if l.leading < needed || l.batch != out.batch || element_bytes(l.dtype).is_none() {
            return Err(invalid);
        }
    }
    if a.dtype != b.dtype || (a.dtype == cudaDataType_t::CUDA_R_32F && out.dtype != a.dtype) {
        return refuse("this combination of element types");
    }
    if !epilogue::KNOWN.contains(&d.epilogue) {
        return refuse(&format!("epilogue {}", d.epilogue));
    }
    if d.epilogue != 1 && (out.by_rows || out.batch > 1) {
        return refuse("an epilogue with a row-major or batched result");
    }
    let auxiliary_layout = Layout {
        dtype: d.auxiliary_dtype.unwrap_or(out.dtype),
        leading: d.auxiliary_leading,
        stride: d.auxiliary_stride,
        ..out
    };
    let uses_auxiliary = d.epilogue & epilogue::AUXILIARY != 0;
    if uses_auxiliary && (d.auxiliary_leading < m || d.auxiliary_leading % 8 != 0) {
        // cuBLASLt requires the auxiliary matrix's leading dimension to be a multiple of 8.
        return Err(invalid);
    }
    Ok(Product {
        addresses: [0; 4],
        layouts: [a, b, c, out],
        transposed: d.transposed,
        alpha: 1.0,
        beta: 0.0,
        epilogue: d.epilogue,
        bias: (d.bias, d.bias_dtype.unwrap_or(out.dtype), d.bias_stride),
        auxiliary: d.auxiliary,
        auxiliary_layout,
        workspace: (0, 0),
    })
}

exports! { cublaslt;
    fn cublasLtCreate(out: *mut cublasLtHandle_t) -> cublasStatus_t {
        machine().state().device().map_err(|_| cublasStatus_t::CUBLAS_STATUS_NOT_INITIALIZED)?;
        let handle = new_handle();
        lock(objects()).handles.insert(handle, ());
        *out = handle as cublasLtHandle_t;
        Ok(())
    }

    fn cublasLtDestroy(handle: cublasLtHandle_t) -> cublasStatus_t {
        lock(objects()).handles.remove(&(handle as u64)).ok_or(cublasStatus_t::CUBLAS_STATUS_NOT_INITIALIZED)
    }

    fn cublasLtMatmulDescCreate(
        out: *mut cublasLtMatmulDesc_t,
        compute: cublasComputeType_t,
        scale: cudaDataType_t,
    ) -> cublasStatus_t {
        use cublasComputeType_t::*;
        let is_f32 = matches!(compute, CUBLAS_COMPUTE_32F | CUBLAS_COMPUTE_32F_PEDANTIC | CUBLAS_COMPUTE_32F_FAST_TF32);
        if !is_f32 || scale != cudaDataType_t::CUDA_R_32F {
            return refuse("accumulators or factors other than f32");
        }
        let handle = new_handle();
        let description = Description {
            transposed: [false; 2],
            epilogue: 1,
            bias: 0,
            bias_dtype: None,
            bias_stride: 0,
            auxiliary: 0,
            auxiliary_leading: 0,
            auxiliary_stride: 0,
            auxiliary_dtype: None,
        };
        lock(objects()).descriptions.insert(handle, description);
        *out = handle as cublasLtMatmulDesc_t;
        Ok(())
    }

    fn cublasLtMatmulDescSetAttribute(
        description: cublasLtMatmulDesc_t,
        attribute: cublasLtMatmulDescAttributes_t,
        buffer: *const c_void,
        bytes: usize,
    ) -> cublasStatus_t {
        use cublasLtMatmulDescAttributes_t::*;
        let value = number(buffer, bytes)?;
        let mut objects = lock(objects());
        let found = objects.descriptions.get_mut(&(description as u64));
        let d = found.ok_or(cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE)?;
        match attribute {
            CUBLASLT_MATMUL_DESC_TRANSA if value < 2 => d.transposed[0] = value == 1,
            CUBLASLT_MATMUL_DESC_TRANSB if value < 2 => d.transposed[1] = value == 1,
            CUBLASLT_MATMUL_DESC_EPILOGUE => d.epilogue = value as u32,
            CUBLASLT_MATMUL_DESC_BIAS_POINTER => d.bias = value as usize,
            CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE => d.bias_dtype = Some(dtype(value)?),
            CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE => d.bias_stride = value as usize,
            CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER => d.auxiliary = value as usize,
            CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD => d.auxiliary_leading = value as usize,
            CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE => d.auxiliary_stride = value as usize,
            CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE => d.auxiliary_dtype = Some(dtype(value)?),
            CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET => {}
            // f32 factors in host memory are the default.
            CUBLASLT_MATMUL_DESC_POINTER_MODE if value == 0 => {}
            other => return refuse(&format!("attribute {other:?} with the value {value}")),
        }
        Ok(())
    }

    fn cublasLtMatmulDescDestroy(description: cublasLtMatmulDesc_t) -> cublasStatus_t {
        let removed = lock(objects()).descriptions.remove(&(description as u64));
        removed.map(|_| ()).ok_or(cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE)
    }

    fn cublasLtMatrixLayoutCreate(
        out: *mut cublasLtMatrixLayout_t,
        element: cudaDataType,
        rows: u64,
        cols: u64,
        leading: i64,
    ) -> cublasStatus_t {
        let handle = new_handle();
        let layout = Layout {
            dtype: dtype(element as u64)?,
            rows: rows as usize,
            cols: cols as usize,
            leading: leading as usize,
            by_rows: false,
            batch: 1,
            stride: 0,
        };
        lock(objects()).layouts.insert(handle, layout);
        *out = handle as cublasLtMatrixLayout_t;
        Ok(())
    }

    fn cublasLtMatrixLayoutSetAttribute(
        layout: cublasLtMatrixLayout_t,
        attribute: cublasLtMatrixLayoutAttribute_t,
        buffer: *const c_void,
        bytes: usize,
    ) -> cublasStatus_t {
        use cublasLtMatrixLayoutAttribute_t::*;
        let value = number(buffer, bytes)?;
        let mut objects = lock(objects());
        let l = objects.layouts.get_mut(&(layout as u64)).ok_or(cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE)?;
        match attribute {
            CUBLASLT_MATRIX_LAYOUT_TYPE => l.dtype = dtype(value)?,
            CUBLASLT_MATRIX_LAYOUT_ORDER if value < 2 => l.by_rows = value == 1,
            CUBLASLT_MATRIX_LAYOUT_ROWS => l.rows = value as usize,
            CUBLASLT_MATRIX_LAYOUT_COLS => l.cols = value as usize,
            CUBLASLT_MATRIX_LAYOUT_LD => l.leading = value as usize,
            CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT => l.batch = value as usize,
            CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET => l.stride = value as usize,
            other => return refuse(&format!("attribute {other:?} with the value {value}")),
        }
        Ok(())
    }

    fn cublasLtMatrixLayoutDestroy(layout: cublasLtMatrixLayout_t) -> cublasStatus_t {
        let removed = lock(objects()).layouts.remove(&(layout as u64));
        removed.map(|_| ()).ok_or(cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE)
    }

    fn cublasLtMatmulPreferenceCreate(out: *mut cublasLtMatmulPreference_t) -> cublasStatus_t {
        let handle = new_handle();
        lock(objects()).preferences.insert(handle, 0);
        *out = handle as cublasLtMatmulPreference_t;
        Ok(())
    }

    fn cublasLtMatmulPreferenceSetAttribute(
        preference: cublasLtMatmulPreference_t,
        attribute: cublasLtMatmulPreferenceAttributes_t,
        buffer: *const c_void,
        bytes: usize,
    ) -> cublasStatus_t {
        let value = number(buffer, bytes)?;
        let mut objects = lock(objects());
        let found = objects.preferences.get_mut(&(preference as u64));
        let workspace = found.ok_or(cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE)?;
        if attribute == cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES {
            *workspace = value as usize;
        }
        Ok(())
    }

    fn cublasLtMatmulPreferenceDestroy(preference: cublasLtMatmulPreference_t) -> cublasStatus_t {
        let removed = lock(objects()).preferences.remove(&(preference as u64));
        removed.map(|_| ()).ok_or(cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE)
    }

    fn cublasLtMatmulAlgoGetHeuristic(
        _handle: cublasLtHandle_t,
        description: cublasLtMatmulDesc_t,
        a: cublasLtMatrixLayout_t,
        b: cublasLtMatrixLayout_t,
        c: cublasLtMatrixLayout_t,
        d: cublasLtMatrixLayout_t,
        preference: cublasLtMatmulPreference_t,
        requested: c_int,
        out: *mut cublasLtMatmulHeuristicResult_t,
        returned: *mut c_int,
    ) -> cublasStatus_t {
        let objects = lock(objects());
        *returned = 0;
        build_product(&objects, description, [a, b, c, d])?;
        if requested < 1 {
            return Err(cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE);
        }
        let allowed = objects.preferences.get(&(preference as u64)).copied().unwrap_or(0);
        let workspace = if allowed >= WORKSPACE_BYTES { WORKSPACE_BYTES } else { 0 };
        let algo = cublasLtMatmulAlgo_t { data: [ALGORITHM, workspace as u64, 0, 0, 0, 0, 0, 0] };
        *out = cublasLtMatmulHeuristicResult_t {
            algo,
            workspaceSize: workspace,
            state: cublasStatus_t::CUBLAS_STATUS_SUCCESS,
            wavesCount: 1.0,
            reserved: [0; 4],
        };
        *returned = 1;
        Ok(())
    }

    fn cublasLtMatmul(
        handle: cublasLtHandle_t,
        description: cublasLtMatmulDesc_t,
        alpha: *const c_void,
        a: *const c_void,
        a_layout: cublasLtMatrixLayout_t,
        b: *const c_void,
        b_layout: cublasLtMatrixLayout_t,
        beta: *const c_void,
        c: *const c_void,
        c_layout: cublasLtMatrixLayout_t,
        d: *mut c_void,
        d_layout: cublasLtMatrixLayout_t,
        algo: *const cublasLtMatmulAlgo_t,
        workspace: *mut c_void,
        workspace_bytes: usize,
        stream: cudaStream_t,
    ) -> cublasStatus_t {
        let objects = lock(objects());
        if !objects.handles.contains_key(&(handle as u64)) {
            return Err(cublasStatus_t::CUBLAS_STATUS_NOT_INITIALIZED);
        }
        let mut product = build_product(&objects, description, [a_layout, b_layout, c_layout, d_layout])?;
        drop(objects);
        let used = if algo.is_null() { 0 } else { (*algo).data[1] as usize };
        if used > workspace_bytes || (!algo.is_null() && (*algo).data[0] != ALGORITHM) {
            return Err(cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE);
        }
        product.workspace = (workspace as usize, used);
        product.addresses = [a as usize, b as usize, c as usize, d as usize];
        (product.alpha, product.beta) = (*alpha.cast::<f32>(), *beta.cast::<f32>());
        let needs = epilogue::BIAS | epilogue::BIAS_GRADIENT | epilogue::BIAS_GRADIENT_A | epilogue::BIAS_GRADIENT_B;
        let lacks_bias = product.epilogue & needs != 0 && product.bias.0 == 0;
        if lacks_bias || (product.epilogue & epilogue::AUXILIARY != 0 && product.auxiliary == 0) {
            return Err(cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE);
        }
        let mut state = machine().state();
        let stream = state.stream(stream as u64).map_err(|_| cublasStatus_t::CUBLAS_STATUS_EXECUTION_FAILED)?;
        let [la, _, _, ld] = &product.layouts;
        let k = if product.transposed[0] { la.rows } else { la.cols };
        let name = format!("product {} x {} x {k}", ld.rows, ld.cols);
        state.submit(machine(), stream, OpKind::Product(Box::new(product)), name);
        Ok(())
    }
}

plain_exports! { cublaslt;
    fn cublasLtGetVersion() -> usize {
        VERSION
    }

    fn cublasLtGetStatusName(status: cublasStatus_t) -> *const c_char {
        static_text(&format!("{status:?}"))
    }

    fn cublasLtGetStatusString(status: cublasStatus_t) -> *const c_char {
        static_text(&format!("{status:?}"))
    }
}
