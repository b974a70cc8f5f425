//! What this crate tells on the `metrics` facade, which costs a few nanoseconds until a program installs a recorder.
//!
//! | metric | kind | labels | meaning |
//! |---|---|---|---|
//! | `shardflow_collective_seconds` | histogram | `actor`, `kind` | in a collective, from when its stream comes to it until the stream goes on: waiting for the other members, and moving bytes. Of a GPU as the host sees it, to within some 0.1 ms |

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Histogram, histogram};

use crate::collective::CollectiveCall;

/// Name of the histogram of collectives.
pub const COLLECTIVE_SECONDS: &str = "shardflow_collective_seconds";

/// A stream's handles.
pub(crate) struct StreamMetrics {
    actor: String,
    /// By kind, once one has come.
    collectives: Vec<(&'static str, Histogram)>,
    all: CollectiveTime,
}

/// Time that a stream has been in collectives.
#[derive(Clone, Debug, Default)]
pub(crate) struct CollectiveTime(Arc<Mutex<Spent>>);

#[derive(Debug, Default)]
struct Spent {
    /// In those that have ended.
    ended: Duration,
    /// When the stream came to the one that it is in.
    came: Option<Instant>,
}

/// Where one collective's time is told.
#[derive(Clone, Debug)]
pub(crate) struct CollectiveTimer {
    kind: Histogram,
    all: CollectiveTime,
}

impl StreamMetrics {
    /// Of the actor that the stream is named for.
    pub(crate) fn new(actor: &str) -> Self {
        Self { actor: actor.to_owned(), collectives: Vec::new(), all: CollectiveTime::default() }
    }

    /// Of all collectives.
    pub(crate) fn collective_time(&self) -> CollectiveTime {
        self.all.clone()
    }

    /// Of collectives like this one.
    pub(crate) fn collective(&mut self, call: &CollectiveCall) -> CollectiveTimer {
        let (name, all) = (call.name(), self.all.clone());
        if let Some((_, kind)) = self.collectives.iter().find(|(known, _)| *known == name) {
            return CollectiveTimer { kind: kind.clone(), all };
        }
        let kind = histogram!(COLLECTIVE_SECONDS, "actor" => self.actor.clone(), "kind" => name);
        self.collectives.push((name, kind.clone()));
        CollectiveTimer { kind, all }
    }
}

impl CollectiveTime {
    pub(crate) fn get(&self) -> Duration {
        let spent = self.spent();
        spent.ended + spent.came.map_or(Duration::ZERO, |came| came.elapsed())
    }

    fn spent(&self) -> MutexGuard<'_, Spent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CollectiveTimer {
    /// The stream has come to the collective.
    pub(crate) fn came(&self, at: Instant) {
        self.all.spent().came = Some(at);
    }

    /// The stream goes on.
    pub(crate) fn went(&self, at: Instant) {
        let mut spent = self.all.spent();
        let took = spent.came.take().map_or(Duration::ZERO, |came| at - came);
        spent.ended += took;
        self.kind.record(took);
    }
}
