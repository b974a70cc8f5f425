//! Detects peers that this process waits for most of the time. The caller adds samples at even intervals.

use std::collections::{BTreeMap, VecDeque};

use crate::hang::CollectiveWait;
use crate::protocol::Missing;
use crate::snapshot::ActorSnapshot;
use crate::spec::{ActorId, Spec};

/// Number of most recent samples that [`Tally`] considers.
const WINDOW: usize = 10;
/// A process is reported if at least this number of samples show a wait for it. A pipeline's bubbles cause fewer such
/// samples, except with many stages and few micro-batches.
const WAITS_MIN: usize = 8;
/// Number of samples between reports of a process that stays slow.
const REPEAT_AFTER: u64 = 60;

/// What this process waits for, by the number of the awaited process.
pub(crate) type Sample = BTreeMap<u32, String>;

/// Returns the other processes that this process waits for. Empty while any stream of this process works.
pub(crate) fn sample(
    spec: &Spec,
    snapshots: &[ActorSnapshot],
    collectives: &[CollectiveWait],
    process_of: impl Fn(ActorId) -> Option<u32>,
    process_of_device: impl Fn(usize) -> Option<u32>,
) -> Sample {
    let mut sample = Sample::new();
    for snapshot in snapshots {
        let actor = spec.actor(snapshot.actor);
        if let Some(action) = snapshot.waiting.in_flight {
            let own = &actor.actions[action as usize].communicators;
            let is_own = |wait: &&CollectiveWait| wait.1 == actor.device && own.contains(&wait.0);
            let peers: Vec<usize> = collectives.iter().filter(is_own).map(|wait| wait.2).collect();
            if peers.is_empty() {
                return Sample::new();
            }
            let name = spec.action_name(snapshot.actor, action);
            for process in peers.into_iter().filter_map(&process_of_device) {
                sample.entry(process).or_insert_with(|| format!("a collective of {name}"));
            }
        }
        let waits = snapshot.waiting.actions.iter().filter(|_| snapshot.waiting.in_flight.is_none());
        // An action without a token waits for the host, not for other processes.
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

/// The actors that could end this wait.
fn actors(missing: &Missing) -> Vec<ActorId> {
    match missing {
        Missing::Piece { writer, .. } => vec![writer.actor],
        Missing::Credit { holders, .. } => holders.iter().map(|h| h.reader.actor).collect(),
        Missing::Token | Missing::Turn { .. } => Vec::new(),
    }
}

#[derive(Debug, Default)]
pub(crate) struct Tally {
    window: VecDeque<Sample>,
    count: u64,
    /// For each process: the sample at which it was last reported.
    reported: BTreeMap<u32, u64>,
}

impl Tally {
    /// Adds a sample. Reports each process awaited in at least [`WAITS_MIN`] samples, once per [`REPEAT_AFTER`].
    pub(crate) fn add(&mut self, sample: Sample) -> Vec<String> {
        self.count += 1;
        if self.window.len() == WINDOW {
            self.window.pop_front();
        }
        let last: Vec<(u32, String)> = sample.iter().map(|(p, reason)| (*p, reason.clone())).collect();
        self.window.push_back(sample);
        let mut slow = Vec::new();
        for (process, reason) in last {
            let waits = self.window.iter().filter(|s| s.contains_key(&process)).count();
            let is_due = self.reported.get(&process).is_none_or(|reported| self.count - reported >= REPEAT_AFTER);
            if waits >= WAITS_MIN && is_due {
                self.reported.insert(process, self.count);
                let of = self.window.len();
                let times = format!("{waits} of the last {of} checks");
                slow.push(format!("waiting for rank {process} in {times}; the latest wait is for {reason}"));
            }
        }
        slow
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::protocol::{ActionWaits, ActorWaits, Protocol};
    use crate::simulate::plans;
    use crate::spec::{ActionRef, RegisterId};

    fn waits_for(process: u32) -> Sample {
        Sample::from([(process, "a piece".to_string())])
    }

    #[test]
    fn a_slow_process_is_reported_once_per_interval() {
        let mut tally = Tally::default();
        let reported: Vec<usize> = (0..70).filter(|_| !tally.add(waits_for(1)).is_empty()).collect();
        assert_eq!(reported, [WAITS_MIN - 1, WAITS_MIN - 1 + REPEAT_AFTER as usize]);
        let mut tally = Tally::default();
        // Two of three samples show a wait, as in a pipeline's bubbles.
        assert!((0..70).all(|n| tally.add(if n % 3 == 0 { Sample::new() } else { waits_for(1) }).is_empty()));
    }

    #[test]
    fn a_process_waits_only_while_none_of_its_streams_works() {
        let spec = Arc::new(plans::data_parallel());
        let reader = ActionRef { actor: ActorId(1), action: 0 };
        let missing = Missing::Piece { register: RegisterId(0), piece: 3, writer: reader };
        let snapshot = |in_flight, missing: Vec<Missing>| ActorSnapshot {
            waiting: ActorWaits { actor: ActorId(0), in_flight, actions: vec![ActionWaits { action: 0, missing }] },
            ..ActorSnapshot::of(&Protocol::new(&spec, ActorId(0)))
        };
        let elsewhere = |actor: ActorId| (actor == ActorId(1)).then_some(7);
        let found = |snapshot: ActorSnapshot| {
            sample(&spec, &[snapshot], &[], elsewhere, |_| None).into_keys().collect::<Vec<_>>()
        };
        assert_eq!(found(snapshot(None, vec![missing.clone()])), [7]);
        assert_eq!(found(snapshot(Some(0), vec![missing.clone()])), [0; 0], "a stream works");
        assert_eq!(found(snapshot(None, vec![missing, Missing::Token])), [0; 0], "the action has no token");
    }
}
