//! Shared state of a running session. The first failure ends it: the cause is kept, collectives are aborted, all actors
//! stop.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::{Condvar, Mutex};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use shardflow_kernels::clock::ReleaseClocks;
use shardflow_kernels::collective::Collective;
use shardflow_kernels::stream::Stream;

use crate::bus::Bus;
use crate::error::{Failure, PeerError};
use crate::hang::{self, CollectiveWait, Hang, HangSnapshot};
use crate::message::{Cast, Never};
use crate::remote::Remote;
use crate::slow::{self, Sample};
use crate::snapshot::{ActorSnapshot, NotFinite};
use crate::spec::{ActorId, RegisterId, RegisterReader, Spec};
use crate::trace::Ring;

/// Timeout for actor snapshots. Actors never block, so only an actor that has ended takes longer.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of repeated snapshots when an actor made progress during the previous one.
const SNAPSHOT_TRIES: u32 = 3;

const IDLE: u32 = u32::MAX;

/// State that all parts of a running session share.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) spec: Arc<Spec>,
    pub(crate) bus: Bus,
    /// Streams of this process's actors. Kept here so that they end only after their collectives have been aborted.
    pub(crate) streams: BTreeMap<ActorId, Stream>,
    engine: Arc<dyn Collective>,
    /// Recent firings of this process's actors.
    pub(crate) rings: BTreeMap<ActorId, Ring>,
    started: Instant,
    /// The process that the host program waits for, or -1.
    pub(crate) host_waits_for: AtomicI64,
    /// 99th percentile of the step time in nanoseconds; 0 while unknown.
    pub(crate) step_p99_ns: AtomicU64,
    /// Race clocks at the time when actions last finished all their firings of a step.
    clocks: ReleaseClocks,
    /// Number of events that actors have processed.
    progress: AtomicU64,
    /// When an actor last processed an event, nanoseconds since the start.
    progressed_ns: AtomicU64,
    /// When the session failed, nanoseconds since the start.
    failed_ns: AtomicU64,
    /// By actor: index of the action in flight, or `IDLE`.
    in_flight: Vec<AtomicU32>,
    /// Ended firings by actor and action. A total is not enough: if a peer is one step ahead, an early firing of one
    /// action would hide a late one of another.
    completed: Vec<Vec<AtomicU64>>,
    /// Launched firings by actor and action.
    launches: Vec<Vec<AtomicU64>>,
    /// Number of steps for which all tokens have been added.
    whole: AtomicU64,
    /// Number of steps for which some tokens have been added.
    begun: AtomicU64,
    /// Notified when a step ends and when the session fails.
    settled: Condvar,
    state: Mutex<State>,
    /// Inf/NaN findings since the last [`Session::take_not_finite`].
    not_finite: Mutex<Vec<NotFinite>>,
    failed: Sender<Failure>,
    /// Called with the first cause before anything stops.
    on_failure: OnceLock<OnFailure>,
}

/// Callback for the first cause.
pub(crate) struct OnFailure(pub(crate) Box<dyn Fn(&Failure) + Send + Sync>);

impl std::fmt::Debug for OnFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnFailure")
    }
}

#[derive(Debug, Default)]
struct State {
    first: Option<Failure>,
    /// Actor ids by ractor's id.
    children: Vec<(ractor::ActorId, ActorId)>,
    /// Final snapshots of stopped actors.
    finals: Vec<ActorSnapshot>,
    /// Peers that have left in order; a broken connection to them is not a failure.
    left: BTreeSet<u32>,
    /// This process has left in order.
    leaving: bool,
}

impl Session {
    pub(crate) fn new(
        spec: Arc<Spec>,
        streams: BTreeMap<ActorId, Stream>,
        engine: Arc<dyn Collective>,
        remote: Remote,
    ) -> (Arc<Self>, Receiver<Failure>) {
        let (failed, failures) = bounded(1);
        let counters = || spec.actors.iter().map(|a| a.actions.iter().map(|_| AtomicU64::new(0)).collect()).collect();
        let session = Self {
            bus: Bus::new(&spec, remote),
            rings: streams.keys().map(|actor| (*actor, Ring::default())).collect(),
            started: Instant::now(),
            host_waits_for: AtomicI64::new(-1),
            step_p99_ns: AtomicU64::new(0),
            progress: AtomicU64::new(0),
            progressed_ns: AtomicU64::new(0),
            failed_ns: AtomicU64::new(0),
            clocks: ReleaseClocks::default(),
            in_flight: spec.actors.iter().map(|_| AtomicU32::new(IDLE)).collect(),
            completed: counters(),
            launches: counters(),
            whole: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            settled: Condvar::new(),
            state: Mutex::default(),
            not_finite: Mutex::default(),
            spec,
            streams,
            engine,
            failed,
            on_failure: OnceLock::new(),
        };
        (Arc::new(session), failures)
    }

    /// Nanoseconds since the start.
    pub(crate) fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    /// Ends the session. Only the first cause is kept; later ones follow from it.
    pub(crate) fn fail(&self, failure: Failure) {
        {
            let mut state = self.state.lock();
            if state.first.is_some() {
                return;
            }
            state.first = Some(failure.clone());
            self.failed_ns.store(self.now_ns(), Ordering::Relaxed);
        }
        tracing::error!(%failure, "session ends");
        if let Some(OnFailure(callback)) = self.on_failure.get() {
            callback(&failure);
        }
        self.engine.abort(&failure.to_string());
        self.bus.stop();
        // The channel has room for its only message.
        let _ = self.failed.try_send(failure);
        self.settled.notify_all();
    }

    /// Sets the callback for the first cause; calls it at once if the session has already failed.
    pub(crate) fn on_failure(&self, callback: OnFailure) {
        // A concurrent `fail` may call it twice; a repeated cause changes nothing.
        let _ = self.on_failure.set(callback);
        if let (Some(first), Some(OnFailure(callback))) = (self.first_failure(), self.on_failure.get()) {
            callback(&first);
        }
    }

    /// Records that a peer has left in order.
    pub(crate) fn peer_left(&self, process: u32) {
        self.state.lock().left.insert(process);
    }

    /// Records that this process leaves in order: from now on, broken peer connections are not failures.
    pub(crate) fn leave(&self) {
        self.state.lock().leaving = true;
    }

    /// Handles a broken connection to a peer: a failure, unless this process or the peer has left.
    pub(crate) fn peer_lost(&self, process: u32, message: String) {
        let expected = {
            let state = self.state.lock();
            state.leaving || state.left.contains(&process)
        };
        if !expected {
            self.fail(Failure::Peer { process, cause: PeerError::Lost { message } });
        }
    }

    pub(crate) fn first_failure(&self) -> Option<Failure> {
        self.state.lock().first.clone()
    }

    pub(crate) fn progressed(&self, now_ns: u64) {
        self.progressed_ns.store(now_ns, Ordering::Relaxed);
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Nanoseconds since an actor last processed an event.
    pub(crate) fn idle_ns(&self) -> u64 {
        self.now_ns().saturating_sub(self.progressed_ns.load(Ordering::Relaxed))
    }

    pub(crate) fn failed_ns(&self) -> u64 {
        self.failed_ns.load(Ordering::Relaxed)
    }

    pub(crate) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    pub(crate) fn launched(&self, actor: ActorId, action: u32) {
        self.in_flight[actor.0 as usize].store(action, Ordering::Relaxed);
        self.launches[actor.0 as usize][action as usize].fetch_add(1, Ordering::AcqRel);
    }

    /// Records the end of a firing.
    pub(crate) fn completed(&self, actor: ActorId, action: u32) {
        let (at, action) = (actor.0 as usize, action as usize);
        self.in_flight[at].store(IDLE, Ordering::Relaxed);
        let per_step = u64::from(self.spec.actors[at].actions[action].per_step);
        // Only this actor writes these counters. The race clock must be added before the count becomes visible.
        if (self.completed[at][action].load(Ordering::Relaxed) + 1).is_multiple_of(per_step) {
            self.clocks.add();
        }
        let completed = self.completed[at][action].fetch_add(1, Ordering::AcqRel) + 1;
        let whole = self.whole.load(Ordering::Acquire);
        // A step can end only with the last firing of an action in that step.
        if completed == whole * per_step && self.has_ended(whole) {
            // The lock ensures that a waiter cannot check before the count and start to wait after the notification.
            drop(self.state.lock());
            self.settled.notify_all();
        }
    }

    /// Sets the number of steps for which all tokens, and some tokens, have been added.
    pub(crate) fn set_steps(&self, whole: u64, begun: u64) {
        self.whole.store(whole, Ordering::Release);
        self.begun.store(begun, Ordering::Release);
    }

    /// True when every action of this process has finished its firings of this number of steps.
    fn has_ended(&self, steps: u64) -> bool {
        self.streams.keys().map(|actor| actor.0 as usize).all(|actor| {
            let actions = self.completed[actor].iter().zip(&self.spec.actors[actor].actions);
            actions.into_iter().all(|(done, action)| done.load(Ordering::Acquire) >= steps * u64::from(action.per_step))
        })
    }

    /// True while a step that has begun has firings left, even if they only lack a token that the host adds later.
    pub(crate) fn outstanding(&self) -> bool {
        !self.has_ended(self.begun.load(Ordering::Acquire))
    }

    /// Ended firings of the register's readers in this process; `None` while one of them is in the middle of a step.
    pub(crate) fn firings_of_readers(&self, register: RegisterId) -> Option<u64> {
        let readers = self.spec.registers[register.0 as usize].readers.iter();
        let firings = |reader: &RegisterReader| {
            let (actor, action) = (reader.actor.0 as usize, reader.action as usize);
            let done = self.completed[actor][action].load(Ordering::Acquire);
            let per_step = u64::from(self.spec.actors[actor].actions[action].per_step);
            let is_idle = self.launches[actor][action].load(Ordering::Acquire) == done;
            (is_idle && done.is_multiple_of(per_step)).then_some(done)
        };
        readers.filter(|reader| self.streams.contains_key(&reader.actor)).map(firings).sum()
    }

    /// True while a firing of any actor is in flight.
    pub(crate) fn any_in_flight(&self) -> bool {
        self.in_flight.iter().any(|a| a.load(Ordering::Relaxed) != IDLE)
    }

    /// Waits until no firing is left of the steps that have all their tokens; false on timeout.
    pub(crate) fn quiesce(&self, timeout: Duration) -> Result<bool, Failure> {
        let begin = Instant::now();
        let mut state = self.state.lock();
        loop {
            if let Some(first) = &state.first {
                return Err(first.clone());
            }
            let left = timeout.saturating_sub(begin.elapsed());
            let ended = self.has_ended(self.whole.load(Ordering::Acquire));
            if ended || left.is_zero() {
                self.clocks.join();
                return Ok(ended);
            }
            self.settled.wait_for(&mut state, left);
        }
    }

    /// Enables or disables Inf/NaN checks on launch outputs in all streams.
    pub(crate) fn check_finite(&self, on: bool) {
        for stream in self.streams.values() {
            // A stream that has ended checks nothing.
            let _ = stream.check_finite(on);
        }
    }

    /// Records an Inf/NaN finding of a stream.
    pub(crate) fn add_not_finite(&self, finding: NotFinite) {
        self.not_finite.lock().push(finding);
    }

    /// Returns the Inf/NaN findings since the last call.
    pub(crate) fn take_not_finite(&self) -> Vec<NotFinite> {
        std::mem::take(&mut *self.not_finite.lock())
    }

    pub(crate) fn abort_collectives(&self, cause: &str) {
        self.engine.abort(cause);
    }

    pub(crate) fn add_final_snapshot(&self, snapshot: ActorSnapshot) {
        self.state.lock().finals.push(snapshot);
    }

    /// Snapshots of this process's actors, ordered by id. Actors that do not answer (after a panic) are left out.
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
        let finals: Vec<_> = self.state.lock().finals.iter().filter(|s| !answered(s)).cloned().collect();
        snapshots.extend(finals);
        snapshots.sort_by_key(|s| s.actor);
        snapshots
    }

    /// Explains a hang, if there is one, and lists what each actor waits for or has in flight.
    pub(crate) fn explain(&self) -> (Option<Hang>, String) {
        // In snapshots taken during progress, messages in transit look like lost messages.
        let mut tries = 0..SNAPSHOT_TRIES;
        let (snapshots, collectives, is_still) = loop {
            let before = self.progress();
            let (snapshots, collectives) = (self.snapshot(), self.collective_waits());
            let is_still = self.progress() == before;
            if is_still || tries.next().is_none() {
                break (snapshots, collectives, is_still);
            }
        };
        let process_of = |actor| self.bus.remote().process_of(actor);
        let hang_snapshot = HangSnapshot {
            spec: &self.spec,
            snapshots: &snapshots,
            collectives: &collectives,
            knows_collectives: self.engine.knows_waits(),
            is_acyclic: true,
            host_waits_for: u32::try_from(self.host_waits_for.load(Ordering::Relaxed)).ok(),
            process_of: &process_of,
        };
        let is_stuck = is_still && self.outstanding();
        let hang = is_stuck.then(|| hang::explain(hang_snapshot, self.begun.load(Ordering::Acquire))).flatten();
        let texts = snapshots.iter().map(|s| s.waiting.describe(&self.spec));
        let texts = texts.chain(hang::describe_pipe_waits(&self.spec, &collectives));
        (hang, texts.filter(|t| !t.is_empty()).collect::<Vec<_>>().join("\n"))
    }

    fn collective_waits(&self) -> Vec<CollectiveWait> {
        self.engine.waits().into_iter().map(|w| (w.group, w.rank, w.peer)).collect()
    }

    /// The other processes that this one waits for now, with the reasons; empty while any stream works.
    pub(crate) fn waits(&self) -> Sample {
        let process_of = |actor| self.bus.remote().process_of(actor);
        slow::sample(&self.spec, &self.snapshot(), &self.collective_waits(), process_of)
    }

    /// True when other processes host some of the actors.
    pub(crate) fn has_peers(&self) -> bool {
        self.streams.len() < self.spec.actors.len()
    }

    /// Registers a ractor id, so that a panic report can name the actor.
    pub(crate) fn register_child(&self, child: ractor::ActorId, actor: ActorId) {
        self.state.lock().children.push((child, actor));
    }

    fn panicked(&self, child: ractor::ActorId, message: String) {
        let id = self.state.lock().children.iter().find(|c| c.0 == child).map(|c| c.1);
        let Some((id, own)) = id.and_then(|a| Some((a, self.spec.actors.get(a.0 as usize)?))) else {
            return self.fail(Failure::Panic { actor: format!("actor {child}"), device: 0, action: None, message });
        };
        let action = self.in_flight[id.0 as usize].load(Ordering::Relaxed);
        let action = own.actions.get(action as usize).map(|a| a.name.clone());
        self.fail(Failure::Panic { actor: own.name.clone(), device: own.device, action, message });
    }
}

/// Supervises the actors of one device. ractor's default supervisor would end with the first child that stops, for any
/// reason.
pub(crate) struct Supervisor;

impl Actor for Supervisor {
    type Msg = Never;
    type State = Arc<Session>;
    type Arguments = Arc<Session>;

    async fn pre_start(&self, _: ActorRef<Never>, session: Arc<Session>) -> Result<Arc<Session>, ActorProcessingErr> {
        Ok(session)
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Never>,
        event: SupervisionEvent,
        session: &mut Arc<Session>,
    ) -> Result<(), ActorProcessingErr> {
        if let SupervisionEvent::ActorFailed(child, cause) = event {
            session.panicked(child.get_id(), cause.to_string());
        }
        Ok(())
    }
}
