//! Planted mistakes with collectives and messages.

use std::ptr::null_mut;

use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t};

use crate::api::{self, filled, free, order, stream};
use crate::bugs::{Bug, LoadedKernels, run_all};
use crate::{cuda, nccl};

const N: usize = 64;
const F32: ncclDataType_t = ncclDataType_t::ncclFloat32;
const SUM: ncclRedOp_t = ncclRedOp_t::ncclSum;

/// The mistakes.
pub const BUGS: &[Bug] = &[
    Bug { name: "collectives of different lengths", kinds: &["collective-mismatch"], run: lengths },
    Bug { name: "crossed collectives of one communicator", kinds: &["collective-mismatch"], run: kinds },
    Bug {
        name: "crossed communicators on one stream each",
        kinds: &["deadlock: streams wait for each other"],
        run: crossed,
    },
    Bug { name: "communicators in different orders on two devices", kinds: &["collective-order"], run: another_order },
    Bug { name: "a rank that never calls", kinds: &["deadlock: rank 1, which has not issued"], run: missing_rank },
    Bug {
        name: "messages that wait for each other",
        kinds: &["deadlock: streams wait for each other"],
        run: ungrouped_messages,
    },
    Bug { name: "one thread for two ranks without a group", kinds: &["ungrouped"], run: ungrouped },
    Bug { name: "collective reads unfinished data", kinds: &["race"], run: early_collective },
    Bug { name: "result of a collective read too early", kinds: &["race"], run: early_result },
    Bug { name: "sent buffer overwritten during the send", kinds: &["race"], run: early_overwrite },
    Bug { name: "another device's memory read before the collective", kinds: &["race"], run: before_collective },
    Bug { name: "stream continues while the call is in progress", kinds: &["race"], run: in_progress },
    Bug { name: "communicator aborted during a collective", kinds: &["aborted"], run: early_abort },
    Bug { name: "communicator used after its end", kinds: &["misuse"], run: closed },
];

/// In the child: runs all programs of this file.
pub fn check() {
    run_all(BUGS, 2);
}

/// Two devices, each with two streams, two buffers, and a rank in each of two communicators.
struct Pair {
    s: [[CUstream; 2]; 2],
    x: [[u64; 2]; 2],
    comms: [Vec<ncclComm_t>; 2],
}

impl Pair {
    fn new() -> Pair {
        let device = |d: i32| {
            api::use_device(d);
            ([stream(), stream()], [filled(&[d as f32 + 1.0; N]), filled(&[2.0; N])])
        };
        let ((s0, x0), (s1, x1)) = (device(0), device(1));
        Pair { s: [s0, s1], x: [x0, x1], comms: [api::comms(2), api::comms(2)] }
    }

    /// Sums buffer `index` of a device in place, as one rank of the all-reduce.
    fn sum(&self, device: usize, comm: usize, on: usize, index: usize, count: usize) {
        let (x, s) = (self.x[device][index], self.s[device][on]);
        nccl!(ncclAllReduce(x as _, x as _, count, F32, SUM, self.comms[comm][device], s.cast()));
    }

    /// Sums buffer `index` on both devices.
    fn sum_both(&self, comm: usize, on: usize, index: usize) {
        nccl!(ncclGroupStart());
        (0..2).for_each(|d| self.sum(d, comm, on, index, N));
        nccl!(ncclGroupEnd());
    }

    /// Waits for all work, ignoring errors, and destroys all objects.
    fn close(self) {
        let close = |comm: ncclComm_t, ends: bool| {
            // SAFETY: the communicator comes from the library and is destroyed once.
            let _ = unsafe {
                if ends { cudarc::nccl::sys::ncclCommDestroy(comm) } else { cudarc::nccl::sys::ncclCommAbort(comm) }
            };
        };
        let mut is_ok = true;
        for s in self.s.iter().flatten() {
            // SAFETY: the stream comes from the driver.
            let code = unsafe { cudarc::driver::sys::cuStreamSynchronize(*s) };
            is_ok &= code == cudarc::driver::sys::CUresult::CUDA_SUCCESS;
        }
        self.comms.iter().flatten().for_each(|c| close(*c, is_ok));
        for device in 0..2 {
            api::use_device(device as i32);
            self.s[device].iter().for_each(|s| cuda!(cuStreamDestroy_v2(*s)));
            self.x[device].into_iter().for_each(free);
        }
    }
}

fn lengths(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    nccl!(ncclGroupStart());
    p.sum(0, 0, 0, 0, N);
    p.sum(1, 0, 0, 0, N - usize::from(planted));
    nccl!(ncclGroupEnd());
    p.close();
}

fn kinds(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    let broadcast = |device: usize| {
        let (x, s) = (p.x[device][1], p.s[device][0]);
        nccl!(ncclBroadcast(x as _, x as _, N, F32, 0, p.comms[0][device], s.cast()));
    };
    nccl!(ncclGroupStart());
    p.sum(0, 0, 0, 0, N);
    broadcast(0);
    if planted {
        broadcast(1);
        p.sum(1, 0, 0, 0, N);
    } else {
        p.sum(1, 0, 0, 0, N);
        broadcast(1);
    }
    nccl!(ncclGroupEnd());
    p.close();
}

fn crossed(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    // To NCCL, groups of one call each look like calls from separate host threads.
    let issue = |device: usize, comm: usize| {
        let other = if comm == 0 { 0 } else { 1 };
        p.sum(device, comm, 0, other, N);
    };
    let in_thread = |device: usize, comms: [usize; 2]| {
        nccl!(ncclGroupStart());
        issue(device, comms[0]);
        nccl!(ncclGroupEnd());
        nccl!(ncclGroupStart());
        issue(device, comms[1]);
        nccl!(ncclGroupEnd());
    };
    let order = if planted { [1, 0] } else { [0, 1] };
    if planted {
        in_thread(0, [0, 1]);
        in_thread(1, order);
    } else {
        p.sum_both(0, 0, 0);
        p.sum_both(1, 0, 1);
    }
    p.close();
}

fn another_order(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    nccl!(ncclGroupStart());
    p.sum(0, 0, 0, 0, N);
    p.sum(0, 1, 1, 1, N);
    if planted {
        p.sum(1, 1, 1, 1, N);
        p.sum(1, 0, 0, 0, N);
    } else {
        p.sum(1, 0, 0, 0, N);
        p.sum(1, 1, 1, 1, N);
    }
    nccl!(ncclGroupEnd());
    p.close();
}

fn missing_rank(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    nccl!(ncclGroupStart());
    p.sum(0, 0, 0, 0, N);
    if !planted {
        p.sum(1, 0, 0, 0, N);
    }
    nccl!(ncclGroupEnd());
    p.close();
}

fn ungrouped_messages(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    for device in 0..2 {
        let (peer, comm, s) = (1 - device as i32, p.comms[0][device], p.s[device][0].cast());
        if !planted {
            nccl!(ncclGroupStart());
        }
        nccl!(ncclSend(p.x[device][0] as _, N, F32, peer, comm, s));
        nccl!(ncclRecv(p.x[device][1] as _, N, F32, peer, comm, s));
        if !planted {
            nccl!(ncclGroupEnd());
        }
    }
    if !planted {
        assert_eq!(api::read(p.x[0][1], 2, p.s[0][0]), [2.0; 2]);
    }
    p.close();
}

fn ungrouped(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    if planted {
        (0..2).for_each(|d| p.sum(d, 0, 0, 0, N));
    } else {
        p.sum_both(0, 0, 0);
        assert_eq!(api::read(p.x[1][0], 1, p.s[1][0]), [3.0]);
    }
    p.close();
}

fn early_collective(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    for device in 0..2 {
        cuda!(cuMemsetD32Async(p.x[device][0], 0, N, p.s[device][1]));
        if !planted || device == 0 {
            api::use_device(device as i32);
            order(p.s[device][1], p.s[device][0]);
        }
    }
    p.sum_both(0, 0, 0);
    p.close();
}

fn early_result(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    p.sum_both(0, 0, 0);
    for device in 0..2 {
        if !planted || device == 0 {
            api::use_device(device as i32);
            order(p.s[device][0], p.s[device][1]);
        }
        cuda!(cuMemcpyDtoDAsync_v2(p.x[device][1], p.x[device][0], N * 4, p.s[device][1]));
    }
    p.close();
}

fn early_overwrite(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    nccl!(ncclGroupStart());
    nccl!(ncclSend(p.x[0][0] as _, N, F32, 1, p.comms[0][0], p.s[0][0].cast()));
    nccl!(ncclRecv(p.x[1][1] as _, N, F32, 0, p.comms[0][1], p.s[1][0].cast()));
    nccl!(ncclGroupEnd());
    if !planted {
        api::use_device(0);
        order(p.s[0][0], p.s[0][1]);
    }
    cuda!(cuMemsetD8Async(p.x[0][0], 0, N * 4, p.s[0][1]));
    p.close();
}

/// A collective orders the earlier work of all ranks before the later work of each rank.
fn before_collective(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    let mut contexts = [null_mut(); 2];
    for (device, context) in contexts.iter_mut().enumerate() {
        api::use_device(device as i32);
        cuda!(cuCtxGetCurrent(context));
    }
    for device in 0..2 {
        api::use_device(device as i32);
        api::enable_peer_access(contexts[1 - device]);
    }
    cuda!(cuMemsetD8Async(p.x[0][1], 0, N * 4, p.s[0][0]));
    let copy = || {
        let (to, from, s) = (p.x[1][1], p.x[0][1], p.s[1][0]);
        cuda!(cuMemcpyPeerAsync(to, contexts[1], from, contexts[0], N * 4, s));
    };
    if planted {
        copy();
    }
    p.sum_both(0, 0, 0);
    if !planted {
        copy();
    }
    p.close();
}

/// On a non-blocking communicator, an NCCL call may return before the call is in the stream. Work that the host then
/// submits to the same stream can run first.
fn in_progress(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    let mut id = cudarc::nccl::sys::ncclUniqueId { internal: [0; 128] };
    nccl!(ncclGetUniqueId(&mut id));
    let comms = [0, 1].map(|rank| {
        api::use_device(rank as i32);
        api::join_ranks(id, 2, rank)
    });
    let in_progress = cudarc::nccl::sys::ncclResult_t::ncclInProgress;
    comms.iter().for_each(|comm| api::wait_for_call(*comm, in_progress));
    nccl!(ncclGroupStart());
    for (device, comm) in comms.iter().enumerate() {
        let (x, s) = (p.x[device][0], p.s[device][0].cast());
        nccl!(ncclAllReduce(x as _, x as _, N, F32, SUM, *comm, s));
    }
    // SAFETY: this call ends the group that was started above.
    assert_eq!(unsafe { cudarc::nccl::sys::ncclGroupEnd() }, in_progress);
    if !planted {
        comms.iter().for_each(|comm| api::wait_for_call(*comm, in_progress));
    }
    for device in 0..2 {
        api::use_device(device as i32);
        order(p.s[device][0], p.s[device][1]);
        cuda!(cuMemcpyDtoDAsync_v2(p.x[device][1], p.x[device][0], N * 4, p.s[device][1]));
    }
    comms.iter().for_each(|comm| api::wait_for_call(*comm, in_progress));
    comms.iter().for_each(|comm| nccl!(ncclCommDestroy(*comm)));
    p.close();
}

fn early_abort(_: &LoadedKernels, planted: bool) {
    let p = Pair::new();
    let held = api::block_device(p.s[0][0]);
    p.sum_both(0, 0, 0);
    if planted {
        nccl!(ncclCommAbort(p.comms[0][0]));
        nccl!(ncclCommAbort(p.comms[0][1]));
    }
    drop(held);
    if planted {
        // The communicators of the first set were aborted above.
        let Pair { s, x, comms } = p;
        let rest = [Vec::new(), comms[1].clone()];
        return Pair { s, x, comms: rest }.close();
    }
    p.close();
}

fn closed(_: &LoadedKernels, planted: bool) {
    let mut p = Pair::new();
    if planted {
        let comm = p.comms[0][0];
        nccl!(ncclCommDestroy(comm));
        // SAFETY: the library accepts handles of closed communicators.
        let code = unsafe {
            let s: CUstream = p.s[0][0];
            cudarc::nccl::sys::ncclAllReduce(p.x[0][0] as _, p.x[0][0] as _, N, F32, SUM, comm, s.cast())
        };
        assert_ne!(code, cudarc::nccl::sys::ncclResult_t::ncclSuccess);
        p.comms[0].remove(0);
    }
    p.close();
}
