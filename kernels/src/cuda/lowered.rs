//! Lowers each program once: finds its kernels and lays out their parameters, so that a submission only fills in
//! addresses. Also finds pairs of adjacent launches that one kernel can run.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use super::attention::Attention;
use super::device_memory::device_address;
use super::gpu::Gpu;
use super::lower::{
    self,
    fuse::{FusedLaunches, fuse, may_fuse},
};
use super::module::Function;
use super::raw_stream::{Geometry, PARAMETERS_MAX};
use super::step::{Arg, AttentionShape, Operand, Place, Product, Step};
use crate::bound::Bound;
use crate::error::{KernelError, Result};
use crate::memory::{Base, View};
use crate::op::{Buffer, Launch, Op, Program};
use crate::tensor::element_count;

/// Maximum number of cached programs per stream, far more than an actor has. If there are more, the cache is cleared.
const PROGRAMS_MAX: usize = 1024;

#[derive(Debug, Default)]
pub(crate) struct ProgramCache {
    /// Indexed by the program's address. Each entry keeps its program alive, so the address stays unique.
    programs: HashMap<usize, CachedProgram>,
}

#[derive(Debug)]
struct CachedProgram {
    program: Arc<Program>,
    lowered: [Option<Arc<LoweredProgram>>; 2],
}

/// A program, lowered either for submissions with `repeat` or for submissions without it.
#[derive(Debug)]
pub(crate) struct LoweredProgram {
    /// Indexed by launch. Each launch is lowered at first use, after the check of its buffers.
    launches: Vec<OnceLock<Result<LoweredLaunch>>>,
    /// Indexed by launch: the fused form of the launch and its successor, if one kernel can run both.
    pairs: Vec<OnceLock<Option<FusedPair>>>,
    repeat: bool,
    pub(crate) last_call: Option<usize>,
}

/// The steps of a launch. If `uses_record` is set, a kernel may write the stream's error record.
#[derive(Debug)]
pub(crate) struct LoweredLaunch {
    pub(crate) steps: Vec<PreparedStep>,
    pub(crate) uses_record: bool,
}

/// Two launches fused into one, with the buffers that the places in the fused steps refer to. Each of the two launches
/// can still run alone.
#[derive(Debug)]
pub(crate) struct FusedPair {
    pub(crate) reads: Vec<Buffer>,
    pub(crate) writes: Vec<Buffer>,
    pub(crate) lowered: LoweredLaunch,
}

/// A step that lacks only its addresses. `Attention` runs on cuDNN, or as `fallback` if cuDNN refuses the shape.
#[derive(Debug)]
pub(crate) enum PreparedStep {
    Kernel { function: Function, geometry: Geometry, args: Vec<Arg> },
    Product(Box<Product>),
    Attention { shape: AttentionShape, fallback: Vec<PreparedStep> },
    Copy { from: Place, to: Place, bytes: usize },
    Fill { to: Place, word: u32, words: usize },
}

impl ProgramCache {
    pub(crate) fn get(&mut self, program: &Arc<Program>, repeat: bool) -> Arc<LoweredProgram> {
        let key = Arc::as_ptr(program).addr();
        if self.programs.len() >= PROGRAMS_MAX && !self.programs.contains_key(&key) {
            self.programs.clear();
        }
        let new = || CachedProgram { program: program.clone(), lowered: [None, None] };
        let CachedProgram { program, lowered } = self.programs.entry(key).or_insert_with(new);
        lowered[usize::from(repeat)].get_or_insert_with(|| Arc::new(LoweredProgram::of(program, repeat))).clone()
    }
}

impl LoweredProgram {
    fn of(program: &Program, repeat: bool) -> Self {
        let launches = program.launches.iter().map(|_| OnceLock::new()).collect();
        let last_call = program.launches.iter().rposition(|launch| matches!(launch.op, Op::Collective(_)));
        let pairs = program.launches.iter().map(|_| OnceLock::new()).collect();
        Self { launches, pairs, repeat, last_call }
    }

    /// Returns the steps of launch `index` of the program. The caller has checked the launch's buffers.
    pub(crate) fn launch(&self, index: usize, launch: &Launch, gpu: &Gpu) -> Result<&LoweredLaunch> {
        let accumulate = self.repeat && launch.accumulate;
        self.launches[index].get_or_init(|| lower_launch(launch, accumulate, gpu)).as_ref().map_err(Clone::clone)
    }

    /// Returns true if launch `index` and its successor certainly cannot be fused. The buffers may still be unchecked.
    pub(crate) fn cannot_fuse(&self, index: usize, [first, second]: [&Launch; 2]) -> bool {
        match self.pairs[index].get() {
            Some(pair) => pair.is_none(),
            None => !may_fuse(first, second),
        }
    }

    /// Returns the fused form of launch `index` and its successor. The caller has checked the buffers of both.
    pub(crate) fn fused_pair(&self, index: usize, launches: [&Launch; 2], gpu: &Gpu) -> Option<&FusedPair> {
        self.pairs[index].get_or_init(|| fuse_pair(launches, gpu)).as_ref()
    }
}

fn fuse_pair([first, second]: [&Launch; 2], gpu: &Gpu) -> Option<FusedPair> {
    // If this fails, the launches run one by one, and the failing one reports the error.
    let FusedLaunches { reads, writes, steps } = fuse(first, second, &overlap).ok()??;
    Some(FusedPair { reads, writes, lowered: prepare_steps(steps, gpu).ok()? })
}

/// Whether two buffers in the same arena (base) overlap but differ. [`FusedPair::bind`] checks buffers in two arenas.
fn overlap(a: &Buffer, b: &Buffer) -> bool {
    let bytes = |buffer: &Buffer| element_count(&buffer.shape) * buffer.dtype.bytes();
    let (a_bytes, b_bytes) = (bytes(a), bytes(b));
    let intersect = a.offset < b.offset + b_bytes && b.offset < a.offset + a_bytes;
    a.base == b.base && a_bytes > 0 && b_bytes > 0 && intersect && (a.offset, a_bytes) != (b.offset, b_bytes)
}

impl FusedPair {
    /// Resolves the pair's buffers. Returns `None` if a write overlaps a buffer that has another base (see `overlap`).
    pub(crate) fn bind<'a>(&'a self, name: &'a str, bases: &'a [Base]) -> Result<Option<Bound<'a>>> {
        let resolve = |buffer| View::resolve(name, buffer, bases);
        let reads = self.reads.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
        let writes = self.writes.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
        let writes_are_separate = self.writes.iter().zip(&writes).all(|(buffer, write)| {
            let all = self.reads.iter().chain(&self.writes).zip(reads.iter().chain(&writes));
            all.filter(|(other, _)| other.base != buffer.base).all(|(_, other)| !write.overlaps(other))
        });
        Ok(writes_are_separate.then_some(Bound { name, reads, writes, workspace: None }))
    }
}

fn lower_launch(launch: &Launch, accumulate: bool, gpu: &Gpu) -> Result<LoweredLaunch> {
    let lowered = prepare_steps(lower::lower(launch, accumulate, gpu.context.shared_bytes_max)?, gpu)?;
    Ok(match lower::cudnn_attention(launch).filter(|_| gpu.attention != Attention::Own) {
        Some(shape) => {
            LoweredLaunch { steps: vec![PreparedStep::Attention { shape, fallback: lowered.steps }], ..lowered }
        }
        None => lowered,
    })
}

fn prepare_steps(steps: Vec<Step>, gpu: &Gpu) -> Result<LoweredLaunch> {
    let is_record = |step: &Step| matches!(step, Step::Kernel(kernel) if kernel.args.contains(&Arg::ErrorRecord));
    let uses_record = steps.iter().any(is_record);
    let steps = steps.into_iter().map(|step| prepare_step(step, gpu)).collect::<Result<_>>()?;
    Ok(LoweredLaunch { steps, uses_record })
}

fn prepare_step(step: Step, gpu: &Gpu) -> Result<PreparedStep> {
    Ok(match step {
        Step::Kernel(kernel) => {
            let function = gpu.modules.function(kernel.function, kernel.shared_bytes)?;
            let geometry = Geometry { grid: kernel.grid, block: kernel.block, shared_bytes: kernel.shared_bytes };
            if kernel.args.len() > PARAMETERS_MAX {
                let got = kernel.args.len().to_string();
                let expected = format!("at most {PARAMETERS_MAX}");
                return Err(KernelError::arguments(kernel.function, "parameters", expected, got));
            }
            PreparedStep::Kernel { function, geometry, args: kernel.args }
        }
        Step::Product(product) => PreparedStep::Product(Box::new(product)),
        Step::Copy { from, to, bytes } => PreparedStep::Copy { from, to, bytes },
        Step::Fill { to, word, words } => PreparedStep::Fill { to, word, words },
    })
}

/// Returns the address of a place in a bound launch. All buffers of the launch must be on the device.
pub(crate) fn address(bound: &Bound<'_>, place: Place) -> Result<u64> {
    let view = match place.operand {
        Operand::Read(i) => bound.reads.get(i),
        Operand::Write(i) => bound.writes.get(i),
        Operand::Workspace => bound.workspace.as_ref(),
    };
    let missing = || KernelError::arguments(bound.name, "step", "a buffer of the launch", format!("{place:?}"));
    Ok(device_address(view.ok_or_else(missing)?)? + place.offset_bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    #[test]
    fn partially_shared_buffers_overlap_and_identical_ones_do_not() {
        let buffer = |base, offset, elements| Buffer { base, offset, shape: vec![elements], dtype: DType::BF16 };
        let one = buffer(0, 64, 8);
        assert!(!overlap(&one, &one));
        assert!(
            overlap(&one, &buffer(0, 64, 9)) && overlap(&one, &buffer(0, 78, 1)) && overlap(&buffer(0, 60, 3), &one)
        );
        assert!(!overlap(&one, &buffer(0, 80, 8)) && !overlap(&one, &buffer(0, 62, 1)));
        assert!(!overlap(&one, &buffer(1, 66, 8)) && !overlap(&one, &buffer(0, 66, 0)));
    }
}
