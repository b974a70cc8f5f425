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
mod widen;

/// The most threads that one stream may be given.
pub const THREADS_MAX: usize = 64;

/// The arithmetic that the bits of CPU kernels depend on, as text: the processor's architecture, and whether products use
/// fused multiply-adds. Machines that agree in it, and in the C library (for logarithms and powers), give the same bits,
/// whatever their cores, caches and width of vectors: AVX2 gives those of AVX-512.
pub fn instruction_set() -> String {
    let arch = std::env::consts::ARCH;
    #[cfg(target_arch = "x86_64")]
    if !std::arch::is_x86_feature_detected!("fma") {
        return format!("{arch} without fma");
    }
    arch.to_owned()
}
