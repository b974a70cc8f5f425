//! The first cause ends a session: it is kept, collectives are aborted, all actors stop.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
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

/// How long a state is waited for; actors never block, so only an actor that is gone takes longer.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(2);
/// Times that states are taken again because something moved meanwhile.
const SNAPSHOT_TRIES: u32 = 3;

const IDLE: u32 = u32::MAX;

/// What all parts of a running session share.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) spec: Arc<Spec>,
    pub(crate) bus: Bus,
    /// Of the actors of this process. Kept here so that they end only after the collectives in them were aborted.
    pub(crate) streams: BTreeMap<ActorId, Stream>,
    engine: Arc<dyn Collective>,
    /// What the actors of this process did.
    pub(crate) rings: BTreeMap<ActorId, Ring>,
    started: Instant,
    /// The process that the program waits for, or -1.
    pub(crate) host_waits_for: AtomicI64,
    /// Nanoseconds that 99 of 100 steps take at most; 0 until that is known.
    pub(crate) step_p99_ns: AtomicU64,
    /// What had happened when actions last did all their firings of a step.
    clocks: ReleaseClocks,
    /// Counts every event that an actor takes in.
    progress: AtomicU64,
    /// When it last did, nanoseconds from the start.
    progressed_ns: AtomicU64,
    /// When it failed, nanoseconds from the start.
    failed_ns: AtomicU64,
    /// Index of the action in flight, or `IDLE`; by actor.
    in_flight: Vec<AtomicU32>,
    /// Firings ended, by actor and action. Counted one by one: what follows from a peer that is a step ahead fires early, and
    /// must not be taken for what is late.
    completed: Vec<Vec<AtomicU64>>,
    /// Firings launched, likewise.
    launches: Vec<Vec<AtomicU64>>,
    /// Steps that all tokens were given for.
    whole: AtomicU64,
    /// Steps that some tokens were given for.
    begun: AtomicU64,
    /// Guards nothing but the wait for the end of a step or a failure.
    settled: Condvar,
    state: Mutex<State>,
    /// What streams that check have found since it was last asked for.
    found: Mutex<Vec<NotFinite>>,
    failed: Sender<Failure>,
    /// Told of the first cause before anything is stopped.
    on_failure: OnceLock<OnFailure>,
}

/// Hears of the first cause.
pub(crate) struct OnFailure(pub(crate) Box<dyn Fn(&Failure) + Send + Sync>);

impl std::fmt::Debug for OnFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnFailure")
    }
}

#[derive(Debug, Default)]
struct State {
    first: Option<Failure>,
    /// Actors by their id in ractor.
    children: Vec<(ractor::ActorId, ActorId)>,
    /// Last state of the actors that have stopped.
    finals: Vec<ActorSnapshot>,
    /// Peers that have ended in order; what breaks with them is no failure.
    left: BTreeSet<u32>,
    /// This process has ended in order.
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
        let by_action = || spec.actors.iter().map(|a| a.actions.iter().map(|_| AtomicU64::new(0)).collect()).collect();
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
            completed: by_action(),
            launches: by_action(),
            whole: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            settled: Condvar::new(),
            state: Mutex::default(),
            found: Mutex::default(),
            spec,
            streams,
            engine,
            failed,
            on_failure: OnceLock::new(),
        };
        (Arc::new(session), failures)
    }

    /// Time since the start.
    pub(crate) fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the session. Only the first cause is kept; the others follow from it.
    pub(crate) fn fail(&self, failure: Failure) {
        {
            let mut state = self.state();
            if state.first.is_some() {
                return;
            }
            state.first = Some(failure.clone());
            self.failed_ns.store(self.now_ns(), Ordering::Relaxed);
        }
        tracing::error!(%failure, "session ends");
        if let Some(OnFailure(tell)) = self.on_failure.get() {
            tell(&failure);
        }
        self.engine.abort(&failure.to_string());
        self.bus.stop();
        // The channel has room for the one message it ever gets.
        let _ = self.failed.try_send(failure);
        self.settled.notify_all();
    }

    /// Has the first cause told to `tell`, at once if there is one already.
    pub(crate) fn on_failure(&self, tell: OnFailure) {
        // Both orders of this and `fail` may tell twice; a cause told again changes nothing.
        let _ = self.on_failure.set(tell);
        if let (Some(first), Some(OnFailure(tell))) = (self.first_failure(), self.on_failure.get()) {
            tell(&first);
        }
    }

    /// A peer has ended in order.
    pub(crate) fn peer_left(&self, process: u32) {
        self.state().left.insert(process);
    }

    /// This process ends in order: what breaks with any peer is no failure from now on.
    pub(crate) fn leave(&self) {
        self.state().leaving = true;
    }

    /// The connection to a peer broke: a failure, unless one of the two has left.
    pub(crate) fn peer_lost(&self, process: u32, message: String) {
        let expected = {
            let state = self.state();
            state.leaving || state.left.contains(&process)
        };
        if !expected {
            self.fail(Failure::Peer { process, cause: PeerError::Lost { message } });
        }
    }

    pub(crate) fn first_failure(&self) -> Option<Failure> {
        self.state().first.clone()
    }

    pub(crate) fn progressed(&self, now_ns: u64) {
        self.progressed_ns.store(now_ns, Ordering::Relaxed);
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Nanoseconds since any actor took an event in.
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

    /// A firing has ended.
    pub(crate) fn completed(&self, actor: ActorId, action: u32) {
        let (at, action) = (actor.0 as usize, action as usize);
        self.in_flight[at].store(IDLE, Ordering::Relaxed);
        let per_step = u64::from(self.spec.actors[at].actions[action].per_step);
        // Only this actor counts here, and whoever sees the count is to know what was done before.
        if (self.completed[at][action].load(Ordering::Relaxed) + 1).is_multiple_of(per_step) {
            self.clocks.add();
        }
        let completed = self.completed[at][action].fetch_add(1, Ordering::AcqRel) + 1;
        let whole = self.whole.load(Ordering::Acquire);
        // The firing that ends a step is the last of its action's in it.
        if completed == whole * per_step && self.has_ended(whole) {
            // Taken so that nobody can look before the count and wait after the notification.
            drop(self.state());
            self.settled.notify_all();
        }
    }

    /// Steps that all tokens were given for, and that some were given for.
    pub(crate) fn set_steps(&self, whole: u64, begun: u64) {
        self.whole.store(whole, Ordering::Release);
        self.begun.store(begun, Ordering::Release);
    }

    /// True when every action of this process has done its firings of so many steps.
    fn has_ended(&self, steps: u64) -> bool {
        self.streams.keys().map(|actor| actor.0 as usize).all(|actor| {
            let actions = self.completed[actor].iter().zip(&self.spec.actors[actor].actions);
            actions.into_iter().all(|(done, action)| done.load(Ordering::Acquire) >= steps * u64::from(action.per_step))
        })
    }

    /// True while a step that was begun has firings left, be it for want of a token that the host gives late.
    pub(crate) fn outstanding(&self) -> bool {
        !self.has_ended(self.begun.load(Ordering::Acquire))
    }

    /// Firings that the register's readers here have done; nothing while one of them is in the middle of a step.
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

    /// True when a stream is still working for an actor.
    pub(crate) fn any_in_flight(&self) -> bool {
        self.in_flight.iter().any(|a| a.load(Ordering::Relaxed) != IDLE)
    }

    /// Waits until no firing is left of the whole steps given; false when the time is over.
    pub(crate) fn quiesce(&self, timeout: Duration) -> Result<bool, Failure> {
        let begin = Instant::now();
        let mut state = self.state();
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
            state = self.settled.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has all streams look at the floats that they write, or no more.
    pub(crate) fn check_finite(&self, on: bool) {
        for stream in self.streams.values() {
            // A stream that has ended finds nothing.
            let _ = stream.check_finite(on);
        }
    }

    /// A stream has found something.
    pub(crate) fn found(&self, found: NotFinite) {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).push(found);
    }

    /// What streams have found since this was last called.
    pub(crate) fn take_found(&self) -> Vec<NotFinite> {
        std::mem::take(&mut *self.found.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn abort_collectives(&self, cause: &str) {
        self.engine.abort(cause);
    }

    pub(crate) fn keep_final(&self, snapshot: ActorSnapshot) {
        self.state().finals.push(snapshot);
    }

    /// States of this process's actors, by id; those that cannot be had (an actor that panicked) are left out.
    pub(crate) fn snapshot(&self) -> Vec<ActorSnapshot> {
        let (reply, replies) = bounded(self.streams.len());
        for actor in self.streams.keys() {
            self.bus.send(*actor, Cast::Snapshot(reply.clone()));
        }
        drop(reply);
        let deadline = Instant::now() + SNAPSHOT_TIMEOUT;
        let mut snapshots = Vec::new();
        while let Ok((snapshot, clock)) = replies.recv_deadline(deadline) {
            clock.join();
            snapshots.push(snapshot);
        }
        let answered = |s: &ActorSnapshot| snapshots.iter().any(|t| t.actor == s.actor);
        let finals: Vec<_> = self.state().finals.iter().filter(|s| !answered(s)).cloned().collect();
        snapshots.extend(finals);
        snapshots.sort_by_key(|s| s.actor);
        snapshots
    }

    /// Why nothing moves, if nothing does; and who waits for which register of whom, and who has a launch in flight.
    pub(crate) fn explain(&self) -> (Option<Hang>, String) {
        // States that were taken while something moved tell of messages under way as if they were lost.
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
        let scene = HangSnapshot {
            spec: &self.spec,
            snapshots: &snapshots,
            collectives: &collectives,
            knows_collectives: self.engine.knows_waits(),
            is_checked: true,
            host_waits_for: u32::try_from(self.host_waits_for.load(Ordering::Relaxed)).ok(),
            process_of: &process_of,
        };
        let is_stuck = is_still && self.outstanding();
        let hang = is_stuck.then(|| hang::explain(scene, self.begun.load(Ordering::Acquire))).flatten();
        let texts = snapshots.iter().map(|s| s.waiting.describe(&self.spec));
        let texts = texts.chain(hang::pipes(&self.spec, &collectives));
        (hang, texts.filter(|t| !t.is_empty()).collect::<Vec<_>>().join("\n"))
    }

    fn collective_waits(&self) -> Vec<CollectiveWait> {
        self.engine.waits().into_iter().map(|w| (w.group, w.rank, w.peer)).collect()
    }

    /// The other processes that this one waits for now, and what for; none while any stream works.
    pub(crate) fn waits(&self) -> Sample {
        let process_of = |actor| self.bus.remote().process_of(actor);
        slow::sample(&self.spec, &self.snapshot(), &self.collective_waits(), process_of)
    }

    /// True when other processes host some of the actors.
    pub(crate) fn has_peers(&self) -> bool {
        self.streams.len() < self.spec.actors.len()
    }

    /// Lets a panic be told by the actor's name.
    pub(crate) fn adopt(&self, child: ractor::ActorId, actor: ActorId) {
        self.state().children.push((child, actor));
    }

    fn panicked(&self, child: ractor::ActorId, message: String) {
        let found = self.state().children.iter().find(|c| c.0 == child).map(|c| c.1);
        let Some((id, own)) = found.and_then(|a| Some((a, self.spec.actors.get(a.0 as usize)?))) else {
            return self.fail(Failure::Panic { actor: format!("actor {child}"), device: 0, action: None, message });
        };
        let action = self.in_flight[id.0 as usize].load(Ordering::Relaxed);
        let action = own.actions.get(action as usize).map(|a| a.name.clone());
        self.fail(Failure::Panic { actor: own.name.clone(), device: own.device, action, message });
    }
}

/// One for each device; the default of ractor would end with the first child that stops, orderly or not.
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
