//! Collectives between processes over sockets.
//!
//! - WIRE-1: a member reads and writes only its own buffers. It receives all other data over channels and checks it. A
//!   peer can send wrong values, but cannot make this process allocate or read more than the call specifies.
//! - WIRE-2: all members of a call must make the same call. Each transfer's header carries a hash of the call, and the
//!   number of calls that the two ends have completed together. The header thus reveals a member in a different call.
//! - WIRE-3: every wait ends on an abort, on a failure of the group, or at the end of a connection. While this member
//!   has bytes to send, a wait also ends on the write timeout. A failed group stays failed.
//!
//! A member has links only to members with which it exchanges data ([`peers`]). So a member of an all-reduce among n
//! members has `p - 1` links for each prime factor p of n, such as 9 links if n is 384. These links are enough to detect
//! different calls, see the module `port`.
//!
//! Memory: from its first call on, a member of a group holds [`SCRATCH_BYTES`] and about 17 KiB per link, and from its
//! first reduce-scatter on, up to 4 MiB more. Within a node the kernel buffers at most 1 MiB per direction of a
//! connection.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::io;
use std::net::Shutdown;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::collective::exchange::{Terms, check_buffers, check_members};
use crate::collective::status::ReceivedBytes;
use crate::collective::{Collective, CollectiveCall, CollectiveKind, Group, MemberWait};
use crate::error::{KernelError, Result};
use crate::hash::Fnv;
use crate::memory::{View, Words};
use crate::tensor::regions::Regions;
use crate::tensor::{DType, Region, element_count};

mod channel;
mod flow;
mod frame;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod levels;
mod link;
mod pairs;
mod port;
mod ring;
#[cfg(test)]
mod tests;
mod tree;

pub use channel::{Channel, SealedStream};
use link::{Context, Link};
use parking_lot::Mutex;
use port::{MemberStatus, Port};
use tree::Tree;

/// Size of a member's buffer for data in transit, in bytes.
pub const SCRATCH_BYTES: usize = flow::SLOTS_WORDS * size_of::<f32>();

/// If the tensors of all members of an all-reduce together have at most this many bytes, the members exchange whole tensors
/// at each level of the reduction. Otherwise they divide the tensor among themselves, which takes less data but twice as
/// many messages. In measurements with 2, 3 and 4 processes on 2 cores, over Unix sockets, both take the same time at about
/// 1 MiB for 4 members. For 2 members, whole tensors take half the time at 512 KiB.
pub const WHOLE_BYTES_MAX: usize = 512 << 10;

const _: () = assert!(WHOLE_BYTES_MAX <= SCRATCH_BYTES);

/// `(group id, member, peer)`: identifies the member's end of its connection to the peer.
pub type ChannelKey = (u32, usize, usize);

/// Creates a group's channel from one member (first index) to another (second). Called once per pair; must not block.
pub type Connect = dyn Fn(&Group, usize, usize) -> io::Result<Channel> + Send + Sync;

/// The members to which `member` needs a channel, in a collective of this kind among `members` members. If a is a peer
/// of b, then b is a peer of a.
pub fn peers(kind: &CollectiveKind, members: usize, member: usize) -> BTreeSet<usize> {
    let mut peers: BTreeSet<usize> = match kind {
        CollectiveKind::AllReduce { .. } | CollectiveKind::ReduceScatter { .. } => {
            levels::peers(members, member).collect()
        }
        CollectiveKind::AllGather { parts } if is_disjoint(parts) => ring::neighbours(members, member).into(),
        CollectiveKind::AllGather { parts } => {
            pairs::peers(member, &parts.list(), &vec![Region::whole(&parts.bounds()); members])
        }
        CollectiveKind::AllToAll { sources, targets } => pairs::peers(member, &sources.list(), &targets.list()),
        CollectiveKind::Broadcast { root } => Tree::new(members, member, *root).neighbours().collect(),
        CollectiveKind::Send { to: peer } | CollectiveKind::Receive { from: peer } => [*peer].into(),
    };
    peers.remove(&member);
    peers
}

/// True if no two parts of an all-gather overlap. Together, the parts cover the tensor.
fn is_disjoint(parts: &Regions) -> bool {
    parts.elements_sum() == element_count(&parts.bounds())
}

/// The engine of devices whose processes communicate over sockets. A process has one engine for all its members.
pub struct Wire {
    unused_channels: Mutex<BTreeMap<ChannelKey, Channel>>,
    /// Creates each channel that `unused_channels` does not hold.
    connect: Option<Box<Connect>>,
    groups: Mutex<Groups>,
    received: ReceivedBytes,
    aborted: Arc<OnceLock<KernelError>>,
    write_timeout: Duration,
    whole_bytes_max: AtomicUsize,
}

/// A member and its status. A call locks the member while it runs.
type SharedMember = (Arc<Mutex<Member>>, Arc<MemberStatus>);

#[derive(Default)]
struct Groups {
    members: HashMap<(u32, usize), SharedMember>,
    /// The failure of each group, set by any of its members in this process.
    failures: HashMap<u32, Arc<OnceLock<KernelError>>>,
    /// All channels in use, so that an abort can shut them down.
    channels: Vec<Arc<Channel>>,
}

struct Member {
    port: Port,
    scratch: Vec<f32>,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("write_timeout", &self.write_timeout).finish_non_exhaustive()
    }
}

impl Wire {
    /// Creates an engine over authenticated connections. They must connect each local member of a group with its
    /// [`peers`] in all calls of the group.
    ///
    /// If a write makes no progress for `write_timeout`, the group fails. A write makes no progress while the receiver
    /// is late or busy with a slower link, so the timeout must exceed the largest delay between two members within a step,
    /// and the time to transfer 4 MiB over the slowest link.
    pub fn new(channels: BTreeMap<ChannelKey, Channel>, write_timeout: Duration) -> Self {
        Self {
            unused_channels: Mutex::new(channels),
            connect: None,
            groups: Mutex::default(),
            received: ReceivedBytes::default(),
            aborted: Arc::default(),
            write_timeout,
            whole_bytes_max: AtomicUsize::new(WHOLE_BYTES_MAX),
        }
    }

    /// Creates an engine without connections. Each member connects to all other members of the group at its first call.
    pub fn with_connector(connect: Box<Connect>, write_timeout: Duration) -> Self {
        Self { connect: Some(connect), ..Self::new(BTreeMap::new(), write_timeout) }
    }

    /// Replaces [`WHOLE_BYTES_MAX`], for measurements and tests. `bytes` is limited to [`SCRATCH_BYTES`]. All members must
    /// use the same value.
    pub fn set_whole_bytes_max(&self, bytes: usize) {
        self.whole_bytes_max.store(bytes.min(SCRATCH_BYTES), Ordering::Relaxed);
    }

    /// The member's channels, by peer.
    fn channels(&self, group: &Group, member: usize) -> Vec<(usize, io::Result<Channel>)> {
        if let Some(connect) = &self.connect {
            let others = (0..group.ranks.len()).filter(|peer| *peer != member);
            return others.map(|peer| (peer, connect(group, member, peer))).collect();
        }
        let own = (group.id, member, 0)..=(group.id, member, usize::MAX);
        let mut unused = self.unused_channels.lock();
        unused.extract_if(own, |_, _| true).map(|((.., peer), channel)| (peer, Ok(channel))).collect()
    }

    /// Returns the member's state. The first call creates its links.
    fn member(&self, call: &CollectiveCall) -> Result<SharedMember> {
        let (group, member) = (&call.group, call.member);
        let mut groups = self.groups.lock();
        if let Some((found, status)) = groups.members.get(&(group.id, member)) {
            status.check()?;
            return Ok((found.clone(), status.clone()));
        }
        let failed = groups.failures.entry(group.id).or_default().clone();
        let status = Arc::new(MemberStatus::new(group.clone(), member, self.aborted.clone(), failed));
        status.check()?;
        let context = Context { group: group.clone(), member, digest: 0, text: String::new(), peer: None };
        let mut links = BTreeMap::new();
        for (peer, channel) in self.channels(group, member) {
            let failed = |error: io::Error| context.link_error(peer, format!("cannot connect: {error}"));
            let channel = Arc::new(channel.map_err(failed)?);
            channel.prepare().map_err(failed)?;
            groups.channels.push(channel.clone());
            links.insert(peer, Link::new(channel, peer));
        }
        let port = Port::new(context, links, status.clone(), self.write_timeout);
        let created = Arc::new(Mutex::new(Member { port, scratch: vec![0.0; SCRATCH_BYTES / size_of::<f32>()] }));
        groups.members.insert((group.id, member), (created.clone(), status.clone()));
        Ok((created, status))
    }
}

impl Member {
    /// Runs a call whose buffers were checked.
    fn run(
        &mut self,
        call: &CollectiveCall,
        words: &mut Words<'_>,
        (x_shape, y_shape): (&[usize], &[usize]),
        whole_bytes_max: usize,
    ) -> Result<()> {
        let Self { port, scratch } = self;
        let n = call.group.ranks.len();
        match &call.kind {
            CollectiveKind::AllReduce { .. } if n == 1 => tree::broadcast(port, words, 0),
            CollectiveKind::AllReduce { op } => {
                let is_small = n * size_of_val(words.y) <= whole_bytes_max;
                let reduce = if is_small { levels::all_reduce_whole } else { levels::all_reduce };
                reduce(port, words, scratch, *op)
            }
            CollectiveKind::ReduceScatter { parts, .. } if n == 1 => {
                pairs::all_to_all(port, words, scratch, &[Region::whole(x_shape)], &parts.list())
            }
            CollectiveKind::ReduceScatter { op, parts } => {
                levels::reduce_scatter(port, words, scratch, *op, (x_shape, &parts.list()))
            }
            CollectiveKind::AllGather { parts } => {
                if is_disjoint(parts) && n > 1 {
                    return ring::all_gather(port, words, scratch, (y_shape, &parts.list()));
                }
                let targets = vec![Region::whole(y_shape); n];
                pairs::all_to_all(port, words, scratch, &parts.list(), &targets)
            }
            CollectiveKind::AllToAll { sources, targets } => {
                pairs::all_to_all(port, words, scratch, &sources.list(), &targets.list())
            }
            CollectiveKind::Broadcast { root } => tree::broadcast(port, words, *root),
            CollectiveKind::Send { to } => pairs::send(port, words, *to),
            CollectiveKind::Receive { from } => pairs::receive(port, words, *from),
        }
    }
}

impl Collective for Wire {
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<()> {
        let peer = check_members(call)?;
        if peer == Some(call.member) {
            let got = format!("member {}", call.member);
            return Err(KernelError::arguments(call.name(), "peer", "a member other than the caller", got));
        }
        let (member, status) = self.member(call)?;
        let mut member = member.lock();
        status.check()?;
        let (digest, text) = agreement(call, reads, writes);
        (member.port.context.digest, member.port.context.text, member.port.context.peer) = (digest, text, peer);
        let checked = check_buffers(call, reads, writes).and_then(|()| View::words(call.name(), reads, writes));
        let mut words = match checked {
            Ok(words) => words,
            Err(error) => {
                // The other members receive this member's error.
                let got = format!("{} ({error})", member.port.context.text);
                member.port.fail(call.group.mismatch(call.member, "buffers that fit the call", got));
                return Err(error);
            }
        };
        let (x_shape, y_shape) = (shape_of(reads), shape_of(writes));
        let limit = self.whole_bytes_max.load(Ordering::Relaxed);
        match member.run(call, &mut words, (x_shape, y_shape), limit) {
            Ok(()) => {
                member.port.finish_call();
                self.received.count(call, y_shape, DType::F32);
                Ok(())
            }
            Err(error) => Err(member.port.fail(error)),
        }
    }

    fn abort(&self, cause: &str) {
        if self.aborted.set(KernelError::Aborted { cause: cause.to_owned() }).is_err() {
            return;
        }
        // The method `member` holds this lock while it creates links. Every later call checks for an abort first.
        self.groups.lock().channels.iter().for_each(|channel| channel.shutdown(Shutdown::Both));
        self.unused_channels.lock().values().for_each(|channel| channel.shutdown(Shutdown::Both));
    }

    fn waits(&self) -> Vec<MemberWait> {
        self.groups.lock().members.values().filter_map(|(_, status)| status.wait()).collect()
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        self.received.of(rank)
    }
}

pub(super) fn shape_of<'a>(views: &[View<'a>]) -> &'a [usize] {
    views.first().map_or(&[], View::shape)
}

/// Returns what all members of a call must agree on, as a hash and as text. Accepts buffers that do not fit the call.
pub(super) fn agreement(call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> (u64, String) {
    let view = reads.iter().chain(writes).next();
    let dtype = view.map_or(DType::F32, View::dtype);
    let mut hash = Fnv::default();
    let transfer = |from: usize, to: usize| ("transfer", from, to, dtype, view.map(|view| view.shape()));
    match &call.kind {
        // Sender and receiver hash the same transfer.
        CollectiveKind::Send { to } => transfer(call.member, *to).hash(&mut hash),
        CollectiveKind::Receive { from } => transfer(*from, call.member).hash(&mut hash),
        _ => Terms::of(call, shape_of(reads), shape_of(writes), dtype).hash(&mut hash),
    }
    call.group.ranks.hash(&mut hash);
    let detail = match &call.kind {
        CollectiveKind::AllReduce { op } | CollectiveKind::ReduceScatter { op, .. } => format!(" {op:?}"),
        CollectiveKind::Broadcast { root: from } | CollectiveKind::Receive { from } => format!(" from member {from}"),
        CollectiveKind::Send { to } => format!(" to member {to}"),
        _ => String::new(),
    };
    let shown = view.map_or(&[][..], View::shape);
    (hash.finish(), format!("{}{detail} of {dtype:?} {shown:?}", call.name()))
}
