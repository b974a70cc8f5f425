//! The calls of MPI that the engine makes: all that is not Rust.
//!
//! - MPI-1: MPI was started for calls of several threads at once, and is not ended while a communicator is here.
//! - MPI-2: what a call that was given up was to read or write stays where it is for ever: MPI cannot take such a call back.
#![allow(unsafe_code)]

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
use crate::error::KernelError;

/// How long a call that waits lets only other threads run between its looks.
const YIELD: Duration = Duration::from_micros(200);

/// How long it then sleeps between them.
const NAP: Duration = Duration::from_micros(20);

/// Looks after which a call also sees whether to give up.
const LOOKS: u32 = 8;

/// How long processes wait for each other before they end MPI.
const END_WITHIN: Duration = Duration::from_secs(5);

/// What ends a wait early: asked now and then.
pub(super) type Trouble<'a> = dyn FnMut() -> Result<(), KernelError> + 'a;

/// MPI in this process: which of how many it is. Started once in a process's life, and ended with the last clone of this,
/// unless an engine was aborted: a call may then be under way, and peers may be gone, for whom MPI would wait.
#[derive(Debug)]
pub struct MpiWorld {
    universe: Option<Ended>,
    comm: Comm,
    /// For the meeting at the end alone: one that comes early meets nobody who is at something else.
    end: Comm,
    rank: u32,
    size: u32,
    aborted: AtomicBool,
}

/// Ends MPI when it is dropped.
struct Ended(#[allow(dead_code)] Universe);

impl std::fmt::Debug for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Universe")
    }
}

impl MpiWorld {
    /// Starts MPI.
    ///
    /// # Errors
    /// [`KernelError::Mpi`] when it was started before, or does not let several threads call it.
    pub fn start() -> Result<Arc<Self>, KernelError> {
        let (universe, given) = mpi::initialize_with_threading(Threading::Multiple)
            .ok_or_else(|| failed("MPI_Init_thread", "MPI was started before in this process"))?;
        if given != Threading::Multiple {
            let cause =
                format!("this MPI gives {given:?}, and several threads call it: build it with MPI_THREAD_MULTIPLE");
            return Err(failed("MPI_Init_thread", &cause));
        }
        let world = universe.world();
        let (rank, size) = (world.rank() as u32, world.size() as u32);
        let comm = Comm { raw: world.as_raw() };
        comm.return_errors()?;
        let mut end = Comm { raw: comm.raw };
        // SAFETY: the world is there, and all processes come here; MPI writes the handle.
        check("MPI_Comm_dup", unsafe { ffi::MPI_Comm_dup(comm.raw, &mut end.raw) })?;
        let (universe, aborted) = (Some(Ended(universe)), AtomicBool::new(false));
        Ok(Arc::new(Self { universe, comm, end, rank, size, aborted }))
    }

    /// Number of this process, as MPI counts them.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// How many processes there are.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// From now on MPI is not ended in order.
    pub(super) fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
    }

    /// Waits until all processes have come here.
    pub(super) fn meet(&self, within: Duration) -> Result<(), KernelError> {
        self.meet_on(&self.comm, within)
    }

    fn meet_on(&self, comm: &Comm, within: Duration) -> Result<(), KernelError> {
        let until = Instant::now() + within;
        let come = Transfer::Barrier;
        let mut late = || {
            let cause = format!("not all of {} processes have come within {} ms", self.size, within.as_millis());
            if Instant::now() < until { Ok(()) } else { Err(failed("MPI_Ibarrier", &cause)) }
        };
        // SAFETY: a barrier has no buffers.
        let met = unsafe { comm.run(come, &mut late) };
        met.inspect_err(|_| self.abort())
    }

    /// A communicator of each of these groups of processes, which have tags of their own. All members call this, with the
    /// groups in the same order, and wait for each other in MPI itself: on a thread of its own, so that this waits `within`
    /// at most.
    pub(super) fn comms(
        self: &Arc<Self>,
        groups: Vec<(Vec<c_int>, c_int)>,
        within: Duration,
    ) -> Result<Vec<Comm>, KernelError> {
        let (sender, made) = bounded(1);
        let world = self.clone();
        let make = move || {
            let comms =
                groups.iter().map(|(processes, tag)| world.comm(processes, *tag)).collect::<Result<Vec<_>, _>>();
            // An error means that nobody waits any more.
            let _ = sender.send(comms);
        };
        let call = "MPI_Comm_create_group";
        std::thread::Builder::new().name("mpi".into()).spawn(make).map_err(|error| failed(call, &error.to_string()))?;
        let late = format!("not all members have come within {} ms", within.as_millis());
        let made = made.recv_timeout(within).unwrap_or_else(|_| Err(failed(call, &late)));
        // What was made, or is being made, may wait for members that are gone.
        made.inspect_err(|_| self.abort())
    }

    /// A communicator of these processes. All of them call this, in the same order for all groups.
    fn comm(&self, processes: &[c_int], tag: c_int) -> Result<Comm, KernelError> {
        let mut comm = Comm { raw: self.comm.raw };
        let mut raw_group = mem::MaybeUninit::uninit();
        let mut group = mem::MaybeUninit::uninit();
        // SAFETY: `processes` are ranks of the world, each once; MPI writes the handles before they are read.
        unsafe {
            check("MPI_Comm_group", ffi::MPI_Comm_group(self.comm.raw, raw_group.as_mut_ptr()))?;
            let mut all = raw_group.assume_init();
            let count = processes.len() as c_int;
            check("MPI_Group_incl", ffi::MPI_Group_incl(all, count, processes.as_ptr(), group.as_mut_ptr()))?;
            let mut group = group.assume_init();
            let made = ffi::MPI_Comm_create_group(self.comm.raw, group, tag, &mut comm.raw);
            check("MPI_Comm_create_group", made)?;
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
        if aborted || self.meet_on(&self.end, END_WITHIN).is_err() {
            mem::forget(self.universe.take());
        }
    }
}

fn failed(call: &'static str, cause: &str) -> KernelError {
    KernelError::Mpi { call, cause: cause.to_owned() }
}

fn check(call: &'static str, code: c_int) -> Result<(), KernelError> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = vec![0 as c_char; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut len = 0;
    // SAFETY: the buffer is as long as MPI's longest text and its end.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr(), &mut len) };
    let bytes: Vec<u8> = text.iter().take(len as usize).map(|c| *c as u8).collect();
    Err(failed(call, &String::from_utf8_lossy(&bytes)))
}

/// A communicator. One thread at a time uses it.
pub(super) struct Comm {
    raw: MPI_Comm,
}

// SAFETY: a handle, which threads may use at once (MPI-1).
unsafe impl Send for Comm {}
// SAFETY: as for `Send`.
unsafe impl Sync for Comm {}

impl std::fmt::Debug for Comm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Comm")
    }
}

/// Words of 4 bytes of each member in one buffer: how many, and where.
#[derive(Debug, Default)]
pub(super) struct Places {
    pub(super) counts: Vec<c_int>,
    pub(super) starts: Vec<c_int>,
}

/// What is exchanged. Members are numbers in the communicator; counts and places are of words.
pub(super) enum Transfer<'a> {
    Barrier,
    /// The largest of all members' numbers, each.
    Largest {
        x: &'a [u64; 2],
        y: &'a mut [u64; 2],
    },
    /// All members' records, one after the other.
    Records {
        x: &'a [u8],
        y: &'a mut [u8],
    },
    AllReduce {
        op: ReduceOp,
        x: &'a [f32],
        y: &'a mut [f32],
    },
    /// Member i gets `counts[i]` of x, in order.
    ReduceScatter {
        op: ReduceOp,
        x: &'a [f32],
        y: &'a mut [f32],
        counts: Vec<c_int>,
    },
    AllGather {
        x: &'a [f32],
        y: &'a mut [f32],
        places: Places,
    },
    AllToAll {
        x: &'a [f32],
        sent: Places,
        y: &'a mut [f32],
        taken: Places,
    },
    Broadcast {
        y: &'a mut [f32],
        root: usize,
    },
    Send {
        x: &'a [f32],
        to: usize,
        tag: c_int,
    },
    Receive {
        y: &'a mut [f32],
        from: usize,
        tag: c_int,
    },
    Post {
        x: Box<[u64; 2]>,
        to: usize,
        tag: c_int,
    },
}

fn raw(op: ReduceOp) -> MPI_Op {
    // SAFETY: constants of the library.
    unsafe {
        match op {
            ReduceOp::Sum => ffi::RSMPI_SUM,
            ReduceOp::Max => ffi::RSMPI_MAX,
        }
    }
}

/// Words that are only moved: any bits.
fn words() -> MPI_Datatype {
    // SAFETY: a constant of the library.
    unsafe { ffi::RSMPI_UINT32_T }
}

/// Where what is empty lies. OpenMPI takes a call whose two buffers begin at one place for one in place, even where one of
/// them is empty, and then does something else than the other members.
static NOTHING: [u64; 2] = [0; 2];

fn start<T>(slice: &[T]) -> *const c_void {
    if slice.is_empty() { (&raw const NOTHING[0]).cast() } else { slice.as_ptr().cast() }
}

/// Nothing is written to what is empty.
fn start_mut<T>(slice: &mut [T]) -> *mut c_void {
    if slice.is_empty() { (&raw const NOTHING[1]).cast_mut().cast() } else { slice.as_mut_ptr().cast() }
}

/// Lengths were checked to fit ([`super::count`]).
fn len<T>(slice: &[T]) -> c_int {
    slice.len() as c_int
}

impl Transfer<'_> {
    fn name(&self) -> &'static str {
        match self {
            Transfer::Barrier => "MPI_Ibarrier",
            Transfer::Largest { .. } | Transfer::AllReduce { .. } => "MPI_Iallreduce",
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
    /// Buffers and arrays stay as they are until the request has completed.
    unsafe fn start(&mut self, comm: MPI_Comm, request: *mut MPI_Request) -> c_int {
        // SAFETY: the contract; each pointer is of a slice as long as the counts beside it say.
        unsafe {
            let (float, long) = (ffi::RSMPI_FLOAT, ffi::RSMPI_UINT64_T);
            match self {
                Transfer::Barrier => ffi::MPI_Ibarrier(comm, request),
                Transfer::Largest { x, y } => {
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
                Transfer::AllGather { x, y, places } => {
                    let (counts, starts) = (places.counts.as_ptr(), places.starts.as_ptr());
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
    /// Errors come back as codes, where MPI would otherwise end the process.
    fn return_errors(&self) -> Result<(), KernelError> {
        // SAFETY: a communicator that is there, and a handler of the library.
        check("MPI_Comm_set_errhandler", unsafe { ffi::MPI_Comm_set_errhandler(self.raw, ffi::RSMPI_ERRORS_RETURN) })
    }

    /// Does a transfer, looking for trouble while it waits.
    ///
    /// # Safety
    /// When this fails, what the transfer borrows must stay where it is for ever, and nobody may use it (MPI-2).
    pub(super) unsafe fn run(&self, mut transfer: Transfer<'_>, trouble: &mut Trouble<'_>) -> Result<(), KernelError> {
        let name = transfer.name();
        let mut request = mem::MaybeUninit::uninit();
        // SAFETY: what is borrowed stays by the contract; the rest is owned by `transfer`, and see `wait`.
        check(name, unsafe { transfer.start(self.raw, request.as_mut_ptr()) })?;
        // SAFETY: MPI has made the request.
        let done = wait(name, unsafe { request.assume_init() }, trouble);
        if done.is_err() {
            mem::forget(transfer);
        }
        done
    }

    /// Takes a post of this tag, if one has come: from whom, and what it says.
    pub(super) fn posted(&self, from: Option<usize>, tag: c_int) -> Result<Option<(usize, [u64; 2])>, KernelError> {
        let (mut come, mut status) = (0, mem::MaybeUninit::<ffi::MPI_Status>::uninit());
        let mut words = [0u64; 2];
        // SAFETY: MPI writes the status before it is read; a post is two numbers, which `words` has room for, and a
        // longer message is an error of MPI's.
        unsafe {
            let source = from.map_or(ffi::RSMPI_ANY_SOURCE, |from| from as c_int);
            check("MPI_Iprobe", ffi::MPI_Iprobe(source, tag, self.raw, &mut come, status.as_mut_ptr()))?;
            if come == 0 {
                return Ok(None);
            }
            let source = status.assume_init().MPI_SOURCE;
            let into = start_mut(&mut words[..]);
            let long = ffi::RSMPI_UINT64_T;
            check("MPI_Recv", ffi::MPI_Recv(into, 2, long, source, tag, self.raw, status.as_mut_ptr()))?;
            Ok(Some((source as usize, words)))
        }
    }

    /// Frees it; no call of it may be under way, and the world must not have ended.
    pub(super) fn free(mut self) {
        // SAFETY: a communicator that is there, by the contract; MPI's word on it would change nothing.
        unsafe { ffi::MPI_Comm_free(&mut self.raw) };
    }
}

/// Waits for a request, looking for trouble.
fn wait(name: &'static str, mut request: MPI_Request, trouble: &mut Trouble<'_>) -> Result<(), KernelError> {
    let began = Instant::now();
    let mut looks = 0u32;
    loop {
        let mut done = 0;
        // SAFETY: the request is under way, and its handle is nobody else's.
        check(name, unsafe { ffi::MPI_Test(&mut request, &mut done, ffi::RSMPI_STATUS_IGNORE) })?;
        if done != 0 {
            return Ok(());
        }
        looks = looks.wrapping_add(1);
        if looks.is_multiple_of(LOOKS) {
            trouble()?;
        }
        pause(began);
    }
}

/// Lets others run between two looks.
pub(super) fn pause(began: Instant) {
    if began.elapsed() < YIELD { std::thread::yield_now() } else { std::thread::sleep(NAP) }
}
