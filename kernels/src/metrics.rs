//! Metrics of this crate on the `metrics` facade. They cost a few nanoseconds until a program installs a recorder.
//!
//! `shardflow_collective_seconds` (histogram; `actor`, `kind`): time from the start of a collective until its stream
//! continues. This includes the wait for other members. For a GPU, the host measures this time, to about 0.1 ms.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::{Histogram, histogram};
use parking_lot::Mutex;

use crate::collective::call::CollectiveCall;

/// Name of the histogram of collectives.
pub const COLLECTIVE_SECONDS: &str = "shardflow_collective_seconds";

pub(crate) struct StreamMetrics {
    actor: String,
    /// Histograms by kind. Each is created at the first call of its kind.
    collectives: HashMap<&'static str, Histogram>,
    all: CollectiveTime,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct CollectiveTime(Arc<Mutex<Spent>>);

#[derive(Debug, Default)]
struct Spent {
    ended: Duration,
    started: Option<Instant>,
}

#[derive(Clone, Debug)]
pub(crate) struct CollectiveTimer {
    kind: Histogram,
    all: CollectiveTime,
}

impl StreamMetrics {
    /// Creates the metrics of `actor`, whose name is also the name of the stream.
    pub(crate) fn new(actor: &str) -> Self {
        Self { actor: actor.to_owned(), collectives: HashMap::new(), all: CollectiveTime::default() }
    }

    pub(crate) fn collective_time(&self) -> CollectiveTime {
        self.all.clone()
    }

    pub(crate) fn collective(&mut self, call: &CollectiveCall) -> CollectiveTimer {
        let new = || histogram!(COLLECTIVE_SECONDS, "actor" => self.actor.clone(), "kind" => call.name());
        let kind = self.collectives.entry(call.name()).or_insert_with(new).clone();
        CollectiveTimer { kind, all: self.all.clone() }
    }
}

impl CollectiveTime {
    pub(crate) fn get(&self) -> Duration {
        let spent = self.0.lock();
        spent.ended + spent.started.map_or(Duration::ZERO, |started| started.elapsed())
    }
}

impl CollectiveTimer {
    pub(crate) fn begin(&self, at: Instant) {
        self.all.0.lock().started = Some(at);
    }

    pub(crate) fn end(&self, at: Instant) {
        let mut spent = self.all.0.lock();
        let took = spent.started.take().map_or(Duration::ZERO, |started| at - started);
        spent.ended += took;
        self.kind.record(took);
    }
}
