//! Elementwise ops.

use super::args::Args;
use super::kernel::{BF16_PACK, PACK, Steps, THREADS, blocks, long, pack_of, read, threads, variants, write};
use crate::cuda::step::{Arg, Place, Step};
use crate::tensor::{DType, element_count};

/// Number of packs of four elements per thread of the AdamW kernel. Must equal PACKS_PER_THREAD in optimizer.cu.
const ADAMW_PACKS: usize = 4;

/// An elementwise kernel for the types of read 0 and write 0. Parameters: all reads, write 0, its length, and `more`.
pub(super) fn map(args: &Args<'_>, names: [&'static str; 3], more: &[Arg]) -> Steps {
    let mut arguments: Vec<Arg> = (0..args.launch.reads.len()).map(read).collect();
    arguments.extend([write(0), long(args.written(0))]);
    arguments.extend(more);
    // If the types differ, use the pack of the wider type.
    let pack = pack_of(args.read_dtype(0)).min(pack_of(args.write_dtype(0)));
    threads(args.pick(0, 0, names), args.written(0).div_ceil(pack), arguments)
}

pub(super) fn fill(args: &Args<'_>, value: f32) -> Steps {
    let words = args.written(0);
    if args.write_dtype(0) == DType::BF16 {
        // [`Step::Fill`] fills whole 32-bit words, but a bf16 buffer may begin or end in the middle of one.
        return threads("fill_bf16", words.div_ceil(BF16_PACK), vec![write(0), long(words), Arg::F32(value)]);
    }
    let fill = Step::Fill { to: Place::write(0), word: value.to_bits(), words };
    Ok(if words > 0 { vec![fill] } else { vec![] })
}

pub(super) fn copy(args: &Args<'_>) -> Steps {
    let n = args.written(0);
    if args.accumulate {
        return threads("add_to_f32", n.div_ceil(PACK), vec![read(0), write(0), long(n)]);
    }
    let bytes = n * args.write_dtype(0).bytes();
    let copy = Step::Copy { from: Place::read(0), to: Place::write(0), bytes };
    Ok(if bytes > 0 { vec![copy] } else { vec![] })
}

pub(super) fn cast(args: &Args<'_>) -> Steps {
    let function = if args.write_dtype(0) == DType::BF16 { "cast_f32_bf16" } else { "cast_bf16_f32" };
    let n = args.written(0);
    threads(function, n.div_ceil(PACK), vec![read(0), write(0), long(n)])
}

pub(super) fn add(args: &Args<'_>) -> Steps {
    let (a, b) = (args.read_shape(0), args.read_shape(1));
    if a == b {
        return map(args, variants!("add"), &[]);
    }
    map(args, variants!("add_suffix"), &[long(element_count(b))])
}

pub(super) fn adamw(args: &Args<'_>, beta1: f32, beta2: f32, eps: f32, weight_decay: f32) -> Steps {
    let n = args.written(0);
    // The kernel computes 1 - beta^step as -expm1(step ln beta), which avoids a power on the device.
    let logarithm = |beta: f32| Arg::F64(f64::from(beta).ln());
    let mut arguments = [[0, 1, 2].map(read), [0, 1, 2].map(write)].concat();
    arguments.extend([long(n), Arg::F32(beta1), Arg::F32(beta2), logarithm(beta1), logarithm(beta2)]);
    arguments.extend([Arg::F32(eps), Arg::F32(weight_decay)]);
    blocks("adamw_f32", n.div_ceil(PACK * ADAMW_PACKS * THREADS), THREADS, 0, arguments)
}
