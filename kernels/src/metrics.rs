//! What this crate tells on the `metrics` facade, which costs a few nanoseconds until a program installs a recorder.
//! Imports `collective`.
//!
//! | metric | kind | labels | meaning |
//! |---|---|---|---|
//! | `shardflow_collective_seconds` | histogram | `actor`, `kind` | in a collective, from when its stream comes to it until the stream goes on: waiting for the other members, and moving bytes. Of a GPU as the host sees it, to within some 50 us |

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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
pub(crate) struct CollectiveTime(Arc<AtomicU64>);

/// Where one collective's time is told.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    kind: Histogram,
    all: CollectiveTime,
}

impl StreamMetrics {
    /// Of the actor that the stream is named for.
    pub(crate) fn new(actor: &str) -> Self {
        Self { actor: actor.to_owned(), collectives: Vec::new(), all: CollectiveTime::default() }
    }

    /// Of all collectives that have ended.
    pub(crate) fn collective_time(&self) -> CollectiveTime {
        self.all.clone()
    }

    /// Of collectives like this one.
    pub(crate) fn collective(&mut self, call: &CollectiveCall) -> Told {
        let (name, all) = (call.name(), self.all.clone());
        if let Some((_, kind)) = self.collectives.iter().find(|(known, _)| *known == name) {
            return Told { kind: kind.clone(), all };
        }
        let kind = histogram!(COLLECTIVE_SECONDS, "actor" => self.actor.clone(), "kind" => name);
        self.collectives.push((name, kind.clone()));
        Told { kind, all }
    }
}

impl CollectiveTime {
    pub(crate) fn get(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

impl Told {
    pub(crate) fn record(&self, took: Duration) {
        self.kind.record(took);
        self.all.0.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }
}
