//! The CUDA backend passes the conformance suite on software devices, which emulate CUDA on the CPU. The suite runs
//! with engines for one GPU and for several GPUs. Each test starts this program again, so that the dynamic linker loads
//! the software device instead of NVIDIA's libraries. A test fails if the software device finds an error.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardflow_kernels::clock::Stamped;
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::collective::{Collective, CollectiveCall, CollectiveKind, Group, ReduceOp};
use shardflow_kernels::conformance::{self, ConformanceFailure};
use shardflow_kernels::cuda::cudnn::Attention;
use shardflow_kernels::cuda::gpu::Gpu;
use shardflow_kernels::cuda::nccl::{GroupMember, Nccl, UniqueId};
use shardflow_kernels::cuda::shared_gpu::SharedGpu;
use shardflow_kernels::cuda::source::{MODULES, Module};
use shardflow_kernels::device::{Device, DeviceKind};
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::op::{Buffer, CpuArgs, CustomKernel, Einsum, Launch, Op, Program};
use shardflow_kernels::stream::{Notification, Stream, Submission};
use shardflow_kernels::tensor::{DType, HostTensor, element_count};
use shardflow_software_cuda::{CASE, POLICIES, SimReport, case, command, run_child, run_child_in};

#[path = "cuda/pull.rs"]
mod pull;
#[path = "cuda/waiting.rs"]
mod waiting;

/// Maximum wait until all members of a group have joined.
const WITHIN: Duration = Duration::from_secs(30);
/// How long the abort takes in the case `slow abort`.
const ABORT: Duration = Duration::from_secs(3);

fn assert_no_failures(failures: &[ConformanceFailure]) {
    let lines: Vec<String> = failures.iter().take(20).map(|f| f.to_string().chars().take(600).collect()).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), lines.join("\n"));
}

fn gpus() -> Vec<Arc<Gpu>> {
    let open = |ordinal| Gpu::open(ordinal).expect("a device");
    let gpus: Vec<_> = (0..Gpu::count().expect("a driver")).map(open).collect();
    Gpu::connect(&gpus.iter().collect::<Vec<_>>()).expect("devices with peer access");
    gpus
}

fn arenas(devices: impl Iterator<Item = Device>) -> Result<Vec<(Device, Arena)>, KernelError> {
    let with_arena = |device: Device| device.arena(conformance::COLLECTIVES_ARENA_BYTES).map(|arena| (device, arena));
    devices.map(with_arena).collect()
}

/// Runs the suite with several mesh devices per GPU.
fn shared(engine: &dyn Fn() -> Arc<dyn Collective>) {
    let gpus = gpus();
    let make = |n| {
        let engine = engine();
        arenas((0..n).map(|rank| Device::cuda(rank, gpus[rank % gpus.len()].clone(), engine.clone())))
    };
    assert_no_failures(&conformance::run_collectives(&make));
}

/// Runs the suite with one mesh device per GPU.
fn nccl() {
    let gpus = gpus();
    assert!(gpus.len() > 1, "groups of one GPU do not exercise NCCL");
    let make = |n: usize| {
        let mut memberships = Vec::new();
        for group in conformance::collectives_groups(n) {
            let id = UniqueId::new()?;
            let membership =
                |member: usize| GroupMember { group: group.clone(), member, gpu: gpus[member].clone(), id };
            memberships.extend((0..n).map(membership));
        }
        let engine = Arc::new(Nccl::join(&memberships, WITHIN)?);
        arenas((0..n).map(|rank| Device::cuda(rank, gpus[rank].clone(), engine.clone())))
    };
    assert_no_failures(&conformance::run_collectives_unordered(&make, gpus.len()));
}

fn floats(offset: usize, shape: &[usize]) -> Buffer {
    Buffer { base: 0, offset, shape: shape.to_vec(), dtype: DType::F32 }
}

/// The launches of one layer: norm, product, GELU and residual. A signal follows the product.
fn layer() -> (Arc<Program>, usize) {
    const ROWS: [usize; 2] = [4, 32];
    let place = |i: usize| 4 * element_count(&ROWS) * i;
    let x = |i: usize| floats(place(i), &ROWS);
    let (weight, square) = (floats(place(8), &[ROWS[1]]), floats(place(9), &[ROWS[1]; 2]));
    let statistics = [0, 1].map(|i| floats(place(8) + 1024 + 64 * i, &ROWS[..1]));
    let launch = |op, reads: &[Buffer], writes: &[Buffer]| {
        let (reads, writes) = (reads.to_vec(), writes.to_vec());
        Launch { op, reads, writes, accumulate: false, workspace: None }
    };
    let einsum = Einsum { a: "mk".to_owned(), b: "kn".to_owned(), out: "mn".to_owned() };
    let [mean, rstd] = statistics;
    let mut product = launch(Op::Einsum(einsum), &[x(1), square], &[x(2)]);
    let bytes = DeviceKind::Cuda.workspace_bytes(&product);
    product.workspace = Some(floats(place(20), &[bytes / 4]));
    let launches = vec![
        launch(Op::LayerNorm { eps: 1e-5 }, &[x(0), weight], &[x(1), mean, rstd]),
        product,
        launch(Op::Gelu, &[x(2)], &[x(3)]),
        launch(Op::Add, &[x(0), x(3)], &[x(4)]),
    ];
    let program = Program { name: "layer".to_owned(), launches, signals: vec![(2, 1)] };
    (Arc::new(program), place(20) + bytes)
}

fn submit(stream: &Stream, program: &Arc<Program>, arena: &Arena) -> Result<Vec<Notification>, KernelError> {
    submit_on(stream, program, &[arena])
}

/// Runs a program on several arenas and returns the stream's notifications.
fn submit_on(stream: &Stream, program: &Arc<Program>, arenas: &[&Arena]) -> Result<Vec<Notification>, KernelError> {
    let (sender, notifications) = channel();
    let notify = Box::new(move |notification| drop(sender.send(Stamped::new(notification))));
    let bases = arenas.iter().map(|arena| Base { arena: (*arena).clone(), offset: 0 }).collect();
    stream.submit(Submission { program: program.clone(), bases, repeat: false, notify })?;
    Ok(notifications.iter().map(Stamped::open).collect())
}

/// Runs a layer many times, like a training loop.
fn steps(count: usize) {
    let device = Device::cuda(0, Gpu::open(0).expect("a device"), Arc::new(SharedGpu::new()));
    let (program, bytes) = layer();
    let (stream, arena) = (device.stream("compute", 1).expect("a stream"), device.arena(bytes).expect("memory"));
    stream.prepare(&program).expect("kernels and memory");
    let allocations = device.allocation_count();
    for _ in 0..count {
        let notifications = submit(&stream, &program, &arena).expect("a live stream");
        assert_eq!(notifications, [Notification::Signal(1), Notification::Done]);
    }
    assert_eq!(device.allocation_count(), allocations, "a prepared stream allocates");
}

/// Bytes per buffer of [`fusible`], enough for five rows of 1100 floats.
const PLACE: usize = 22_528;

/// Creates pairs of launches that one kernel can run: residual with norm, bias with GELU, and row maximum with row sum.
/// Returns the program and the buffers that it writes. If `apart`, signals separate all launches.
fn fusible(dtype: DType, apart: bool, width: usize) -> (Arc<Program>, Vec<Buffer>) {
    let rows = [5, width];
    let place = |i: usize, shape: &[usize], dtype| Buffer { dtype, ..floats(PLACE * i, shape) };
    let x = |i| place(i, &rows, dtype);
    let line = |i| place(i, &rows[..1], DType::F32);
    let launch = |op, reads: &[Buffer], writes: &[Buffer]| {
        let (reads, writes) = (reads.to_vec(), writes.to_vec());
        Launch { op, reads, writes, accumulate: false, workspace: None }
    };
    let (weight, bias) = (place(2, &rows[1..], DType::F32), place(3, &rows[1..], dtype));
    let targets = place(4, &rows[..1], DType::I32);
    let launches = vec![
        launch(Op::Add, &[x(0), x(1)], &[x(5)]),
        launch(Op::LayerNorm { eps: 1e-5 }, &[x(5), weight], &[x(6), line(7), line(8)]),
        launch(Op::Add, &[x(6), bias], &[x(9)]),
        launch(Op::Gelu, &[x(9)], &[x(10)]),
        launch(Op::RowMax, &[x(10)], &[line(11)]),
        launch(Op::SumExpTarget { vocab_start: 0, vocab: width }, &[x(10), line(11), targets], &[line(12), line(13)]),
    ];
    let written = launches.iter().flat_map(|launch| launch.writes.clone()).collect();
    let signals = (1..6).filter(|_| apart).map(|i| (i, i as u32)).collect();
    (Arc::new(Program { name: "fusible".to_owned(), launches, signals }), written)
}

/// Runs fusible launches apart, and then again as `mode` says: fused, apart, or with Inf/NaN checks. The results must
/// be equal, except for the summation order within a row.
fn fused_and_apart(mode: &str) {
    let device = Device::cuda(0, Gpu::open(0).expect("a device"), Arc::new(SharedGpu::new()));
    let (stream, arena) = (device.stream("compute", 1).expect("a stream"), device.arena(14 * PLACE).expect("memory"));
    let wave = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    // Row widths: a multiple of the vector size, not a multiple of it, and more than a warp keeps in registers.
    let cases = [72, 17, 1100].into_iter().flat_map(|width| [(DType::F32, width), (DType::BF16, width)]);
    for (dtype, width) in cases {
        let (rows, n) = ([5, width], 5 * width);
        let put = |place: usize, shape: &[usize], values: Vec<f32>, dtype| {
            let tensor =
                if dtype == DType::BF16 { HostTensor::bf16(shape, &values) } else { HostTensor::f32(shape, values) };
            arena.write_host(PLACE * place, &tensor).expect("inside");
        };
        stream.check_finite(false).expect("a live stream");
        put(0, &rows, wave(n, 0.7), dtype);
        put(1, &rows, wave(n, 1.3), dtype);
        put(2, &rows[1..], wave(width, 0.4), DType::F32);
        put(3, &rows[1..], wave(width, 2.1), dtype);
        arena.write_host(PLACE * 4, &HostTensor::i32(&[5], vec![width as i32 - 1, 0, 3, 16, 5])).expect("inside");
        let (apart, written) = fusible(dtype, true, width);
        let read = || {
            let read = |buffer: &Buffer| arena.read_host(buffer.offset, &buffer.shape, buffer.dtype).expect("inside");
            written.iter().map(read).collect::<Vec<_>>()
        };
        assert_eq!(submit(&stream, &apart, &arena).expect("a live stream").last(), Some(&Notification::Done));
        let expected = read();
        for (buffer, place) in written.iter().zip(5..) {
            put(buffer.offset / PLACE, &buffer.shape, vec![place as f32; element_count(&buffer.shape)], buffer.dtype);
        }
        stream.check_finite(mode == "checked").expect("a live stream");
        let (program, _) = fusible(dtype, mode == "apart", width);
        assert_eq!(submit(&stream, &program, &arena).expect("a live stream").last(), Some(&Notification::Done));
        for (i, (got, expected)) in read().iter().zip(&expected).enumerate() {
            let close = |(got, expected): (&f32, &f32)| (got - expected).abs() <= 1e-6 * expected.abs();
            let is_close = got.as_f32().zip(expected.as_f32()).is_some_and(|(a, b)| a.iter().zip(b).all(close));
            // Write 7 is the sum of exponentials, whose summation order may differ.
            assert!(got == expected || i == 7 && is_close, "{dtype:?}, write {i}: got {got:?}, expected {expected:?}");
        }
    }
}

/// Checks attention and its gradient, computed by cuDNN or by Shardflow's kernels.
fn run_attentions(kind: &str) {
    if kind == "absent" {
        for folder in std::env::split_paths(&std::env::var_os("LD_LIBRARY_PATH").expect("the software device's folder"))
        {
            for name in ["libcudnn.so.9", "libcudnn.so"] {
                drop(std::fs::remove_file(folder.join(name)));
            }
        }
    }
    let attention = match kind {
        "own" => Attention::Own,
        "any order" => Attention::AnyOrder,
        _ => Attention::Ordered,
    };
    let gpu = Gpu::open_with(0, attention).expect("a device");
    assert_no_failures(&conformance::run_attentions(&Device::cuda(0, gpu, Arc::new(SharedGpu::new()))));
}

/// Runs attention forward and backward many times on a prepared stream.
fn attention_steps(count: usize) {
    const SHAPE: [usize; 4] = [2, 20, 2, 16];
    const BYTES: usize = 4096;
    let gpu = Gpu::open_with(0, Attention::Ordered).expect("a device");
    let device = Device::cuda(0, gpu, Arc::new(SharedGpu::new()));
    let place = |i: usize| Buffer { base: 0, offset: BYTES * i, shape: SHAPE.to_vec(), dtype: DType::BF16 };
    let line = |i: usize| floats(BYTES * i, &[2, 2, 20]);
    let launch = |op, reads, writes| {
        let mut launch = Launch { op, reads, writes, accumulate: false, workspace: None };
        let bytes = device.kind().workspace_bytes(&launch);
        launch.workspace = Some(floats(BYTES * 10, &[bytes / 4]));
        (launch, bytes)
    };
    let q_k_v = vec![place(0), place(1), place(2)];
    let reads = vec![place(3), place(0), place(1), place(2), place(4), line(5)];
    let (forward, bytes) = launch(Op::Attention { scale: 0.25 }, q_k_v, vec![place(4), line(5)]);
    let (backward, more) = launch(Op::AttentionGrad { scale: 0.25 }, reads, vec![place(6), place(7), place(8)]);
    let (launches, bytes) = (vec![forward, backward], BYTES * 10 + bytes.max(more));
    let program = Arc::new(Program { name: "attention".to_owned(), launches, signals: vec![] });
    let (stream, arena) = (device.stream("compute", 1).expect("a stream"), device.arena(bytes).expect("memory"));
    for i in 0..4 {
        let values: Vec<f32> = (0..element_count(&SHAPE)).map(|j| ((i * 7 + j) as f32 * 0.37).sin()).collect();
        arena.write_host(BYTES * i, &HostTensor::bf16(&SHAPE, &values)).expect("inside");
    }
    stream.prepare(&program).expect("plans and memory");
    let (allocations, mut first) = (device.allocation_count(), None);
    for _ in 0..count {
        assert_eq!(submit(&stream, &program, &arena).expect("a live stream"), [Notification::Done]);
        let dq = arena.read_host(BYTES * 6, &SHAPE, DType::BF16).expect("inside");
        assert_eq!(*first.get_or_insert_with(|| dq.clone()), dq);
    }
    let by_cudnn: Vec<u64> = device.counts().iter().map(|(_, launches)| *launches).collect();
    assert_eq!(by_cudnn, [count as u64, 0, count as u64, 0], "{:?}", device.counts());
    assert_eq!(device.allocation_count(), allocations, "a prepared stream allocates");
}

/// Tests that an error in a fused pair is reported for the launch that caused it.
fn errors_in_pairs() {
    let device = Device::cuda(0, Gpu::open(0).expect("a device"), Arc::new(SharedGpu::new()));
    let (stream, arena) = (device.stream("compute", 1).expect("a stream"), device.arena(14 * PLACE).expect("memory"));
    arena.write_host(0, &HostTensor::i32(&[14 * PLACE / 4], vec![0; 14 * PLACE / 4])).expect("inside");
    for dtype in [DType::F32, DType::BF16] {
        stream.check_finite(false).expect("a live stream");
        let (program, _) = fusible(dtype, false, 72);
        arena.write_host(PLACE * 4, &HostTensor::i32(&[5], vec![1, 72, 3, 4, 5])).expect("inside");
        let notifications = submit(&stream, &program, &arena).expect("a live stream");
        let [Notification::Failed(KernelError::Data { op, what })] = &notifications[..] else {
            panic!("got {notifications:?}")
        };
        assert_eq!((&op[..], &what[..]), ("sum_exp_target", "index 72 at position 1 is not in 0..72"));
        arena.write_host(PLACE * 4, &HostTensor::i32(&[5], vec![0; 5])).expect("inside");
        let infinite = HostTensor::f32(&[1], vec![f32::INFINITY]);
        let infinite = if dtype == DType::BF16 { HostTensor::bf16(&[1], &[f32::INFINITY]) } else { infinite };
        // This buffer is the bias, which the third launch adds to each of five rows.
        arena.write_host(PLACE * 3, &infinite).expect("inside");
        stream.check_finite(true).expect("a live stream");
        let notifications = submit(&stream, &program, &arena).expect("a live stream");
        assert_eq!(notifications, [Notification::NotFinite { launch: 2, write: 0, elements: 5 }, Notification::Done]);
        arena.write_host(PLACE * 3, &HostTensor::i32(&[1], vec![0])).expect("inside");
    }
}

/// User code that runs as a kernel.
struct Call<F>(F);

impl<F> fmt::Debug for Call<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Call")
    }
}

impl<F: Fn() + Send + Sync> CustomKernel for Call<F> {
    fn name(&self) -> &str {
        "call"
    }

    fn run_cpu(&self, _: CpuArgs<'_>) -> Result<(), KernelError> {
        (self.0)();
        Ok(())
    }
}

/// A program with a call of user code, followed by fusible launches.
fn after_call(call: impl Fn() + Send + Sync + 'static) -> Arc<Program> {
    let (program, _) = fusible(DType::F32, false, 72);
    let (reads, writes) = (vec![], vec![]);
    let call = Launch { op: Op::Custom(Arc::new(Call(call))), reads, writes, accumulate: false, workspace: None };
    let launches = [vec![call], program.launches.clone()].concat();
    Arc::new(Program { name: "after a call".to_owned(), launches, signals: vec![(2, 1)] })
}

/// User code that uses another GPU. It leaves that GPU's context bound on the stream's own thread.
fn another_context() {
    let gpus = gpus();
    let device = Device::cuda(0, gpus[0].clone(), Arc::new(SharedGpu::new()));
    let (stream, arena) = (device.stream("compute", 1).expect("a stream"), device.arena(14 * PLACE).expect("memory"));
    let program = after_call(move || assert!(gpus[1].memory().is_ok(), "the other GPU gives no answer"));
    for _ in 0..2 {
        let notifications = submit(&stream, &program, &arena).expect("a live stream");
        assert_eq!(notifications, [Notification::Signal(1), Notification::Done]);
    }
}

/// Drops a stream while its program runs, on a thread that cannot wait for it: the stream's own or the poller's.
fn dropped(by_kernel: bool) {
    let device = Device::cuda(0, Gpu::open(0).expect("a device"), Arc::new(SharedGpu::new()));
    let arena = device.arena(14 * PLACE).expect("memory");
    let before = device.bytes_allocated();
    let stream = Arc::new(Mutex::new(Some(device.stream("compute", 1).expect("a stream"))));
    let drops = |yes: bool| {
        let stream = stream.clone();
        move || drop(stream.lock().take_if(|_| yes))
    };
    let program = after_call(drops(by_kernel));
    let (at_signal, (sender, notifications)) = (drops(!by_kernel), channel());
    let notify = Box::new(move |notification: Notification| {
        at_signal();
        drop(sender.send(Stamped::new(notification)));
    });
    let bases = vec![Base { arena: arena.clone(), offset: 0 }];
    let submission = Submission { program, bases, repeat: false, notify };
    stream.lock().as_ref().expect("a stream").submit(submission).expect("a live stream");
    let received: Vec<Notification> = notifications.iter().map(Stamped::open).collect();
    assert_eq!(received, [Notification::Signal(1), Notification::Done]);
    let deadline = Instant::now() + WITHIN;
    while device.bytes_allocated() > before {
        assert!(Instant::now() < deadline, "the stream's memory was not freed in time");
        thread::yield_now();
    }
}

/// Tests that dropping the stream of a hung device returns, and that pending submissions fail.
fn hung() {
    let device = Device::cuda(0, Gpu::open(0).expect("a device"), Arc::new(SharedGpu::new()));
    let (program, bytes) = layer();
    let (stream, arena) = (device.stream("compute", 1).expect("a stream"), device.arena(bytes).expect("memory"));
    let (sender, notifications) = channel();
    for i in 0..5 {
        let sender = sender.clone();
        let notify = Box::new(move |notification| drop(sender.send((i, notification))));
        let bases = vec![Base { arena: arena.clone(), offset: 0 }];
        let submission = Submission { program: program.clone(), bases, repeat: false, notify };
        stream.submit(submission).expect("a device that seems alive");
    }
    drop((sender, stream));
    let failed: Vec<usize> = notifications
        .iter()
        .filter(|(_, notification)| matches!(notification, Notification::Failed(_)))
        .map(|n| n.0)
        .collect();
    assert!(failed.ends_with(&[3, 4]), "{failed:?}");
    let error =
        device.stream("next", 1).and_then(|stream| submit(&stream, &program, &arena)).expect_err("a lost device");
    assert!(error.to_string().contains("has not ended within"), "{error}");
}

/// Tests that a lost device fails pending and all later work with the driver's error.
fn lost() {
    let device = Device::cuda(0, Gpu::open(0).expect("a device"), Arc::new(SharedGpu::new()));
    let (program, bytes) = layer();
    let (stream, arena) = (device.stream("compute", 1).expect("a stream"), device.arena(bytes).expect("memory"));
    let other = device.stream("other", 1).expect("a stream");
    let (mut ended, mut first) = (0, None);
    for _ in 0..20 {
        let Ok(notifications) = submit(&stream, &program, &arena) else { break };
        match notifications.into_iter().next_back() {
            Some(Notification::Done) => ended += 1,
            Some(Notification::Failed(error)) => {
                first.get_or_insert(error);
            }
            other => panic!("got {other:?}"),
        }
    }
    let first = first.expect("the device is killed within these launches");
    let KernelError::Cuda { place, name, code, .. } = &first else { panic!("{first}") };
    assert!(place.contains("cuda device 0") && name.starts_with("CUDA_ERROR_") && *code > 0, "{first}");
    assert!(ended > 0 && ended < 20, "{ended} programs ended");
    for stream in [&stream, &other] {
        assert_eq!(submit(stream, &program, &arena).err(), Some(first.clone()));
        assert!(stream.record().query(), "an event of the lost device was not set");
    }
}

/// Tests that completions are reported while a slow NCCL abort is in progress.
fn slow_abort() {
    let gpus = [0, 1].map(|i| Gpu::open(i).expect("a device"));
    let (group, id) = (Arc::new(Group { id: 7, ranks: vec![0, 1].into() }), UniqueId::new().expect("an id"));
    let memberships =
        [0, 1].map(|member: usize| GroupMember { group: group.clone(), member, gpu: gpus[member].clone(), id });
    let engine = Arc::new(Nccl::join(&memberships, WITHIN).expect("both members join"));
    let devices = [0, 1].map(|rank: usize| Device::cuda(rank, gpus[rank].clone(), engine.clone()));
    let (program, bytes) = layer();
    let (other, arena) = (devices[0].stream("other", 1).expect("a stream"), devices[0].arena(bytes).expect("memory"));
    other.prepare(&program).expect("kernels");
    // The members disagree about the number of elements.
    let reduce = |member: usize, device: &Device| {
        let (x, kind) = (floats(0, &[2 + member]), CollectiveKind::AllReduce { op: ReduceOp::Sum });
        let op = Op::Collective(CollectiveCall { group: group.clone(), member, kind });
        let mut launch = Launch { op, reads: vec![x.clone()], writes: vec![x], accumulate: false, workspace: None };
        let bytes = device.kind().workspace_bytes(&launch);
        launch.workspace = Some(floats(64, &[bytes.div_ceil(4)]));
        let program = Arc::new(Program { name: "reduce".to_owned(), launches: vec![launch], signals: vec![] });
        (program, device.stream("reduce", 1).expect("a stream"), device.arena(256).expect("memory"))
    };
    let members = [0, 1].map(|member: usize| reduce(member, &devices[member]));
    let members = Stamped::new(members);
    std::thread::scope(|scope| {
        for member in 0..2 {
            let members = &members;
            scope.spawn(move || {
                let (program, stream, arena) = &members.get()[member];
                submit(stream, program, arena).expect("a live stream")
            });
        }
    });
    // The poller checks for errors while work is pending.
    let began = Instant::now();
    while began.elapsed() < ABORT {
        let submitted = Instant::now();
        assert_eq!(submit(&other, &program, &arena).expect("a live stream").last(), Some(&Notification::Done));
        assert!(submitted.elapsed() < ABORT / 2, "a completion is reported after {:?}", submitted.elapsed());
    }
    let (program, stream, arena) = &members.get()[0];
    let received = submit(stream, program, arena).expect("a live stream");
    assert!(matches!(received[..], [Notification::Failed(KernelError::Aborted { .. })]), "{received:?}");
}

#[test]
#[ignore = "started by the other tests, on software devices"]
fn child() {
    match &*case() {
        "alone" => {
            let gpu = Gpu::open(0).expect("a device");
            assert_no_failures(&conformance::run_alone(&Device::cuda(0, gpu, Arc::new(SharedGpu::new()))));
        }
        "local" => shared(&|| Arc::new(SharedGpu::new())),
        "staged" => shared(&|| Arc::new(InProcess::new())),
        "nccl" => nccl(),
        "pull" => pull::run(),
        "lost" => lost(),
        "pipe" => waiting::pipe(),
        "time" => waiting::time(),
        "slow abort" => slow_abort(),
        "hung" => hung(),
        "wrong pairs" => errors_in_pairs(),
        "old nccl" => {
            let error = UniqueId::new().expect_err("an old library").to_string();
            assert!(error.starts_with("libnccl is too old: found 2.23.4, need 2.24.0 or newer"), "{error}");
            assert!(error.contains("pip install nvidia-nccl-cu13"), "{error}");
        }
        "another context" => another_context(),
        "dropped by a kernel" => dropped(true),
        "dropped by a notice" => dropped(false),
        case if case.starts_with("attention steps ") => attention_steps(case[16..].parse().expect("a number")),
        case if case.starts_with("attention ") => run_attentions(&case[10..]),
        case if case.starts_with("pairs ") => fused_and_apart(&case[6..]),
        case if case.starts_with("steps ") => steps(case[6..].parse().expect("a number")),
        other => panic!("no such case: {other:?}"),
    }
}

/// Runs a case on software devices. Fails if the device finds errors of a kind that is not in `expected`.
fn run(case: &str, devices: usize, policy: &str, seed: u64, fault: Option<&str>, expected: &[&str]) -> SimReport {
    let mut report = run_child(case, devices, policy, seed, fault).report;
    report.findings.retain(|finding| !expected.contains(&finding.kind.as_str()));
    assert!(report.findings.is_empty(), "{case}, {policy}, seed {seed}: {:#?}", report.findings);
    report
}

/// Parts of the suite. Each has a case, a number of devices, and the kinds of expected findings.
const SUITE: [(&str, usize, &[&str]); 5] = [
    ("alone", 1, &[]),
    ("local", 1, &[]),
    ("staged", 1, &[]),
    // The suite aborts collectives in progress, which the software device reports.
    ("nccl", 4, &["aborted"]),
    ("local", 2, &[]),
];

fn run_part(part: usize, policy: &str, seed: u64) -> SimReport {
    let (case, devices, expected) = SUITE[part];
    run(case, devices, policy, seed, None, expected)
}

/// Kernels that each run two launches.
const FUSED_KERNELS: [&str; 6] = [
    "bias_gelu_f32",
    "bias_gelu_bf16",
    "row_max_sum_exp_target_f32",
    "row_max_sum_exp_target_bf16",
    "add_layer_norm_f32",
    "add_layer_norm_bf16",
];

/// The kernel that combines the members' values in collectives.
const COMBINE: &str = "combine_members_f32";

/// This test runs every kernel, except those that other tests run.
#[test]
fn all_ops_and_stream_calls_conform() {
    let report = run_part(0, "random", 1);
    let all = MODULES.iter().flat_map(Module::functions);
    let covered_elsewhere = |name: &&str| FUSED_KERNELS.contains(name) || [COMBINE, "spin"].contains(name);
    let left_out: Vec<_> = all.filter(|name| !covered_elsewhere(name) && !report.kernels.contains_key(*name)).collect();
    assert!(left_out.is_empty(), "{left_out:?}");
}

#[test]
fn devices_that_share_a_gpu_run_collectives() {
    assert!(run_part(1, "random", 2).kernels.contains_key(COMBINE));
}

#[test]
fn a_host_engine_runs_collectives() {
    run_part(2, "random", 3);
}

#[test]
fn devices_with_one_gpu_each_run_collectives() {
    run_part(3, "adversarial", 4);
}

#[test]
fn devices_that_share_two_gpus_run_collectives() {
    run_part(4, "random", 5);
}

/// Rows of equal pitch are copied by one driver call.
#[test]
fn rows_of_equal_pitch_are_copied_from_another_gpu_in_one_call() {
    let calls = run("pull", 2, "random", 6, None, &[]).calls;
    // In order: the columns, each of the three planes, and the contiguous region.
    let count = |name: &str| calls.get(name).copied().unwrap_or(0);
    assert_eq!((count("cuMemcpy3DPeerAsync"), count("cuMemcpyPeerAsync")), (1 + 3, 1));
}

#[test]
fn pipes_connect_and_report_who_waits() {
    for (policy, seed) in [("random", 6), ("adversarial", 7), ("lazy", 8)] {
        run("pipe", 2, policy, seed, None, &[]);
    }
}

/// Runs the case under policies that run work before the host waits for it.
#[test]
fn the_time_in_a_collective_is_known_before_it_ends() {
    for (policy, seed) in [("in-order", 9), ("random", 10), ("adversarial", 11)] {
        run("time", 2, policy, seed, None, &[]);
    }
}

#[test]
fn completions_are_reported_during_a_slow_abort() {
    let slow = [("SOFTWARE_CUDA_ABORT_MS", &*ABORT.as_millis().to_string())];
    let report = run_child_in("slow abort", 2, "random", 9, &slow).report;
    let unexpected = |kind: &str| !["aborted", "collective-mismatch"].contains(&kind);
    assert!(!report.findings.iter().any(|finding| unexpected(&finding.kind)), "{:#?}", report.findings);
}

/// On sm_86, sm_89 and sm_120, the backward pass for f32 heads of depth 128 uses plain kernels.
#[test]
fn attention_runs_with_less_shared_memory_per_block() {
    let report = run_child_in("attention own", 1, "random", 10, &[("SOFTWARE_CUDA_SHARED", "101376")]).report;
    assert!(report.findings.is_empty(), "{:#?}", report.findings);
}

#[test]
#[ignore = "takes an hour: run by hand"]
fn fifty_seeds_of_each_policy() {
    for (policy, _) in POLICIES {
        for (part, (case, _, _)) in SUITE.iter().enumerate() {
            (0..50).for_each(|seed| drop(run_part(part, policy, seed)));
            println!("{case}, {policy}: 50 seeds");
        }
    }
}

#[test]
fn a_lost_device_fails_all_work_with_the_first_error() {
    for seed in 1..4 {
        // On a lost device, memory cannot be freed. That is not a leak of this crate.
        run("lost", 1, "random", seed, Some("kill:0:20"), &["leak"]);
    }
}

#[test]
fn dropping_the_stream_of_a_hung_device_returns() {
    run("hung", 1, "in-order", 1, Some("hang:0:8"), &["leak", "use-after-free", "deadlock"]);
}

#[test]
fn an_nccl_before_2_24_is_refused() {
    let folder = std::env::temp_dir().join(format!("shardflow-old-nccl-{}", std::process::id()));
    let program = std::env::current_exe().expect("this program");
    let mut child = command(program, &folder, 1, "in-order", 1).expect("the software device");
    child.args(["--ignored", "--exact", "child"]).env(CASE, "old nccl").env("SOFTWARE_CUDA_NCCL", "22304");
    let output = child.output().expect("a child");
    std::fs::remove_dir_all(&folder).expect("a folder that the child created");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_stream_works_after_user_code_binds_another_context() {
    run("another context", 2, "random", 1, None, &[]);
}

#[test]
fn a_dropped_stream_keeps_its_memory_until_its_work_ends() {
    for (policy, _) in POLICIES {
        // The child may exit before its last thread has freed everything.
        run("dropped by a kernel", 1, policy, 1, None, &["leak"]);
        run("dropped by a notice", 1, policy, 1, None, &["leak"]);
    }
}

/// Counts driver calls per step. More steps must not add calls of other kinds.
#[test]
fn a_step_neither_allocates_nor_waits() {
    let calls = |steps: u64| run(&format!("steps {steps}"), 1, "in-order", 1, None, &[]).calls;
    let (short_run, long_run) = (calls(50), calls(150));
    let each = |name: &str| (long_run.get(name).unwrap_or(&0) - short_run.get(name).unwrap_or(&0)) as f64 / 100.0;
    let exact: Vec<(&str, f64)> =
        long_run.keys().map(|name| (name.as_str(), each(name))).filter(|(_, calls)| *calls != 0.0).collect();
    let known = ["cuCtxSetCurrent", "cuEventQuery", "cuEventRecord", "cuLaunchKernel", "cublasLtMatmul"];
    assert!(exact.iter().all(|(name, _)| known.contains(name)), "{exact:?}");
    // The three launches are norm, GELU and residual. The two events are for the signal and the end.
    let per_step = ["cuCtxSetCurrent", "cuLaunchKernel", "cublasLtMatmul", "cuEventRecord"].map(each);
    assert_eq!(per_step, [1.0, 3.0, 1.0, 2.0], "{exact:?}");
}

#[test]
fn fusing_launches_changes_only_the_number_of_kernels() {
    let reports = ["apart", "together", "checked"].map(|mode| run(&format!("pairs {mode}"), 1, "random", 5, None, &[]));
    // For three widths and two dtypes, the case runs six launches twice. Fusion saves three launches of the second run.
    assert_eq!(reports.each_ref().map(|report| report.calls["cuLaunchKernel"]), [72, 54, 72]);
    assert!(FUSED_KERNELS.iter().all(|name| reports[1].kernels.contains_key(*name)), "{:?}", reports[1].kernels);
    run("wrong pairs", 1, "random", 6, None, &[]);
}

/// Number of graphs that cuDNN runs in a case.
fn executions(case: &str, seed: u64) -> u64 {
    run(case, 1, "random", seed, None, &[]).calls.get("cudnnBackendExecute").copied().unwrap_or(0)
}

#[test]
fn attention_by_cudnn_and_by_shardflow_agree_up_to_rounding() {
    let [own, absent, ordered, any_order] =
        ["own", "absent", "ordered", "any order"].map(|kind| executions(&format!("attention {kind}"), 7));
    assert_eq!((own, absent), (0, 0));
    // Seven bf16 shapes have a depth divisible by 8. cuDNN runs the forward pass of all seven, and the backward pass of
    // the four shapes with aligned buffers.
    assert_eq!((ordered, any_order), (11, 11));
}

#[test]
fn attention_steps_create_no_new_plans() {
    let descriptors = |steps: u64| {
        let calls = run(&format!("attention steps {steps}"), 1, "in-order", 1, None, &[]).calls;
        assert_eq!(calls["cudnnBackendExecute"], 2 * steps);
        (calls["cudnnBackendCreateDescriptor"], calls["cudnnCreate"])
    };
    let ((short_run, _), (long_run, handles)) = (descriptors(5), descriptors(25));
    // Each execution creates one descriptor, which binds its addresses.
    assert_eq!((long_run - short_run, handles), (2 * 20, 1));
}
