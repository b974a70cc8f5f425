//! Runs a loaded plan: one thread for each device hosts its actors.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use ractor::{Actor, ActorRef};
use shardflow_kernels::collective::Collective;
use shardflow_kernels::memory::Base;
use shardflow_kernels::op::Program;
use shardflow_kernels::stream::Stream;

use crate::check::check;
use crate::error::{ActorError, Failure};
use crate::hang::Hang;
use crate::message::{Cast, Mail};
use crate::protocol::ProtocolEvent;
use crate::remote::{Connections, HostPiece, Peers, Remote, serve};
use crate::snapshot::{ActorSnapshot, NotFinite};
use crate::spec::{ActorId, RegisterId, Spec};
use crate::supervisor::{OnFailure, Session, Supervisor};
use crate::trace::NewFirings;
use crate::watchdog::{Watchdog, WatchdogOptions};

mod loaded;
mod shard;

use shard::{Shard, ShardActor};

/// What one action launches.
#[derive(Clone, Debug)]
pub struct ActionProgram {
    /// Its signals' tags are the output ports that are `early`, each once.
    pub program: Arc<Program>,
    /// The program's bases, in order.
    pub bases: Vec<BaseRef>,
}

/// Where a base of a program lies.
#[derive(Clone, Debug)]
pub enum BaseRef {
    /// Always there: parameters' optimizer state, scratch memory.
    Fixed(Base),
    /// The slot that the firing reads at this input port.
    Input(usize),
    /// The slot that the firing writes at this output port.
    Output(usize),
}

/// Where a register's slots lie: slot `i` at `base.offset + i * stride`.
#[derive(Clone, Debug)]
pub struct RegisterMemory {
    /// Slot 0.
    pub base: Base,
    /// Bytes from one slot to the next.
    pub stride: usize,
}

/// What an actor of this process runs on.
#[derive(Debug)]
pub struct ActorHost {
    /// Its own.
    pub stream: Stream,
    /// By action.
    pub programs: Vec<ActionProgram>,
}

/// A plan with all that this process's part of it runs on.
#[derive(Debug)]
pub struct LoadedPlan {
    /// The whole plan.
    pub spec: Arc<Spec>,
    /// The actors of this process: all, or those that no peer hosts.
    pub hosted: BTreeMap<ActorId, ActorHost>,
    /// The registers that they write or read. One that a peer produces lies in the peer's memory, mapped here, or in a
    /// mirror that the peer fills.
    pub memory: BTreeMap<RegisterId, RegisterMemory>,
    /// Aborted when the session fails.
    pub engine: Arc<dyn Collective>,
    /// The other processes; none where this one hosts all actors.
    pub peers: Peers,
}

/// What a session leaves behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionSummary {
    /// The last state of each actor.
    pub actors: Vec<ActorSnapshot>,
}

/// A running session. Dropping it stops it.
#[derive(Debug)]
pub struct RunningSession {
    session: Arc<Session>,
    failures: Receiver<Failure>,
    /// Tokens given so far, by actor and action, for the external ones.
    given: Mutex<BTreeMap<(ActorId, u32), u64>>,
    watchdog: Arc<Mutex<Watchdog>>,
    options: WatchdogOptions,
    /// Dropping it ends the watchdog's thread.
    watching: Option<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    connections: Connections,
    /// Refreshes so far.
    rounds: u64,
}

/// Starts the actors of a loaded plan: [`prepare`] and [`RunningSession::begin`].
///
/// # Errors
/// Those of [`prepare`], and [`ActorError::Ended`] when a peer does not start its actors too.
pub fn start(loaded: LoadedPlan, options: WatchdogOptions) -> Result<RunningSession, ActorError> {
    let mut running = prepare(loaded, options)?;
    running.begin().map_err(|failure| ActorError::Ended { cause: failure.to_string() })?;
    Ok(running)
}

/// Makes the actors of a loaded plan and the threads of its connections. [`RunningSession::begin`] lets them fire.
///
/// # Errors
/// [`ActorError::Spec`] or [`ActorError::Loaded`] when the parts do not fit, [`ActorError::Thread`] without threads.
pub fn prepare(loaded: LoadedPlan, options: WatchdogOptions) -> Result<RunningSession, ActorError> {
    check(&loaded.spec)?;
    loaded::check(&loaded)?;
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
        devices.entry(spec.actors[id.0 as usize].device).or_default().push((id, shard));
    }
    let external = session.streams.keys().flat_map(|&a| {
        let external = spec.actors[a.0 as usize].actions.iter().enumerate().filter(|(_, x)| x.external);
        external.map(move |(x, _)| ((a, x as u32), 0))
    });
    let mut running = RunningSession {
        failures,
        given: Mutex::new(external.collect()),
        watchdog: Arc::new(Mutex::new(Watchdog::new(options.clone()))),
        options,
        watching: None,
        threads: Vec::new(),
        connections: Connections::default(),
        rounds: 0,
        session: session.clone(),
    };
    let actors = spawn(devices, &session, &mut running.threads)?;
    session.bus.connect(actors);
    // Only now, so that a message of a peer finds its actor.
    let connections = serve(&session, ends, &memory);
    running.connections = connections.map_err(|e| ActorError::Thread { device: 0, message: e.to_string() })?;
    if let Some(every) = running.options.check_every {
        running.watch(every)?;
    }
    Ok(running)
}

/// Starts all actors, on a thread for each device; all or none.
fn spawn(
    devices: BTreeMap<usize, Vec<(ActorId, Shard)>>,
    session: &Arc<Session>,
    threads: &mut Vec<JoinHandle<()>>,
) -> Result<Vec<(ActorId, ActorRef<Mail>)>, ActorError> {
    let mut actors = Vec::new();
    let mut fault = None;
    for (device, shards) in devices {
        let started = host(device, shards, session).and_then(|(thread, started)| {
            threads.push(thread);
            let lost = |_| ActorError::Thread { device, message: "it ended while starting".into() };
            started.recv().map_err(lost)?
        });
        match started {
            Ok(started) => actors.extend(started),
            Err(e) => fault = Some(e),
        }
    }
    match fault {
        None => Ok(actors),
        Some(fault) => {
            // Their threads end with them.
            actors.iter().for_each(|a| a.1.stop(None));
            Err(fault)
        }
    }
}

type Started = Result<Vec<(ActorId, ActorRef<Mail>)>, ActorError>;

/// Starts a device's thread, which runs its actors until all have stopped.
fn host(
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
                    session.adopt(actor.get_id(), id);
                    refs.push((id, actor));
                    ends.push(end);
                }
                Err(e) => return drop(started.send(Err(failed(e.to_string())))),
            }
        }
        // `start` waits for this, so the receiver is there.
        let _ = started.send(Ok(refs));
        for end in ends.drain(1..) {
            // An error is the panic that the supervisor has reported.
            let _ = end.await;
        }
        // Takes in the reports of the last actors before it ends, as `stop` would not.
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
    /// Waits until all peers have come as far, for [`WatchdogOptions::wait_max`], and starts the actors. They fire as soon as
    /// the host gives tokens.
    ///
    /// # Errors
    /// The first cause, if the session fails meanwhile; a peer that does not come.
    pub fn begin(&mut self) -> Result<(), Failure> {
        self.refresh()?;
        for actor in self.session.streams.keys() {
            self.session.bus.send(*actor, Cast::Event(ProtocolEvent::Start));
        }
        Ok(())
    }

    /// Lets an external action fire `tokens` times more.
    ///
    /// # Errors
    /// [`ActorError::NotExternal`], or [`ActorError::Ended`] with the first cause.
    pub fn give(&self, actor: ActorId, action: u32, tokens: u32) -> Result<(), ActorError> {
        if let Some(failure) = self.session.first_failure() {
            return Err(ActorError::Ended { cause: failure.to_string() });
        }
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(count) = given.get_mut(&(actor, action)) else {
            return Err(ActorError::NotExternal { actor, action });
        };
        *count += u64::from(tokens);
        let (whole, begun) = steps(&self.session.spec, &given);
        self.session.set_steps(whole, begun);
        drop(given);
        let event = ProtocolEvent::Token { action, count: tokens };
        if self.session.bus.send(actor, Cast::Event(event)) {
            return Ok(());
        }
        let cause = self.session.first_failure().map_or("its actors have stopped".into(), |f| f.to_string());
        Err(ActorError::Ended { cause })
    }

    /// Blocks until all firings of the whole steps that tokens were given for have ended; false when `timeout` ends first.
    /// Only then may the host touch the arenas.
    ///
    /// # Errors
    /// The first cause, when the session has failed.
    pub fn quiesce(&self, timeout: Duration) -> Result<bool, Failure> {
        self.session.quiesce(timeout)
    }

    /// Sends the bytes of the registers that hold a piece from the start to the peers that read them, and waits until all
    /// peers have done so: to be called by all processes when such a register was written outside the plan, with no work in
    /// flight. Peers may take [`WatchdogOptions::wait_max`].
    ///
    /// # Errors
    /// The first cause, if the session fails meanwhile; a peer that does not come in time.
    pub fn refresh(&mut self) -> Result<(), Failure> {
        self.rounds += 1;
        let session = &self.session;
        session.bus.remote().refresh(self.rounds, self.options.wait_max(), || session.first_failure())
    }

    /// Gives tensors to the programs of all other processes, by a port of this process.
    pub fn give_host(&self, piece: HostPiece) {
        self.session.bus.remote().give(piece);
    }

    /// The program waits for another process's part of a step, or no more: for [`RunningSession::tick`]'s reports.
    pub fn host_waits_for(&self, process: Option<u32>) {
        self.session.host_waits_for.store(process.map_or(-1, i64::from), Ordering::Relaxed);
    }

    /// For whoever watches the other processes; it does not keep the session alive.
    pub fn control(&self) -> Control {
        Control(Arc::downgrade(&self.session))
    }

    /// Gets the first cause, once, when the session fails.
    pub fn failures(&self) -> &Receiver<Failure> {
        &self.failures
    }

    /// What the session has failed for, if it has.
    pub fn first_failure(&self) -> Option<Failure> {
        self.session.first_failure()
    }

    /// Has all streams look at the floats that each launch writes, from the next firing on, or no more. Slow.
    pub fn check_finite(&self, on: bool) {
        self.session.check_finite(on);
    }

    /// What streams that check have found since this was last called, at most one thing for each firing.
    pub fn take_found(&self) -> Vec<NotFinite> {
        self.session.take_found()
    }

    /// What each actor is doing.
    pub fn snapshot(&self) -> Vec<ActorSnapshot> {
        self.session.snapshot()
    }

    /// Lets the watchdog look once, `now` being the time since the start. Returns its report when the session has just
    /// stalled. For hosts (and tests) that have a clock of their own; a watchdog's thread does the same.
    pub fn tick(&self, now: Duration) -> Option<String> {
        self.watchdog.lock().unwrap_or_else(PoisonError::into_inner).tick(now, &self.session)
    }

    /// Stops the actors after their firings in flight; firings that tokens are left for do not happen. Use
    /// [`RunningSession::quiesce`] first to let all work end.
    ///
    /// # Errors
    /// The first cause, when the session has failed.
    pub fn shutdown(mut self) -> Result<SessionSummary, Failure> {
        self.stop();
        match self.session.first_failure() {
            Some(failure) => Err(failure),
            None => Ok(SessionSummary { actors: self.session.snapshot() }),
        }
    }

    fn stop(&mut self) {
        drop(self.watching.take());
        self.session.bus.stop();
        if self.session.any_in_flight() {
            // Its members may have stopped already, so a collective in flight would wait for ever. What breaks with it is no
            // failure.
            self.session.leave();
            self.session.abort_collectives("the session was shut down");
        }
        for thread in self.threads.drain(..) {
            // A panic of these threads would be outside any actor; there is nothing left to stop.
            let _ = thread.join();
        }
        let in_order = self.session.first_failure().is_none();
        self.session.leave();
        self.session.bus.remote().end();
        self.connections.close(in_order, || self.session.abort_collectives("a peer has not taken what is sent to it"));
        if in_order {
            // What runs last may still use the arenas. A failed session may be failed because this would not end.
            for stream in self.session.streams.values() {
                // A stream that has ended has done all it had.
                let _ = stream.synchronize();
            }
        }
    }

    fn watch(&mut self, every: Duration) -> Result<(), ActorError> {
        let (watching, ended) = bounded::<()>(0);
        let (watchdog, session, start) = (self.watchdog.clone(), self.session.clone(), Instant::now());
        let watch = move || {
            while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                watchdog.lock().unwrap_or_else(PoisonError::into_inner).tick(start.elapsed(), &session);
            }
        };
        let thread = thread::Builder::new().name("watchdog".into()).spawn(watch);
        let thread = thread.map_err(|e| ActorError::Thread { device: 0, message: e.to_string() })?;
        self.watching = Some(watching);
        self.threads.push(thread);
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn cast(&self, actor: ActorId, cast: Cast) -> bool {
        self.session.bus.send(actor, cast)
    }
}

/// A handle on a session for whoever watches it or its peers, from any thread. Does nothing once the session is gone.
#[derive(Clone, Debug)]
pub struct Control(Weak<Session>);

impl Control {
    /// What each actor of this process is doing; empty once the session is gone.
    pub fn snapshot(&self) -> Vec<ActorSnapshot> {
        self.0.upgrade().map_or_else(Vec::new, |session| session.snapshot())
    }

    /// Firings of an actor of this process that have ended, from the `from`-th on.
    pub fn fired(&self, actor: ActorId, from: u64) -> NewFirings {
        let session = self.0.upgrade();
        session.and_then(|session| Some(session.rings.get(&actor)?.read(from))).unwrap_or_default()
    }

    /// Nanoseconds since the session's start, which all times of firings count from.
    pub fn now_ns(&self) -> Option<u64> {
        self.0.upgrade().map(|session| session.now_ns())
    }

    /// 99 of 100 steps take so long at most, which tells the watchdog what is too long: [`WatchdogOptions::stall_after`].
    pub fn steps_take(&self, p99: Duration) {
        if let Some(session) = self.0.upgrade() {
            session.step_p99_ns.store(p99.as_nanos() as u64, Ordering::Relaxed);
        }
    }

    /// Nanoseconds since anything moved: an actor took in a message, a token or the end of a firing.
    pub fn idle_ns(&self) -> Option<u64> {
        self.0.upgrade().map(|session| session.idle_ns())
    }

    /// True while firings are left of a step that the program has begun.
    pub fn is_under_way(&self) -> bool {
        self.0.upgrade().is_some_and(|session| session.outstanding())
    }

    /// Why nothing moves, if that is so; `None` when something does, no step is under way, or the session is gone.
    pub fn hang(&self) -> Option<Hang> {
        self.0.upgrade()?.explain().0
    }

    /// What the session has failed for, if it has.
    pub fn first_failure(&self) -> Option<Failure> {
        self.0.upgrade()?.first_failure()
    }

    /// The same, and when, nanoseconds since the session's start.
    pub fn failed_at(&self) -> Option<(u64, Failure)> {
        let session = self.0.upgrade()?;
        Some((session.failed_ns(), session.first_failure()?))
    }

    /// Ends the session for a cause from outside it. Only the first cause is kept.
    pub fn fail(&self, failure: Failure) {
        self.0.upgrade().into_iter().for_each(|session| session.fail(failure.clone()));
    }

    /// A peer ends in order: what breaks with it is no failure.
    pub fn peer_left(&self, process: u32) {
        self.0.upgrade().into_iter().for_each(|session| session.peer_left(process));
    }

    /// Has the first cause told to `tell`, before anything is stopped for it; once for each session.
    pub fn on_failure(&self, tell: impl Fn(&Failure) + Send + Sync + 'static) {
        if let Some(session) = self.0.upgrade() {
            session.on_failure(OnFailure(Box::new(tell)));
        }
    }
}

impl Drop for RunningSession {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Steps that these tokens are enough for, and those that they are enough to begin.
fn steps(spec: &Spec, given: &BTreeMap<(ActorId, u32), u64>) -> (u64, u64) {
    let per_step = |(actor, action): &(ActorId, u32)| spec.actors[actor.0 as usize].actions[*action as usize].per_step;
    let steps = || given.iter().map(|(at, count)| count / u64::from(per_step(at)));
    (steps().min().unwrap_or(0), steps().max().unwrap_or(0))
}

#[cfg(test)]
mod stalls;
#[cfg(test)]
mod tests;
