//! Collectives between the devices of one process. After a rendezvous, members read each other's memory directly.
//!
//! - MEET-1: all members of a call (for a send, the sender and the receiver) have joined the call before any of them
//!   accesses another member's memory. No member leaves before all of them have finished. During the call, the register
//!   protocol keeps other work from writing x or y and from reading y.
//! - MEET-2: arguments are checked at the rendezvous. After the rendezvous, a call cannot fail, and waits only while
//!   other members copy. So an abort needs to wake only members that wait for a rendezvous.
#![allow(unsafe_code)]

use crate::collective::exchange::{ExchangeBuffers, Posted, copy_elements, exchange};
use crate::collective::rendezvous::{Arrival, Groups, Post, Posts, Rendezvous};
use crate::collective::{Collective, CollectiveCall, MemberWait};
use crate::error::Result;
use crate::memory::View;
use crate::tensor::element_count;

/// The engine that all devices of one process share.
#[derive(Debug, Default)]
pub struct InProcess(Groups<Buffers>);

/// A member's buffers. If the call has only one buffer, both fields refer to it.
#[derive(Clone, Debug)]
struct Buffers {
    x: Posted,
    y: Posted,
}

impl InProcess {
    /// Creates an engine without groups. The first call of a group adds the group.
    pub fn new() -> Self {
        Self::default()
    }

    fn exchange(&self, rendezvous: &Rendezvous<Buffers>, member: usize, posts: &Posts<Buffers>) -> Result<()> {
        let Post { call, x_shape, y_shape, dtype, .. } = &posts[member];
        let (xs, ys): (Vec<_>, Vec<_>) =
            posts.iter().map(|post| (post.memory.x.clone(), post.memory.y.clone())).unzip();
        let buffers = ExchangeBuffers { call, x_shape, y_shape, xs: &xs, y: &ys[member], ys: &ys };
        let barrier = || {
            rendezvous.barrier(xs.len());
            Ok(())
        };
        exchange(&buffers, &barrier)?;
        barrier()?;
        self.0.received.count(call, y_shape, *dtype);
        Ok(())
    }

    fn copy(&self, sender: &Post<Buffers>, receiver: &Post<Buffers>) {
        let elements = element_count(&receiver.y_shape);
        // SAFETY: x and y are whole views of the same size. The member that arrived first stays in its call. Only the
        // receiver accesses y.
        unsafe { copy_elements(&sender.memory.x, 0, &receiver.memory.y, 0, elements) };
        self.0.received.count(&receiver.call, &receiver.y_shape, receiver.dtype);
    }
}

impl Collective for InProcess {
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<()> {
        let rendezvous = self.0.enter(call, reads, writes, true)?;
        let (x, y) = (reads.first().or(writes.first()), writes.first().or(reads.first()));
        let Some((x, y)) = x.zip(y) else { return Ok(()) };
        let post = Post::new(call, reads, writes, Buffers { x: Posted::of(x), y: Posted::of(y) });
        let is_transfer = post.ends().is_some();
        let arrival = if is_transfer {
            rendezvous.transfer(post, |sender, receiver| {
                self.copy(sender, receiver);
                Ok(())
            })?
        } else {
            rendezvous.join(post, |posts| Ok(Some(posts.into())))?
        };
        let posts = match arrival {
            Arrival::Complete(posts) => posts,
            Arrival::Waits(awaited) => rendezvous.wait_for(awaited)?,
        };
        match posts {
            Some(posts) if !is_transfer => self.exchange(&rendezvous, call.member, &posts),
            _ => Ok(()),
        }
    }

    fn abort(&self, cause: &str) {
        self.0.abort(cause);
    }

    fn waits(&self) -> Vec<MemberWait> {
        self.0.waits()
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        self.0.received.of(rank)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::collective::{CollectiveKind, Group, ReduceOp};
    use crate::memory::Arena;
    use crate::tensor::DType;

    /// A timeout far longer than any wait in these tests.
    const DEADLINE: Duration = Duration::from_secs(20);

    fn wait_until_waits_are(engine: &InProcess, expected: &[MemberWait]) {
        let until = Instant::now() + DEADLINE;
        while engine.waits() != expected {
            assert!(Instant::now() < until, "{:?}", engine.waits());
            thread::yield_now();
        }
    }

    #[test]
    fn waits_lists_each_member_and_its_peers() {
        let group = Arc::new(Group { id: 7, ranks: vec![4, 2, 9].into() });
        for (kind, expected) in [
            (CollectiveKind::AllReduce { op: ReduceOp::Sum }, vec![(4, 2), (4, 9)]),
            (CollectiveKind::Send { to: 2 }, vec![(4, 9)]),
            (CollectiveKind::Receive { from: 1 }, vec![(4, 2)]),
        ] {
            let engine = Arc::new(InProcess::new());
            assert_eq!(engine.waits(), []);
            let call = CollectiveCall { group: group.clone(), member: 0, kind };
            let member = thread::spawn({
                let engine = engine.clone();
                move || {
                    let arena = Arena::host(0, 256, &Arc::default()).expect("memory");
                    let view = |offset| View::new("test", &arena, offset, &[4], DType::F32).expect("inside");
                    let (x, y) = (view(0), view(128));
                    let reads = if matches!(call.kind, CollectiveKind::Receive { .. }) { vec![] } else { vec![x] };
                    let writes = if matches!(call.kind, CollectiveKind::Send { .. }) { vec![] } else { vec![y] };
                    engine.run(&call, &reads, &writes)
                }
            });
            let wait = |(rank, peer)| MemberWait { group: 7, rank, peer };
            wait_until_waits_are(&engine, &expected.into_iter().map(wait).collect::<Vec<_>>());
            engine.abort("aborted by the test");
            assert!(member.join().expect("no panic").is_err());
            assert_eq!(engine.waits(), []);
        }
    }
}
