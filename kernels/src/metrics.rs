//! What this crate tells on the `metrics` facade, which costs a few nanoseconds until a program installs a recorder.
//! Imports `collective`.
//!
//! | metric | kind | labels | meaning |
//! |---|---|---|---|
//! | `shardflow_collective_seconds` | histogram | `actor`, `kind` | in a collective on a CPU stream: waiting for the other members, and moving bytes |

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
}

impl StreamMetrics {
    /// Of the actor that the stream is named for.
    pub(crate) fn new(actor: &str) -> Self {
        Self { actor: actor.to_owned(), collectives: Vec::new() }
    }

    pub(crate) fn collective(&mut self, call: &CollectiveCall, took: Duration) {
        let kind = call.name();
        if let Some((_, known)) = self.collectives.iter().find(|(name, _)| *name == kind) {
            return known.record(took);
        }
        let new = histogram!(COLLECTIVE_SECONDS, "actor" => self.actor.clone(), "kind" => kind);
        new.record(took);
        self.collectives.push((kind, new));
    }
}
