//! The steps of a launch on a CUDA device: kernels with geometry and arguments, cuBLASLt products, copies and fills.
//! Steps are plain data. `lower` creates them, and the backend's stream issues them in order.

use crate::error::KernelError;
use crate::tensor::DType;

/// A step of a launch. Steps run in order. A copy has more than 0 bytes. A copy between equal addresses does nothing.
#[derive(Clone, Debug, PartialEq)]
// Large variants are acceptable: a program has a few hundred steps, which are created once.
#[allow(clippy::large_enum_variant)]
pub enum Step {
    Kernel(Kernel),
    Product(Product),
    Copy { from: Place, to: Place, bytes: usize },
    Fill { to: Place, word: u32, words: usize },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Name of the `extern "C"` function, unique among all modules.
    pub function: &'static str,
    /// Blocks in x, y, z, all greater than 0.
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes. To exceed [`SHARED_BYTES_DEFAULT`], the issuer sets the function's attribute.
    pub shared_bytes: u32,
    /// The arguments, in the order of the function's parameters.
    pub args: Vec<Arg>,
}

/// Default limit of dynamic shared memory, in bytes (`CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`).
pub const SHARED_BYTES_DEFAULT: u32 = 48 * 1024;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    Pointer(Place),
    Null,
    /// The address of the stream's [`ErrorRecord`]. Each stream has its own record, because only launches of one stream
    /// are ordered.
    ErrorRecord,
    /// The launch's index in its program, as an `unsigned int`, for the [`ErrorRecord`]; the issuer fills it in.
    LaunchIndex,
    I32(i32),
    U32(u32),
    I64(i64),
    U64(u64),
    F32(f32),
    F64(f64),
}

impl Arg {
    /// Returns the value, padded to 8 bytes. A kernel reads only the bytes of its parameter's type. Returns `None` if
    /// the issuer provides the value.
    pub fn bits(&self) -> Option<u64> {
        Some(match *self {
            Arg::Pointer(_) | Arg::ErrorRecord | Arg::LaunchIndex => return None,
            Arg::Null => 0,
            Arg::I32(value) => u64::from(value as u32),
            Arg::U32(value) => u64::from(value),
            Arg::I64(value) => value as u64,
            Arg::U64(value) => value,
            Arg::F32(value) => u64::from(value.to_bits()),
            Arg::F64(value) => value.to_bits(),
        })
    }
}

/// A buffer of the launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operand {
    Read(usize),
    Write(usize),
    Workspace,
}

/// An address: bytes from the start of one of the launch's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    pub operand: Operand,
    pub offset_bytes: usize,
}

impl Place {
    pub const fn read(i: usize) -> Self {
        Self { operand: Operand::Read(i), offset_bytes: 0 }
    }

    pub const fn write(i: usize) -> Self {
        Self { operand: Operand::Write(i), offset_bytes: 0 }
    }

    pub const fn workspace(offset_bytes: usize) -> Self {
        Self { operand: Operand::Workspace, offset_bytes }
    }
}

/// A matrix as cuBLASLt describes it: COLUMN-major, `rows` by `columns` as stored (before any transposition).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Matrix {
    pub place: Place,
    /// F32 or BF16.
    pub dtype: DType,
    /// Extent of the dim whose elements are adjacent.
    pub rows: u64,
    /// Extent of the other dim.
    pub columns: u64,
    /// Distance from one column to the next, in elements; at least `rows`.
    pub leading: i64,
}

/// `d = op(a) op(b) + beta d` by `cublasLtMatmul` with `C = D`. Computes and accumulates in f32 (`CUBLAS_COMPUTE_32F`;
/// TF32 is not allowed). All dims are above 0. The key of the plan cache holds all fields except the places.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Product {
    pub m: u64,
    pub n: u64,
    pub k: u64,
    /// `op(a)` is the transpose of `a` as stored (`CUBLAS_OP_T`).
    pub a_transposed: bool,
    pub b_transposed: bool,
    /// First operand of cuBLASLt, which may be the second operand of the einsum.
    pub a: Matrix,
    pub b: Matrix,
    /// The result, `m` by `n`; also read if `beta` is not 0.
    pub d: Matrix,
    /// Factor of the old `d`: 1 to add to it, 0 to overwrite it without reading.
    pub beta: f32,
}

/// Number of partial results that fit in a product's workspace. cuBLASLt splits small products over `k`.
const PRODUCT_PARTS: usize = 16;
/// Maximum workspace of a product, in bytes. NVIDIA recommends this for Hopper. Older architectures need less.
const PRODUCT_WORKSPACE_BYTES_MAX: usize = 32 << 20;

/// Returns the workspace in bytes for a product whose result has this number of elements.
pub fn product_workspace_bytes(elements: usize) -> usize {
    let parts = elements.saturating_mul(PRODUCT_PARTS * size_of::<f32>());
    parts.min(PRODUCT_WORKSPACE_BYTES_MAX)
}

impl Product {
    /// Bytes of the launch's workspace that the product may use.
    pub fn workspace_bytes(&self) -> usize {
        product_workspace_bytes(self.m as usize * self.n as usize)
    }
}

/// Causal attention or its gradient on bf16 activations `[batch, time, heads, depth]`, in a shape that cuDNN may run.
/// Buffers are those of the launch, in the op's order. No extent is 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    pub pass: Pass,
    pub batch: usize,
    pub time: usize,
    pub heads: usize,
    pub depth: usize,
    pub scale: f32,
}

impl AttentionShape {
    /// Alignment of graph tensors in the workspace, in bytes.
    pub(crate) const ALIGNMENT: usize = 256;

    /// Bytes of workspace for cuDNN. The gradient also needs dq and the row sums of do * o, both in f32.
    pub fn workspace_bytes(&self) -> usize {
        let rows = self.batch * self.heads * self.time;
        let tensors = match self.pass {
            Pass::Forward => vec![],
            Pass::Backward => vec![rows, rows * self.depth],
        };
        let bytes = |floats: usize| (floats * size_of::<f32>()).next_multiple_of(Self::ALIGNMENT);
        tensors.into_iter().map(bytes).sum::<usize>() + self.library_bytes()
    }

    /// Workspace for cuDNN's engines, in bytes. Engines that need more are not used. In 9.28.1, engines need a few KiB;
    /// the gradient's engines on sm_80 and sm_120 also hold dq in f32 (see `kernels/cuda/check_cudnn.py`).
    pub(crate) fn library_bytes(&self) -> usize {
        const ENGINE_BYTES: usize = 1 << 16;
        match self.pass {
            Pass::Forward => ENGINE_BYTES,
            Pass::Backward => ENGINE_BYTES + self.batch * self.heads * self.time * self.depth * size_of::<f32>(),
        }
    }
}

/// Forward or backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    Forward,
    Backward,
}

/// A kernel's report of an index out of range, stored in device memory: [`ErrorRecord::WORDS`] 32-bit words per stream,
/// zeroed before first use and after each read. Kernels do not overwrite an error, so the record holds the stream's
/// first error. After each submission, the backend copies the record to pinned memory and decodes it before it reports
/// the end. A kernel handles an index out of range like an index in another shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorRecord {
    pub launch: u32,
    pub index: i32,
    /// Position of the index among the launch's indices. It is the first position with an index out of range.
    pub position: u64,
    /// Exclusive upper bound of valid indices.
    pub limit: u64,
}

impl ErrorRecord {
    /// Number of 32-bit words on the device. They hold launch + 1 (0 if there is no error), index, position (low, high)
    /// and limit (low, high). The last two words are unused.
    pub const WORDS: usize = 8;
    pub const BYTES: usize = Self::WORDS * size_of::<u32>();

    /// Decodes the error in a record, if there is one.
    pub fn decode(words: [u32; Self::WORDS]) -> Option<Self> {
        let wide = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let launch = words[0].checked_sub(1)?;
        let (position, limit) = (wide(words[2], words[3]), wide(words[4], words[5]));
        Some(Self { launch, index: words[1] as i32, position, limit })
    }

    /// The op's error, with the same text as on the CPU backend.
    pub fn error(&self, op: &str) -> KernelError {
        let Self { index, position, limit, .. } = self;
        let what = format!("index {index} at position {position} is not in 0..{limit}");
        KernelError::Data { op: op.to_owned(), what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_in_the_low_bytes_of_words() {
        assert_eq!(Arg::I32(-2).bits(), Some(0xffff_fffe));
        assert_eq!(Arg::I64(-2).bits(), Some(u64::MAX - 1));
        assert_eq!(Arg::F32(1.0).bits(), Some(0x3f80_0000));
        assert_eq!(Arg::Null.bits(), Some(0));
        assert_eq!(Arg::ErrorRecord.bits(), None);
    }

    #[test]
    fn a_record_of_zeros_holds_no_error() {
        assert_eq!(ErrorRecord::decode([0; 8]), None);
        let record = ErrorRecord::decode([3, -7i32 as u32, 5, 1, 9, 0, 0, 0]);
        let expected = ErrorRecord { launch: 2, index: -7, position: (1 << 32) + 5, limit: 9 };
        assert_eq!(record, Some(expected));
        let text = expected.error("embedding").to_string();
        assert_eq!(text, "embedding: index -7 at position 4294967301 is not in 0..9");
    }
}
