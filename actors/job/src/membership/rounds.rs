//! Rounds that combine numbers of all processes. The numbers travel up the control tree to process 0, and the result
//! travels down. Each topic has its own rounds. This module is pure.
//!
//! - **GR-1**: a topic's rounds run one after another. A child sends the numbers of a round only after it has received
//!   the result of the previous round. So a process keeps at most one message per child and topic.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::control_message::{Body, ControlMessage};
use super::reduce::{MergeRule, Partial, Reduced};
use super::tree::ControlTree;

/// How long a round waits before processes report to each other which process is missing.
const NAME_AFTER: Duration = Duration::from_millis(200);
/// Maximum number of topics with rounds, so that a peer cannot use up memory.
pub(crate) const TOPICS_MAX: u16 = 64;

/// One process's rounds, by topic.
#[derive(Debug)]
pub(crate) struct Rounds {
    own: u32,
    tree: Arc<ControlTree>,
    children: Vec<u32>,
    topics: BTreeMap<u16, Topic>,
}

/// The numbers that this process supplies to a round, and their rules.
type Supplied = (Arc<[MergeRule]>, Vec<Vec<u64>>);

#[derive(Debug, Default)]
struct Topic {
    /// Numbers that this process has supplied to rounds that are not combined yet.
    own: VecDeque<Supplied>,
    /// For each child: the numbers of its subtree for the next round.
    below: BTreeMap<u32, Partial>,
    /// Rules of the round that was sent to the parent and still waits for its result.
    sent_rules: Option<Arc<[MergeRule]>>,
    /// Number of rounds combined here, and number of results received.
    combined: u64,
    received: u64,
    /// When the current round's first numbers arrived or, once the round is combined here, when this was done. `None`
    /// between rounds.
    since: Option<Duration>,
    /// For each neighbour: the process that the neighbour waits for in the current round.
    named: BTreeMap<u32, u32>,
    /// For each neighbour: the missing process last reported to that neighbour in the current round.
    reported: BTreeMap<u32, u32>,
}

/// What a process must do after its rounds have changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum RoundEffect {
    Send {
        to: u32,
        message: ControlMessage,
    },
    /// The result of a round.
    Reduced {
        topic: u16,
        reduced: Reduced,
    },
}

/// A message that no process with the same program sends.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unexpected;

type Effects = Result<Vec<RoundEffect>, Unexpected>;

impl Rounds {
    pub(crate) fn new(own: u32, tree: Arc<ControlTree>) -> Self {
        let children = tree.children(own);
        Self { own, tree, children, topics: BTreeMap::new() }
    }

    /// Supplies this process's numbers to the topic's next round.
    pub(crate) fn supply(&mut self, topic: u16, supplied: Supplied, now: Duration) -> Effects {
        let state = self.topics.entry(topic).or_default();
        state.own.push_back(supplied);
        state.since.get_or_insert(now);
        self.advance(topic, now)
    }

    /// Handles the numbers of a child's subtree, or a result from the parent.
    pub(crate) fn receive(&mut self, by: u32, (topic, round): (u16, u64), bytes: &[u8], now: Duration) -> Effects {
        if topic >= TOPICS_MAX {
            return Err(Unexpected);
        }
        let state = self.topics.entry(topic).or_default();
        if self.children.contains(&by) {
            // GR-1: a child supplies the next round only after this process has passed on the last result.
            let expected = state.combined;
            if round != expected || state.below.contains_key(&by) || state.received != state.combined {
                return Err(Unexpected);
            }
            let partial = Partial::read(bytes).ok_or(Unexpected)?;
            state.below.insert(by, partial);
            state.since.get_or_insert(now);
            return self.advance(topic, now);
        }
        if round != state.received || state.combined != round + 1 {
            return Err(Unexpected);
        }
        let rules = state.sent_rules.take().ok_or(Unexpected)?;
        let reduced = Reduced::read(bytes, &rules).ok_or(Unexpected)?;
        Ok(self.finish(topic, reduced, bytes, now))
    }

    /// Combines the round if this process and all children have supplied their numbers.
    fn advance(&mut self, topic: u16, now: Duration) -> Effects {
        let Some(state) = self.topics.get_mut(&topic) else { return Ok(Vec::new()) };
        if state.own.is_empty() || state.below.len() < self.children.len() || state.combined != state.received {
            return Ok(Vec::new());
        }
        let Some((rules, fields)) = state.own.pop_front() else { return Ok(Vec::new()) };
        let below: Vec<(u32, Partial)> = std::mem::take(&mut state.below).into_iter().collect();
        if !below.iter().all(|(child, partial)| partial.is_valid(&rules, &self.tree, *child)) {
            return Err(Unexpected);
        }
        let round = state.combined;
        let combined = Partial::new(&rules, &fields).combine(&rules, &self.tree, self.own, below);
        (state.combined, state.since) = (round + 1, Some(now));
        let Some(parent) = self.tree.parent(self.own) else {
            let bytes = combined.total(&rules, &fields);
            let reduced = Reduced::read(&bytes, &rules).ok_or(Unexpected)?;
            return Ok(self.finish(topic, reduced, &bytes, now));
        };
        state.sent_rules = Some(rules);
        let message = ControlMessage { body: Body::Round { topic, round }, payload: combined.write() };
        Ok(vec![RoundEffect::Send { to: parent, message }])
    }

    /// Ends a round: passes the result to the children and to this process.
    fn finish(&mut self, topic: u16, reduced: Reduced, bytes: &[u8], now: Duration) -> Vec<RoundEffect> {
        let Some(state) = self.topics.get_mut(&topic) else { return Vec::new() };
        let round = state.received;
        state.received += 1;
        state.since = (!state.own.is_empty()).then_some(now);
        state.named.clear();
        state.reported.clear();
        let message = ControlMessage { body: Body::Round { topic, round }, payload: bytes.to_vec() };
        let down = self.children.iter().map(|child| RoundEffect::Send { to: *child, message: message.clone() });
        down.chain([RoundEffect::Reduced { topic, reduced }]).collect()
    }

    /// Records which process a neighbour waits for.
    pub(crate) fn receive_name(&mut self, by: u32, (topic, round): (u16, u64), process: u32) {
        if let Some(state) = self.topics.get_mut(&topic).filter(|state| state.received == round) {
            state.named.insert(by, process);
        }
    }

    /// The process whose numbers are missing in the topic's round, as far as this process knows.
    pub(crate) fn missing(&self, topic: u16) -> Option<u32> {
        let state = self.topics.get(&topic)?;
        let named = |neighbour: u32| state.named.get(&neighbour).copied().unwrap_or(neighbour);
        if state.combined > state.received {
            return self.tree.parent(self.own).map(named);
        }
        let absent = |child: &&u32| !state.below.contains_key(child);
        match (state.own.is_empty(), state.below.is_empty()) {
            (true, true) => None,
            (true, false) => Some(self.own),
            (false, _) => self.children.iter().find(absent).map(|child| named(*child)),
        }
    }

    /// For each round that has waited for [`NAME_AFTER`], returns messages that name the missing process to the
    /// neighbours that also wait. A neighbour that gets no such message assumes that this process is the missing one.
    pub(crate) fn tick(&mut self, now: Duration) -> Vec<RoundEffect> {
        let mut effects = Vec::new();
        let topics: Vec<u16> = self.topics.keys().copied().collect();
        for topic in topics {
            let missing = self.missing(topic);
            let Some(state) = self.topics.get_mut(&topic) else { continue };
            let waits = state.since.is_some_and(|since| now.saturating_sub(since) >= NAME_AFTER);
            let Some(process) = missing.filter(|_| waits) else { continue };
            let is_combined = state.combined > state.received;
            // A child waits once it has sent its numbers. The parent waits until this process has combined its subtree.
            let below = self.children.iter().filter(|child| is_combined || state.below.contains_key(child));
            let above = self.tree.parent(self.own).filter(|_| !is_combined);
            let waiting: BTreeSet<u32> = below.copied().chain(above).collect();
            for to in waiting {
                if state.reported.get(&to).copied().unwrap_or(self.own) != process {
                    state.reported.insert(to, process);
                    let body = Body::Missing { topic, round: state.received, process };
                    effects.push(RoundEffect::Send { to, message: body.into() });
                }
            }
        }
        effects
    }
}
