//! Tests of lost devices, leaks, call counters, and ranks in separate threads.

use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUresult};
use cudarc::nccl::sys::{ncclDataType_t, ncclRedOp_t, ncclResult_t};
use shardflow_software_cuda::POLICIES;

use crate::api::Arg::{I, P};
use crate::api::{self, alloc, calls, event, filled, free, function, launch, pinned, stream, try_launch, wait};
use crate::{child, cuda, nccl};

/// In the child: device 1 dies at its third launch.
pub fn check_killed() {
    let mut devices = Vec::new();
    for device in 0..2 {
        api::use_device(device);
        let (module, s, x) = (api::module(), stream(), filled(&[1.0; 64]));
        devices.push((function(module, "add"), s, x));
    }
    let mut results = Vec::new();
    for _ in 0..6 {
        for (device, (add, s, x)) in devices.iter().enumerate() {
            api::use_device(device as i32);
            let launched = try_launch(*add, (1, 64), 0, *s, &[P(*x), P(*x), P(*x), I(64)]);
            // SAFETY: the stream comes from the driver.
            let waited = unsafe { sys::cuStreamSynchronize(*s) };
            results.push((device, launched, waited));
        }
    }
    let lost = CUresult::CUDA_ERROR_LAUNCH_FAILED;
    let of = |device| results.iter().filter(move |a| a.0 == device).map(|a| (a.1, a.2)).collect::<Vec<_>>();
    assert_eq!(of(0), [(CUresult::CUDA_SUCCESS, CUresult::CUDA_SUCCESS); 6]);
    assert_eq!(
        of(1)[..3],
        [
            (CUresult::CUDA_SUCCESS, CUresult::CUDA_SUCCESS),
            (CUresult::CUDA_SUCCESS, CUresult::CUDA_SUCCESS),
            (CUresult::CUDA_SUCCESS, lost)
        ]
    );
    assert_eq!(of(1)[3..], [(lost, lost); 3]);
    let mut address = 0;
    // SAFETY: the pointer points to a local variable.
    assert_eq!(unsafe { sys::cuMemAlloc_v2(&mut address, 4) }, lost, "a lost device keeps its error");
}

/// In the child: the second launch never ends. Other streams must continue.
pub fn check_hung() {
    api::use_device(0);
    let (add, s, other, x, e) = (function(api::module(), "add"), stream(), stream(), filled(&[1.0; 64]), event());
    let add = |s| launch(add, (1, 64), 0, s, &[P(x), P(x), P(x), I(64)]);
    add(s);
    wait(s);
    add(s);
    cuda!(cuEventRecord(e, s));
    cuda!(cuMemsetD8Async(alloc(64), 0, 256, other));
    wait(other);
    let until = Instant::now() + Duration::from_millis(50);
    while Instant::now() < until {
        // SAFETY: the event comes from the driver.
        assert_eq!(unsafe { sys::cuEventQuery(e) }, CUresult::CUDA_ERROR_NOT_READY);
    }
    // SAFETY: the stream comes from the driver.
    assert_eq!(
        unsafe { sys::cuStreamSynchronize(s) },
        CUresult::CUDA_ERROR_LAUNCH_TIMEOUT,
        "the call returns after SOFTWARE_CUDA_HANG_MS"
    );
}

/// In the child: leaks one object of each kind.
pub fn check_leaks() {
    api::use_device(0);
    let made = (stream(), event(), alloc(10), pinned(10), api::comms(1));
    assert_eq!(api::control::<extern "C" fn() -> u64>("software_cuda_leak_count")(), 5);
    free(alloc(3));
    std::mem::forget(made);
}

/// In the child: counts the calls of five launches, a wait for an event, and a free.
pub fn check_counters() {
    api::use_device(0);
    let (add, s, x) = (function(api::module(), "add"), stream(), filled(&[1.0; 64]));
    let classes = ["launches", "allocations", "synchronisations", "event-tracking"];
    let before = classes.map(calls);
    for _ in 0..5 {
        launch(add, (1, 64), 0, s, &[P(x), P(x), P(x), I(64)]);
    }
    let after = classes.map(calls);
    assert_eq!(after.iter().zip(before).map(|(a, b)| a - b).collect::<Vec<_>>(), [5, 0, 0, 0]);
    wait(s);
    api::order(s, s);
    free(x);
    let (launches, allocations) = (calls("cuLaunchKernel"), calls("allocations") - after[1]);
    assert_eq!((launches, allocations), (5, 0));
    assert_eq!(calls("event-tracking") - after[3], 4, "a step creates, records, awaits and destroys an event");
    assert_eq!(calls("cuMemFree_v2"), 1);
    cuda!(cuStreamDestroy_v2(s));
}

/// In the child: four ranks, each in its own thread, create a communicator and use it.
pub fn check_rank_threads() {
    const RANKS: usize = 4;
    let mut id = cudarc::nccl::sys::ncclUniqueId { internal: [0; 128] };
    nccl!(ncclGetUniqueId(&mut id));
    let sums: Vec<f32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..RANKS).map(|rank| scope.spawn(move || one_rank(id, rank))).collect();
        threads.into_iter().map(|t| t.join().expect("a rank succeeds")).collect()
    });
    // Ten rounds of averaging 1, 2, 3 and 4 give 2.5.
    assert_eq!(sums, [2.5; RANKS]);

    fn one_rank(id: cudarc::nccl::sys::ncclUniqueId, rank: usize) -> f32 {
        api::use_device(rank as i32);
        let (s, x, y) = (stream(), filled(&[rank as f32 + 1.0; 64]), alloc(64));
        let comm = api::join_ranks(id, RANKS, rank);
        api::wait_for_call(comm, ncclResult_t::ncclInProgress);
        let (mut count, mut own) = (0, 0);
        nccl!(ncclCommCount(comm, &mut count));
        nccl!(ncclCommUserRank(comm, &mut own));
        assert_eq!((count, own), (RANKS as i32, rank as i32));
        use cudarc::nccl::sys::{ncclAllGather, ncclAllReduce, ncclGroupEnd, ncclReduceScatter};
        let (f32_type, average, max) = (ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclAvg, ncclRedOp_t::ncclMax);
        for _ in 0..10 {
            // SAFETY: the addresses are of device memory that is long enough; handles come from the libraries.
            api::wait_for_call(comm, unsafe { ncclAllReduce(x as _, x as _, 64, f32_type, average, comm, s.cast()) });
            // SAFETY: as above.
            api::wait_for_call(comm, unsafe { ncclReduceScatter(x as _, y as _, 16, f32_type, max, comm, s.cast()) });
            // SAFETY: as above.
            api::wait_for_call(comm, unsafe { ncclAllGather(y as _, x as _, 16, f32_type, comm, s.cast()) });
        }
        let (next, before) = ((rank + 1) % RANKS, (rank + RANKS - 1) % RANKS);
        nccl!(ncclGroupStart());
        nccl!(ncclSend(x as _, 64, f32_type, next as i32, comm, s.cast()));
        nccl!(ncclRecv(y as _, 64, f32_type, before as i32, comm, s.cast()));
        // SAFETY: this call ends the group that was started above.
        api::wait_for_call(comm, unsafe { ncclGroupEnd() });
        let value = api::read(y, 64, s)[63];
        nccl!(ncclCommFinalize(comm));
        nccl!(ncclCommDestroy(comm));
        free(x);
        free(y);
        cuda!(cuStreamDestroy_v2(s));
        value
    }
}

#[test]
fn a_killed_device_returns_its_error() {
    let (output, report) = child::start("killed", 2, "random", 1, &[("SOFTWARE_CUDA_FAULT", "kill:1:3")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(report.findings, []);
}

#[test]
fn a_hung_launch_blocks_only_its_stream() {
    let settings = [("SOFTWARE_CUDA_FAULT", "hang:0:2"), ("SOFTWARE_CUDA_HANG_MS", "100")];
    let (output, report) = child::start("hung", 1, "random", 1, &settings);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(report.findings, []);
}

#[test]
fn leaks_are_reported_at_exit() {
    let (output, report) = child::start("leaks", 1, "lazy", 1, &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let kinds: Vec<&str> = report.findings.iter().map(|f| f.kind.as_str()).collect();
    assert_eq!(kinds, ["leak"; 5], "{:?}", report.findings);
    assert_eq!(report.classes["allocations"], 3);
}

#[test]
fn calls_are_counted() {
    child::expect_clean("counters", 1, "random", 1);
}

#[test]
fn ranks_in_separate_threads_share_a_communicator() {
    for (policy, _) in POLICIES {
        for seed in 0..4 {
            child::expect_clean("rank threads", 4, policy, seed);
        }
    }
}
