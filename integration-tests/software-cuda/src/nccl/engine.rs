//! Communicators, the matching of their ranks' calls, and the order of collectives.
//!
//! - NC-1: the n-th collective of a communicator has the same kind, count, type, reduction and root on all its ranks.
//! - NC-2: communicators that share devices issue their collectives in the same order on all of these devices.
//!
//! The calls of a group on one communicator and stream form one operation; each call is a part of the operation. The
//! operation starts when it is first in its stream. The partners of a part are the matching calls of other ranks. A
//! part executes after its partners have started, and the operation ends after its last part. On a non-blocking
//! communicator, a call returns "in progress". Its operation is put on the stream only after the host has polled, or
//! after [`DEFERRED_FOR`].
//!
//! A clique is the set of ranks that share one unique id. If other processes have ranks of a clique, the first message
//! between two ranks stays "in progress" until both ranks have called, because NCCL connects the two ranks only then. A
//! part is posted to the hub (see `hub`) when its local partners have started, and executes when the hub's result
//! arrives. Processes do not exchange clocks or addresses.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::ncclResult_t;

use crate::clock::Clock;
use crate::nccl::abroad::{ExchangeResult, post};
use crate::nccl::data;
use crate::nccl::wire::{Direction, ExchangeId, HubConnection, HubMessage};
use crate::run::{Running, start};
use crate::scheduler::Blocker;
use crate::world::{OpKind, SoftwareMachine, State};

/// The kind of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum CallKind {
    /// A reduction of all ranks' data; every rank receives the result.
    AllReduce,
    /// A copy of the root's data to every rank.
    Broadcast,
    /// A reduction of all ranks' data; the root receives the result.
    Reduce,
    /// A concatenation of all ranks' data; every rank receives the whole result.
    AllGather,
    /// A reduction of all ranks' data; each rank receives one part of the result.
    ReduceScatter,
    /// A message to a peer.
    Send,
    /// A message from a peer.
    Receive,
}

/// A call of a collective, or of one end of a message.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Call {
    /// Kind of the call.
    pub kind: CallKind,
    /// Address of the sent data.
    pub send: usize,
    /// Address of the received data.
    pub receive: usize,
    /// Number of elements, as the NCCL function counts them.
    pub count: usize,
    /// NCCL's number of the element type.
    pub dtype: u32,
    /// NCCL's number of the reduction.
    pub reduction: u32,
    /// Rank of the root or peer.
    pub peer: i32,
}

/// Identifies a part. The tag determines the partners of the part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    /// The n-th collective of the communicator.
    Collective(u64),
    /// The n-th message to a rank.
    Send(usize, u64),
    /// The n-th message from a rank.
    Receive(usize, u64),
}

/// A call with its tag.
pub(crate) struct Part {
    /// The call.
    pub call: Call,
    /// Tag of the call.
    pub tag: Tag,
    /// Progress of the call.
    pub stage: Stage,
}

/// Progress of a part.
pub(crate) enum Stage {
    /// Some partners in this process have not started.
    Waiting,
    /// The part was posted to the hub.
    Posted,
    /// The hub has sent the result.
    Answered(Arc<ExchangeResult>),
    /// The part has finished.
    Done,
}

impl Part {
    fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done)
    }
}

/// The calls of one group on one communicator and stream.
pub(crate) struct Group {
    /// Handle of the communicator.
    pub comm: u64,
    /// The calls.
    pub parts: Vec<Part>,
    /// The running operation, set when the group becomes first in its stream.
    pub started: Option<Running>,
}

/// One rank's communicator.
pub(crate) struct Comm {
    /// Handle of the communicator's clique.
    pub clique: u64,
    /// The rank.
    pub rank: usize,
    /// The rank's device.
    pub device: usize,
    /// Whether calls on this communicator block.
    pub is_blocking: bool,
    /// Whether the communicator was destroyed or aborted. It then refuses calls.
    pub is_closed: bool,
    collectives: u64,
    sent: HashMap<usize, u64>,
    received: HashMap<usize, u64>,
    /// Asynchronous error.
    pub error: Option<ncclResult_t>,
    /// Operations whose calls are in progress. These operations are submitted to their streams at the host's second
    /// poll, or after [`DEFERRED_FOR`].
    pub deferred: Vec<Deferred>,
    /// Whether the host has polled since the last call.
    pub was_polled: bool,
}

/// An operation of a non-blocking communicator that is not in its stream's queue yet.
pub(crate) struct Deferred {
    stream: u64,
    group: Box<Group>,
    name: String,
    host: Clock,
    since: Instant,
}

/// How long operations stay deferred if the host does not poll twice.
const DEFERRED_FOR: Duration = Duration::from_millis(5);

/// The ranks that share one unique id.
#[derive(Default)]
pub(crate) struct Clique {
    /// Communicator handles by rank. `None` for a rank that is missing or in another process.
    pub ranks: Vec<Option<u64>>,
    /// Devices of the local ranks, in joining order.
    pub devices: Vec<usize>,
    /// Whether a rank was destroyed or aborted.
    pub is_closing: bool,
    /// Error of the whole clique.
    pub error: Option<ncclResult_t>,
    /// Connection to the hub, which coordinates the processes.
    pub hub: Option<Arc<HubConnection>>,
    /// Whether all ranks have joined and some of them are in other processes.
    pub has_remote_ranks: bool,
    /// Calls that ranks of other processes have already made for their first message to or from a local rank.
    pub called: HashSet<Direction>,
    /// Whether the hub's process has closed its ranks and may therefore end.
    pub hub_has_left: bool,
    /// For each device, the number of collectives that it has issued.
    issued: HashMap<usize, u64>,
    /// An entry for each collective that only some of the local ranks have issued: the first device that issued the
    /// collective, the number of collectives of each other clique that this device had issued at that time, and the
    /// number of local ranks that have not issued the collective.
    orders: HashMap<u64, (usize, BTreeMap<u64, u64>, usize)>,
}

impl Clique {
    /// Creates a clique that no rank has joined yet.
    pub fn of(ranks: usize, hub: Arc<HubConnection>) -> Clique {
        Clique { ranks: vec![None; ranks], hub: Some(hub), ..Clique::default() }
    }

    /// Whether all ranks have joined.
    pub fn is_full(&self) -> bool {
        self.has_remote_ranks || self.ranks.iter().all(Option::is_some)
    }
}

/// A violation of NC-2: the handles of the two cliques, and a description.
pub(crate) type Disorder = ((u64, u64), String);

/// All communicators.
#[derive(Default)]
pub(crate) struct Comms {
    /// Communicators by handle.
    pub comms: BTreeMap<u64, Comm>,
    /// Cliques by handle.
    pub cliques: BTreeMap<u64, Clique>,
    /// Cliques by unique id.
    pub ids: HashMap<String, u64>,
}

impl Comms {
    /// Returns descriptions of the communicators that were not closed.
    pub fn leaks(&self) -> Vec<String> {
        let open = self.comms.values().filter(|c| !c.is_closed);
        open.map(|c| format!("communicator of rank {} on device {}", c.rank, c.device)).collect()
    }

    /// Returns the names of the cliques whose local ranks are all closed.
    pub fn closed_names(&self) -> Vec<String> {
        let is_open = |clique: u64| self.comms.values().any(|c| c.clique == clique && !c.is_closed);
        self.ids.iter().filter(|(_, clique)| !is_open(**clique)).map(|(name, _)| name.clone()).collect()
    }

    /// Adds a rank to a clique.
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
            was_polled: false,
        };
        self.comms.insert(handle, comm);
        let members = self.cliques.get_mut(&clique).expect("cliques are never removed");
        if members.devices.contains(&device) {
            members.error = Some(ncclResult_t::ncclInvalidUsage);
        }
        members.ranks[rank] = Some(handle);
        members.devices.push(device);
    }

    /// Closes a rank that was destroyed (`in_order`) or aborted.
    pub fn close(&mut self, handle: u64, in_order: bool) {
        let comm = self.comms.get_mut(&handle).expect("looked up by the caller");
        comm.is_closed = true;
        let (number, rank) = (comm.clique, comm.rank);
        let is_last = self.comms.values().all(|c| c.clique != number || c.is_closed);
        let clique = self.cliques.get_mut(&number).expect("cliques are never removed");
        clique.is_closing = true;
        if !in_order {
            clique.error.get_or_insert(ncclResult_t::ncclRemoteError);
        }
        if let Some(hub) = &clique.hub {
            hub.send(&HubMessage::Leave { rank, in_order }, &[]);
            if is_last {
                hub.end();
            }
        }
    }

    /// Returns the tag of a communicator's next call, and a violation of NC-2 if the call causes one.
    pub fn tag(&mut self, handle: u64, call: &Call) -> (Tag, Option<Disorder>) {
        let comm = self.comms.get_mut(&handle).expect("looked up by the caller");
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
        (tag, self.check_order(own, device, number))
    }

    /// Checks NC-2 when `device` issues the `number`-th collective of the clique `own`. Compares with the first device
    /// that issued this collective: for each other clique with both devices, both must have issued the same number of
    /// collectives before this one.
    fn check_order(&mut self, own: u64, device: usize, number: u64) -> Option<Disorder> {
        let before: BTreeMap<u64, u64> = self
            .cliques
            .iter()
            .filter(|(other, c)| **other != own && !c.is_closing && c.devices.contains(&device))
            .map(|(other, c)| (*other, c.issued.get(&device).copied().unwrap_or(0)))
            .collect();
        let ranks = self.cliques[&own].devices.len();
        let known = self.cliques[&own].orders.get(&number).cloned();
        let mut broken = None;
        if let Some((first, first_counts, _)) = &known {
            for (other, count) in &before {
                let is_shared = first_counts.contains_key(other) && self.cliques[other].devices.contains(first);
                let there = first_counts.get(other).copied().unwrap_or(0);
                if is_shared && there != *count {
                    let message = format!(
                        "device {device} issues collective {number} of communicator {own:#x} after {count} collectives \
                         of communicator {other:#x}, but device {first} issues it after {there}: use one \
                         order on all devices"
                    );
                    broken = Some(((own.min(*other), own.max(*other)), message));
                }
            }
        }
        let clique = self.cliques.get_mut(&own).expect("cliques are never removed");
        *clique.issued.entry(device).or_insert(0) += 1;
        let (first, first_counts, left) = known.unwrap_or((device, before, ranks));
        if left > 1 {
            clique.orders.insert(number, (first, first_counts, left - 1));
        } else {
            clique.orders.remove(&number);
        }
        broken
    }
}

/// A part whose local partners have all started.
pub(crate) struct Transfer {
    /// Streams and part indices of the members. Members are in rank order, but a message's sender is first.
    pub members: Vec<(u64, usize)>,
    /// The next step.
    step: Step,
}

enum Step {
    /// Execute the part in this process.
    Local,
    /// Post the members' calls to the hub.
    Post(ExchangeId),
    /// Write the hub's result.
    Receive(Arc<ExchangeResult>),
}

fn started_part(state: &State, comm: u64, tag: Tag) -> Option<(u64, usize)> {
    state.streams.iter().find_map(|(handle, stream)| {
        let Some(OpKind::Nccl(group)) = stream.queue.front().map(|o| &o.kind) else { return None };
        if group.comm != comm || group.started.is_none() || stream.is_busy || stream.is_hung {
            return None;
        }
        let part = group.parts.iter().position(|p| p.tag == tag && !p.is_done())?;
        Some((*handle, part))
    })
}

/// Returns the rank, handle and tag of each partner of a part. The handle is `None` for a rank in another process.
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

/// Returns a part of the stream's first operation that can execute now.
pub fn next_transfer(state: &State, handle: u64) -> Option<Transfer> {
    let Some(OpKind::Nccl(group)) = state.streams[&handle].queue.front().map(|o| &o.kind) else { return None };
    group.started.as_ref()?;
    let own = &state.comms.comms[&group.comm];
    let has_remote_ranks = state.comms.cliques[&own.clique].has_remote_ranks;
    for (index, part) in group.parts.iter().enumerate() {
        let partners = partners(state, group.comm, part.tag);
        let crosses = has_remote_ranks && partners.iter().any(|p| p.1.is_none());
        let step = match &part.stage {
            Stage::Waiting if crosses => Step::Post(ExchangeId::of(own.rank, part.tag)),
            Stage::Waiting => Step::Local,
            Stage::Answered(answer) => Step::Receive(answer.clone()),
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

/// Returns the reasons why a started operation waits.
pub fn blockers(state: &State, own: u64, group: &Group) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    let has_remote_ranks = state.comms.cliques[&state.comms.comms[&group.comm].clique].has_remote_ranks;
    for part in group.parts.iter().filter(|p| !p.is_done()) {
        for (rank, comm, tag) in partners(state, group.comm, part.tag) {
            let Some(comm) = comm else {
                let why = if has_remote_ranks { "is in another process" } else { "never joined" };
                blockers.push(Blocker::Missing(format!("rank {rank}, which {why}")));
                continue;
            };
            if started_part(state, comm, tag).is_some() {
                continue;
            }
            let queued = state.streams.iter().find(|(_, s)| {
                s.queue.iter().any(|o| matches!(&o.kind, OpKind::Nccl(g) if g.comm == comm && has(g, tag)))
            });
            match queued {
                Some((other, _)) if *other != own => {
                    blockers.push(Blocker::Stream(*other, format!("rank {rank} has not reached this call there")));
                }
                Some(_) => {
                    blockers.push(Blocker::Stream(own, format!("rank {rank}, whose call is queued behind this one")));
                }
                None => blockers.push(Blocker::Missing(format!("rank {rank}, which has not issued this call"))),
            }
        }
    }
    blockers
}

fn has(group: &Group, tag: Tag) -> bool {
    group.parts.iter().any(|p| p.tag == tag && !p.is_done())
}

/// Starts the first operation of a stream, or executes one of its parts.
pub fn advance<'a>(
    machine: &'a SoftwareMachine,
    mut state: MutexGuard<'a, State>,
    handle: u64,
) -> MutexGuard<'a, State> {
    let op = &state.streams[&handle].queue[0];
    let OpKind::Nccl(group) = &op.kind else { return state };
    if group.started.is_none() {
        let (host, name) = (op.host.clone(), op.name.clone());
        let running = start(machine, &mut state, handle, &host, name);
        group_mut(&mut state, handle).started = Some(running);
        return state;
    }
    let Some(transfer) = next_transfer(&state, handle) else { return state };
    let ranks = state.comms.cliques[&state.comms.comms[&group.comm].clique].ranks.len();
    let hub = state.comms.cliques[&state.comms.comms[&group.comm].clique].hub.clone();
    let mut members = Vec::new();
    for (stream, part) in &transfer.members {
        let queued = state.streams.get_mut(stream).expect("looked up above");
        queued.is_busy = true;
        let group = group_mut(&mut state, *stream);
        if matches!(transfer.step, Step::Post(_)) {
            group.parts[*part].stage = Stage::Posted;
        }
        let call = group.parts[*part].call;
        let running = group.started.as_ref().expect("the operation has started");
        let running = Running { knows: running.knows.clone(), clock: running.clock.clone(), ..*running };
        let comm = group.comm;
        let rank = state.comms.comms[&comm].rank;
        members.push(data::Member { call, rank, running });
    }
    drop(state);
    let mismatch = match &transfer.step {
        Step::Local => data::execute(machine, &members),
        Step::Post(exchange) => {
            post(machine, hub.as_deref(), *exchange, &members, ranks);
            let mut state = machine.state();
            transfer.members.iter().for_each(|(stream, _)| set_idle(&mut state, *stream));
            return state;
        }
        Step::Receive(answer) => {
            // A mismatch was already reported when the result arrived.
            if answer.mismatch.is_none() {
                members.iter().for_each(|member| data::write_output(machine, member, ranks, &answer.bytes));
            }
            answer.mismatch.is_some()
        }
    };
    finish(machine.state(), &transfer.members, &members, mismatch)
}

fn set_idle(state: &mut State, stream: u64) {
    state.streams.get_mut(&stream).expect("busy streams are not removed").is_busy = false;
}

/// Finishes executed parts. Also finishes each operation whose last part has executed.
fn finish<'a>(
    mut state: MutexGuard<'a, State>,
    transferred: &[(u64, usize)],
    members: &[data::Member],
    mismatch: bool,
) -> MutexGuard<'a, State> {
    let sources = data::sources(members);
    for (stream, part) in transferred {
        set_idle(&mut state, *stream);
        // Skip operations that were aborted during the execution.
        let queued = &state.streams[stream];
        if !matches!(queued.queue.front().map(|o| &o.kind), Some(OpKind::Nccl(g)) if g.started.is_some()) {
            continue;
        }
        let group = group_mut(&mut state, *stream);
        group.parts[*part].stage = Stage::Done;
        let comm = group.comm;
        let is_finished = group.parts.iter().all(Part::is_done);
        let running = group.started.as_mut().expect("the operation has started");
        sources.iter().for_each(|source| running.knows.join(&members[*source].running.knows));
        let knows = running.knows.clone();
        if mismatch {
            state.comms.comms.get_mut(&comm).expect("communicators are never removed").error =
                Some(ncclResult_t::ncclInvalidUsage);
        }
        if is_finished {
            let queued = state.streams.get_mut(stream).expect("looked up above");
            queued.queue.pop_front();
            queued.clock.join(&knows);
            state.remove_if_finished(*stream);
        }
    }
    state
}

fn group_mut(state: &mut State, handle: u64) -> &mut Group {
    let queued = state.streams.get_mut(&handle).expect("looked up above");
    match &mut queued.queue[0].kind {
        OpKind::Nccl(group) => group,
        _ => unreachable!("the first operation is a group"),
    }
}

/// Defers an operation, as NCCL does on a non-blocking communicator. Work that the host submits to the stream before it
/// polls therefore runs before the operation.
pub fn defer(machine: &SoftwareMachine, state: &mut State, stream: u64, group: Group, name: String) {
    let (host, comm) = (state.host_clock(machine.config.one_host), group.comm);
    let first: Vec<Direction> = first_remote_messages(state, comm, &group).collect();
    let deferred = Deferred { stream, group: Box::new(group), name, host, since: Instant::now() };
    let comm = state.comms.comms.get_mut(&comm).expect("looked up by the caller");
    if let Some(hub) = &state.comms.cliques[&comm.clique].hub {
        first.into_iter().for_each(|direction| hub.send(&HubMessage::Call(direction), &[]));
    }
    comm.deferred.push(deferred);
    comm.was_polled = false;
    state.last_progress = Instant::now();
}

/// Returns whether a communicator's calls have finished. The first poll after a call always returns false.
pub fn poll_calls(machine: &SoftwareMachine, state: &mut State, comm: u64) -> bool {
    let found = state.comms.comms.get_mut(&comm).expect("looked up by the caller");
    if found.deferred.is_empty() {
        return true;
    }
    if !std::mem::replace(&mut found.was_polled, true) || !is_connected(state, comm) {
        return false;
    }
    submit_deferred(machine, state, comm);
    true
}

/// Returns the group's first messages to and from ranks in other processes.
fn first_remote_messages(state: &State, comm: u64, group: &Group) -> impl Iterator<Item = Direction> {
    let own = &state.comms.comms[&comm];
    let ranks = &state.comms.cliques[&own.clique].ranks;
    let first = group.parts.iter().filter_map(|part| Direction::of_first(own.rank, part.tag));
    first.filter(|direction| ranks.get(direction.peer).is_some_and(Option::is_none))
}

/// Whether the remote ranks have also made their calls for this communicator's deferred first messages.
fn is_connected(state: &State, comm: u64) -> bool {
    let own = &state.comms.comms[&comm];
    let called = &state.comms.cliques[&own.clique].called;
    let deferred = own.deferred.iter().flat_map(|deferred| first_remote_messages(state, comm, &deferred.group));
    deferred.map(Direction::other).all(|other| called.contains(&other))
}

fn submit_deferred(machine: &SoftwareMachine, state: &mut State, comm: u64) {
    let deferred = std::mem::take(&mut state.comms.comms.get_mut(&comm).expect("looked up by the caller").deferred);
    for Deferred { stream, group, name, host, .. } in deferred {
        state.submit_as(machine, stream, OpKind::Nccl(group), name, host);
    }
}

/// Submits all deferred operations of each communicator whose oldest one has been deferred for [`DEFERRED_FOR`], or for
/// the deadlock limit if a peer has not called for a first message. Returns whether there were any such operations.
pub fn submit_old_deferred(machine: &SoftwareMachine, state: &mut State) -> bool {
    let is_old = |c: &Comm| c.deferred.iter().any(|d| d.since.elapsed() > DEFERRED_FOR);
    let is_left = |c: &Comm| c.deferred.iter().any(|d| d.since.elapsed() > machine.config.deadlock);
    let may = |(handle, comm): &(&u64, &Comm)| is_old(comm) && (is_connected(state, **handle) || is_left(comm));
    let old: Vec<u64> = state.comms.comms.iter().filter(may).map(|(handle, _)| *handle).collect();
    for comm in old.iter().filter(|comm| !is_connected(state, **comm)) {
        let (rank, key) = (state.comms.comms[comm].rank, format!("{comm} connects"));
        machine.report_finding("deadlock", &key, || {
            format!("rank {rank} waits for its first message with another rank, but that rank has not made its call")
        });
    }
    old.iter().for_each(|comm| submit_deferred(machine, state, *comm));
    !old.is_empty()
}

/// Removes a communicator's operations from all queues, and returns their number.
pub fn abort(state: &mut State, comm: u64) -> usize {
    let mut dropped =
        std::mem::take(&mut state.comms.comms.get_mut(&comm).expect("looked up by the caller").deferred).len();
    for stream in state.streams.values_mut() {
        let before = stream.queue.len();
        stream.queue.retain(|o| !matches!(&o.kind, OpKind::Nccl(g) if g.comm == comm));
        dropped += before - stream.queue.len();
    }
    dropped
}

/// Whether a communicator has operations in queues.
pub fn is_pending(state: &State, comm: u64) -> bool {
    let is_deferred = state.comms.comms.get(&comm).is_some_and(|c| !c.deferred.is_empty());
    is_deferred
        || state.streams.values().any(|s| s.queue.iter().any(|o| matches!(&o.kind, OpKind::Nccl(g) if g.comm == comm)))
}
