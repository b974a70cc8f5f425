//! Bytes from a GPU of one process to a GPU of another: a communicator of the two, and a stream of its own on both, so that what
//! travels waits for nothing but what travelled before it.
//!
//! - PIPE-1: both ends call in one order, that in which the sender announces its sends. A receive is called when its send is
//!   announced, by a thread that waits for nothing else meanwhile.
//! - PIPE-2: a send is announced when it has been called, before anybody waits for it: NCCL may put it on its stream only when
//!   the receiver has called too.
//! - PIPE-3: what is sent was written when the send is called, and where it is received nobody reads: the caller knows both
//!   from the register protocol, so neither stream waits for another. Memory stays until the stream has done with it.
//! - PIPE-4: around each call the stream writes how far it is, as around collectives, so a pipe that hangs can be named.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::comm::{Comm, Transfer};
use super::{ISSUE_SPIN, Inner};
use crate::cuda::memory::DeviceMemory;
use crate::cuda::poller::{Then, Track};
use crate::cuda::raw_stream::RawStream;
use crate::error::KernelError;
use crate::event::Event;
use crate::memory::Arena;

/// How often a thread asks whether bytes have arrived, after a spin.
const LOOK_EVERY: Duration = Duration::from_micros(20);
/// How long what is under way may take at the end, before it is broken off; and then again.
const DRAIN_WITHIN: Duration = Duration::from_secs(2);

/// One end of it, for one thread.
#[derive(Debug)]
pub struct Pipe {
    inner: Arc<Inner>,
    comm: Arc<Comm>,
    /// Index of the other end.
    peer: usize,
    lane: RawStream,
    track: Arc<Track>,
    /// Of a call that was not settled: its memory must stay until the call is broken off.
    open: Mutex<Option<Arena>>,
}

/// A send that NCCL has put on its stream.
#[derive(Clone, Debug)]
pub struct Sent(Event);

impl Pipe {
    pub(super) fn new(inner: Arc<Inner>, comm: Arc<Comm>, peer: usize, lane: RawStream) -> Self {
        let track = lane.gpu().poller().track(&lane);
        Self { inner, comm, peer, lane, track, open: Mutex::default() }
    }

    /// Sends a few bytes through, in the pipe's direction, and waits for them: what NCCL connects when it is first used is
    /// then connected. All processes do so with their ends, in one order of all pipes, so that whoever waits waits for
    /// somebody who is on the way.
    ///
    /// # Errors
    /// [`KernelError::Cuda`], also when the other end does not come within the time; [`KernelError::Aborted`].
    pub fn connect(&self, within: Duration) -> Result<(), KernelError> {
        const BYTES: usize = 16;
        let deadline = Instant::now() + within;
        // Given back before the devices' arenas are made, so it is in nobody's plan.
        let memory = DeviceMemory::new(self.lane.gpu(), self.lane.rank(), BYTES, &Arc::default())?;
        let arena = Arena::cuda(memory);
        // The pipe's first member sends.
        let (sends, call) = if self.peer == 1 { (true, "ncclSend") } else { (false, "ncclRecv") };
        let late = || self.inner.failed(self.comm.late(call, within));
        self.call(sends, &arena, [(0, BYTES)].into_iter())?;
        self.inner.settle(&self.comm, Some(within)).unwrap_or_else(|| Err(late()))?;
        let over = self.settled(&arena)?;
        if !self.is_over(&over, Some(deadline))? {
            return Err(late());
        }
        Ok(())
    }

    /// Calls for a send of these ranges of an arena (offset and length in bytes), all as one. It has to be announced to the
    /// other end next (PIPE-2), and then settled.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] for memory that is not this GPU's, or not the arena's; [`KernelError::Cuda`];
    /// [`KernelError::Aborted`].
    pub fn send(&self, arena: &Arena, ranges: impl Iterator<Item = (usize, usize)>) -> Result<(), KernelError> {
        self.call(true, arena, ranges)
    }

    /// Waits until the last send, which was of this arena, is on the stream: that takes the other end's call.
    ///
    /// # Errors
    /// [`KernelError::Cuda`]; [`KernelError::Aborted`].
    pub fn settle(&self, arena: &Arena) -> Result<Sent, KernelError> {
        // Without a limit of time it is never given up.
        self.inner.settle(&self.comm, None).unwrap_or(Ok(()))?;
        self.settled(arena)
    }

    /// What the last call, which is on the stream, is over with.
    fn settled(&self, arena: &Arena) -> Result<Sent, KernelError> {
        self.lane.end_call().map_err(|error| self.inner.failed(error))?;
        let event = Event::default();
        self.lane.gpu().poller().push(&self.track, self.lane.record()?, Then::LetGo(arena.clone(), event.clone()));
        *self.open() = None;
        Ok(Sent(event))
    }

    /// Receives what was announced into these ranges of an arena, and waits until it is there.
    ///
    /// # Errors
    /// As for [`Pipe::send`].
    pub fn receive(&self, arena: &Arena, ranges: impl Iterator<Item = (usize, usize)>) -> Result<(), KernelError> {
        self.call(false, arena, ranges)?;
        let received = self.settle(arena)?;
        self.wait(&received)
    }

    /// Waits until a send, or a receive, has done with its memory.
    ///
    /// # Errors
    /// [`KernelError::Cuda`]; [`KernelError::Aborted`].
    pub fn wait(&self, sent: &Sent) -> Result<(), KernelError> {
        self.is_over(sent, None).map(drop)
    }

    /// True when it has done with its memory, false when it has not at the deadline.
    fn is_over(&self, sent: &Sent, deadline: Option<Instant>) -> Result<bool, KernelError> {
        let began = Instant::now();
        loop {
            // Asked first: what was broken off is done on its stream, and its bytes are not there (NCCL-3).
            let is_done = sent.0.query();
            if let Some(error) = self.inner.outcome.aborted() {
                return Err(error);
            }
            self.lane.gpu().context().check_alive()?;
            if is_done || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(is_done);
            }
            if began.elapsed() < ISSUE_SPIN {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }

    fn call(
        &self,
        sends: bool,
        arena: &Arena,
        ranges: impl Iterator<Item = (usize, usize)>,
    ) -> Result<(), KernelError> {
        if let Some(error) = self.inner.outcome.aborted() {
            return Err(error);
        }
        let context = self.lane.gpu().context();
        let memory = arena.device_memory().filter(|memory| Arc::ptr_eq(memory.gpu().context(), context));
        let Some(memory) = memory else {
            return Err(KernelError::arguments("pipe", "memory", context.place(), "memory of something else"));
        };
        let mut transfers = Vec::new();
        for (offset, bytes) in ranges {
            if offset.checked_add(bytes).is_none_or(|end| end > arena.bytes()) {
                let (expected, got) = (format!("at most {} bytes", arena.bytes()), format!("{bytes} at byte {offset}"));
                return Err(KernelError::arguments("pipe", "range is out of bounds", expected, got));
            }
            let address = memory.address() + offset as u64;
            transfers.push(Transfer { sends, peer: self.peer, address, elements: bytes });
        }
        context.bind()?;
        *self.open() = Some(arena.clone());
        // What NCCL has not accepted the other end waits for in vain.
        self.lane.begin_call(None).map_err(|error| self.inner.failed(error))?;
        self.comm.note(&self.lane);
        self.comm.transfer(&transfers, None, &self.lane).map_err(|error| self.inner.failed(error))
    }
}

impl Pipe {
    fn open(&self) -> MutexGuard<'_, Option<Arena>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all is done in time.
    fn drains(&self) -> bool {
        if self.open().is_some() {
            return false;
        }
        let (deadline, gpu) = (Instant::now() + DRAIN_WITHIN, self.lane.gpu());
        while !gpu.poller().is_idle(&self.track) && gpu.context().lost().is_none() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        true
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        if !self.drains() {
            self.comm.abort();
            self.drains();
        }
        let gpu = self.lane.gpu();
        gpu.poller().forget(&self.track, &KernelError::Closed { device: self.lane.rank() });
    }
}
