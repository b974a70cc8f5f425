//! Runs a loaded plan: one thread per device runs that device's actors.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;
use ractor::{Actor, ActorRef};

use crate::bus::{Cast, Mail};
use crate::error::{ActorError, Failure};
use crate::hang::Hang;
use crate::loaded::check_loaded;
use crate::protocol::{ProtocolError, ProtocolEvent};
use crate::remote::{HostPiece, Remote};
use crate::snapshot::{ActorSnapshot, NotFinite};
use crate::spec::{ActionRef, ActorId, Spec};
use crate::supervisor::{Session, Supervisor};
use crate::trace::NewFirings;
use crate::watchdog::{Watchdog, WatchdogOptions};

mod connections;
mod shard;

pub use crate::loaded::{ActionProgram, ActorHost, BaseRef, FiringEnd, LoadedPlan, RegisterMemory};
use connections::{Connections, serve};
use shard::{Shard, ShardActor};

/// How long an orderly end waits for calls of other threads that use the session. Such calls are short.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// A running session. Dropping it stops the session. After a failure, all methods fail with the first cause.
#[derive(Debug)]
pub struct RunningSession {
    session: Arc<Session>,
    failures: Receiver<Failure>,
    /// Tokens added so far, by external action.
    tokens: Mutex<BTreeMap<ActionRef, u64>>,
    watchdog: Arc<Mutex<Watchdog>>,
    options: WatchdogOptions,
    watchdog_stop: Option<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    connections: Connections,
    rounds: u64,
}

/// Starts the actors of a loaded plan: calls [`prepare`] and [`RunningSession::begin`].
pub fn start(loaded: LoadedPlan, options: WatchdogOptions) -> Result<RunningSession, ActorError> {
    let mut running = prepare(loaded, options)?;
    running.begin()?;
    Ok(running)
}

/// Creates the actors of a loaded plan and the threads of its connections. [`RunningSession::begin`] starts the actors.
///
/// # Errors
/// Fails with [`ActorError::Spec`] if the plan is inconsistent, with [`ActorError::Loaded`] if the loaded parts do not
/// match the plan, and with [`ActorError::Thread`] if a thread cannot start.
pub fn prepare(loaded: LoadedPlan, options: WatchdogOptions) -> Result<RunningSession, ActorError> {
    check_loaded(&loaded)?;
    let LoadedPlan { spec, hosted, memory, engine, peers } = loaded;
    let (mut streams, mut programs) = (BTreeMap::new(), Vec::new());
    for (id, own) in hosted {
        streams.insert(id, own.stream);
        programs.push((id, own.programs));
    }
    let (remote, ends) = Remote::new(&spec, peers);
    let (session, failures) = Session::new(spec.clone(), streams, engine, remote);
    let memory = Arc::new(memory);
    let mut devices: BTreeMap<usize, Vec<(ActorId, Shard)>> = BTreeMap::new();
    for (id, programs) in programs {
        let shard = Shard::new(id, session.clone(), programs, memory.clone());
        devices.entry(spec.actor(id).device).or_default().push((id, shard));
    }
    let external = spec.all_actions().filter(|(at, x)| x.external && session.streams.contains_key(&at.actor));
    let tokens = external.map(|(at, _)| (at, 0)).collect();
    let mut running = RunningSession {
        failures,
        tokens: Mutex::new(tokens),
        watchdog: Arc::new(Mutex::new(Watchdog::new(options.clone()))),
        options,
        watchdog_stop: None,
        threads: Vec::new(),
        connections: Connections::default(),
        rounds: 0,
        session: session.clone(),
    };
    let actors = spawn(devices, &session, &mut running.threads)?;
    session.bus.connect(actors);
    // Starts the connections last, so that the actor that receives a peer's message already exists.
    let connections = serve(&session, ends, &memory);
    running.connections = connections.map_err(|e| ActorError::Thread { device: 0, message: e.to_string() })?;
    if let Some(every) = running.options.check_every {
        running.start_watchdog(every)?;
    }
    Ok(running)
}

/// Starts all actors, with one thread per device. If one device fails to start, stops the actors of all other devices.
fn spawn(
    devices: BTreeMap<usize, Vec<(ActorId, Shard)>>,
    session: &Arc<Session>,
    threads: &mut Vec<JoinHandle<()>>,
) -> Started {
    let mut actors: Vec<(ActorId, ActorRef<Mail>)> = Vec::new();
    for (device, shards) in devices {
        let started = start_device(device, shards, session).and_then(|(thread, started)| {
            threads.push(thread);
            let lost = |_| ActorError::Thread { device, message: "the thread ended during startup".into() };
            started.recv().map_err(lost)?
        });
        match started {
            Ok(started) => actors.extend(started),
            Err(error) => {
                // A device's thread ends when the device's actors have stopped.
                actors.iter().for_each(|a| a.1.stop(None));
                return Err(error);
            }
        }
    }
    Ok(actors)
}

type Started = Result<Vec<(ActorId, ActorRef<Mail>)>, ActorError>;

/// Starts the thread of a device. It runs the device's actors until all have stopped.
fn start_device(
    device: usize,
    shards: Vec<(ActorId, Shard)>,
    session: &Arc<Session>,
) -> Result<(JoinHandle<()>, Receiver<Started>), ActorError> {
    let failed = move |message: String| ActorError::Thread { device, message };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.map_err(|e| failed(e.to_string()))?;
    let (started, receiver) = bounded(1);
    let session = session.clone();
    let run = async move {
        let supervisor = match Actor::spawn(None, Supervisor, session.clone()).await {
            Ok(supervisor) => supervisor,
            Err(e) => return drop(started.send(Err(failed(e.to_string())))),
        };
        let (mut refs, mut ends) = (Vec::new(), vec![supervisor.1]);
        for (id, shard) in shards {
            match Actor::spawn_linked(None, ShardActor, shard, supervisor.0.get_cell()).await {
                Ok((actor, end)) => {
                    session.children.lock().push((actor.get_id(), id));
                    refs.push((id, actor));
                    ends.push(end);
                }
                Err(e) => return drop(started.send(Err(failed(e.to_string())))),
            }
        }
        // `spawn` waits for this message, so the receiver exists.
        let _ = started.send(Ok(refs));
        for end in ends.drain(1..) {
            // An error means a panic, which the supervisor has already reported.
            let _ = end.await;
        }
        // `drain` lets the supervisor process its queued reports about actors. `stop` would drop these reports.
        let _ = supervisor.0.drain();
        for end in ends {
            let _ = end.await;
        }
    };
    let thread = thread::Builder::new().name(format!("device {device} actors"));
    let thread = thread.spawn(move || runtime.block_on(run)).map_err(|e| failed(e.to_string()))?;
    Ok((thread, receiver))
}

impl RunningSession {
    /// Waits at most [`WatchdogOptions::wait_max`] until all peers have also called `begin`, then starts the actors.
    pub fn begin(&mut self) -> Result<(), Failure> {
        self.refresh()?;
        for actor in self.session.streams.keys() {
            self.session.bus.send(*actor, Cast::Event(ProtocolEvent::Start));
        }
        Ok(())
    }

    /// Lets an external action fire `tokens` more times. Fails with [`Failure::Protocol`] for any other action.
    pub fn add_tokens(&self, actor: ActorId, action: u32, tokens: u32) -> Result<(), Failure> {
        if let Some(failure) = self.session.first_failure() {
            return Err(failure);
        }
        let mut all = self.tokens.lock();
        let Some(count) = all.get_mut(&ActionRef { actor, action }) else {
            let actor = format!("{actor:?}");
            let cause = ProtocolError::UnexpectedToken { actor: actor.clone(), action };
            return Err(Failure::Protocol { actor, device: 0, cause });
        };
        *count += u64::from(tokens);
        let (whole, begun) = step_counts(&self.session.spec, &all);
        self.session.steps.set_steps(whole, begun);
        drop(all);
        // If the actor has stopped, the session fails, and the wait for results returns the cause.
        self.session.bus.send(actor, Cast::Event(ProtocolEvent::Token { action, count: tokens }));
        Ok(())
    }

    /// Blocks until all steps that have all their tokens have ended. Returns false if `timeout` passes first. The host
    /// may access the arenas only after this method has returned true.
    pub fn quiesce(&self, timeout: Duration) -> Result<bool, Failure> {
        let Session { steps, failure, .. } = &*self.session;
        let ended = failure.wait_until(timeout, || steps.whole_steps_have_ended())?;
        steps.clocks.join();
        Ok(ended)
    }

    /// Sends the bytes of `initial` registers to the peers that read them. Waits at most [`WatchdogOptions::wait_max`]
    /// for the peers' bytes. If an `initial` register was written outside the plan, all processes must call this method
    /// while no work is in flight. Sends only the slots that held the initial pieces. If the register has more slots,
    /// the current pieces may lie in those after the first step, and are then not sent.
    pub fn refresh(&mut self) -> Result<(), Failure> {
        self.rounds += 1;
        let session = &self.session;
        session.bus.remote().refresh(self.rounds, self.options.wait_max(), || session.first_failure())
    }

    /// Sends tensors through a port of this process to the host program of the port's receiver or, if the port names no
    /// receiver, to the host programs of all other processes.
    pub fn send_host_piece(&self, piece: &Arc<HostPiece>) {
        self.session.bus.remote().send_host_piece(piece, None);
    }

    /// Sets the process that the host program waits for in a step, if any. Stall reports name this process.
    pub fn host_waits_for(&self, process: Option<u32>) {
        self.session.hints.waits_for.store(process.map_or(-1, i64::from), Ordering::Relaxed);
    }

    /// Returns a handle for monitoring code. The handle does not keep the session alive.
    pub fn control(&self) -> Control {
        Control(Arc::downgrade(&self.session))
    }

    /// Returns the channel that receives the first cause once, when the session fails.
    pub fn failures(&self) -> &Receiver<Failure> {
        &self.failures
    }

    /// Enables or disables Inf/NaN checks on launch outputs, from the next firing on. The checks are slow.
    pub fn check_finite(&self, on: bool) {
        for stream in self.session.streams.values() {
            // An error means that the stream has ended. Then there is nothing to check.
            let _ = stream.check_finite(on);
        }
    }

    /// Returns the Inf/NaN findings since the last call, at most one per firing.
    pub fn take_not_finite(&self) -> Vec<NotFinite> {
        std::mem::take(&mut self.session.records.not_finite.lock())
    }

    /// Runs a watchdog check, for hosts with their own clock. `now` counts from the session's start. Returns the report
    /// of a new stall, or of a stall that ends the session.
    pub fn check_progress(&self, now: Duration) -> Option<String> {
        self.watchdog.lock().check(now, &self.session)
    }

    /// Stops the actors after their firings in flight, and discards unused tokens. Returns the last snapshot of each
    /// actor. Call [`RunningSession::quiesce`] first to finish all work.
    pub fn shutdown(mut self) -> Result<Vec<ActorSnapshot>, Failure> {
        self.stop();
        self.session.first_failure().map_or_else(|| Ok(self.session.snapshot()), Err)
    }

    fn stop(&mut self) {
        drop(self.watchdog_stop.take());
        self.session.bus.stop();
        if self.session.steps.any_in_flight() {
            // Members of a collective may have stopped already. Without the abort, which is not a failure, the other
            // members could wait forever.
            self.session.leave();
            self.session.engine.abort("the session was shut down");
        }
        for thread in self.threads.drain(..) {
            // These threads can panic only outside actors; there is nothing left to stop.
            let _ = thread.join();
        }
        let in_order = self.session.first_failure().is_none();
        self.session.leave();
        self.session.bus.remote().end();
        self.connections.close(in_order, || self.session.engine.abort("a peer did not read the queued data"));
        if in_order {
            // The last work may still use the arenas. A failed session does not wait: its streams may never finish.
            for stream in self.session.streams.values() {
                // A stream that has ended has finished its work.
                let _ = stream.synchronize();
            }
            // A notification or a `Control` may use the session for one more moment. Unless the wait times out, a drop
            // then frees all memory and communicators, even if the process ends immediately.
            let end = Instant::now() + RELEASE_TIMEOUT;
            while Arc::strong_count(&self.session) > 1 && Instant::now() < end {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn start_watchdog(&mut self, every: Duration) -> Result<(), ActorError> {
        let (stop, stopped) = bounded::<()>(0);
        let (watchdog, session, start) = (self.watchdog.clone(), self.session.clone(), Instant::now());
        let watch = move || {
            while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                watchdog.lock().check(start.elapsed(), &session);
            }
        };
        let thread = thread::Builder::new().name("watchdog".into()).spawn(watch);
        let thread = thread.map_err(|e| ActorError::Thread { device: 0, message: e.to_string() })?;
        self.watchdog_stop = Some(stop);
        self.threads.push(thread);
        Ok(())
    }
}

/// A handle to monitor a session and its peers from any thread. It does nothing once the session has been dropped.
#[derive(Clone, Debug)]
pub struct Control(Weak<Session>);

impl Control {
    /// Returns the state of each actor of this process; empty once the session has been dropped.
    pub fn snapshot(&self) -> Vec<ActorSnapshot> {
        self.0.upgrade().map_or_else(Vec::new, |session| session.snapshot())
    }

    /// Returns the ended firings of an actor of this process, from index `from` on.
    pub fn fired(&self, actor: ActorId, from: u64) -> NewFirings {
        let session = self.0.upgrade();
        session.and_then(|session| Some(session.records.rings.get(&actor)?.read(from))).unwrap_or_default()
    }

    /// Nanoseconds since the session's start. All firing times also count from this start.
    pub fn now_ns(&self) -> Option<u64> {
        self.0.upgrade().map(|session| session.activity.now_ns())
    }

    /// Sets the 99th percentile of the step time. The watchdog derives its stall limit from this time.
    pub fn set_step_p99(&self, p99: Duration) {
        let store = |session: Arc<Session>| session.hints.step_p99_ns.store(p99.as_nanos() as u64, Ordering::Relaxed);
        self.0.upgrade().into_iter().for_each(store);
    }

    /// Nanoseconds since the last progress, that is, since an actor last processed a message, a token or the end of
    /// a firing.
    pub fn idle_ns(&self) -> Option<u64> {
        self.0.upgrade().map(|session| session.activity.idle_ns())
    }

    /// True while a begun step has firings left.
    pub fn is_under_way(&self) -> bool {
        self.0.upgrade().is_some_and(|session| session.steps.outstanding())
    }

    /// Explains a hang. Returns `None` if there is progress, no step is in progress, or the session has been dropped.
    pub fn hang(&self) -> Option<Hang> {
        self.0.upgrade()?.explain().0
    }

    /// The cause of the session's failure, if it has failed.
    pub fn first_failure(&self) -> Option<Failure> {
        self.0.upgrade()?.first_failure()
    }

    /// The cause of the session's failure, with its time in nanoseconds since the session's start.
    pub fn failed_at(&self) -> Option<(u64, Failure)> {
        self.0.upgrade()?.failure.get()
    }

    /// Ends the session for an external cause. Only the first cause is kept.
    pub fn fail(&self, failure: Failure) {
        self.0.upgrade().into_iter().for_each(|session| session.fail(failure.clone()));
    }

    /// Records that a peer leaves in an orderly way. A broken connection to this peer is then not a failure.
    pub fn peer_left(&self, process: u32) {
        self.0.upgrade().into_iter().for_each(|session| session.peer_left(process));
    }

    /// Sets a callback that receives the first cause before anything stops. A session keeps only its first callback.
    pub fn on_failure(&self, callback: impl Fn(&Failure) + Send + Sync + 'static) {
        if let Some(session) = self.0.upgrade() {
            session.failure.set_callback(Box::new(callback));
        }
    }
}

impl Drop for RunningSession {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Returns the number of steps for which the host has added tokens: its minimum and maximum over external actions.
fn step_counts(spec: &Spec, tokens: &BTreeMap<ActionRef, u64>) -> (u64, u64) {
    let steps = || tokens.iter().map(|(at, count)| count / u64::from(spec.action(at.actor, at.action).per_step));
    (steps().min().unwrap_or(0), steps().max().unwrap_or(0))
}

#[cfg(test)]
mod stalls;
#[cfg(test)]
mod tests;
