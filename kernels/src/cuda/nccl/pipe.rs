//! One-way byte transfer from a GPU of one process to a GPU of another process. A pipe has a communicator of the two
//! GPUs, and a dedicated stream on each side, so that a transfer waits only for earlier transfers.
//!
//! - PIPE-1: the sender announces its sends to the receiver in the order of its NCCL send calls. The receiver makes a
//!   receive call when the announcement arrives, on a thread that waits only for announcements and transfers.
//! - PIPE-2: the sender calls NCCL's send, announces it, and only then waits: NCCL may wait for the receiver's call.
//! - PIPE-3: the sender's data is complete before the send call, and nobody reads the destination during the transfer.
//!   The register protocol guarantees both, so a pipe's stream waits for no other stream. Each end keeps its memory
//!   allocated until its stream has passed the call.
//! - PIPE-4: each end's stream writes its progress before and after each call (PROGRESS-1), to identify a hanging pipe.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::comm::{Comm, GroupMember, Transfer};
use super::engine::{ISSUE_SPIN, Inner, Nccl};
use crate::cuda::device_memory::DeviceMemory;
use crate::cuda::poller::release;
use crate::cuda::raw_stream::RawStream;
use crate::error::{KernelError, Result};
use crate::event::Event;
use crate::memory::Arena;

/// Poll interval while an end waits for bytes to arrive, after a short spin.
const POLL_INTERVAL: Duration = Duration::from_micros(20);
/// Maximum wait for pending work at shutdown before the pipe is aborted. After the abort, the same limit applies.
const DRAIN_WITHIN: Duration = Duration::from_secs(2);

/// One end of a pipe, used by one thread.
#[derive(Debug)]
pub struct Pipe {
    inner: Arc<Inner>,
    comm: Arc<Comm>,
    peer: usize,
    stream: RawStream,
    /// Memory of a call that NCCL has not put on the stream. It is kept until NCCL does so, or until an abort.
    pending: Mutex<Option<Arena>>,
}

/// A send that NCCL has put on its stream.
#[derive(Clone, Debug)]
pub struct Sent(Event);

impl Nccl {
    /// Opens a member's end of a pipe over a group of two. The pipe's calls follow the order of its own stream, not the
    /// device's issue order (ORDER-1). The pipe cannot be used after this engine is dropped. See [`Pipe::connect`].
    ///
    /// # Errors
    /// [`KernelError::Arguments`] for a membership that was not joined; [`KernelError::Cuda`].
    pub fn pipe(&self, membership: &GroupMember) -> Result<Pipe> {
        let comm =
            self.0.comms.get(&(membership.group.id, membership.member)).filter(|_| membership.group.ranks.len() == 2);
        let Some(comm) = comm.cloned() else {
            let got = format!("group {}, member {}", membership.group.id, membership.member);
            return Err(KernelError::arguments("pipe", "group", "a group of two that the engine has joined", got));
        };
        let (rank, peer) = (membership.group.ranks.rank(membership.member), 1 - membership.member);
        let name = format!("{}{}", ["to ", "from "][membership.member], membership.group.ranks.rank(peer));
        let stream = RawStream::new(&membership.gpu, rank, &name, true)?;
        Ok(Pipe { inner: self.0.clone(), comm, peer, stream, pending: Mutex::default() })
    }
}

impl Pipe {
    /// Transfers a few bytes in the pipe's direction and waits for them, since NCCL connects on first use. All
    /// processes connect the ends of all pipes in one common order, so each end waits only for an end that will
    /// connect.
    ///
    /// # Errors
    /// [`KernelError::Cuda`], also if the other end does not connect in time; [`KernelError::Aborted`].
    pub fn connect(&self, within: Duration) -> Result<()> {
        const BYTES: usize = 16;
        let deadline = Instant::now() + within;
        // This memory is freed before the devices' arenas are created, so no plan counts it.
        let memory = DeviceMemory::new(&self.stream.gpu, self.stream.rank, BYTES, &Arc::default())?;
        let arena = Arena::on_device(memory);
        // The pipe's first member sends.
        let (sends, call) = if self.peer == 1 { (true, "ncclSend") } else { (false, "ncclRecv") };
        let timeout_error = || self.inner.abort_on_error(self.comm.timeout_error(call, within));
        self.call(sends, &arena, [(0, BYTES)].into_iter())?;
        self.inner.settle(&self.comm, Some(within)).unwrap_or_else(|| Err(timeout_error()))?;
        let sent = self.record_end(&arena)?;
        if !self.has_finished(&sent, Some(deadline))? {
            return Err(timeout_error());
        }
        Ok(())
    }

    /// Makes NCCL send these ranges of an arena (offset and length in bytes) as one message. After this, announce the
    /// send to the other end (PIPE-2), then call [`Pipe::settle`].
    ///
    /// # Errors
    /// [`KernelError::Arguments`] for memory of another GPU or a range outside the arena; [`KernelError::Cuda`];
    /// [`KernelError::Aborted`].
    pub fn send(&self, arena: &Arena, ranges: impl Iterator<Item = (usize, usize)>) -> Result<()> {
        self.call(true, arena, ranges)
    }

    /// Waits until NCCL has put the last send, which reads `arena`, on the stream (PIPE-2).
    ///
    /// # Errors
    /// [`KernelError::Cuda`]; [`KernelError::Aborted`].
    pub fn settle(&self, arena: &Arena) -> Result<Sent> {
        // `Inner::settle` returns `None` only after a timeout, and there is none here.
        self.inner.settle(&self.comm, None).unwrap_or(Ok(()))?;
        self.record_end(arena)
    }

    /// Marks the end of the last call, which NCCL has put on the stream. Keeps `arena` until the stream reaches it.
    fn record_end(&self, arena: &Arena) -> Result<Sent> {
        self.stream.end_call().map_err(|error| self.inner.abort_on_error(error))?;
        let event = Event::default();
        self.stream.report_end(release(arena.clone(), event.clone()))?;
        *self.pending.lock() = None;
        Ok(Sent(event))
    }

    /// Receives the announced bytes into these ranges of an arena and waits for them.
    ///
    /// # Errors
    /// Those of [`Pipe::send`].
    pub fn receive(&self, arena: &Arena, ranges: impl Iterator<Item = (usize, usize)>) -> Result<()> {
        self.call(false, arena, ranges)?;
        let received = self.settle(arena)?;
        self.wait(&received)
    }

    /// Waits until a send or receive has finished with its memory.
    ///
    /// # Errors
    /// [`KernelError::Cuda`]; [`KernelError::Aborted`].
    pub fn wait(&self, sent: &Sent) -> Result<()> {
        self.has_finished(sent, None).map(drop)
    }

    /// As [`Pipe::wait`], but returns false if the transfer has not finished by the deadline.
    fn has_finished(&self, sent: &Sent, deadline: Option<Instant>) -> Result<bool> {
        let began = Instant::now();
        loop {
            // Query before `check`: an aborted call looks complete on its stream, but its bytes are missing (NCCL-3).
            let is_done = sent.0.query();
            self.inner.abort_status.check()?;
            self.stream.gpu.context.check_alive()?;
            if is_done || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(is_done);
            }
            if began.elapsed() < ISSUE_SPIN {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(POLL_INTERVAL);
            }
        }
    }

    fn call(&self, sends: bool, arena: &Arena, ranges: impl Iterator<Item = (usize, usize)>) -> Result<()> {
        self.inner.abort_status.check()?;
        let context = &self.stream.gpu.context;
        let memory = arena.device_memory().filter(|memory: &&DeviceMemory| Arc::ptr_eq(&memory.gpu.context, context));
        let Some(memory) = memory else {
            let (expected, got) = (format!("memory of {}", context.place()), "memory of another device");
            return Err(KernelError::arguments("pipe", "memory", expected, got));
        };
        let mut transfers = Vec::new();
        for (offset, bytes) in ranges {
            if offset.checked_add(bytes).is_none_or(|end| end > arena.bytes()) {
                let expected = format!("a range inside the {} bytes of the arena", arena.bytes());
                let got = format!("{bytes} bytes at byte {offset}");
                return Err(KernelError::arguments("pipe", "range", expected, got));
            }
            let address = memory.address() + offset as u64;
            transfers.push(Transfer { sends, peer: self.peer, address, elements: bytes });
        }
        context.bind()?;
        *self.pending.lock() = Some(arena.clone());
        // Abort, since the other end would wait forever for a call that NCCL refused.
        self.stream.begin_call(None).map_err(|error| self.inner.abort_on_error(error))?;
        self.comm.record_call(&self.stream);
        self.comm.transfer(&transfers, None, &self.stream).map_err(|error| self.inner.abort_on_error(error))
    }

    /// Waits until the stream is idle or the device is lost. Returns false after [`DRAIN_WITHIN`]. Returns false
    /// immediately if NCCL has not put the last call on the stream.
    fn drain(&self) -> bool {
        if self.pending.lock().is_some() {
            return false;
        }
        let deadline = Instant::now() + DRAIN_WITHIN;
        while !self.stream.is_idle() && self.stream.gpu.context.lost().is_none() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        true
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        if !self.drain() {
            self.comm.abort();
            self.drain();
        }
        self.stream.close(&KernelError::Closed { device: self.stream.rank });
    }
}
