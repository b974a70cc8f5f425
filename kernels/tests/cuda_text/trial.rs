//! One launch, on the CPU backend and on the host's stand-in for a CUDA device: buffers between fences in poisoned
//! memory, then everything compared. Imports the public API of kernels, and `machine`.

use std::sync::Arc;
use std::sync::mpsc::channel;

use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::cuda::lower::{self, count_not_finite, lower};
use shardflow_kernels::cuda::source::MODULES;
use shardflow_kernels::cuda::step::{Arg, ErrorRecord, Operand, Place, Step};
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::Base;
use shardflow_kernels::op::{Buffer, Launch, Op, Program};
use shardflow_kernels::stream::{Notice, Submission};
use shardflow_kernels::tensor::{DType, HostData, HostTensor, element_count};

use crate::machine::{self, Layout, Machine};

/// What a write holds before the launch.
#[derive(Clone)]
pub enum Initial {
    /// NaN.
    Poison(Vec<usize>),
    /// These values.
    Values(HostTensor),
    /// The memory of this read.
    Read(usize),
}

/// A launch to try.
#[derive(Clone)]
pub struct Trial {
    pub op: Op,
    pub reads: Vec<HostTensor>,
    pub writes: Vec<Initial>,
    pub accumulate: bool,
}

/// Which buffers are bf16 on the device; kernels of that name are then taken. The CPU sees the rounded values.
#[derive(Clone, Copy, Default)]
pub struct Halves {
    pub reads: &'static [usize],
    pub writes: &'static [usize],
}

/// Bytes of canaries between buffers.
const FENCE: usize = 64;
const CANARY: u8 = 0xa5;

pub fn round_to_bf16(value: f32) -> f32 {
    f32::from_bits(u32::from(bf16_bits(value)) << 16)
}

fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() { 0x7fff } else { ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

fn bytes_of(tensor: &HostTensor, half: bool) -> Vec<u8> {
    match &tensor.data {
        HostData::F32(values) if half => values.iter().flat_map(|&v| bf16_bits(v).to_ne_bytes()).collect(),
        HostData::F32(values) => values.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        HostData::I32(values) => values.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        HostData::BF16(values) => values.iter().flat_map(|v| v.to_ne_bytes()).collect(),
    }
}

fn tensor_of(bytes: &[u8], shape: &[usize], dtype: DType, half: bool) -> HostTensor {
    let words = || bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes")));
    match dtype {
        DType::F32 if half => {
            let halves = bytes.chunks_exact(2).map(|h| u16::from_ne_bytes(h.try_into().expect("two bytes")));
            HostTensor::f32(shape, halves.map(|h| f32::from_bits(u32::from(h) << 16)).collect())
        }
        DType::F32 => HostTensor::f32(shape, words().map(f32::from_bits).collect()),
        DType::I32 => HostTensor::i32(shape, words().map(|word| word as i32).collect()),
        DType::BF16 => HostTensor::from_le_bytes(dtype, shape, bytes),
    }
}

impl Trial {
    pub fn new(op: Op, reads: Vec<HostTensor>, writes: Vec<Initial>) -> Self {
        Self { op, reads, writes, accumulate: false }
    }

    fn initial(&self, write: &Initial) -> HostTensor {
        match write {
            Initial::Poison(shape) => HostTensor::f32(shape, vec![f32::NAN; element_count(shape)]),
            Initial::Values(values) => values.clone(),
            Initial::Read(read) => self.reads[*read].clone(),
        }
    }

    /// The launch, its buffers `offsets(bytes)` from base 0, and a workspace of `workspace` bytes.
    fn launch(&self, mut place: impl FnMut(usize) -> usize, workspace: usize) -> Launch {
        let mut buffer = |tensor: &HostTensor| {
            let offset = place(4 * element_count(&tensor.shape));
            Buffer { base: 0, offset, shape: tensor.shape.clone(), dtype: tensor.dtype() }
        };
        let reads: Vec<Buffer> = self.reads.iter().map(&mut buffer).collect();
        let write = |write: &Initial| match write {
            Initial::Read(read) => reads[*read].clone(),
            _ => buffer(&self.initial(write)),
        };
        let writes = self.writes.iter().map(write).collect();
        let floats = HostTensor::f32(&[workspace / 4], vec![0.0; workspace / 4]);
        let workspace = (workspace > 0).then(|| {
            let offset = place(workspace);
            Buffer { base: 0, offset, shape: floats.shape, dtype: DType::F32 }
        });
        Launch { op: self.op.clone(), reads, writes, accumulate: self.accumulate, workspace }
    }

    fn shapes(&self) -> Vec<&[usize]> {
        self.reads.iter().map(|read| &read.shape[..]).collect()
    }

    /// What the CPU backend makes of it.
    pub fn on_cpu(&self) -> Result<Vec<HostTensor>, String> {
        let device = Device::cpu(0, 1, Arc::new(InProcess::new()));
        let stream = device.stream("trial", 1).map_err(|error| error.to_string())?;
        let mut end = 0;
        let workspace = self.op.workspace_bytes(&self.shapes(), 1);
        let launch = self.launch(
            |bytes| {
                end += bytes.next_multiple_of(64);
                end - bytes.next_multiple_of(64)
            },
            workspace,
        );
        let arena = device.arena(end + 64).map_err(|error| error.to_string())?;
        for (buffer, tensor) in launch.reads.iter().zip(&self.reads) {
            arena.write_host(buffer.offset, tensor).map_err(|error| error.to_string())?;
        }
        for (buffer, write) in launch.writes.iter().zip(&self.writes) {
            arena.write_host(buffer.offset, &self.initial(write)).map_err(|error| error.to_string())?;
        }
        let writes = launch.writes.clone();
        let program = Program { name: "trial".to_owned(), launches: vec![launch], signals: vec![] };
        let (sender, notices) = channel();
        let notify = Box::new(move |notice| drop(sender.send(notice)));
        let bases = vec![Base { arena: arena.clone(), offset: 0 }];
        let submission = Submission { program: Arc::new(program), bases, repeat: self.accumulate, notify };
        stream.submit(submission).map_err(|error| error.to_string())?;
        match notices.recv() {
            Ok(Notice::Done) => {}
            other => return Err(format!("{other:?}")),
        }
        let read = |buffer: &Buffer| arena.read_host(buffer.offset, &buffer.shape, buffer.dtype);
        writes.iter().map(read).collect::<Result<_, _>>().map_err(|error| error.to_string())
    }

    /// What the CUDA text makes of it, buffers lying at multiples of `align` and no more; and the record's error.
    pub fn on_device(
        &self,
        machine: &mut Machine,
        align: usize,
        halves: Halves,
    ) -> Result<(Vec<HostTensor>, Option<ErrorRecord>), String> {
        let workspace = lower::workspace_bytes(&self.op, &self.shapes());
        let launch = self.launch(|_| 0, workspace);
        let steps = match &self.op {
            Op::Attention { scale } | Op::AttentionGrad { scale } if !halves.reads.is_empty() => {
                let shape = self.reads[0].shape[..].try_into().expect("four dims");
                let gradient = matches!(self.op, Op::AttentionGrad { .. });
                lower::attention_steps(shardflow_kernels::cuda::step::Element::Bf16, shape, *scale, gradient)
            }
            _ => lower(&launch, self.accumulate).map(|steps| steps.into_iter().map(|s| halved(s, halves)).collect()),
        };
        let steps = steps.map_err(|error| error.to_string())?;
        self.run_steps(machine, &steps, align, halves, workspace)
    }

    /// As `on_device`, with steps of whatever origin.
    pub fn run_steps(
        &self,
        machine: &mut Machine,
        steps: &[Step],
        align: usize,
        halves: Halves,
        workspace: usize,
    ) -> Result<(Vec<HostTensor>, Option<ErrorRecord>), String> {
        let mut memory = Vec::new();
        let mut fences = Vec::new();
        let mut put = |memory: &mut Vec<u8>, bytes: &[u8]| {
            fences.push(memory.len()..memory.len() + FENCE);
            memory.resize(memory.len() + FENCE, CANARY);
            // Never more aligned than that.
            let place = memory.len().next_multiple_of(64) + if align < 64 { align } else { 0 };
            memory.resize(place, CANARY);
            memory.extend_from_slice(bytes);
            place
        };
        let half_read = |i: &usize| halves.reads.contains(i);
        let reads: Vec<usize> =
            self.reads.iter().enumerate().map(|(i, t)| put(&mut memory, &bytes_of(t, half_read(&i)))).collect();
        let mut writes = Vec::new();
        for (i, write) in self.writes.iter().enumerate() {
            writes.push(match write {
                Initial::Read(read) => reads[*read],
                _ => put(&mut memory, &bytes_of(&self.initial(write), halves.writes.contains(&i))),
            });
        }
        // Ones: a NaN for whoever reads before writing.
        let workspace = put(&mut memory, &vec![0xff; workspace]);
        let record = put(&mut memory, &[0; 4 * ErrorRecord::WORDS]);
        let counter = memory.len().next_multiple_of(64);
        memory.resize(counter + 8, 0);
        let layout = Layout { reads, writes, workspace, record, counter };
        let before = memory.clone();
        for step in steps {
            machine.run(step, &layout, &mut memory);
        }
        if let Some(fence) = fences.iter().find(|fence| memory[(*fence).clone()].iter().any(|&byte| byte != CANARY)) {
            return Err(format!("wrote into the fence at {fence:?}"));
        }
        for (i, read) in self.reads.iter().enumerate() {
            let range = layout.reads[i]..layout.reads[i] + bytes_of(read, half_read(&i)).len();
            if !layout.writes.contains(&layout.reads[i]) && memory[range.clone()] != before[range] {
                return Err(format!("wrote into read {i}"));
            }
        }
        let of_write = |(i, write): (usize, &Initial)| {
            let (initial, half) = (self.initial(write), halves.writes.contains(&i));
            let bytes = bytes_of(&initial, half).len();
            tensor_of(&memory[layout.writes[i]..][..bytes], &initial.shape, initial.dtype(), half)
        };
        let written = self.writes.iter().enumerate().map(of_write).collect();
        Ok((written, machine::record(&memory, &layout)))
    }

    /// How many elements of write `i` are not finite, as the device counts them, given what it holds.
    pub fn count(&self, machine: &mut Machine, i: usize) -> u64 {
        let launch = self.launch(|_| 0, 0);
        let steps = count_not_finite(&launch).expect("steps");
        let mut memory = vec![0; 64];
        let holds: Vec<usize> = self
            .writes
            .iter()
            .map(|write| {
                let place = memory.len().next_multiple_of(64);
                memory.resize(place, 0);
                memory.extend(bytes_of(&self.initial(write), false));
                place
            })
            .collect();
        let layout = Layout { reads: vec![], writes: holds, workspace: 0, record: 0, counter: 0 };
        for (_, step) in steps.iter().filter(|(write, _)| *write == i) {
            machine.run(step, &layout, &mut memory);
        }
        u64::from_ne_bytes(memory[..8].try_into().expect("eight bytes"))
    }

    /// Compares the device's results with the CPU's, for aligned and for odd places.
    pub fn check(&self, machine: &mut Machine, tolerance: f64, halves: Halves) {
        let mut rounded = self.clone();
        for &i in halves.reads {
            if let HostData::F32(values) = &mut rounded.reads[i].data {
                values.iter_mut().for_each(|value| *value = round_to_bf16(*value));
            }
        }
        let shapes: Vec<_> = self.reads.iter().map(|read| &read.shape).collect();
        let name = format!("{:?} {shapes:?} accumulate {}", self.op, self.accumulate);
        let expected = rounded.on_cpu().unwrap_or_else(|error| panic!("{name} on the CPU: {error}"));
        for align in [64, if halves.reads.is_empty() { 4 } else { 2 }] {
            let got = rounded.on_device(machine, align, halves);
            let (got, record) = got.unwrap_or_else(|error| panic!("{name} at {align}: {error}"));
            assert_eq!(record, None, "{name} at {align}");
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                assert_close(&format!("{name} at {align}, write {i}"), got, expected, tolerance);
            }
        }
    }
}

/// The step on bf16: its kernel of that name, unless it works on the workspace, which is of floats.
fn halved(step: Step, halves: Halves) -> Step {
    let Step::Kernel(mut kernel) = step else { return step };
    let from_workspace = matches!(kernel.args[0], Arg::Pointer(Place { operand: Operand::Workspace, .. }));
    let name = kernel.function.replace("_f32", "_bf16");
    let known = MODULES.iter().flat_map(|module| module.functions()).find(|function| *function == name);
    if let Some(known) = known
        && !halves.reads.is_empty()
        && !from_workspace
    {
        kernel.function = known;
    }
    Step::Kernel(kernel)
}

/// `|got - expected| <= tolerance * (1 + |expected|)`, and no number only where the CPU has none.
pub fn assert_close(name: &str, got: &HostTensor, expected: &HostTensor, tolerance: f64) {
    assert_eq!(got.shape, expected.shape, "{name}");
    let (HostData::F32(got), HostData::F32(expected)) = (&got.data, &expected.data) else {
        return assert_eq!(got, expected, "{name}");
    };
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let near = f64::from((got - expected).abs()) <= tolerance * (1.0 + f64::from(expected.abs()));
        let same = got == expected || got.is_nan() && expected.is_nan();
        assert!(near || same, "{name}: element {i} is {got}, on the CPU {expected}");
    }
}
