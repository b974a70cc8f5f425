//! Parts of a kernel launch: geometry, arguments, and the names of variants.

use crate::cuda::step::{Arg, Kernel, Place, Step};
use crate::error::{KernelError, Result};
use crate::tensor::DType;

pub(super) type Steps = Result<Vec<Step>>;

pub(super) const THREADS: usize = 256;

/// Number of elements per thread of an elementwise kernel on f32. They fill 16 bytes.
pub(super) const PACK: usize = 4;

/// Number of elements per thread of an elementwise kernel on bf16. They fill 16 bytes.
pub(super) const BF16_PACK: usize = 8;

/// Returns the number of elements per thread for this type. They fill 16 bytes.
pub(super) fn pack_of(dtype: DType) -> usize {
    if dtype == DType::BF16 { BF16_PACK } else { PACK }
}

/// The names of a kernel's variants: f32, bf16, and bf16 to f32.
macro_rules! variants {
    ($name:literal) => {
        [concat!($name, "_f32"), concat!($name, "_bf16"), concat!($name, "_bf16_f32")]
    };
}
pub(super) use variants;

/// Creates one kernel step, or no step if there are no blocks.
pub(super) fn blocks(
    function: &'static str,
    blocks: usize,
    threads: usize,
    shared_bytes: usize,
    args: Vec<Arg>,
) -> Steps {
    if blocks == 0 {
        return Ok(vec![]);
    }
    let narrow = |what: &str, value: usize, limit: usize| match u32::try_from(value) {
        Ok(narrow) if value <= limit => Ok(narrow),
        _ => Err(KernelError::arguments(function, what, format!("at most {limit}"), value.to_string())),
    };
    let grid = [narrow("blocks", blocks, i32::MAX as usize)?, 1, 1];
    let block = [narrow("threads", threads, 1024)?, 1, 1];
    let shared_bytes = narrow("bytes of shared memory", shared_bytes, 160 * 1024)?;
    Ok(vec![Step::Kernel(Kernel { function, grid, block, shared_bytes, args })])
}

/// Creates a step for a kernel with `threads` threads, in blocks of [`THREADS`] threads.
pub(super) fn threads(function: &'static str, threads: usize, args: Vec<Arg>) -> Steps {
    blocks(function, threads.div_ceil(THREADS), THREADS, 0, args)
}

pub(super) fn read(i: usize) -> Arg {
    Arg::Pointer(Place::read(i))
}

pub(super) fn write(i: usize) -> Arg {
    Arg::Pointer(Place::write(i))
}

/// An argument for a count, extent or index. It fits in an i64, since no tensor has 2^63 elements.
pub(super) fn long(value: usize) -> Arg {
    Arg::I64(value as i64)
}
