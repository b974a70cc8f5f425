//! Why a plan got stuck: the cycle of actions that wait for each other. Imports `protocol::waiting` and `spec`.

use std::collections::HashSet;
use std::fmt;

use super::Gangs;
use crate::protocol::{Missing, Protocol};
use crate::spec::{ActorId, Reader, Spec};

/// A plan that cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// Each waits for the next, and the last for the first; empty when `chain` ends at a token that the host did not give.
    pub cycle: Vec<Link>,
    /// Where there is no cycle: from an action that has not fired enough to what it waits for in the end.
    pub chain: Vec<Link>,
    text: String,
}

/// One action that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Who waits.
    pub action: Reader,
    /// For what.
    pub wait: Wait,
}

/// What an action waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Something of the protocol.
    Missing(Missing),
    /// In flight: another member of a group has not begun.
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

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Wait {
    fn describe(&self, spec: &Spec, actor: ActorId) -> String {
        match self {
            Wait::Missing(missing) => missing.describe(spec, actor),
            Wait::Gang { group, member } => {
                format!("{} to join group {group}", spec.actors[member.0 as usize].name)
            }
            Wait::Busy { action } => format!("{}, which is in flight", spec.action_name(actor, *action)),
        }
    }
}

/// Finds a cycle among the actions that have firings left.
pub(super) fn explain(spec: &Spec, protocols: &[Protocol], gangs: &Gangs, steps: u32) -> Stuck {
    let search = Search { spec, protocols, gangs };
    let mut seen = HashSet::new();
    let mut chain = Vec::new();
    for (a, actor) in spec.actors.iter().enumerate() {
        for (x, action) in actor.actions.iter().enumerate() {
            let all = u64::from(action.per_step) * u64::from(steps);
            if protocols[a].completed(x as u32) == all {
                continue;
            }
            let at = Reader { actor: ActorId(a as u32), action: x as u32 };
            if let Some(cycle) = search.cycle(at, &mut seen) {
                let text = format!("deadlock: {}; which closes the cycle", sentences(spec, &cycle));
                return Stuck { cycle, chain: Vec::new(), text };
            }
            if chain.is_empty() {
                chain = search.walk(at);
            }
        }
    }
    let text = format!("starved: {}", sentences(spec, &chain));
    Stuck { cycle: Vec::new(), chain, text }
}

fn sentences(spec: &Spec, links: &[Link]) -> String {
    let sentence = |link: &Link| {
        let name = spec.action_name(link.action.actor, link.action.action);
        format!("{name} waits for {}", link.wait.describe(spec, link.action.actor))
    };
    links.iter().map(sentence).collect::<Vec<_>>().join("; ")
}

struct Search<'a> {
    spec: &'a Spec,
    protocols: &'a [Protocol],
    gangs: &'a Gangs,
}

impl Search<'_> {
    /// Depth-first from an action; none is visited twice over all calls that share `seen`.
    fn cycle(&self, at: Reader, seen: &mut HashSet<Reader>) -> Option<Vec<Link>> {
        // The path from `at`: each action, and the waits that are left to follow.
        let mut path: Vec<(Link, std::vec::IntoIter<(Wait, Reader)>)> = Vec::new();
        let mut next = seen.insert(at).then_some(at);
        loop {
            if let Some(action) = next.take() {
                // Overwritten with each wait that is followed.
                let wait = Wait::Missing(Missing::Token);
                path.push((Link { action, wait }, self.steps(action).into_iter()));
            }
            let (link, left) = path.last_mut()?;
            let Some((wait, to)) = left.next() else {
                path.pop();
                continue;
            };
            link.wait = wait;
            if let Some(start) = path.iter().position(|p| p.0.action == to) {
                return Some(path.drain(start..).map(|p| p.0).collect());
            }
            next = seen.insert(to).then_some(to);
        }
    }

    /// All waits of an action, one for each action that could end it.
    fn steps(&self, at: Reader) -> Vec<(Wait, Reader)> {
        let each = |(wait, next): (Wait, Vec<Reader>)| next.into_iter().map(move |n| (wait.clone(), n));
        self.waits(at).into_iter().flat_map(each).collect()
    }

    /// From an action to what it waits for in the end, where there is no cycle; so no action comes twice.
    fn walk(&self, mut at: Reader) -> Vec<Link> {
        let mut links = Vec::new();
        while let Some((wait, next)) = self.waits(at).into_iter().next() {
            links.push(Link { action: at, wait });
            let Some(&next) = next.first() else { break };
            at = next;
        }
        links
    }

    /// All that an action waits for, each with the actions that could end it.
    fn waits(&self, at: Reader) -> Vec<(Wait, Vec<Reader>)> {
        let protocol = &self.protocols[at.actor.0 as usize];
        let own = |action| Reader { actor: at.actor, action };
        if protocol.in_flight() == Some(at.action) {
            let absent = self.gangs.absent(at.actor).into_iter();
            return absent.map(|(group, member)| (Wait::Gang { group, member }, self.members(group, member))).collect();
        }
        let waiting = protocol.waiting();
        let mut waits: Vec<_> = (waiting.actions.into_iter().filter(|w| w.action == at.action))
            .flat_map(|w| w.missing)
            .map(|missing| {
                let next = match &missing {
                    Missing::Piece { writer, .. } => vec![*writer],
                    Missing::Credit { holders, .. } => holders.iter().map(|h| h.reader).collect(),
                    Missing::Token => Vec::new(),
                    Missing::Turn { next } => vec![own(*next)],
                };
                (Wait::Missing(missing), next)
            })
            .collect();
        if let Some(action) = protocol.in_flight() {
            waits.push((Wait::Busy { action }, vec![own(action)]));
        }
        waits
    }

    /// The actions by which a member takes part in a group.
    fn members(&self, group: u32, member: ActorId) -> Vec<Reader> {
        let actions = self.spec.actors[member.0 as usize].actions.iter().enumerate();
        let takes_part = actions.filter(|(_, x)| x.gangs.contains(&group));
        takes_part.map(|(x, _)| Reader { actor: member, action: x as u32 }).collect()
    }
}
