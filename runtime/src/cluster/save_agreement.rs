//! The agreement of a session's processes on their checkpoints: what they tell each other over the control plane, from the
//! saver's thread, while steps go on.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use serde::{Deserialize, Serialize};
use shardflow_actors::membership::Membership;

use crate::checkpoint::{AgreeError, SaveAgreement, SaveId, SaveOutcome};

/// Topic of these messages on the control plane.
pub(super) const TOPIC: u16 = 1;

/// How long the slowest process may take to write its part after the first one, if the watchdog allows no longer waits.
const WITHIN: Duration = Duration::from_secs(600);

/// Messages of other saves that are kept until their turn comes. Saves come one after the other, so a peer is at most one
/// ahead.
const EARLY_MAX: usize = 1 << 14;

/// Characters of a reason that are told.
const WHY_CHARS_MAX: usize = 1000;

/// A message of a peer.
pub(super) struct Received {
    pub(super) from: u32,
    pub(super) bytes: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Phase {
    /// To process 0: how writing went here.
    Written,
    /// From process 0: how it went everywhere.
    AllWritten,
    /// From process 0: what became of the commit.
    Outcome,
}

/// A message.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Payload {
    epoch: u64,
    step: u64,
    attempt: u32,
    phase: Phase,
    result: How,
}

/// Of a phase of a save, by a process.
type Key = (u64, u64, u32, Phase, u32);

/// How a phase went: `true` where a commit found the step committed already; or which process failed, and why.
type How = Result<bool, (u32, String)>;

/// The agreement of the processes of a session.
pub(super) struct ClusterAgreement {
    process: u32,
    processes: u32,
    membership: Arc<Membership>,
    heard: Receiver<Received>,
    within: Duration,
    /// What came before it was waited for.
    early: Mutex<BTreeMap<Key, How>>,
}

impl ClusterAgreement {
    pub(super) fn new(
        process: u32,
        processes: u32,
        membership: Arc<Membership>,
        heard: Receiver<Received>,
        wait_max: Duration,
    ) -> Self {
        Self { process, processes, membership, heard, within: wait_max.max(WITHIN), early: Mutex::default() }
    }

    fn error(&self, process: u32, why: impl ToString) -> AgreeError {
        AgreeError { process: Some(process), why: why.to_string() }
    }

    fn said(save: SaveId, phase: Phase, result: How) -> Vec<u8> {
        let short = |why: String| why.chars().take(WHY_CHARS_MAX).collect();
        let result = result.map_err(|(process, why)| (process, short(why)));
        let said = Payload { epoch: save.epoch, step: save.step, attempt: save.attempt, phase, result };
        // Plain data; were it not to encode, the peer would run into its deadline.
        serde_json::to_vec(&said).unwrap_or_default()
    }

    /// What a peer says of this phase of this save.
    fn wait(&self, save: SaveId, phase: Phase, from: u32, deadline: Instant) -> Result<How, AgreeError> {
        let key = (save.epoch, save.step, save.attempt, phase, from);
        loop {
            let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(result) = early.remove(&key) {
                return Ok(result);
            }
            drop(early);
            let heard = self.heard.recv_deadline(deadline).map_err(|e| {
                let cause = self.membership.first_cause().map(|first| first.to_string());
                self.error(from, cause.unwrap_or_else(|| format!("said nothing of its part: {e}")))
            })?;
            let said: Payload =
                serde_json::from_slice(&heard.bytes).map_err(|e| self.error(heard.from, format!("garbled: {e}")))?;
            let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
            if early.len() >= EARLY_MAX {
                return Err(self.error(heard.from, "says more than it can mean"));
            }
            early.insert((said.epoch, said.step, said.attempt, said.phase, heard.from), said.result);
        }
    }

    fn tell_all(&self, bytes: &[u8]) -> Result<(), AgreeError> {
        self.membership.send_to_all(TOPIC, bytes).map_err(|e| self.error(self.process, e))
    }
}

impl SaveAgreement for ClusterAgreement {
    fn all_written(&self, save: SaveId, mine: Result<(), String>) -> Result<(), AgreeError> {
        let deadline = Instant::now() + self.within;
        let mine = mine.map(|()| false).map_err(|why| (self.process, why));
        if self.process != 0 {
            let bytes = Self::said(save, Phase::Written, mine);
            self.membership.send(0, TOPIC, bytes).map_err(|e| self.error(0, e))?;
            let all = self.wait(save, Phase::AllWritten, 0, deadline)?;
            return all.map(drop).map_err(|(process, why)| self.error(process, why));
        }
        let mut all = mine;
        for peer in 1..self.processes {
            // All are heard out, so that nothing of this save is left over.
            let theirs = self.wait(save, Phase::Written, peer, deadline)?;
            all = all.and(theirs);
        }
        self.tell_all(&Self::said(save, Phase::AllWritten, all.clone()))?;
        all.map(drop).map_err(|(process, why)| self.error(process, why))
    }

    fn outcome(&self, save: SaveId, decided: Option<Result<SaveOutcome, String>>) -> Result<SaveOutcome, AgreeError> {
        let result = match decided {
            Some(decided) => {
                let result = decided.map(|saved| saved == SaveOutcome::AlreadyThere).map_err(|why| (0, why));
                self.tell_all(&Self::said(save, Phase::Outcome, result.clone()))?;
                result
            }
            None => self.wait(save, Phase::Outcome, 0, Instant::now() + self.within)?,
        };
        let already = result.map_err(|(process, why)| self.error(process, why))?;
        Ok(if already { SaveOutcome::AlreadyThere } else { SaveOutcome::Committed })
    }
}
