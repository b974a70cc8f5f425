//! Programs whose launches were turned to steps, once, with kernels found and parameters laid out: what is left at a
//! submission is to put addresses in. Neighbours that one kernel does are found here, too.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use super::cudnn::Attention;
use super::gpu::Gpu;
use super::lower;
use super::module::Function;
use super::raw_stream::{Geometry, PARAMETERS_MAX};
use super::step::{Arg, Flash, Operand, Place, Product, Step};
use crate::bound::Bound;
use crate::error::KernelError;
use crate::memory::{Base, View};
use crate::op::{Buffer, Launch, Op, Program};
use crate::tensor::element_count;

/// Programs that one stream keeps; far more than an actor has. Beyond that all are forgotten, and lowered again.
const PROGRAMS_MAX: usize = 1024;

/// One stream's programs.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    /// By address of the program, which is kept so that no other comes to lie there; for first and repeated submissions.
    programs: HashMap<usize, Known>,
}

#[derive(Debug)]
struct Known {
    program: Arc<Program>,
    lowered: [Option<Arc<Lowered>>; 2],
}

/// A program, for submissions that repeat or for those that do not.
#[derive(Debug)]
pub(crate) struct Lowered {
    /// By launch; lowered when the program first comes to it, behind the check of its buffers.
    launches: Vec<OnceLock<Result<Kind, KernelError>>>,
    /// By launch: what does it and the next one at once, where something does.
    pairs: Vec<OnceLock<Option<Pair>>>,
    repeat: bool,
    /// The last launch that is a collective.
    pub(crate) last_call: Option<usize>,
}

/// Two launches as one; each can be run by itself, too.
#[derive(Debug)]
pub(crate) struct Pair {
    /// What the steps' places are counted in.
    pub(crate) reads: Vec<Buffer>,
    pub(crate) writes: Vec<Buffer>,
    pub(crate) steps: Vec<Ready>,
    /// Whether any kernel writes the stream's record.
    pub(crate) uses_record: bool,
}

/// How a launch is run.
#[derive(Debug)]
pub(crate) enum Kind {
    /// By these steps.
    Steps {
        steps: Vec<Ready>,
        /// Whether any kernel writes the stream's record.
        uses_record: bool,
    },
    /// By the engine.
    Collective,
    /// By the host.
    Custom,
}

/// A step that only lacks its addresses.
#[derive(Debug)]
pub(crate) enum Ready {
    Kernel {
        function: Function,
        how: Geometry,
        parameters: Vec<Parameter>,
    },
    Product(Box<Product>),
    /// Attention by cuDNN; by our own kernels where it turns out that cuDNN does not.
    Flash {
        flash: Flash,
        own: Vec<Ready>,
    },
    Copy {
        from: Place,
        to: Place,
        bytes: usize,
    },
    Fill {
        to: Place,
        word: u32,
        words: usize,
    },
}

/// One parameter of a kernel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Parameter {
    Address(Place),
    Record,
    LaunchIndex,
    /// As it is: the low bytes count.
    Bits(u64),
}

impl Cache {
    /// The program's steps.
    pub(crate) fn get(&mut self, program: &Arc<Program>, repeat: bool) -> Arc<Lowered> {
        let key = Arc::as_ptr(program).addr();
        if self.programs.len() >= PROGRAMS_MAX && !self.programs.contains_key(&key) {
            self.programs.clear();
        }
        let new = || Known { program: program.clone(), lowered: [None, None] };
        let Known { program, lowered } = self.programs.entry(key).or_insert_with(new);
        lowered[usize::from(repeat)].get_or_insert_with(|| Arc::new(Lowered::of(program, repeat))).clone()
    }
}

impl Lowered {
    fn of(program: &Program, repeat: bool) -> Self {
        let launches = program.launches.iter().map(|_| OnceLock::new()).collect();
        let last_call = program.launches.iter().rposition(|launch| matches!(launch.op, Op::Collective(_)));
        let pairs = program.launches.iter().map(|_| OnceLock::new()).collect();
        Self { launches, pairs, repeat, last_call }
    }

    /// How launch `index` of the program is run, its buffers being in bounds.
    pub(crate) fn kind(&self, index: usize, launch: &Launch, gpu: &Gpu) -> Result<&Kind, KernelError> {
        let repeat = self.repeat && launch.accumulate;
        self.launches[index].get_or_init(|| kind(launch, repeat, gpu)).as_ref().map_err(Clone::clone)
    }

    /// True when it is known, without a look at buffers, that no kernel does launch `index` and the next one at once.
    pub(crate) fn is_no_pair(&self, index: usize, [first, second]: [&Launch; 2]) -> bool {
        match self.pairs[index].get() {
            Some(pair) => pair.is_none(),
            None => !lower::may_fuse(first, second),
        }
    }

    /// What runs launch `index` and the next one at once, the buffers of both being in bounds.
    pub(crate) fn pair(&self, index: usize, launches: [&Launch; 2], gpu: &Gpu) -> Option<&Pair> {
        self.pairs[index].get_or_init(|| pair(launches, gpu)).as_ref()
    }
}

fn pair([first, second]: [&Launch; 2], gpu: &Gpu) -> Option<Pair> {
    // What is wrong with a launch is told when it is run by itself.
    let lower::Fused { reads, writes, steps } = lower::fuse(first, second, &overlap).ok()??;
    let steps = steps.into_iter().map(|step| ready(step, gpu)).collect::<Result<Vec<_>, _>>().ok()?;
    let uses_record = uses_record(&steps);
    Some(Pair { reads, writes, steps, uses_record })
}

/// Whether buffers share memory without being the same, as far as that is known before bases are: see
/// [`Pair::bind`].
fn overlap(a: &Buffer, b: &Buffer) -> bool {
    let bytes = |buffer: &Buffer| element_count(&buffer.shape) * buffer.dtype.bytes();
    let (a_bytes, b_bytes) = (bytes(a), bytes(b));
    let meet = a.offset < b.offset + b_bytes && b.offset < a.offset + a_bytes;
    a.base == b.base && a_bytes > 0 && b_bytes > 0 && meet && (a.offset, a_bytes) != (b.offset, b_bytes)
}

impl Pair {
    /// The pair's buffers, if what is written on one base lies apart from all that is on others: then `overlap` has told
    /// the truth.
    pub(crate) fn bind<'a>(&'a self, name: &'a str, bases: &'a [Base]) -> Result<Option<Bound<'a>>, KernelError> {
        let resolve = |buffer| View::resolve(name, buffer, bases);
        let reads = self.reads.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
        let writes = self.writes.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
        let is_apart = self.writes.iter().zip(&writes).all(|(buffer, write)| {
            let all = self.reads.iter().chain(&self.writes).zip(reads.iter().chain(&writes));
            all.filter(|(other, _)| other.base != buffer.base).all(|(_, other)| !write.overlaps(other))
        });
        Ok(is_apart.then_some(Bound { name, reads, writes, workspace: None }))
    }
}

fn kind(launch: &Launch, accumulate: bool, gpu: &Gpu) -> Result<Kind, KernelError> {
    match launch.op {
        Op::Collective(_) => Ok(Kind::Collective),
        Op::Custom(_) => Ok(Kind::Custom),
        _ => {
            let steps = lower::lower(launch, accumulate, gpu.context().shared_bytes_max())?.into_iter();
            let steps = steps.map(|step| ready(step, gpu)).collect::<Result<Vec<_>, _>>()?;
            let uses_record = uses_record(&steps);
            let flash = lower::flash(launch).filter(|_| gpu.attention() != Attention::Own);
            let steps = match flash {
                Some(flash) => vec![Ready::Flash { flash, own: steps }],
                None => steps,
            };
            Ok(Kind::Steps { steps, uses_record })
        }
    }
}

fn uses_record(steps: &[Ready]) -> bool {
    steps.iter().any(|step| match step {
        Ready::Kernel { parameters, .. } => parameters.contains(&Parameter::Record),
        _ => false,
    })
}

fn ready(step: Step, gpu: &Gpu) -> Result<Ready, KernelError> {
    Ok(match step {
        Step::Kernel(kernel) => {
            let function = gpu.modules().function(kernel.function, kernel.shared_bytes)?;
            let how = Geometry { grid: kernel.grid, block: kernel.block, shared_bytes: kernel.shared_bytes };
            if kernel.args.len() > PARAMETERS_MAX {
                let got = kernel.args.len().to_string();
                let expected = format!("at most {PARAMETERS_MAX}");
                return Err(KernelError::arguments(kernel.function, "parameters", expected, got));
            }
            Ready::Kernel { function, how, parameters: kernel.args.iter().map(parameter).collect() }
        }
        Step::Product(product) => Ready::Product(Box::new(product)),
        Step::Copy { from, to, bytes } => Ready::Copy { from, to, bytes },
        Step::Fill { to, word, words } => Ready::Fill { to, word, words },
    })
}

fn parameter(arg: &Arg) -> Parameter {
    match *arg {
        Arg::Pointer(place) => Parameter::Address(place),
        Arg::ErrorRecord => Parameter::Record,
        Arg::LaunchIndex => Parameter::LaunchIndex,
        // Only steps that look for what is not finite have a counter, and those are not lowered here.
        ref other => Parameter::Bits(other.bits().unwrap_or(0)),
    }
}

/// The address of a place of a bound launch, all of whose buffers lie on the device.
pub(crate) fn address(bound: &Bound<'_>, place: Place) -> Result<u64, KernelError> {
    let view = match place.operand {
        Operand::Read(i) => bound.reads.get(i),
        Operand::Write(i) => bound.writes.get(i),
        Operand::Workspace => bound.workspace.as_ref(),
    };
    let missing = || KernelError::arguments(bound.name, "step", "a buffer of the launch", format!("{place:?}"));
    let view = view.ok_or_else(missing)?;
    let memory = view.arena().device_memory().ok_or_else(missing)?;
    Ok(memory.address() + (view.offset() + place.offset_bytes) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    #[test]
    fn buffers_that_meet_overlap_and_the_same_memory_does_not() {
        let buffer = |base, offset, elements| Buffer { base, offset, shape: vec![elements], dtype: DType::BF16 };
        let one = buffer(0, 64, 8);
        assert!(!overlap(&one, &one));
        assert!(
            overlap(&one, &buffer(0, 64, 9)) && overlap(&one, &buffer(0, 78, 1)) && overlap(&buffer(0, 60, 3), &one)
        );
        assert!(!overlap(&one, &buffer(0, 80, 8)) && !overlap(&one, &buffer(0, 62, 1)));
        assert!(!overlap(&one, &buffer(1, 66, 8)) && !overlap(&one, &buffer(0, 66, 0)));
    }

    #[test]
    fn parameters_are_the_low_bytes_of_words() {
        let bits = |arg| match parameter(&arg) {
            Parameter::Bits(bits) => bits,
            other => panic!("{other:?}"),
        };
        assert_eq!(bits(Arg::I32(-2)), 0xffff_fffe);
        assert_eq!(bits(Arg::I64(-2)), u64::MAX - 1);
        assert_eq!(bits(Arg::F32(1.0)), 0x3f80_0000);
        assert_eq!(bits(Arg::Null), 0);
        assert_eq!(parameter(&Arg::ErrorRecord), Parameter::Record);
    }
}
