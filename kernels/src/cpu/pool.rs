//! A stream's fork-join pool: the stream's thread and `threads - 1` helpers. Each thread runs a fixed part of the work.
//!
//! - BITS-1: a result does not depend on the number of threads. Each thread computes a part of the output. If several
//!   threads compute parts of one sum, the op's shape alone determines the terms of each part.
//! - POOL-1: the owner writes a job before it increments `generation`, and the next job only when `pending` is 0.
//!   A helper reads the job after it has seen the new `generation` and before it decrements `pending`.
//! - POOL-2: `Pool::run` returns only when `pending` is 0, so no helper uses a job after the job's borrow ends.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::tensor::split_range;

/// How long a waiting thread spins before it parks: longer than the gaps between launches, and about the time that
/// parking takes.
const SPIN: Duration = Duration::from_micros(40);

/// Minimum number of elements (of a kernel with a few operations per element) for which a fork pays off.
pub(crate) const FORK_ELEMENTS: usize = 16 * 1024;

/// Helper threads that wait for jobs. Dropping the pool ends the threads.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Makes the pool `!Sync`: only one thread may start jobs.
    one_owner: PhantomData<Cell<()>>,
}

#[derive(Default)]
struct Shared {
    generation: AtomicUsize,
    pending: AtomicUsize,
    closing: AtomicBool,
    job: UnsafeCell<Option<Job>>,
    owner: UnsafeCell<Option<Thread>>,
    owner_parked: AtomicBool,
    helper_parked: Vec<AtomicBool>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone, Copy)]
struct Job {
    work: *const (dyn Fn(usize) + Sync),
    parts: usize,
}

// SAFETY: the owner writes `job` and `owner` only while `pending` is 0. Helpers read them only between the release of a
// new generation and their own decrement of `pending` (POOL-1). Any thread may call `Fn + Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as for `Sync`; no field is tied to a thread.
unsafe impl Send for Shared {}

impl Pool {
    /// Starts a pool of `threads` threads, including the caller's. `name` is the prefix of the helpers' names.
    pub(crate) fn start(name: &str, threads: usize) -> std::io::Result<Self> {
        let helper_parked = (1..threads).map(|_| AtomicBool::new(false)).collect();
        let shared = Arc::new(Shared { helper_parked, ..Shared::default() });
        let mut pool = Self { shared, helpers: Vec::new(), one_owner: PhantomData };
        for helper in 0..threads - 1 {
            let shared = pool.shared.clone();
            let builder = thread::Builder::new().name(format!("{name}-{}", helper + 1));
            pool.helpers.push(builder.spawn(move || run_helper(&shared, helper))?);
        }
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `work(part)` for up to `threads()` parts, one per thread. Propagates a panic after all parts have ended.
    pub(crate) fn run(&self, parts: usize, work: &(dyn Fn(usize) + Sync)) {
        assert!(parts <= self.threads(), "more parts than threads");
        if parts <= 1 {
            (0..parts).for_each(work);
            return;
        }
        let shared = &*self.shared;
        assert_eq!(shared.pending.load(Ordering::Acquire), 0, "a job must not start another job");
        // SAFETY: only the lifetime is changed; by POOL-2, every use happens inside this call.
        let work_erased = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(work)
        };
        // SAFETY: `pending` is 0, so no helper reads these cells (POOL-1); `&self` stays on the owner's thread, since
        // `Pool` is not `Sync`.
        unsafe {
            *shared.job.get() = Some(Job { work: work_erased, parts });
            *shared.owner.get() = Some(thread::current());
        }
        shared.pending.store(self.helpers.len(), Ordering::Relaxed);
        shared.generation.fetch_add(1, Ordering::SeqCst);
        for (helper, parked) in self.helpers.iter().zip(&shared.helper_parked) {
            if parked.swap(false, Ordering::SeqCst) {
                helper.thread().unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| work(0)));
        wait_until(|| shared.pending.load(Ordering::Acquire) == 0, &shared.owner_parked);
        let helpers_panic = shared.panic.lock().take();
        if let Some(panic) = own.err().or(helpers_panic) {
            resume_unwind(panic);
        }
    }

    /// Number of threads that pays off for `elements` elements of light work.
    pub(crate) fn parts_for(&self, elements: usize) -> usize {
        (elements / FORK_ELEMENTS).clamp(1, self.threads())
    }

    /// Splits the rows of `outs` (of any widths) into parts, and calls `work(rows, outs)` on each part. `weight`, in
    /// elements of light work, determines the number of threads.
    pub(crate) fn rows<T: Send, const N: usize>(
        &self,
        rows: usize,
        weight: usize,
        outs: [&mut [T]; N],
        work: impl Fn(Range<usize>, [&mut [T]; N]) + Sync,
    ) {
        if rows == 0 {
            return;
        }
        let outs = outs.map(|out| {
            assert!(out.len().is_multiple_of(rows), "outputs must have whole rows");
            Pieces::new(out)
        });
        let parts = self.parts_for(weight).min(rows);
        self.run(parts, &|part| {
            let range = split_range(rows, parts, part);
            let part_outs = outs.each_ref().map(|pieces| {
                let width = pieces.len / rows;
                // SAFETY: the parts' ranges of rows are disjoint, and each part runs only once.
                unsafe { pieces.range(range.start * width..range.end * width) }
            });
            work(range, part_outs);
        });
    }

    /// Like [`Pool::rows`], but calls `work(range, out)` on parts of a slice, which is split at multiples of `grain`.
    pub(crate) fn ranges<T: Send>(
        &self,
        out: &mut [T],
        grain: usize,
        weight: usize,
        work: impl Fn(Range<usize>, &mut [T]) + Sync,
    ) {
        let (len, grains) = (out.len(), out.len().div_ceil(grain));
        let pieces = Pieces::new(out);
        let parts = self.parts_for(weight).min(grains);
        self.run(parts, &|part| {
            let grains = split_range(grains, parts, part);
            let range = grains.start * grain..(grains.end * grain).min(len);
            // SAFETY: the parts' ranges are disjoint, and each part runs only once.
            work(range.clone(), unsafe { pieces.range(range) });
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        self.shared.generation.fetch_add(1, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            let _ = helper.join();
        }
    }
}

fn run_helper(shared: &Shared, helper: usize) {
    let mut seen = 0;
    loop {
        wait_until(|| shared.generation.load(Ordering::SeqCst) != seen, &shared.helper_parked[helper]);
        seen += 1;
        if shared.closing.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the job was published before this generation (POOL-1).
        let (job, owner) = unsafe { (*shared.job.get(), (*shared.owner.get()).clone()) };
        if let Some(job) = job
            && helper + 1 < job.parts
        {
            // SAFETY: the owner waits until `pending` is 0, so the closure outlives this call (POOL-2).
            let work = unsafe { &*job.work };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(helper + 1))) {
                shared.panic.lock().get_or_insert(panic);
            }
        }
        if shared.pending.fetch_sub(1, Ordering::SeqCst) == 1
            && shared.owner_parked.swap(false, Ordering::SeqCst)
            && let Some(owner) = owner
        {
            owner.unpark();
        }
    }
}

/// Waits until `ready` returns true: spins for up to [`SPIN`], and then parks. The thread that makes `ready` true must
/// afterwards read `parked` and, if it is set, unpark this thread.
fn wait_until(ready: impl Fn() -> bool, parked: &AtomicBool) {
    let mut began = None;
    loop {
        for _ in 0..64 {
            if ready() {
                return;
            }
            std::hint::spin_loop();
        }
        if began.get_or_insert_with(Instant::now).elapsed() < SPIN {
            continue;
        }
        parked.store(true, Ordering::SeqCst);
        // Checks `ready` again after the store, because the other thread reads `parked` after it makes `ready` true.
        while parked.load(Ordering::SeqCst) && !ready() {
            thread::park();
        }
        parked.store(false, Ordering::SeqCst);
    }
}

pub(crate) struct Pieces<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a shared `Pieces` only hands out ranges, which `Pieces::range` requires to be disjoint.
unsafe impl<T: Send> Sync for Pieces<'_, T> {}
// SAFETY: as for `Sync`.
unsafe impl<T: Send> Send for Pieces<'_, T> {}

impl<'a, T> Pieces<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// # Safety
    /// Ranges that are used at the same time do not overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "piece out of bounds");
        // SAFETY: the range is in bounds (assertion), exclusive (contract) and alive (borrow).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
