//! Tests whole worlds of memberships in virtual time, without sockets. A world has up to 3,072 processes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use proptest::prelude::*;

use super::*;
use crate::membership::tests::ms;

const DEADLINE: u64 = 4000;
const GRACE: u64 = 500;
const INTERVAL: u64 = 250;
const TICK: u64 = 50;
/// Maximum latency of a message between neighbours, in ms.
const HOP: u64 = 20;

/// The content of a message that one neighbour sends to another.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Travelling {
    Joined,
    Control(ControlMessage),
    Heartbeat(Heartbeat),
    Closed,
}

/// Arrival time, number in the order of sending, sender, and receiver. The number is also the key in `World::contents`.
type Arrival = Reverse<(u64, u64, u32, u32)>;

struct World {
    tree: Arc<ControlTree>,
    /// The processes. `None` for a process that was killed or has ended.
    cores: Vec<Option<Core>>,
    frozen: BTreeSet<u32>,
    arrivals: BinaryHeap<Arrival>,
    contents: BTreeMap<u64, Travelling>,
    /// For each sender and receiver: the time of the last arrival. Connections keep the order of messages.
    last: BTreeMap<(u32, u32), u64>,
    sent: u64,
    now: u64,
    delays: Vec<u64>,
    /// For each process: the events that the application received, with their times.
    notices: Vec<Vec<(u64, MembershipEvent)>>,
    results: Vec<Vec<(u16, Reduced)>>,
    /// For each process: how many datagrams and how many control messages it has sent.
    datagrams: Vec<u64>,
    messages: Vec<u64>,
}

impl World {
    fn new<N: Ord>(nodes: &[N], delays: &[u64]) -> Self {
        let tree = Arc::new(ControlTree::new(nodes));
        let all = tree.processes();
        let core = |process| Some(Core::new(process, tree.clone(), ms(DEADLINE), ms(GRACE)));
        let mut world = Self {
            cores: (0..all).map(core).collect(),
            frozen: BTreeSet::new(),
            arrivals: BinaryHeap::new(),
            contents: BTreeMap::new(),
            last: BTreeMap::new(),
            sent: 0,
            now: 0,
            delays: delays.to_vec(),
            notices: vec![Vec::new(); all as usize],
            results: vec![Vec::new(); all as usize],
            datagrams: vec![0; all as usize],
            messages: vec![0; all as usize],
            tree,
        };
        for process in 0..all {
            let neighbours = world.tree.neighbours(process);
            neighbours.into_iter().for_each(|to| world.travel(process, to, Travelling::Joined));
        }
        world
    }

    /// A world with `per_node` processes on each node, after all processes have joined.
    fn joined(processes: u32, per_node: u32) -> Self {
        let mut world = Self::new(&(0..processes).map(|process| process / per_node).collect::<Vec<_>>(), &[1]);
        world.run(500);
        assert!(world.cores.iter().flatten().all(Core::has_joined));
        world
    }

    fn travel(&mut self, from: u32, to: u32, content: Travelling) {
        let delay = 1 + self.delays[self.sent as usize % self.delays.len()] % HOP;
        let last = self.last.entry((from, to)).or_default();
        *last = (*last).max(self.now + delay);
        self.arrivals.push(Reverse((*last, self.sent, from, to)));
        self.contents.insert(self.sent, content);
        self.sent += 1;
    }

    /// Carries out a process's effects.
    fn settle(&mut self, process: u32) {
        let Some(core) = &mut self.cores[process as usize] else { return };
        let effects: Vec<Effect> = core.effects.drain(..).collect();
        for effect in effects {
            match effect {
                Effect::Send { to, message } => {
                    self.messages[process as usize] += 1;
                    self.travel(process, to, Travelling::Control(message));
                }
                Effect::Notify(event) => self.notices[process as usize].push((self.now, event)),
                Effect::Reduced { topic, reduced } => self.results[process as usize].push((topic, reduced)),
            }
        }
    }

    fn act(&mut self, process: u32, act: impl FnOnce(&mut Core, Duration)) {
        if let Some(core) = &mut self.cores[process as usize] {
            act(core, ms(self.now));
        }
        self.settle(process);
    }

    fn kill(&mut self, process: u32) {
        self.cores[process as usize] = None;
        let neighbours = self.tree.neighbours(process);
        neighbours.into_iter().for_each(|to| self.travel(process, to, Travelling::Closed));
    }

    fn arrive(&mut self, from: u32, to: u32, content: Travelling) {
        self.act(to, |core, now| match content {
            Travelling::Joined => core.connected(from, now),
            Travelling::Control(message) => core.receive(from, message, now),
            Travelling::Heartbeat(heartbeat) => core.receive_heartbeat(heartbeat, now),
            Travelling::Closed => core.disconnected(from, "its control connection closed", now),
        });
    }

    /// Runs for `duration` ms. A process whose session has ended exits a tick later.
    fn run(&mut self, duration: u64) {
        let end = self.now + duration;
        while self.now < end {
            self.now += 1;
            let mut postponed = Vec::new();
            while let Some(Reverse((at, order, from, to))) = self.arrivals.peek().copied().filter(|a| a.0.0 <= self.now)
            {
                self.arrivals.pop();
                if self.frozen.contains(&to) {
                    postponed.push(Reverse((at, order, from, to)));
                } else if let Some(content) = self.contents.remove(&order) {
                    self.arrive(from, to, content);
                }
            }
            self.arrivals.extend(postponed);
            if self.now.is_multiple_of(TICK) {
                (0..self.tree.processes())
                    .filter(|p| !self.frozen.contains(p))
                    .collect::<Vec<_>>()
                    .into_iter()
                    .for_each(|process| self.tick(process));
            }
        }
    }

    fn tick(&mut self, process: u32) {
        let Some(core) = &self.cores[process as usize] else { return };
        if core.first.is_some() {
            return self.kill(process);
        }
        self.act(process, Core::tick);
        if self.now.is_multiple_of(INTERVAL) {
            let heartbeats = self.cores[process as usize].as_ref().map(|core| core.heartbeats(ms(self.now)));
            for (to, lost, most_silent) in heartbeats.into_iter().flatten() {
                self.datagrams[process as usize] += 1;
                let heartbeat = Heartbeat { epoch: 0, process, sequence: self.now, lost, most_silent };
                self.travel(process, to, Travelling::Heartbeat(heartbeat));
            }
        }
    }

    /// The first cause of a process, with its time.
    fn ended(&self, process: u32) -> Option<(u64, &FirstCause)> {
        self.notices[process as usize].iter().find_map(|(at, event)| match event {
            MembershipEvent::Ended(first) => Some((*at, first)),
            _ => None,
        })
    }

    /// Checks that all other processes end with `lost` as the cause, within `within` ms after `begin`.
    fn assert_all_blame(&self, lost: u32, begin: u64, within: u64) {
        for process in (0..self.tree.processes()).filter(|process| *process != lost) {
            let (at, first) = self.ended(process).unwrap_or_else(|| panic!("process {process} has not ended"));
            assert_eq!(first.process, lost, "process {process}: {first:?}");
            assert!(at - begin <= within, "process {process} ended after {} ms", at - begin);
        }
    }

    /// Maximum latency of a message between any two processes, in ms.
    fn longest_way(&self) -> u64 {
        2 * HOP * u64::from((0..self.tree.processes()).map(|process| self.tree.depth(process)).max().unwrap_or(0))
    }
}

#[test]
fn a_killed_process_of_3072_is_known_to_all_within_the_grace_window() {
    // A leaf, a leader in the middle, and process 0.
    for lost in [3071, 8, 0] {
        let mut world = World::joined(3072, 8);
        assert_eq!(world.messages.iter().sum::<u64>(), 2 * 3071, "joining takes two messages for each edge");
        let (begin, before) = (world.now, world.messages.iter().sum::<u64>());
        world.kill(lost);
        world.run(2000);
        world.assert_all_blame(lost, begin, GRACE + TICK + world.longest_way() + HOP);
        let reports = world.messages.iter().sum::<u64>() - before;
        let most = world.messages.iter().max().copied().unwrap_or(0);
        println!("process {lost} of 3072 killed: {reports} messages in all, at most {most} from one process");
        assert!(reports < 40 * 3072, "{reports} messages");
    }
}

#[test]
fn a_frozen_leader_of_3072_is_known_to_all_within_a_deadline() {
    let mut world = World::joined(3072, 8);
    let begin = world.now;
    let node = 8 * 200;
    world.frozen.insert(node);
    world.run(6000);
    world.assert_all_blame(node, begin, DEADLINE + INTERVAL + TICK + GRACE + TICK + world.longest_way() + HOP);
}

#[test]
fn a_processs_own_failure_reaches_3072_processes() {
    let mut world = World::joined(3072, 8);
    let begin = world.now;
    world.act(777, |core, now| core.fail("out of memory".into(), 71, now));
    world.run(1500);
    let expected = FirstCause { process: 777, cause: "out of memory".into(), exit: 71 };
    for process in 0..3072 {
        let (at, first) = world.ended(process).expect("an end");
        assert_eq!(first, &expected);
        assert!(at - begin <= GRACE + TICK + world.longest_way());
    }
}

/// Prints to how many neighbours a process sends heartbeats.
#[test]
fn heartbeats_of_a_process_do_not_grow_with_the_world() {
    let most = [(8, 8), (64, 8), (3072, 8)].map(|(processes, per_node)| {
        let mut world = World::joined(processes, per_node);
        world.datagrams.fill(0);
        world.messages.fill(0);
        world.run(1000);
        let flows = world.datagrams.iter().map(|datagrams| datagrams / (1000 / INTERVAL));
        let (most, all) = (flows.clone().max().unwrap_or(0), flows.sum::<u64>());
        println!("{processes} processes: {all} heartbeat flows in all, at most {most} from one process");
        assert_eq!(world.messages.iter().sum::<u64>(), 0, "an idle world sends no control messages");
        most
    });
    assert_eq!(most, [7, 14, 16]);
}

#[test]
fn silence_is_visible_everywhere() {
    let mut world = World::joined(64, 8);
    world.frozen.insert(42);
    world.run(3000);
    for process in (0..64).filter(|process| *process != 42) {
        let core = world.cores[process as usize].as_ref().expect("the process runs");
        for (peer, silent) in core.silent_times(ms(world.now)) {
            let silent = silent.expect("nobody has left").as_millis() as u64;
            let levels = u64::from(world.tree.depth(process) + world.tree.depth(42));
            let lag = levels * (INTERVAL + HOP) + INTERVAL;
            let expected = if peer == 42 { 3000 - lag..=3000 + lag } else { 0..=INTERVAL + HOP + lag };
            assert!(expected.contains(&silent), "process {process} reports {silent} ms for {peer}, not {expected:?}");
        }
    }
}

#[test]
fn all_leave_with_few_messages() {
    let mut world = World::joined(3072, 8);
    world.messages.fill(0);
    for process in 0..3072 {
        world.act(process, |core, _| core.leave());
    }
    world.run(2000);
    for process in 0..3072u32 {
        let left = world.notices[process as usize].iter();
        let left = left.filter(|(_, event)| matches!(event, MembershipEvent::Left { .. })).count();
        assert_eq!((left, world.ended(process)), (3071, None), "process {process}");
    }
    let (all, most) = (world.messages.iter().sum::<u64>(), world.messages.iter().max().copied().unwrap_or(0));
    println!("3072 processes leave: {all} messages in all, at most {most} from one process");
    assert!(all < 40 * 3072 && most < 1024, "{all} messages, at most {most} from one process");
}

fn rules() -> Arc<[MergeRule]> {
    Arc::new([MergeRule::Max { words: 1 }, MergeRule::First { words: 1 }, MergeRule::Same(None)])
}

fn numbers(process: u32, value: u64) -> Vec<Vec<u64>> {
    vec![vec![u64::from(process)], if process == 0 { vec![9] } else { Vec::new() }, vec![value]]
}

#[test]
fn a_round_takes_two_messages_for_each_edge() {
    for processes in [8, 64, 3072] {
        let mut world = World::joined(processes, 8);
        world.messages.fill(0);
        for process in 0..processes {
            world.act(process, |core, now| core.supply(0, rules(), numbers(process, 5), now));
        }
        world.run(300);
        let expected = Reduced { words: vec![vec![u64::from(processes) - 1], vec![9], vec![]], difference: None };
        assert!(world.results.iter().all(|results| results == &[(0, expected.clone())]));
        let (all, most) = (world.messages.iter().sum::<u64>(), world.messages.iter().max().copied().unwrap_or(0));
        println!("a round of {processes} processes: {all} messages, at most {most} from one process");
        assert_eq!(all, 2 * (u64::from(processes) - 1));
    }
}

#[test]
fn waiting_processes_know_which_one_is_missing() {
    for late in [0, 8, 13, 63] {
        let mut world = World::joined(64, 8);
        world.run(500);
        for process in (0..64).filter(|process| *process != late) {
            world.act(process, |core, now| core.supply(3, rules(), numbers(process, 5), now));
        }
        world.run(1000);
        for process in (0..64).filter(|process| *process != late) {
            let core = world.cores[process as usize].as_ref().expect("the process runs");
            assert_eq!(core.missing(3), Some(late), "process {process}");
        }
        world.act(late, |core, now| core.supply(3, rules(), numbers(late, 6), now));
        world.run(300);
        for results in &world.results {
            let difference = results[0].1.difference.as_ref().expect("a difference");
            assert_eq!((difference.field, difference.values.len()), (2, 64));
            assert!(difference.values.iter().all(|(process, value)| *value == 5 + u64::from(*process == late)));
        }
    }
}

#[test]
fn a_process_that_left_before_a_round_is_the_missing_one() {
    let mut world = World::joined(64, 8);
    world.act(13, |core, _| core.leave());
    world.run(200);
    world.kill(13);
    for process in (0..64).filter(|process| *process != 13) {
        world.act(process, |core, now| core.supply(3, rules(), numbers(process, 5), now));
    }
    world.run(1000);
    for process in (0..64).filter(|process| *process != 13) {
        let core = world.cores[process as usize].as_ref().expect("the process runs");
        assert_eq!((core.missing(3), core.has_departed(13), world.ended(process)), (Some(13), true, None));
    }
}

#[test]
fn messages_that_cannot_come_from_a_neighbour_are_refused() {
    // Processes 0 and 1 are leaders. Process 2 is below 0, and process 3 is below 1.
    let mut world = World::new(&["a", "b", "a", "b"], &[1]);
    world.run(500);
    let failed = |by| Report { by, about: by, kind: Kind::Failed, follows: false, cause: "x".into(), exit: 70 };
    let forged = [
        Body::Message { from: 3, to: 0, topic: 1 },
        Body::Message { from: 0, to: 0, topic: 1 },
        // A message from process 2 to itself.
        Body::Message { from: 2, to: 2, topic: 1 },
        Body::Report(failed(1)),
        Body::Leaving { processes: vec![2, 3] },
        Body::Missing { topic: 0, round: 0, process: 4 },
        Body::Received { urgent: 1 },
        Body::Joined,
    ];
    let count = forged.len() as u64;
    forged.into_iter().for_each(|body| world.act(0, |core, now| core.receive(2, body.into(), now)));
    let core = world.cores[0].as_ref().expect("the process runs");
    assert_eq!((core.garbled, &core.first, world.notices[0].len()), (count, &None, 0));
    // Numbers of a wrong round end the session, because the processes do not run the same program.
    let round = ControlMessage { body: Body::Round { topic: 0, round: 7 }, payload: Vec::new() };
    world.act(0, |core, now| core.receive(2, round, now));
    world.run(1000);
    assert_eq!(world.ended(3).expect("an end").1.process, 2);
}

fn worlds() -> impl Strategy<Value = (Vec<u32>, Vec<u64>)> {
    (prop::collection::vec(0u32..30, 2..60), prop::collection::vec(0u64..HOP, 1..40))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// CM-1: messages between any two processes arrive once and in order, for any delays.
    #[test]
    fn messages_between_any_two_processes_keep_their_order(
        (nodes, delays) in worlds(),
        sends in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()), 1..60),
    ) {
        let mut world = World::new(&nodes, &delays);
        world.run(1000);
        let mut expected: BTreeMap<(u32, u32), Vec<u8>> = BTreeMap::new();
        for (number, (from, to, all)) in sends.iter().enumerate() {
            let (from, to) = (from.index(nodes.len()) as u32, to.index(nodes.len()) as u32);
            if from == to {
                continue;
            }
            let body = Body::Message { from, to: if *all { TO_ALL } else { to }, topic: 1 };
            let message = ControlMessage { body, payload: vec![number as u8] };
            let core = world.cores[from as usize].as_mut().expect("the process runs");
            let hops = if *all { world.tree.neighbours(from) } else { core.route(to).into_iter().collect() };
            hops.into_iter().for_each(|hop| core.send(hop, message.clone()));
            world.settle(from);
            for to in (0..nodes.len() as u32).filter(|p| *p != from && (*all || *p == to)) {
                expected.entry((from, to)).or_default().push(number as u8);
            }
            world.run(number as u64 % 3);
        }
        world.run(1000);
        let mut found: BTreeMap<(u32, u32), Vec<u8>> = BTreeMap::new();
        for (to, notices) in (0..).zip(&world.notices) {
            for (_, event) in notices {
                let MembershipEvent::Message { from, bytes, .. } = event else { panic!("{event:?}") };
                found.entry((*from, to)).or_default().extend(bytes);
            }
        }
        prop_assert_eq!(found, expected);
    }

    /// CM-4: if any process dies or freezes, all others end within a time limit and name that process as the cause.
    #[test]
    fn the_loss_of_any_process_is_known_to_all(
        (nodes, delays) in worlds(), lost in any::<prop::sample::Index>(), freezes: bool,
    ) {
        let mut world = World::new(&nodes, &delays);
        world.run(1000);
        let (lost, begin) = (lost.index(nodes.len()) as u32, world.now);
        if freezes { world.frozen.extend([lost]) } else { world.kill(lost) }
        world.run(6500);
        let detection = if freezes { DEADLINE + INTERVAL + TICK } else { HOP };
        world.assert_all_blame(lost, begin, detection + GRACE + TICK + world.longest_way() + HOP);
    }

    /// If any process fails, all processes name this failure as the cause, although other processes then fail too.
    #[test]
    fn all_agree_on_the_process_that_failed_first(
        (nodes, delays) in worlds(), failed in any::<prop::sample::Index>(), later in any::<prop::sample::Index>(),
    ) {
        let mut world = World::new(&nodes, &delays);
        world.run(1000);
        let (failed, later) = (failed.index(nodes.len()) as u32, later.index(nodes.len()) as u32);
        world.act(failed, |core, now| core.fail("it broke".into(), 71, now));
        // A second process suspects the failed one. After it has received the report, the second process also fails.
        world.act(later, |core, now| core.suspect(failed, "a broken connection".into(), now));
        world.run(world.longest_way() + HOP);
        world.act(later, |core, now| core.fail("a collective was aborted".into(), 69, now));
        world.run(2000);
        for process in 0..nodes.len() as u32 {
            let first = world.ended(process).expect("an end").1;
            prop_assert_eq!((first.process, first.exit), (failed, 71), "process {}", process);
        }
    }

    /// Every round gives all processes its result, no matter when each process supplies its numbers.
    #[test]
    fn rounds_end_in_order((nodes, delays) in worlds(), times in prop::collection::vec(0u64..300, 1..50)) {
        let mut world = World::new(&nodes, &delays);
        world.run(1000);
        let all = nodes.len() as u32;
        let time = |process: u32, round: u64| times[(process as usize * 7 + round as usize) % times.len()];
        let mut supplied = vec![0u64; nodes.len()];
        let mut due: Vec<u64> = (0..all).map(|process| world.now + time(process, 0)).collect();
        for _ in 0..6000 {
            for process in 0..all {
                let index = process as usize;
                let is_next = supplied[index] as usize == world.results[index].len() && supplied[index] < 3;
                if is_next && world.now >= due[index] {
                    supplied[index] += 1;
                    due[index] = world.now + time(process, supplied[index]);
                    let value = supplied[index];
                    world.act(process, |core, now| core.supply(0, rules(), numbers(process, value), now));
                }
            }
            world.run(1);
        }
        for results in &world.results {
            prop_assert_eq!(results.len(), 3);
            prop_assert!(results.iter().all(|(_, reduced)| reduced.difference.is_none()));
        }
        prop_assert!(world.cores.iter().flatten().all(|core| core.first.is_none() && core.garbled == 0));
    }
}
