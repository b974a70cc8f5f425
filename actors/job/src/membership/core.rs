//! The state of one membership: its neighbours in the control tree, reports, rounds and the first cause. This module is
//! pure: the caller supplies the time, and executes the effects in order.
//!
//! - **CM-1**: one path connects any two processes. Every process handles a neighbour's messages in order and
//!   immediately queues those that it passes on. So messages between two processes arrive in the order of sending.
//! - **CM-2**: a process's messages are accepted only from the neighbour on the way to that process.
//! - **CM-3**: a process that has left passes messages on until its connections close. After that, the processes below
//!   it in the tree can no longer reach the other processes. This is no failure, because a session's processes leave
//!   together, after their last common work.
//! - **CM-4**: every neighbour of a lost process detects the loss, and reports it to the part of the tree that the
//!   neighbour still reaches. So every process receives a report within the heartbeat deadline plus the time that a
//!   message takes through the tree.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::cause::{Arbiter, FirstCause, Kind, Report};
use super::control_message::{Body, ControlMessage, LISTED_MAX, TO_ALL, truncated};
use super::datagram::{Heartbeat, MostSilent};
use super::detector::{Detector, Event, PeerHealth};
use super::reduce::{MergeRule, Reduced};
use super::rounds::{RoundEffect, Rounds, Unexpected};
use super::status::MembershipEvent;
use super::tree::ControlTree;
use crate::exit::Exit;

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Queue a message for a neighbour.
    Send {
        to: u32,
        message: ControlMessage,
    },
    Notify(MembershipEvent),
    /// The result of a topic's round.
    Reduced {
        topic: u16,
        reduced: Reduced,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Link {
    #[default]
    Joining,
    Open,
    Closed,
}

/// A neighbour in the control tree.
#[derive(Debug, Default)]
pub(super) struct Peer {
    pub(super) link: Link,
    /// True if all processes on the neighbour's side of the tree edge have joined.
    is_complete: bool,
    pub(super) left: bool,
    /// Numbers of urgent control messages: sent to the peer, acknowledged by the peer, and received from the peer.
    pub(super) urgent_sent: u64,
    pub(super) urgent_acknowledged: u64,
    urgent_received: u64,
    pub(super) last_heartbeat: Option<Duration>,
    /// The most silent process on the neighbour's side of the edge, according to the neighbour's last heartbeat.
    most_silent: Option<MostSilent>,
    /// Processes whose departure has not been reported to the neighbour yet.
    departures: BTreeSet<u32>,
}

#[derive(Debug)]
pub(crate) struct Core {
    own: u32,
    tree: Arc<ControlTree>,
    deadline: Duration,
    pub(super) peers: BTreeMap<u32, Peer>,
    pub(super) arbiter: Arbiter,
    /// `None` until all processes have joined.
    detector: Option<Detector>,
    rounds: Rounds,
    pub(super) first: Option<FirstCause>,
    /// True after this process has left.
    pub(super) left: bool,
    /// Other processes that have left.
    departed: BTreeSet<u32>,
    /// Number of received messages that no process with the same program would send.
    pub(super) garbled: u64,
    pub(super) effects: VecDeque<Effect>,
}

impl Core {
    pub(crate) fn new(own: u32, tree: Arc<ControlTree>, deadline: Duration, grace: Duration) -> Self {
        Self {
            own,
            deadline,
            peers: tree.neighbours(own).into_iter().map(|process| (process, Peer::default())).collect(),
            arbiter: Arbiter::new(own, tree.processes(), grace),
            detector: None,
            rounds: Rounds::new(own, tree.clone()),
            tree,
            first: None,
            left: false,
            departed: BTreeSet::new(),
            garbled: 0,
            effects: VecDeque::new(),
        }
    }

    pub(super) fn has_joined(&self) -> bool {
        self.detector.is_some()
    }

    /// Handles the first message of a neighbour. Sends it all reports that this process has accepted so far.
    pub(crate) fn connected(&mut self, process: u32, now: Duration) {
        let Some(peer) = self.peers.get_mut(&process) else { return };
        peer.link = Link::Open;
        let reports: Vec<Report> = self.arbiter.reports().cloned().collect();
        reports.into_iter().for_each(|report| self.send_urgent(process, Body::Report(report)));
        self.advance_join(now);
    }

    /// Once all processes on this side of an edge have joined, reports this to the neighbour on the other side.
    fn advance_join(&mut self, now: Duration) {
        if self.detector.is_some() || self.peers.values().any(|peer| peer.link != Link::Open) {
            return;
        }
        let parent = self.tree.parent(self.own);
        let missing = || self.peers.iter().filter(|(_, peer)| !peer.is_complete).map(|(process, _)| *process);
        let (is_above, is_all) = (missing().all(|process| Some(process) == parent), missing().next().is_none());
        if is_all {
            self.detector = Some(Detector::new(self.peers.keys().copied(), self.deadline, now));
            self.tree.children(self.own).into_iter().for_each(|child| self.send(child, Body::Complete.into()));
        }
        // This happens only once, because the parent sends `Complete` only after this message.
        if let Some(parent) = parent.filter(|_| is_above && !is_all) {
            self.send(parent, Body::Complete.into());
        }
    }

    /// The neighbours that have not joined, and those that have an unjoined process on their side of the edge.
    pub(super) fn missing_peers(&self) -> impl Iterator<Item = (u32, &Peer)> {
        let is_missing = |(_, peer): &(&u32, &Peer)| peer.link == Link::Joining || !peer.is_complete;
        self.peers.iter().filter(is_missing).map(|(process, peer)| (*process, peer))
    }

    /// Handles the end of the control connection to a peer. It is a symptom of a failure, unless the peer has left.
    pub(crate) fn disconnected(&mut self, process: u32, how: &str, now: Duration) {
        if let Some(peer) = self.peers.get_mut(&process) {
            peer.link = Link::Closed;
            if self.detector.is_some() {
                self.report_lost(process, how.into(), now);
            }
        }
    }

    /// The content of the next heartbeats: for each neighbour, its number, the process that this process has lost, and
    /// the most silent process on this side of the edge to the neighbour. If the session has ended and this process has
    /// lost no other, there are no heartbeats, and the neighbours detect that this process is silent.
    pub(crate) fn heartbeats(&self, now: Duration) -> Vec<(u32, Option<u32>, Option<MostSilent>)> {
        let lost = self.arbiter.lost_by_own();
        if self.first.is_some() && lost.is_none() {
            return Vec::new();
        }
        let silent = |process: u32, peer: &Peer| {
            let own = MostSilent { process, silent: self.health(process, now)?.1 };
            [Some(own), peer.most_silent].into_iter().flatten().max_by_key(|most| most.silent)
        };
        let known: Vec<_> = self.peers.iter().filter_map(|(process, peer)| silent(*process, peer)).collect();
        let behind = |to: u32| known.iter().filter(move |most| self.tree.next_hop(self.own, most.process) != Some(to));
        let most = |to: u32| behind(to).max_by_key(|most| most.silent).copied();
        self.peers.keys().map(|to| (*to, lost, most(*to))).collect()
    }

    pub(crate) fn receive_heartbeat(&mut self, heartbeat: Heartbeat, now: Duration) {
        let by = heartbeat.process;
        let Some(peer) = self.peers.get_mut(&by) else { return };
        if let Some(about) = heartbeat.lost {
            // This heartbeat is not a sign of life, because the sender is ending. The sender has also sent the report
            // as a control message. That message may be lost, because TCP works only if both directions work.
            let (cause, exit) = (String::new(), Exit::PeerUnavailable.code());
            let report = Report { by, about, kind: Kind::Lost, follows: false, cause, exit };
            if !peer.left {
                self.add_report(by, report, now);
            }
            return self.decide(now);
        }
        peer.last_heartbeat = Some(now);
        let departed = |most: &MostSilent| self.departed.contains(&most.process);
        peer.most_silent = heartbeat.most_silent.filter(|most| !departed(most));
        if let Some(detector) = &mut self.detector {
            detector.receive(by, now);
        }
    }

    pub(crate) fn tick(&mut self, now: Duration) {
        let events = self.detector.as_mut().map(|d| d.tick(now)).unwrap_or_default();
        for event in events {
            match event {
                Event::Suspect { process, silent } => {
                    tracing::warn!(process, silent_ms = silent.as_millis() as u64, "heartbeats are late");
                }
                Event::Returned { process } => tracing::info!(process, "heartbeats are back"),
                Event::Lost { process, silent } => {
                    self.report_lost(process, format!("no heartbeat for {:.1} s", silent.as_secs_f64()), now);
                }
                Event::Paused { pause } => {
                    tracing::warn!(pause_ms = pause.as_millis() as u64, "this process was paused or got no CPU time");
                }
            }
        }
        self.pass_departures();
        let effects = self.rounds.tick(now);
        self.apply(effects);
        self.decide(now);
    }

    fn decide(&mut self, now: Duration) {
        let Some(first) = self.arbiter.tick(now) else { return };
        tracing::error!(process = first.process, exit = first.exit, cause = %first.cause, "session ends");
        self.first = Some(first.clone());
        self.effects.push_back(Effect::Notify(MembershipEvent::Ended(first)));
    }

    pub(crate) fn fail(&mut self, cause: String, exit: u8, now: Duration) {
        let report = self.arbiter.own_failure(truncated(cause), exit);
        self.add_own_report(report, now);
        self.decide(now);
    }

    pub(crate) fn suspect(&mut self, process: u32, cause: String, now: Duration) {
        self.report_lost(process, cause, now);
        self.decide(now);
    }

    fn report_lost(&mut self, about: u32, cause: String, now: Duration) {
        if about == self.own || about >= self.tree.processes() || self.departed.contains(&about) {
            return;
        }
        let report = self.arbiter.own_symptom(about, truncated(cause), Exit::PeerUnavailable.code());
        let (about, cause) = (report.about, report.cause.clone());
        if self.add_own_report(report, now) {
            tracing::warn!(process = about, cause, "peer lost");
        }
    }

    /// Adds this process's report, and sends it to the neighbours. Returns false if it is known, too late or invalid.
    fn add_own_report(&mut self, report: Report, now: Duration) -> bool {
        let is_new = self.arbiter.report(now, report.clone());
        if is_new && self.arbiter.relays(&report) {
            self.broadcast_urgent(None, &Body::Report(report));
        }
        is_new
    }

    /// Adds another process's report, received from a neighbour, and passes it on.
    fn add_report(&mut self, from: u32, report: Report, now: Duration) {
        let relays = self.arbiter.relays(&report);
        if self.arbiter.report(now, report.clone()) && report.cause.is_empty() {
            tracing::warn!(by = report.by, about = report.about, "a peer's heartbeat reports a lost process");
        }
        if relays {
            self.broadcast_urgent(Some(from), &Body::Report(report));
        }
    }

    fn send(&mut self, to: u32, message: ControlMessage) {
        if self.peers.get(&to).is_some_and(|peer| peer.link == Link::Open) {
            self.effects.push_back(Effect::Send { to, message });
        }
    }

    fn send_urgent(&mut self, to: u32, body: Body) {
        if let Some(peer) = self.peers.get_mut(&to).filter(|peer| peer.link == Link::Open) {
            peer.urgent_sent += 1;
            self.effects.push_back(Effect::Send { to, message: body.into() });
        }
    }

    /// Sends an urgent message to all neighbours except the one that sent it.
    fn broadcast_urgent(&mut self, from: Option<u32>, body: &Body) {
        let peers: Vec<u32> = self.peers.keys().copied().filter(|peer| Some(*peer) != from).collect();
        peers.into_iter().for_each(|to| self.send_urgent(to, body.clone()));
    }

    pub(crate) fn receive(&mut self, by: u32, message: ControlMessage, now: Duration) {
        let is_behind = |process: u32| self.tree.next_hop(self.own, process) == Some(by);
        let Some(peer) = self.peers.get_mut(&by) else { return };
        match message.body {
            Body::Message { from, to, .. } if is_behind(from) && (to == TO_ALL || !is_behind(to)) => {
                self.receive_message(by, message);
            }
            Body::Received { urgent } if urgent <= peer.urgent_sent => peer.urgent_acknowledged = urgent,
            Body::Complete => {
                peer.is_complete = true;
                self.advance_join(now);
            }
            Body::Round { topic, round } => {
                let effects = self.rounds.receive(by, (topic, round), &message.payload, now);
                self.apply_or_suspect(effects, by, now);
            }
            Body::Missing { topic, round, process } if process < self.tree.processes() => {
                self.rounds.receive_name(by, (topic, round), process);
            }
            Body::Report(report) if is_behind(report.by) => {
                self.acknowledge(by);
                self.add_report(by, report, now);
            }
            Body::Leaving { processes } if processes.iter().all(|process| is_behind(*process)) => {
                self.acknowledge(by);
                processes.into_iter().for_each(|process| self.record_departure(by, process));
            }
            _ => self.garbled += 1,
        }
        self.decide(now);
    }

    /// Acknowledges an urgent message. Acknowledgements are not acknowledged, so they never outnumber urgent messages.
    fn acknowledge(&mut self, by: u32) {
        let Some(peer) = self.peers.get_mut(&by) else { return };
        peer.urgent_received += 1;
        let body = Body::Received { urgent: peer.urgent_received };
        self.send(by, body.into());
    }

    /// Delivers an application's message to this process, passes it on to neighbours, or both.
    fn receive_message(&mut self, by: u32, message: ControlMessage) {
        let Body::Message { from, to, topic } = message.body else { return };
        let onward: Vec<u32> = match to {
            TO_ALL => self.peers.keys().copied().filter(|peer| *peer != by).collect(),
            to => self.tree.next_hop(self.own, to).into_iter().collect(),
        };
        onward.into_iter().for_each(|peer| self.send(peer, message.clone()));
        if to == TO_ALL || to == self.own {
            self.effects.push_back(Effect::Notify(MembershipEvent::Message { from, topic, bytes: message.payload }));
        }
    }

    fn record_departure(&mut self, by: u32, process: u32) {
        if !self.departed.insert(process) {
            return;
        }
        if let Some(detector) = &mut self.detector {
            detector.forget(process);
        }
        for (neighbour, peer) in &mut self.peers {
            peer.left |= *neighbour == process;
            if peer.most_silent.is_some_and(|most| most.process == process) {
                peer.most_silent = None;
            }
            if *neighbour != by {
                peer.departures.insert(process);
            }
        }
        self.effects.push_back(Effect::Notify(MembershipEvent::Left { process }));
    }

    /// Reports departures, several in one message, because all processes leave at about the same time.
    fn pass_departures(&mut self) {
        let mut pending = Vec::new();
        for (to, peer) in &mut self.peers {
            let processes: Vec<u32> = std::mem::take(&mut peer.departures).into_iter().collect();
            pending.extend(processes.chunks(LISTED_MAX).map(|processes| (*to, processes.to_vec())));
        }
        pending.into_iter().for_each(|(to, processes)| self.send_urgent(to, Body::Leaving { processes }));
    }

    /// The next hop for a message from this process to `to`; `None` if `to` has left or cannot be reached.
    pub(super) fn route(&self, to: u32) -> Option<u32> {
        let hop = self.tree.next_hop(self.own, to)?;
        let peer = self.peers.get(&hop)?;
        let is_open = peer.link == Link::Open && !peer.left && !self.departed.contains(&to);
        is_open.then_some(hop)
    }

    /// Leaves the session cleanly and notifies the others. After that, no event counts as a failure for this process.
    pub(crate) fn leave(&mut self) {
        if self.first.is_none() && !self.left {
            self.left = true;
            self.arbiter.close();
            let own = self.own;
            self.peers.values_mut().for_each(|peer| peer.departures.extend([own]));
            self.pass_departures();
        }
    }

    pub(crate) fn supply(&mut self, topic: u16, rules: Arc<[MergeRule]>, fields: Vec<Vec<u64>>, now: Duration) {
        let effects = self.rounds.supply(topic, (rules, fields), now);
        self.apply_or_suspect(effects, self.own, now);
    }

    /// The process whose numbers are missing in the topic's round, as far as this process knows.
    pub(crate) fn missing(&self, topic: u16) -> Option<u32> {
        self.rounds.missing(topic)
    }

    fn apply_or_suspect(&mut self, effects: Result<Vec<RoundEffect>, Unexpected>, by: u32, now: Duration) {
        match effects {
            Ok(effects) => self.apply(effects),
            Err(Unexpected) if by == self.own => {
                let cause = "the processes combine numbers by different rules".into();
                self.fail(cause, Exit::Internal.code(), now);
            }
            Err(Unexpected) => {
                self.garbled += 1;
                self.report_lost(by, "it sent numbers that do not fit those of this process".into(), now);
            }
        }
    }

    fn apply(&mut self, effects: Vec<RoundEffect>) {
        for effect in effects {
            match effect {
                RoundEffect::Send { to, message } => self.send(to, message),
                RoundEffect::Reduced { topic, reduced } => {
                    self.effects.push_back(Effect::Reduced { topic, reduced });
                }
            }
        }
    }

    pub(crate) fn has_departed(&self, process: u32) -> bool {
        self.departed.contains(&process)
    }

    pub(super) fn health(&self, process: u32, now: Duration) -> Option<(PeerHealth, Duration)> {
        self.detector.as_ref()?.health(process, now)
    }

    /// The time since the last sign of life of each other process, or `None` if that process has left. For a process
    /// behind a neighbour, this is the time since the neighbour's last heartbeat. A neighbour also reports the most
    /// silent of the processes behind it. For that process, the silence that the neighbour reports is added.
    pub(crate) fn silent_times(&self, now: Duration) -> Vec<(u32, Option<Duration>)> {
        let silent = |process: u32| {
            let hop = self.tree.next_hop(self.own, process).filter(|_| !self.departed.contains(&process))?;
            let silent = self.health(hop, now)?.1;
            let most = self.peers.get(&hop)?.most_silent.filter(|most| most.process == process);
            Some(silent + most.map_or(Duration::ZERO, |most| most.silent))
        };
        (0..self.tree.processes()).filter(|p| *p != self.own).map(|p| (p, silent(p))).collect()
    }
}

#[cfg(test)]
mod tests;
