//! State that the threads of one membership share. Each change has effects: messages, notices and results.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::cause::FirstCause;
use super::control_message::{Body, ControlMessage, MESSAGE_BYTES_MAX, TO_ALL};
use super::core::{Core, Effect, Link, Peer};
use super::datagram::{Heartbeat, MostSilent, Rejection};
use super::detector::PeerHealth;
use super::error::MembershipError;
use super::outbox::{Count, Outbox, Unsent};
use super::reduce::{self, MergeRule, Reduced};
use super::rounds::TOPICS_MAX;
use super::status::{Counters, MembershipEvent};
use super::tree::ControlTree;
use crate::exit::Exit;

/// Maximum number of peer messages that the application has not read yet.
pub(crate) const NOTICES_MAX: usize = 4096;

#[derive(Debug)]
pub(super) struct JoinOnDrop(pub(super) Option<JoinHandle<()>>);

impl Drop for JoinOnDrop {
    fn drop(&mut self) {
        // A panic of the thread is a bug; the panic hook has reported it.
        let _ = self.0.take().map(JoinHandle::join);
    }
}

#[derive(Debug)]
struct State {
    core: Core,
    /// Outboxes of the neighbours that have joined.
    outboxes: BTreeMap<u32, Outbox>,
    /// For each topic: both ends of the channel of results.
    results: BTreeMap<u16, (Sender<Reduced>, Receiver<Reduced>)>,
}

impl State {
    fn results(&mut self, topic: u16) -> &(Sender<Reduced>, Receiver<Reduced>) {
        self.results.entry(topic).or_insert_with(unbounded)
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) own: u32,
    pub(crate) tree: Arc<ControlTree>,
    pub(crate) epoch: u64,
    start: Instant,
    state: Mutex<State>,
    /// Notified about connections, acknowledgements and the session's end.
    changed: Condvar,
    notices: Sender<MembershipEvent>,
    counters: Mutex<Counters>,
}

impl Shared {
    /// `limits` contains the heartbeat deadline and the grace window.
    pub(crate) fn new(
        own: u32,
        tree: Arc<ControlTree>,
        epoch: u64,
        limits: (Duration, Duration),
        notices: Sender<MembershipEvent>,
    ) -> Self {
        let core = Core::new(own, tree.clone(), limits.0, limits.1);
        let state = State { core, outboxes: BTreeMap::new(), results: BTreeMap::new() };
        Self {
            own,
            tree,
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
        let garbled = self.state.lock().core.garbled;
        let counters = *self.counters.lock();
        Counters { garbled: counters.garbled + garbled, ..counters }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Changes the state, carries out the effects, and wakes waiting threads.
    fn change<R>(&self, change: impl FnOnce(&mut Core, Duration) -> R) -> R {
        let mut state = self.state.lock();
        let changed = change(&mut state.core, self.now());
        self.carry_out(&mut state);
        changed
    }

    fn carry_out(&self, state: &mut MutexGuard<'_, State>) {
        while let Some(effect) = state.core.effects.pop_front() {
            match effect {
                Effect::Send { to, message } => self.pass_on(state, to, &message),
                Effect::Notify(event) => self.notify(state, event),
                // The send cannot fail, because the receiver is in the same map.
                Effect::Reduced { topic, reduced } => drop(state.results(topic).0.send(reduced)),
            }
        }
        self.changed.notify_all();
    }

    /// Queues a message of the membership itself, or one that this process passes on.
    fn pass_on(&self, state: &mut State, to: u32, message: &ControlMessage) {
        // If the connection has just ended, `disconnected` reports it.
        let Some(outbox) = state.outboxes.get(&to) else { return };
        if let Err(Unsent::Full(Count { messages, bytes })) = outbox.send(message) {
            // Does not wait for room in the queue, because waiting would also delay reports of failures.
            let cause = format!("it does not read its messages: {messages} messages ({bytes} bytes) are queued for it");
            state.core.suspect(to, cause, self.now());
        }
    }

    fn notify(&self, state: &mut State, event: MembershipEvent) {
        if !matches!(event, MembershipEvent::Message { .. }) || self.notices.len() < NOTICES_MAX {
            // The channel has additional room, reserved for `Left` and `Ended`.
            let _ = self.notices.try_send(event);
        } else {
            let cause = format!("the application has not read {NOTICES_MAX} messages of peers");
            state.core.fail(cause, Exit::Internal.code(), self.now());
        }
    }

    pub(crate) fn connected(&self, process: u32, outbox: Outbox) {
        let mut state = self.state.lock();
        state.outboxes.insert(process, outbox);
        state.core.connected(process, self.now());
        self.carry_out(&mut state);
    }

    /// Handles the end of the control connection to a peer. It is a symptom of a failure, unless the peer has left.
    pub(crate) fn disconnected(&self, process: u32, how: &str) {
        self.change(|core, now| core.disconnected(process, how, now));
    }

    /// Blocks until all processes have joined. After `within`, it keeps waiting only while every missing neighbour has
    /// sent a heartbeat within the last `deadline`, and for at most `at_most` in total.
    pub(crate) fn wait_for_peers(
        &self,
        within: Duration,
        at_most: Duration,
        deadline: Duration,
    ) -> Result<(), MembershipError> {
        let begin = self.now();
        let mut state = self.state.lock();
        if self.tree.processes() == 1 {
            return Ok(());
        }
        loop {
            let core = &state.core;
            if let Some(first) = &core.first {
                return Err(MembershipError::Ended(first.clone()));
            }
            let now = self.now();
            if !core.arbiter.is_deciding() {
                let closed = core.peers.iter().find(|(_, peer)| peer.link == Link::Closed);
                if let Some((&process, _)) = closed {
                    return Err(MembershipError::Closed { process });
                }
                if core.has_joined() {
                    return Ok(());
                }
            }
            let is_alive = |peer: &Peer| peer.last_heartbeat.is_some_and(|at| now < at + deadline);
            let are_alive = core.missing_peers().all(|(_, peer)| is_alive(peer));
            let waited = now - begin;
            if waited >= within && (!are_alive || waited >= at_most) {
                let processes = core.missing_peers().map(|(process, _)| process).collect();
                return Err(MembershipError::Missing { processes, seconds: waited.as_secs_f64() });
            }
            let left = if waited < within { within - waited } else { deadline.min(at_most - waited) };
            self.changed.wait_for(&mut state, left);
        }
    }

    /// The content of the next heartbeats: see [`Core::heartbeats`].
    pub(crate) fn heartbeats(&self) -> Vec<(u32, Option<u32>, Option<MostSilent>)> {
        self.state.lock().core.heartbeats(self.now())
    }

    pub(crate) fn receive_heartbeat(&self, heartbeat: Heartbeat) {
        self.change(|core, now| core.receive_heartbeat(heartbeat, now));
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
            let cause = format!("it belongs to epoch {}, but a newer epoch has begun", self.epoch);
            self.fail(cause, Exit::Retry.code());
        }
    }

    pub(crate) fn tick(&self) {
        self.change(Core::tick);
    }

    pub(crate) fn fail(&self, cause: String, exit: u8) {
        self.change(|core, now| core.fail(cause, exit, now));
    }

    pub(crate) fn suspect(&self, process: u32, cause: String) {
        self.change(|core, now| core.suspect(process, cause, now));
    }

    /// Counts bytes from a peer that are not a valid control message.
    pub(crate) fn garbled(&self, process: u32, reason: &str) {
        tracing::warn!(process, reason, "rejected a control message");
        self.count(|c| c.garbled += 1);
    }

    pub(crate) fn receive(&self, by: u32, message: ControlMessage) {
        self.change(|core, now| core.receive(by, message, now));
    }

    fn check_running(&self, core: &Core) -> Result<(), MembershipError> {
        match &core.first {
            Some(first) => Err(MembershipError::Ended(first.clone())),
            None if core.left => Err(MembershipError::Left),
            None => Ok(()),
        }
    }

    /// Sends the application's message to a process, or to all.
    pub(crate) fn send(&self, to: Option<u32>, topic: u16, bytes: Vec<u8>) -> Result<(), MembershipError> {
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(MembershipError::TooLarge { bytes: bytes.len() });
        }
        let state = self.state.lock();
        self.check_running(&state.core)?;
        let processes = self.tree.processes();
        let hops = match to {
            Some(to) if to == self.own || to >= processes => {
                return Err(MembershipError::NoPeer { process: to, processes });
            }
            Some(to) => vec![(to, state.core.route(to))],
            None => state.core.peers.keys().map(|peer| (*peer, state.core.route(*peer))).collect(),
        };
        let body = Body::Message { from: self.own, to: to.unwrap_or(TO_ALL), topic };
        let message = ControlMessage { body, payload: bytes };
        let send = |(to, hop): (u32, Option<u32>)| {
            let outbox = hop.and_then(|hop| state.outboxes.get(&hop)).ok_or(MembershipError::Gone { process: to })?;
            outbox.send(&message).map_err(|unsent| match unsent {
                Unsent::Closed => MembershipError::Gone { process: to },
                Unsent::Full(Count { messages, bytes }) => {
                    MembershipError::Backlog { process: hop.unwrap_or(to), messages, bytes }
                }
            })
        };
        // All neighbours get the message, even if sending to one of them fails.
        let sent: Vec<_> = hops.into_iter().map(send).collect();
        sent.into_iter().collect()
    }

    /// Supplies this process's numbers to a topic's next round.
    pub(crate) fn supply(
        &self,
        topic: u16,
        rules: &Arc<[MergeRule]>,
        fields: Vec<Vec<u64>>,
    ) -> Result<Receiver<Reduced>, MembershipError> {
        if topic >= TOPICS_MAX || !reduce::fits(rules, self.own, &fields) {
            return Err(MembershipError::Numbers { topic });
        }
        let bytes = reduce::bytes_max(rules, self.tree.processes());
        if bytes > MESSAGE_BYTES_MAX {
            return Err(MembershipError::TooLarge { bytes });
        }
        let mut state = self.state.lock();
        self.check_running(&state.core)?;
        let results = state.results(topic).1.clone();
        state.core.supply(topic, rules.clone(), fields, self.now());
        self.carry_out(&mut state);
        Ok(results)
    }

    /// The process whose numbers are missing in the topic's round, and whether that process has left.
    pub(crate) fn missing(&self, topic: u16) -> Option<(u32, bool)> {
        let state = self.state.lock();
        let process = state.core.missing(topic)?;
        Some((process, state.core.has_departed(process)))
    }

    pub(crate) fn has_left(&self, process: u32) -> bool {
        self.state.lock().core.has_departed(process)
    }

    /// Leaves the session cleanly and notifies peers. After that, no event counts as a failure for this process.
    pub(crate) fn leave(&self) {
        self.change(|core, _| core.leave());
    }

    /// True if the session has ended for this process, cleanly or not.
    pub(crate) fn has_ended(&self) -> bool {
        let state = self.state.lock();
        state.core.left || state.core.first.is_some()
    }

    pub(crate) fn first_cause(&self) -> Option<FirstCause> {
        self.state.lock().core.first.clone()
    }

    /// Waits until all connected neighbours have acknowledged all urgent control messages. They have then also received
    /// all earlier messages. Returns false on timeout. Does not wait for neighbours that are already lost.
    pub(crate) fn wait_for_delivery(&self, timeout: Duration) -> bool {
        let is_delivered = |p: &Peer| p.link != Link::Open || p.urgent_acknowledged == p.urgent_sent;
        let is_lost = |core: &Core, process: u32| {
            core.health(process, self.now()).is_some_and(|(health, _)| health == PeerHealth::Lost)
        };
        let done = |core: &Core| core.peers.iter().all(|(process, peer)| is_delivered(peer) || is_lost(core, *process));
        let mut state = self.state.lock();
        self.changed.wait_while_for(&mut state, |state| !done(&state.core), timeout);
        done(&state.core)
    }

    pub(crate) fn silent_times(&self) -> Vec<(u32, Option<Duration>)> {
        self.state.lock().core.silent_times(self.now())
    }
}
