//! Shared state of a running session. The first failure ends the session: collectives are aborted and all actors stop.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use parking_lot::Mutex;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use shardflow_kernels::collective::Collective;
use shardflow_kernels::stream::Stream;

use crate::bus::{Bus, Cast};
use crate::error::{Failure, PeerError};
use crate::hang::{self, CollectiveWait, Hang, HangSnapshot};
use crate::remote::Remote;
use crate::slow::{self, Sample};
use crate::snapshot::{ActorSnapshot, NotFinite};
use crate::spec::{ActorId, Spec};
use crate::trace::Ring;

mod first_failure;
mod step_counters;

use first_failure::FirstFailure;
use step_counters::StepCounters;

/// Timeout for actor snapshots. An actor takes longer only if it has ended or a device driver call blocks its thread.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of retries if an actor made progress while the snapshots were taken.
const SNAPSHOT_TRIES: u32 = 3;

pub(crate) struct Session {
    pub(crate) spec: Arc<Spec>,
    pub(crate) bus: Bus,
    /// Streams of this process's actors. The session keeps them until their collectives have been aborted.
    pub(crate) streams: BTreeMap<ActorId, Stream>,
    pub(crate) engine: Arc<dyn Collective>,
    pub(crate) activity: Activity,
    pub(crate) steps: StepCounters,
    pub(crate) records: Records,
    pub(crate) hints: HostHints,
    pub(crate) failure: FirstFailure,
    pub(crate) departures: Mutex<Departures>,
    /// Pairs of ractor's id and our actor id, so that a panic report can name the actor.
    pub(crate) children: Mutex<Vec<(ractor::ActorId, ActorId)>>,
}

/// The session's clock, and the events that its actors have processed. Times are nanoseconds since the start.
pub(crate) struct Activity {
    started: Instant,
    events: AtomicU64,
    /// When an actor last processed an event.
    last_ns: AtomicU64,
}

impl Activity {
    pub(crate) fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    pub(crate) fn add(&self, now_ns: u64) {
        self.last_ns.store(now_ns, Ordering::Relaxed);
        self.events.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    pub(crate) fn idle_ns(&self) -> u64 {
        self.now_ns().saturating_sub(self.last_ns.load(Ordering::Relaxed))
    }
}

/// What actors and streams record for observers.
pub(crate) struct Records {
    pub(crate) rings: BTreeMap<ActorId, Ring>,
    /// Inf/NaN findings that the host has not fetched.
    pub(crate) not_finite: Mutex<Vec<NotFinite>>,
    pub(crate) finals: Mutex<Vec<ActorSnapshot>>,
}

/// What the host reports for stall detection.
pub(crate) struct HostHints {
    /// The process that the host program waits for, or -1.
    pub(crate) waits_for: AtomicI64,
    /// 99th percentile of the step time in nanoseconds; 0 while unknown.
    pub(crate) step_p99_ns: AtomicU64,
}

/// Processes that have left in an orderly way. Broken connections to them are not failures.
#[derive(Default)]
pub(crate) struct Departures {
    peers: BTreeSet<u32>,
    own: bool,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Session")
    }
}

impl Session {
    pub(crate) fn new(
        spec: Arc<Spec>,
        streams: BTreeMap<ActorId, Stream>,
        engine: Arc<dyn Collective>,
        remote: Remote,
    ) -> (Arc<Self>, Receiver<Failure>) {
        let (failure, failures) = FirstFailure::new();
        let rings = streams.keys().map(|actor| (*actor, Ring::default())).collect();
        let session = Self {
            bus: Bus::new(&spec, remote),
            activity: Activity { started: Instant::now(), events: AtomicU64::new(0), last_ns: AtomicU64::new(0) },
            steps: StepCounters::new(spec.clone(), streams.keys().copied().collect()),
            records: Records { rings, not_finite: Mutex::default(), finals: Mutex::default() },
            hints: HostHints { waits_for: AtomicI64::new(-1), step_p99_ns: AtomicU64::new(0) },
            failure,
            departures: Mutex::default(),
            children: Mutex::default(),
            spec,
            streams,
            engine,
        };
        (Arc::new(session), failures)
    }

    /// Ends the session. Only the first cause is kept; later ones follow from it.
    pub(crate) fn fail(&self, failure: Failure) {
        if self.failure.record(self.activity.now_ns(), &failure) {
            self.engine.abort(&failure.to_string());
            self.bus.stop();
            self.failure.publish(failure);
        }
    }

    pub(crate) fn first_failure(&self) -> Option<Failure> {
        self.failure.get().map(|(_, failure)| failure)
    }

    pub(crate) fn peer_left(&self, process: u32) {
        self.departures.lock().peers.insert(process);
    }

    pub(crate) fn leave(&self) {
        self.departures.lock().own = true;
    }

    /// Handles a broken connection to a peer: a failure, unless this process or the peer has left.
    pub(crate) fn peer_lost(&self, process: u32, message: String) {
        let is_expected = |departures: &Departures| departures.own || departures.peers.contains(&process);
        if !is_expected(&self.departures.lock()) {
            self.fail(Failure::Peer { process, cause: PeerError::Lost { message } });
        }
    }

    /// Snapshots of this process's actors, ordered by id. A stopped actor contributes its last snapshot. Omits an
    /// actor that does not answer, such as after a panic.
    pub(crate) fn snapshot(&self) -> Vec<ActorSnapshot> {
        let (reply, replies) = bounded(self.streams.len());
        for actor in self.streams.keys() {
            self.bus.send(*actor, Cast::Snapshot(reply.clone()));
        }
        drop(reply);
        let deadline = Instant::now() + SNAPSHOT_TIMEOUT;
        let mut snapshots = Vec::new();
        while let Ok(snapshot) = replies.recv_deadline(deadline) {
            snapshots.push(snapshot.open());
        }
        let answered = |s: &ActorSnapshot| snapshots.iter().any(|t| t.actor == s.actor);
        let finals: Vec<_> = self.records.finals.lock().iter().filter(|s| !answered(s)).cloned().collect();
        snapshots.extend(finals);
        snapshots.sort_by_key(|s| s.actor);
        snapshots
    }

    /// Explains a hang, if there is one, and lists what each actor waits for or has in flight.
    pub(crate) fn explain(&self) -> (Option<Hang>, String) {
        // In snapshots taken during progress, messages in transit look like lost messages.
        let mut tries = 0..SNAPSHOT_TRIES;
        let (snapshots, collectives, is_still) = loop {
            let before = self.activity.events();
            let (snapshots, collectives) = (self.snapshot(), self.collective_waits());
            let is_still = self.activity.events() == before;
            if is_still || tries.next().is_none() {
                break (snapshots, collectives, is_still);
            }
        };
        let process_of = |actor| self.bus.remote().process_of(actor);
        let members_of = |communicator| self.bus.remote().members_of(communicator);
        let hang_snapshot = HangSnapshot {
            spec: &self.spec,
            snapshots: &snapshots,
            collectives: &collectives,
            knows_collectives: self.engine.knows_waits(),
            is_acyclic: true,
            host_waits_for: u32::try_from(self.hints.waits_for.load(Ordering::Relaxed)).ok(),
            process_of: &process_of,
            members_of: &members_of,
        };
        let is_stuck = is_still && self.steps.outstanding();
        let hang = is_stuck.then(|| hang::explain(hang_snapshot, self.steps.begun())).flatten();
        let texts = snapshots.iter().map(|s| s.waiting.describe(&self.spec));
        let texts = texts.chain(hang::describe_pipe_waits(&self.spec, &collectives));
        (hang, texts.filter(|t| !t.is_empty()).collect::<Vec<_>>().join("\n"))
    }

    fn collective_waits(&self) -> Vec<CollectiveWait> {
        self.engine.waits().into_iter().map(|w| (w.group, w.rank, w.peer)).collect()
    }

    pub(crate) fn waits(&self) -> Sample {
        let remote = self.bus.remote();
        let of_device = |device| remote.directory.process_of(device);
        slow::sample(
            &self.spec,
            &self.snapshot(),
            &self.collective_waits(),
            |actor| remote.process_of(actor),
            of_device,
        )
    }

    pub(crate) fn has_peers(&self) -> bool {
        !self.spec.is_whole() || self.streams.len() < self.spec.actors.len()
    }

    fn panicked(&self, child: ractor::ActorId, message: String) {
        let id = self.children.lock().iter().find(|c| c.0 == child).map(|c| c.1);
        self.fail(match id {
            None => Failure::Panic { actor: format!("actor {child}"), device: 0, action: None, message },
            Some(id) => {
                let (own, action) = (self.spec.actor(id), self.steps.in_flight(id));
                Failure::Panic { actor: own.name.clone(), device: own.device, action, message }
            }
        });
    }
}

/// Supervises the actors of one device. ractor's default supervisor would stop when its first child stops.
pub(crate) struct Supervisor;

impl Actor for Supervisor {
    type Msg = Infallible;
    type State = Arc<Session>;
    type Arguments = Arc<Session>;

    async fn pre_start(
        &self,
        _: ActorRef<Infallible>,
        session: Arc<Session>,
    ) -> Result<Arc<Session>, ActorProcessingErr> {
        Ok(session)
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Infallible>,
        event: SupervisionEvent,
        session: &mut Arc<Session>,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(child, cause) = event {
            session.panicked(child.get_id(), cause.to_string());
        }
        Ok(())
    }
}
