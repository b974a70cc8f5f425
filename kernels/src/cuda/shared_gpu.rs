//! Collectives between devices of one process that share GPUs. NCCL does not support shared GPUs. The members meet on
//! the host. The last member to arrive enqueues the parts of all members on their streams, and orders these parts by
//! events. No host thread waits for a GPU. Data on another GPU is copied to the reader's GPU before a kernel reads it.
//!
//! - LOCAL-1: only the last member enqueues the parts. Until then, the stream threads of the earlier members wait.
//! - LOCAL-2: a member's stream accesses another member's memory only after that member's `ready` event, and runs
//!   later work only after all members' parts. This is the rule MEET-1 of `in_process`, applied to streams.

use std::sync::Arc;

use super::context::Context;
use super::event::Recorded;
use super::gpu_call::GpuCall;
use super::lower::collective::{PIECE_BYTES, contiguous_start, regions};
use super::raw_stream::RawStream;
use super::strided_copy::{StridedRegion, combine, copy_region_from};
use crate::bound::Bound;
use crate::collective::exchange::taken;
use crate::collective::rendezvous::{Arrival, Groups, Post};
use crate::collective::{
    AbortStatus, Collective, CollectiveCall, CollectiveKind, DeviceCollective, Enqueue, Enqueued, MemberWait, ReduceOp,
};
use crate::error::Result;
use crate::event::BackendObject;
use crate::tensor::{DType, Region, element_count, split_range};

/// The engine of devices that share GPUs. All these devices share one engine.
#[derive(Debug, Default)]
pub struct SharedGpu(Groups<Memory>);

#[derive(Clone, Debug)]
struct Memory {
    /// Device addresses of the input x and the output y; 0 if absent.
    x: u64,
    y: u64,
    /// Address of the launch's workspace (STAGE-1).
    workspace: u64,
    stream: Arc<RawStream>,
    /// The event after all earlier work on the member's stream.
    ready: Arc<Recorded>,
}

impl Memory {
    fn context(&self) -> &Context {
        &self.stream.gpu.context
    }

    fn element(&self, element: usize) -> u64 {
        self.y + (element * DType::F32.bytes()) as u64
    }
}

impl SharedGpu {
    /// Creates an engine without groups. The first call of a group adds the group.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Enqueues a transfer on the receiver's stream. The sender's stream waits for the transfer.
fn enqueue_transfer(sender: &Post<Memory>, receiver: &Post<Memory>) -> Result<()> {
    let (bytes, stream) = (element_count(&sender.x_shape) * sender.dtype.bytes(), &receiver.memory.stream);
    let sender = &sender.memory;
    bind(stream)?;
    stream.wait(&sender.ready)?;
    stream.copy_from(receiver.memory.y, sender.context(), sender.x, bytes)?;
    let done = stream.record()?;
    bind(&sender.stream)?;
    sender.stream.wait(&done)
}

/// Binds the context of the stream's GPU, as enqueueing requires.
fn bind(stream: &RawStream) -> Result<()> {
    stream.gpu.context.bind()
}

fn wait_for_all(posts: &[Post<Memory>], events: &[Arc<Recorded>]) -> Result<()> {
    for (i, post) in posts.iter().enumerate() {
        bind(&post.memory.stream)?;
        for (_, event) in events.iter().enumerate().filter(|(j, _)| *j != i) {
            post.memory.stream.wait(event)?;
        }
    }
    Ok(())
}

fn record_all(posts: &[Post<Memory>]) -> Result<Vec<Arc<Recorded>>> {
    posts.iter().map(|post| bind(&post.memory.stream).and_then(|()| post.memory.stream.record())).collect()
}

/// Enqueues all members' parts on their streams (LOCAL-2).
fn enqueue_all(posts: &[Post<Memory>]) -> Result<()> {
    let Some(first) = posts.first() else { return Ok(()) };
    let ready: Vec<_> = posts.iter().map(|post| post.memory.ready.clone()).collect();
    wait_for_all(posts, &ready)?;
    for (i, post) in posts.iter().enumerate() {
        bind(&post.memory.stream)?;
        match &first.call.kind {
            CollectiveKind::AllReduce { op } => {
                let own = split_range(element_count(&post.y_shape), posts.len(), i);
                let chunk = Region { start: vec![own.start], size: vec![own.len()] };
                reduce(posts, i, *op, (&[element_count(&post.y_shape)], &chunk), post.memory.element(own.start))?;
            }
            CollectiveKind::ReduceScatter { op, parts } => {
                reduce(posts, i, *op, (&post.x_shape, &parts.region(i)), post.memory.y)?
            }
            CollectiveKind::Broadcast { root } => {
                let (root, bytes) = (&posts[*root], element_count(&post.y_shape) * post.dtype.bytes());
                post.memory.stream.copy_from(post.memory.y, root.memory.context(), root.memory.x, bytes)?;
            }
            kind => {
                if let Some([sources, targets]) = regions(kind, &post.y_shape) {
                    gather(posts, i, &sources, &targets[i])?;
                }
            }
        }
    }
    if let CollectiveKind::AllReduce { .. } = first.call.kind {
        wait_for_all(posts, &record_all(posts)?)?;
        exchange_chunks(posts)?;
    }
    wait_for_all(posts, &record_all(posts)?)
}

/// The second half of an all-reduce: each member copies the reduced chunk of every other member.
fn exchange_chunks(posts: &[Post<Memory>]) -> Result<()> {
    for (i, post) in posts.iter().enumerate() {
        bind(&post.memory.stream)?;
        for (j, other) in posts.iter().enumerate().filter(|(j, _)| *j != i) {
            let chunk = split_range(element_count(&post.y_shape), posts.len(), j);
            let (to, from) = (post.memory.element(chunk.start), other.memory.element(chunk.start));
            post.memory.stream.copy_from(to, other.memory.context(), from, chunk.len() * post.dtype.bytes())?;
        }
    }
    Ok(())
}

/// Combines the region `part` of all members' x (of shape `shape`) into `y`, on the stream of member `me`. If the
/// region is not contiguous, first copies it from every member to a slot of `me`'s workspace. If it is contiguous,
/// copies it to slots only from other GPUs, piece by piece.
fn reduce(posts: &[Post<Memory>], me: usize, op: ReduceOp, (shape, part): (&[usize], &Region), y: u64) -> Result<()> {
    let (own, elements) = (&posts[me], part.element_count());
    let bytes = |elements: usize| elements * own.dtype.bytes();
    let slot = |i: usize, elements: usize| own.memory.workspace + (i * bytes(elements)) as u64;
    let Some(start) = contiguous_start(shape, part) else {
        for (i, post) in posts.iter().enumerate() {
            let to = StridedRegion::whole(slot(i, elements), &part.size);
            let from = StridedRegion::new(post.memory.x, shape, part.clone());
            copy_region_from(&own.memory.stream, post.memory.context(), &from, &to, own.dtype)?;
        }
        let xs: Vec<u64> = posts.iter().enumerate().map(|(i, _)| slot(i, elements)).collect();
        return combine(&own.memory.stream, op, &xs, y, elements);
    };
    let all_on_one_gpu = posts.iter().all(|post| own.memory.stream.is_on(post.memory.context()));
    let chunk = if all_on_one_gpu { elements } else { elements.min(PIECE_BYTES / own.dtype.bytes()) };
    for offset in (0..elements).step_by(chunk.max(1)) {
        let count = chunk.min(elements - offset);
        let mut xs = Vec::new();
        for (i, post) in posts.iter().enumerate() {
            let x = post.memory.x + bytes(start + offset) as u64;
            if own.memory.stream.is_on(post.memory.context()) {
                xs.push(x);
                continue;
            }
            own.memory.stream.copy_from(slot(i, chunk), post.memory.context(), x, bytes(count))?;
            xs.push(slot(i, chunk));
        }
        combine(&own.memory.stream, op, &xs, y + bytes(offset) as u64, count)?;
    }
    Ok(())
}

fn gather(posts: &[Post<Memory>], member: usize, sources: &[Region], target: &Region) -> Result<()> {
    let own = &posts[member];
    for (other, boxes) in taken(member, sources, target) {
        let source = &sources[other];
        for common in &boxes {
            let from = StridedRegion::new(posts[other].memory.x, &source.size, common.relative_to(source));
            let to = StridedRegion::new(own.memory.y, &target.size, common.relative_to(target));
            copy_region_from(&own.memory.stream, posts[other].memory.context(), &from, &to, own.dtype)?;
        }
    }
    Ok(())
}

impl Enqueue for SharedGpu {
    fn enqueue(&self, call: &CollectiveCall, bound: &Bound<'_>, stream: BackendObject) -> Result<Enqueued> {
        let rendezvous = self.0.enter(call, &bound.reads, &bound.writes, false)?;
        let GpuCall { x, y, workspace, stream, .. } = GpuCall::new(call, bound, stream)?;
        let ready = stream.record()?;
        let memory = Memory { x, y, workspace, stream: stream.clone(), ready };
        let post = Post::new(call, &bound.reads, &bound.writes, memory);
        // Enqueueing binds other GPUs' contexts. `and(bind(..))` restores the caller's context, even after an error.
        let arrival = if post.ends().is_some() {
            rendezvous.transfer(post, |sender, receiver| {
                enqueue_transfer(sender, receiver).and(bind(&stream))?;
                self.0.received.count(&receiver.call, &receiver.y_shape, receiver.dtype);
                Ok(())
            })?
        } else {
            rendezvous.join(post, |posts| {
                enqueue_all(&posts).and(bind(&stream))?;
                posts.iter().for_each(|post| self.0.received.count(&post.call, &post.y_shape, post.dtype));
                Ok(None)
            })?
        };
        Ok(match arrival {
            Arrival::Complete(_) => Enqueued::Issued,
            Arrival::Waits(awaited) => Enqueued::Pending(Box::new(move || rendezvous.wait_for(awaited).map(drop))),
        })
    }
}

impl Collective for SharedGpu {
    fn abort(&self, cause: &str) {
        self.0.abort(cause);
    }

    /// The host does not know which streams wait on the GPU for other streams.
    fn waits(&self) -> Vec<MemberWait> {
        Vec::new()
    }

    fn knows_waits(&self) -> bool {
        false
    }

    fn abort_statuses(&self) -> Vec<AbortStatus> {
        vec![self.0.abort_status.clone()]
    }

    fn on_device(&self, _: &CollectiveCall) -> Option<DeviceCollective<'_>> {
        Some(DeviceCollective(self))
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        self.0.received.of(rank)
    }
}
