//! What every engine records: whether it was aborted, which members wait, and how many bytes arrived.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::collective::call::{CollectiveCall, Group};
use crate::error::{KernelError, Result};
use crate::tensor::DType;

/// Number of bytes that each device has received from other devices, by rank.
#[derive(Debug, Default)]
pub(crate) struct ReceivedBytes(Mutex<HashMap<usize, u64>>);

impl ReceivedBytes {
    /// Counts the bytes that a finished call received. `y_shape` is the shape of the member's y.
    pub(crate) fn count(&self, call: &CollectiveCall, y_shape: &[usize], dtype: DType) {
        let bytes = call.foreign_elements(y_shape) * dtype.bytes();
        *self.0.lock().entry(call.group.ranks[call.member]).or_default() += bytes as u64;
    }

    pub(crate) fn of(&self, rank: usize) -> u64 {
        self.0.lock().get(&rank).copied().unwrap_or(0)
    }
}

/// Whether an engine was aborted, and why. Clones share the status of one engine and do not keep the engine alive.
#[derive(Clone, Debug, Default)]
pub struct AbortStatus(Arc<Mutex<Option<String>>>);

impl AbortStatus {
    /// Records the cause if none is recorded yet. Returns whether this cause is the first.
    pub(crate) fn abort(&self, cause: &str) -> bool {
        let mut aborted = self.0.lock();
        let first = aborted.is_none();
        aborted.get_or_insert_with(|| cause.to_owned());
        first
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.aborted().map_or(Ok(()), Err)
    }

    /// The error that calls return after an abort.
    pub(crate) fn aborted(&self) -> Option<KernelError> {
        let aborted = self.0.lock();
        aborted.clone().map(|cause| KernelError::Aborted { cause })
    }
}

/// A member that waits for another member in a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberWait {
    /// Id of the group.
    pub group: u32,
    /// Rank of the device that waits.
    pub rank: usize,
    /// Rank of the device for which `rank` waits.
    pub peer: usize,
}

impl MemberWait {
    pub(crate) fn new(group: &Group, member: usize, peer: usize) -> Self {
        Self { group: group.id, rank: group.ranks[member], peer: group.ranks[peer] }
    }
}
