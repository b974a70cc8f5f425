//! Explains hangs: follows the waits of an unfinished action to the root cause. Works only on snapshots of actors.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::{fmt, iter};

use crate::protocol::{ActorWaits, Missing};
use crate::snapshot::ActorSnapshot;
use crate::spec::{ActionRef, ActorId, RegisterId, Spec, StreamKind, actor_name};

/// Maximum number of further roots ([`Hang::also`]) that a text names. A stuck device causes only a few such roots.
const NAMED_MAX: usize = 4;

/// A wait in a collective: communicator id, rank of the waiting member, and rank of the member that it waits for.
pub(crate) type CollectiveWait = (u32, usize, usize);

/// The explanation of a hang.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hang {
    pub(crate) root: Root,
    /// Further roots with the same `Root::rank`. Each of them may be the cause.
    pub(crate) also: Vec<Root>,
    /// The waits that lead from an unfinished action to the root. In a cycle, the last action waits for the first one.
    pub(crate) chain: Vec<WaitingAction>,
    text: String,
}

/// A root cause of a hang: other actions wait for it, but it waits for nobody. The exception is a cycle of waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Root {
    /// The producer has published a piece, but this reader did not receive the message.
    LostPiece {
        register: RegisterId,
        piece: u64,
        reader: ActionRef,
    },
    /// The reader has released a piece, but the register's producer did not receive the message.
    LostRelease {
        register: RegisterId,
        piece: u64,
        reader: ActionRef,
    },
    /// A firing that has not ended although it waits for no other actor: its kernels, stream or device hang.
    Firing(ActionRef),
    /// A firing that has not ended although all members have begun its collectives. The engine does not report which
    /// member has not joined.
    Collective(ActionRef),
    Unresponsive(ActorId),
    /// Another process. Either `actor` runs in that process, or `actor` runs in this process and lacks a token while
    /// the host program waits for `process`.
    Process {
        process: u32,
        actor: ActorId,
    },
    /// A member of a group in another process, outside this process's part of the plan.
    Member {
        process: u32,
        device: usize,
        stream: StreamKind,
    },
    Cycle,
    /// A token that the host has not added.
    Token(ActionRef),
}

impl Root {
    /// Among several roots, the root with the lowest rank explains the others.
    fn rank(&self, is_acyclic: bool) -> u8 {
        match self {
            Self::LostPiece { .. } | Self::LostRelease { .. } => 0,
            Self::Firing(_) => 1,
            Self::Collective(_) => 2,
            Self::Unresponsive(_) => 3,
            Self::Process { .. } | Self::Member { .. } => 4,
            // A plan without deadlocks has no cycle of waits. The search can still find one, because it follows a wait
            // for a late member to all actions through which the member could join. The member joins through only one.
            Self::Cycle if is_acyclic => 7,
            Self::Cycle => 5,
            Self::Token(_) => 6,
        }
    }

    fn process(&self) -> Option<u32> {
        match self {
            Self::Process { process, .. } | Self::Member { process, .. } => Some(*process),
            _ => None,
        }
    }

    fn describe(&self, spec: &Spec) -> String {
        let name = |at: &ActionRef| spec.action_name(at.actor, at.action);
        match self {
            Self::LostPiece { register, piece, reader } => {
                let register = spec.register_name(*register);
                format!("piece {piece} of register '{register}' was published, but {} did not receive it", name(reader))
            }
            Self::LostRelease { register, piece, reader } => {
                let register = spec.register_name(*register);
                format!(
                    "the producer of register '{register}' did not receive the release of piece {piece} by {}",
                    name(reader)
                )
            }
            Self::Firing(at) => format!("{} has not ended, and waits for no other action", name(at)),
            Self::Collective(at) => {
                format!("{} has not ended its collective, although all members have begun it", name(at))
            }
            Self::Unresponsive(actor) => {
                let name = &spec.actor(*actor).name;
                format!("{name} does not respond: its thread is blocked, for example in a device driver call")
            }
            Self::Process { process, actor } => {
                format!("waiting for rank {process}, actor {}", spec.actor(*actor).name)
            }
            Self::Member { process, device, stream } => {
                format!("waiting for rank {process}, actor {}", actor_name(*device, *stream))
            }
            Self::Cycle => "actions wait for each other".into(),
            Self::Token(at) => format!("{} waits for a token from the host", name(at)),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WaitingAction {
    pub action: ActionRef,
    pub wait: WaitReason,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WaitReason {
    /// The action lacks a piece, a slot, a token or its turn.
    Missing(Missing),
    /// The action is in flight, and waits for `member` to join a collective of the group.
    Group { group: u32, member: ActorId },
    /// Like `Group`, for a member outside this process's part of the plan.
    Member { communicator: u32, device: usize, stream: StreamKind },
    /// The action's actor has another firing in flight.
    Busy { action: u32 },
}

impl WaitReason {
    fn describe(&self, spec: &Spec, actor: ActorId) -> String {
        match self {
            WaitReason::Missing(missing) => missing.describe(spec, actor),
            WaitReason::Group { group, member } => {
                format!("{} to join group {group}", spec.actor(*member).name)
            }
            WaitReason::Member { communicator, device, stream } => {
                format!("{} to join communicator {communicator}", actor_name(*device, *stream))
            }
            WaitReason::Busy { action } => format!("{}, which is in flight", spec.action_name(actor, *action)),
        }
    }
}

impl Hang {
    /// Describes the root cause.
    pub fn cause(&self, spec: &Spec) -> String {
        self.root.describe(spec)
    }

    /// Describes the chain as pairs of texts: a waiting action, and what the action waits for.
    pub fn steps(&self, spec: &Spec) -> Vec<(String, String)> {
        let describe = |waiting: &WaitingAction| {
            let WaitingAction { action, wait } = waiting;
            (spec.action_name(action.actor, action.action), wait.describe(spec, action.actor))
        };
        self.chain.iter().map(describe).collect()
    }

    /// The process that contains the cause; `None` if the cause is in this process.
    pub fn process(&self) -> Option<u32> {
        self.root.process()
    }

    /// All processes, except this one, that may contain the cause. Contains no duplicates.
    pub fn processes(&self) -> Vec<u32> {
        let all: BTreeSet<u32> = iter::once(&self.root).chain(&self.also).filter_map(Root::process).collect();
        all.into_iter().collect()
    }
}

impl fmt::Display for Hang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The input of [`explain`].
#[derive(Clone, Copy)]
pub(crate) struct HangSnapshot<'a> {
    pub spec: &'a Spec,
    /// Snapshots of this process's actors, taken without progress in between.
    pub snapshots: &'a [ActorSnapshot],
    /// Waits in collectives, as reported by the engines.
    pub collectives: &'a [CollectiveWait],
    /// True if `collectives` contains all waits. False if the engine does not report waits.
    pub knows_collectives: bool,
    /// Whether a simulation has shown that the plan has no deadlock.
    pub is_acyclic: bool,
    /// The process that must finish its part of a step before the host program continues.
    pub host_waits_for: Option<u32>,
    /// Returns the process that hosts an actor; `None` for this process.
    pub process_of: &'a dyn Fn(ActorId) -> Option<u32>,
    /// Returns the members of a communicator that run in other processes, each as a process and a device.
    pub members_of: &'a dyn Fn(u32) -> Vec<(u32, usize)>,
}

impl<'a> HangSnapshot<'a> {
    /// Creates the input for a process that hosts a whole acyclic plan and has no reports from collective engines.
    pub(crate) fn of_one_process(spec: &'a Spec, snapshots: &'a [ActorSnapshot]) -> Self {
        Self {
            spec,
            snapshots,
            collectives: &[],
            knows_collectives: false,
            is_acyclic: true,
            host_waits_for: None,
            process_of: &|_| None,
            members_of: &|_| Vec::new(),
        }
    }
}

/// Explains why the first `steps` steps do not finish. Returns `None` if no action has firings left.
pub(crate) fn explain(snapshot: HangSnapshot<'_>, steps: u64) -> Option<Hang> {
    let mut search = Search::new(snapshot, steps);
    let spec = snapshot.spec;
    let mut first: Option<Hang> = None;
    let mut also = Vec::new();
    for at in search.unfinished() {
        while let Some((root, chain)) = search.next_root(at) {
            let rank = |root: &Root| root.rank(snapshot.is_acyclic);
            let least = first.as_ref().map_or(u8::MAX, |hang| rank(&hang.root));
            if rank(&root) < least {
                first = Some(Hang { root, also: Vec::new(), chain, text: String::new() });
                also.clear();
            } else if rank(&root) == least && !also.contains(&root) {
                also.push(root);
            }
        }
    }
    let mut hang = first?;
    let sentence = |(action, wait)| format!("{action} waits for {wait}");
    let sentences = hang.steps(spec).into_iter().map(sentence).collect::<Vec<_>>().join("; ");
    also.retain(|root| *root != hang.root);
    hang.text = match hang.root {
        Root::Cycle => format!("deadlock: these actions wait in a cycle: {sentences}"),
        Root::Token(_) => format!("starved: {sentences}"),
        root => {
            let others = also.iter().take(NAMED_MAX).map(|root| format!("; also {}", root.describe(spec)));
            let chain = if sentences.is_empty() { sentences } else { format!("; so {sentences}") };
            format!("{}{}{chain}", root.describe(spec), others.collect::<String>())
        }
    };
    hang.also = also;
    Some(hang)
}

/// Describes waits in communicators that no action uses. Such communicators belong to pipes, the direct transfers
/// between GPUs of two processes.
pub(crate) fn describe_pipe_waits(spec: &Spec, waits: &[CollectiveWait]) -> Vec<String> {
    let of_actions: HashSet<u32> = spec.all_actions().flat_map(|(_, action)| action.communicators.clone()).collect();
    let of_pipes = waits.iter().filter(|(communicator, ..)| !of_actions.contains(communicator));
    let text = |(_, rank, peer): &CollectiveWait| {
        format!("device {rank}: a transfer of registers with device {peer} is in progress on the GPU and does not end")
    };
    of_pipes.map(text).collect()
}

/// The target of a wait: an action to visit, or a root cause.
enum Next {
    Action(ActionRef),
    Root(Root),
}

/// Depth-first search over the actions. The search visits no action twice.
struct Search<'a> {
    input: HangSnapshot<'a>,
    /// Number of steps that the host has begun since the start.
    steps: u64,
    snapshots: BTreeMap<ActorId, &'a ActorSnapshot>,
    visited: HashSet<ActionRef>,
    /// The current path from the start of the search: each action with its remaining waits.
    path: Vec<(WaitingAction, std::vec::IntoIter<(WaitReason, Next)>)>,
}

impl<'a> Search<'a> {
    fn new(input: HangSnapshot<'a>, steps: u64) -> Self {
        let snapshots = input.snapshots.iter().map(|s| (s.actor, s)).collect();
        Self { input, steps, snapshots, visited: HashSet::new(), path: Vec::new() }
    }

    fn unfinished(&self) -> Vec<ActionRef> {
        let all = self.input.spec.all_actions().map(|(at, _)| at);
        let here = all.filter(|at| (self.input.process_of)(at.actor).is_none());
        here.filter(|at| self.is_unfinished(at)).collect()
    }

    /// True if the action has firings left, or if the actor's state is unknown because the actor hangs or runs in
    /// another process.
    fn is_unfinished(&self, at: &ActionRef) -> bool {
        let per_step = self.input.spec.action(at.actor, at.action).per_step;
        let completed = self.snapshots.get(&at.actor).map(|snapshot| snapshot.completed(at.action));
        completed.is_none_or(|completed| completed < u64::from(per_step) * self.steps)
    }

    /// Returns the next root that the search reaches from an action, and the chain to that root.
    fn next_root(&mut self, at: ActionRef) -> Option<(Root, Vec<WaitingAction>)> {
        if self.path.is_empty() {
            self.visit(at)?;
        }
        loop {
            let (waiting, remaining) = self.path.last_mut()?;
            let Some((wait, next)) = remaining.next() else {
                self.path.pop();
                continue;
            };
            waiting.wait = wait;
            match next {
                Next::Root(root) => return Some((root, self.chain(0, &root))),
                Next::Action(to) => {
                    if let Some(start) = self.path.iter().position(|(waiting, _)| waiting.action == to) {
                        return Some((Root::Cycle, self.chain(start, &Root::Cycle)));
                    }
                    self.visit(to);
                }
            }
        }
    }

    fn chain(&self, start: usize, root: &Root) -> Vec<WaitingAction> {
        let mut chain: Vec<WaitingAction> = self.path[start..].iter().map(|(waiting, _)| waiting.clone()).collect();
        if matches!(root, Root::Firing(_) | Root::Collective(_) | Root::Unresponsive(_)) {
            // The path ends with this root's action, which waits for nobody. The chain contains only actions that wait.
            chain.pop();
        }
        chain
    }

    fn visit(&mut self, at: ActionRef) -> Option<()> {
        self.visited.insert(at).then(|| {
            // A placeholder. Each time `next_root` follows a wait of this action, it stores that wait here.
            let wait = WaitReason::Missing(Missing::Token);
            self.path.push((WaitingAction { action: at, wait }, self.waits(at).into_iter()));
        })
    }

    /// All waits of an action. The result contains a wait once for each target that could end the wait.
    fn waits(&self, at: ActionRef) -> Vec<(WaitReason, Next)> {
        let busy = |action| WaitReason::Busy { action };
        let Some(snapshot) = self.snapshots.get(&at.actor) else {
            return vec![(busy(at.action), Next::Root(Root::Unresponsive(at.actor)))];
        };
        let ActorWaits { in_flight, actions, .. } = &snapshot.waiting;
        if *in_flight == Some(at.action) {
            return self.waits_in_flight(at, snapshot);
        }
        let mut waits = Vec::new();
        for missing in actions.iter().filter(|w| w.action == at.action).flat_map(|w| &w.missing) {
            let wait = || WaitReason::Missing(missing.clone());
            waits.extend(self.targets(at, missing).into_iter().map(|next| (wait(), next)));
        }
        if let Some(action) = *in_flight {
            waits.push((busy(action), Next::Action(ActionRef { actor: at.actor, action })));
        }
        waits
    }

    /// The waits of a firing in flight for members that have not joined its collectives. If all have joined, the
    /// firing waits for its own stream.
    fn waits_in_flight(&self, at: ActionRef, snapshot: &ActorSnapshot) -> Vec<(WaitReason, Next)> {
        let HangSnapshot { spec, collectives, knows_collectives, .. } = self.input;
        let actor = spec.actor(at.actor);
        let action = &actor.actions[at.action as usize];
        let groups = &action.groups;
        let is_own = |wait: &&CollectiveWait| action.communicators.contains(&wait.0) && wait.1 == actor.device;
        let peers: Vec<(u32, usize)> = collectives.iter().filter(is_own).map(|wait| (wait.0, wait.2)).collect();
        let mut waits = Vec::new();
        for &group in groups {
            let round = self.begun(group, snapshot);
            for (member, actions) in self.members(group).into_iter().filter(|(member, _)| *member != at.actor) {
                let of_member = spec.actor(member);
                let uses = |id: &u32| actions.iter().any(|a| of_member.actions[*a as usize].communicators.contains(id));
                let is_waited_for = peers.iter().any(|(id, device)| *device == of_member.device && uses(id));
                let is_late = match self.snapshots.get(&member) {
                    Some(other) => self.begun(group, other) < round,
                    None => !knows_collectives,
                };
                if !is_waited_for && !is_late {
                    continue;
                }
                // A member that has begun has an action in flight. A late member may join through any of its actions.
                let in_flight = self.snapshots.get(&member).and_then(|other| other.waiting.in_flight);
                let next = actions.iter().filter(|action| is_late || in_flight.is_none_or(|own| own == **action));
                let next = next.map(|&action| ActionRef { actor: member, action }).filter(|at| self.is_unfinished(at));
                waits.extend(next.map(|next| (WaitReason::Group { group, member }, self.target(next))));
            }
        }
        waits.extend(action.communicators.iter().flat_map(|id| self.absent_members(*id, actor.stream, &peers)));
        if waits.is_empty() {
            let is_alone = groups.is_empty() || knows_collectives;
            let root = if is_alone { Root::Firing(at) } else { Root::Collective(at) };
            waits.push((WaitReason::Busy { action: at.action }, Next::Root(root)));
        }
        waits
    }

    /// The waits of a firing in flight for members of a communicator that run in other processes. `peers` are the
    /// firing's waits that the engine has reported, each as a communicator and the device of the awaited member.
    fn absent_members(&self, communicator: u32, stream: StreamKind, peers: &[(u32, usize)]) -> Vec<(WaitReason, Next)> {
        let HangSnapshot { knows_collectives, members_of, .. } = self.input;
        let is_waited_for = |device: usize| !knows_collectives || peers.contains(&(communicator, device));
        let absent = members_of(communicator).into_iter().filter(|(_, device)| is_waited_for(*device));
        let wait = |(process, device)| {
            let root = Root::Member { process, device, stream };
            (WaitReason::Member { communicator, device, stream }, Next::Root(root))
        };
        absent.map(wait).collect()
    }

    /// Number of firings that an actor has begun in actions of a group.
    fn begun(&self, group: u32, snapshot: &ActorSnapshot) -> u64 {
        let actions = &self.input.spec.actor(snapshot.actor).actions;
        let own = actions.iter().zip(&snapshot.firings).filter(|(action, _)| action.groups.contains(&group));
        own.map(|(_, firings)| firings).sum()
    }

    /// The members of a group, each with its actions that belong to the group.
    fn members(&self, group: u32) -> BTreeMap<ActorId, Vec<u32>> {
        let mut found: BTreeMap<ActorId, Vec<u32>> = BTreeMap::new();
        for (at, _) in self.input.spec.all_actions().filter(|(_, action)| action.groups.contains(&group)) {
            found.entry(at.actor).or_default().push(at.action);
        }
        found
    }

    /// Returns the action as the next target, or its process if another process hosts the action.
    fn target(&self, at: ActionRef) -> Next {
        match (self.input.process_of)(at.actor) {
            Some(process) => Next::Root(Root::Process { process, actor: at.actor }),
            None => Next::Action(at),
        }
    }

    /// The actions or roots that could end this wait of `at`.
    fn targets(&self, at: ActionRef, missing: &Missing) -> Vec<Next> {
        match missing {
            &Missing::Piece { register, piece, writer } => {
                let known = self.snapshots.get(&writer.actor).and_then(|s| s.register(register));
                let index = self.reader_index(register, at);
                if known.zip(index).is_some_and(|(of, index)| of.is_held(piece, index)) {
                    return vec![Next::Root(Root::LostPiece { register, piece, reader: at })];
                }
                vec![self.target(writer)]
            }
            &Missing::Credit { register, piece, ref holders, .. } => {
                let next = |reader: ActionRef| match self.has_released(register, reader, piece) {
                    true => Next::Root(Root::LostRelease { register, piece, reader }),
                    false => self.target(reader),
                };
                holders.iter().map(|holder| next(holder.reader)).collect()
            }
            Missing::Token => vec![Next::Root(match self.input.host_waits_for {
                Some(process) => Root::Process { process, actor: at.actor },
                None => Root::Token(at),
            })],
            Missing::Turn { next } => vec![Next::Action(ActionRef { actor: at.actor, action: *next })],
        }
    }

    fn reader_index(&self, register: RegisterId, reader: ActionRef) -> Option<u32> {
        let readers = &self.input.spec.register(register).readers;
        readers.iter().position(|r| *r == reader).map(|index| index as u32)
    }

    /// True if the reader's own snapshot shows that the reader has released the piece.
    fn has_released(&self, register: RegisterId, reader: ActionRef, piece: u64) -> bool {
        let Some(snapshot) = self.snapshots.get(&reader.actor) else { return false };
        let pieces_per_step = self.input.spec.register(register).pieces_per_step;
        let input = self.input.spec.input(register, reader);
        let needed = input.and_then(|input| input.pieces.firings_to_finish(piece, pieces_per_step));
        needed.is_some_and(|needed| snapshot.completed(reader.action) >= needed)
    }
}

#[cfg(test)]
pub(crate) mod tests;
