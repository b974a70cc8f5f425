//! Communicators and what passes between their ranks: who meets whom, and in which order.
//!
//! - NC-1: the n-th collective of a communicator is the same on all its ranks: kind, count, type, reduction and root.
//! - NC-2: communicators that share devices issue their collectives in one order on all of these.
//!
//! Calls of a group on one communicator and stream are one operation. It starts when it is its stream's first; a part of
//! it is done once its partners have started too, and the operation ends with its last part. Where the communicator does
//! not block, the call answers "in progress", and the operation comes to its stream only when the host has asked.
//!
//! Where other processes have ranks too, the first message between two ranks stays "in progress" until both have called, since
//! NCCL connects them only then; a part whose partners of this process have started is posted to the hub, and done
//! when the hub's answer has come. Clocks do not cross processes, for neither do addresses.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::ncclResult_t;

use crate::clock::Clock;
use crate::nccl::abroad::{Answer, post};
use crate::nccl::data;
use crate::nccl::wire::{Direction, Meeting, Said, Wire};
use crate::run::{Running, start};
use crate::scheduler::Hold;
use crate::world::{Kind, State, World};

/// What a call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum CallKind {
    /// Sum or such of all, to all.
    AllReduce,
    /// The root's data, to all.
    Broadcast,
    /// Sum or such of all, to the root.
    Reduce,
    /// Everybody's data, to all.
    AllGather,
    /// A piece of the sum of all, to each.
    ReduceScatter,
    /// To a peer.
    Send,
    /// From a peer.
    Receive,
}

/// A call.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Call {
    /// What.
    pub kind: CallKind,
    /// Address of what is sent.
    pub send: usize,
    /// Address of what is received.
    pub receive: usize,
    /// Elements, as the function of that name counts them.
    pub count: usize,
    /// Number of the type.
    pub dtype: u32,
    /// Number of the reduction.
    pub reduction: u32,
    /// Root or peer.
    pub peer: i32,
}

/// What tells partners of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// The n-th collective of the communicator.
    Collective(u64),
    /// The n-th message to a rank.
    Send(usize, u64),
    /// The n-th message from a rank.
    Receive(usize, u64),
}

/// A call with its tag.
pub struct Part {
    /// The call.
    pub call: Call,
    /// Its tag.
    pub tag: Tag,
    /// How far it is.
    pub stage: Stage,
}

/// How far a part is.
pub enum Stage {
    /// Its partners of this process have not all started.
    Waiting,
    /// The hub knows of it.
    Posted,
    /// The hub has answered.
    Answered(Arc<Answer>),
    /// It is over.
    Done,
}

impl Part {
    fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done)
    }
}

/// Calls of one group on one communicator and stream.
pub struct Group {
    /// Handle of the communicator.
    pub comm: u64,
    /// Its calls.
    pub parts: Vec<Part>,
    /// Set once it is its stream's first.
    pub started: Option<Running>,
}

/// A communicator of one rank.
pub struct Comm {
    /// All ranks together.
    pub clique: u64,
    /// This one.
    pub rank: usize,
    /// Its device.
    pub device: usize,
    /// Whether its calls wait.
    pub is_blocking: bool,
    /// Destroyed or aborted: later calls are refused.
    pub is_closed: bool,
    collectives: u64,
    sent: HashMap<usize, u64>,
    received: HashMap<usize, u64>,
    /// What went wrong behind its back.
    pub error: Option<ncclResult_t>,
    /// Operations of calls that are still in progress: they come to their streams once the host has asked, or later.
    pub deferred: Vec<Deferred>,
    /// Whether the host has asked about them.
    pub was_asked: bool,
}

/// An operation of a communicator that does not block, before it is in its stream's queue.
pub struct Deferred {
    stream: u64,
    group: Box<Group>,
    name: String,
    host: Clock,
    since: Instant,
}

/// How long operations stay deferred when the host never asks.
const DEFERRED_FOR: Duration = Duration::from_millis(5);

/// The ranks of one unique id.
#[derive(Default)]
pub struct Clique {
    /// Handles, by rank.
    pub ranks: Vec<Option<u64>>,
    /// Devices, by rank.
    pub devices: Vec<usize>,
    /// A rank of it was given up.
    pub is_over: bool,
    /// Why it cannot be, or can no longer.
    pub error: Option<ncclResult_t>,
    /// To the hub, where ranks of all processes meet.
    pub wire: Option<Arc<Wire>>,
    /// All ranks are there, some of them in other processes.
    pub is_abroad: bool,
    /// First messages that ranks of other processes have called for.
    pub called: HashSet<Direction>,
    /// The hub's process may end.
    pub hub_left: bool,
    /// Collectives issued, by device.
    issued: HashMap<usize, u64>,
    /// For a collective that not all ranks of this process have issued: who issued it first, what other cliques had issued
    /// there by then, and how many ranks have not.
    orders: HashMap<u64, (usize, BTreeMap<u64, u64>, usize)>,
}

impl Clique {
    /// One that its ranks have yet to join.
    pub fn of(ranks: usize, wire: Arc<Wire>) -> Clique {
        Clique { ranks: vec![None; ranks], wire: Some(wire), ..Clique::default() }
    }

    /// Whether all ranks are there.
    pub fn is_full(&self) -> bool {
        self.is_abroad || self.ranks.iter().all(Option::is_some)
    }
}

/// NC-2 broken: by which two cliques, and how.
pub type Disorder = ((u64, u64), String);

/// All communicators.
#[derive(Default)]
pub struct Comms {
    /// By handle.
    pub comms: BTreeMap<u64, Comm>,
    /// By their own handle.
    pub cliques: BTreeMap<u64, Clique>,
    /// Cliques by unique id.
    pub ids: HashMap<String, u64>,
}

impl Comms {
    /// Communicators that were not closed.
    pub fn leaks(&self) -> Vec<String> {
        let open = self.comms.values().filter(|c| !c.is_closed);
        open.map(|c| format!("communicator of rank {} on device {}", c.rank, c.device)).collect()
    }

    /// Names of the communicators whose ranks in this process were all given up.
    pub fn left(&self) -> Vec<String> {
        let is_open = |clique: u64| self.comms.values().any(|c| c.clique == clique && !c.is_closed);
        self.ids.iter().filter(|(_, clique)| !is_open(**clique)).map(|(name, _)| name.clone()).collect()
    }

    /// A new rank of a clique.
    pub fn add(&mut self, handle: u64, clique: u64, rank: usize, device: usize, is_blocking: bool) {
        let comm = Comm {
            clique,
            rank,
            device,
            is_blocking,
            is_closed: false,
            collectives: 0,
            sent: HashMap::new(),
            received: HashMap::new(),
            error: None,
            deferred: Vec::new(),
            was_asked: false,
        };
        self.comms.insert(handle, comm);
        let members = self.cliques.get_mut(&clique).expect("its clique exists");
        if members.devices.contains(&device) {
            members.error = Some(ncclResult_t::ncclInvalidUsage);
        }
        members.ranks[rank] = Some(handle);
        members.devices.push(device);
    }

    /// A rank is given up, in order or not.
    pub fn close(&mut self, handle: u64, in_order: bool) {
        let comm = self.comms.get_mut(&handle).expect("it was looked up");
        comm.is_closed = true;
        let (number, rank) = (comm.clique, comm.rank);
        let is_last = self.comms.values().all(|c| c.clique != number || c.is_closed);
        let clique = self.cliques.get_mut(&number).expect("its clique exists");
        clique.is_over = true;
        if !in_order {
            clique.error.get_or_insert(ncclResult_t::ncclRemoteError);
        }
        if let Some(wire) = &clique.wire {
            wire.say(&Said::Leave { rank, in_order }, &[]);
            if is_last {
                wire.end();
            }
        }
    }

    /// The tag of a communicator's next call, and what it breaks of NC-2.
    pub fn tag(&mut self, handle: u64, call: &Call) -> (Tag, Option<Disorder>) {
        let comm = self.comms.get_mut(&handle).expect("it was looked up");
        let peer = call.peer.max(0) as usize;
        let next = |counts: &mut HashMap<usize, u64>| {
            let count = counts.entry(peer).or_insert(0);
            *count += 1;
            *count
        };
        let tag = match call.kind {
            CallKind::Send => return (Tag::Send(peer, next(&mut comm.sent)), None),
            CallKind::Receive => return (Tag::Receive(peer, next(&mut comm.received)), None),
            _ => {
                comm.collectives += 1;
                Tag::Collective(comm.collectives)
            }
        };
        let (own, device, number) = (comm.clique, comm.device, comm.collectives);
        (tag, self.note_order(own, device, number))
    }

    /// NC-2: what `device` has issued of other communicators before the `number`-th collective of the clique `own` is
    /// what the first device to issue it had issued.
    fn note_order(&mut self, own: u64, device: usize, number: u64) -> Option<Disorder> {
        let before: BTreeMap<u64, u64> = self
            .cliques
            .iter()
            .filter(|(other, c)| **other != own && !c.is_over && c.devices.contains(&device))
            .map(|(other, c)| (*other, c.issued.get(&device).copied().unwrap_or(0)))
            .collect();
        let ranks = self.cliques[&own].devices.len();
        let known = self.cliques[&own].orders.get(&number).cloned();
        let mut broken = None;
        if let Some((first, theirs, _)) = &known {
            for (other, count) in &before {
                let is_shared = theirs.contains_key(other) && self.cliques[other].devices.contains(first);
                let there = theirs.get(other).copied().unwrap_or(0);
                if is_shared && there != *count {
                    let what = format!(
                        "device {device} issues collective {number} of communicator {own:#x} after {count} of \
                         communicator {other:#x}, device {first} after {there}: one order on all devices is needed"
                    );
                    broken = Some(((own.min(*other), own.max(*other)), what));
                }
            }
        }
        let clique = self.cliques.get_mut(&own).expect("its clique exists");
        *clique.issued.entry(device).or_insert(0) += 1;
        let (first, theirs, left) = known.unwrap_or((device, before, ranks));
        if left > 1 {
            clique.orders.insert(number, (first, theirs, left - 1));
        } else {
            clique.orders.remove(&number);
        }
        broken
    }
}

/// A part whose partners of this process have all started.
pub struct Transfer {
    /// Stream, part: by rank, or sender first.
    pub members: Vec<(u64, usize)>,
    /// What is to be done.
    step: Step,
}

enum Step {
    /// All of it.
    Here,
    /// The hub is to be told.
    Post(Meeting),
    /// The hub has answered.
    Take(Arc<Answer>),
}

fn started_part(state: &State, comm: u64, tag: Tag) -> Option<(u64, usize)> {
    state.streams.iter().find_map(|(handle, stream)| {
        let Some(Kind::Nccl(group)) = stream.queue.front().map(|o| &o.kind) else { return None };
        if group.comm != comm || group.started.is_none() || stream.is_busy || stream.is_hung {
            return None;
        }
        let part = group.parts.iter().position(|p| p.tag == tag && !p.is_done())?;
        Some((*handle, part))
    })
}

/// Handles of partners of a part, with the tags that they know it by; none for those of other processes.
fn partners(state: &State, comm: u64, tag: Tag) -> Vec<(usize, Option<u64>, Tag)> {
    let own = &state.comms.comms[&comm];
    let clique = &state.comms.cliques[&own.clique];
    let handle = |rank: usize| clique.ranks.get(rank).copied().flatten();
    match tag {
        Tag::Collective(_) => (0..clique.ranks.len()).map(|rank| (rank, handle(rank), tag)).collect(),
        Tag::Send(to, n) => vec![(to, handle(to), Tag::Receive(own.rank, n))],
        Tag::Receive(from, n) => vec![(from, handle(from), Tag::Send(own.rank, n))],
    }
}

/// A part of the first operation of a stream that can be done now.
pub fn next_transfer(state: &State, handle: u64) -> Option<Transfer> {
    let Some(Kind::Nccl(group)) = state.streams[&handle].queue.front().map(|o| &o.kind) else { return None };
    group.started.as_ref()?;
    let own = &state.comms.comms[&group.comm];
    let is_abroad = state.comms.cliques[&own.clique].is_abroad;
    for (index, part) in group.parts.iter().enumerate() {
        let partners = partners(state, group.comm, part.tag);
        let crosses = is_abroad && partners.iter().any(|p| p.1.is_none());
        let step = match &part.stage {
            Stage::Waiting if crosses => Step::Post(Meeting::of(own.rank, part.tag)),
            Stage::Waiting => Step::Here,
            Stage::Answered(answer) => Step::Take(answer.clone()),
            Stage::Posted | Stage::Done => continue,
        };
        let here = partners.into_iter().filter(|p| p.1.is_some() || !crosses);
        let found: Option<Vec<(u64, usize)>> = here.map(|(_, comm, tag)| started_part(state, comm?, tag)).collect();
        let Some(mut members) = found else { continue };
        match part.tag {
            Tag::Collective(_) => {}
            Tag::Send(..) => members.insert(0, (handle, index)),
            Tag::Receive(..) => members.push((handle, index)),
        }
        return Some(Transfer { members, step });
    }
    None
}

/// What a started operation waits for.
pub fn holds(state: &State, own: u64, group: &Group) -> Vec<Hold> {
    let mut holds = Vec::new();
    let is_abroad = state.comms.cliques[&state.comms.comms[&group.comm].clique].is_abroad;
    for part in group.parts.iter().filter(|p| !p.is_done()) {
        for (rank, comm, tag) in partners(state, group.comm, part.tag) {
            let Some(comm) = comm else {
                let why = if is_abroad { "of another process" } else { "which never joined" };
                holds.push(Hold::Missing(format!("rank {rank}, {why}")));
                continue;
            };
            if started_part(state, comm, tag).is_some() {
                continue;
            }
            let queued = state.streams.iter().find(|(_, s)| {
                s.queue.iter().any(|o| matches!(&o.kind, Kind::Nccl(g) if g.comm == comm && has(g, tag)))
            });
            match queued {
                Some((other, _)) if *other != own => {
                    holds.push(Hold::Stream(*other, format!("rank {rank} there has not come to it")));
                }
                Some(_) => holds.push(Hold::Stream(own, format!("rank {rank}, behind it on its own stream"))),
                None => holds.push(Hold::Missing(format!("rank {rank}, which has not issued it"))),
            }
        }
    }
    holds
}

fn has(group: &Group, tag: Tag) -> bool {
    group.parts.iter().any(|p| p.tag == tag && !p.is_done())
}

/// Starts the first operation of a stream, or does one part of it.
pub fn advance<'a>(world: &'a World, mut state: MutexGuard<'a, State>, handle: u64) -> MutexGuard<'a, State> {
    let op = &state.streams[&handle].queue[0];
    let Kind::Nccl(group) = &op.kind else { return state };
    if group.started.is_none() {
        let (host, name) = (op.host.clone(), op.name.clone());
        let running = start(world, &mut state, handle, &host, name);
        group_mut(&mut state, handle).started = Some(running);
        return state;
    }
    let Some(transfer) = next_transfer(&state, handle) else { return state };
    let ranks = state.comms.cliques[&state.comms.comms[&group.comm].clique].ranks.len();
    let wire = state.comms.cliques[&state.comms.comms[&group.comm].clique].wire.clone();
    let mut members = Vec::new();
    for (stream, part) in &transfer.members {
        let queued = state.streams.get_mut(stream).expect("it was found");
        queued.is_busy = true;
        let group = group_mut(&mut state, *stream);
        if matches!(transfer.step, Step::Post(_)) {
            group.parts[*part].stage = Stage::Posted;
        }
        let call = group.parts[*part].call;
        let running = group.started.as_ref().expect("it has started");
        let running = Running { knows: running.knows.clone(), clock: running.clock.clone(), ..*running };
        let comm = group.comm;
        let rank = state.comms.comms[&comm].rank;
        members.push(data::Member { call, rank, running });
    }
    drop(state);
    let mismatch = match &transfer.step {
        Step::Here => data::pass(world, &members),
        Step::Post(meeting) => {
            post(world, wire.as_deref(), *meeting, &members, ranks);
            let mut state = world.state();
            transfer.members.iter().for_each(|(stream, _)| rest(&mut state, *stream));
            return state;
        }
        Step::Take(answer) => {
            // A mismatch was told when the answer came.
            if answer.mismatch.is_none() {
                members.iter().for_each(|member| data::put(world, member, ranks, &answer.bytes));
            }
            answer.mismatch.is_some()
        }
    };
    finish(world.state(), &transfer.members, &members, mismatch)
}

fn rest(state: &mut State, stream: u64) {
    state.streams.get_mut(&stream).expect("streams stay while they are busy").is_busy = false;
}

/// Parts are done, and operations whose last they were.
fn finish<'a>(
    mut state: MutexGuard<'a, State>,
    transferred: &[(u64, usize)],
    members: &[data::Member],
    mismatch: bool,
) -> MutexGuard<'a, State> {
    let sources = data::sources(members);
    for (stream, part) in transferred {
        rest(&mut state, *stream);
        // It was aborted meanwhile.
        let queued = &state.streams[stream];
        if !matches!(queued.queue.front().map(|o| &o.kind), Some(Kind::Nccl(g)) if g.started.is_some()) {
            continue;
        }
        let group = group_mut(&mut state, *stream);
        group.parts[*part].stage = Stage::Done;
        let comm = group.comm;
        let is_over = group.parts.iter().all(Part::is_done);
        let running = group.started.as_mut().expect("it has started");
        sources.iter().for_each(|source| running.knows.join(&members[*source].running.knows));
        let knows = running.knows.clone();
        if mismatch {
            state.comms.comms.get_mut(&comm).expect("comms stay").error = Some(ncclResult_t::ncclInvalidUsage);
        }
        if is_over {
            let queued = state.streams.get_mut(stream).expect("it was found");
            queued.queue.pop_front();
            queued.clock.join(&knows);
            state.remove_if_over(*stream);
        }
    }
    state
}

fn group_mut(state: &mut State, handle: u64) -> &mut Group {
    let queued = state.streams.get_mut(&handle).expect("it was found");
    match &mut queued.queue[0].kind {
        Kind::Nccl(group) => group,
        _ => unreachable!("its first operation is a group"),
    }
}

/// Keeps a communicator's operation back, as NCCL does when the communicator does not block: whoever goes on with the
/// stream before the host was told that the call is over, overtakes it.
pub fn defer(world: &World, state: &mut State, stream: u64, group: Group, name: String) {
    let (host, comm) = (state.host_clock(world.config.one_host), group.comm);
    let first: Vec<Direction> = first_abroad(state, comm, &group).collect();
    let deferred = Deferred { stream, group: Box::new(group), name, host, since: Instant::now() };
    let comm = state.comms.comms.get_mut(&comm).expect("it was looked up");
    if let Some(wire) = &state.comms.cliques[&comm.clique].wire {
        first.into_iter().for_each(|direction| wire.say(&Said::Call(direction), &[]));
    }
    comm.deferred.push(deferred);
    comm.was_asked = false;
    state.last_move = Instant::now();
}

/// The host asks whether a communicator's calls are over: not yet, the first time.
pub fn ask(world: &World, state: &mut State, comm: u64) -> bool {
    let found = state.comms.comms.get_mut(&comm).expect("it was looked up");
    if found.deferred.is_empty() {
        return true;
    }
    if !std::mem::replace(&mut found.was_asked, true) || !is_connected(state, comm) {
        return false;
    }
    settle(world, state, comm);
    true
}

/// The first messages of a group to and from ranks of other processes.
fn first_abroad(state: &State, comm: u64, group: &Group) -> impl Iterator<Item = Direction> {
    let own = &state.comms.comms[&comm];
    let ranks = &state.comms.cliques[&own.clique].ranks;
    let first = group.parts.iter().filter_map(|part| Direction::of_first(own.rank, part.tag));
    first.filter(|direction| ranks.get(direction.peer).is_some_and(Option::is_none))
}

/// Whether the other ends of a communicator's deferred messages have called too, where these are the first.
fn is_connected(state: &State, comm: u64) -> bool {
    let own = &state.comms.comms[&comm];
    let called = &state.comms.cliques[&own.clique].called;
    let deferred = own.deferred.iter().flat_map(|deferred| first_abroad(state, comm, &deferred.group));
    deferred.map(Direction::other).all(|other| called.contains(&other))
}

fn settle(world: &World, state: &mut State, comm: u64) {
    let deferred = std::mem::take(&mut state.comms.comms.get_mut(&comm).expect("it was looked up").deferred);
    for Deferred { stream, group, name, host, .. } in deferred {
        state.submit_as(world, stream, Kind::Nccl(group), name, host);
    }
}

/// Settles calls that the host does not ask about. True when there were any.
pub fn settle_old(world: &World, state: &mut State) -> bool {
    let is_old = |c: &Comm| c.deferred.iter().any(|d| d.since.elapsed() > DEFERRED_FOR);
    let is_left = |c: &Comm| c.deferred.iter().any(|d| d.since.elapsed() > world.config.deadlock);
    let may = |(handle, comm): &(&u64, &Comm)| is_old(comm) && (is_connected(state, **handle) || is_left(comm));
    let old: Vec<u64> = state.comms.comms.iter().filter(may).map(|(handle, _)| *handle).collect();
    for comm in old.iter().filter(|comm| !is_connected(state, **comm)) {
        let (rank, key) = (state.comms.comms[comm].rank, format!("{comm} connects"));
        world.find("deadlock", &key, || {
            format!(
                "rank {rank} waits until its first message is on its stream, and the other end has not called for it"
            )
        });
    }
    old.iter().for_each(|comm| settle(world, state, *comm));
    !old.is_empty()
}

/// Takes a communicator's operations out of all queues. Returns how many there were.
pub fn abort(state: &mut State, comm: u64) -> usize {
    let mut dropped = std::mem::take(&mut state.comms.comms.get_mut(&comm).expect("it was looked up").deferred).len();
    for stream in state.streams.values_mut() {
        let before = stream.queue.len();
        stream.queue.retain(|o| !matches!(&o.kind, Kind::Nccl(g) if g.comm == comm));
        dropped += before - stream.queue.len();
    }
    dropped
}

/// Whether a communicator has operations in queues.
pub fn is_pending(state: &State, comm: u64) -> bool {
    let is_deferred = state.comms.comms.get(&comm).is_some_and(|c| !c.deferred.is_empty());
    is_deferred
        || state.streams.values().any(|s| s.queue.iter().any(|o| matches!(&o.kind, Kind::Nccl(g) if g.comm == comm)))
}
