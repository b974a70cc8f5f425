//! Rendezvous of several processes, each a thread, over Unix sockets and loopback.

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{Scope, ScopedJoinHandle, scope};

use shardflow_actors::transport::{Connection, Hello, ListenAddress, Purpose, SessionId, SettledWorld, connect, wire};
use tempfile::TempDir;

use super::messages::{Answer, Call, INTRODUCTION_BYTES_MAX, Ready};
use super::*;
use crate::exit::Report;

type Met = Result<(Roster, Listener), RendezvousError>;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A free port of loopback; nobody else is likely to take it in the next moment.
fn tcp() -> Address {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    Address::Tcp(listener.local_addr().unwrap().to_string())
}

fn unix() -> (TempDir, Address) {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::Unix(folder.path().join("run").join("rendezvous.sock"));
    (folder, address)
}

/// Process `process` of `processes`, on a host of its own name.
fn config(address: &Address, process: u32, processes: u32) -> RendezvousConfig {
    let secret = SharedKey::from_text("a secret of these tests").unwrap();
    let host = format!("host{process}");
    let (version, node) = ("1.0.0".into(), "node".into());
    let (sockets, cores, pid) = ([3; 32], vec![1 << process], 100 + process);
    let identity = Identity { version, binary: [1; 32], node, sockets, cores, host, pid };
    RendezvousConfig {
        process,
        processes,
        facts: vec![Fact::new("mesh", "data=2"), Fact::new("lr", 0.5), Fact::new("plan", "abc")],
        timeout: Duration::from_secs(20),
        report_every: Duration::from_millis(20),
        late_grace: Duration::ZERO,
        conflict_grace: Duration::from_millis(100),
        ..RendezvousConfig::new(address.clone(), secret, identity)
    }
}

fn spawn<'s>(scope: &'s Scope<'s, '_>, config: RendezvousConfig) -> ScopedJoinHandle<'s, Met> {
    scope.spawn(move || rendezvous(&config, |_| {}))
}

/// Process 0, and what it says while it waits.
fn spawn_lead<'s>(scope: &'s Scope<'s, '_>, config: RendezvousConfig) -> (ScopedJoinHandle<'s, Met>, Receiver<String>) {
    let (sender, receiver) = channel();
    let lead = scope.spawn(move || rendezvous(&config, |waiting| drop(sender.send(waiting.to_string()))));
    (lead, receiver)
}

/// Waits until process 0 has said so.
fn until_said(said: &Receiver<String>, expected: &str) {
    let mut last = String::new();
    while last != expected {
        last = said.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|e| panic!("{e}: '{last}', not '{expected}'"));
    }
}

/// All processes at once; `change` alters their configurations.
fn meet(address: &Address, processes: u32, change: impl Fn(&mut RendezvousConfig)) -> Vec<Met> {
    let configs = (0..processes).map(|process| {
        let mut config = config(address, process, processes);
        change(&mut config);
        config
    });
    scope(|s| {
        let threads: Vec<_> = configs.map(|config| spawn(s, config)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn verdict(met: Met) -> RendezvousRefusal {
    match met {
        Err(RendezvousError::Refused(verdict)) => verdict,
        other => panic!("{other:?}"),
    }
}

fn who(process: u32) -> ProcessLabel {
    ProcessLabel { process, host: format!("host{process}"), pid: 100 + process }
}

/// Somebody who only introduces itself.
fn introduce(config: &RendezvousConfig) -> Connection {
    let (session, purpose) = (SessionId::default(), Purpose::Rendezvous);
    let hello = Hello { session, epoch: config.restart, from: config.process, to: 0, purpose };
    let mut link = connect(&config.coordinator, &config.secret, &hello, soon()).unwrap();
    let introduction = introduction(config, vec![]).unwrap();
    wire::write_message(&mut link, &Call::Join(introduction), INTRODUCTION_BYTES_MAX).unwrap();
    link
}

#[test]
fn all_get_the_same_roster_and_can_dial_each_other() {
    for processes in 1..=8 {
        let (_folder, unix) = unix();
        for address in [unix, tcp()] {
            let met = meet(&address, processes, |config| config.restart = u64::from(config.process * 3 % 5));
            let met: Vec<(Roster, Listener)> = met.into_iter().map(Result::unwrap).collect();
            let roster = &met[0].0;
            assert!(met.iter().all(|(other, _)| other == roster));
            assert_eq!(roster.epoch, (0..u64::from(processes)).map(|p| p * 3 % 5).max().unwrap());
            assert_ne!(roster.session, SessionId::default());
            assert_eq!(
                roster.members.iter().map(Member::who).collect::<Vec<_>>(),
                (0..processes).map(who).collect::<Vec<_>>()
            );
            let secret = config(&address, 0, 1).secret;
            let SettledWorld { session, epoch, .. } = roster.world();
            for (from, to) in (0..processes).flat_map(|from| (0..processes).map(move |to| (from, to))) {
                let hello = Hello { session, epoch, from, to, purpose: Purpose::Control };
                let member = &roster.members[to as usize];
                for way in [member.tcp().unwrap(), member.unix().unwrap()] {
                    let mut dialled = connect(way, &secret, &hello, soon()).unwrap();
                    let mut accepted = met[to as usize].1.wait(from, Purpose::Control, soon()).unwrap();
                    dialled.write_all(&[from as u8]).unwrap();
                    let mut byte = [0];
                    accepted.read_exact(&mut byte).unwrap();
                    assert_eq!(u32::from(byte[0]), from);
                }
            }
        }
    }
}

#[test]
fn the_missing_are_named_while_waiting_and_at_the_deadline() {
    let (_folder, address) = unix();
    let brief = |process| RendezvousConfig { timeout: Duration::from_secs(2), ..config(&address, process, 4) };
    scope(|s| {
        let (lead, said) = spawn_lead(s, brief(0));
        let joined = spawn(s, config(&address, 1, 4));
        until_said(&said, "waiting for ranks 2, 3: 2 of 4 here");
        for met in [lead, joined] {
            let verdict = verdict(met.join().unwrap());
            let RendezvousRefusal::Missing { missing, waited_ms, .. } = &verdict else { panic!("{verdict}") };
            assert!(*missing == [2, 3] && *waited_ms >= 2000, "{verdict}");
            let told = format!("ranks 2, 3 did not come in {waited_ms} ms: 2 of 4 were here");
            assert!(verdict.to_string().starts_with(&told), "{verdict}");
        }
    });
}

#[test]
fn a_missing_rank_0_is_waited_for_and_named() {
    let (_folder, address) = unix();
    let brief = RendezvousConfig { timeout: Duration::from_millis(100), ..config(&address, 1, 2) };
    let mut said = Vec::new();
    let met = rendezvous(&brief, |waiting| said.push(waiting.to_string()));
    assert_eq!(said[0], format!("waiting for rank 0 at {address}"));
    assert!(matches!(met, Err(RendezvousError::Transport(TransportError::Unreachable { .. }))), "{met:?}");
}

#[test]
fn what_does_not_fit_is_refused_to_all_with_both_values() {
    type Change = fn(&mut RendezvousConfig);
    let hex = |byte: u8| format!("blake3 {}", format!("{byte:02x}").repeat(32));
    let cases: [(&str, Change, &str, &str); 8] = [
        ("version", |c| c.identity.version = "1.0.1".into(), "1.0.0", "1.0.1"),
        ("executable", |c| c.identity.binary = [3; 32], &hex(1), &hex(3)),
        ("plan", |c| c.facts[2].value = "abd".into(), "abc", "abd"),
        ("mesh", |c| c.facts[0].value = "tensor=2".into(), "data=2", "tensor=2"),
        ("number of processes", |c| c.processes = 5, "4", "5"),
        // The first difference is the one that is reported: another learning rate makes another plan, say.
        ("lr", |c| c.facts[1..].iter_mut().for_each(|fact| fact.value = "0.25".into()), "0.5", "0.25"),
        ("lr", |c| drop(c.facts.remove(1)), "0.5", "nothing"),
        ("batch", |c| c.facts.push(Fact::new("batch", 4)), "nothing", "4"),
    ];
    for (name, change, ours, theirs) in cases {
        let (_folder, address) = unix();
        let met = meet(&address, 4, |config| {
            config.conflict_grace = Duration::from_secs(20);
            if config.process == 2 {
                change(config);
            }
        });
        let (first, second) = (who(0), who(2));
        let (name, ours, theirs) = (name.into(), ours.into(), theirs.into());
        let expected = Conflict::Differs { name, first, ours, second, theirs };
        for met in met {
            assert_eq!(verdict(met), RendezvousRefusal::Conflicts(vec![expected.clone()]));
        }
    }
}

#[test]
fn a_rank_beyond_the_world_is_told_too() {
    let (_folder, address) = unix();
    scope(|s| {
        let lead = spawn(s, config(&address, 0, 2));
        let beyond = verdict(spawn(s, config(&address, 6, 8)).join().unwrap());
        let told = beyond.to_string();
        let expected = "rank 0 (host host0, pid 100) and rank 6 (host host6, pid 106) differ in their number of processes: 2 and 8";
        assert!(told.contains(expected), "{told}");
        assert_eq!(verdict(lead.join().unwrap()), beyond);
    });
}

#[test]
fn two_of_one_rank_are_both_named() {
    let (_folder, address) = unix();
    scope(|s| {
        let (lead, said) = spawn_lead(s, config(&address, 0, 3));
        let first = spawn(s, config(&address, 1, 3));
        until_said(&said, "waiting for rank 2: 2 of 3 here");
        let mut other = config(&address, 1, 3);
        other.identity.host = "elsewhere".into();
        let second = ProcessLabel { process: 1, host: "elsewhere".into(), pid: 101 };
        let expected = RendezvousRefusal::Conflicts(vec![Conflict::Duplicate { first: who(1), second }]);
        for met in [spawn(s, other), first, lead] {
            assert_eq!(verdict(met.join().unwrap()), expected);
        }
    });
}

#[test]
fn two_of_rank_0_are_both_named() {
    let (_folder, unix) = unix();
    for address in [unix, tcp()] {
        scope(|s| {
            let (lead, said) = spawn_lead(s, config(&address, 0, 2));
            until_said(&said, "waiting for rank 1: 1 of 2 here");
            let mut other = config(&address, 0, 2);
            other.identity.pid = 7;
            let second = ProcessLabel { pid: 7, ..who(0) };
            let expected = RendezvousRefusal::Conflicts(vec![Conflict::Duplicate { first: who(0), second }]);
            for met in [spawn(s, other), lead] {
                assert_eq!(verdict(met.join().unwrap()), expected);
            }
        });
    }
}

#[test]
fn who_comes_late_is_refused_and_counted() {
    let (_folder, address) = unix();
    let met = meet(&address, 3, |config| config.restart = 4);
    let (_, endpoint) = met.into_iter().next().unwrap().unwrap();
    let late = RendezvousConfig { restart: 4, late_grace: Duration::from_millis(100), ..config(&address, 1, 3) };
    let error = rendezvous(&late, |_| {}).unwrap_err();
    assert!(matches!(error, RendezvousError::Late { process: 1, epoch: 4, .. }), "{error}");
    assert!(endpoint.refused().old_epoch >= 2);
    // One that was restarted waits for this world to end.
    let next = RendezvousConfig { restart: 5, timeout: Duration::from_millis(100), ..late };
    let error = rendezvous(&next, |_| {}).unwrap_err();
    assert!(matches!(error, RendezvousError::Transport(TransportError::Unreachable { .. })), "{error}");
}

#[test]
fn a_process_that_was_restarted_takes_its_place() {
    let (_folder, address) = unix();
    scope(|s| {
        let (lead, said) = spawn_lead(s, config(&address, 0, 3));
        let older = spawn(s, config(&address, 1, 3));
        until_said(&said, "waiting for rank 2: 2 of 3 here");
        let mut restarted = RendezvousConfig { restart: 1, ..config(&address, 1, 3) };
        restarted.identity.pid = 201;
        let newer = spawn(s, restarted);
        // It loses its place, comes again, and hears who has it.
        let (first, second) = (ProcessLabel { pid: 201, ..who(1) }, who(1));
        let expected = RendezvousRefusal::Conflicts(vec![Conflict::Duplicate { first, second }]);
        assert_eq!(verdict(older.join().unwrap()), expected);
        let last = spawn(s, config(&address, 2, 3));
        for met in [lead, newer, last] {
            let (roster, _) = met.join().unwrap().unwrap();
            assert_eq!((roster.epoch, roster.members[1].pid), (1, 201));
        }
    });
}

#[test]
fn a_process_that_dies_while_it_waits_is_missing_again() {
    let (_folder, address) = unix();
    scope(|s| {
        let (lead, said) = spawn_lead(s, config(&address, 0, 3));
        let dying = introduce(&config(&address, 1, 3));
        until_said(&said, "waiting for rank 2: 2 of 3 here");
        drop(dying);
        until_said(&said, "waiting for ranks 1, 2: 1 of 3 here");
        let others = [1, 2].map(|process| spawn(s, config(&address, process, 3)));
        lead.join().unwrap().unwrap();
        let _ = others.map(|met| met.join().unwrap().unwrap());
    });
}

#[test]
fn a_process_that_dies_at_the_start_is_named_to_all() {
    let (_folder, address) = unix();
    scope(|s| {
        let lead = spawn(s, config(&address, 0, 3));
        let other = spawn(s, config(&address, 2, 3));
        let mut dying = introduce(&config(&address, 1, 3));
        let answer = wire::read_message::<Answer>(&mut dying, wire::MESSAGE_BYTES_MAX).unwrap();
        assert!(matches!(answer, Answer::Roster(_)));
        drop(dying);
        for met in [lead, other] {
            assert_eq!(verdict(met.join().unwrap()), RendezvousRefusal::Lost(who(1)));
        }
    });
}

#[test]
fn a_rank_0_that_was_restarted_is_found_again() {
    let (_folder, address) = unix();
    let Address::Unix(path) = address.clone() else { panic!("it is a Unix address") };
    scope(|s| {
        let secret = config(&address, 0, 2).secret;
        let first = Listener::listen(0, secret, &[ListenAddress::Unix(path)], ListenerOptions::default()).unwrap();
        let other = spawn(s, config(&address, 1, 2));
        drop(first.wait_any(Purpose::Rendezvous, soon()).unwrap());
        drop(first);
        spawn(s, config(&address, 0, 2)).join().unwrap().unwrap();
        other.join().unwrap().unwrap();
    });
}

/// It may say ready for nothing but the session that it was told.
#[test]
fn a_wrong_confirmation_ends_the_start() {
    let (_folder, address) = unix();
    scope(|s| {
        let lead = spawn(s, config(&address, 0, 2));
        let mut liar = introduce(&config(&address, 1, 2));
        wire::write_message(&mut liar, &Ready { session: SessionId([1; 16]) }, 100).unwrap();
        assert_eq!(verdict(lead.join().unwrap()), RendezvousRefusal::Lost(who(1)));
    });
}

#[test]
fn another_secret_is_an_error_of_authentication() {
    let (_folder, address) = unix();
    scope(|s| {
        let lead = spawn(s, RendezvousConfig { timeout: Duration::from_millis(300), ..config(&address, 0, 2) });
        let secret = SharedKey::from_text("another secret of these tests").unwrap();
        let error = rendezvous(&RendezvousConfig { secret, ..config(&address, 1, 2) }, |_| {}).unwrap_err();
        assert!(matches!(&error, RendezvousError::Transport(e) if e.is_authentication()), "{error}");
        let verdict = verdict(lead.join().unwrap());
        assert!(verdict.to_string().ends_with("another secret or version on some rank, or strangers"), "{verdict}");
    });
}

#[test]
fn what_is_said_of_oneself_has_limits() {
    let (_folder, address) = unix();
    let facts =
        |count: usize, bytes: usize| (0..count).map(|i| Fact::new(format!("f{i}"), "x".repeat(bytes))).collect();
    for (facts, expected) in [
        (facts(1, 1025), "f0 of length 1025, at most 1024"),
        (facts(97, 1), "list of facts of length 100, at most 96"),
        (facts(10, 1000), "text of all facts of length "),
    ] {
        let error = rendezvous(&RendezvousConfig { facts, ..config(&address, 0, 1) }, |_| {}).unwrap_err();
        assert!(matches!(error, RendezvousError::TooLong { .. }) && error.to_string().contains(expected), "{error}");
    }
    for (process, processes) in [(0, 0), (2, 2), (0, 4097)] {
        let error = rendezvous(&config(&address, process, processes), |_| {}).unwrap_err();
        assert!(matches!(error, RendezvousError::Rank { .. }), "{error}");
    }
}

#[test]
fn a_process_knows_itself() {
    let identity = Identity::of_this_process().unwrap();
    assert_eq!(identity, Identity::of_this_process().unwrap());
    assert!(identity.node.ends_with(&identity.host) && identity.pid == std::process::id());
    let loopback = Ok("127.0.0.1:0".to_string());
    let local = |coordinator: &Address, interface| {
        let found = local_address(coordinator, interface, true, Instant::now());
        found.map(|address| address.to_string()).map_err(|error| error.to_string())
    };
    let error = local(&Address::Tcp("no-such-host.invalid:5".into()), None).unwrap_err();
    assert!(error.starts_with("no way from here to no-such-host.invalid:5"), "{error}");
    assert_eq!(local(&tcp(), None), loopback);
    assert_eq!(local(&unix().1, None), loopback);
    let elsewhere = "10.1.2.3:0".to_string();
    assert_eq!(local(&tcp(), elsewhere.parse().ok()), Ok(elsewhere));
}

/// As a PyTorchJob's master does.
#[test]
fn rank_0_may_know_itself_as_all_addresses() {
    let Address::Tcp(loopback) = tcp() else { panic!("it is TCP") };
    let all = loopback.replace("127.0.0.1", "0.0.0.0");
    let met = meet(&Address::Tcp(loopback.clone()), 3, |config| {
        config.spans_nodes = true;
        if config.process == 0 {
            config.coordinator = Address::Tcp(all.clone());
        }
    });
    for (process, met) in met.into_iter().enumerate().skip(1) {
        let (roster, _) = met.unwrap();
        assert_eq!(roster.members[0].tcp().unwrap().to_string(), loopback, "at process {process}");
    }
}

#[test]
fn zones_are_not_for_other_nodes() {
    let published = |text: &str| unzoned(Address::Tcp(text.into())).to_string();
    assert_eq!(published("[fe80::1%lo]:5"), "[fe80::1]:5");
    assert_eq!(published("[fe80::1%7]:5"), "[fe80::1]:5");
    assert_eq!(published("node1:5"), "node1:5");
}

/// Of rank `rank`, which ends with `exit`.
fn failure(rank: u32, exit: u8) -> Report {
    Report { rank, exit, time_unix_ns: 1, cause: "--width is no multiple of --heads".into(), ..Report::default() }
}

/// How a process ends that was refused because of a report.
fn told(met: Met) -> (u8, String) {
    let verdict = verdict(met);
    let RendezvousRefusal::Failed(report) = &verdict else { panic!("{verdict}") };
    (report.exit, verdict.to_string())
}

#[test]
fn a_process_that_fails_before_it_joins_ends_all() {
    let (_folder, unix) = unix();
    for address in [unix, tcp()] {
        scope(|s| {
            let (lead, said) = spawn_lead(s, config(&address, 0, 4));
            let seated = spawn(s, config(&address, 1, 4));
            until_said(&said, "waiting for ranks 2, 3: 2 of 4 here");
            call(&config(&address, 3, 4), 3..4, &failure(3, 2)).unwrap();
            // It comes after the report, while rank 0 still answers.
            let late = spawn(s, config(&address, 2, 4));
            let expected = "rank 3 ended before it joined: --width is no multiple of --heads (code 2: usage)";
            for met in [seated, late, lead] {
                assert_eq!(told(met.join().unwrap()), (2, expected.to_string()));
            }
        });
    }
}

#[test]
fn somebody_answers_for_a_rank_0_that_failed() {
    let (_folder, unix) = unix();
    for address in [unix, tcp()] {
        scope(|s| {
            // Both look for rank 0 before anybody listens there.
            let waiting = [1, 2].map(|process| spawn(s, config(&address, process, 4)));
            let reporting = s.spawn(|| call(&config(&address, 3, 4), 3..4, &failure(3, 65)));
            // It ends as soon as all have called, long before this.
            let patient = RendezvousConfig { report_within: Duration::from_secs(600), ..config(&address, 0, 4) };
            answer(&patient, 0..1, &failure(0, 2)).unwrap();
            for met in waiting {
                assert_eq!(told(met.join().unwrap()).0, 2, "the first cause");
            }
            reporting.join().unwrap().unwrap();
        });
    }
}

#[test]
fn a_report_that_nobody_takes_ends_in_time() {
    let (_folder, address) = unix();
    let brief =
        |process| RendezvousConfig { report_within: Duration::from_millis(100), ..config(&address, process, 2) };
    let error = call(&brief(1), 1..2, &failure(1, 2)).unwrap_err();
    assert!(matches!(error, RendezvousError::Transport(TransportError::Unreachable { .. })), "{error}");
    answer(&brief(0), 0..1, &failure(0, 2)).unwrap();
}

#[test]
fn a_report_changes_nothing_of_a_world_that_runs() {
    let (_folder, address) = unix();
    let _running = meet(&address, 2, |_| {}).into_iter().map(Result::unwrap).collect::<Vec<_>>();
    let error = call(&config(&address, 1, 2), 1..2, &failure(1, 2)).unwrap_err();
    assert!(error.to_string().contains("is running"), "{error}");
}

/// A peer that holds the secret cannot end the others with success, or with a code that restarts them for ever.
#[test]
fn reports_of_what_is_no_final_failure_are_ignored() {
    let (_folder, address) = unix();
    scope(|s| {
        let (lead, said) = spawn_lead(s, config(&address, 0, 2));
        until_said(&said, "waiting for rank 1: 1 of 2 here");
        for exit in [0, 69, 70] {
            let brief = RendezvousConfig { report_within: Duration::from_millis(200), ..config(&address, 1, 2) };
            assert!(call(&brief, 1..2, &failure(1, exit)).is_err());
        }
        let other = spawn(s, config(&address, 1, 2));
        for met in [lead, other] {
            met.join().unwrap().unwrap();
        }
    });
}
