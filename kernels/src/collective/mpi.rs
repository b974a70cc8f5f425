//! Collectives by MPI, for groups whose members are in different processes.
//!
//! - MPI-3: before a collective, the members compare their calls with one small all-reduce of a digest (the agreement).
//!   Before a send, sender and receiver exchange their digests. So the calls that are passed to MPI always match.
//!   If member A is in a collective while the send or receive of member B waits for A, then A notifies B, and B joins
//!   the agreement with an inverted digest. The calls of all members then fail.
//! - MPI-4: an abort ends every wait of a call. The group then stays failed, and buffers of unfinished transfers stay
//!   allocated (MPI-2). Creating communicators has a timeout. The start of MPI has none: `mpirun` supervises it.
//!
//! MPI chooses the order of additions, so its sums differ by rounding from those of other engines. The MPI standard
//! recommends, but does not require, that all members get the same bits from an all-reduce. In OpenMPI, they do.
//!
//! Memory: a group keeps a buffer for non-contiguous parts and in-place all-reduces, sized for its largest call so far.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::mem;
use std::os::raw::c_int;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::collective::exchange::{check_buffers, check_members, taken};
use crate::collective::status::{AbortStatus, ReceivedBytes};
use crate::collective::wire::{agreement, shape_of};
use crate::collective::{Collective, CollectiveCall, CollectiveKind, Group, MemberWait, ReduceOp};
use crate::error::{KernelError, Result};
use crate::memory::{View, Words};
use crate::region::Runs;
use crate::tensor::{DType, Region};

mod calls;

pub use calls::MpiWorld;
use calls::{Comm, Layout, Transfer, pause};
use parking_lot::Mutex;

/// Posts, which announce calls, use the tags `0..TAGS`. Data uses `TAGS..2 * TAGS`. MPI supports at least 32768 tags.
const TAGS: u32 = 1 << 14;

/// Values of a post's second word: the member waits in a transfer, is in a collective, or has buffers that do not fit.
const WAITING: u64 = 0;
const IN_COLLECTIVE: u64 = 1;
const REJECTED: u64 = 2;

/// Bytes of the record that each member sends if the calls differ: the digest of its own call, and a description.
const RECORD_BYTES: usize = 256;

/// The engine of groups whose members are all in different processes. A process has one engine for all its groups.
pub struct Mpi {
    groups: BTreeMap<u32, GroupState>,
    received: ReceivedBytes,
    abort_status: AbortStatus,
    /// Dropped last, so that MPI is finalized after all communicators are freed.
    world: Arc<MpiWorld>,
}

/// A group, and this process's member of it.
struct GroupState {
    group: Arc<Group>,
    member: usize,
    state: Mutex<State>,
}

struct State {
    comm: Option<Comm>,
    memory: Memory,
    /// Number of collectives that the group has agreed on. Wraps around.
    collectives: u32,
    failed: Option<KernelError>,
}

/// Memory that calls need in addition to their buffers. It is leaked when a call ends with an unfinished transfer.
#[derive(Default)]
struct Memory {
    scratch: Vec<f32>,
    numbers: Box<[[u64; 2]; 2]>,
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mpi").field("world", &self.world).field("groups", &self.groups.len()).finish_non_exhaustive()
    }
}

fn count(words: usize) -> Result<c_int> {
    let out_of_range = |_| {
        let expected = format!("at most {} elements, the limit of MPI", c_int::MAX);
        KernelError::arguments("collective", "size", expected, words.to_string())
    };
    c_int::try_from(words).map_err(out_of_range)
}

impl Layout {
    /// Places the parts one after the other, and also returns their total size.
    fn packed(sizes: impl Iterator<Item = usize>) -> Result<(Self, usize)> {
        let (mut layout, mut end) = (Self::default(), 0);
        for size in sizes {
            layout.starts.push(count(end)?);
            layout.counts.push(count(size)?);
            end += size;
        }
        count(end)?;
        Ok((layout, end))
    }

    fn contiguous(shape: &[usize], regions: &[Region]) -> Option<Self> {
        let mut layout = Self::default();
        for region in regions {
            let range = Runs::new(shape, region).contiguous(&(0..region.element_count()))?;
            layout.starts.push(c_int::try_from(range.start).ok()?);
            layout.counts.push(c_int::try_from(range.len()).ok()?);
        }
        Some(layout)
    }

    fn is_packed(&self) -> bool {
        let mut end = 0;
        self.starts.iter().zip(&self.counts).all(|(start, count)| {
            let follows = *count == 0 || *start == end;
            end += count;
            follows
        })
    }

    fn start(&self, member: usize) -> usize {
        self.starts[member] as usize
    }
}

impl Mpi {
    /// Creates the engine of this process. All processes of `world` call this with the same groups, in the same order,
    /// and wait for each other for at most `within`. `process_of` returns the process that runs a rank of the mesh.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] if two members of a group are in one process, or if a member's process is not in
    /// `world`; [`KernelError::Mpi`] if a process does not arrive in time, or if MPI cannot create a communicator.
    pub fn new(
        world: Arc<MpiWorld>,
        groups: &[Arc<Group>],
        process_of: &dyn Fn(usize) -> u32,
        within: Duration,
    ) -> Result<Self> {
        let until = Instant::now() + within;
        world.barrier(within)?;
        let (mut own, mut group_processes) = (Vec::new(), Vec::new());
        for (index, group) in groups.iter().enumerate() {
            let processes: Vec<c_int> = group.ranks.iter().map(|rank| process_of(rank) as c_int).collect();
            let is_invalid = |(i, p): (usize, &c_int)| *p as u32 >= world.size() || processes[..i].contains(p);
            if processes.iter().enumerate().any(is_invalid) {
                let expected =
                    format!("distinct process numbers below {}, one per member of group {}", world.size(), group.id);
                return Err(KernelError::arguments("collectives by MPI", "group", expected, format!("{processes:?}")));
            }
            let Some(member) = processes.iter().position(|p| *p as u32 == world.rank()) else { continue };
            own.push((group, member));
            group_processes.push((processes, (index % TAGS as usize) as c_int));
        }
        let comms = world.comms(group_processes, until.saturating_duration_since(Instant::now()))?;
        let known = own.into_iter().zip(comms).map(|((group, member), comm)| {
            let state = State { comm: Some(comm), memory: Memory::default(), collectives: 0, failed: None };
            (group.id, GroupState { group: group.clone(), member, state: Mutex::new(state) })
        });
        let groups = known.collect();
        Ok(Self { groups, received: ReceivedBytes::default(), abort_status: AbortStatus::default(), world })
    }

    /// The world that the engine was created with.
    pub fn world(&self) -> &Arc<MpiWorld> {
        &self.world
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        for known in mem::take(&mut self.groups).into_values() {
            let state = known.state.into_inner();
            // Do not free the communicator of a failed group: an unfinished transfer may still use it.
            state.comm.into_iter().filter(|_| state.failed.is_none()).for_each(Comm::free);
        }
    }
}

struct Call<'a> {
    engine: &'a Mpi,
    call: &'a CollectiveCall,
    comm: &'a Comm,
    memory: &'a mut Memory,
    digest: u64,
    text: String,
    /// Tag of posts: the number of the group's next collective.
    tag: c_int,
}

/// The error of a call, and whether its transfers have completed.
enum CallError {
    Completed(KernelError),
    /// A transfer is in flight, and may never complete (MPI-2).
    InFlight(KernelError),
}

type CallResult = Result<(), CallError>;

impl Call<'_> {
    fn transfer(&self, transfer: Transfer<'_>) -> CallResult {
        // SAFETY: after `CallError::InFlight`, `Mpi::run` leaks the call's arenas and memory, and fails the group.
        unsafe { self.comm.run(transfer, &mut || self.engine.abort_status.check()) }.map_err(CallError::InFlight)
    }

    fn post(&self, to: usize, status: u64) -> CallResult {
        self.transfer(Transfer::Post { x: Box::new([self.digest, status]), to, tag: self.tag })
    }

    /// Notifies every member whose send or receive waits for this member that this member is in a collective.
    fn answer_waiting_members(&self) -> Result<()> {
        while let Some((from, [_, status])) = self.comm.receive_post(None, self.tag)? {
            if status == WAITING {
                self.post(from, IN_COLLECTIVE)
                    .map_err(|(CallError::Completed(error) | CallError::InFlight(error))| error)?;
            }
        }
        self.engine.abort_status.check()
    }

    /// Checks whether all members make the same call. If `rejected` is set, this member always disagrees.
    fn check_agreement(&mut self, rejected: bool) -> CallResult {
        let own = if rejected { !self.digest } else { self.digest };
        let mut numbers = mem::take(&mut self.memory.numbers);
        numbers[0] = [own, !own];
        let [x, y] = &mut *numbers;
        // SAFETY: as in `transfer`, and `numbers` is returned to `memory` below, or leaked.
        let agreed = unsafe { self.comm.run(Transfer::Max { x, y }, &mut || self.answer_waiting_members()) };
        if let Err(error) = agreed {
            mem::forget(numbers);
            return Err(CallError::InFlight(error));
        }
        let agreed = numbers[0] == numbers[1];
        self.memory.numbers = numbers;
        if agreed { Ok(()) } else { Err(self.disagreement(own)?) }
    }

    /// The error that all members return if their calls differ. It names the member whose call the fewest members make.
    fn disagreement(&mut self, own: u64) -> Result<CallError, CallError> {
        let members = self.call.group.ranks.len();
        let mut records = vec![0; RECORD_BYTES * (1 + members)];
        let text = &self.text.as_bytes()[..self.text.floor_char_boundary(RECORD_BYTES - size_of::<u64>())];
        records[..size_of::<u64>()].copy_from_slice(&own.to_le_bytes());
        records[size_of::<u64>()..][..text.len()].copy_from_slice(text);
        let (x, y) = records.split_at_mut(RECORD_BYTES);
        if let Err(end) = self.transfer(Transfer::Records { x, y }) {
            mem::forget(records);
            return Err(end);
        }
        let of = |member: usize| &records[RECORD_BYTES * (1 + member)..][..RECORD_BYTES];
        let digest = |member: usize| &of(member)[..size_of::<u64>()];
        let text = |member: usize| {
            let text = String::from_utf8_lossy(&of(member)[size_of::<u64>()..]);
            text.trim_end_matches('\0').to_owned()
        };
        let agree_count = |with: usize| (0..members).filter(|member| digest(*member) == digest(with)).count();
        let member = (0..members).min_by_key(|member| agree_count(*member)).unwrap_or(0);
        let majority_member = (0..members).rev().max_by_key(|member| agree_count(*member)).unwrap_or(0);
        let majority_member = if majority_member == member { (member + 1) % members } else { majority_member };
        Ok(CallError::Completed(self.call.group.mismatch(member, text(majority_member), text(member))))
    }

    /// Waits until the peer of a send or receive is in a call, and checks that the two calls match.
    fn rendezvous(&mut self, peer: usize, rejected: bool) -> CallResult {
        self.post(peer, if rejected { REJECTED } else { WAITING })?;
        let began = Instant::now();
        let peer_post = loop {
            if let Some((_, peer_post)) = self.comm.receive_post(Some(peer), self.tag).map_err(CallError::Completed)? {
                break peer_post;
            }
            self.engine.abort_status.check().map_err(CallError::Completed)?;
            pause(began);
        };
        match peer_post {
            [digest, WAITING] if digest == self.digest => Ok(()),
            [_, IN_COLLECTIVE] => self.check_agreement(true),
            [_, status] => {
                let got = if status == REJECTED { "buffers that do not fit" } else { "another transfer" };
                Err(CallError::Completed(self.call.group.mismatch(peer, &*self.text, got)))
            }
        }
    }

    /// Runs the agreement with the other members, even if the buffers do not fit. If all agree, runs the call.
    fn run(&mut self, peer: Option<usize>, reads: &[View<'_>], writes: &[View<'_>]) -> CallResult {
        let checked =
            check_buffers(self.call, reads, writes).and_then(|()| View::words(self.call.name(), reads, writes));
        if let Err(error) = &checked {
            self.text = format!("{} ({error})", self.text);
        }
        let agreed = match peer {
            Some(peer) => self.rendezvous(peer, checked.is_err()),
            None => self.check_agreement(checked.is_err()),
        };
        let mut words = match (checked, agreed) {
            (_, Err(CallError::InFlight(error))) => return Err(CallError::InFlight(error)),
            // The agreement reports this error to the other members. This member returns it.
            (Err(error), _) => return Err(CallError::Completed(error)),
            (Ok(_), Err(end)) => return Err(end),
            (Ok(words), Ok(())) => words,
        };
        self.exchange(&mut words, shape_of(reads), shape_of(writes))
    }

    /// Runs a call that all members agree on.
    fn exchange(&mut self, words: &mut Words<'_>, x_shape: &[usize], y_shape: &[usize]) -> CallResult {
        let (all, tag) = (words.y.len(), self.tag + TAGS as c_int);
        count(all.max(words.x().len())).map_err(CallError::Completed)?;
        match &self.call.kind {
            CollectiveKind::AllReduce { op } => self.all_reduce(*op, words),
            CollectiveKind::ReduceScatter { op, parts } => self.reduce_scatter(*op, words, x_shape, &parts.list()),
            CollectiveKind::AllGather { parts } => {
                if parts.elements_sum() != all {
                    // The parts overlap.
                    return self.all_to_all(words, &parts.list(), &vec![Region::whole(y_shape); parts.len()]);
                }
                self.all_gather(words, y_shape, &parts.list())
            }
            CollectiveKind::AllToAll { sources, targets } => self.all_to_all(words, &sources.list(), &targets.list()),
            CollectiveKind::Broadcast { root } => {
                if let (true, (Some(x), y)) = (self.call.member == *root, words.split()) {
                    y.copy_from_slice(x);
                }
                self.transfer(Transfer::Broadcast { y: words.y, root: *root })
            }
            CollectiveKind::Send { to } => self.transfer(Transfer::Send { x: words.x(), to: *to, tag }),
            CollectiveKind::Receive { from } => self.transfer(Transfer::Receive { y: words.y, from: *from, tag }),
        }
    }

    /// Runs `work`, which makes one transfer, with `words` words of scratch memory. If the transfer does not complete,
    /// leaks the scratch memory, because MPI may still use it.
    fn with_scratch(&mut self, words: usize, work: impl FnOnce(&Self, &mut [f32]) -> CallResult) -> CallResult {
        let mut scratch = mem::take(&mut self.memory.scratch);
        scratch.resize(scratch.len().max(words), 0.0);
        let done = work(self, &mut scratch[..words]);
        if let Err(CallError::InFlight(_)) = done {
            mem::forget(scratch);
        } else {
            self.memory.scratch = scratch;
        }
        done
    }

    fn all_reduce(&mut self, op: ReduceOp, words: &mut Words<'_>) -> CallResult {
        if let (Some(x), y) = words.split() {
            return self.transfer(Transfer::AllReduce { op, x, y });
        }
        self.with_scratch(words.y.len(), |call, x| {
            x.copy_from_slice(words.y);
            call.transfer(Transfer::AllReduce { op, x, y: words.y })
        })
    }

    fn reduce_scatter(&mut self, op: ReduceOp, words: &mut Words<'_>, shape: &[usize], parts: &[Region]) -> CallResult {
        let (x, y) = words.split();
        let x = x.unwrap_or_default();
        if let Some(layout) = Layout::contiguous(shape, parts).filter(Layout::is_packed) {
            return self.transfer(Transfer::ReduceScatter { op, x, y, counts: layout.counts });
        }
        let (layout, total) = Layout::packed(parts.iter().map(Region::element_count)).map_err(CallError::Completed)?;
        self.with_scratch(total, |call, scratch| {
            for (part, start) in parts.iter().zip(&layout.starts) {
                pack(x, shape, part, &mut scratch[*start as usize..]);
            }
            call.transfer(Transfer::ReduceScatter { op, x: scratch, y, counts: layout.counts })
        })
    }

    fn all_gather(&mut self, words: &mut Words<'_>, y_shape: &[usize], parts: &[Region]) -> CallResult {
        let (x, y) = words.split();
        let x = x.unwrap_or_default();
        if let Some(layout) = Layout::contiguous(y_shape, parts) {
            return self.transfer(Transfer::AllGather { x, y, layout });
        }
        let (layout, total) = Layout::packed(parts.iter().map(Region::element_count)).map_err(CallError::Completed)?;
        let starts = layout.starts.clone();
        self.with_scratch(total, |call, scratch| {
            call.transfer(Transfer::AllGather { x, y: scratch, layout })?;
            for (part, start) in parts.iter().zip(starts) {
                unpack(&scratch[start as usize..], y, y_shape, part);
            }
            Ok(())
        })
    }

    /// Member i contributes `sources[i]` and receives `targets[i]`.
    fn all_to_all(&mut self, words: &mut Words<'_>, sources: &[Region], targets: &[Region]) -> CallResult {
        let (member, n) = (self.call.member, sources.len());
        let (source, target) = (&sources[member], &targets[member]);
        let (x, y) = words.split();
        let x = x.unwrap_or_default();
        // The boxes of the whole tensor that this member sends to each member, and those that it receives from each
        // member. Boxes that are in this member's own x are copied directly.
        let own_of = |to: usize| taken(to, sources, &targets[to]).into_iter().find(|(from, _)| *from == member);
        let sent_boxes: Vec<Vec<Region>> = (0..n).map(|to| own_of(to).map_or(Vec::new(), |(_, boxes)| boxes)).collect();
        let mut got = vec![Vec::new(); n];
        taken(member, sources, target).into_iter().for_each(|(from, boxes)| got[from] = boxes);
        let size = |boxes: &Vec<Region>| boxes.iter().map(Region::element_count).sum::<usize>();
        let others = |all: &[Vec<Region>]| {
            let sizes = all.iter().enumerate().map(|(i, boxes)| if i == member { 0 } else { size(boxes) });
            Layout::packed(sizes).map_err(CallError::Completed)
        };
        let ((sent, x_words), (taken, y_words)) = (others(&sent_boxes)?, others(&got)?);
        for common in &got[member] {
            let mut own = vec![0.0; common.element_count()];
            pack(x, &source.size, &common.relative_to(source), &mut own);
            unpack(&own, y, &target.size, &common.relative_to(target));
        }
        let starts: Vec<usize> = (0..n).map(|from| taken.start(from)).collect();
        self.with_scratch(x_words + y_words, |call, scratch| {
            let (packed, received) = scratch.split_at_mut(x_words);
            for (to, boxes) in sent_boxes.iter().enumerate().filter(|(to, _)| *to != member) {
                let mut at = sent.start(to);
                for common in boxes {
                    pack(x, &source.size, &common.relative_to(source), &mut packed[at..]);
                    at += common.element_count();
                }
            }
            call.transfer(Transfer::AllToAll { x: packed, sent, y: received, taken })?;
            for (from, boxes) in got.iter().enumerate().filter(|(from, _)| *from != member) {
                let mut at = starts[from];
                for common in boxes {
                    unpack(&received[at..], y, &target.size, &common.relative_to(target));
                    at += common.element_count();
                }
            }
            Ok(())
        })
    }
}

fn pack(from: &[f32], shape: &[usize], region: &Region, to: &mut [f32]) {
    let runs = Runs::new(shape, region);
    runs.for_each(0..runs.element_count(), |place, at, len| to[at..][..len].copy_from_slice(&from[place..][..len]));
}

/// Copies the elements at the start of `from` into a box of a tensor.
fn unpack(from: &[f32], to: &mut [f32], shape: &[usize], region: &Region) {
    let runs = Runs::new(shape, region);
    runs.for_each(0..runs.element_count(), |place, at, len| to[place..][..len].copy_from_slice(&from[at..][..len]));
}

impl Collective for Mpi {
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<()> {
        let peer = check_members(call)?;
        let known = self.groups.get(&call.group.id);
        let known = known.filter(|known| known.group.ranks == call.group.ranks && known.member == call.member);
        let (Some(known), true) = (known, peer != Some(call.member)) else {
            let got = format!("member {} of group {} with ranks {:?}", call.member, call.group.id, call.group.ranks);
            let expected = "this process's member of a group of the engine";
            return Err(KernelError::arguments(call.name(), "member", expected, got));
        };
        let mut state = known.state.lock();
        self.abort_status.check()?;
        let State { comm, memory, collectives, failed } = &mut *state;
        let (Some(joined), None) = (&*comm, &*failed) else {
            return Err(failed.clone().unwrap_or(KernelError::Aborted { cause: "the group has failed".to_owned() }));
        };
        let (digest, text) = agreement(call, reads, writes);
        let tag = (*collectives % TAGS) as c_int;
        let mut running = Call { engine: self, call, comm: joined, memory, digest, text, tag };
        match running.run(peer, reads, writes) {
            Ok(()) => {
                *collectives = collectives.wrapping_add(u32::from(peer.is_none()));
                self.received.count(call, shape_of(writes), DType::F32);
                Ok(())
            }
            Err(CallError::Completed(error)) => Err(failed.insert(error).clone()),
            Err(CallError::InFlight(error)) => {
                reads.iter().chain(writes).for_each(|view| mem::forget(view.arena().clone()));
                mem::forget(mem::take(memory));
                *comm = None;
                self.world.abort();
                Err(failed.insert(error).clone())
            }
        }
    }

    fn abort(&self, cause: &str) {
        self.abort_status.abort(cause);
        self.world.abort();
    }

    fn waits(&self) -> Vec<MemberWait> {
        Vec::new()
    }

    fn knows_waits(&self) -> bool {
        false
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        self.received.of(rank)
    }
}
