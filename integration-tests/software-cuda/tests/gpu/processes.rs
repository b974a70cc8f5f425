//! Tests communicators whose ranks are in several processes. A test starts two child processes, number 0 and 1, and both
//! run one of the `check_*` functions.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId};
use shardflow_software_cuda::SimReport;

use crate::api::{self, filled, free, read, stream};
use crate::{child, cuda, nccl};

const N: usize = 48;
const F32: ncclDataType_t = ncclDataType_t::ncclFloat32;
const SUM: ncclRedOp_t = ncclRedOp_t::ncclSum;
/// Environment variable with the number of the process.
const PROCESS: &str = "SOFTWARE_CUDA_TEST_PROCESS";
/// Number of ranks per process.
const OWN: usize = 2;
const RANKS: usize = 2 * OWN;
const WITHIN: Duration = Duration::from_secs(60);
/// Cases in which a process would wait forever.
const STUCK: [&str; 2] = ["a process never calls", "a send is not announced"];

/// One rank.
struct Rank {
    rank: usize,
    device: usize,
    comm: ncclComm_t,
    s: CUstream,
    x: u64,
    y: u64,
}

fn process() -> usize {
    std::env::var(PROCESS).expect("the parent numbers processes").parse().expect("the process number is a number")
}

/// Returns the communicator's id. The first process creates it, and the parent forwards it to the second process.
fn shared_id() -> ncclUniqueId {
    let mut id = ncclUniqueId { internal: [0; 128] };
    if process() == 0 {
        nccl!(ncclGetUniqueId(&mut id));
        println!("\n> {}", id.internal.iter().map(|byte| format!("{byte} ")).collect::<String>());
        return id;
    }
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("stdin is readable");
    for (to, byte) in id.internal.iter_mut().zip(line.split_whitespace()) {
        *to = byte.parse().expect("the id consists of bytes");
    }
    id
}

/// Creates this process's ranks, on consecutive devices from `first` on.
fn join(first: usize) -> Vec<Rank> {
    let id = shared_id();
    let rank = |i: usize| {
        let (rank, device) = (process() * OWN + i, first + i);
        api::use_device(device as i32);
        let (x, y) = (filled(&[rank as f32 + 1.0; N]), filled(&[0.0; N]));
        Rank { rank, device, comm: api::join_ranks(id, RANKS, rank), s: stream(), x, y }
    };
    (0..OWN).map(rank).collect()
}

fn wait_for_all(ranks: &[Rank]) {
    ranks.iter().for_each(|rank| api::wait_for_call(rank.comm, ncclResult_t::ncclInProgress));
}

/// Calls a function for all ranks, in one group.
fn call_all(ranks: &[Rank], call: impl Fn(&Rank) -> ncclResult_t) {
    nccl!(ncclGroupStart());
    for rank in ranks {
        let code = call(rank);
        assert!(matches!(code, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress), "{code:?}");
    }
    // SAFETY: this call ends the group that was started above.
    let code = unsafe { cudarc::nccl::sys::ncclGroupEnd() };
    assert!(matches!(code, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress), "{code:?}");
}

fn close(ranks: Vec<Rank>) {
    for rank in ranks {
        api::use_device(rank.device as i32);
        nccl!(ncclCommFinalize(rank.comm));
        nccl!(ncclCommDestroy(rank.comm));
        [rank.x, rank.y].into_iter().for_each(free);
        cuda!(cuStreamDestroy_v2(rank.s));
    }
}

/// Makes every kind of call.
pub fn check_together() {
    use cudarc::nccl::sys::*;
    let ranks = join(process() * OWN);
    wait_for_all(&ranks);
    let expect = |ranks: &[Rank], y: bool, want: &dyn Fn(usize, usize) -> f32| {
        for r in ranks {
            let got = read(if y { r.y } else { r.x }, N, r.s);
            let want: Vec<f32> = (0..N).map(|i| want(r.rank, i)).collect();
            assert_eq!(got, want, "rank {}", r.rank);
        }
    };
    let quarter = N / RANKS;
    for _ in 0..3 {
        // SAFETY: the addresses are of device memory that is long enough; handles come from the libraries.
        call_all(&ranks, |r| unsafe { ncclAllReduce(r.x as _, r.y as _, N, F32, SUM, r.comm, r.s.cast()) });
        wait_for_all(&ranks);
    }
    expect(&ranks, true, &|_, _| 10.0);
    // SAFETY: as above.
    call_all(&ranks, |r| unsafe { ncclAllGather(r.x as _, r.y as _, quarter, F32, r.comm, r.s.cast()) });
    wait_for_all(&ranks);
    expect(&ranks, true, &|_, i| (i / quarter) as f32 + 1.0);
    // SAFETY: as above.
    call_all(&ranks, |r| unsafe { ncclReduceScatter(r.y as _, r.y as _, quarter, F32, SUM, r.comm, r.s.cast()) });
    wait_for_all(&ranks);
    expect(&ranks, true, &|rank, i| if i < quarter { 4.0 * (rank as f32 + 1.0) } else { (i / quarter) as f32 + 1.0 });
    // SAFETY: as above.
    call_all(&ranks, |r| unsafe { ncclBroadcast(r.x as _, r.y as _, N, F32, 2, r.comm, r.s.cast()) });
    wait_for_all(&ranks);
    expect(&ranks, true, &|_, _| 3.0);
    // Send to the next rank, which may be in the other process.
    let neighbour = |rank: usize, by: usize| ((rank + by) % RANKS) as i32;
    // SAFETY: as above.
    call_all(&ranks, |r| unsafe {
        let (next, before) = (neighbour(r.rank, 1), neighbour(r.rank, RANKS - 1));
        ncclSend(r.x as _, N, F32, next, r.comm, r.s.cast());
        ncclRecv(r.y as _, N, F32, before, r.comm, r.s.cast())
    });
    wait_for_all(&ranks);
    expect(&ranks, true, &|rank, _| neighbour(rank, RANKS - 1) as f32 + 1.0);
    close(ranks);
}

/// The processes pass different lengths to a collective, so both processes get an error.
pub fn check_lengths() {
    let ranks = join(process() * OWN);
    wait_for_all(&ranks);
    let count = N - process();
    // SAFETY: the addresses are of device memory that is long enough; handles come from the libraries.
    call_all(&ranks, |r| unsafe {
        cudarc::nccl::sys::ncclAllReduce(r.x as _, r.y as _, count, F32, SUM, r.comm, r.s.cast())
    });
    ranks.iter().for_each(|rank| assert_eq!(error_of(rank), ncclResult_t::ncclInvalidUsage));
    abort(&ranks);
}

/// Process 1 dies. Process 0 gets an error, and an abort releases its streams.
pub fn check_gone() {
    let ranks = join(process() * OWN);
    wait_for_all(&ranks);
    api::use_device(ranks[0].device as i32);
    let (s, other) = (stream(), filled(&[0.0; N]));
    if process() == 1 {
        // SAFETY: the addresses are of device memory that is long enough; handles come from the libraries.
        let code = unsafe { cudarc::nccl::sys::ncclRecv(other as _, N, F32, 0, ranks[0].comm, s.cast()) };
        api::wait_for_call(ranks[0].comm, code);
        api::wait(s);
        // Die without closing any rank.
        std::process::abort();
    }
    // SAFETY: the addresses are of device memory that is long enough; handles come from the libraries.
    call_all(&ranks, |r| unsafe {
        cudarc::nccl::sys::ncclAllReduce(r.x as _, r.y as _, N, F32, SUM, r.comm, r.s.cast())
    });
    wait_for_all(&ranks);
    // The other process dies when it receives this message, while the all-reduce is running. SAFETY: as above.
    let _ = unsafe { cudarc::nccl::sys::ncclSend(other as _, N, F32, OWN as i32, ranks[0].comm, s.cast()) };
    ranks.iter().for_each(|rank| assert_eq!(error_of(rank), ncclResult_t::ncclRemoteError));
    abort(&ranks);
    ranks.iter().for_each(|rank| api::wait(rank.s));
}

/// In a child: both processes use the same devices, which must be refused.
pub fn check_same_devices() {
    let ranks = join(0);
    ranks.iter().for_each(|rank| assert_eq!(error_of(rank), ncclResult_t::ncclInvalidUsage));
    abort(&ranks);
}

/// The second process never makes the call that the first process waits for.
pub fn check_missing() {
    let ranks = join(process() * OWN);
    wait_for_all(&ranks);
    if process() == 0 {
        // SAFETY: the addresses are of device memory that is long enough; handles come from the libraries.
        call_all(&ranks, |r| unsafe {
            cudarc::nccl::sys::ncclAllReduce(r.x as _, r.y as _, N, F32, SUM, r.comm, r.s.cast())
        });
        wait_for_all(&ranks);
        // SAFETY: the stream comes from the driver.
        let waited = unsafe { cudarc::driver::sys::cuStreamSynchronize(ranks[0].s) };
        assert_ne!(waited, cudarc::driver::sys::CUresult::CUDA_SUCCESS);
    } else {
        // Wait until the other process has aborted.
        ranks.iter().for_each(|rank| assert_eq!(error_of(rank), ncclResult_t::ncclRemoteError));
    }
    abort(&ranks);
}

/// The first process sends to a rank of the second process and waits. The second process never calls the receive.
pub fn check_unannounced() {
    let ranks = join(process() * OWN);
    wait_for_all(&ranks);
    if process() == 0 {
        let r = &ranks[0];
        // SAFETY: the addresses are of device memory that is long enough; handles come from the libraries.
        let code = unsafe { cudarc::nccl::sys::ncclSend(r.x as _, N, F32, OWN as i32, r.comm, r.s.cast()) };
        api::wait_for_call(r.comm, code);
    } else {
        // Wait until the other process has aborted.
        ranks.iter().for_each(|rank| assert_eq!(error_of(rank), ncclResult_t::ncclRemoteError));
    }
    abort(&ranks);
}

/// Waits for a rank's error and returns it.
fn error_of(rank: &Rank) -> ncclResult_t {
    let (mut state, start) = (ncclResult_t::ncclSuccess, Instant::now());
    while matches!(state, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress) {
        assert!(start.elapsed() < WITHIN, "no error on rank {}", rank.rank);
        std::thread::yield_now();
        nccl!(ncclCommGetAsyncError(rank.comm, &mut state));
    }
    state
}

fn abort(ranks: &[Rank]) {
    ranks.iter().for_each(|rank| nccl!(ncclCommAbort(rank.comm)));
}

/// In the parent: runs a case in two processes. Returns the success, output and report of each process.
fn start(case: &str, policy: &str, seed: u64) -> Vec<(bool, String, SimReport)> {
    let folders = [(); 2].map(|()| tempfile::tempdir().expect("the temporary folder is writable"));
    let start = |process: usize| -> Child {
        let mut command = child::command(case, folders[process].path(), RANKS, policy, seed + process as u64);
        // The other cases keep the default limit, which is long enough for a busy machine.
        command.envs(STUCK.contains(&case).then_some(("SOFTWARE_CUDA_DEADLOCK_MS", "1500")));
        command.env(PROCESS, process.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("this program starts")
    };
    let mut children = [start(0), start(1)];
    let mut stdout = BufReader::new(children[0].stdout.take().expect("the stream is piped"));
    let mut line = String::new();
    while !line.starts_with("> ") {
        line.clear();
        assert!(stdout.read_line(&mut line).expect("the output is text") > 0, "{case}: the first process prints no id");
    }
    let to = children[1].stdin.take().expect("the stream is piped");
    writeln!({ to }, "{}", line.trim_start_matches("> ").trim()).expect("the second process reads the id");
    let ends = children.into_iter().zip(&folders).enumerate().map(|(process, (child, folder))| {
        let mut text = String::new();
        if process == 0 {
            stdout.read_to_string(&mut text).expect("the output is text");
        }
        let output = child.wait_with_output().expect("the output is readable");
        text += &(String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr));
        (output.status.success(), text, SimReport::read(folder.path()).unwrap_or_default())
    });
    ends.collect()
}

#[test]
fn ranks_of_several_processes_work_together() {
    for (policy, seed) in [("random", 1), ("adversarial", 2), ("lazy", 3)] {
        for (process, (is_ok, text, report)) in start("processes", policy, seed).into_iter().enumerate() {
            assert!(is_ok, "process {process} failed under {policy}:\n{text}");
            assert_eq!(report.findings, [], "process {process} has findings under {policy}");
        }
    }
}

/// Returns the kinds of findings, except the kinds that an abort causes. Those depend on timing.
fn kinds(report: &SimReport) -> BTreeSet<&str> {
    let kinds = report.findings.iter().map(|finding| &finding.kind[..]);
    kinds.filter(|kind| !["leak", "aborted"].contains(kind)).collect()
}

/// Checks that both processes succeed and report findings of these kinds.
fn expect_found(case: &str, expected: [&[&str]; 2]) {
    for (process, (is_ok, text, report)) in start(case, "random", 1).into_iter().enumerate() {
        assert!(is_ok, "{case}: process {process} failed:\n{text}");
        let expected = expected[process].iter().copied().collect();
        assert_eq!(kinds(&report), expected, "{case}: wrong findings of process {process}: {:#?}", report.findings);
    }
}

#[test]
fn mistakes_between_processes_are_found_in_both() {
    expect_found("processes disagree", [&["collective-mismatch"]; 2]);
    expect_found("processes on the same devices", [&[]; 2]);
    expect_found("a process never calls", [&["deadlock"], &[]]);
    expect_found("a send is not announced", [&["deadlock"], &[]]);
}

#[test]
fn a_process_that_dies_leaves_an_error() {
    let ends = start("a process dies", "random", 1);
    assert!(ends[0].0 && !ends[1].0, "{}\n{}", ends[0].1, ends[1].1);
    assert!(kinds(&ends[0].2).is_empty(), "{:#?}", ends[0].2.findings);
}
