//! Collectives by MPI, for groups whose members are in different processes.
//!
//! - MPI-3: before a collective all members agree on it, by one small all-reduce of a digest; so nothing that MPI is then
//!   given can fail to match. A member that waits in a send or receive for one that is in a collective is told so, and
//!   joins that agreement to disagree.
//! - MPI-4: every wait of a call ends with an abort. The group then stays failed, and what was under way keeps its memory
//!   (MPI-2). Making communicators has a deadline; starting MPI blocks in MPI itself, which `mpirun` watches over.
//!
//! Sums are in the order that MPI chooses, so they agree with other engines within rounding. MPI advises, but does not
//! promise, that all members get the same bits of an all-reduce; OpenMPI's algorithms give them.
//!
//! Memory: a group holds what its largest call must rearrange (parts that are not contiguous, an all-reduce in place),
//! from that call on.
#![allow(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::mem;
use std::os::raw::c_int;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::collective::exchange::{all_reduce_foreign, check_buffers, check_members, taken};
use crate::collective::wire::agreement;
use crate::collective::{Collective, CollectiveCall, CollectiveKind, Group, MemberWait, ReduceOp};
use crate::error::KernelError;
use crate::memory::{View, Words};
use crate::region::Runs;
use crate::tensor::Region;

mod calls;

pub use calls::MpiWorld;
use calls::{Comm, Places, Transfer, pause};

/// Tags of posts are below it, those of data from it on; MPI has 32768 at least.
const TAGS: u32 = 1 << 14;

/// What a post says beside the digest: the member waits for the other in a send or receive, is in a collective, or
/// cannot join.
const WAITS: u64 = 0;
const IN_COLLECTIVE: u64 = 1;
const REFUSED: u64 = 2;

/// Bytes of what a member tells about its call after a disagreement: its digest and a text.
const RECORD_BYTES: usize = 256;

/// The engine of groups with one member in each of several processes. A process has one, for all of them.
pub struct Mpi {
    groups: BTreeMap<u32, Known>,
    received: Mutex<HashMap<usize, u64>>,
    aborted: OnceLock<String>,
    /// Last, so that MPI ends after all communicators were freed.
    world: Arc<MpiWorld>,
}

/// A group, and which of its members is here.
struct Known {
    group: Arc<Group>,
    member: usize,
    state: Mutex<State>,
}

struct State {
    comm: Option<Comm>,
    memory: Memory,
    /// Collectives that the group has agreed on; wraps.
    collectives: u32,
    failed: Option<KernelError>,
}

/// What calls use beside their buffers; kept for ever when one is given up.
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number of words, or of bytes, as MPI counts.
fn count(words: usize) -> Result<c_int, KernelError> {
    let wrong = |_| {
        let expected = format!("at most {} elements of a tensor over MPI", c_int::MAX);
        KernelError::arguments("collective", "size", expected, words.to_string())
    };
    c_int::try_from(words).map_err(wrong)
}

impl Places {
    /// One after the other.
    fn packed(sizes: impl Iterator<Item = usize>) -> Result<(Self, usize), KernelError> {
        let (mut places, mut end) = (Self::default(), 0);
        for size in sizes {
            places.starts.push(count(end)?);
            places.counts.push(count(size)?);
            end += size;
        }
        count(end)?;
        Ok((places, end))
    }

    /// Where regions lie in a tensor of this shape, when each lies in one piece.
    fn contiguous(shape: &[usize], regions: &[Region]) -> Option<Self> {
        let mut places = Self::default();
        for region in regions {
            let range = Runs::new(shape, region).contiguous(&(0..region.element_count()))?;
            places.starts.push(c_int::try_from(range.start).ok()?);
            places.counts.push(c_int::try_from(range.len()).ok()?);
        }
        Some(places)
    }

    /// True when they follow each other without gaps.
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
    /// The engine of this process. All processes of `world` call this with the same groups, in the same order, and wait
    /// for each other, at most `within`. `process_of` says in which process a rank of a mesh is.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] when two members of a group are in one process, or one is in none of `world`'s;
    /// [`KernelError::Mpi`] when not all come in time, or MPI makes no communicator.
    pub fn new(
        world: Arc<MpiWorld>,
        groups: &[Arc<Group>],
        process_of: &dyn Fn(usize) -> u32,
        within: Duration,
    ) -> Result<Self, KernelError> {
        let until = Instant::now() + within;
        world.meet(within)?;
        let (mut own, mut wanted) = (Vec::new(), Vec::new());
        for (index, group) in groups.iter().enumerate() {
            let processes: Vec<c_int> = group.ranks.iter().map(|rank| process_of(*rank) as c_int).collect();
            let is_wrong = |(i, p): (usize, &c_int)| *p as u32 >= world.size() || processes[..i].contains(p);
            if processes.iter().enumerate().any(is_wrong) {
                let expected = format!("members of group {} in different processes of {}", group.id, world.size());
                return Err(KernelError::arguments("collectives by MPI", "group", expected, format!("{processes:?}")));
            }
            let Some(member) = processes.iter().position(|p| *p as u32 == world.rank()) else { continue };
            own.push((group, member));
            wanted.push((processes, (index % TAGS as usize) as c_int));
        }
        let comms = world.comms(wanted, until.saturating_duration_since(Instant::now()))?;
        let known = own.into_iter().zip(comms).map(|((group, member), comm)| {
            let state = State { comm: Some(comm), memory: Memory::default(), collectives: 0, failed: None };
            (group.id, Known { group: group.clone(), member, state: Mutex::new(state) })
        });
        let known = known.collect();
        Ok(Self { groups: known, received: Mutex::default(), aborted: OnceLock::new(), world })
    }

    /// What it was made with.
    pub fn world(&self) -> &Arc<MpiWorld> {
        &self.world
    }

    fn check_aborted(&self) -> Result<(), KernelError> {
        match self.aborted.get() {
            Some(cause) => Err(KernelError::Aborted { cause: cause.clone() }),
            None => Ok(()),
        }
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        for known in mem::take(&mut self.groups).into_values() {
            let state = known.state.into_inner().unwrap_or_else(PoisonError::into_inner);
            // One that a call was given up on is in use, and a failed one may be.
            state.comm.into_iter().filter(|_| state.failed.is_none()).for_each(Comm::free);
        }
    }
}

/// One call of one member.
struct Call<'a> {
    engine: &'a Mpi,
    call: &'a CollectiveCall,
    comm: &'a Comm,
    memory: &'a mut Memory,
    digest: u64,
    text: String,
    /// Of posts: which collective of the group comes next.
    tag: c_int,
}

/// How a call ended, if not well.
enum End {
    /// All that was under way has completed.
    Done(KernelError),
    /// Something is under way, for ever (MPI-2).
    GivenUp(KernelError),
}

impl Call<'_> {
    fn transfer(&self, transfer: Transfer<'_>) -> Result<(), End> {
        // SAFETY: after `End::GivenUp`, `Mpi::run` keeps the call's arenas and memory for ever and fails the group.
        unsafe { self.comm.run(transfer, &mut || self.engine.check_aborted()) }.map_err(End::GivenUp)
    }

    fn post(&self, to: usize, says: u64) -> Result<(), End> {
        self.transfer(Transfer::Post { x: Box::new([self.digest, says]), to, tag: self.tag })
    }

    /// Tells those who wait for this member in a send or receive that it is in a collective.
    fn answer(&self) -> Result<(), KernelError> {
        while let Some((from, [_, says])) = self.comm.posted(None, self.tag)? {
            if says == WAITS {
                self.post(from, IN_COLLECTIVE).map_err(|(End::Done(error) | End::GivenUp(error))| error)?;
            }
        }
        self.engine.check_aborted()
    }

    /// Finds out whether all members call the same. A member that is `refused` disagrees.
    fn agree(&mut self, refused: bool) -> Result<(), End> {
        let own = if refused { !self.digest } else { self.digest };
        let mut numbers = mem::take(&mut self.memory.numbers);
        numbers[0] = [own, !own];
        let [x, y] = &mut *numbers;
        // SAFETY: as in `transfer`: what is taken from `memory` is put back below, or forgotten.
        let agreed = unsafe { self.comm.run(Transfer::Largest { x, y }, &mut || self.answer()) };
        if let Err(error) = agreed {
            mem::forget(numbers);
            return Err(End::GivenUp(error));
        }
        let agreed = numbers[0] == numbers[1];
        self.memory.numbers = numbers;
        if agreed { Ok(()) } else { Err(self.disagreement(own)?) }
    }

    /// The error that all members give after a disagreement: it names the one that fewest agree with.
    fn disagreement(&mut self, own: u64) -> Result<End, End> {
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
        let agree = |with: usize| (0..members).filter(|member| digest(*member) == digest(with)).count();
        let member = (0..members).min_by_key(|member| agree(*member)).unwrap_or(0);
        let usual = (0..members).rev().max_by_key(|member| agree(*member)).unwrap_or(0);
        let usual = if usual == member { (member + 1) % members } else { usual };
        let group = self.call.group.id;
        Ok(End::Done(KernelError::CollectiveMismatch { group, member, expected: text(usual), got: text(member) }))
    }

    /// Waits until the other side of a send or receive is there, and agrees.
    fn meet(&mut self, peer: usize, refused: bool) -> Result<(), End> {
        self.post(peer, if refused { REFUSED } else { WAITS })?;
        let began = Instant::now();
        let theirs = loop {
            if let Some((_, theirs)) = self.comm.posted(Some(peer), self.tag).map_err(End::Done)? {
                break theirs;
            }
            self.engine.check_aborted().map_err(End::Done)?;
            pause(began);
        };
        match theirs {
            [digest, WAITS] if digest == self.digest => Ok(()),
            [_, IN_COLLECTIVE] => self.agree(true),
            [_, says] => Err(End::Done(KernelError::CollectiveMismatch {
                group: self.call.group.id,
                member: peer,
                expected: self.text.clone(),
                got: if says == REFUSED { "buffers that do not fit" } else { "another transfer" }.to_owned(),
            })),
        }
    }

    /// Runs a call that all agree on; returns the elements taken from others, as [`CollectiveKind`] counts them.
    fn exchange(&mut self, words: &mut Words<'_>, x_shape: &[usize], y_shape: &[usize]) -> Result<usize, End> {
        let (member, n, all) = (self.call.member, self.call.group.ranks.len(), words.y.len());
        count(all.max(words.x().len())).map_err(End::Done)?;
        match &self.call.kind {
            CollectiveKind::AllReduce { op } => {
                self.all_reduce(*op, words)?;
                Ok(all_reduce_foreign(all, n, member))
            }
            CollectiveKind::ReduceScatter { op, parts } => {
                self.reduce_scatter(*op, words, x_shape, parts)?;
                Ok((n - 1) * all)
            }
            CollectiveKind::AllGather { parts } => {
                if parts.iter().map(Region::element_count).sum::<usize>() != all {
                    // Parts overlap.
                    return self.all_to_all(words, parts, &vec![Region::whole(y_shape); n]);
                }
                self.all_gather(words, y_shape, parts)?;
                Ok(all - parts[member].element_count())
            }
            CollectiveKind::AllToAll { sources, targets } => self.all_to_all(words, sources, targets),
            CollectiveKind::Broadcast { root } => {
                if let (true, (Some(x), y)) = (member == *root, words.split()) {
                    y.copy_from_slice(x);
                }
                self.transfer(Transfer::Broadcast { y: words.y, root: *root })?;
                Ok(if member == *root { 0 } else { all })
            }
            CollectiveKind::Send { to } => {
                let tag = self.tag + TAGS as c_int;
                self.transfer(Transfer::Send { x: words.x(), to: *to, tag }).map(|()| 0)
            }
            CollectiveKind::Receive { from } => {
                let tag = self.tag + TAGS as c_int;
                self.transfer(Transfer::Receive { y: words.y, from: *from, tag }).map(|()| all)
            }
        }
    }

    /// The scratch memory, with room for so many words. To be put back when no transfer uses it any more.
    fn scratch(&mut self, words: usize) -> Vec<f32> {
        let mut scratch = mem::take(&mut self.memory.scratch);
        if scratch.len() < words {
            scratch.resize(words, 0.0);
        }
        scratch
    }

    /// Puts the scratch memory back after a transfer, or leaves it to MPI.
    fn put_back(&mut self, scratch: Vec<f32>, done: &Result<(), End>) {
        if let Err(End::GivenUp(_)) = done {
            mem::forget(scratch);
        } else {
            self.memory.scratch = scratch;
        }
    }

    fn all_reduce(&mut self, op: ReduceOp, words: &mut Words<'_>) -> Result<(), End> {
        if let (Some(x), y) = words.split() {
            return self.transfer(Transfer::AllReduce { op, x, y });
        }
        let mut scratch = self.scratch(words.y.len());
        let x = &mut scratch[..words.y.len()];
        x.copy_from_slice(words.y);
        let done = self.transfer(Transfer::AllReduce { op, x, y: words.y });
        self.put_back(scratch, &done);
        done
    }

    fn reduce_scatter(
        &mut self,
        op: ReduceOp,
        words: &mut Words<'_>,
        x_shape: &[usize],
        parts: &[Region],
    ) -> Result<(), End> {
        let (x, y) = words.split();
        let x = x.unwrap_or_default();
        if let Some(places) = Places::contiguous(x_shape, parts).filter(Places::is_packed) {
            return self.transfer(Transfer::ReduceScatter { op, x, y, counts: places.counts });
        }
        let (places, total) = Places::packed(parts.iter().map(Region::element_count)).map_err(End::Done)?;
        let mut scratch = self.scratch(total);
        for (part, start) in parts.iter().zip(&places.starts) {
            pack(x, x_shape, part, &mut scratch[*start as usize..]);
        }
        let x = &scratch[..total];
        let done = self.transfer(Transfer::ReduceScatter { op, x, y, counts: places.counts });
        self.put_back(scratch, &done);
        done
    }

    /// Of parts that do not overlap.
    fn all_gather(&mut self, words: &mut Words<'_>, y_shape: &[usize], parts: &[Region]) -> Result<(), End> {
        let (x, y) = words.split();
        let x = x.unwrap_or_default();
        if let Some(places) = Places::contiguous(y_shape, parts) {
            return self.transfer(Transfer::AllGather { x, y, places });
        }
        let (places, total) = Places::packed(parts.iter().map(Region::element_count)).map_err(End::Done)?;
        let starts = places.starts.clone();
        let mut scratch = self.scratch(total);
        let done = self.transfer(Transfer::AllGather { x, y: &mut scratch[..total], places });
        if done.is_ok() {
            for (part, start) in parts.iter().zip(starts) {
                unpack(&scratch[start as usize..], y, y_shape, part);
            }
        }
        self.put_back(scratch, &done);
        done
    }

    /// Member i brings `sources[i]` and gets `targets[i]`; returns the elements taken from others.
    fn all_to_all(&mut self, words: &mut Words<'_>, sources: &[Region], targets: &[Region]) -> Result<usize, End> {
        let (member, n) = (self.call.member, sources.len());
        let (source, target) = (&sources[member], &targets[member]);
        let (x, y) = words.split();
        let x = x.unwrap_or_default();
        // Boxes of whole tensors that this member gives to each, and takes from each; its own go by themselves.
        let given: Vec<Vec<Region>> = (0..n).map(|to| boxes_of(member, &taken(to, sources, &targets[to]))).collect();
        let mine = taken(member, sources, target);
        let got: Vec<Vec<Region>> = (0..n).map(|from| boxes_of(from, &mine)).collect();
        let size = |boxes: &Vec<Region>| boxes.iter().map(Region::element_count).sum::<usize>();
        let others = |all: &[Vec<Region>]| {
            let sizes = all.iter().enumerate().map(|(i, boxes)| if i == member { 0 } else { size(boxes) });
            Places::packed(sizes).map_err(End::Done)
        };
        let ((sent, x_words), (taken, y_words)) = (others(&given)?, others(&got)?);
        let mut scratch = self.scratch(x_words + y_words);
        let (packed, come) = scratch.split_at_mut(x_words);
        for (to, boxes) in given.iter().enumerate() {
            let mut at = sent.start(to);
            for common in boxes.iter().filter(|_| to != member) {
                pack(x, &source.size, &common.relative_to(source), &mut packed[at..]);
                at += common.element_count();
            }
        }
        for common in &got[member] {
            let mut own = vec![0.0; common.element_count()];
            pack(x, &source.size, &common.relative_to(source), &mut own);
            unpack(&own, y, &target.size, &common.relative_to(target));
        }
        let starts: Vec<usize> = (0..n).map(|from| taken.start(from)).collect();
        let done = self.transfer(Transfer::AllToAll { x: packed, sent, y: &mut come[..y_words], taken });
        if done.is_ok() {
            for (from, boxes) in got.iter().enumerate().filter(|(from, _)| *from != member) {
                let mut at = starts[from];
                for common in boxes {
                    unpack(&come[at..], y, &target.size, &common.relative_to(target));
                    at += common.element_count();
                }
            }
        }
        self.put_back(scratch, &done);
        done.map(|()| y_words)
    }
}

/// The boxes that a member gives.
fn boxes_of(giver: usize, taken: &[(usize, Vec<Region>)]) -> Vec<Region> {
    taken.iter().filter(|(from, _)| *from == giver).flat_map(|(_, boxes)| boxes.clone()).collect()
}

/// Copies a box of a tensor to where `to` begins.
fn pack(from: &[f32], shape: &[usize], region: &Region, to: &mut [f32]) {
    let runs = Runs::new(shape, region);
    runs.for_each(0..runs.element_count(), |place, at, len| to[at..][..len].copy_from_slice(&from[place..][..len]));
}

/// Copies what lies where `from` begins into a box of a tensor.
fn unpack(from: &[f32], to: &mut [f32], shape: &[usize], region: &Region) {
    let runs = Runs::new(shape, region);
    runs.for_each(0..runs.element_count(), |place, at, len| to[place..][..len].copy_from_slice(&from[at..][..len]));
}

impl Call<'_> {
    /// Meets the others, also where the buffers do not fit, and does what all agree on.
    fn run(&mut self, peer: Option<usize>, reads: &[View<'_>], writes: &[View<'_>]) -> Result<usize, End> {
        let checked =
            check_buffers(self.call, reads, writes).and_then(|()| View::words(self.call.name(), reads, writes));
        if let Err(error) = &checked {
            self.text = format!("{} ({error})", self.text);
        }
        let met = match peer {
            Some(peer) => self.meet(peer, checked.is_err()),
            None => self.agree(checked.is_err()),
        };
        let mut words = match (checked, met) {
            (_, Err(End::GivenUp(error))) => return Err(End::GivenUp(error)),
            // The others are told that this member could not join; its own error says why.
            (Err(error), _) => return Err(End::Done(error)),
            (Ok(_), Err(end)) => return Err(end),
            (Ok(words), Ok(())) => words,
        };
        let shape = |views: &[View<'_>]| views.first().map_or(Vec::new(), |view| view.shape().to_vec());
        self.exchange(&mut words, &shape(reads), &shape(writes))
    }
}

impl Collective for Mpi {
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<(), KernelError> {
        let peer = check_members(call)?;
        let known = self.groups.get(&call.group.id);
        let known = known.filter(|known| known.group.ranks == call.group.ranks && known.member == call.member);
        let (Some(known), true) = (known, peer != Some(call.member)) else {
            let got = format!("member {} of group {} of {:?}", call.member, call.group.id, call.group.ranks);
            return Err(KernelError::arguments(call.name(), "member", "this process's of a known group", got));
        };
        let mut state = lock(&known.state);
        self.check_aborted()?;
        let State { comm, memory, collectives, failed } = &mut *state;
        let (Some(joined), None) = (&*comm, &*failed) else {
            return Err(failed.clone().unwrap_or(KernelError::Aborted { cause: "the group has failed".to_owned() }));
        };
        let (digest, text) = agreement(call, reads, writes);
        let tag = (*collectives % TAGS) as c_int;
        let mut running = Call { engine: self, call, comm: joined, memory, digest, text, tag };
        match running.run(peer, reads, writes) {
            Ok(elements) => {
                *collectives = collectives.wrapping_add(u32::from(peer.is_none()));
                let bytes = (elements * size_of::<f32>()) as u64;
                *lock(&self.received).entry(call.group.ranks[call.member]).or_default() += bytes;
                Ok(())
            }
            Err(End::Done(error)) => Err(failed.insert(error).clone()),
            Err(End::GivenUp(error)) => {
                reads.iter().chain(writes).for_each(|view| mem::forget(view.arena().clone()));
                mem::forget(mem::take(memory));
                *comm = None;
                self.world.abort();
                Err(failed.insert(error).clone())
            }
        }
    }

    fn abort(&self, cause: &str) {
        let _ = self.aborted.set(cause.to_owned());
        self.world.abort();
    }

    /// MPI tells nothing of that.
    fn waits(&self) -> Vec<MemberWait> {
        Vec::new()
    }

    fn knows_waits(&self) -> bool {
        false
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        lock(&self.received).get(&rank).copied().unwrap_or(0)
    }
}
