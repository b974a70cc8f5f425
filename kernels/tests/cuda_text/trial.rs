//! One launch, on the CPU backend and on the host's stand-in for a CUDA device: buffers between fences in poisoned
//! memory, then everything compared. Imports the public API of kernels, and `machine`.

use std::sync::Arc;
use std::sync::mpsc::channel;

use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::cuda::lower::{self, lower};
use shardflow_kernels::cuda::step::{ErrorRecord, Step};
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::Base;
use shardflow_kernels::op::{Buffer, Launch, Op, Program};
use shardflow_kernels::stream::{Notice, Submission};
use shardflow_kernels::tensor::{DType, HostTensor, element_count};

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

/// Which types the floats of a launch have, where its op lets them be bf16.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Types {
    /// All f32.
    Floats,
    /// What may be bf16 is.
    Halves,
    /// What is read is bf16 where it may be, and f32 is written.
    Widening,
}

/// Bytes of canaries between buffers.
const FENCE: usize = 64;
const CANARY: u8 = 0xa5;

/// The nearest values in bf16.
pub fn halved(tensor: &HostTensor) -> HostTensor {
    HostTensor::bf16(&tensor.shape, &tensor.to_f32().expect("floats"))
}

impl Trial {
    pub fn new(op: Op, reads: Vec<HostTensor>, writes: Vec<Initial>) -> Self {
        Self { op, reads, writes, accumulate: false }
    }

    /// The same launch on these types. A sum that is added to stays f32.
    pub fn typed(mut self, types: Types) -> Self {
        if types == Types::Floats {
            return self;
        }
        for (port, read) in self.reads.iter_mut().enumerate() {
            if read.dtype() == DType::F32 && self.op.reads_bf16(port) {
                *read = halved(read);
            }
        }
        let sum = self.op.can_accumulate().filter(|_| self.accumulate);
        for port in 0..self.writes.len() {
            let initial = self.initial(&self.writes[port]);
            let is_own = !matches!(self.writes[port], Initial::Read(_)) && initial.dtype() == DType::F32;
            if types == Types::Halves && is_own && self.op.writes_bf16(port) && sum != Some(port) {
                self.writes[port] = Initial::Values(halved(&initial));
            }
        }
        self
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
            let offset = place(tensor.as_bytes().len());
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

    /// What the CUDA text makes of it, buffers lying at multiples of 64 bytes or of an element and no more; and the
    /// record's error.
    pub fn on_device(
        &self,
        machine: &mut Machine,
        aligned: bool,
    ) -> Result<(Vec<HostTensor>, Option<ErrorRecord>), String> {
        let workspace = lower::workspace_bytes(&self.launch(|_| 0, 0));
        let steps =
            lower(&self.launch(|_| 0, workspace), self.accumulate, 227 << 10).map_err(|error| error.to_string())?;
        self.run_steps(machine, &steps, aligned, workspace)
    }

    /// As `on_device`, with steps of whatever origin.
    pub fn run_steps(
        &self,
        machine: &mut Machine,
        steps: &[Step],
        aligned: bool,
        workspace: usize,
    ) -> Result<(Vec<HostTensor>, Option<ErrorRecord>), String> {
        let mut memory = Vec::new();
        let mut fences = Vec::new();
        let mut put = |memory: &mut Vec<u8>, bytes: &[u8], element: usize| {
            fences.push(memory.len()..memory.len() + FENCE);
            memory.resize(memory.len() + FENCE, CANARY);
            // Never more aligned than that.
            let place = memory.len().next_multiple_of(64) + if aligned { 0 } else { element };
            memory.resize(place, CANARY);
            memory.extend_from_slice(bytes);
            place
        };
        let mut put_tensor = |memory: &mut Vec<u8>, t: &HostTensor| put(memory, t.as_bytes(), t.dtype().bytes());
        let reads: Vec<usize> = self.reads.iter().map(|read| put_tensor(&mut memory, read)).collect();
        let mut writes = Vec::new();
        for write in &self.writes {
            writes.push(match write {
                Initial::Read(read) => reads[*read],
                _ => put_tensor(&mut memory, &self.initial(write)),
            });
        }
        // Ones: a NaN for whoever reads before writing.
        let workspace = put(&mut memory, &vec![0xff; workspace], 4);
        let record = put(&mut memory, &[0; 4 * ErrorRecord::WORDS], 4);
        let layout = Layout { reads, writes, workspace, record };
        let before = memory.clone();
        for step in steps {
            machine.run(step, &layout, &mut memory);
        }
        if let Some(fence) = fences.iter().find(|fence| memory[(*fence).clone()].iter().any(|&byte| byte != CANARY)) {
            return Err(format!("wrote into the fence at {fence:?}"));
        }
        for (i, read) in self.reads.iter().enumerate() {
            let range = layout.reads[i]..layout.reads[i] + read.as_bytes().len();
            if !layout.writes.contains(&layout.reads[i]) && memory[range.clone()] != before[range] {
                return Err(format!("wrote into read {i}"));
            }
        }
        let of_write = |(i, write): (usize, &Initial)| {
            let initial = self.initial(write);
            let bytes = &memory[layout.writes[i]..][..initial.as_bytes().len()];
            HostTensor::from_le_bytes(initial.dtype(), &initial.shape, bytes)
        };
        let written = self.writes.iter().enumerate().map(of_write).collect();
        Ok((written, machine::record(&memory, &layout)))
    }

    /// Compares the device's results with the CPU's, for aligned and for odd places.
    pub fn check(&self, machine: &mut Machine, tolerance: f64) {
        let shapes: Vec<_> = self.reads.iter().map(|read| (read.dtype(), &read.shape)).collect();
        let name = format!("{:?} {shapes:?} accumulate {}", self.op, self.accumulate);
        let expected = self.on_cpu().unwrap_or_else(|error| panic!("{name} on the CPU: {error}"));
        for aligned in [true, false] {
            let got = self.on_device(machine, aligned);
            let (got, record) = got.unwrap_or_else(|error| panic!("{name}, aligned {aligned}: {error}"));
            assert_eq!(record, None, "{name}, aligned {aligned}");
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                assert_close(&format!("{name}, aligned {aligned}, write {i}"), got, expected, tolerance);
            }
        }
    }
}

/// `|got - expected| <= tolerance * (1 + |expected|)`, and no number only where the CPU has none.
pub fn assert_close(name: &str, got: &HostTensor, expected: &HostTensor, tolerance: f64) {
    assert_eq!(got.shape, expected.shape, "{name}");
    assert_eq!(got.dtype(), expected.dtype(), "{name}");
    let (Some(got), Some(expected)) = (got.to_f32(), expected.to_f32()) else {
        return assert_eq!(got, expected, "{name}");
    };
    for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let near = f64::from((got - expected).abs()) <= tolerance * (1.0 + f64::from(expected.abs()));
        let same = got == expected || got.is_nan() && expected.is_nan();
        assert!(near || same, "{name}: element {i} is {got}, on the CPU {expected}");
    }
}
