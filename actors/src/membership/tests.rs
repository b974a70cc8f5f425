//! Memberships of several processes in one, over socket pairs and loopback. Real processes: `tests/membership_processes.rs`.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use super::letter::Body;
use super::*;

const KEY: [u8; 32] = [5; 32];
const SESSION: [u8; 16] = [6; 16];
const EPOCH: u64 = 3;
/// For what should come at once, on a machine that does much else.
const SOON: Duration = Duration::from_secs(20);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A session's number of its own, so that tests in one process stay apart.
fn session(test: u8) -> [u8; 16] {
    let mut session = SESSION;
    session[0] = test;
    session
}

/// Configurations of `processes` that reach each other.
fn configs(test: u8, processes: u32) -> Vec<MembershipConfig> {
    let loopback: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let config = |p| MembershipConfig::new(p, processes, session(test), EPOCH, KEY, bind(loopback).expect("loopback"));
    let mut configs: Vec<MembershipConfig> = (0..processes).map(config).collect();
    let addresses: Vec<_> = configs.iter().map(|c| c.heartbeat.local_addr().expect("bound")).collect();
    for a in 0..processes {
        for b in 0..a {
            let (to_b, to_a) = UnixStream::pair().expect("a pair");
            configs[a as usize].links.insert(b, to_b.into());
            configs[b as usize].links.insert(a, to_a.into());
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

/// The first cause, which must come next but for messages and farewells.
fn ended(membership: &Membership) -> FirstCause {
    let until = Instant::now() + SOON;
    loop {
        match membership.notices().recv_deadline(until).expect("an end") {
            MembershipEvent::Ended(first) => return first,
            MembershipEvent::Told { .. } | MembershipEvent::Left { .. } => {}
        }
    }
}

fn told(membership: &Membership) -> (u32, u16, Vec<u8>) {
    match membership.notices().recv_timeout(SOON).expect("a message") {
        MembershipEvent::Told { from, topic, bytes } => (from, topic, bytes),
        other => panic!("{other:?}"),
    }
}

/// All end in order, together.
fn leave(members: Vec<Membership>) {
    thread::scope(|s| {
        for member in members {
            s.spawn(move || {
                assert!(member.leave(), "peers answer");
                assert_eq!(member.first_cause(), None);
            });
        }
    });
}

#[test]
fn messages_arrive_in_order() {
    let members = world(1, 3);
    for i in 0..2000u32 {
        // More than a window, in pieces that the receiver takes.
        members[0].tell(1, 7, i.to_le_bytes().to_vec()).expect("it keeps up");
        assert_eq!(told(&members[1]), (0, 7, i.to_le_bytes().to_vec()));
    }
    members[2].tell_all(9, &vec![1; MESSAGE_BYTES_MAX]).expect("fits");
    for receiver in &members[..2] {
        assert_eq!(told(receiver), (2, 9, vec![1; MESSAGE_BYTES_MAX]));
    }
    let too_large = members[0].tell(1, 0, vec![0; MESSAGE_BYTES_MAX + 1]).expect_err("too large");
    assert!(matches!(too_large, MembershipError::TooLarge { .. }));
    assert!(matches!(members[0].tell(3, 0, vec![]), Err(MembershipError::NoPeer { process: 3, processes: 3 })));
    assert!(matches!(members[0].tell(0, 0, vec![]), Err(MembershipError::NoPeer { .. })));
    leave(members);
}

#[test]
fn a_world_of_one() {
    leave(world(2, 1));
}

#[test]
fn a_failure_is_named_everywhere_with_its_code() {
    let members = world(3, 3);
    members[1].fail("out of memory: 12 GiB", 71);
    let first = FirstCause { process: 1, cause: "out of memory: 12 GiB".into(), exit: 71 };
    for member in &members {
        assert_eq!(ended(member), first);
        assert!(member.notices().try_recv().is_err(), "told once");
        assert!(matches!(member.tell(0, 0, vec![]), Err(MembershipError::Ended(_))));
    }
}

#[test]
fn a_dropped_membership_is_a_failure() {
    let mut members = world(4, 3);
    drop(members.remove(1));
    for member in &members {
        let first = ended(member);
        assert_eq!((first.process, first.exit), (1, 70));
        assert!(first.cause.contains("without leaving"), "{first}");
    }
}

#[test]
fn who_leaves_in_order_is_not_lost() {
    let mut configs = configs(5, 3);
    configs.iter_mut().for_each(|c| (c.every, c.deadline) = (ms(50), ms(1000)));
    let mut members = start(configs);
    let gone = members.remove(2);
    gone.tell(0, 1, b"last word".to_vec()).expect("open");
    assert!(gone.leave());
    drop(gone);
    assert_eq!(told(&members[0]), (2, 1, b"last word".to_vec()));
    for member in &members {
        assert_eq!(member.notices().recv_timeout(SOON), Ok(MembershipEvent::Left { process: 2 }));
        assert!(matches!(member.tell(2, 0, vec![]), Err(MembershipError::Gone { process: 2 })));
        // Longer than the deadline: its silence, too, is no failure; nor is a suspicion that comes late.
        member.suspect(2, "connection reset");
        assert!(member.notices().recv_timeout(ms(1700)).is_err());
        let status = member.peers().into_iter().find(|p| p.process == 2).expect("listed");
        assert_eq!((status.left, status.health), (true, None));
    }
    members[0].tell(1, 2, b"on".to_vec()).expect("the others go on");
    assert_eq!(told(&members[1]), (0, 2, b"on".to_vec()));
    leave(members);
}

#[test]
fn a_late_cause_wins_within_the_grace_window() {
    let members = world(6, 4);
    // Both connections of process 3 break first, as seen by others; then it tells why.
    members[0].suspect(3, "connection reset");
    members[1].suspect(3, "connection reset");
    members[2].fail("loss is not a number at step 9", 80);
    for member in &members {
        let first = ended(member);
        assert_eq!((first.process, first.exit), (2, 80), "{first}");
    }
}

#[test]
fn a_suspicion_alone_ends_the_session() {
    let members = world(7, 3);
    members[0].suspect(2, "connection reset by peer");
    for member in &members {
        let first = ended(member);
        assert_eq!((first.process, first.exit), (2, 69));
        let seen = if std::ptr::eq(member, &members[0]) { "seen by this process, 0" } else { "seen by process 0" };
        assert_eq!(first.cause, format!("connection reset by peer ({seen})"));
    }
}

#[test]
fn a_one_way_partition_ends_both_sides() {
    let mut configs = configs(8, 2);
    configs.iter_mut().for_each(|c| (c.every, c.deadline) = (ms(50), ms(1000)));
    // What process 0 sends to 1 gets lost; 1 is heard by 0.
    let nowhere = bind((Ipv4Addr::LOCALHOST, 0).into()).expect("loopback");
    configs[0].addresses.insert(1, nowhere.local_addr().expect("bound"));
    for member in &start(configs) {
        let first = ended(member);
        assert_eq!((first.process, first.exit), (0, 69));
        assert!(first.cause.contains("no heartbeat for 1."), "{first}");
    }
}

#[test]
fn datagrams_that_are_not_ours_are_refused_and_counted() {
    let mut configs = configs(9, 2);
    // No beat of the real peer takes the sequence numbers below.
    configs[1].every = Duration::from_secs(1);
    let target = configs[0].heartbeat.local_addr().expect("bound");
    let members = start(configs);
    let sender = bind((Ipv4Addr::LOCALHOST, 0).into()).expect("loopback");
    let good = Codec::new(&KEY, session(9), EPOCH, 2);
    let replayed = good.write(1, 1_000_000, 42, None);
    let datagrams = [
        replayed,
        replayed,
        good.write(1, 999_999, 43, None),
        Codec::new(&[0; 32], session(9), EPOCH, 2).write(1, 2_000_000, 44, None),
        Codec::new(&KEY, session(9), EPOCH - 1, 2).write(1, 2_000_000, 45, None),
        Codec::new(&KEY, SESSION, EPOCH, 2).write(1, 2_000_000, 46, None),
    ];
    for datagram in datagrams {
        sender.send_to(&datagram, target).expect("sent");
    }
    sender.send_to(b"hello", target).expect("sent");
    let until = Instant::now() + SOON;
    while members[0].counters().bad_format == 0 {
        assert!(Instant::now() < until, "{:?}", members[0].counters());
        thread::yield_now();
    }
    let counters = members[0].counters();
    // The real peer's own beats come after sequence 1 000 000 here, so they are replays, too.
    assert!(counters.replays >= 2, "{counters:?}");
    let Counters { bad_format, bad_mac, other_session, old_epoch, newer_epoch, garbled, .. } = counters;
    assert_eq!((bad_format, bad_mac, other_session, old_epoch, newer_epoch, garbled), (1, 1, 1, 1, 0, 0));
    assert_eq!(members[0].peers()[0].step, 42, "only the good one was taken");
    leave(members);
}

#[test]
fn a_newer_epoch_fences_the_old_one() {
    let configs = configs(10, 2);
    let target = configs[0].heartbeat.local_addr().expect("bound");
    let members = start(configs);
    let sender = bind((Ipv4Addr::LOCALHOST, 0).into()).expect("loopback");
    let newer = Codec::new(&KEY, session(10), EPOCH + 1, 2).write(1, 1, 0, None);
    sender.send_to(&newer, target).expect("sent");
    for member in &members {
        let first = ended(member);
        assert_eq!((first.process, first.exit), (0, 75));
    }
}

#[test]
fn what_no_peer_may_send_is_counted() {
    let (sender, notices) = bounded(8);
    let shared = Shared::new(0, 2, EPOCH, ms(0), sender);
    shared.receive(1, Body::Received { urgent: 1 }.into());
    shared.garbled(1, "noise");
    assert_eq!(shared.counters().garbled, 2);
    // Neither is a process of this world.
    shared.receive(0, Body::Leaving.into());
    shared.receive(2, Body::Leaving.into());
    assert!(notices.try_recv().is_err());
    shared.receive(1, Body::Message { topic: 1 }.into());
    assert!(matches!(notices.try_recv(), Ok(MembershipEvent::Told { from: 1, .. })));
}

#[test]
fn messages_that_nobody_takes_end_the_session() {
    let (sender, notices) = bounded(NOTICES_MAX + 2);
    let shared = Shared::new(0, 2, EPOCH, ms(0), sender);
    for _ in 0..NOTICES_MAX + 10 {
        shared.receive(1, Body::Message { topic: 1 }.into());
    }
    let all: Vec<_> = notices.try_iter().collect();
    assert_eq!(all.len(), NOTICES_MAX + 1);
    let Some(MembershipEvent::Ended(first)) = all.last() else { panic!("{:?}", all.last()) };
    assert_eq!((first.process, first.exit), (0, 70));
}

/// Hands bytes on between two streams, but while `cut` it takes none and closes nothing: a frozen peer, or a cut cable.
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
            // As a peer's end does.
            let _ = to.shutdown(Shutdown::Both);
        });
    }
    (a, b)
}

/// Hands datagrams on, but drops them while `cut`.
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

/// Two processes whose network can be cut: their connection, and the heartbeats of those named.
fn with_network(test: u8, deadline: Duration, silenced: &[u32]) -> (Vec<Membership>, Arc<AtomicBool>) {
    let mut configs = configs(test, 2);
    let cut = Arc::new(AtomicBool::new(false));
    let (a, b) = proxy(cut.clone());
    for (config, link) in configs.iter_mut().zip([a, b]) {
        let peer = 1 - config.process;
        config.links.insert(peer, link.into());
        if silenced.contains(&config.process) {
            let address = relay(cut.clone(), config.addresses[&peer]);
            config.addresses.insert(peer, address);
        }
        (config.every, config.deadline) = (ms(50), deadline);
    }
    (start(configs), cut)
}

#[test]
fn a_flap_shorter_than_the_deadline_is_no_failure() {
    let (members, cut) = with_network(18, ms(4000), &[0, 1]);
    cut.store(true, Ordering::Relaxed);
    members[0].tell(1, 1, b"through the cut".to_vec()).expect("open");
    assert!(members[1].notices().recv_timeout(ms(3000)).is_err());
    cut.store(false, Ordering::Relaxed);
    assert_eq!(told(&members[1]), (0, 1, b"through the cut".to_vec()));
    leave(members);
}

#[test]
fn a_partition_ends_both_sides() {
    let (members, cut) = with_network(19, ms(1000), &[0, 1]);
    cut.store(true, Ordering::Relaxed);
    for (own, member) in members.iter().enumerate() {
        // Neither can hear of the other's view.
        let first = ended(member);
        assert_eq!((first.process, first.exit), (1 - own as u32, 69));
        assert!(first.cause.contains("no heartbeat for 1."), "{first}");
    }
}

#[test]
fn who_is_heard_by_nobody_is_told_by_heartbeats() {
    // No letter gets through: a connection needs both ways. Only the heartbeats of process 1 arrive.
    let (members, cut) = with_network(20, ms(1000), &[0]);
    let begin = Instant::now();
    cut.store(true, Ordering::Relaxed);
    let causes: Vec<_> = members.iter().map(ended).collect();
    assert_eq!((causes[0].process, causes[0].exit), (0, 69));
    assert_eq!(causes[0].cause, "it is lost; why did not get through (seen by process 1)");
    assert_eq!((causes[1].process, causes[1].exit), (0, 69));
    // Not after a deadline of its own, which would begin when process 1 has ended.
    assert!(begin.elapsed() < ms(2400), "{:?}", begin.elapsed());
}

#[test]
fn a_peer_that_does_not_read_costs_an_outbox_and_no_more() {
    let (mut members, cut) = with_network(11, SOON, &[0, 1]);
    cut.store(true, Ordering::Relaxed);
    let (mut sent, mut refused) = (0u64, 0);
    for _ in 0..100_000 {
        match members[0].tell(1, 0, vec![0; 100]) {
            Ok(()) => sent += 1,
            Err(MembershipError::Backlog { process: 1, messages, .. }) => {
                assert!(messages <= outbox::MESSAGES_MAX);
                refused += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    // Beside those that wait, some are in the buffers of the sockets and of the proxy.
    assert!(sent <= 16 * outbox::MESSAGES_MAX && sent + refused == 100_000, "{sent} were sent");
    let start = Instant::now();
    drop(members.remove(0));
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn peers_that_do_not_join_are_named() {
    let mut configs = configs(12, 3);
    let mut config = configs.remove(0);
    config.join_within = ms(300);
    // Process 1 and 2 hold their ends open and say nothing.
    let error = Membership::start(config).expect_err("nobody came");
    assert_eq!(error.to_string(), "processes [1, 2] did not join within 0.3 s: look at their logs");
    assert_eq!(error.exit(), 69);
}

#[test]
fn who_gives_up_joining_says_why() {
    let mut configs = configs(17, 3);
    // Process 2 never comes; 0 gives up first.
    let absent = configs.pop().expect("three");
    configs[0].join_within = ms(1000);
    let threads: Vec<_> = configs.into_iter().map(|c| thread::spawn(move || Membership::start(c))).collect();
    let errors: Vec<_> =
        threads.into_iter().map(|t| t.join().expect("no panic").expect_err("incomplete").to_string()).collect();
    assert!(errors[0].contains("processes [2] did not join within 1.0 s"), "{errors:?}");
    assert!(errors[1].contains("process 0: processes [2] did not join within 1.0 s"), "{errors:?}");
    drop(absent);
}

/// Starts two processes that do not fit together.
fn refused(change: impl Fn(&mut MembershipConfig)) -> Vec<MembershipError> {
    let mut configs = configs(13, 2);
    change(&mut configs[1]);
    let threads: Vec<_> = configs.into_iter().map(|c| thread::spawn(move || Membership::start(c))).collect();
    threads.into_iter().map(|t| t.join().expect("no panic").expect_err("refused")).collect()
}

#[test]
fn another_secret_is_refused() {
    for (own, error) in refused(|c| c.key = [1; 32]).iter().enumerate() {
        let MembershipError::Refused { process } = error else { panic!("{error}") };
        assert_eq!((*process, error.exit()), (1 - own as u32, 76));
    }
}

#[test]
fn another_epoch_is_refused() {
    // The older one may also learn first, from a heartbeat, that it is the older one.
    for (own, error) in refused(|c| c.epoch += 1).iter().enumerate() {
        match (own, error) {
            (0, MembershipError::Ended(first)) => assert_eq!((first.process, error.exit()), (0, 75)),
            (_, MembershipError::Refused { process }) => assert_eq!((*process, error.exit()), (1 - own as u32, 76)),
            (own, error) => panic!("process {own}: {error}"),
        }
    }
}

#[test]
fn wrong_configurations_are_refused() {
    let message = |change: &dyn Fn(&mut MembershipConfig)| {
        let mut config = configs(14, 2).remove(0);
        change(&mut config);
        Membership::start(config).expect_err("wrong").to_string()
    };
    assert!(message(&|c| c.process = 2).contains("numbered 0 to 1"));
    assert!(message(&|c| c.links.clear()).contains("control connections to []"));
    assert!(message(&|c| c.addresses.clear()).contains("heartbeat addresses of []"));
    assert!(message(&|c| c.deadline = ms(999)).contains("give it 4 beats or more"));
}

#[test]
fn heartbeats_tell_the_step() {
    let mut configs = configs(15, 2);
    configs.iter_mut().for_each(|c| c.every = ms(20));
    let members = start(configs);
    members[1].set_step(12);
    let until = Instant::now() + SOON;
    while members[0].peers()[0].step != 12 {
        assert!(Instant::now() < until);
        thread::yield_now();
    }
    let peer = members[0].peers()[0];
    assert_eq!((peer.process, peer.left, peer.health), (1, false, Some(PeerHealth::Alive)));
    leave(members);
}

/// How long a small message takes there and back; printed, since a shared machine's times are no pass or fail.
#[test]
fn round_trip() {
    let members = world(16, 2);
    let mut times: Vec<Duration> = (0..300)
        .map(|_| {
            let start = Instant::now();
            members[0].tell(1, 1, vec![0; 16]).expect("open");
            told(&members[1]);
            members[1].tell(0, 1, vec![0; 16]).expect("open");
            told(&members[0]);
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("round trip: median {:?}, 90th {:?}, max {:?}", times[150], times[270], times[299]);
    leave(members);
}
