//! State that the threads of one membership share: the peers, their messages, and the first cause.

use std::collections::BTreeMap;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use parking_lot::{Condvar, Mutex};

use super::cause::{Arbiter, FirstCause, Kind, Report};
use super::control_message::{Body, ControlMessage, MESSAGE_BYTES_MAX, truncated};
use super::datagram::{Heartbeat, Rejection};
use super::detector::{Detector, Event, PeerHealth};
use super::error::MembershipError;
use super::outbox::{Count, Outbox, Unsent};
use super::status::{Counters, MembershipEvent};
use crate::exit::Exit;

/// Maximum number of messages from peers that the application has not read yet.
pub(crate) const NOTICES_MAX: usize = 4096;

#[derive(Debug)]
pub(super) struct JoinOnDrop(pub(super) Option<JoinHandle<()>>);

impl Drop for JoinOnDrop {
    fn drop(&mut self) {
        // A panic of the thread is a bug, which the panic hook has already reported.
        let _ = self.0.take().map(JoinHandle::join);
    }
}

#[derive(Debug, Default)]
enum ControlState {
    #[default]
    Joining,
    Open(Outbox),
    Closed,
}

#[derive(Debug, Default)]
struct Peer {
    control: ControlState,
    left: bool,
    /// Number of urgent control messages sent to the peer, acknowledged by the peer, and received from the peer.
    urgent_sent: u64,
    urgent_acknowledged: u64,
    urgent_received: u64,
    last_heartbeat: Option<Duration>,
}

#[derive(Debug)]
struct State {
    peers: BTreeMap<u32, Peer>,
    arbiter: Arbiter,
    /// `None` until all peers are connected.
    detector: Option<Detector>,
    first: Option<FirstCause>,
    left: bool,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) own: u32,
    pub(crate) processes: u32,
    pub(crate) epoch: u64,
    start: Instant,
    state: Mutex<State>,
    /// Notified of new and closed connections, received messages, and the session's end.
    changed: Condvar,
    notices: Sender<MembershipEvent>,
    counters: Mutex<Counters>,
}

impl Shared {
    pub(crate) fn new(own: u32, processes: u32, epoch: u64, grace: Duration, notices: Sender<MembershipEvent>) -> Self {
        let state = State {
            peers: (0..processes).filter(|p| *p != own).map(|p| (p, Peer::default())).collect(),
            arbiter: Arbiter::new(own, processes, grace),
            detector: None,
            first: None,
            left: false,
        };
        Self {
            own,
            processes,
            epoch,
            start: Instant::now(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            notices,
            counters: Mutex::default(),
        }
    }

    fn count(&self, add: impl FnOnce(&mut Counters)) {
        add(&mut self.counters.lock());
    }

    pub(crate) fn counters(&self) -> Counters {
        *self.counters.lock()
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(crate) fn connected(&self, process: u32, outbox: Outbox) {
        if let Some(peer) = self.state.lock().peers.get_mut(&process) {
            peer.control = ControlState::Open(outbox);
        }
        self.changed.notify_all();
    }

    /// Handles the end of the control connection to a peer. It is a symptom of failure, except if the peer has left.
    pub(crate) fn disconnected(&self, process: u32) {
        let mut state = self.state.lock();
        if let Some(peer) = state.peers.get_mut(&process) {
            peer.control = ControlState::Closed;
            if state.detector.is_some() {
                self.report_lost(&mut state, process, "its control connection closed".into());
            }
        }
        self.changed.notify_all();
    }

    /// Blocks until all peers are connected, then starts the failure detector. After `within`, the call waits only for
    /// peers whose last heartbeat is younger than `deadline`.
    pub(crate) fn wait_for_peers(
        &self,
        within: Duration,
        at_most: Duration,
        deadline: Duration,
    ) -> Result<(), MembershipError> {
        let begin = self.now();
        let mut state = self.state.lock();
        loop {
            if let Some(first) = &state.first {
                return Err(MembershipError::Ended(first.clone()));
            }
            let now = self.now();
            let missing = || state.peers.iter().filter(|(_, peer)| matches!(peer.control, ControlState::Joining));
            if !state.arbiter.is_deciding() {
                let closed = state.peers.iter().find(|(_, peer)| matches!(peer.control, ControlState::Closed));
                if let Some((&process, _)) = closed {
                    return Err(MembershipError::Closed { process });
                }
                if missing().next().is_none() {
                    state.detector = Some(Detector::new(state.peers.keys().copied(), deadline, now));
                    return Ok(());
                }
            }
            let are_alive = missing().all(|(_, peer)| peer.last_heartbeat.is_some_and(|at| now < at + deadline));
            let waited = now - begin;
            if waited >= within && (!are_alive || waited >= at_most) {
                let processes = missing().map(|(process, _)| *process).collect();
                return Err(MembershipError::Missing { processes, seconds: waited.as_secs_f64() });
            }
            let left = if waited < within { within - waited } else { deadline.min(at_most - waited) };
            self.changed.wait_for(&mut state, left);
        }
    }

    /// The content of the next heartbeat: the process that this one has lost, if any. `None` sends no heartbeat: the
    /// session has ended for another cause, and peers detect missing heartbeats too.
    pub(crate) fn heartbeat(&self) -> Option<Option<u32>> {
        let state = self.state.lock();
        let lost = state.arbiter.lost_by_own();
        (state.first.is_none() || lost.is_some()).then_some(lost)
    }

    pub(crate) fn receive_heartbeat(&self, heartbeat: Heartbeat) {
        let mut state = self.state.lock();
        let (now, by) = (self.now(), heartbeat.process);
        if let Some(about) = heartbeat.lost {
            // Not a sign of life: the sender is ending. Its control message may be lost, as TCP needs both directions.
            let (cause, exit) = (String::new(), Exit::PeerUnavailable.code());
            let report = Report { by, about, kind: Kind::Lost, follows: false, cause, exit };
            if state.peers.get(&by).is_some_and(|peer| !peer.left) && state.arbiter.report(now, report) {
                tracing::warn!(by, about, "a peer's heartbeat reports a lost process");
            }
            return self.decide(&mut state);
        }
        if let Some(peer) = state.peers.get_mut(&by) {
            peer.last_heartbeat = Some(now);
        }
        if let Some(detector) = &mut state.detector {
            detector.receive(by, now);
        }
    }

    pub(crate) fn reject(&self, rejection: Rejection) {
        self.count(|c| {
            let counter = match rejection {
                Rejection::Format => &mut c.bad_format,
                Rejection::Mac => &mut c.bad_mac,
                Rejection::OldEpoch => &mut c.old_epoch,
                Rejection::NewerEpoch => &mut c.newer_epoch,
                Rejection::Session => &mut c.other_session,
                Rejection::Replay => &mut c.replays,
            };
            *counter += 1;
        });
        if rejection == Rejection::NewerEpoch {
            let cause = format!("fenced: it belongs to epoch {}, but a newer epoch has begun", self.epoch);
            self.fail(cause, Exit::Retry.code());
        }
    }

    pub(crate) fn tick(&self) {
        let mut state = self.state.lock();
        let now = self.now();
        let events = state.detector.as_mut().map(|d| d.tick(now)).unwrap_or_default();
        for event in events {
            match event {
                Event::Suspect { process, silent } => {
                    tracing::warn!(process, silent_ms = silent.as_millis() as u64, "heartbeats are late");
                }
                Event::Returned { process } => tracing::info!(process, "heartbeats are back"),
                Event::Lost { process, silent } => {
                    self.report_lost(&mut state, process, format!("no heartbeat for {:.1} s", silent.as_secs_f64()));
                }
                Event::Paused { pause } => {
                    tracing::warn!(pause_ms = pause.as_millis() as u64, "this process did not run");
                }
            }
        }
        self.decide(&mut state);
    }

    fn decide(&self, state: &mut State) {
        let Some(first) = state.arbiter.tick(self.now()) else { return };
        tracing::error!(process = first.process, exit = first.exit, cause = %first.cause, "session ends");
        state.first = Some(first.clone());
        // `notify` reserves a place for this event.
        let _ = self.notices.try_send(MembershipEvent::Ended(first));
        self.changed.notify_all();
    }

    pub(crate) fn fail(&self, cause: String, exit: u8) {
        let mut state = self.state.lock();
        self.fail_locked(&mut state, cause, exit);
    }

    fn fail_locked(&self, state: &mut State, cause: String, exit: u8) {
        let report = state.arbiter.own_failure(truncated(cause), exit);
        self.add_own_report(state, report);
        self.decide(state);
    }

    /// Records this process's report and sends it to all peers. Returns false if the report is not new.
    fn add_own_report(&self, state: &mut State, report: Report) -> bool {
        let is_new = state.arbiter.report(self.now(), report.clone());
        if is_new {
            self.broadcast(state, Body::Report(report));
        }
        is_new
    }

    pub(crate) fn suspect(&self, process: u32, cause: String) {
        let mut state = self.state.lock();
        self.report_lost(&mut state, process, cause);
        self.decide(&mut state);
    }

    fn report_lost(&self, state: &mut State, about: u32, cause: String) {
        if state.peers.get(&about).is_none_or(|p| p.left) {
            return;
        }
        let report = state.arbiter.own_symptom(about, truncated(cause), Exit::PeerUnavailable.code());
        if self.add_own_report(state, report.clone()) {
            tracing::warn!(process = about, cause = report.cause, "peer lost");
        }
    }

    fn broadcast(&self, state: &mut State, body: Body) {
        let message = body.into();
        for peer in state.peers.values_mut() {
            let ControlState::Open(outbox) = &peer.control else { continue };
            // An error means that the connection has just ended; `disconnected` reports that.
            if outbox.send(&message).is_ok() {
                peer.urgent_sent += 1;
            }
        }
    }

    /// Counts invalid control messages of a peer.
    pub(crate) fn garbled(&self, process: u32, reason: &str) {
        tracing::warn!(process, reason, "rejected a control message");
        self.count(|c| c.garbled += 1);
    }

    pub(crate) fn receive(&self, by: u32, message: ControlMessage) {
        let mut state = self.state.lock();
        self.receive_locked(&mut state, by, message);
        self.decide(&mut state);
        self.changed.notify_all();
    }

    fn receive_locked(&self, state: &mut State, by: u32, message: ControlMessage) {
        let (Some(peer), now) = (state.peers.get_mut(&by), self.now()) else { return };
        match message.body {
            Body::Message { topic } => {
                return self.notify(state, MembershipEvent::Message { from: by, topic, bytes: message.payload });
            }
            Body::Received { urgent } if urgent <= peer.urgent_sent => {
                peer.urgent_acknowledged = urgent;
                return;
            }
            Body::Received { .. } | Body::Joined => return self.count(|c| c.garbled += 1),
            Body::Report(Report { by: reporter, .. }) if reporter != by => return self.count(|c| c.garbled += 1),
            Body::Leaving => {
                peer.left = true;
                if let Some(detector) = &mut state.detector {
                    detector.forget(by);
                }
                // `notify` reserves a place for one `Left` of each peer.
                let _ = self.notices.try_send(MembershipEvent::Left { process: by });
            }
            Body::Report(report) => drop(state.arbiter.report(now, report)),
        }
        let Some(peer) = state.peers.get_mut(&by) else { return };
        peer.urgent_received += 1;
        // Acknowledgements are not acknowledged, so their number is limited by that of urgent messages.
        if let ControlState::Open(outbox) = &peer.control {
            let _ = outbox.send(&Body::Received { urgent: peer.urgent_received }.into());
        }
    }

    fn notify(&self, state: &mut State, event: MembershipEvent) {
        if self.notices.len() < NOTICES_MAX {
            // This cannot fail: the places for `Left` and `Ended` are additional.
            let _ = self.notices.try_send(event);
        } else {
            let cause = format!("the application has not read {NOTICES_MAX} messages of peers");
            self.fail_locked(state, cause, Exit::Internal.code());
        }
    }

    pub(crate) fn send(&self, to: u32, topic: u16, bytes: Vec<u8>) -> Result<(), MembershipError> {
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(MembershipError::TooLarge { bytes: bytes.len() });
        }
        let mut state = self.state.lock();
        if let Some(first) = &state.first {
            return Err(MembershipError::Ended(first.clone()));
        }
        if state.left {
            return Err(MembershipError::Left);
        }
        let Some(peer) = state.peers.get_mut(&to) else {
            return Err(MembershipError::NoPeer { process: to, processes: self.processes });
        };
        let (ControlState::Open(outbox), false) = (&peer.control, peer.left) else {
            return Err(MembershipError::Gone { process: to });
        };
        let message = ControlMessage { body: Body::Message { topic }, payload: bytes };
        outbox.send(&message).map_err(|unsent| match unsent {
            Unsent::Closed => MembershipError::Gone { process: to },
            Unsent::Full(Count { messages, bytes }) => MembershipError::Backlog { process: to, messages, bytes },
        })
    }

    /// Leaves cleanly: notifies peers. From now on no failure ends this process's session.
    pub(crate) fn leave(&self) {
        let mut state = self.state.lock();
        if state.first.is_none() && !state.left {
            state.left = true;
            state.arbiter.close();
            self.broadcast(&mut state, Body::Leaving);
        }
    }

    /// True if the session has ended for this process, cleanly or not.
    pub(crate) fn has_ended(&self) -> bool {
        let state = self.state.lock();
        state.left || state.first.is_some()
    }

    pub(crate) fn first_cause(&self) -> Option<FirstCause> {
        self.state.lock().first.clone()
    }

    /// Waits until all connected peers have acknowledged the urgent control messages, and thereby all earlier messages.
    /// Returns false on timeout. Does not wait for lost peers.
    pub(crate) fn wait_for_delivery(&self, timeout: Duration) -> bool {
        let is_delivered =
            |p: &Peer| !matches!(p.control, ControlState::Open(_)) || p.urgent_acknowledged == p.urgent_sent;
        let is_lost = |state: &State, process: u32| {
            let health = state.detector.as_ref().and_then(|d| d.health(process, self.now()));
            health.is_some_and(|(health, _)| health == PeerHealth::Lost)
        };
        let done =
            |state: &State| state.peers.iter().all(|(process, peer)| is_delivered(peer) || is_lost(state, *process));
        let mut state = self.state.lock();
        self.changed.wait_while_for(&mut state, |state| !done(state), timeout);
        done(&state)
    }

    pub(crate) fn silent_times(&self) -> Vec<(u32, Option<Duration>)> {
        let (state, now) = (self.state.lock(), self.now());
        let silent = |process| Some(state.detector.as_ref()?.health(process, now)?.1);
        state.peers.keys().map(|process| (*process, silent(*process))).collect()
    }
}
