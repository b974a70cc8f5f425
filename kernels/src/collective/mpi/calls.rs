//! All foreign-function calls of the MPI engine.
//!
//! - MPI-1: MPI is initialized for concurrent calls by several threads. It is not finalized while communicators exist.
//! - MPI-2: buffers of an unfinished call stay in place until the process exits, since MPI cannot cancel such a call.
#![allow(unsafe_code)]

use std::fmt;
use std::mem;
use std::os::raw::{c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use mpi::environment::Universe;
use mpi::ffi::{self, MPI_Comm, MPI_Datatype, MPI_Op, MPI_Request};
use mpi::topology::Communicator;
use mpi::{Threading, traits::AsRaw};

use crate::collective::ReduceOp;
use crate::error::{KernelError, Result};

/// How long a waiting call yields between completion tests. After this time it sleeps between tests.
const YIELD: Duration = Duration::from_micros(200);

/// Length of each sleep between completion tests.
const NAP: Duration = Duration::from_micros(20);

/// Number of completion tests between two checks for an interrupt.
const TESTS_PER_CHECK: u32 = 8;

/// How long processes wait for each other before they finalize MPI.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// A function that is called regularly while a call waits. It returns an error to end the wait early.
pub(super) type CheckInterrupt<'a> = dyn FnMut() -> Result<()> + 'a;

/// MPI in this process: the rank and the number of processes. MPI is started once per process, and finalized when this
/// value is dropped. It is not finalized after an abort, because finalizing would wait for peers that are gone.
pub struct MpiWorld {
    universe: Option<Universe>,
    comm: Comm,
    /// Used only for the barrier before MPI is finalized, so that no other barrier can match this one.
    end_comm: Comm,
    rank: u32,
    size: u32,
    aborted: AtomicBool,
}

impl fmt::Debug for MpiWorld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MpiWorld").field("rank", &self.rank).field("size", &self.size).finish_non_exhaustive()
    }
}

impl MpiWorld {
    /// Starts MPI.
    ///
    /// # Errors
    /// [`KernelError::Mpi`] if MPI was started before, or if it does not allow concurrent calls by several threads.
    pub fn start() -> Result<Arc<Self>> {
        let (universe, given) = mpi::initialize_with_threading(Threading::Multiple)
            .ok_or_else(|| failed("MPI_Init_thread", "MPI was started before in this process"))?;
        if given != Threading::Multiple {
            let hint = "but MPI_THREAD_MULTIPLE is needed: build MPI with support for it";
            return Err(failed("MPI_Init_thread", &format!("this MPI provides {given:?}, {hint}")));
        }
        let world = universe.world();
        let (rank, size) = (world.rank() as u32, world.size() as u32);
        let comm = Comm { raw: world.as_raw() };
        comm.return_errors()?;
        let mut end_comm = Comm { raw: comm.raw };
        // SAFETY: the world communicator exists, and all processes make this call; MPI writes the handle.
        check("MPI_Comm_dup", unsafe { ffi::MPI_Comm_dup(comm.raw, &mut end_comm.raw) })?;
        let (universe, aborted) = (Some(universe), AtomicBool::new(false));
        Ok(Arc::new(Self { universe, comm, end_comm, rank, size, aborted }))
    }

    /// Rank of this process in MPI.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Number of processes.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Prevents MPI from being finalized.
    pub(super) fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
    }

    pub(super) fn barrier(&self, within: Duration) -> Result<()> {
        self.barrier_on(&self.comm, within)
    }

    fn barrier_on(&self, comm: &Comm, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        let mut late = || {
            let cause = format!("not all of {} processes arrived within {} ms", self.size, within.as_millis());
            if Instant::now() < deadline { Ok(()) } else { Err(failed("MPI_Ibarrier", &cause)) }
        };
        // SAFETY: a barrier has no buffers.
        unsafe { comm.run(Transfer::Barrier, &mut late) }.inspect_err(|_| self.abort())
    }

    /// Creates one communicator per group; `groups` has each group's processes and tag. All members pass the groups in
    /// the same order. A separate thread waits inside MPI for the other members, and this function waits for that
    /// thread for at most `within`.
    pub(super) fn comms(self: &Arc<Self>, groups: Vec<(Vec<c_int>, c_int)>, within: Duration) -> Result<Vec<Comm>> {
        let (sender, receiver) = bounded(1);
        let world = self.clone();
        let make = move || {
            let comms =
                groups.iter().map(|(processes, tag)| world.comm(processes, *tag)).collect::<Result<Vec<_>, _>>();
            // The send fails when the receiver has timed out.
            let _ = sender.send(comms);
        };
        let call = "MPI_Comm_create_group";
        std::thread::Builder::new().name("mpi".into()).spawn(make).map_err(|error| failed(call, &error.to_string()))?;
        let late = format!("not all members arrived within {} ms", within.as_millis());
        let comms = receiver.recv_timeout(within).unwrap_or_else(|_| Err(failed(call, &late)));
        // MPI may still wait for members that are gone.
        comms.inspect_err(|_| self.abort())
    }

    /// Creates the communicator of these processes. Each process calls this function for its groups in the same order.
    fn comm(&self, processes: &[c_int], tag: c_int) -> Result<Comm> {
        let mut comm = Comm { raw: self.comm.raw };
        let mut raw_group = mem::MaybeUninit::uninit();
        let mut group = mem::MaybeUninit::uninit();
        // SAFETY: `processes` are distinct ranks of the world. MPI writes the handles before they are read.
        unsafe {
            check("MPI_Comm_group", ffi::MPI_Comm_group(self.comm.raw, raw_group.as_mut_ptr()))?;
            let mut all = raw_group.assume_init();
            let count = processes.len() as c_int;
            check("MPI_Group_incl", ffi::MPI_Group_incl(all, count, processes.as_ptr(), group.as_mut_ptr()))?;
            let mut group = group.assume_init();
            let code = ffi::MPI_Comm_create_group(self.comm.raw, group, tag, &mut comm.raw);
            check("MPI_Comm_create_group", code)?;
            check("MPI_Group_free", ffi::MPI_Group_free(&mut group))?;
            check("MPI_Group_free", ffi::MPI_Group_free(&mut all))?;
        }
        comm.return_errors()?;
        Ok(comm)
    }
}

impl Drop for MpiWorld {
    fn drop(&mut self) {
        let aborted = self.aborted.load(Ordering::Relaxed) || std::thread::panicking();
        if aborted || self.barrier_on(&self.end_comm, END_TIMEOUT).is_err() {
            mem::forget(self.universe.take());
        }
    }
}

fn failed(call: &'static str, cause: &str) -> KernelError {
    KernelError::Mpi { call, cause: cause.to_owned() }
}

fn check(call: &'static str, code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = vec![0 as c_char; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut len = 0;
    // SAFETY: the buffer holds MPI's longest text and its terminator.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr(), &mut len) };
    let bytes: Vec<u8> = text.iter().take(len as usize).map(|c| *c as u8).collect();
    Err(failed(call, &String::from_utf8_lossy(&bytes)))
}

/// The handle of a communicator.
#[derive(Debug)]
pub(super) struct Comm {
    raw: MPI_Comm,
}

// SAFETY: a communicator is a handle that several threads may use at the same time (MPI-1).
unsafe impl Send for Comm {}
// SAFETY: as for `Send`.
unsafe impl Sync for Comm {}

/// The parts of all members in one buffer: sizes and start offsets, in words of 4 bytes.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) counts: Vec<c_int>,
    pub(super) starts: Vec<c_int>,
}

/// An MPI call and its buffers. Members are ranks of the communicator. Counts and offsets are in words. `Records`
/// concatenates the records of all members. In a `ReduceScatter`, member i receives `counts[i]` words of x.
pub(super) enum Transfer<'a> {
    Barrier,
    Max { x: &'a [u64; 2], y: &'a mut [u64; 2] },
    Records { x: &'a [u8], y: &'a mut [u8] },
    AllReduce { op: ReduceOp, x: &'a [f32], y: &'a mut [f32] },
    ReduceScatter { op: ReduceOp, x: &'a [f32], y: &'a mut [f32], counts: Vec<c_int> },
    AllGather { x: &'a [f32], y: &'a mut [f32], layout: Layout },
    AllToAll { x: &'a [f32], sent: Layout, y: &'a mut [f32], taken: Layout },
    Broadcast { y: &'a mut [f32], root: usize },
    Send { x: &'a [f32], to: usize, tag: c_int },
    Receive { y: &'a mut [f32], from: usize, tag: c_int },
    Post { x: Box<[u64; 2]>, to: usize, tag: c_int },
}

fn raw(op: ReduceOp) -> MPI_Op {
    // SAFETY: the operations are constants of the library.
    unsafe { if op == ReduceOp::Sum { ffi::RSMPI_SUM } else { ffi::RSMPI_MAX } }
}

/// The MPI type of words that MPI only copies and does not interpret.
fn words() -> MPI_Datatype {
    // SAFETY: the type is a constant of the library.
    unsafe { ffi::RSMPI_UINT32_T }
}

/// Addresses for empty buffers. If both buffers of a call start at the same address, OpenMPI treats the call as
/// in-place, even if one buffer is empty. OpenMPI then runs a different algorithm here than on the other members.
static EMPTY: [u64; 2] = [0; 2];

fn start<T>(slice: &[T]) -> *const c_void {
    if slice.is_empty() { (&raw const EMPTY[0]).cast() } else { slice.as_ptr().cast() }
}

/// MPI writes nothing to an empty buffer.
fn start_mut<T>(slice: &mut [T]) -> *mut c_void {
    if slice.is_empty() { (&raw const EMPTY[1]).cast_mut().cast() } else { slice.as_mut_ptr().cast() }
}

/// Callers have checked that the length fits ([`super::count`]).
fn len<T>(slice: &[T]) -> c_int {
    slice.len() as c_int
}

impl Transfer<'_> {
    fn name(&self) -> &'static str {
        match self {
            Transfer::Barrier => "MPI_Ibarrier",
            Transfer::Max { .. } | Transfer::AllReduce { .. } => "MPI_Iallreduce",
            Transfer::Records { .. } => "MPI_Iallgather",
            Transfer::ReduceScatter { .. } => "MPI_Ireduce_scatter",
            Transfer::AllGather { .. } => "MPI_Iallgatherv",
            Transfer::AllToAll { .. } => "MPI_Ialltoallv",
            Transfer::Broadcast { .. } => "MPI_Ibcast",
            Transfer::Send { .. } | Transfer::Post { .. } => "MPI_Isend",
            Transfer::Receive { .. } => "MPI_Irecv",
        }
    }

    /// # Safety
    /// Buffers and arrays stay valid and unused until the request has completed.
    unsafe fn start(&mut self, comm: MPI_Comm, request: *mut MPI_Request) -> c_int {
        // SAFETY: by the contract. Each pointer belongs to a slice whose length matches the counts passed with it.
        unsafe {
            let (float, long) = (ffi::RSMPI_FLOAT, ffi::RSMPI_UINT64_T);
            match self {
                Transfer::Barrier => ffi::MPI_Ibarrier(comm, request),
                Transfer::Max { x, y } => {
                    let (x, y) = (start(&x[..]), start_mut(&mut y[..]));
                    ffi::MPI_Iallreduce(x, y, 2, long, ffi::RSMPI_MAX, comm, request)
                }
                Transfer::Records { x, y } => {
                    let (byte, n) = (ffi::RSMPI_UINT8_T, len(x));
                    ffi::MPI_Iallgather(start(x), n, byte, start_mut(y), n, byte, comm, request)
                }
                Transfer::AllReduce { op, x, y } => {
                    ffi::MPI_Iallreduce(start(x), start_mut(y), len(y), float, raw(*op), comm, request)
                }
                Transfer::ReduceScatter { op, x, y, counts } => {
                    let (x, counts) = (start(x), counts.as_ptr());
                    ffi::MPI_Ireduce_scatter(x, start_mut(y), counts, float, raw(*op), comm, request)
                }
                Transfer::AllGather { x, y, layout } => {
                    let (counts, starts) = (layout.counts.as_ptr(), layout.starts.as_ptr());
                    let (n, y) = (len(x), start_mut(y));
                    ffi::MPI_Iallgatherv(start(x), n, words(), y, counts, starts, words(), comm, request)
                }
                Transfer::AllToAll { x, sent, y, taken } => {
                    let (xc, xs) = (sent.counts.as_ptr(), sent.starts.as_ptr());
                    let (yc, ys) = (taken.counts.as_ptr(), taken.starts.as_ptr());
                    ffi::MPI_Ialltoallv(start(x), xc, xs, words(), start_mut(y), yc, ys, words(), comm, request)
                }
                Transfer::Broadcast { y, root } => {
                    ffi::MPI_Ibcast(start_mut(y), len(y), words(), *root as c_int, comm, request)
                }
                Transfer::Send { x, to, tag } => {
                    ffi::MPI_Isend(start(x), len(x), words(), *to as c_int, *tag, comm, request)
                }
                Transfer::Receive { y, from, tag } => {
                    ffi::MPI_Irecv(start_mut(y), len(y), words(), *from as c_int, *tag, comm, request)
                }
                Transfer::Post { x, to, tag } => {
                    ffi::MPI_Isend(start(&x[..]), 2, long, *to as c_int, *tag, comm, request)
                }
            }
        }
    }
}

impl Comm {
    /// Makes MPI return error codes instead of aborting the process.
    fn return_errors(&self) -> Result<()> {
        // SAFETY: the communicator exists, and the handler is a constant of the library.
        check("MPI_Comm_set_errhandler", unsafe { ffi::MPI_Comm_set_errhandler(self.raw, ffi::RSMPI_ERRORS_RETURN) })
    }

    /// Runs a transfer. Calls `interrupt` while the transfer is in flight.
    ///
    /// # Safety
    /// After an error, all that the transfer borrows must stay in place, unused, until the process exits (MPI-2).
    pub(super) unsafe fn run(&self, mut transfer: Transfer<'_>, interrupt: &mut CheckInterrupt<'_>) -> Result<()> {
        let name = transfer.name();
        let mut request = mem::MaybeUninit::uninit();
        // SAFETY: borrowed buffers stay valid by the contract. `transfer` owns the others, and is leaked on failure.
        check(name, unsafe { transfer.start(self.raw, request.as_mut_ptr()) })?;
        // SAFETY: MPI has initialized the request.
        let done = wait(name, unsafe { request.assume_init() }, interrupt);
        if done.is_err() {
            mem::forget(transfer);
        }
        done
    }

    /// Receives a post with this tag, if one has arrived. Returns its sender and its two words.
    pub(super) fn receive_post(&self, from: Option<usize>, tag: c_int) -> Result<Option<(usize, [u64; 2])>> {
        let (mut arrived, mut status) = (0, mem::MaybeUninit::<ffi::MPI_Status>::uninit());
        let mut words = [0u64; 2];
        // SAFETY: MPI writes the status before it is read. A post's two words fit; a longer message returns an error.
        unsafe {
            let source = from.map_or(ffi::RSMPI_ANY_SOURCE, |from| from as c_int);
            check("MPI_Iprobe", ffi::MPI_Iprobe(source, tag, self.raw, &mut arrived, status.as_mut_ptr()))?;
            if arrived == 0 {
                return Ok(None);
            }
            let source = status.assume_init().MPI_SOURCE;
            let into = start_mut(&mut words[..]);
            let long = ffi::RSMPI_UINT64_T;
            check("MPI_Recv", ffi::MPI_Recv(into, 2, long, source, tag, self.raw, status.as_mut_ptr()))?;
            Ok(Some((source as usize, words)))
        }
    }

    /// Frees the communicator. None of its calls may be in flight, and MPI must not be finalized.
    pub(super) fn free(mut self) {
        // SAFETY: the communicator exists, by the contract. An error code would not change anything.
        unsafe { ffi::MPI_Comm_free(&mut self.raw) };
    }
}

fn wait(name: &'static str, mut request: MPI_Request, check_interrupt: &mut CheckInterrupt<'_>) -> Result<()> {
    let began = Instant::now();
    let mut tests = 0u32;
    loop {
        let mut done = 0;
        // SAFETY: the request is in flight, and only this call uses its handle.
        check(name, unsafe { ffi::MPI_Test(&mut request, &mut done, ffi::RSMPI_STATUS_IGNORE) })?;
        if done != 0 {
            return Ok(());
        }
        tests = tests.wrapping_add(1);
        if tests.is_multiple_of(TESTS_PER_CHECK) {
            check_interrupt()?;
        }
        pause(began);
    }
}

/// Lets other threads run between two completion tests.
pub(super) fn pause(began: Instant) {
    if began.elapsed() < YIELD { std::thread::yield_now() } else { std::thread::sleep(NAP) }
}
