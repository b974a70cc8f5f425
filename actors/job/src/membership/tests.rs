//! Tests several memberships in one process. `tests/membership_processes.rs` uses real processes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use super::cause::{Kind, Report};
use super::control_message::Body;
use super::*;

const KEY: [u8; 32] = [5; 32];
const SESSION: [u8; 16] = [6; 16];
const EPOCH: u64 = 3;
/// Timeout on a busy machine for events that normally happen immediately.
const SOON: Duration = Duration::from_secs(20);

pub(super) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A separate session id per test, so that tests in one process do not interact.
fn session(test: u8) -> [u8; 16] {
    let mut session = SESSION;
    session[0] = test;
    session
}

fn configs(test: u8, processes: u32) -> Vec<MembershipConfig> {
    configs_on(test, &vec![0; processes as usize])
}

/// Processes on these nodes, with connections along the control tree.
fn configs_on(test: u8, nodes: &[u32]) -> Vec<MembershipConfig> {
    let (processes, tree) = (nodes.len() as u32, Arc::new(ControlTree::new(nodes)));
    let loopback: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let config = |p| {
        let socket = bind(loopback).expect("loopback");
        MembershipConfig {
            tree: tree.clone(),
            ..MembershipConfig::new(p, processes, session(test), EPOCH, KEY, socket)
        }
    };
    let mut configs: Vec<MembershipConfig> = (0..processes).map(config).collect();
    let addresses: Vec<_> = configs.iter().map(|c| c.heartbeat.local_addr().expect("bound")).collect();
    for a in 0..processes {
        if let Some(b) = tree.parent(a) {
            let (to_b, to_a) = UnixStream::pair().expect("a pair");
            configs[a as usize].connections.insert(b, to_b.into());
            configs[b as usize].connections.insert(a, to_a.into());
            configs[a as usize].addresses.insert(b, addresses[b as usize]);
            configs[b as usize].addresses.insert(a, addresses[a as usize]);
        }
    }
    configs
}

fn start(configs: Vec<MembershipConfig>) -> Vec<Membership> {
    let threads: Vec<_> = configs.into_iter().map(|c| thread::spawn(move || Membership::start(c))).collect();
    threads.into_iter().map(|t| t.join().expect("no panic").expect("joins")).collect()
}

fn world(test: u8, processes: u32) -> Vec<Membership> {
    start(configs(test, processes))
}

/// Returns the first cause. Skips messages and processes that leave.
fn first_cause(membership: &Membership) -> FirstCause {
    let until = Instant::now() + SOON;
    loop {
        match membership.notices().recv_deadline(until).expect("an end") {
            MembershipEvent::Ended(first) => return first,
            MembershipEvent::Message { .. } | MembershipEvent::Left { .. } => {}
        }
    }
}

fn assert_ends(membership: &Membership, process: u32, exit: u8, cause: &str) {
    let first = first_cause(membership);
    assert!((first.process, first.exit) == (process, exit) && first.cause.contains(cause), "{first:?}");
}

fn next_message(membership: &Membership) -> (u32, u16, Vec<u8>) {
    match membership.notices().recv_timeout(SOON).expect("a message") {
        MembershipEvent::Message { from, topic, bytes } => (from, topic, bytes),
        other => panic!("{other:?}"),
    }
}

fn wait_until(is_true: impl Fn() -> bool) {
    let until = Instant::now() + SOON;
    while !is_true() {
        assert!(Instant::now() < until, "timed out");
        thread::yield_now();
    }
}

/// All members leave cleanly, at the same time.
fn leave_all(members: Vec<Membership>) {
    thread::scope(|s| {
        for member in members {
            s.spawn(move || {
                assert!(member.leave(), "peers acknowledge");
                assert_eq!(member.first_cause(), None);
            });
        }
    });
}

#[test]
fn messages_arrive_in_order() {
    let members = world(1, 3);
    for i in 0..2000u32 {
        // Sends more messages than an outbox holds. The receiver reads each message.
        members[0].send(1, 7, i.to_le_bytes().to_vec()).expect("the receiver reads all messages");
        assert_eq!(next_message(&members[1]), (0, 7, i.to_le_bytes().to_vec()));
    }
    members[2].send_to_all(9, &vec![1; MESSAGE_BYTES_MAX]).expect("fits");
    for receiver in &members[..2] {
        assert_eq!(next_message(receiver), (2, 9, vec![1; MESSAGE_BYTES_MAX]));
    }
    let too_large = members[0].send(1, 0, vec![0; MESSAGE_BYTES_MAX + 1]).expect_err("too large");
    assert!(matches!(too_large, MembershipError::TooLarge { .. }));
    assert!(matches!(members[0].send(3, 0, vec![]), Err(MembershipError::NoPeer { process: 3, processes: 3 })));
    assert!(matches!(members[0].send(0, 0, vec![]), Err(MembershipError::NoPeer { .. })));
    leave_all(members);
}

/// In the tree, the leaders are 0, 1 and 4. Process 2 is below 0, and process 3 is below 1.
const NODES: [u32; 5] = [0, 1, 0, 1, 2];

#[test]
fn messages_cross_the_tree() {
    let members = start(configs_on(21, &NODES));
    members[3].send(2, 7, b"to one".to_vec()).expect("a way");
    members[3].send_to_all(8, b"to all").expect("a way");
    assert_eq!(next_message(&members[2]), (3, 7, b"to one".to_vec()));
    for member in [0, 1, 2, 4] {
        assert_eq!(next_message(&members[member]), (3, 8, b"to all".to_vec()));
    }
    leave_all(members);
}

#[test]
fn a_failure_and_a_departure_cross_the_tree() {
    let mut members = start(configs_on(22, &NODES));
    let leaving = members.remove(2);
    assert!(leaving.leave());
    drop(leaving);
    for member in &members {
        assert_eq!(member.notices().recv_timeout(SOON), Ok(MembershipEvent::Left { process: 2 }));
    }
    members[2].fail("out of memory", 71);
    members.iter().for_each(|member| assert_ends(member, 3, 71, "out of memory"));
}

#[test]
fn numbers_of_all_processes_are_combined() {
    let members = start(configs_on(23, &NODES));
    let rules: Arc<[MergeRule]> =
        Arc::new([MergeRule::Max { words: 1 }, MergeRule::First { words: 1 }, MergeRule::Same(None)]);
    let fields = |process: u64, value| vec![vec![process], if process == 0 { vec![9] } else { vec![] }, vec![value]];
    for (round, values) in [[5; 5], [5, 5, 6, 5, 5]].into_iter().enumerate() {
        let supply = |(member, process): (&Membership, usize)| {
            member.reduce(4, &rules, fields(process as u64, values[process])).expect("the session runs")
        };
        let results: Vec<_> = members.iter().zip(0..).map(supply).collect();
        for result in results {
            let Reduced { words, difference } = result.recv_timeout(SOON).expect("a result");
            assert_eq!(words, [vec![4], vec![9], vec![]]);
            let values = (0..).zip(values).collect();
            assert_eq!(difference, (round == 1).then_some(Difference { field: 2, values }));
        }
    }
    assert!(matches!(members[0].reduce(4, &rules, vec![vec![0]]), Err(MembershipError::Numbers { topic: 4 })));
    assert!(matches!(members[0].reduce(64, &rules, fields(0, 0)), Err(MembershipError::Numbers { .. })));
    leave_all(members);
}

#[test]
fn a_world_of_one_process_starts_and_ends() {
    leave_all(world(2, 1));
}

#[test]
fn a_failure_is_reported_in_all_processes_with_its_exit_code() {
    let members = world(3, 3);
    members[1].fail("out of memory: 12 GiB", 71);
    let first = FirstCause { process: 1, cause: "out of memory: 12 GiB".into(), exit: 71 };
    for member in &members {
        assert_eq!(first_cause(member), first);
        assert!(member.notices().try_recv().is_err(), "the end is sent once");
        assert!(matches!(member.send(0, 0, vec![]), Err(MembershipError::Ended(_))));
    }
}

#[test]
fn a_dropped_membership_is_a_failure() {
    let mut members = world(4, 3);
    drop(members.remove(1));
    members.iter().for_each(|member| assert_ends(member, 1, 70, "without leaving"));
}

#[test]
fn a_process_that_leaves_in_order_is_not_lost() {
    let mut configs = configs(5, 3);
    configs.iter_mut().for_each(|c| (c.interval, c.deadline) = (ms(50), ms(1000)));
    let mut members = start(configs);
    let leaving = members.remove(2);
    leaving.send(0, 1, b"last message".to_vec()).expect("open");
    assert!(leaving.leave());
    drop(leaving);
    assert_eq!(next_message(&members[0]), (2, 1, b"last message".to_vec()));
    for member in &members {
        assert_eq!(member.notices().recv_timeout(SOON), Ok(MembershipEvent::Left { process: 2 }));
        assert!(matches!(member.send(2, 0, vec![]), Err(MembershipError::Gone { process: 2 })));
        // Waits longer than the deadline, because missing heartbeats and a late suspicion must not count as failures.
        member.suspect(2, "connection reset");
        assert!(member.notices().recv_timeout(ms(1700)).is_err());
        assert_eq!(member.silent_times().last(), Some(&(2, None)));
    }
    members[0].send(1, 2, b"next".to_vec()).expect("the others continue");
    assert_eq!(next_message(&members[1]), (0, 2, b"next".to_vec()));
    leave_all(members);
}

#[test]
fn a_later_failure_report_beats_symptoms_within_the_grace_window() {
    let members = world(6, 4);
    // Two processes report broken connections to process 3; then process 2 reports its own failure.
    members[0].suspect(3, "connection reset");
    members[1].suspect(3, "connection reset");
    members[2].fail("the loss is NaN at step 9", 80);
    members.iter().for_each(|member| assert_ends(member, 2, 80, "the loss is NaN at step 9"));
}

#[test]
fn a_suspicion_alone_ends_the_session() {
    let members = world(7, 3);
    members[0].suspect(2, "connection reset by peer");
    for member in &members {
        let first = first_cause(member);
        assert_eq!((first.process, first.exit), (2, 69));
        let seen = if std::ptr::eq(member, &members[0]) { "seen by process 0, this one" } else { "seen by process 0" };
        assert_eq!(first.cause, format!("connection reset by peer ({seen})"));
    }
}

#[test]
fn a_one_way_partition_ends_both_sides() {
    let mut configs = configs(8, 2);
    configs.iter_mut().for_each(|c| (c.interval, c.deadline) = (ms(50), ms(1000)));
    // Heartbeats from process 0 to 1 are lost; those from 1 to 0 arrive.
    let unused = bind((Ipv4Addr::LOCALHOST, 0).into()).expect("loopback");
    configs[0].addresses.insert(1, unused.local_addr().expect("bound"));
    start(configs).iter().for_each(|member| assert_ends(member, 0, 69, "no heartbeat for 1."));
}

#[test]
fn invalid_datagrams_are_rejected_and_counted() {
    let mut configs = configs(9, 2);
    // The real peer sends few heartbeats, so that they do not interfere with the sequence numbers below.
    configs[1].interval = Duration::from_secs(1);
    let target = configs[0].heartbeat.local_addr().expect("bound");
    let members = start(configs);
    let sender = bind((Ipv4Addr::LOCALHOST, 0).into()).expect("loopback");
    let valid = Codec::new(&KEY, session(9), EPOCH, 2);
    let replayed = valid.write(1, 1_000_000, None, None);
    let datagrams = [
        replayed,
        replayed,
        valid.write(1, 999_999, None, None),
        Codec::new(&[0; 32], session(9), EPOCH, 2).write(1, 2_000_000, None, None),
        Codec::new(&KEY, session(9), EPOCH - 1, 2).write(1, 2_000_000, None, None),
        Codec::new(&KEY, SESSION, EPOCH, 2).write(1, 2_000_000, None, None),
    ];
    for datagram in datagrams {
        sender.send_to(&datagram, target).expect("sent");
    }
    sender.send_to(b"hello", target).expect("sent");
    wait_until(|| members[0].counters().bad_format > 0);
    let counters = members[0].counters();
    // The real peer's heartbeats have lower sequence numbers than 1 000 000, so they also count as replays.
    assert!(counters.replays >= 2, "{counters:?}");
    let Counters { bad_format, bad_mac, other_session, old_epoch, newer_epoch, garbled, .. } = counters;
    assert_eq!((bad_format, bad_mac, other_session, old_epoch, newer_epoch, garbled), (1, 1, 1, 1, 0, 0));
    leave_all(members);
}

#[test]
fn a_newer_epoch_fences_the_old_one() {
    let configs = configs(10, 2);
    let target = configs[0].heartbeat.local_addr().expect("bound");
    let members = start(configs);
    let sender = bind((Ipv4Addr::LOCALHOST, 0).into()).expect("loopback");
    let newer = Codec::new(&KEY, session(10), EPOCH + 1, 2).write(1, 1, None, None);
    sender.send_to(&newer, target).expect("sent");
    members.iter().for_each(|member| assert_ends(member, 0, 75, "but a newer epoch has begun"));
}

/// The state of process 0 in a world of two processes.
fn shared_of_two(sender: crossbeam_channel::Sender<MembershipEvent>) -> Shared {
    Shared::new(0, Arc::new(ControlTree::new(&[0, 0])), EPOCH, (ms(1000), ms(0)), sender)
}

#[test]
fn invalid_messages_of_peers_are_counted() {
    let (sender, notices) = bounded(8);
    let shared = shared_of_two(sender);
    shared.receive(1, Body::Received { urgent: 1 }.into());
    shared.garbled(1, "noise");
    let forged = Report { by: 0, about: 0, kind: Kind::Failed, follows: false, cause: String::new(), exit: 70 };
    shared.receive(1, Body::Report(forged).into());
    assert_eq!((shared.counters().garbled, shared.first_cause()), (3, None));
    // Messages of processes that are not peers are ignored.
    shared.receive(0, Body::Leaving { processes: vec![0] }.into());
    shared.receive(2, Body::Leaving { processes: vec![2] }.into());
    assert!(notices.try_recv().is_err());
    shared.receive(1, Body::Message { from: 1, to: 0, topic: 1 }.into());
    assert!(matches!(notices.try_recv(), Ok(MembershipEvent::Message { from: 1, .. })));
}

#[test]
fn too_many_unread_messages_end_the_session() {
    let (sender, notices) = bounded(NOTICES_MAX + 2);
    let shared = shared_of_two(sender);
    for _ in 0..NOTICES_MAX + 10 {
        shared.receive(1, Body::Message { from: 1, to: 0, topic: 1 }.into());
    }
    let all: Vec<_> = notices.try_iter().collect();
    assert_eq!(all.len(), NOTICES_MAX + 1);
    let Some(MembershipEvent::Ended(first)) = all.last() else { panic!("{:?}", all.last()) };
    assert_eq!((first.process, first.exit), (0, 70));
}

/// Forwards bytes between two streams. While `cut`, it neither forwards nor closes, like a frozen peer.
fn proxy(cut: Arc<AtomicBool>) -> (UnixStream, UnixStream) {
    let (a, inner_a) = UnixStream::pair().expect("a pair");
    let (inner_b, b) = UnixStream::pair().expect("a pair");
    for (from, to) in [(&inner_a, &inner_b), (&inner_b, &inner_a)] {
        let (mut from, mut to) = (from.try_clone().expect("a handle"), to.try_clone().expect("a handle"));
        let cut = cut.clone();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = from.read(&mut bytes) {
                while cut.load(Ordering::Relaxed) {
                    thread::park_timeout(ms(10));
                }
                if to.write_all(&bytes[..read]).is_err() {
                    break;
                }
            }
            // The peer sees the end of the connection.
            let _ = to.shutdown(Shutdown::Both);
        });
    }
    (a, b)
}

/// Forwards datagrams, but drops them while `cut`.
fn relay(cut: Arc<AtomicBool>, to: SocketAddr) -> SocketAddr {
    let socket = bind((Ipv4Addr::LOCALHOST, 0).into()).expect("loopback");
    let address = socket.local_addr().expect("bound");
    thread::spawn(move || {
        let mut bytes = [0; 256];
        while let Ok((length, _)) = socket.recv_from(&mut bytes) {
            if !cut.load(Ordering::Relaxed) {
                // The receiver may have ended.
                let _ = socket.send_to(&bytes[..length], to);
            }
        }
    });
    address
}

/// Two processes. Their network can be cut: their connection, and the heartbeats of the processes in `silenced`.
fn with_network(test: u8, deadline: Duration, silenced: &[u32]) -> (Vec<Membership>, Arc<AtomicBool>) {
    let mut configs = configs(test, 2);
    let cut = Arc::new(AtomicBool::new(false));
    let (a, b) = proxy(cut.clone());
    for (config, connection) in configs.iter_mut().zip([a, b]) {
        let peer = 1 - config.process;
        config.connections.insert(peer, connection.into());
        if silenced.contains(&config.process) {
            let address = relay(cut.clone(), config.addresses[&peer]);
            config.addresses.insert(peer, address);
        }
        (config.interval, config.deadline) = (ms(50), deadline);
    }
    (start(configs), cut)
}

#[test]
fn an_outage_shorter_than_the_deadline_is_not_a_failure() {
    let (members, cut) = with_network(18, ms(4000), &[0, 1]);
    cut.store(true, Ordering::Relaxed);
    members[0].send(1, 1, b"during the outage".to_vec()).expect("open");
    assert!(members[1].notices().recv_timeout(ms(3000)).is_err());
    cut.store(false, Ordering::Relaxed);
    assert_eq!(next_message(&members[1]), (0, 1, b"during the outage".to_vec()));
    leave_all(members);
}

#[test]
fn a_partition_ends_both_sides() {
    let (members, cut) = with_network(19, ms(1000), &[0, 1]);
    cut.store(true, Ordering::Relaxed);
    for (own, member) in members.iter().enumerate() {
        // Neither side receives the other's report.
        assert_ends(member, 1 - own as u32, 69, "no heartbeat for 1.");
    }
}

#[test]
fn a_process_whose_heartbeats_are_lost_learns_it_from_its_peers_heartbeats() {
    // No control message arrives, because the connection is cut. Only the heartbeats of process 1 arrive.
    let (members, cut) = with_network(20, ms(1000), &[0]);
    let begin = Instant::now();
    cut.store(true, Ordering::Relaxed);
    let causes: Vec<_> = members.iter().map(first_cause).collect();
    assert_eq!((causes[0].process, causes[0].exit), (0, 69));
    assert_eq!(causes[0].cause, "it was lost; the message with the reason did not arrive (seen by process 1)");
    assert_eq!((causes[1].process, causes[1].exit), (0, 69));
    // Process 0 does not wait for its own heartbeat deadline, which would begin only when process 1 has ended.
    assert!(begin.elapsed() < ms(2400), "{:?}", begin.elapsed());
}

#[test]
fn a_peer_that_does_not_read_costs_at_most_one_outbox() {
    let (mut members, cut) = with_network(11, SOON, &[0, 1]);
    cut.store(true, Ordering::Relaxed);
    let (mut sent, mut rejected) = (0u64, 0);
    for _ in 0..100_000 {
        match members[0].send(1, 0, vec![0; 100]) {
            Ok(()) => sent += 1,
            Err(MembershipError::Backlog { process: 1, messages, .. }) => {
                assert!(messages <= outbox::MESSAGES_MAX);
                rejected += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    // Some of the sent messages are not in the outbox, but in the buffers of the sockets and of the proxy.
    assert!(sent <= 16 * outbox::MESSAGES_MAX && sent + rejected == 100_000, "{sent} sent, {rejected} rejected");
    let start = Instant::now();
    drop(members.remove(0));
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn peers_that_do_not_join_are_reported() {
    let mut configs = configs(12, 3);
    let mut config = configs.remove(0);
    config.join_within = ms(300);
    // Processes 1 and 2 keep their connections open and send nothing.
    let error = Membership::start(config).expect_err("peers are missing");
    assert_eq!(error.to_string(), "processes [1, 2] did not join within 0.3 s: see their logs");
    assert_eq!(error.exit(), Exit::PeerUnavailable);
}

#[test]
fn a_process_that_gives_up_joining_reports_the_reason() {
    let mut configs = configs(17, 3);
    // Process 2 never joins; process 0 gives up first.
    let absent = configs.pop().expect("three");
    configs[0].join_within = ms(1000);
    let threads: Vec<_> = configs.into_iter().map(|c| thread::spawn(move || Membership::start(c))).collect();
    let errors: Vec<_> =
        threads.into_iter().map(|t| t.join().expect("no panic").expect_err("incomplete").to_string()).collect();
    assert!(errors[0].contains("processes [2] did not join within 1.0 s"), "{errors:?}");
    assert!(errors[1].contains("process 0: processes [2] did not join within 1.0 s"), "{errors:?}");
    drop(absent);
}

#[test]
fn a_peer_that_disconnects_while_joining_is_reported() {
    let mut configs = configs(13, 2);
    let peer = configs.remove(1);
    let joining = thread::spawn(move || Membership::start(configs.remove(0)));
    peer.connections[&0].shutdown(Shutdown::Both).expect("open");
    let error = joining.join().expect("no panic").expect_err("disconnected");
    assert!(matches!(error, MembershipError::Closed { process: 1 }), "{error}");
    assert_eq!(error.exit(), Exit::PeerUnavailable);
}

#[test]
fn wrong_configurations_are_refused() {
    let message = |change: &dyn Fn(&mut MembershipConfig)| {
        let mut config = configs(14, 2).remove(0);
        change(&mut config);
        Membership::start(config).expect_err("wrong").to_string()
    };
    assert!(message(&|c| c.process = 2).contains("numbered 0 to 1"));
    assert!(message(&|c| c.connections.clear()).contains("control connections to []"));
    assert!(message(&|c| c.addresses.clear()).contains("heartbeat addresses of []"));
    assert!(message(&|c| c.deadline = ms(999)).contains("at least 4 intervals"));
}

#[test]
fn a_heartbeat_ends_the_silence_of_its_sender() {
    let mut configs = configs(15, 2);
    configs.iter_mut().for_each(|c| c.interval = ms(20));
    let members = start(configs);
    let begin = Instant::now();
    // True only if a heartbeat has arrived after `begin`.
    wait_until(|| matches!(members[0].silent_times()[..], [(1, Some(silent))] if silent < begin.elapsed()));
    leave_all(members);
}

/// Prints the round-trip time of a small message. It checks no limit, because the machine may be busy.
#[test]
fn small_messages_complete_round_trips() {
    let members = world(16, 2);
    let mut times: Vec<Duration> = (0..300)
        .map(|_| {
            let start = Instant::now();
            members[0].send(1, 1, vec![0; 16]).expect("open");
            next_message(&members[1]);
            members[1].send(0, 1, vec![0; 16]).expect("open");
            next_message(&members[0]);
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("round trip: median {:?}, 90th percentile {:?}, max {:?}", times[150], times[270], times[299]);
    leave_all(members);
}
