//! Tests streams, events, signals, memory, and failures that end only one program.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use parking_lot::Mutex;

use super::harness::{self, Notifications, Outcome, Report, TIMEOUT, run_program, wait};
use crate::clock::Stamped;
use crate::device::Device;
use crate::error::{KernelError, Result};
use crate::memory::Arena;
use crate::op::{Buffer, CpuArgs, CpuSlice, CpuSliceMut, CustomKernel, Launch, Op, Program};
use crate::stream::{Notification, Stream};
use crate::tensor::{DType, HostTensor, Region};

#[derive(Debug)]
enum TestKernel {
    /// A kernel that waits until the test opens the gate.
    Gate(Mutex<Receiver<Stamped<()>>>),
    Panics,
    /// A kernel that adds an integer and a float.
    Mixed,
}

impl CustomKernel for TestKernel {
    fn name(&self) -> &str {
        match self {
            TestKernel::Gate(_) => "gate",
            TestKernel::Panics => "panics",
            TestKernel::Mixed => "mixed",
        }
    }

    fn run_cpu(&self, mut args: CpuArgs<'_>) -> Result<()> {
        let failed = |message: &str| KernelError::Custom { name: self.name().to_owned(), message: message.to_owned() };
        match self {
            TestKernel::Gate(opened) => {
                opened.lock().recv_timeout(TIMEOUT).map(Stamped::open).map_err(|_| failed("the gate stays closed"))
            }
            TestKernel::Panics => panic!("on purpose"),
            TestKernel::Mixed => {
                if let ([a, b], [y]) = (&args.reads[..], &mut args.writes[..])
                    && let (CpuSlice::F32(a), CpuSlice::I32(b), CpuSliceMut::F32(y)) = (&a.data, &b.data, &mut y.data)
                {
                    y[0] = a[0] + b[0] as f32;
                    return Ok(());
                }
                Err(failed("unexpected arguments"))
            }
        }
    }
}

fn gate() -> (Sender<Stamped<()>>, Launch) {
    let (open, receiver) = channel();
    (open, launch(Op::Custom(Arc::new(TestKernel::Gate(Mutex::new(receiver)))), &[], &[]))
}

fn floats(base: usize, offset: usize, shape: &[usize]) -> Buffer {
    Buffer { base, offset, shape: shape.to_vec(), dtype: DType::F32 }
}

fn launch(op: Op, reads: &[Buffer], writes: &[Buffer]) -> Launch {
    harness::launch(op, reads.to_vec(), writes.to_vec())
}

fn fill(value: f32, buffer: Buffer) -> Launch {
    launch(Op::Fill { value }, &[], &[buffer])
}

type Check = fn(&Device) -> Outcome;

pub(super) fn run(report: &mut Report, device: &Device) {
    let checks: [(&str, Check); 9] = [
        ("stream order", order),
        ("events", events),
        ("signals", signals),
        ("finite", finite),
        ("failures of single programs", failures),
        ("invalid buffers", invalid_buffers),
        ("custom kernels", custom),
        ("memory", memory),
        ("staging memory", staging),
    ];
    for (check, f) in checks {
        if let Err(what) = f(device) {
            report.fail(check, what);
        }
    }
}

fn make(device: &Device, bytes: usize) -> Outcome<(Stream, Arena)> {
    Ok((device.stream("conformance", device.threads_per_stream())?, device.arena(bytes)?))
}

fn expect_floats(arena: &Arena, offset: usize, expected: &[f32]) -> Outcome {
    let got = arena.read_host(offset, &[expected.len()], DType::F32)?;
    if got.as_f32() == Some(expected) { Ok(()) } else { Err(format!("expected {expected:?}, got {got:?}").into()) }
}

fn submit(stream: &Stream, arena: &Arena, launches: Vec<Launch>, signals: Vec<(usize, u32)>) -> Result<Notifications> {
    harness::submit(stream, Program { name: "streams".to_owned(), launches, signals }, &[arena], false)
}

fn expect_next(notifications: &Notifications, expected: impl IntoIterator<Item = Notification>) -> Outcome {
    for expected in expected {
        let got = notifications.recv_timeout(TIMEOUT)?;
        ensure(got == expected, &format!("expected {expected:?}, got {got:?}"))?;
    }
    Ok(())
}

fn ensure(holds: bool, what: &str) -> Outcome {
    if holds { Ok(()) } else { Err(what.into()) }
}

/// Tests that submissions and their launches run in order, and that `synchronize` waits for all of them.
fn order(device: &Device) -> Outcome {
    let (stream, arena) = make(device, 128)?;
    let mut ends = Vec::new();
    for i in 0..50 {
        let launches = vec![
            launch(Op::Add, &[floats(0, 0, &[4]), floats(0, 64, &[4])], &[floats(0, 0, &[4])]),
            fill((i + 1) as f32, floats(0, 64, &[4])),
        ];
        ends.push(submit(&stream, &arena, launches, vec![])?);
    }
    stream.synchronize()?;
    for end in &ends {
        ensure(end.recv_timeout(Duration::ZERO) == Ok(Notification::Done), "synchronize returned before the end")?;
    }
    expect_floats(&arena, 0, &[1225.0; 4])
}

/// Tests that work after a wait for another stream's event starts only once the event is set.
fn events(device: &Device) -> Outcome {
    let (first, arena) = make(device, 128)?;
    let (second, _) = make(device, 0)?;
    let (open, wait_for_gate) = gate();
    let producer = submit(&first, &arena, vec![wait_for_gate, fill(3.0, floats(0, 0, &[2]))], vec![])?;
    let event = first.record();
    second.wait_for(&event)?;
    let copy = launch(Op::Copy, &[floats(0, 0, &[2])], &[floats(0, 64, &[2])]);
    let consumer = submit(&second, &arena, vec![copy], vec![])?;
    let after = second.record();
    ensure(!event.query() && !after.query(), "an event was set before the earlier work of its stream finished")?;
    ensure(consumer.recv_timeout(Duration::ZERO).is_err(), "work after an event did not wait")?;
    open.send(Stamped::new(()))?;
    wait(&producer)?;
    wait(&consumer)?;
    after.synchronize();
    ensure(event.query() && after.query(), "an event was not set")?;
    expect_floats(&arena, 64, &[3.0, 3.0])
}

/// Tests that a signal is sent after the launches before it have finished, and before later launches finish.
fn signals(device: &Device) -> Outcome {
    let (stream, arena) = make(device, 64)?;
    let (open, wait_for_gate) = gate();
    let launches = vec![fill(1.0, floats(0, 0, &[1])), wait_for_gate, fill(2.0, floats(0, 0, &[1]))];
    let notifications = submit(&stream, &arena, launches, vec![(0, 7), (1, 8), (1, 9), (3, 10)])?;
    expect_next(&notifications, [7, 8, 9].map(Notification::Signal))?;
    // Nothing has been written, because the gate is closed.
    expect_floats(&arena, 0, &[1.0])?;
    open.send(Stamped::new(()))?;
    expect_next(&notifications, [Notification::Signal(10), Notification::Done])?;
    ensure(notifications.recv_timeout(TIMEOUT).is_err(), "a notification arrived after the end")?;
    expect_floats(&arena, 0, &[2.0])
}

/// Tests that, with Inf/NaN checks enabled, a stream reports only a submission's first write that contains Inf or NaN.
fn finite(device: &Device) -> Outcome {
    let (stream, arena) = make(device, 64)?;
    let (x, y) = (|| floats(0, 0, &[2]), || floats(0, 8, &[2]));
    let one = Region { start: vec![0], size: vec![1] };
    let region = Op::CopyRegion { src: one.clone(), dst: one };
    let bad = |value| vec![fill(1.0, y()), fill(value, x()), launch(Op::Copy, &[x()], &[floats(0, 16, &[2])])];
    let mixed = vec![
        // Elements outside the box keep earlier values. The maximum of an empty row is -Inf, which is not an error.
        launch(region, &[y()], &[x()]),
        launch(Op::RowMax, &[floats(0, 24, &[2, 0])], &[floats(0, 24, &[2])]),
        launch(Op::Copy, &[x()], &[floats(0, 16, &[2])]),
    ];
    for (on, launches, expected) in [
        (true, bad(2.0), None),
        (true, bad(f32::NEG_INFINITY), Some((1, 2))),
        (false, bad(f32::NAN), None),
        (true, mixed, Some((2, 1))),
    ] {
        stream.check_finite(on)?;
        let notifications = submit(&stream, &arena, launches, vec![])?;
        let found = |(launch, elements)| Notification::NotFinite { launch, write: 0, elements };
        expect_next(&notifications, expected.map(found).into_iter().chain([Notification::Done]))?;
    }
    Ok(())
}

/// Tests that a kernel that panics ends only its own program.
fn failures(device: &Device) -> Outcome {
    let (stream, arena) = make(device, 64)?;
    let bad = vec![
        fill(1.0, floats(0, 0, &[1])),
        launch(Op::Custom(Arc::new(TestKernel::Panics)), &[], &[]),
        fill(2.0, floats(0, 0, &[1])),
    ];
    let first = submit(&stream, &arena, bad, vec![(1, 1), (2, 2)])?;
    let copy = vec![launch(Op::Copy, &[floats(0, 0, &[1])], &[floats(0, 4, &[1])])];
    let second = submit(&stream, &arena, copy, vec![])?;
    let [launch, program, message] = ["1 (panics)", "streams", "on purpose"].map(str::to_owned);
    let panic = KernelError::Panic { launch, program, message };
    expect_next(&first, [Notification::Signal(1), Notification::Failed(panic)])?;
    ensure(first.recv_timeout(TIMEOUT).is_err(), "a notification arrived after the failure")?;
    wait(&second).map_err(|error| format!("the next program failed too: {error}"))?;
    expect_floats(&arena, 0, &[1.0, 1.0])
}

/// Tests that buffers outside of their bases cause an error, and never a crash.
fn invalid_buffers(device: &Device) -> Outcome {
    let (stream, arena) = make(device, 64)?;
    let clip = Op::ClipScale { max_norm: 1.0 };
    let cases = [
        ("beyond the end", fill(0.0, floats(0, 4, &[16]))),
        ("an overflow", fill(0.0, floats(0, usize::MAX - 3, &[1]))),
        ("a huge shape", fill(0.0, floats(0, 0, &[usize::MAX, 8]))),
        ("an unknown base", fill(0.0, floats(1, 0, &[1]))),
        ("a misaligned offset", fill(0.0, floats(0, 2, &[1]))),
        ("an overlap", launch(Op::Copy, &[floats(0, 0, &[4])], &[floats(0, 4, &[4])])),
        ("two writes that overlap", launch(clip, &[floats(0, 8, &[1])], &[floats(0, 0, &[]), floats(0, 0, &[])])),
    ];
    for (what, launch) in cases {
        let result = run_program(&stream, vec![launch], &[&arena], false);
        ensure(matches!(result, Err(KernelError::Arguments { .. })), &format!("{what} returned {result:?}"))?;
    }
    let outside = arena.write_host(32, &HostTensor::f32(&[9], vec![0.0; 9])).is_err();
    ensure(outside && arena.read_host(64, &[1], DType::F32).is_err(), "a host copy outside of the arena was accepted")?;
    expect_floats(&arena, 0, &[0.0; 16])
}

fn custom(device: &Device) -> Outcome {
    let (stream, arena) = make(device, 64)?;
    arena.write_host(0, &HostTensor::f32(&[1], vec![1.5]))?;
    arena.write_host(4, &HostTensor::i32(&[1], vec![2]))?;
    let integer = Buffer { dtype: DType::I32, ..floats(0, 4, &[1]) };
    let mixed = launch(Op::Custom(Arc::new(TestKernel::Mixed)), &[floats(0, 0, &[1]), integer], &[floats(0, 8, &[1])]);
    run_program(&stream, vec![mixed], &[&arena], false)?;
    expect_floats(&arena, 8, &[3.5])
}

/// Tests that arenas are counted and zeroed, that submissions keep them alive, and that streams allocate as documented.
fn memory(device: &Device) -> Outcome {
    let bytes_before = device.bytes_allocated();
    let (stream, arena) = make(device, 1 << 20)?;
    let (bytes, count) = ((1 << 20) + device.kind().stream_bytes(), device.allocation_count());
    ensure(device.bytes_allocated() == bytes_before + bytes, "bytes_allocated is not the sum of arena and stream")?;
    ensure(device.bytes_peak() >= device.bytes_allocated(), "bytes_peak is below bytes_allocated")?;
    expect_floats(&arena, 0, &[0.0; 1024])?;
    for _ in 0..20 {
        run_program(&stream, vec![fill(1.0, floats(0, 0, &[1000]))], &[&arena], false)?;
    }
    ensure(device.allocation_count() == count, "running a program allocated device memory")?;
    let (open, wait_for_gate) = gate();
    let notifications = submit(&stream, &arena, vec![wait_for_gate, fill(2.0, floats(0, 0, &[1000]))], vec![])?;
    drop(arena);
    ensure(device.bytes_allocated() == bytes_before + bytes, "an arena was freed during a submission")?;
    open.send(Stamped::new(()))?;
    wait(&notifications)?;
    drop(stream);
    ensure(device.bytes_allocated() == bytes_before, "an arena was not freed after its last use")?;
    ensure(device.arena(usize::MAX / 2).is_err(), "an allocation of excessive size succeeded")
}

/// Tests copies of regions of host tensors to the device and back, through staging memory. Inf/NaN checks are enabled,
/// but must not make a copy fail.
fn staging(device: &Device) -> Outcome {
    let (stream, arena) = make(device, 256)?;
    let staging = device.staging(256)?;
    stream.check_finite(true)?;
    let values: Vec<f32> = (0..12).map(|index| if index == 5 { f32::INFINITY } else { index as f32 }).collect();
    let integers = HostTensor::i32(&[3, 4], (0..12).collect());
    let region = Region { start: vec![1, 1], size: vec![2, 3] };
    for tensor in [HostTensor::f32(&[3, 4], values.clone()), integers, HostTensor::bf16(&[3, 4], &values)] {
        let dtype = tensor.dtype();
        let buffer = |base, offset| Buffer { base, offset, shape: region.size.clone(), dtype };
        staging.write_region(64, &tensor, &region)?;
        let feed = launch(Op::Copy, &[buffer(1, 64)], &[buffer(0, 128)]);
        let fetch = launch(Op::Copy, &[buffer(0, 128)], &[buffer(1, 192)]);
        run_program(&stream, vec![feed, fetch], &[&arena, &staging], false)?;
        let got = staging.read_host(192, &region.size, dtype)?;
        let bytes: Vec<u8> = region
            .runs(&tensor.shape)
            .into_iter()
            .flat_map(|run| tensor.as_bytes()[run.start * dtype.bytes()..run.end * dtype.bytes()].to_vec())
            .collect();
        ensure(got.as_bytes() == bytes, &format!("{dtype:?}: expected {bytes:?}, got {got:?}"))?;
        let outside = Region { start: vec![2, 1], ..region.clone() };
        ensure(staging.write_region(0, &tensor, &outside).is_err(), "a region outside of its tensor was accepted")?;
        ensure(staging.write_region(248, &tensor, &region).is_err(), "a write outside of the arena was accepted")?;
    }
    Ok(())
}
