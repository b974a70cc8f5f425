//! Causal attention and its gradient: selects the kernel for a head's depth, computes the shared memory of the kernel's
//! tiles, and selects the shapes that cuDNN may run instead.

use super::args::Args;
use super::kernel::{Steps, blocks, long, read, write};
use super::norm::warps;
use crate::cuda::step::{Arg, AttentionShape, Pass, Place};
use crate::op::{Launch, Op};
use crate::tensor::DType;

/// Rows of a block's own tile: queries or keys.
const BLOCK_ROWS: usize = 64;

/// The tiled kernels for one depth, each with its shared memory in bytes.
struct Tiled {
    forward: (&'static str, usize),
    keys: (&'static str, usize),
    queries: (&'static str, usize),
    threads: usize,
}

/// Depths for which the tiled kernels are compiled. A head uses the smallest of these that is at least its own depth.
const DEPTHS: [usize; 4] = [32, 64, 96, 128];

macro_rules! names {
    ($prefix:literal) => {
        [concat!($prefix, "_d32"), concat!($prefix, "_d64"), concat!($prefix, "_d96"), concat!($prefix, "_d128")]
    };
}

/// The tiled kernels for heads of this depth; `None` if only the plain kernels fit.
fn tiled(dtype: DType, depth: usize) -> Option<Tiled> {
    if depth == 0 {
        return None;
    }
    let i = DEPTHS.iter().position(|&depth_max| depth <= depth_max)?;
    let d = DEPTHS[i];
    Some(match dtype {
        // Tile sizes of attention_f32.cu: 64 rows of the block itself and 32 other rows, padded by 4.
        DType::F32 | DType::I32 => Tiled {
            forward: (names!("attention_f32")[i], 4 * ((64 + 2 * 32) * (d + 4) + 64 * 36)),
            keys: (names!("attention_grad_keys_f32")[i], 4 * (2 * (64 + 32) * (d + 4) + 2 * 32 * 68)),
            queries: (names!("attention_grad_queries_f32")[i], 4 * (2 * (64 + 32) * (d + 4) + 64 * 36)),
            threads: 256,
        },
        // Tile sizes of attention_bf16.cu: 64 rows, padded by 8.
        DType::BF16 => Tiled {
            forward: (names!("attention_bf16")[i], 2 * 2 * 64 * (d + 8) + 64 * 72 * (4 + 2) + 64 * 4),
            keys: (names!("attention_grad_keys_bf16")[i], 2 * (4 * 64 * (d + 8) + 4 * 2 * 16 * 24) + 64 * 8),
            queries: (names!("attention_grad_queries_bf16")[i], 2 * (4 * 64 * (d + 8) + 4 * 2 * 16 * 24) + 64 * 8),
            threads: 128,
        },
    })
}

/// Extents of an activation `[b, t, h, d]`: batch, time, heads, depth.
#[derive(Clone, Copy)]
struct Dims([usize; 4]);

impl Dims {
    fn rows(self) -> usize {
        self.0[..3].iter().product()
    }

    fn tiled_step(
        self,
        (function, shared_bytes): (&'static str, usize),
        threads: usize,
        mut arguments: Vec<Arg>,
        scale: f32,
    ) -> Steps {
        let [batch, time, heads, depth] = self.0;
        let time_blocks = time.div_ceil(BLOCK_ROWS);
        // `heads` and `depth` fit in 32 bits: a tiled depth is at most 128, and no memory holds 2^31 heads.
        let [heads_arg, depth] = [heads, depth].map(|extent| Arg::I32(extent as i32));
        arguments.extend([long(time), heads_arg, depth, long(time_blocks), Arg::F32(scale)]);
        blocks(function, batch * heads * time_blocks, threads, shared_bytes, arguments)
    }

    fn plain_step(self, function: &'static str, mut arguments: Vec<Arg>, scale: Option<f32>) -> Steps {
        let [_, time, heads, depth] = self.0;
        arguments.extend([long(self.rows()), long(time), Arg::I32(heads as i32), long(depth)]);
        arguments.extend(scale.map(Arg::F32));
        warps(function, self.rows(), arguments)
    }
}

/// The arguments for write `i`: its address and, for bf16 kernels, whether the write is f32.
fn result(args: &Args<'_>, i: usize) -> Vec<Arg> {
    let is_f32 = Arg::I32(i32::from(args.write_dtype(i) == DType::F32));
    if args.read_dtype(0) == DType::BF16 { vec![write(i), is_f32] } else { vec![write(i)] }
}

/// The forward step. The plain kernel runs if the tiled kernel needs more than `shared` bytes of shared memory.
pub(super) fn attention(args: &Args<'_>, scale: f32, shared: usize) -> Steps {
    let dims = Dims(args.launch.attention_dims()?);
    let buffers = [vec![read(0), read(1), read(2)], result(args, 0), vec![write(1)]].concat();
    match tiled(args.read_dtype(0), dims.0[3]).filter(|tiled| tiled.forward.1 <= shared) {
        Some(tiled) => dims.tiled_step(tiled.forward, tiled.threads, buffers, scale),
        None => {
            let plain = args.pick_by_read(0, ["attention_plain_f32", "attention_plain_bf16"]);
            dims.plain_step(plain, buffers, Some(scale))
        }
    }
}

/// The backward steps. As in [`attention`], plain kernels replace tiled kernels that do not fit in shared memory. For
/// example, f32 heads deeper than 96 need 116 KiB, but sm_86 and sm_89 have 99 KiB.
pub(super) fn attention_grad(args: &Args<'_>, scale: f32, shared: usize) -> Steps {
    let dims = Dims(args.launch.attention_dims()?);
    if dims.0.contains(&0) {
        return Ok(vec![]);
    }
    // Reads are do, q, k, v, o, lse.
    let delta = Arg::Pointer(Place::workspace(0));
    let name = args.pick_by_read(0, ["attention_delta_f32", "attention_delta_bf16"]);
    let rows = dims.plain_step(name, vec![read(0), read(4), delta], None)?;
    let inputs = vec![read(0), read(1), read(2), read(3), read(5), delta];
    let [dq, dk, dv] = [0, 1, 2].map(|i| result(args, i));
    let keys = [inputs.clone(), dk, dv].concat();
    let queries = [inputs, dq].concat();
    let tiled = tiled(args.read_dtype(0), dims.0[3]);
    let step = |kernel: fn(&Tiled) -> (&'static str, usize), plain, buffers| match &tiled {
        Some(tiled) if kernel(tiled).1 <= shared => dims.tiled_step(kernel(tiled), tiled.threads, buffers, scale),
        _ => dims.plain_step(args.pick_by_read(0, plain), buffers, Some(scale)),
    };
    let plain = ["attention_grad_keys_plain_f32", "attention_grad_keys_plain_bf16"];
    let keys = step(|tiled| tiled.keys, plain, keys)?;
    let plain = ["attention_grad_queries_plain_f32", "attention_grad_queries_plain_bf16"];
    let queries = step(|tiled| tiled.queries, plain, queries)?;
    Ok([rows, keys, queries].concat())
}

/// Number of floats for the row sums of do * o.
pub(super) fn workspace_floats(q: &[usize]) -> usize {
    match q {
        &[batch, time, heads, depth] if depth > 0 => batch * time * heads,
        _ => 0,
    }
}

/// cuDNN has engines on all architectures for depths that are multiples of `CUDNN_DEPTH_STEP` up to `CUDNN_DEPTH_MAX`.
const CUDNN_DEPTH_MAX: usize = 128;
const CUDNN_DEPTH_STEP: usize = 8;

/// For shorter sequences, cuDNN's heuristic for the gradient crashes (seen in 9.12 and 9.28, at length 1).
const CUDNN_TIME_MIN: usize = 2;

/// The attention that cuDNN may run in place of the launch's steps; `None` for other launches and shapes. The caller
/// has passed the launch to [`lower`](super::lower), which checks it. All activations and their gradients are bf16.
pub fn cudnn_attention(launch: &Launch) -> Option<AttentionShape> {
    let (pass, scale, bf16_reads, bf16_writes) = match launch.op {
        Op::Attention { scale } => (Pass::Forward, scale, 3, 1),
        Op::AttentionGrad { scale } => (Pass::Backward, scale, 5, 3),
        _ => return None,
    };
    let activations = launch.reads.iter().take(bf16_reads).chain(launch.writes.iter().take(bf16_writes));
    if activations.clone().any(|buffer| buffer.dtype != DType::BF16) {
        return None;
    }
    let &[batch, time, heads, depth] = &launch.reads.first()?.shape[..] else { return None };
    // Some of cuDNN's kernels have 32-bit indices.
    let fits = [batch, time, heads].iter().all(|&extent| extent > 0) && batch * time * heads * depth < 1 << 31;
    let depth_fits = depth > 0 && depth <= CUDNN_DEPTH_MAX && depth.is_multiple_of(CUDNN_DEPTH_STEP);
    let shape = AttentionShape { pass, batch, time, heads, depth, scale };
    (fits && depth_fits && time >= CUDNN_TIME_MIN).then_some(shape)
}
