//! Why nothing moves: from an action with firings left to what everything waits for in the end. Pure: it looks at what actors
//! show of themselves, live or simulated.
//!
//! Piece numbers tell what was lost: a reader that waits for a piece which its producer has published never heard of it, and a
//! producer that waits for a slot which its reader has released never heard of that.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::{fmt, iter};

use crate::protocol::{ActorWaits, Missing};
use crate::snapshot::ActorSnapshot;
use crate::spec::{ActorId, RegisterId, RegisterReader, Spec};

/// Roots of the same kind that a text names; a stuck device has a few.
const NAMED_MAX: usize = 4;

/// A member of a group that has come to a collective, and waits there for another: the group's id, its rank, the other's.
pub type CollectiveWait = (u32, usize, usize);

/// Why nothing moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hang {
    /// What everything waits for in the end.
    pub root: Root,
    /// More of the same kind, of which each may be the cause.
    pub also: Vec<Root>,
    /// From an action that has not fired enough to the root. In a cycle each waits for the next, and the last for the first.
    pub chain: Vec<WaitingAction>,
    text: String,
}

/// What others wait for, and which itself waits for nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// The producer has published a piece, and this reader never heard of it.
    Unheard {
        /// The register.
        register: RegisterId,
        /// Number of the piece.
        piece: u64,
        /// Who did not hear.
        reader: RegisterReader,
    },
    /// The reader has released a piece, and the register's producer never heard of it.
    Unreturned {
        /// The register.
        register: RegisterId,
        /// Number of the piece.
        piece: u64,
        /// Who released it.
        reader: RegisterReader,
    },
    /// A firing that has not ended though it waits for nobody: its kernels, its stream or its device.
    Firing(RegisterReader),
    /// The same, but all members of a collective in it have begun, and which of them is late is not known.
    Collective(RegisterReader),
    /// The actor does not answer.
    Silent(ActorId),
    /// Another process.
    Process {
        /// Its number.
        process: u32,
        /// Whom it hosts, or whose host waits for it.
        actor: ActorId,
    },
    /// Actions that wait for each other.
    Cycle,
    /// A token that the host has not given.
    Token(RegisterReader),
}

impl Root {
    /// Where several are found, the least explains the others.
    fn rank(&self, is_checked: bool) -> u8 {
        match self {
            Self::Unheard { .. } | Self::Unreturned { .. } => 0,
            Self::Firing(_) => 1,
            Self::Collective(_) => 2,
            Self::Silent(_) => 3,
            Self::Process { .. } => 4,
            // What looks like a cycle in a plan that has none is one of several ways by which a member may come.
            Self::Cycle if is_checked => 7,
            Self::Cycle => 5,
            Self::Token(_) => 6,
        }
    }

    fn process(&self) -> Option<u32> {
        match self {
            Self::Process { process, .. } => Some(*process),
            _ => None,
        }
    }

    fn describe(&self, spec: &Spec) -> String {
        let name = |at: &RegisterReader| spec.action_name(at.actor, at.action);
        match self {
            Self::Unheard { register, piece, reader } => {
                let register = spec.register_name(*register);
                format!("{} never heard of piece {piece} of register '{register}', which was published", name(reader))
            }
            Self::Unreturned { register, piece, reader } => {
                let register = spec.register_name(*register);
                format!(
                    "the producer of register '{register}' never heard that {} released piece {piece}",
                    name(reader)
                )
            }
            Self::Firing(at) => format!("{} has not ended, and waits for nobody", name(at)),
            Self::Collective(at) => format!("{} has not ended, in a collective that all members have begun", name(at)),
            Self::Silent(actor) => {
                let name = &spec.actors[actor.0 as usize].name;
                format!("{name} does not answer: its thread is held up, as by a call of its device's driver")
            }
            Self::Process { process, actor } => {
                format!("rank {process} is waited for, by or for {}", spec.actors[actor.0 as usize].name)
            }
            Self::Cycle => "actions wait for each other".into(),
            Self::Token(at) => format!("{} waits for a token of the host", name(at)),
        }
    }
}

/// One action that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitingAction {
    /// Who waits.
    pub action: RegisterReader,
    /// For what.
    pub wait: WaitReason,
}

/// What an action waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// Something of the protocol.
    Missing(Missing),
    /// In flight: another member of a group has not begun, or not come as far.
    Gang {
        /// The group.
        group: u32,
        /// The member.
        member: ActorId,
    },
    /// Its actor's firing in flight.
    Busy {
        /// Index of the action in flight.
        action: u32,
    },
}

impl WaitReason {
    fn describe(&self, spec: &Spec, actor: ActorId) -> String {
        match self {
            WaitReason::Missing(missing) => missing.describe(spec, actor),
            WaitReason::Gang { group, member } => {
                format!("{} to join group {group}", spec.actors[member.0 as usize].name)
            }
            WaitReason::Busy { action } => format!("{}, which is in flight", spec.action_name(actor, *action)),
        }
    }
}

impl Hang {
    /// The root, in words.
    pub fn cause(&self, spec: &Spec) -> String {
        self.root.describe(spec)
    }

    /// The chain in words: who waits, and for what.
    pub fn steps(&self, spec: &Spec) -> Vec<(String, String)> {
        let words = |link: &WaitingAction| {
            let WaitingAction { action, wait } = link;
            (spec.action_name(action.actor, action.action), wait.describe(spec, action.actor))
        };
        self.chain.iter().map(words).collect()
    }

    /// The process that is waited for, where the cause lies with another one.
    pub fn process(&self) -> Option<u32> {
        self.root.process()
    }

    /// All other processes that may be the cause, each once.
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

/// What is looked at.
#[derive(Clone, Copy)]
pub struct HangSnapshot<'a> {
    /// The plan.
    pub spec: &'a Spec,
    /// States of this process's actors, taken while nothing moved.
    pub snapshots: &'a [ActorSnapshot],
    /// Who waits in which collective, as far as engines tell.
    pub collectives: &'a [CollectiveWait],
    /// Whether these are all who wait in one.
    pub knows_collectives: bool,
    /// Whether the plan was played through, so that it has no cycle.
    pub is_checked: bool,
    /// The process whose part of a step the program waits for before it goes on.
    pub host_waits_for: Option<u32>,
    /// The other process that hosts an actor.
    pub process_of: &'a dyn Fn(ActorId) -> Option<u32>,
}

/// Why nothing moves in these steps, counted from the start; `None` when no action has firings left.
pub fn explain(scene: HangSnapshot<'_>, steps: u64) -> Option<Hang> {
    let mut search = Search::new(scene, steps);
    let spec = scene.spec;
    let mut first: Option<Hang> = None;
    let mut also = Vec::new();
    for at in search.unfinished() {
        while let Some((root, chain)) = search.next_root(at) {
            let rank = |root: &Root| root.rank(scene.is_checked);
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
    let sentences = sentences(spec, &hang.chain);
    also.retain(|root| *root != hang.root);
    hang.text = match hang.root {
        Root::Cycle => format!("deadlock: {sentences}; which closes the cycle"),
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

/// What groups of no action wait for: the pipes that carry registers between devices of two processes.
pub(crate) fn pipes(spec: &Spec, waits: &[CollectiveWait]) -> Vec<String> {
    let of_actions: HashSet<u32> =
        spec.actors.iter().flat_map(|actor| &actor.actions).flat_map(|action| action.groups.iter().copied()).collect();
    let carries = waits.iter().filter(|(group, ..)| !of_actions.contains(group));
    let text = |(_, rank, peer): &CollectiveWait| {
        format!("device {rank}: a transfer of registers with device {peer} is under way on the GPU, and does not end")
    };
    carries.map(text).collect()
}

fn sentences(spec: &Spec, links: &[WaitingAction]) -> String {
    let sentence = |link: &WaitingAction| {
        let name = spec.action_name(link.action.actor, link.action.action);
        format!("{name} waits for {}", link.wait.describe(spec, link.action.actor))
    };
    links.iter().map(sentence).collect::<Vec<_>>().join("; ")
}

/// What ends a wait.
enum Next {
    Action(RegisterReader),
    Root(Root),
}

/// Depth-first over the actions; none is visited twice.
struct Search<'a> {
    scene: HangSnapshot<'a>,
    /// That the host has begun, from the start.
    steps: u64,
    snapshots: BTreeMap<ActorId, &'a ActorSnapshot>,
    seen: HashSet<RegisterReader>,
    /// From where the search began: each action, and the waits that are left to follow.
    path: Vec<(WaitingAction, std::vec::IntoIter<(WaitReason, Next)>)>,
}

impl<'a> Search<'a> {
    fn new(scene: HangSnapshot<'a>, steps: u64) -> Self {
        let snapshots = scene.snapshots.iter().map(|s| (s.actor, s)).collect();
        Self { scene, steps, snapshots, seen: HashSet::new(), path: Vec::new() }
    }

    /// Actions of this process with firings left, as far as is known here.
    fn unfinished(&self) -> Vec<RegisterReader> {
        let actors = self.scene.spec.actors.iter().zip(0..).map(|(actor, a)| (ActorId(a), actor.actions.len() as u32));
        let here = actors.filter(|(actor, _)| (self.scene.process_of)(*actor).is_none());
        let all = here.flat_map(|(actor, actions)| (0..actions).map(move |action| RegisterReader { actor, action }));
        all.filter(|at| self.is_unfinished(at)).collect()
    }

    /// Of an actor that does not answer, and of other processes', nobody here knows.
    fn is_unfinished(&self, at: &RegisterReader) -> bool {
        let per_step = self.scene.spec.actors[at.actor.0 as usize].actions[at.action as usize].per_step;
        let completed = self.snapshots.get(&at.actor).map(|snapshot| snapshot.completed(at.action));
        completed.is_none_or(|completed| completed < u64::from(per_step) * self.steps)
    }

    /// The next root that is reached from an action, with the chain to it.
    fn next_root(&mut self, at: RegisterReader) -> Option<(Root, Vec<WaitingAction>)> {
        if self.path.is_empty() {
            self.visit(at)?;
        }
        loop {
            let (link, left) = self.path.last_mut()?;
            let Some((wait, next)) = left.next() else {
                self.path.pop();
                continue;
            };
            link.wait = wait;
            match next {
                Next::Root(root) => return Some((root, self.chain(0, &root))),
                Next::Action(to) => {
                    if let Some(start) = self.path.iter().position(|(link, _)| link.action == to) {
                        return Some((Root::Cycle, self.chain(start, &Root::Cycle)));
                    }
                    self.visit(to);
                }
            }
        }
    }

    fn chain(&self, start: usize, root: &Root) -> Vec<WaitingAction> {
        let mut links: Vec<WaitingAction> = self.path[start..].iter().map(|(link, _)| link.clone()).collect();
        if matches!(root, Root::Firing(_) | Root::Collective(_) | Root::Silent(_)) {
            // It waits for nobody.
            links.pop();
        }
        links
    }

    fn visit(&mut self, at: RegisterReader) -> Option<()> {
        self.seen.insert(at).then(|| {
            // Overwritten with each wait that is followed.
            let wait = WaitReason::Missing(Missing::Token);
            self.path.push((WaitingAction { action: at, wait }, self.waits(at).into_iter()));
        })
    }

    /// All waits of an action, one for each of what could end it.
    fn waits(&self, at: RegisterReader) -> Vec<(WaitReason, Next)> {
        let busy = |action| WaitReason::Busy { action };
        let Some(snapshot) = self.snapshots.get(&at.actor) else {
            return vec![(busy(at.action), Next::Root(Root::Silent(at.actor)))];
        };
        let ActorWaits { in_flight, actions, .. } = &snapshot.waiting;
        if *in_flight == Some(at.action) {
            return self.waits_in_flight(at, snapshot);
        }
        let mut waits = Vec::new();
        for missing in actions.iter().filter(|w| w.action == at.action).flat_map(|w| &w.missing) {
            waits.extend(self.ends(at, missing).into_iter().map(|next| (WaitReason::Missing(missing.clone()), next)));
        }
        if let Some(action) = *in_flight {
            waits.push((busy(action), Next::Action(RegisterReader { actor: at.actor, action })));
        }
        waits
    }

    /// A firing in flight waits for the members of its groups that have not come as far, or for its own stream.
    fn waits_in_flight(&self, at: RegisterReader, snapshot: &ActorSnapshot) -> Vec<(WaitReason, Next)> {
        let HangSnapshot { spec, collectives, knows_collectives, .. } = self.scene;
        let actor = &spec.actors[at.actor.0 as usize];
        let action = &actor.actions[at.action as usize];
        let gangs = &action.gangs;
        let is_own = |wait: &&CollectiveWait| action.groups.contains(&wait.0) && wait.1 == actor.device;
        let peers: Vec<(u32, usize)> = collectives.iter().filter(is_own).map(|wait| (wait.0, wait.2)).collect();
        let mut waits = Vec::new();
        for &group in gangs {
            let turn = self.begun(group, snapshot);
            for (member, actions) in self.members(group).into_iter().filter(|(member, _)| *member != at.actor) {
                let of_member = &spec.actors[member.0 as usize];
                let calls = |id: &u32| actions.iter().any(|a| of_member.actions[*a as usize].groups.contains(id));
                let is_waited_for = peers.iter().any(|(id, device)| *device == of_member.device && calls(id));
                let is_late = match self.snapshots.get(&member) {
                    Some(other) => self.begun(group, other) < turn,
                    None => !knows_collectives,
                };
                if !is_waited_for && !is_late {
                    continue;
                }
                // One that has begun is in flight; of the others nobody knows by which of its actions it will come.
                let flying = self.snapshots.get(&member).and_then(|other| other.waiting.in_flight);
                let next = actions.iter().filter(|action| is_late || flying.is_none_or(|flying| flying == **action));
                let next =
                    next.map(|&action| RegisterReader { actor: member, action }).filter(|at| self.is_unfinished(at));
                waits.extend(next.map(|next| (WaitReason::Gang { group, member }, self.to(next))));
            }
        }
        if waits.is_empty() {
            let is_alone = gangs.is_empty() || knows_collectives;
            let root = if is_alone { Root::Firing(at) } else { Root::Collective(at) };
            waits.push((WaitReason::Busy { action: at.action }, Next::Root(root)));
        }
        waits
    }

    /// Firings that an actor has begun of the actions that take part in a group.
    fn begun(&self, group: u32, snapshot: &ActorSnapshot) -> u64 {
        let actions = &self.scene.spec.actors[snapshot.actor.0 as usize].actions;
        let own = actions.iter().zip(&snapshot.firings).filter(|(action, _)| action.gangs.contains(&group));
        own.map(|(_, firings)| firings).sum()
    }

    /// The members of a group, each with the actions by which it takes part.
    fn members(&self, group: u32) -> Vec<(ActorId, Vec<u32>)> {
        let mut found = Vec::new();
        for (a, actor) in self.scene.spec.actors.iter().enumerate() {
            let own = actor.actions.iter().enumerate().filter(|(_, x)| x.gangs.contains(&group));
            let own: Vec<u32> = own.map(|(x, _)| x as u32).collect();
            if !own.is_empty() {
                found.push((ActorId(a as u32), own));
            }
        }
        found
    }

    /// On to an action, unless another process has it.
    fn to(&self, at: RegisterReader) -> Next {
        match (self.scene.process_of)(at.actor) {
            Some(process) => Next::Root(Root::Process { process, actor: at.actor }),
            None => Next::Action(at),
        }
    }

    /// What could end this wait of `at`.
    fn ends(&self, at: RegisterReader, missing: &Missing) -> Vec<Next> {
        match missing {
            &Missing::Piece { register, piece, writer } => {
                let known = self.snapshots.get(&writer.actor).and_then(|s| s.register(register));
                if known.is_some_and(|of| of.published > piece) {
                    return vec![Next::Root(Root::Unheard { register, piece, reader: at })];
                }
                vec![self.to(writer)]
            }
            Missing::Credit { register, holders, .. } => {
                let released = self.snapshots.get(&at.actor).and_then(|s| s.register(*register));
                let next = |reader: RegisterReader| {
                    let readers = &self.scene.spec.registers[register.0 as usize].readers;
                    let index = readers.iter().position(|r| *r == reader);
                    let told = index.zip(released).map(|(index, of)| of.released[index]);
                    match told.zip(self.released_by(*register, reader)) {
                        Some((piece, done)) if done > piece => {
                            Next::Root(Root::Unreturned { register: *register, piece, reader })
                        }
                        _ => self.to(reader),
                    }
                };
                holders.iter().map(|holder| next(holder.reader)).collect()
            }
            Missing::Token => vec![Next::Root(match self.scene.host_waits_for {
                Some(process) => Root::Process { process, actor: at.actor },
                None => Root::Token(at),
            })],
            Missing::Turn { next } => vec![Next::Action(RegisterReader { actor: at.actor, action: *next })],
        }
    }

    /// Pieces of a register that a reader has released, as it sees it.
    fn released_by(&self, register: RegisterId, reader: RegisterReader) -> Option<u64> {
        let snapshot = self.snapshots.get(&reader.actor)?;
        let action = self.scene.spec.actors[reader.actor.0 as usize].actions.get(reader.action as usize)?;
        let input = action.inputs.iter().find(|input| input.register == register)?;
        Some(snapshot.completed(reader.action) / u64::from(input.firings_per_piece))
    }
}

#[cfg(test)]
pub(crate) mod tests;
