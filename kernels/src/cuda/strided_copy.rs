//! Copies tensor regions on a stream, also from other GPUs, and combines the values of a collective's members.

use super::context::Context;
use super::gpu::Gpu;
use super::lower;
use super::lower::collective::{MEMBERS_MAX, contiguous_start};
use super::raw_stream::{Geometry, PARAMETERS_MAX, RawStream, RowCopy};
use super::step::{Arg, Operand, SHARED_BYTES_DEFAULT, Step};
use crate::collective::ReduceOp;
use crate::collective::order::stack_program;
use crate::error::{KernelError, Result};
use crate::op::{Buffer, Launch, Op};
use crate::region::for_each_run;
use crate::tensor::{DType, Region};

#[derive(Clone, Debug)]
pub(crate) struct StridedRegion {
    address: u64,
    shape: Vec<usize>,
    region: Region,
}

impl StridedRegion {
    pub(crate) fn new(address: u64, shape: &[usize], region: Region) -> Self {
        Self { address, shape: shape.to_vec(), region }
    }

    pub(crate) fn whole(address: u64, shape: &[usize]) -> Self {
        Self::new(address, shape, Region::whole(shape))
    }

    fn contiguous(&self, dtype: DType) -> Option<u64> {
        contiguous_start(&self.shape, &self.region).map(|start| self.address + (start * dtype.bytes()) as u64)
    }
}

/// Loads all kernels used here, since a later load could block behind a waiting collective. Requires a bound context.
pub(crate) fn prepare(gpu: &Gpu) -> Result<()> {
    ["collective", "region"].iter().try_for_each(|module| gpu.modules.prepare(module))
}

pub(crate) fn copy_region(stream: &RawStream, from: &StridedRegion, to: &StridedRegion, dtype: DType) -> Result<()> {
    if from.region.is_empty() {
        return Ok(());
    }
    if let (Some(source), Some(target)) = (from.contiguous(dtype), to.contiguous(dtype)) {
        return stream.copy(target, source, from.region.element_count() * dtype.bytes());
    }
    let buffer = |part: &StridedRegion| Buffer { base: 0, offset: 0, shape: part.shape.clone(), dtype };
    let launch = Launch {
        op: Op::CopyRegion { src: from.region.clone(), dst: to.region.clone() },
        reads: vec![buffer(from)],
        writes: vec![buffer(to)],
        accumulate: false,
        workspace: None,
    };
    let steps = lower::lower(&launch, false, SHARED_BYTES_DEFAULT as usize)?;
    steps.iter().try_for_each(|step| issue(stream, step, from.address, to.address))
}

/// Copies a region from any GPU. Between GPUs, each run of adjacent elements is a row, and one call copies rows of the
/// same size and pitch.
pub(crate) fn copy_region_from(
    stream: &RawStream,
    source: &Context,
    from: &StridedRegion,
    to: &StridedRegion,
    dtype: DType,
) -> Result<()> {
    if stream.is_on(source) {
        return copy_region(stream, from, to, dtype);
    }
    let (mut rows, mut copied): (Option<RowCopy>, _) = (None, Ok(()));
    let (read, write) = ((&from.shape[..], &from.region.start[..]), (&to.shape[..], &to.region.start[..]));
    for_each_run(read, write, &from.region.size, |i, j, elements| {
        let bytes = |elements: usize| elements * dtype.bytes();
        let next = RowCopy::one(from.address + bytes(i) as u64, to.address + bytes(j) as u64, bytes(elements));
        if rows.as_mut().is_some_and(|rows| rows.append(&next)) {
            return;
        }
        if let Some(full) = rows.replace(next)
            && copied.is_ok()
        {
            copied = stream.copy_rows_from(source, &full);
        }
    });
    copied?;
    rows.map_or(Ok(()), |rows| stream.copy_rows_from(source, &rows))
}

/// Issues a step that reads one buffer and writes one.
fn issue(stream: &RawStream, step: &Step, read: u64, write: u64) -> Result<()> {
    let refused = |got: String| KernelError::arguments("collective", "step", "a copy of a region", got);
    let address_of = |place: &super::step::Place| match place.operand {
        Operand::Read(0) => Ok(read + place.offset_bytes as u64),
        Operand::Write(0) => Ok(write + place.offset_bytes as u64),
        _ => Err(refused(format!("{place:?}"))),
    };
    match step {
        Step::Copy { from, to, bytes } => stream.copy(address_of(to)?, address_of(from)?, *bytes),
        Step::Kernel(kernel) if kernel.args.len() <= PARAMETERS_MAX => {
            let function = stream.gpu.modules.function(kernel.function, kernel.shared_bytes)?;
            let geometry = Geometry { grid: kernel.grid, block: kernel.block, shared_bytes: kernel.shared_bytes };
            let mut words = [0; PARAMETERS_MAX];
            for (word, arg) in words.iter_mut().zip(&kernel.args) {
                *word = match arg {
                    Arg::Pointer(place) => address_of(place)?,
                    other => other.bits().ok_or_else(|| refused(format!("{other:?}")))?,
                };
            }
            stream.launch(function, &geometry, &words[..kernel.args.len()])
        }
        other => Err(refused(format!("{other:?}"))),
    }
}

/// Combines the values of all members, in the order of [`crate::collective::order`], element by element. Any of `xs` may
/// be `y`.
pub(crate) fn combine(stream: &RawStream, op: ReduceOp, xs: &[u64], y: u64, elements: usize) -> Result<()> {
    const THREADS: usize = 256;
    const BLOCKS_MAX: usize = 1024;
    if elements == 0 {
        return Ok(());
    }
    if let [x] = xs {
        return stream.copy(y, *x, elements * DType::F32.bytes());
    }
    if xs.len() > MEMBERS_MAX {
        let expected = format!("at most {MEMBERS_MAX}");
        return Err(KernelError::arguments("reduce", "members on one GPU", expected, xs.len().to_string()));
    }
    let function = stream.gpu.modules.function("combine_members_f32", 0)?;
    let program = stack_program(xs.len()).into_iter().enumerate();
    let program: u64 = program.map(|(member, combinations)| (combinations as u64) << (4 * member)).sum();
    let mut words = [0; MEMBERS_MAX + 5];
    words[0] = y;
    words[1..=xs.len()].copy_from_slice(xs);
    let largest = u64::from(op == ReduceOp::Max);
    words[MEMBERS_MAX + 1..].copy_from_slice(&[program, xs.len() as u64, largest, elements as u64]);
    let blocks = elements.div_ceil(THREADS).min(BLOCKS_MAX) as u32;
    stream.launch(function, &Geometry { grid: [blocks, 1, 1], block: [THREADS as u32, 1, 1], shared_bytes: 0 }, &words)
}
