//! Who has been silent for too long. Pure: time is what the caller says, counted from any fixed moment.

use std::collections::BTreeMap;
use std::time::Duration;

/// What a tick finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Silent for half the deadline: worth a line in the log, no more.
    Suspect { process: u32, silent: Duration },
    /// A suspect that was heard again.
    Returned { process: u32 },
    /// Silent for the whole deadline. Told once; nothing brings the peer back.
    Lost { process: u32, silent: Duration },
    /// This process itself did not run (stopped, or starved) and could hear nobody: all peers have a fresh deadline.
    Paused { pause: Duration },
}

/// What is known of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerHealth {
    /// Heard within half the deadline.
    Alive,
    /// Silent for half the deadline.
    Suspect,
    /// Silent for the whole deadline.
    Lost,
}

#[derive(Debug)]
struct Peer {
    heard: Duration,
    health: PeerHealth,
}

/// The failure detector of one process.
#[derive(Debug)]
pub(crate) struct Detector {
    deadline: Duration,
    peers: BTreeMap<u32, Peer>,
    ticked: Duration,
}

impl Detector {
    /// All peers count as heard `now`.
    pub(crate) fn new(peers: impl IntoIterator<Item = u32>, deadline: Duration, now: Duration) -> Self {
        let alive = |process| (process, Peer { heard: now, health: PeerHealth::Alive });
        Self { deadline, peers: peers.into_iter().map(alive).collect(), ticked: now }
    }

    pub(crate) fn heard(&mut self, process: u32, now: Duration) {
        if let Some(peer) = self.peers.get_mut(&process) {
            peer.heard = peer.heard.max(now);
        }
    }

    /// The peer has left in order; its silence means nothing.
    pub(crate) fn forget(&mut self, process: u32) {
        self.peers.remove(&process);
    }

    /// State of a peer, and how long it has been silent; `None` of one that has left.
    pub(crate) fn health(&self, process: u32, now: Duration) -> Option<(PeerHealth, Duration)> {
        self.peers.get(&process).map(|p| (p.health, now.saturating_sub(p.heard)))
    }

    /// Looks at all peers. It must be called several times within half a deadline: a longer gap is a pause of our own.
    /// What arrived meanwhile must be given to [`Detector::heard`] first.
    pub(crate) fn tick(&mut self, now: Duration) -> Vec<Event> {
        let mut events = Vec::new();
        let pause = now.saturating_sub(self.ticked);
        self.ticked = self.ticked.max(now);
        if pause >= self.deadline / 2 {
            events.push(Event::Paused { pause });
            self.peers.values_mut().for_each(|p| p.heard = now);
        }
        for (&process, peer) in &mut self.peers {
            let silent = now.saturating_sub(peer.heard);
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

    const DEADLINE: Duration = Duration::from_millis(4000);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Ticks every 50 ms in `from..=to`, hearing `heard` on each; returns the events with their times.
    fn run(detector: &mut Detector, from: u64, to: u64, heard: &[u32]) -> Vec<(u64, Event)> {
        let mut events = Vec::new();
        for now in (from..=to).step_by(50) {
            heard.iter().for_each(|p| detector.heard(*p, ms(now)));
            events.extend(detector.tick(ms(now)).into_iter().map(|e| (now, e)));
        }
        events
    }

    #[test]
    fn silence_is_suspected_then_lost_once() {
        let mut d = Detector::new([1, 2], DEADLINE, ms(0));
        let suspect = Event::Suspect { process: 2, silent: ms(2000) };
        let lost = Event::Lost { process: 2, silent: ms(4000) };
        assert_eq!(run(&mut d, 0, 9000, &[1]), [(2000, suspect), (4000, lost)]);
        // A peer that was declared lost stays so: others have acted on it.
        assert_eq!(run(&mut d, 9050, 20_000, &[1, 2]), []);
        assert_eq!(d.health(2, ms(20_000)), Some((PeerHealth::Lost, ms(0))));
    }

    #[test]
    fn a_flap_shorter_than_the_deadline_passes() {
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
    fn a_frozen_process_does_not_accuse_its_peers_on_waking() {
        for pause in [2000, 4000, 60_000] {
            let mut d = Detector::new([1, 2], DEADLINE, ms(0));
            // Peer 2 was silent already before the pause: it gets a fresh deadline as well.
            run(&mut d, 0, 1900, &[1]);
            let woke = 1900 + pause;
            assert_eq!(d.tick(ms(woke)), [Event::Paused { pause: ms(pause) }]);
            let found = run(&mut d, woke + 50, woke + 3950, &[1]);
            assert_eq!(found, [(woke + 2000, Event::Suspect { process: 2, silent: ms(2000) })]);
            let found = run(&mut d, woke + 4000, woke + 9000, &[1]);
            assert_eq!(found, [(woke + 4000, Event::Lost { process: 2, silent: ms(4000) })]);
        }
    }

    proptest::proptest! {
        /// Exactly the peers with a gap of a deadline are lost, within one tick, whatever the times of datagrams.
        #[test]
        fn lost_are_those_silent_for_a_deadline(
            gaps in proptest::collection::vec(1u64..5200, 1..12),
            tick in 1u64..1900,
        ) {
            let mut d = Detector::new([7], DEADLINE, ms(0));
            let (mut heard, mut arrivals) = (0, vec![]);
            for gap in &gaps {
                heard += gap;
                arrivals.push(heard);
            }
            // Beyond the last arrival silence is expected to be found.
            let mut lost_at = None;
            let mut last = 0;
            let mut now = 0;
            while now < heard + 10_000 {
                now += tick;
                while arrivals.first().is_some_and(|a| *a <= now) {
                    last = arrivals.remove(0);
                    d.heard(7, ms(last));
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
