//! Runs a single launch on its own buffers, to time the launch or to read its outputs. Also measures the peak rates of
//! copies and matrix products.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use clap::Args;
use serde_json::json;
use shardflow::init::mix;
use shardflow::prelude::{DType, DeviceKind, HostTensor};
use shardflow_integration_tests::measure::median;
use shardflow_kernels::clock::Stamped;
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::cuda::gpu::Gpu;
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::op::{Buffer, Einsum, Launch, Op, Program};
use shardflow_kernels::stream::{Notification, Stream, Submission};
use shardflow_kernels::tensor::element_count;

use crate::model::{On, token};
use crate::{Found, Result};

/// Target duration of a series of launches in milliseconds. It is long enough to make submission costs negligible.
const ROUND_MS: f64 = 20.0;
const ROUNDS: usize = 5;
const SERIES_MAX: usize = 200;
/// On a GPU, the launches of a series use copies of the buffers in turn: enough copies for this number of bytes, but at
/// most [`COPIES_MAX`]. This is more than the cache of any GPU holds.
const ROUND_BYTES: usize = 256 << 20;
const COPIES_MAX: usize = 8;
/// Maximum number of elements that the host writes in one call.
const BLOCK: usize = 1 << 20;

/// A device and a stream for single launches.
pub struct Bench {
    device: Device,
    stream: Stream,
}

impl Bench {
    /// Opens the first device of this kind.
    pub fn open(kind: DeviceKind) -> Result<Self> {
        let engine = Arc::new(InProcess::new());
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let device = match kind {
            DeviceKind::Cpu => Device::cpu(0, cores.min(shardflow::passes::THREADS_MAX), engine),
            DeviceKind::Cuda => Device::cuda(0, Gpu::open(0)?, engine),
        };
        Ok(Self { stream: device.stream("bench", device.threads_per_stream())?, device })
    }

    /// Returns the milliseconds per launch: the median over several rounds. Each round is a series of launches.
    pub fn measure(&self, launch: &Launch) -> Result<f64> {
        let (packed, bytes) = self.pack(launch);
        let copies = match self.device.kind() {
            DeviceKind::Cpu => 1,
            DeviceKind::Cuda => ROUND_BYTES.div_ceil(bytes.max(1)).clamp(1, COPIES_MAX),
        };
        let arena = self.device.arena(bytes * copies)?;
        (0..copies).try_for_each(|copy| fill(&arena, copy * bytes, &packed, true))?;
        let round = |count: usize| -> Result<f64> {
            let launches = (0..count).map(|i| moved(&packed, i % copies * bytes)).collect();
            let program = Arc::new(Program { name: "bench".to_owned(), launches, signals: vec![] });
            self.stream.prepare(&program)?;
            self.submit(&program, &arena)
        };
        // The first round also loads kernels and selects algorithms for products, so its time is not used.
        round(copies)?;
        let count = (ROUND_MS / round(1)?.max(1e-3)).ceil() as usize;
        let count = count.clamp(1, SERIES_MAX);
        let ms = (0..ROUNDS).map(|_| Ok(round(count)? / count as f64)).collect::<Result<_>>()?;
        Ok(median(ms).unwrap_or(f64::NAN))
    }

    /// Returns the device's counters by name.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        self.device.counts()
    }

    /// Returns the outputs of a launch. Outputs that the launch does not read hold NaN before the launch.
    pub fn outputs(&self, launch: &Launch) -> Result<Vec<HostTensor>> {
        let (packed, bytes) = self.pack(launch);
        let arena = self.device.arena(bytes)?;
        let updated = matches!(packed.op, Op::AdamW { .. } | Op::SumSquares { .. } | Op::CopyRegion { .. });
        for write in packed.writes.iter().filter(|_| !updated) {
            let poison = vec![f32::NAN; element_count(&write.shape)];
            let poison = if write.dtype == DType::BF16 {
                HostTensor::bf16(&write.shape, &poison)
            } else {
                HostTensor::f32(&write.shape, poison)
            };
            arena.write_host(write.offset, &poison)?;
        }
        fill(&arena, 0, &packed, updated)?;
        let writes = packed.writes.clone();
        self.submit(&Arc::new(Program { name: "once".to_owned(), launches: vec![packed], signals: vec![] }), &arena)?;
        let read = |buffer: &Buffer| arena.read_host(buffer.offset, &buffer.shape, buffer.dtype);
        Ok(writes.iter().map(read).collect::<std::result::Result<_, _>>()?)
    }

    /// Packs the launch's buffers one after another, starting at offset 0, and adds the workspace that this device
    /// needs. Two buffers that shared memory still share memory. Returns the new launch and the total number of bytes.
    fn pack(&self, launch: &Launch) -> (Launch, usize) {
        let mut packed = launch.clone();
        let bytes = self.device.kind().workspace_bytes(launch);
        let workspace = |bytes| Buffer { base: usize::MAX, offset: 0, shape: vec![bytes / 4], dtype: DType::F32 };
        packed.workspace = (bytes > 0).then(|| workspace(bytes));
        let mut placed: Vec<(Buffer, usize)> = Vec::new();
        let mut end = 0;
        for buffer in packed.reads.iter_mut().chain(&mut packed.writes).chain(&mut packed.workspace) {
            let known = placed.iter().find(|(other, _)| (other.base, other.offset) == (buffer.base, buffer.offset));
            let offset = known.map_or(end, |(_, offset)| *offset);
            placed.push((buffer.clone(), offset));
            end = end.max(offset + (element_count(&buffer.shape) * buffer.dtype.bytes()).next_multiple_of(256));
            (buffer.base, buffer.offset) = (0, offset);
        }
        (packed, end)
    }

    /// Submits a program, and returns the milliseconds until its end.
    fn submit(&self, program: &Arc<Program>, arena: &Arena) -> Result<f64> {
        let (sender, notices) = channel();
        let notify = Box::new(move |notice| drop(sender.send(Stamped::new(notice))));
        let bases = vec![Base { arena: arena.clone(), offset: 0 }];
        let begin = Instant::now();
        self.stream.submit(Submission { program: program.clone(), bases, repeat: false, notify })?;
        let notice = notices.recv()?.open();
        let ms = begin.elapsed().as_secs_f64() * 1e3;
        match notice {
            Notification::Done => Ok(ms),
            Notification::Failed(error) => Err(error.into()),
            other => Err(format!("unexpected notification: {other:?}").into()),
        }
    }
}

fn moved(launch: &Launch, by: usize) -> Launch {
    let mut launch = launch.clone();
    let buffers = launch.reads.iter_mut().chain(&mut launch.writes).chain(&mut launch.workspace);
    buffers.for_each(|buffer| buffer.offset += by);
    launch
}

/// Fills the buffers that a launch reads with numbers between 0.1 and 1.1. Every op accepts these numbers. Integer
/// buffers get token ids. If `writes` is true, also fills the buffers that the launch writes.
fn fill(arena: &Arena, by: usize, launch: &Launch, writes: bool) -> Result<()> {
    let vocabulary = match launch.op {
        Op::Embedding { vocab, .. } | Op::SumExpTarget { vocab, .. } => vocab,
        Op::EmbeddingGrad { .. } => launch.writes[0].shape[0],
        Op::CrossEntropyGrad { .. } => launch.reads[1].shape.last().copied().unwrap_or(1),
        _ => usize::from(u8::MAX),
    };
    let number = |i: usize| 0.1 + (mix(i as u64) >> 40) as f32 / (1u64 << 24) as f32;
    for buffer in launch.reads.iter().chain(launch.writes.iter().filter(|_| writes)) {
        let elements = element_count(&buffer.shape);
        let length = elements.min(BLOCK);
        let block = match buffer.dtype {
            DType::F32 => HostTensor::f32(&[length], (0..length).map(number).collect()),
            DType::BF16 => HostTensor::bf16(&[length], &(0..length).map(number).collect::<Vec<_>>()),
            DType::I32 => HostTensor::i32(&[length], (0..length).map(|i| token(i as u64, vocabulary)).collect()),
        };
        let mut at = 0;
        while at < elements {
            let part = length.min(elements - at);
            let bytes = &block.as_bytes()[..part * buffer.dtype.bytes()];
            let part = HostTensor::from_le_bytes(buffer.dtype, &[part], bytes);
            arena.write_host(by + buffer.offset + at * buffer.dtype.bytes(), &part)?;
            at += length;
        }
    }
    Ok(())
}

/// Arguments of [`ceilings`].
#[derive(Args, Clone, Debug)]
pub struct CeilingArgs {
    #[arg(long, value_enum, default_value_t = On::Cuda)]
    device: On,
    /// Bytes to copy.
    #[arg(long, default_value_t = 2 << 30)]
    copy_bytes: usize,
    /// Rows and columns of each matrix.
    #[arg(long, default_value_t = 8192)]
    matrix: usize,
}

/// Measures a copy in GB/s (bytes read plus bytes written) and matrix products in TFLOP/s.
pub fn ceilings(args: &CeilingArgs) -> Result<Found> {
    let bench = Bench::open(if args.device == On::Cpu { DeviceKind::Cpu } else { DeviceKind::Cuda })?;
    let buffer = |offset, shape: &[usize], dtype| Buffer { base: 0, offset, shape: shape.to_vec(), dtype };
    let launch = |op, reads, writes| Launch { op, reads, writes, accumulate: false, workspace: None };
    let flat = |offset| buffer(offset, &[args.copy_bytes / 4], DType::F32);
    let ms = bench.measure(&launch(Op::Copy, vec![flat(0)], vec![flat(1)]))?;
    let copy = 2.0 * args.copy_bytes as f64 / ms / 1e6;
    let n = args.matrix;
    let product = |dtype| -> Result<f64> {
        let square = |offset| buffer(offset, &[n, n], dtype);
        let op = Op::Einsum(Einsum::parse("mk,nk->mn")?);
        let ms = bench.measure(&launch(op, vec![square(0), square(1)], vec![square(2)]))?;
        Ok(2.0 * (n as f64).powi(3) / ms / 1e9)
    };
    let (bf16, f32) = (product(DType::BF16)?, product(DType::F32)?);
    let products = json!({ "bf16": bf16, "f32": f32 });
    Ok(json!({ "copy_gb_per_s": copy, "copy_bytes": args.copy_bytes, "product_tflops": products, "matrix": n }).into())
}
