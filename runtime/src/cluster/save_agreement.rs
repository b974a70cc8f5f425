//! Agreement of a session's processes on checkpoints over the control plane. The saver's thread runs it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use shardflow_job::membership::Membership;

use crate::checkpoint::agreement::{SaveAgreement, SaveId, SaveOutcome};
use crate::checkpoint::error::AgreeError;
use crate::process_map::ProcessMap;

pub(super) const TOPIC: u16 = 1;

/// Timeout of a wait for another process's report, unless the watchdog allows more time.
const WAIT_MIN: Duration = Duration::from_secs(600);

/// Maximum number of early messages that are kept. Saves run one after the other, so a peer is at most one save ahead.
const EARLY_MAX: usize = 1 << 14;

const REASON_CHARS_MAX: usize = 1000;

pub(super) struct Received {
    pub(super) from: u32,
    pub(super) bytes: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Phase {
    /// To process 0: the result of writing this process's part.
    Written,
    /// From process 0: the result of writing all parts.
    AllWritten,
    /// From process 0: the result of the commit.
    Outcome,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Payload {
    #[serde(flatten)]
    save: SaveId,
    phase: Phase,
    result: PhaseResult,
}

/// Result of a phase: `true` if the step was already committed. The error is the failed process and the reason.
type PhaseResult = Result<bool, (u32, String)>;

pub(super) struct ClusterAgreement {
    process_map: ProcessMap,
    membership: Arc<Membership>,
    messages: Receiver<Received>,
    timeout: Duration,
    /// By save, phase and sender: the results that arrived before this process waited for them.
    early: Mutex<BTreeMap<(SaveId, Phase, u32), PhaseResult>>,
}

impl ClusterAgreement {
    pub(super) fn new(
        process_map: ProcessMap,
        membership: Arc<Membership>,
        messages: Receiver<Received>,
        wait_max: Duration,
    ) -> Self {
        Self { process_map, membership, messages, timeout: wait_max.max(WAIT_MIN), early: Mutex::default() }
    }

    fn error(&self, process: u32, why: impl ToString) -> AgreeError {
        AgreeError { process: Some(process), why: why.to_string() }
    }

    fn encode(save: SaveId, phase: Phase, result: PhaseResult) -> Vec<u8> {
        let truncate = |reason: String| reason.chars().take(REASON_CHARS_MAX).collect();
        let result = result.map_err(|(process, reason)| (process, truncate(reason)));
        let payload = Payload { save, phase, result };
        // Encoding plain data does not fail. If it did, the peer would reject the empty message.
        serde_json::to_vec(&payload).unwrap_or_default()
    }

    fn wait(&self, save: SaveId, phase: Phase, from: u32, deadline: Instant) -> Result<PhaseResult, AgreeError> {
        loop {
            if let Some(result) = self.early.lock().remove(&(save, phase, from)) {
                return Ok(result);
            }
            let message = self.messages.recv_deadline(deadline).map_err(|e| {
                let cause = self.membership.first_cause().map(|first| first.to_string());
                self.error(from, cause.unwrap_or_else(|| format!("did not report the result of its part: {e}")))
            })?;
            let Received { from: sender, bytes } = message;
            let payload: Payload = serde_json::from_slice(&bytes)
                .map_err(|e| self.error(sender, format!("sent an invalid message: {e}")))?;
            let mut early = self.early.lock();
            if early.len() >= EARLY_MAX {
                return Err(self.error(sender, format!("sent a report, but only {EARLY_MAX} unread reports are kept")));
            }
            early.insert((payload.save, payload.phase, sender), payload.result);
        }
    }

    fn send_to_all(&self, bytes: &[u8]) -> Result<(), AgreeError> {
        self.membership.send_to_all(TOPIC, bytes).map_err(|e| self.error(self.process_map.process, e))
    }
}

impl SaveAgreement for ClusterAgreement {
    fn all_written(&self, save: SaveId, own: Result<(), String>) -> Result<(), AgreeError> {
        let deadline = Instant::now() + self.timeout;
        let mut all = own.map(|()| false).map_err(|why| (self.process_map.process, why));
        if self.process_map.process == 0 {
            for peer in self.process_map.peers() {
                // Receives every result even after a failure, so that no message of this save is left over.
                let result = self.wait(save, Phase::Written, peer, deadline)?;
                all = all.and(result);
            }
            self.send_to_all(&Self::encode(save, Phase::AllWritten, all.clone()))?;
        } else {
            let bytes = Self::encode(save, Phase::Written, all);
            self.membership.send(0, TOPIC, bytes).map_err(|e| self.error(0, e))?;
            all = self.wait(save, Phase::AllWritten, 0, deadline)?;
        }
        all.map(drop).map_err(|(process, why)| self.error(process, why))
    }

    fn outcome(&self, save: SaveId, decided: Option<Result<SaveOutcome, String>>) -> Result<SaveOutcome, AgreeError> {
        let result = match decided {
            Some(decided) => {
                let result = decided.map(|saved| saved == SaveOutcome::AlreadyThere).map_err(|why| (0, why));
                self.send_to_all(&Self::encode(save, Phase::Outcome, result.clone()))?;
                result
            }
            None => self.wait(save, Phase::Outcome, 0, Instant::now() + self.timeout)?,
        };
        let is_already_there = result.map_err(|(process, why)| self.error(process, why))?;
        Ok(if is_already_there { SaveOutcome::AlreadyThere } else { SaveOutcome::Committed })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SAMPLE: &[u8] = br#"{"epoch":1,"step":2,"attempt":0,"phase":"Written","result":{"Err":[1,"a full disk"]}}"#;

    proptest! {
        /// A changed message is either rejected or decoded to a payload that survives encoding and decoding.
        #[test]
        fn changed_messages_are_decoded_or_rejected(
            at in 0..SAMPLE.len(), bytes in prop::collection::vec(any::<u8>(), 0..8),
        ) {
            let mut changed = SAMPLE.to_vec();
            changed.splice(at..(at + bytes.len()).min(SAMPLE.len()), bytes);
            if let Ok(payload) = serde_json::from_slice::<Payload>(&changed) {
                let again: Payload = serde_json::from_slice(&serde_json::to_vec(&payload).unwrap()).unwrap();
                prop_assert_eq!(again, payload);
            }
        }
    }
}
