//! The CPU backend, the embedded default. Nothing outside this crate imports it but through `device` and `stream`.
//! Layers: `pool, simd <- kernels (one file for each family of ops) <- launch, widen <- stream <- device`.

mod attention;
pub mod device;
mod dropout;
mod elementwise;
mod embedding;
pub(crate) mod launch;
mod loss;
mod matmul;
mod norm;
mod optimizer;
pub(crate) mod pool;
pub(crate) mod simd;
pub mod stream;
pub(crate) mod widen;

/// The most threads that one stream may be given.
pub const THREADS_MAX: usize = 64;

/// The instruction set that the kernels use here. Results of two sets may differ by rounding.
pub fn instruction_set() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        return "AVX-512";
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return "AVX2";
    }
    "baseline"
}
