//! The CPU backend, the default. Code outside this crate uses it only through `device` and `stream`.

mod args;
mod attention;
mod dropout;
mod elementwise;
mod embedding;
pub(crate) mod launch;
mod loss;
mod matmul;
mod norm;
mod optimizer;
pub(crate) mod pool;
pub(crate) mod scratch;
pub(crate) mod simd;
pub(crate) mod stream;
pub(crate) mod widen;

/// Maximum number of threads of one stream.
pub const THREADS_MAX: usize = 64;

/// Describes what determines the bits of CPU kernels: the architecture, and whether products use fused multiply-adds.
/// Machines compute the same bits if their descriptions and their C libraries (used for logarithms and powers) are
/// equal. The number of cores, the caches and the vector width do not matter.
pub fn instruction_set() -> String {
    let arch = std::env::consts::ARCH;
    #[cfg(target_arch = "x86_64")]
    if !std::arch::is_x86_feature_detected!("fma") {
        return format!("{arch} without fma");
    }
    arch.to_owned()
}
