//! Matrix products by cuBLASLt, which uses the launch's workspace. Each stream caches one plan per shape and alignment.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::sys::{self, cublasStatus_t};

use super::context::{Context, Raw};
use super::status::static_text;
use super::step::{Matrix, Place, Product};
use crate::error::{KernelError, Result};
use crate::tensor::DType;

/// Address alignment, in bytes, that the fastest algorithms require.
const ALIGNMENT_MAX: u32 = 16;

#[derive(Debug)]
pub(crate) struct Blas {
    handle: Raw<sys::cublasLtHandle_t>,
    context: Arc<Context>,
}

#[derive(Debug)]
pub(crate) struct ProductPlans {
    by_key: HashMap<Key, Plan>,
    blas: Arc<Blas>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    dims: [u64; 3],
    transposed: [bool; 2],
    /// The matrices a, b and d without their places: a plan depends only on the alignment of the addresses.
    matrices: [Matrix; 3],
    accumulates: bool,
    /// Alignments of a, b and d, in bytes.
    alignment: [u32; 3],
}

#[derive(Debug)]
struct Plan {
    description: Raw<sys::cublasLtMatmulDesc_t>,
    a: Raw<sys::cublasLtMatrixLayout_t>,
    b: Raw<sys::cublasLtMatrixLayout_t>,
    d: Raw<sys::cublasLtMatrixLayout_t>,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

fn check(status: cublasStatus_t, call: &'static str, place: &str) -> Result<()> {
    if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    // SAFETY: both functions return static strings.
    let (name, text) =
        unsafe { (static_text(sys::cublasLtGetStatusName(status)), static_text(sys::cublasLtGetStatusString(status))) };
    Err(KernelError::Cuda { place: place.to_owned(), call, code: status as u32, name, text })
}

impl Blas {
    /// Creates a handle. Requires the library to be loaded and the context to be bound.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the call writes a handle to a local.
        check(unsafe { sys::cublasLtCreate(&mut handle) }, "cublasLtCreate", &context.place())?;
        Ok(Self { handle: Raw(handle), context: context.clone() })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.context.bind_to_drop() {
            // SAFETY: the handle was created in `new` and is destroyed once.
            let _ = unsafe { sys::cublasLtDestroy(self.handle.0) };
        }
    }
}

impl ProductPlans {
    pub(crate) fn new(blas: Arc<Blas>) -> Self {
        Self { by_key: HashMap::new(), blas }
    }

    /// Creates a plan for the product and the alignments of the addresses. Requires the context to be bound.
    pub(crate) fn prepare(&mut self, product: &Product, addresses: [u64; 3], place: &str) -> Result<()> {
        Self::plan(&mut self.by_key, &self.blas, product, addresses, place).map(drop)
    }

    fn plan<'a>(
        by_key: &'a mut HashMap<Key, Plan>,
        blas: &Blas,
        product: &Product,
        addresses: [u64; 3],
        place: &str,
    ) -> Result<&'a Plan> {
        let key = Key::of(product, addresses);
        Ok(match by_key.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Plan::new(blas, product, &key, place)?),
        })
    }

    /// Enqueues a product with [`Product::workspace_bytes`] bytes of `workspace`. Requires the context to be bound.
    pub(crate) fn issue(
        &mut self,
        product: &Product,
        [a, b, d]: [u64; 3],
        workspace: u64,
        stream: Raw<cudarc::driver::sys::CUstream>,
        place: &str,
    ) -> Result<()> {
        let (plan, alpha) = (Self::plan(&mut self.by_key, &self.blas, product, [a, b, d], place)?, 1f32);
        // SAFETY: the plan's handles are live. `Bound` has checked that the addresses are device memory that holds the
        // matrices. The call reads alpha and beta before it returns.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.blas.handle.0,
                plan.description.0,
                (&raw const alpha).cast(),
                a as *const c_void,
                plan.a.0,
                b as *const c_void,
                plan.b.0,
                (&raw const product.beta).cast(),
                d as *const c_void,
                plan.d.0,
                d as *mut c_void,
                plan.d.0,
                &plan.algorithm,
                workspace as *mut c_void,
                product.workspace_bytes(),
                stream.0.cast(),
            )
        };
        check(status, "cublasLtMatmul", place)
    }
}

fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(ALIGNMENT_MAX.trailing_zeros())
}

impl Key {
    fn of(product: &Product, addresses: [u64; 3]) -> Self {
        Self {
            dims: [product.m, product.n, product.k],
            transposed: [product.a_transposed, product.b_transposed],
            matrices: [product.a, product.b, product.d].map(|matrix| Matrix { place: Place::workspace(0), ..matrix }),
            accumulates: product.beta != 0.0,
            alignment: addresses.map(alignment),
        }
    }
}

fn set<T>(
    description: Raw<sys::cublasLtMatmulDesc_t>,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
    place: &str,
) -> Result<()> {
    // SAFETY: the descriptor is live. `value` has the attribute's size, which the library checks.
    let status = unsafe {
        sys::cublasLtMatmulDescSetAttribute(description.0, attribute, (&raw const *value).cast(), size_of::<T>())
    };
    check(status, "cublasLtMatmulDescSetAttribute", place)
}

fn layout(matrix: &Matrix, place: &str) -> Result<Raw<sys::cublasLtMatrixLayout_t>> {
    let &Matrix { dtype, rows, columns, leading, .. } = matrix;
    let is_bf16 = dtype == DType::BF16;
    let data_type = if is_bf16 { sys::cudaDataType_t::CUDA_R_16BF } else { sys::cudaDataType_t::CUDA_R_32F };
    let mut layout = std::ptr::null_mut();
    // SAFETY: the call writes a handle to a local.
    let status = unsafe { sys::cublasLtMatrixLayoutCreate(&mut layout, data_type, rows, columns, leading) };
    check(status, "cublasLtMatrixLayoutCreate", place)?;
    Ok(Raw(layout))
}

impl Plan {
    fn new(blas: &Blas, product: &Product, key: &Key, place: &str) -> Result<Self> {
        use cudarc::cublas::sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let mut description = std::ptr::null_mut();
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        // SAFETY: the call writes a handle to a local.
        let status = unsafe { sys::cublasLtMatmulDescCreate(&mut description, compute, scale) };
        check(status, "cublasLtMatmulDescCreate", place)?;
        let description = Raw(description);
        let transposed = |is_transposed| if is_transposed { CUBLAS_OP_T } else { CUBLAS_OP_N };
        set(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed(product.a_transposed), place)?;
        set(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &transposed(product.b_transposed), place)?;
        let mut plan = Self {
            description,
            a: layout(&product.a, place)?,
            b: layout(&product.b, place)?,
            d: layout(&product.d, place)?,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        plan.algorithm = plan.choose(blas, key, product.workspace_bytes(), place)?;
        Ok(plan)
    }

    /// Returns the algorithm that the library's heuristic ranks first.
    fn choose(&self, blas: &Blas, key: &Key, workspace: usize, place: &str) -> Result<sys::cublasLtMatmulAlgo_t> {
        use sys::cublasLtMatmulAlgoGetHeuristic as get_heuristic;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        // With this scheme, partial sums stay f32 even if the result is bf16.
        use sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as REDUCTION;
        let mut preference = std::ptr::null_mut();
        // SAFETY: the call writes a handle to a local.
        let status = unsafe { sys::cublasLtMatmulPreferenceCreate(&mut preference) };
        check(status, "cublasLtMatmulPreferenceCreate", place)?;
        let [a, b, d] = key.alignment;
        let attributes = [
            (Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, REDUCTION as u32),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, d),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, d),
        ];
        // SAFETY: a result of all-zero bytes is valid. The call below overwrites this result.
        let mut found: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: the handles are live. Each value has the size of its attribute (8 or 4 bytes). `get_heuristic` writes
        // at most one result.
        let status = unsafe {
            let bytes = Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let set = |attribute, value: *const c_void, size| {
                sys::cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, size)
            };
            let mut status = set(bytes, (&raw const workspace).cast(), size_of::<usize>());
            for (attribute, value) in &attributes {
                let next = set(*attribute, (&raw const *value).cast(), size_of::<u32>());
                status = if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS { next } else { status };
            }
            if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
                let (handle, description) = (blas.handle.0, self.description.0);
                let (a, b, d) = (self.a.0, self.b.0, self.d.0);
                status = get_heuristic(handle, description, a, b, d, d, preference, 1, &mut found, &mut count);
            }
            let _ = sys::cublasLtMatmulPreferenceDestroy(preference);
            status
        };
        check(status, "cublasLtMatmulAlgoGetHeuristic", place)?;
        // Each heuristic result has its own status.
        let state = if count == 0 { cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED } else { found.state };
        check(state, "cublasLtMatmulAlgoGetHeuristic", place)?;
        Ok(found.algo)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: the handles were created in `new` and are destroyed once. Products in progress use copies.
        unsafe {
            for layout in [self.a, self.b, self.d] {
                let _ = sys::cublasLtMatrixLayoutDestroy(layout.0);
            }
            let _ = sys::cublasLtMatmulDescDestroy(self.description.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(m: u64, n: u64, k: u64) -> Product {
        let matrix = |place, rows, columns| Matrix { place, dtype: DType::F32, rows, columns, leading: rows as i64 };
        Product {
            m,
            n,
            k,
            a_transposed: false,
            b_transposed: false,
            a: matrix(Place::read(1), m, k),
            b: matrix(Place::read(0), k, n),
            d: matrix(Place::write(0), m, n),
            beta: 0.0,
        }
    }

    #[test]
    fn a_plan_is_reused_for_the_same_shape_at_another_address_of_the_same_alignment() {
        let key = |product: &Product, a| Key::of(product, [a, 1 << 20, 1 << 21]);
        let base = product(8, 4, 2);
        assert_eq!(key(&base, 4096), key(&base, 8192 + 256));
        assert_ne!(key(&base, 4096), key(&base, 4096 + 4));
        assert_ne!(key(&base, 4096), key(&product(8, 4, 3), 4096));
        assert_ne!(key(&base, 4096), key(&Product { beta: 1.0, ..base }, 4096));
        let moved = Matrix { place: Place::workspace(64), ..base.a };
        assert_eq!(key(&base, 4096), key(&Product { a: moved, ..base }, 4096));
        assert_eq!([0x100, 4, 2, 6].map(alignment), [16, 4, 2, 2]);
    }
}
