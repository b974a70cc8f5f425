//! Combines numbers of all processes over the control tree: those of each step, of loads and of checkpoints.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, after, never, select};
use shardflow_actors::error::{Failure, PeerError};
use shardflow_job::membership::{MembershipError, MergeRule, Reduced};

use super::agreement::FIELDS_MAX;
use super::error::{SessionError, stopped};
use super::outcome::{Outcome, Outcomes, array};
use super::{BETWEEN_STEPS, QUIESCE_TIMEOUT, Session};
use crate::cluster::failure::peer_failure;
use crate::cluster::world::WAITING;

/// Interval at which a waiting process checks which process has not supplied its numbers yet.
const CHECK_EVERY: Duration = Duration::from_millis(50);

/// The occasions on which processes combine numbers. Each topic numbers its own rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Topic {
    Step = 0,
    Load = 1,
    BetweenSteps = 2,
    Finish = 3,
}

/// The combined numbers of all processes, or the channel on which they will arrive.
pub(super) enum Pending {
    /// This is the only process.
    Alone(Reduced),
    Together(Topic, Receiver<Reduced>),
}

impl Session {
    /// Supplies this process's numbers; [`Session::combined`] returns the combined numbers of all processes.
    pub(super) fn supply(
        &self,
        topic: Topic,
        rules: &Arc<[MergeRule]>,
        fields: Vec<Vec<u64>>,
    ) -> Result<Pending, Failure> {
        let Some(world) = &self.world else { return Ok(Pending::Alone(Reduced::alone(rules, fields))) };
        let results = world.membership.reduce(topic as u16, rules, fields);
        results.map(|results| Pending::Together(topic, results)).map_err(|error| match error {
            MembershipError::Ended(cause) => peer_failure(&cause),
            MembershipError::Left => stopped(),
            error => {
                let cause = PeerError::Unexpected { message: error.to_string() };
                Failure::Peer { process: self.process_map.process, cause }
            }
        })
    }

    /// Waits for the combined numbers. If they do not arrive within `limit`, the session fails.
    pub(super) fn combined(&self, pending: Pending, limit: Option<Duration>) -> Result<Reduced, Failure> {
        let combined = self.combined_within(pending, limit);
        if let (Err(failure @ Failure::Peer { .. }), Some(running)) = (&combined, &self.running) {
            running.control().fail(failure.clone());
        }
        combined
    }

    /// Like [`Session::combined`], but does not fail the session.
    pub(super) fn combined_within(&self, pending: Pending, limit: Option<Duration>) -> Result<Reduced, Failure> {
        let (topic, results) = match pending {
            Pending::Alone(reduced) => return Ok(reduced),
            Pending::Together(topic, results) => (topic, results),
        };
        let (running, world) = (self.running()?, self.world.as_ref().ok_or_else(stopped)?);
        let timeout = limit.map_or_else(never, after);
        let own = self.process_map.process;
        loop {
            let missing = world.membership.missing(topic as u16);
            let process = missing.map(|(process, _)| process).filter(|process| *process != own);
            running.host_waits_for(process);
            if let Some((process, true)) = missing {
                return Err(Failure::Peer { process, cause: PeerError::Ended });
            }
            select! {
                recv(results) -> reduced => {
                    running.host_waits_for(None);
                    return reduced.map_err(|_| stopped());
                }
                recv(running.failures()) -> failure => {
                    // A closed channel means that the session has failed. The result is its first failure.
                    return Err(failure.unwrap_or_else(|_| running.control().first_failure().unwrap_or_else(stopped)));
                }
                recv(timeout) -> _ => {
                    let seconds = limit.unwrap_or_default().as_secs();
                    return Err(Failure::Peer { process: process.unwrap_or(own), cause: PeerError::Late { seconds } });
                }
                default(CHECK_EVERY) => {}
            }
        }
    }

    /// Combines numbers between steps. Waits up to the watchdog's limit, and logs slow processes meanwhile.
    pub(super) fn combine(
        &mut self,
        topic: Topic,
        rules: &Arc<[MergeRule]>,
        fields: Vec<Vec<u64>>,
    ) -> Result<Reduced, SessionError> {
        self.try_combine(topic, rules, fields).map_err(|failure| self.fail(failure))
    }

    fn try_combine(&self, topic: Topic, rules: &Arc<[MergeRule]>, fields: Vec<Vec<u64>>) -> Result<Reduced, Failure> {
        self.set_activity(WAITING);
        let combined =
            self.supply(topic, rules, fields).and_then(|pending| self.combined(pending, Some(self.wait_max)));
        self.set_activity(BETWEEN_STEPS);
        combined
    }

    /// Supplies these words between steps. Returns the largest of the processes' word lists, compared
    /// lexicographically.
    pub(super) fn largest<const WORDS: usize>(&mut self, words: [u64; WORDS]) -> Result<[u64; WORDS], SessionError> {
        let reduced =
            self.combine(Topic::BetweenSteps, &[MergeRule::Max { words: WORDS }].into(), vec![words.to_vec()])?;
        Ok(array(&reduced, 0))
    }

    /// Supplies these words between steps, and returns the words of process 0.
    pub(super) fn of_first<const WORDS: usize>(&mut self, words: [u64; WORDS]) -> Result<[u64; WORDS], SessionError> {
        let own = if self.process_map.process == 0 { words.to_vec() } else { Vec::new() };
        let reduced = self.combine(Topic::BetweenSteps, &[MergeRule::First { words: WORDS }].into(), vec![own])?;
        Ok(array(&reduced, 0))
    }

    /// Supplies these numbers between steps, and returns the largest value of each.
    pub(super) fn largest_of_each(&self, numbers: &[u64]) -> Result<Vec<u64>, Failure> {
        let mut largest = Vec::new();
        for numbers in numbers.chunks(FIELDS_MAX) {
            let rules = numbers.iter().map(|_| MergeRule::Max { words: 1 }).collect();
            let fields = numbers.iter().map(|number| vec![*number]).collect();
            largest.extend(self.try_combine(Topic::BetweenSteps, &rules, fields)?.words.into_iter().flatten());
        }
        Ok(largest)
    }

    /// Supplies the outcome of this process's part, and returns the outcomes of all processes.
    pub(super) fn combine_outcomes(&mut self, own: Outcome) -> Result<Outcomes, SessionError> {
        let (process, processes) = (self.process_map.process, self.process_map.processes);
        let reduced = self.combine(Topic::BetweenSteps, &Outcomes::rules(), Outcomes::fields(process, own))?;
        Ok(Outcomes::new(&reduced, processes))
    }

    /// Finishes this process's work and waits for all processes, because closing a connection earlier may lose data.
    pub(super) fn finish_with_peers(&self) -> Result<(), Failure> {
        let (Some(running), Some(_)) = (&self.running, &self.world) else { return Ok(()) };
        running.quiesce(QUIESCE_TIMEOUT)?;
        let pending = self.supply(Topic::Finish, &[].into(), Vec::new())?;
        // This process has finished its work, so it ends even if a peer is late or has left.
        let _ = self.combined_within(pending, Some(QUIESCE_TIMEOUT));
        Ok(())
    }
}
