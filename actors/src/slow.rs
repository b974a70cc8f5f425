//! Whom a process waits for while nothing else is to be done in it, and who deserves to be named for it. Pure: samples come
//! in at even intervals.

use std::collections::{BTreeMap, VecDeque};

use crate::hang::CollectiveWait;
use crate::protocol::Missing;
use crate::snapshot::ActorSnapshot;
use crate::spec::{ActorId, RegisterReader, Spec};

/// Samples that are looked back on.
const WINDOW: usize = 10;
/// Of them, so many must find a process waited for, for it to be named. A pipeline's bubbles keep a process waiting too,
/// for less of the time unless it has many stages and few micro-batches.
const WAITS_MIN: usize = 8;
/// Samples after which a process that stays slow is named again.
const AGAIN: u64 = 60;

/// What a process is waited for, by its number.
pub(crate) type Sample = BTreeMap<u32, String>;

/// The other processes that this one waits for now; none while any stream of it works. `process_of` an actor gives the
/// other process that hosts it.
pub(crate) fn sample(
    spec: &Spec,
    snapshots: &[ActorSnapshot],
    collectives: &[CollectiveWait],
    process_of: impl Fn(ActorId) -> Option<u32>,
) -> Sample {
    let host = |rank: usize| spec.actors.iter().position(|a| a.device == rank).map(|a| ActorId(a as u32));
    let mut sample = Sample::new();
    for snapshot in snapshots {
        let actor = &spec.actors[snapshot.actor.0 as usize];
        if let Some(action) = snapshot.waiting.in_flight {
            let groups = &actor.actions[action as usize].groups;
            let is_its = |wait: &&CollectiveWait| wait.1 == actor.device && groups.contains(&wait.0);
            let peers: Vec<usize> = collectives.iter().filter(is_its).map(|wait| wait.2).collect();
            if peers.is_empty() {
                return Sample::new();
            }
            let name = spec.action_name(snapshot.actor, action);
            for process in peers.into_iter().filter_map(host).filter_map(&process_of) {
                sample.entry(process).or_insert_with(|| format!("a collective of {name}"));
            }
        }
        let waits = snapshot.waiting.actions.iter().filter(|_| snapshot.waiting.in_flight.is_none());
        // Nothing is late for an action that the host has not asked for.
        for waits in waits.filter(|waits| !waits.missing.contains(&Missing::Token)) {
            for missing in &waits.missing {
                for process in actors(missing).into_iter().filter_map(&process_of) {
                    sample.entry(process).or_insert_with(|| missing.describe(spec, snapshot.actor));
                }
            }
        }
    }
    sample
}

/// Who could end this wait.
fn actors(missing: &Missing) -> Vec<ActorId> {
    let of = |reader: &RegisterReader| reader.actor;
    match missing {
        Missing::Piece { writer, .. } => vec![of(writer)],
        Missing::Credit { holders, .. } => holders.iter().map(|h| h.reader.actor).collect(),
        Missing::Token | Missing::Turn { .. } => Vec::new(),
    }
}

/// A process that is waited for most of the time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slow {
    pub(crate) process: u32,
    /// Of [`Slow::of`] samples so many found this process waiting for it.
    pub(crate) waits: usize,
    pub(crate) of: usize,
    /// What for, at last.
    pub(crate) what: String,
}

/// Looks back on the last samples.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    window: VecDeque<Sample>,
    count: u64,
    /// When a process was last named.
    named: BTreeMap<u32, u64>,
}

impl Tally {
    /// Takes a sample in; gives those to be named now.
    pub(crate) fn add(&mut self, sample: Sample) -> Vec<Slow> {
        self.count += 1;
        if self.window.len() == WINDOW {
            self.window.pop_front();
        }
        let last: Vec<(u32, String)> = sample.iter().map(|(p, what)| (*p, what.clone())).collect();
        self.window.push_back(sample);
        let mut slow = Vec::new();
        for (process, what) in last {
            let waits = self.window.iter().filter(|s| s.contains_key(&process)).count();
            let rested = self.named.get(&process).is_none_or(|named| self.count - named >= AGAIN);
            if waits >= WAITS_MIN && rested {
                self.named.insert(process, self.count);
                slow.push(Slow { process, waits, of: self.window.len(), what });
            }
        }
        slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{ActionWaits, ActorWaits};
    use crate::simulate::plans;
    use crate::spec::RegisterId;

    fn waits_for(process: u32) -> Sample {
        Sample::from([(process, "a piece".to_string())])
    }

    #[test]
    fn who_is_waited_for_most_of_the_time_is_named_and_not_again_at_once() {
        let mut tally = Tally::default();
        let named: Vec<usize> = (0..70).filter(|_| !tally.add(waits_for(1)).is_empty()).collect();
        assert_eq!(named, [WAITS_MIN - 1, WAITS_MIN - 1 + AGAIN as usize]);
        let mut tally = Tally::default();
        // Two of three samples: a pipeline's bubble.
        assert!((0..70).all(|n| tally.add(if n % 3 == 0 { Sample::new() } else { waits_for(1) }).is_empty()));
    }

    #[test]
    fn a_process_waits_when_none_of_its_streams_works() {
        let spec = plans::data_parallel();
        let reader = RegisterReader { actor: ActorId(1), action: 0 };
        let missing = Missing::Piece { register: RegisterId(0), piece: 3, writer: reader };
        let snapshot = |in_flight, missing: Vec<Missing>| ActorSnapshot {
            actor: ActorId(0),
            firings: vec![],
            busy_ns: vec![],
            collective_ns: 0,
            waiting: ActorWaits { actor: ActorId(0), in_flight, actions: vec![ActionWaits { action: 0, missing }] },
            idle: Default::default(),
            idle_now_ns: 0,
            flying_since_ns: None,
            registers: vec![],
        };
        let elsewhere = |actor: ActorId| (actor == ActorId(1)).then_some(7);
        let found =
            |snapshot: ActorSnapshot| sample(&spec, &[snapshot], &[], elsewhere).into_keys().collect::<Vec<_>>();
        assert_eq!(found(snapshot(None, vec![missing.clone()])), [7]);
        assert_eq!(found(snapshot(Some(0), vec![missing.clone()])), [0; 0], "it works");
        assert_eq!(found(snapshot(None, vec![missing, Missing::Token])), [0; 0], "it was asked for nothing");
    }
}
