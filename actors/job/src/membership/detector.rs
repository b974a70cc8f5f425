//! Detects peers that send no heartbeats. This module is pure: the caller supplies the time since some fixed start.

use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The peer was silent for half the deadline. This is only logged.
    Suspect { process: u32, silent: Duration },
    /// A suspect sends heartbeats again.
    Returned { process: u32 },
    /// The peer was silent for the whole deadline. Reported once; the peer stays lost.
    Lost { process: u32, silent: Duration },
    /// This process was paused or got no CPU time, so it received no heartbeats. All peers get a new deadline.
    Paused { pause: Duration },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerHealth {
    /// A heartbeat arrived within half the deadline.
    Alive,
    Suspect,
    Lost,
}

#[derive(Debug)]
struct Peer {
    last_heartbeat: Duration,
    health: PeerHealth,
}

#[derive(Debug)]
pub(crate) struct Detector {
    deadline: Duration,
    peers: BTreeMap<u32, Peer>,
    last_tick: Duration,
}

impl Detector {
    /// Creates a detector. Each peer's deadline counts from `now`.
    pub(crate) fn new(peers: impl IntoIterator<Item = u32>, deadline: Duration, now: Duration) -> Self {
        let alive = |process| (process, Peer { last_heartbeat: now, health: PeerHealth::Alive });
        Self { deadline, peers: peers.into_iter().map(alive).collect(), last_tick: now }
    }

    pub(crate) fn receive(&mut self, process: u32, now: Duration) {
        if let Some(peer) = self.peers.get_mut(&process) {
            peer.last_heartbeat = peer.last_heartbeat.max(now);
        }
    }

    pub(crate) fn forget(&mut self, process: u32) {
        self.peers.remove(&process);
    }

    /// A peer's health and the time since its last heartbeat; `None` if the peer has left.
    pub(crate) fn health(&self, process: u32, now: Duration) -> Option<(PeerHealth, Duration)> {
        self.peers.get(&process).map(|p| (p.health, now.saturating_sub(p.last_heartbeat)))
    }

    /// Checks all peers. Call this several times per half deadline, because half a deadline between two calls counts as
    /// a pause of this process. Before each call, pass all received heartbeats to [`Detector::receive`].
    pub(crate) fn tick(&mut self, now: Duration) -> Vec<Event> {
        let mut events = Vec::new();
        let pause = now.saturating_sub(self.last_tick);
        self.last_tick = self.last_tick.max(now);
        if pause >= self.deadline / 2 {
            events.push(Event::Paused { pause });
            self.peers.values_mut().for_each(|p| p.last_heartbeat = now);
        }
        for (&process, peer) in &mut self.peers {
            let silent = now.saturating_sub(peer.last_heartbeat);
            let health = match peer.health {
                PeerHealth::Lost => PeerHealth::Lost,
                _ if silent >= self.deadline => PeerHealth::Lost,
                _ if silent >= self.deadline / 2 => PeerHealth::Suspect,
                _ => PeerHealth::Alive,
            };
            if health != peer.health {
                events.push(match health {
                    PeerHealth::Alive => Event::Returned { process },
                    PeerHealth::Suspect => Event::Suspect { process, silent },
                    PeerHealth::Lost => Event::Lost { process, silent },
                });
            }
            peer.health = health;
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::tests::ms;

    const DEADLINE: Duration = Duration::from_millis(4000);

    /// Ticks every 50 ms in `from..=to`, with heartbeats of the peers in `alive`. Returns the events with their times.
    fn run(detector: &mut Detector, from: u64, to: u64, alive: &[u32]) -> Vec<(u64, Event)> {
        let mut events = Vec::new();
        for now in (from..=to).step_by(50) {
            alive.iter().for_each(|p| detector.receive(*p, ms(now)));
            events.extend(detector.tick(ms(now)).into_iter().map(|e| (now, e)));
        }
        events
    }

    #[test]
    fn a_silent_peer_is_suspected_and_then_lost_once() {
        let mut d = Detector::new([1, 2], DEADLINE, ms(0));
        let suspect = Event::Suspect { process: 2, silent: ms(2000) };
        let lost = Event::Lost { process: 2, silent: ms(4000) };
        assert_eq!(run(&mut d, 0, 9000, &[1]), [(2000, suspect), (4000, lost)]);
        // A lost peer stays lost, because other processes have already reacted to the loss.
        assert_eq!(run(&mut d, 9050, 20_000, &[1, 2]), []);
        assert_eq!(d.health(2, ms(20_000)), Some((PeerHealth::Lost, ms(0))));
    }

    #[test]
    fn an_outage_shorter_than_the_deadline_is_not_a_loss() {
        let mut d = Detector::new([1], DEADLINE, ms(0));
        run(&mut d, 0, 1000, &[1]);
        let events = run(&mut d, 1050, 4000, &[]);
        assert_eq!(events, [(3000, Event::Suspect { process: 1, silent: ms(2000) })]);
        assert_eq!(run(&mut d, 4050, 9000, &[1]), [(4050, Event::Returned { process: 1 })]);
    }

    #[test]
    fn a_peer_that_left_is_not_lost() {
        let mut d = Detector::new([1, 2], DEADLINE, ms(0));
        run(&mut d, 0, 1000, &[1, 2]);
        d.forget(2);
        assert_eq!(run(&mut d, 1050, 9000, &[1]), []);
        assert_eq!(d.health(2, ms(9000)), None);
    }

    #[test]
    fn a_process_that_was_frozen_does_not_report_its_peers_as_lost() {
        for pause in [2000, 4000, 60_000] {
            let mut d = Detector::new([1, 2], DEADLINE, ms(0));
            // Peer 2 was already silent before the pause, but also gets a new deadline.
            run(&mut d, 0, 1900, &[1]);
            let resumed = 1900 + pause;
            assert_eq!(d.tick(ms(resumed)), [Event::Paused { pause: ms(pause) }]);
            let found = run(&mut d, resumed + 50, resumed + 3950, &[1]);
            assert_eq!(found, [(resumed + 2000, Event::Suspect { process: 2, silent: ms(2000) })]);
            let found = run(&mut d, resumed + 4000, resumed + 9000, &[1]);
            assert_eq!(found, [(resumed + 4000, Event::Lost { process: 2, silent: ms(4000) })]);
        }
    }

    proptest::proptest! {
        /// For any arrival times, a peer is lost within one tick after a deadline of silence, and never earlier.
        #[test]
        fn a_peer_is_lost_exactly_after_a_deadline_of_silence(
            gaps in proptest::collection::vec(1u64..5200, 1..12),
            tick in 1u64..1900,
        ) {
            let mut d = Detector::new([7], DEADLINE, ms(0));
            let (mut last_arrival, mut arrivals) = (0, vec![]);
            for gap in &gaps {
                last_arrival += gap;
                arrivals.push(last_arrival);
            }
            // The loop runs long enough after the last arrival to detect the loss.
            let mut lost_at = None;
            let mut last = 0;
            let mut now = 0;
            while now < last_arrival + 10_000 {
                now += tick;
                while arrivals.first().is_some_and(|a| *a <= now) {
                    last = arrivals.remove(0);
                    d.receive(7, ms(last));
                }
                let lost = d.tick(ms(now)).into_iter().any(|e| matches!(e, Event::Lost { .. }));
                proptest::prop_assert_eq!(lost, lost_at.is_none() && now - last >= 4000);
                if lost {
                    lost_at = Some(now);
                    proptest::prop_assert!(now - last < 4000 + tick);
                }
            }
            proptest::prop_assert!(lost_at.is_some());
        }
    }
}
