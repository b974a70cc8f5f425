//! Code that the checks share: reports, launches between canaries, submissions, and pseudo-random values.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use half::bf16;

use crate::clock::Stamped;
use crate::device::Device;
use crate::error::{KernelError, Result};
use crate::hash::SplitMix64;
use crate::memory::{ALIGNMENT, Arena, Base};
use crate::op::{Buffer, Launch, Op, Program};
use crate::stream::{Notification, Stream, Submission};
use crate::tensor::{DType, HostData, HostTensor, Region, element_count};

/// Maximum wait for any result of a device.
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);

/// Size of the gaps between buffers. Gaps are filled with canaries.
const FENCE_BYTES: usize = ALIGNMENT;

const CANARY: i32 = 0x5afe_c0de;

/// One failure of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConformanceFailure {
    /// Name of the check, including its sizes.
    pub check: String,
    /// The expected and the actual result.
    pub what: String,
}

impl fmt::Display for ConformanceFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.check, self.what)
    }
}

pub(super) type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Half of the relative distance between adjacent BF16 values.
pub(super) const BF16_ROUNDING: f64 = 1.0 / 256.0;

#[derive(Default)]
pub(super) struct Report {
    pub(super) failures: Vec<ConformanceFailure>,
}

impl Report {
    pub(super) fn fail(&mut self, check: &str, what: impl fmt::Display) {
        self.failures.push(ConformanceFailure { check: check.to_owned(), what: what.to_string() });
    }

    pub(super) fn expect(&mut self, check: &str, holds: bool, what: impl fmt::Display) {
        if !holds {
            self.fail(check, what);
        }
    }

    /// Compares with a reference: `|got - expected| <= tolerance * (1 + |expected|)`. NaN always fails.
    pub(super) fn close(&mut self, check: &str, got: &HostTensor, expected: &[f64], tolerance: f64) {
        let tolerance = tolerance + if got.dtype() == DType::BF16 { BF16_ROUNDING } else { 0.0 };
        let Some(got) = got.to_f32() else { return self.fail(check, "the result is not a float tensor") };
        if got.len() != expected.len() {
            return self.fail(check, format!("got {} elements, expected {}", got.len(), expected.len()));
        }
        let differs = |(got, expected): (&f32, &f64)| {
            let (got, expected) = (f64::from(*got), *expected);
            !((got - expected).abs() <= tolerance * (1.0 + expected.abs()) || got == expected)
        };
        if let Some(i) = got.iter().zip(expected).position(differs) {
            self.fail(check, format!("element {i} of {}: expected {}, got {}", got.len(), expected[i], got[i]));
        }
    }
}

/// What a written buffer contains before the launch.
#[derive(Clone)]
pub(super) enum Initial {
    /// NaN in all elements of a tensor of this shape.
    Poison(Vec<usize>),
    /// These values, which the op updates in place or adds to.
    Values(HostTensor),
    /// The write has the memory of the read with this index: the op works in place.
    Read(usize),
}

/// The dtypes of those float buffers of a launch that may be BF16.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Types {
    /// All buffers are F32.
    Floats,
    /// Reads are BF16, and so are writes that start as NaN.
    Halves,
    /// Reads are BF16, and writes are F32.
    Widening,
}

#[derive(Clone)]
pub(super) struct Trial<'a> {
    pub(super) op: Op,
    pub(super) reads: &'a [HostTensor],
    pub(super) writes: &'a [Initial],
    pub(super) accumulate: bool,
    pub(super) repeat: bool,
    pub(super) types: Types,
    /// True if the first buffer starts at an address that is not a multiple of 16 bytes, the alignment of vectors.
    pub(super) unaligned: bool,
}

impl<'a> Trial<'a> {
    pub(super) fn new(op: Op, reads: &'a [HostTensor], writes: &'a [Initial]) -> Self {
        Self { op, reads, writes, accumulate: false, repeat: false, types: Types::Floats, unaligned: false }
    }

    /// Places the buffers between canaries in a new arena, runs the launch, and returns the content of the writes.
    pub(super) fn launch(&self, device: &Device) -> Outcome<Vec<HostTensor>> {
        let stream = device.stream("conformance", device.threads_per_stream())?;
        let mut layout = Layout { end: if self.unaligned { DType::F32.bytes() } else { 0 }, ..Layout::default() };
        let narrow = |(port, read): (usize, &HostTensor)| match read.as_f32() {
            Some(values) if self.types != Types::Floats && self.op.reads_bf16(port) => {
                HostTensor::bf16(&read.shape, values)
            }
            _ => read.clone(),
        };
        let values: Vec<HostTensor> = self.reads.iter().enumerate().map(narrow).collect();
        let reads: Vec<Buffer> = values.iter().map(|read| layout.place(&read.shape, read.dtype())).collect();
        let is_half = |port| self.types == Types::Halves && self.op.writes_bf16(port);
        let poisoned = |port| if is_half(port) { DType::BF16 } else { DType::F32 };
        let place_write = |(port, write): (usize, &Initial)| match write {
            Initial::Poison(shape) => layout.place(shape, poisoned(port)),
            Initial::Values(values) => layout.place(&values.shape, values.dtype()),
            Initial::Read(read) => reads[*read].clone(),
        };
        let writes: Vec<Buffer> = self.writes.iter().enumerate().map(place_write).collect();
        let launch = launch(self.op.clone(), reads.clone(), writes.clone());
        let mut launch = Launch { accumulate: self.accumulate, ..launch };
        let workspace_bytes = device.kind().workspace_bytes(&launch);
        let workspace = (workspace_bytes > 0).then(|| layout.place_workspace(workspace_bytes));
        let arena = layout.arena(device)?;
        for (buffer, tensor) in reads.iter().zip(&values) {
            arena.write_host(buffer.offset, tensor)?;
        }
        for (buffer, write) in writes.iter().zip(self.writes) {
            let initial = match write {
                Initial::Poison(shape) => filled(shape, buffer.dtype, f32::NAN),
                Initial::Values(values) => values.clone(),
                Initial::Read(_) => continue,
            };
            arena.write_host(buffer.offset, &initial)?;
        }
        if let Some(buffer) = &workspace {
            let poison = filled(&buffer.shape, DType::F32, f32::NAN);
            arena.write_host(buffer.offset, &poison)?;
        }
        launch.workspace = workspace;
        run_program(&stream, vec![launch], &[&arena], self.repeat)?;
        layout.check_fences(&arena)?;
        let read = |buffer: &Buffer| arena.read_host(buffer.offset, &buffer.shape, buffer.dtype);
        Ok(writes.iter().map(read).collect::<Result<_>>()?)
    }
}

/// Consecutive buffers. A fence, which is a gap filled with canaries, is before each buffer and after the last one.
#[derive(Default)]
pub(super) struct Layout {
    pub(super) fences: Vec<usize>,
    pub(super) end: usize,
}

impl Layout {
    pub(super) fn place(&mut self, shape: &[usize], dtype: DType) -> Buffer {
        self.fences.push(self.end);
        let offset = self.end + FENCE_BYTES;
        // The next fence consists of whole words. The padding before it is not checked.
        self.end = (offset + element_count(shape) * dtype.bytes()).next_multiple_of(DType::I32.bytes());
        Buffer { base: 0, offset, shape: shape.to_vec(), dtype }
    }

    /// Places a workspace after a fence, with the alignment of a plan's workspace, which libraries require.
    pub(super) fn place_workspace(&mut self, bytes: usize) -> Buffer {
        self.fences.push(self.end);
        self.end = (self.end + FENCE_BYTES).next_multiple_of(ALIGNMENT);
        self.place(&[bytes / 4], DType::F32)
    }

    pub(super) fn fence() -> HostTensor {
        let words = FENCE_BYTES / DType::I32.bytes();
        HostTensor::i32(&[words], vec![CANARY; words])
    }

    /// Creates an arena with this layout and writes its fences.
    pub(super) fn arena(&mut self, device: &Device) -> Result<Arena> {
        self.fences.push(self.end);
        let arena = device.arena(self.end + FENCE_BYTES)?;
        self.fences.iter().try_for_each(|&fence| arena.write_host(fence, &Self::fence()))?;
        Ok(arena)
    }

    pub(super) fn check_fences(&self, arena: &Arena) -> Outcome {
        for &fence in &self.fences {
            let expected = Self::fence();
            let got = arena.read_host(fence, &expected.shape, DType::I32)?;
            if got != expected {
                return Err(format!("the op wrote outside its buffers, into the fence at byte {fence}").into());
            }
        }
        Ok(())
    }
}

pub(super) fn launch(op: Op, reads: Vec<Buffer>, writes: Vec<Buffer>) -> Launch {
    Launch { op, reads, writes, accumulate: false, workspace: None }
}

/// Submits launches as one program, with arena i as base i, and waits until the program has ended.
pub(super) fn run_program(stream: &Stream, launches: Vec<Launch>, arenas: &[&Arena], repeat: bool) -> Result<()> {
    let program = Program { name: "conformance".to_owned(), launches, signals: vec![] };
    wait(&submit(stream, program, arenas, repeat)?)
}

pub(super) struct Notifications(Receiver<Stamped<Notification>>);

impl Notifications {
    pub(super) fn recv_timeout(&self, timeout: Duration) -> Result<Notification, RecvTimeoutError> {
        self.0.recv_timeout(timeout).map(Stamped::open)
    }
}

/// Submits a program, with arena i as base i.
pub(super) fn submit(stream: &Stream, program: Program, arenas: &[&Arena], repeat: bool) -> Result<Notifications> {
    let (sender, notifications) = channel();
    let bases = arenas.iter().map(|&arena| Base { arena: arena.clone(), offset: 0 }).collect();
    let notify = Box::new(move |notification| drop(sender.send(Stamped::new(notification))));
    stream.submit(Submission { program: Arc::new(program), bases, repeat, notify })?;
    Ok(Notifications(notifications))
}

pub(super) fn wait(notifications: &Notifications) -> Result<()> {
    loop {
        match notifications.recv_timeout(TIMEOUT) {
            Ok(Notification::Signal(_) | Notification::NotFinite { .. }) => {}
            Ok(Notification::Done) => return Ok(()),
            Ok(Notification::Failed(error)) => return Err(error),
            Err(cause) => return Err(KernelError::Aborted { cause: format!("the program has not ended: {cause}") }),
        }
    }
}

pub(super) fn filled(shape: &[usize], dtype: DType, value: f32) -> HostTensor {
    let values = vec![value; element_count(shape)];
    if dtype == DType::BF16 { HostTensor::bf16(shape, &values) } else { HostTensor::f32(shape, values) }
}

/// Generates pseudo-random values that are the same in every run.
pub(super) struct Numbers {
    random: SplitMix64,
    /// True if BF16 can represent all generated values.
    halves: bool,
}

impl Numbers {
    pub(super) fn new(seed: u64, halves: bool) -> Self {
        Self { random: SplitMix64(seed), halves }
    }

    /// Generates a tensor of values that are uniformly distributed in `-size .. size`.
    pub(super) fn tensor(&mut self, shape: &[usize], size: f32) -> HostTensor {
        let unit = |bits: u64| (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        let rounded = |value: f32| if self.halves { bf16::from_f32(value).to_f32() } else { value };
        let value = |_| rounded(size * unit(self.random.draw()));
        HostTensor::f32(shape, (0..element_count(shape)).map(value).collect())
    }

    pub(super) fn indices(&mut self, shape: &[usize], below: usize) -> HostTensor {
        HostTensor::i32(shape, (0..element_count(shape)).map(|_| self.random.below(below as u64) as i32).collect())
    }
}

pub(super) fn narrow(shape: &[usize], values: &[f64]) -> HostTensor {
    HostTensor::f32(shape, values.iter().map(|&value| value as f32).collect())
}

pub(super) fn wide(tensor: &HostTensor) -> Vec<f64> {
    match &tensor.data {
        HostData::F32(values) => values.iter().map(|&value| f64::from(value)).collect(),
        HostData::I32(values) => values.iter().map(|&value| f64::from(value)).collect(),
        HostData::BF16(values) => values.iter().map(|&value| f64::from(value)).collect(),
    }
}

/// Converts an element's index within `region` to its flat index in a tensor of `shape`.
pub(super) fn flat(mut index: usize, region: &Region, shape: &[usize]) -> usize {
    let (mut place, mut stride) = (0, 1);
    for d in (0..shape.len()).rev() {
        place += (region.start[d] + index % region.size[d]) * stride;
        index /= region.size[d];
        stride *= shape[d];
    }
    place
}
