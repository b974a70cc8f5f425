//! Planted mistakes with streams, events, host threads and memory.

use std::sync::mpsc;

use crate::api::Arg::{I, L, P};
use crate::api::{self, alloc, event, filled, free, host_access, launch, order, pinned, stream, wait};
use crate::bugs::{Bug, LoadedKernels, run_all};
use crate::cuda;

const N: usize = 1000;
const DIMS: (u32, u32) = (4, 256);

/// The mistakes.
pub const BUGS: &[Bug] = &[
    Bug { name: "read with no wait for the write", kinds: &["race"], run: read_after_write },
    Bug { name: "write with no wait for the read", kinds: &["race"], run: write_after_read },
    Bug { name: "write with no wait for the write", kinds: &["race"], run: write_after_write },
    Bug { name: "last words read with no wait for the write", kinds: &["race"], run: few_read },
    Bug { name: "last words written with no wait for the read", kinds: &["race"], run: few_written },
    Bug { name: "wait for an event recorded too early", kinds: &["race"], run: stale_event },
    Bug { name: "third stream writes, but waits for only one of two readers", kinds: &["race"], run: two_readers },
    Bug { name: "freed while another stream reads", kinds: &["race", "use-after-free"], run: early_free },
    Bug { name: "used after its free", kinds: &["use-after-free"], run: late_use },
    Bug { name: "freed twice", kinds: &["bad-free"], run: double_free },
    Bug { name: "allocated on one stream, used on another", kinds: &["race"], run: early_use },
    Bug { name: "kernel past the end", kinds: &["bounds"], run: kernel_bounds },
    Bug { name: "copy past the end", kinds: &["bounds"], run: copy_bounds },
    Bug { name: "kernel into another allocation", kinds: &["bounds"], run: stray },
    Bug { name: "kernel into the next slot of an arena", kinds: &["bounds"], run: slots },
    Bug { name: "16 bytes at an odd address", kinds: &["alignment"], run: misaligned },
    Bug { name: "read of uninitialised memory", kinds: &["uninitialised"], run: uninitialised },
    Bug { name: "message sent at launch", kinds: &["race"], run: early_message },
    Bug { name: "message without its clock", kinds: &["race"], run: message_without_clock },
    Bug { name: "host reads before the copy has finished", kinds: &["race"], run: early_host_read },
    Bug { name: "host overwrites the source of a copy", kinds: &["race"], run: early_host_write },
    Bug { name: "host overwrites the source of a copy without recording it", kinds: &["race"], run: silent_host_write },
    Bug { name: "pinned memory freed under a copy", kinds: &["use-after-free"], run: pinned_free },
    Bug { name: "stream that ignores the NULL stream", kinds: &["race"], run: null_stream },
    Bug { name: "peer memory without access to it", kinds: &["peer"], run: peer },
    Bug { name: "copy between devices from a pool", kinds: &["staged"], run: staged },
    Bug { name: "wait for an event never recorded", kinds: &["misuse"], run: never_recorded },
    Bug { name: "host function that waits for the device", kinds: &["misuse"], run: waiting_callback },
];

/// In the child: runs all programs of this file.
pub fn check() {
    run_all(BUGS, 2);
    let leaks = api::control::<extern "C" fn() -> u64>("software_cuda_leak_count")();
    assert_eq!(leaks, 0, "the programs leak objects");
}

/// Inputs, an output and two streams.
struct Fixture {
    s: [cudarc::driver::sys::CUstream; 2],
    a: u64,
    b: u64,
    out: u64,
}

impl Fixture {
    fn new() -> Fixture {
        Fixture { s: [stream(), stream()], a: filled(&[1.0; N]), b: filled(&[2.0; N]), out: alloc(N) }
    }

    fn add(&self, loaded: &LoadedKernels, on: usize, out: u64, x: u64, y: u64) {
        launch(loaded.kernel("add"), DIMS, 0, self.s[on], &[P(out), P(x), P(y), I(N as i32)]);
    }

    fn close(self) {
        for s in self.s {
            wait(s);
            cuda!(cuStreamDestroy_v2(s));
        }
        for address in [self.a, self.b, self.out] {
            free(address);
        }
    }
}

fn read_after_write(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    let out = alloc(N);
    d.add(loaded, 0, d.out, d.a, d.b);
    if !planted {
        order(d.s[0], d.s[1]);
    }
    d.add(loaded, 1, out, d.out, d.a);
    d.close();
    free(out);
}

fn write_after_read(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    d.add(loaded, 0, d.out, d.a, d.b);
    if !planted {
        order(d.s[0], d.s[1]);
    }
    cuda!(cuMemsetD8Async(d.a, 0, N * 4, d.s[1]));
    d.close();
}

fn write_after_write(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    d.add(loaded, 0, d.out, d.a, d.b);
    if !planted {
        order(d.s[0], d.s[1]);
    }
    cuda!(cuMemsetD32Async(d.out, 0, N, d.s[1]));
    d.close();
}

/// Only the accesses to the last words of a buffer conflict. The kernel's quick check must detect this conflict,
/// because the full check at the kernel's first access sees only the first words.
fn few_read(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    cuda!(cuMemsetD32Async(d.a + 4 * (N as u64 - 3), 0, 3, d.s[0]));
    if !planted {
        order(d.s[0], d.s[1]);
    }
    d.add(loaded, 1, d.out, d.a, d.b);
    d.close();
}

fn few_written(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    cuda!(cuMemcpyDtoDAsync_v2(d.out, d.a + 4 * (N as u64 - 3), 12, d.s[0]));
    if !planted {
        order(d.s[0], d.s[1]);
    }
    d.add(loaded, 1, d.a, d.b, d.b);
    d.close();
}

fn stale_event(loaded: &LoadedKernels, planted: bool) {
    let (d, out, e) = (Fixture::new(), alloc(N), event());
    cuda!(cuEventRecord(e, d.s[0]));
    d.add(loaded, 0, d.out, d.a, d.b);
    if !planted {
        cuda!(cuEventRecord(e, d.s[0]));
    }
    cuda!(cuStreamWaitEvent(d.s[1], e, 0));
    d.add(loaded, 1, out, d.out, d.a);
    d.close();
    free(out);
    cuda!(cuEventDestroy_v2(e));
}

fn two_readers(loaded: &LoadedKernels, planted: bool) {
    let (d, out, third) = (Fixture::new(), alloc(N), stream());
    d.add(loaded, 0, d.out, d.a, d.a);
    d.add(loaded, 1, out, d.a, d.a);
    order(d.s[0], third);
    if !planted {
        order(d.s[1], third);
    }
    cuda!(cuMemsetD8Async(d.a, 0, N * 4, third));
    wait(third);
    cuda!(cuStreamDestroy_v2(third));
    d.close();
    free(out);
}

fn early_free(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    let mut address = 0;
    cuda!(cuMemAllocAsync(&mut address, N * 4, d.s[0]));
    d.add(loaded, 0, address, d.a, d.b);
    order(d.s[0], d.s[1]);
    d.add(loaded, 1, d.out, address, d.a);
    if !planted {
        order(d.s[1], d.s[0]);
    }
    cuda!(cuMemFreeAsync(address, d.s[0]));
    d.close();
}

fn late_use(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    let mut address = 0;
    cuda!(cuMemAllocAsync(&mut address, N * 4, d.s[0]));
    d.add(loaded, 0, address, d.a, d.b);
    if planted {
        cuda!(cuMemFreeAsync(address, d.s[0]));
    }
    d.add(loaded, 0, d.out, address, d.a);
    if !planted {
        cuda!(cuMemFreeAsync(address, d.s[0]));
    }
    d.close();
}

fn double_free(_: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    let mut address = 0;
    cuda!(cuMemAllocAsync(&mut address, N * 4, d.s[0]));
    for _ in 0..1 + usize::from(planted) {
        cuda!(cuMemFreeAsync(address, d.s[0]));
    }
    d.close();
}

fn early_use(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    let mut address = 0;
    cuda!(cuMemAllocAsync(&mut address, N * 4, d.s[0]));
    if !planted {
        order(d.s[0], d.s[1]);
    }
    d.add(loaded, 1, address, d.a, d.b);
    order(d.s[1], d.s[0]);
    cuda!(cuMemFreeAsync(address, d.s[0]));
    d.close();
}

fn kernel_bounds(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    let count = N + usize::from(planted);
    launch(loaded.kernel("add"), DIMS, 0, d.s[0], &[P(d.out), P(d.a), P(d.b), I(count as i32)]);
    d.close();
}

fn copy_bounds(_: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    cuda!(cuMemcpyDtoDAsync_v2(d.out, d.a, N * 4 + 2 * usize::from(planted), d.s[0]));
    d.close();
}

fn stray(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    let offset = if planted { (d.out as i64 - d.a as i64) / 4 } else { 7 };
    launch(loaded.kernel("stray"), (1, 1), 0, d.s[0], &[P(d.a), L(offset)]);
    d.close();
}

fn slots(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    let arena = alloc(1024);
    let name = api::control::<extern "C" fn(u64, u64) -> u32>("software_cuda_name_region");
    assert_eq!([name(arena, 1024), name(arena + 1024, 1024)], [1, 1]);
    launch(loaded.kernel("stray"), (1, 1), 0, d.s[0], &[P(arena), L(255 + i64::from(planted))]);
    launch(loaded.kernel("stray"), (1, 1), 0, d.s[0], &[P(arena + 1024 + 512), L(-128)]);
    d.close();
    free(arena);
}

fn misaligned(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    let from = d.a + 4 * u64::from(planted);
    launch(loaded.kernel("copy_wide"), (1, 64), 0, d.s[0], &[P(d.out), P(from), I(8)]);
    d.close();
}

fn uninitialised(loaded: &LoadedKernels, planted: bool) {
    let (d, fresh) = (Fixture::new(), alloc(N));
    cuda!(cuMemsetD8Async(fresh, 0, N * 4 - usize::from(planted), d.s[0]));
    d.add(loaded, 0, d.out, fresh, d.a);
    d.close();
    free(fresh);
}

/// A producer and a consumer have separate threads and streams, and the producer sends a message to the consumer. The
/// arguments select whether the producer sends the message at launch or after its work has finished, and whether the
/// message carries the producer's clock token.
fn messages(loaded: &LoadedKernels, sends_at_launch: bool, carries_clock: bool) {
    let (d, out) = (Fixture::new(), alloc(N));
    let (add, start) = (loaded.kernel("add") as usize, api::capture());
    let (s, a, b, mid) = (d.s.map(|s| s as usize), d.a, d.b, d.out);
    let (sender, receiver) = mpsc::channel::<u64>();
    let token = move || if carries_clock { api::capture() } else { 0 };
    let launch_add = move |on: usize, out, x, y| {
        launch(add as _, DIMS, 0, s[on] as _, &[P(out), P(x), P(y), I(N as i32)]);
    };
    let ends: Vec<u64> = std::thread::scope(|scope| {
        let producer = scope.spawn(move || {
            api::use_device(0);
            api::join(start);
            launch_add(0, mid, a, b);
            let e = event();
            cuda!(cuEventRecord(e, s[0] as _));
            if !sends_at_launch {
                poll(e);
            }
            sender.send(token()).unwrap();
            poll(e);
            cuda!(cuEventDestroy_v2(e));
            api::capture()
        });
        let consumer = scope.spawn(move || {
            api::use_device(0);
            api::join(start);
            api::join(receiver.recv().unwrap());
            launch_add(1, out, mid, a);
            wait(s[1] as _);
            api::capture()
        });
        [producer, consumer].map(|t| t.join().unwrap()).to_vec()
    });
    ends.into_iter().for_each(api::join);
    d.close();
    free(out);
}

/// Polls until an event has completed.
fn poll(e: cudarc::driver::sys::CUevent) {
    use cudarc::driver::sys::{CUresult, cuEventQuery};
    // SAFETY: the event comes from the driver.
    while unsafe { cuEventQuery(e) } == CUresult::CUDA_ERROR_NOT_READY {
        std::thread::yield_now();
    }
}

fn early_message(loaded: &LoadedKernels, planted: bool) {
    messages(loaded, planted, true);
}

fn message_without_clock(loaded: &LoadedKernels, planted: bool) {
    messages(loaded, false, !planted);
}

fn early_host_read(_: &LoadedKernels, planted: bool) {
    let (d, p) = (Fixture::new(), pinned(N));
    cuda!(cuMemcpyDtoHAsync_v2(p.cast(), d.a, N * 4, d.s[0]));
    if !planted {
        wait(d.s[0]);
    }
    host_access(p, N, false);
    wait(d.s[0]);
    cuda!(cuMemFreeHost(p.cast()));
    d.close();
}

fn early_host_write(_: &LoadedKernels, planted: bool) {
    let (d, p) = (Fixture::new(), pinned(N));
    host_access(p, N, true);
    cuda!(cuMemcpyHtoDAsync_v2(d.a, p.cast(), N * 4, d.s[0]));
    if !planted {
        wait(d.s[0]);
    }
    host_access(p, N, true);
    wait(d.s[0]);
    cuda!(cuMemFreeHost(p.cast()));
    d.close();
}

fn silent_host_write(_: &LoadedKernels, planted: bool) {
    let (d, p) = (Fixture::new(), pinned(N));
    let held = api::block_device(d.s[1]);
    cuda!(cuMemcpyHtoDAsync_v2(d.a, p.cast(), N * 4, d.s[0]));
    order(d.s[1], d.s[0]);
    cuda!(cuMemcpyHtoDAsync_v2(d.b, p.cast(), N * 4, d.s[0]));
    if planted {
        // SAFETY: the index is within the pinned memory.
        unsafe { p.add(3).write(5.0) };
    }
    drop(held);
    wait(d.s[0]);
    cuda!(cuMemFreeHost(p.cast()));
    d.close();
}

fn pinned_free(_: &LoadedKernels, planted: bool) {
    let (d, p) = (Fixture::new(), pinned(N));
    let held = api::block_device(d.s[1]);
    order(d.s[1], d.s[0]);
    cuda!(cuMemcpyHtoDAsync_v2(d.a, p.cast(), N * 4, d.s[0]));
    if planted {
        cuda!(cuMemFreeHost(p.cast()));
    }
    drop(held);
    wait(d.s[0]);
    if !planted {
        cuda!(cuMemFreeHost(p.cast()));
    }
    d.close();
}

fn null_stream(loaded: &LoadedKernels, planted: bool) {
    let d = Fixture::new();
    let mut s = std::ptr::null_mut();
    cuda!(cuStreamCreate(&mut s, u32::from(planted)));
    launch(loaded.kernel("add"), DIMS, 0, s, &[P(d.out), P(d.a), P(d.b), I(N as i32)]);
    cuda!(cuMemsetD8Async(d.out, 0, N * 4, std::ptr::null_mut()));
    launch(loaded.kernel("add"), DIMS, 0, s, &[P(d.a), P(d.out), P(d.b), I(N as i32)]);
    wait(s);
    cuda!(cuStreamDestroy_v2(s));
    d.close();
}

fn peer(loaded: &LoadedKernels, planted: bool) {
    // Peer access stays enabled after a run. The planted mistake therefore reads on the device that never enables it.
    let owner = if planted { 0 } else { 1 };
    api::use_device(owner);
    let there = filled(&[3.0; N]);
    let mut context = std::ptr::null_mut();
    cuda!(cuCtxGetCurrent(&mut context));
    api::use_device(1 - owner);
    if !planted {
        api::enable_peer_access(context);
    }
    let d = Fixture::new();
    d.add(loaded, 0, d.out, there, d.a);
    d.close();
    api::use_device(owner);
    free(there);
}

fn staged(_: &LoadedKernels, planted: bool) {
    let contexts = [0, 1].map(|device| {
        let mut context = std::ptr::null_mut();
        api::use_device(device);
        cuda!(cuCtxGetCurrent(&mut context));
        context
    });
    api::enable_peer_access(contexts[0]);
    let (s, mut from) = (stream(), 0);
    match planted {
        true => cuda!(cuMemAllocAsync(&mut from, N * 4, s)),
        false => cuda!(cuMemAlloc_v2(&mut from, N * 4)),
    }
    cuda!(cuMemsetD8Async(from, 0, N * 4, s));
    wait(s);
    api::use_device(0);
    api::enable_peer_access(contexts[1]);
    let (to, own) = (filled(&[0.0; N]), stream());
    cuda!(cuMemcpyPeerAsync(to, contexts[0], from, contexts[1], N * 4, own));
    wait(own);
    free(to);
    cuda!(cuStreamDestroy_v2(own));
    api::use_device(1);
    free(from);
    cuda!(cuStreamDestroy_v2(s));
}

fn never_recorded(_: &LoadedKernels, planted: bool) {
    let (d, e) = (Fixture::new(), event());
    if !planted {
        cuda!(cuEventRecord(e, d.s[0]));
    }
    cuda!(cuStreamWaitEvent(d.s[1], e, 0));
    d.close();
    cuda!(cuEventDestroy_v2(e));
}

fn waiting_callback(_: &LoadedKernels, planted: bool) {
    // SAFETY: the driver calls this function with the argument passed below.
    unsafe extern "C" fn function(stream: *mut std::ffi::c_void) {
        if !stream.is_null() {
            // SAFETY: the stream comes from the driver, which refuses this call.
            let code = unsafe { cudarc::driver::sys::cuStreamSynchronize(stream.cast()) };
            assert_eq!(code, cudarc::driver::sys::CUresult::CUDA_ERROR_NOT_PERMITTED);
        }
    }
    let d = Fixture::new();
    api::use_device(0);
    let data = if planted { d.s[1].cast() } else { std::ptr::null_mut() };
    cuda!(cuLaunchHostFunc(d.s[0], Some(function), data));
    d.close();
}
