//! Tests the rendezvous of several processes over Unix sockets and loopback. Each process is a thread.

use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{Scope, ScopedJoinHandle, scope};

use std::net::Ipv4Addr;
use std::time::Duration;

use tempfile::TempDir;

use super::config::{hello, join_info, unzoned};
use super::messages::{Answer, REQUEST_BYTES_MAX, Ready, Request, WAIT_LONGER};
use super::*;
use crate::exit::Report;
use crate::options::ClusterOptions;
use crate::secret::{Secret, sample};
use crate::transport::{
    Address, Connection, Hello, ListenAddress, Listener, ListenerOptions, Purpose, SessionId, SettledWorld,
    TransportError, connect, wire,
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A free port on loopback. It is unlikely that another process takes it before the test does.
fn tcp() -> Address {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    Address::Tcp(listener.local_addr().unwrap().to_string())
}

fn unix() -> (TempDir, Address) {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::Unix(folder.path().join("run").join("rendezvous.sock"));
    (folder, address)
}

/// Configuration of process `process` of `processes`, with its own host name.
fn config(address: &Address, process: u32, processes: u32) -> RendezvousConfig {
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
        ..RendezvousConfig::new(address.clone(), sample(), identity, &ClusterOptions::default())
    }
}

fn spawn<'s>(scope: &'s Scope<'s, '_>, config: RendezvousConfig) -> ScopedJoinHandle<'s, Outcome> {
    scope.spawn(move || rendezvous(&config, |_| {}))
}

/// Starts process 0. Also returns the lines that it reports while it waits.
fn spawn_rank_0<'s>(
    scope: &'s Scope<'s, '_>,
    config: RendezvousConfig,
) -> (ScopedJoinHandle<'s, Outcome>, Receiver<String>) {
    let (sender, receiver) = channel();
    let rank_0 = scope.spawn(move || rendezvous(&config, |missing| drop(sender.send(missing.to_string()))));
    (rank_0, receiver)
}

fn wait_for_line(lines: &Receiver<String>, expected: &str) {
    let mut last = String::new();
    while last != expected {
        let next = lines.recv_timeout(Duration::from_secs(20));
        last = next.unwrap_or_else(|e| panic!("no line '{expected}' after '{last}': {e}"));
    }
}

/// Runs all processes concurrently. `change` modifies their configurations.
fn run_all(address: &Address, processes: u32, change: impl Fn(&mut RendezvousConfig)) -> Vec<Outcome> {
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

fn refusal(outcome: Outcome) -> RendezvousRefusal {
    match outcome {
        Err(RendezvousError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

fn assert_refused<const N: usize>(threads: [ScopedJoinHandle<'_, Outcome>; N], expected: &RendezvousRefusal) {
    threads.into_iter().for_each(|thread| assert_eq!(refusal(thread.join().unwrap()), *expected));
}

fn label(process: u32) -> ProcessLabel {
    ProcessLabel { process, host: format!("host{process}"), pid: 100 + process }
}

fn send_join(config: &RendezvousConfig) -> Connection {
    let hello = hello(config, config.process);
    let mut connection = connect(&config.coordinator, &config.secret, &hello, soon()).unwrap();
    let info = join_info(config, vec![]).unwrap();
    wire::write_message(&mut connection, &Request::Join(info), REQUEST_BYTES_MAX).unwrap();
    connection
}

#[test]
fn all_get_the_same_roster_and_can_dial_each_other() {
    for processes in 1..=8 {
        let (_folder, unix) = unix();
        for address in [unix, tcp()] {
            let outcomes = run_all(&address, processes, |config| config.restart = u64::from(config.process * 3 % 5));
            let worlds: Vec<(Roster, Listener)> = outcomes.into_iter().map(Result::unwrap).collect();
            let roster = &worlds[0].0;
            assert!(worlds.iter().all(|(other, _)| other == roster));
            assert_eq!(roster.epoch, (0..u64::from(processes)).map(|p| p * 3 % 5).max().unwrap());
            assert_ne!(roster.session, SessionId::default());
            assert_eq!(
                roster.members.iter().map(Member::label).collect::<Vec<_>>(),
                (0..processes).map(label).collect::<Vec<_>>()
            );
            let secret = config(&address, 0, 1).secret;
            let SettledWorld { session, epoch, .. } = roster.world();
            for (from, to) in (0..processes).flat_map(|from| (0..processes).map(move |to| (from, to))) {
                let hello = Hello { session, epoch, from, to, sealed: true, purpose: Purpose::Control };
                let member = &roster.members[to as usize];
                for address in [member.tcp().unwrap(), member.unix().unwrap()] {
                    let mut dialled = connect(address, &secret, &hello, soon()).unwrap();
                    let mut accepted = worlds[to as usize].1.wait(from, Purpose::Control, soon()).unwrap();
                    dialled.write_all(&[from as u8]).unwrap();
                    let mut byte = [0];
                    accepted.read_exact(&mut byte).unwrap();
                    assert_eq!(u32::from(byte[0]), from);
                }
            }
        }
    }
}

/// The ranks in the roster of each process.
fn listed(outcomes: Vec<Outcome>) -> Vec<Vec<u32>> {
    let ranks = |roster: Roster| roster.members.iter().map(|member| member.process).collect();
    outcomes.into_iter().map(|outcome| ranks(outcome.unwrap().0)).collect()
}

#[test]
fn a_process_receives_the_members_that_it_needs() {
    let (_folder, address) = unix();
    let outcomes = run_all(&address, 6, |config| {
        config.identity.node = format!("node{}", config.process / 2);
        config.wanted = (config.process == 3).then_some([4, 5]).into_iter().flatten().collect();
    });
    let expected: [&[u32]; 6] = [&[0, 1, 2, 4], &[0, 1], &[0, 2, 3], &[0, 2, 3, 4, 5], &[0, 4, 5], &[0, 4, 5]];
    assert_eq!(listed(outcomes), expected);
}

#[test]
fn missing_ranks_are_named_during_the_wait_and_at_the_deadline() {
    let (_folder, address) = unix();
    let brief = |process| RendezvousConfig { timeout: Duration::from_secs(2), ..config(&address, process, 4) };
    scope(|s| {
        let (rank_0, lines) = spawn_rank_0(s, brief(0));
        let rank_1 = spawn(s, config(&address, 1, 4));
        wait_for_line(&lines, "waiting for ranks 2, 3: 2 of 4 joined");
        for thread in [rank_0, rank_1] {
            let refusal = refusal(thread.join().unwrap());
            let RendezvousRefusal::Missing { missing, waited_ms, .. } = &refusal else { panic!("{refusal}") };
            assert!(*missing == [2, 3] && *waited_ms >= 2000, "{refusal}");
            let expected = format!("ranks 2, 3 did not join in {waited_ms} ms: 2 of 4 joined");
            assert_eq!(refusal.to_string(), format!("{expected}; {WAIT_LONGER}"));
        }
    });
}

#[test]
fn a_wait_for_rank_0_names_its_address() {
    let (_folder, address) = unix();
    let brief = RendezvousConfig { timeout: Duration::from_millis(100), ..config(&address, 1, 2) };
    let mut lines = Vec::new();
    let outcome = rendezvous(&brief, |missing| lines.push(missing.to_string()));
    assert_eq!(lines[0], format!("waiting for rank 0 at {address}"));
    let error = outcome.unwrap_err();
    assert!(matches!(error, RendezvousError::NotReached(TransportError::Unreachable { .. })), "{error}");
    assert!(error.to_string().ends_with(&format!("; {WAIT_LONGER}")), "{error}");
}

#[test]
fn all_ranks_receive_a_conflict_with_both_values() {
    type Change = fn(&mut RendezvousConfig);
    let hex = |byte: u8| format!("blake3 {}", format!("{byte:02x}").repeat(32));
    let cases: [(&str, Change, &str, &str); 8] = [
        ("version", |c| c.identity.version = "1.0.1".into(), "1.0.0", "1.0.1"),
        ("executable", |c| c.identity.binary = [3; 32], &hex(1), &hex(3)),
        ("plan", |c| c.facts[2].value = "abd".into(), "abc", "abd"),
        ("mesh", |c| c.facts[0].value = "tensor=2".into(), "data=2", "tensor=2"),
        ("number of processes", |c| c.processes = 5, "4", "5"),
        // Only the first difference is reported. For example, another learning rate also changes the plan.
        ("lr", |c| c.facts[1..].iter_mut().for_each(|fact| fact.value = "0.25".into()), "0.5", "0.25"),
        ("lr", |c| drop(c.facts.remove(1)), "0.5", "nothing"),
        ("batch", |c| c.facts.push(Fact::new("batch", 4)), "nothing", "4"),
    ];
    for (name, change, first_value, second_value) in cases {
        let (_folder, address) = unix();
        let outcomes = run_all(&address, 4, |config| {
            config.conflict_grace = Duration::from_secs(20);
            if config.process == 2 {
                change(config);
            }
        });
        let (first, second) = (label(0), label(2));
        let (name, first_value, second_value) = (name.into(), first_value.into(), second_value.into());
        let expected = Conflict::Differs { name, first, first_value, second, second_value };
        for outcome in outcomes {
            assert_eq!(refusal(outcome), RendezvousRefusal::Conflicts(vec![expected.clone()]));
        }
    }
}

#[test]
fn a_rank_beyond_the_world_receives_the_refusal() {
    let (_folder, address) = unix();
    scope(|s| {
        let rank_0 = spawn(s, config(&address, 0, 2));
        let rank_6 = refusal(spawn(s, config(&address, 6, 8)).join().unwrap());
        let message = rank_6.to_string();
        let expected = "rank 0 (host host0, pid 100) and rank 6 (host host6, pid 106) differ in their number of processes: 2 and 8";
        assert!(message.contains(expected), "{message}");
        assert_eq!(refusal(rank_0.join().unwrap()), rank_6);
    });
}

#[test]
fn two_processes_with_the_same_rank_are_both_named() {
    let (_folder, address) = unix();
    scope(|s| {
        let (rank_0, lines) = spawn_rank_0(s, config(&address, 0, 3));
        let first = spawn(s, config(&address, 1, 3));
        wait_for_line(&lines, "waiting for rank 2: 2 of 3 joined");
        let mut other = config(&address, 1, 3);
        other.identity.host = "elsewhere".into();
        let second = ProcessLabel { process: 1, host: "elsewhere".into(), pid: 101 };
        let expected = RendezvousRefusal::Conflicts(vec![Conflict::Duplicate { first: label(1), second }]);
        assert_refused([spawn(s, other), first, rank_0], &expected);
    });
}

#[test]
fn two_processes_with_rank_0_are_both_named() {
    let (_folder, unix) = unix();
    for address in [unix, tcp()] {
        scope(|s| {
            let (rank_0, lines) = spawn_rank_0(s, config(&address, 0, 2));
            wait_for_line(&lines, "waiting for rank 1: 1 of 2 joined");
            let mut other = config(&address, 0, 2);
            other.identity.pid = 7;
            let second = ProcessLabel { pid: 7, ..label(0) };
            let expected = RendezvousRefusal::Conflicts(vec![Conflict::Duplicate { first: label(0), second }]);
            assert_refused([spawn(s, other), rank_0], &expected);
        });
    }
}

#[test]
fn a_late_process_is_refused_and_counted() {
    let (_folder, address) = unix();
    let outcomes = run_all(&address, 3, |config| config.restart = 4);
    let (_, listener) = outcomes.into_iter().next().unwrap().unwrap();
    let late = RendezvousConfig { restart: 4, late_grace: Duration::from_millis(100), ..config(&address, 1, 3) };
    let error = rendezvous(&late, |_| {}).unwrap_err();
    assert!(matches!(error, RendezvousError::Late { process: 1, epoch: 4, .. }), "{error}");
    assert!(listener.refused().old_epoch >= 2);
    // The restarted process waits until this world ends.
    let next = RendezvousConfig { restart: 5, timeout: Duration::from_millis(100), ..late };
    let error = rendezvous(&next, |_| {}).unwrap_err();
    assert!(matches!(error, RendezvousError::NotReached(TransportError::Unreachable { .. })), "{error}");
}

#[test]
fn a_restarted_process_replaces_its_predecessor() {
    let (_folder, address) = unix();
    scope(|s| {
        let (rank_0, lines) = spawn_rank_0(s, config(&address, 0, 3));
        let older = spawn(s, config(&address, 1, 3));
        wait_for_line(&lines, "waiting for rank 2: 2 of 3 joined");
        let mut restarted = RendezvousConfig { restart: 1, ..config(&address, 1, 3) };
        restarted.identity.pid = 201;
        let newer = spawn(s, restarted);
        // The newer process replaces the older one, which joins again and is refused with the newer one's label.
        let (first, second) = (ProcessLabel { pid: 201, ..label(1) }, label(1));
        let expected = RendezvousRefusal::Conflicts(vec![Conflict::Duplicate { first, second }]);
        assert_eq!(refusal(older.join().unwrap()), expected);
        let last = spawn(s, config(&address, 2, 3));
        for thread in [rank_0, newer, last] {
            let (roster, _) = thread.join().unwrap().unwrap();
            assert_eq!((roster.epoch, roster.members[1].pid), (1, 201));
        }
    });
}

#[test]
fn a_process_that_dies_during_the_wait_is_missing_again() {
    let (_folder, address) = unix();
    scope(|s| {
        let (rank_0, lines) = spawn_rank_0(s, config(&address, 0, 3));
        let dying = send_join(&config(&address, 1, 3));
        wait_for_line(&lines, "waiting for rank 2: 2 of 3 joined");
        drop(dying);
        wait_for_line(&lines, "waiting for ranks 1, 2: 1 of 3 joined");
        let others = [1, 2].map(|process| spawn(s, config(&address, process, 3)));
        rank_0.join().unwrap().unwrap();
        let _ = others.map(|thread| thread.join().unwrap().unwrap());
    });
}

#[test]
fn all_ranks_receive_the_name_of_a_process_that_dies_at_the_start() {
    let (_folder, address) = unix();
    scope(|s| {
        let rank_0 = spawn(s, config(&address, 0, 3));
        let other = spawn(s, config(&address, 2, 3));
        let mut dying = send_join(&config(&address, 1, 3));
        let answer = wire::read_message::<Answer>(&mut dying, wire::MESSAGE_BYTES_MAX).unwrap();
        assert!(matches!(answer, Answer::Roster(_)));
        drop(dying);
        assert_refused([rank_0, other], &RendezvousRefusal::Lost(label(1)));
    });
}

#[test]
fn a_process_finds_a_restarted_rank_0() {
    let (_folder, address) = unix();
    let Address::Unix(path) = address.clone() else { panic!("not a Unix address") };
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

#[test]
fn a_ready_for_another_session_fails_the_start() {
    let (_folder, address) = unix();
    scope(|s| {
        let rank_0 = spawn(s, config(&address, 0, 2));
        let mut faulty = send_join(&config(&address, 1, 2));
        wire::write_message(&mut faulty, &Ready { session: SessionId([1; 16]) }, 100).unwrap();
        assert_eq!(refusal(rank_0.join().unwrap()), RendezvousRefusal::Lost(label(1)));
    });
}

#[test]
fn another_secret_is_an_authentication_error() {
    let (_folder, address) = unix();
    scope(|s| {
        let rank_0 = spawn(s, RendezvousConfig { timeout: Duration::from_millis(300), ..config(&address, 0, 2) });
        let secret = Secret::new("another secret of these tests").unwrap();
        let error = rendezvous(&RendezvousConfig { secret, ..config(&address, 1, 2) }, |_| {}).unwrap_err();
        assert!(matches!(&error, RendezvousError::Transport(e) if e.is_authentication()), "{error}");
        let refusal = refusal(rank_0.join().unwrap());
        assert!(
            refusal.to_string().contains("a rank has another secret or version, or other programs connected"),
            "{refusal}"
        );
    });
}

#[test]
fn oversized_facts_and_invalid_ranks_are_refused() {
    let (_folder, address) = unix();
    let facts =
        |count: usize, bytes: usize| (0..count).map(|i| Fact::new(format!("f{i}"), "x".repeat(bytes))).collect();
    for (facts, expected) in [
        (facts(1, 1025), "1025 bytes in its fact 'f0', but the maximum is 1024"),
        (facts(97, 1), "100 facts, but the maximum is 96"),
        (facts(10, 1000), " bytes in its facts, but the maximum is "),
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
fn a_process_may_want_any_ranks_of_the_largest_world() {
    let (_folder, address) = unix();
    let info = |wanted| join_info(&RendezvousConfig { wanted, ..config(&address, 0, 1) }, vec![]);
    let all = info((0..4096).collect()).unwrap();
    assert_eq!(all.wanted, vec![0..4096]);
    let scattered = info((0..4096).step_by(2).collect()).unwrap();
    assert_eq!((scattered.wanted.len(), scattered.wanted[1].clone()), (2048, 2..3));
    assert!(wire::encode(&Request::Join(scattered)).unwrap().len() < REQUEST_BYTES_MAX / 2);
    let error = info((0..4097).collect()).unwrap_err();
    assert!(matches!(error, RendezvousError::TooLong { length: 4097, .. }), "{error}");
}

#[test]
fn identity_and_local_address_of_this_process_are_found() {
    let identity = Identity::of_this_process().unwrap();
    assert_eq!(identity, Identity::of_this_process().unwrap());
    assert!(identity.node.ends_with(&identity.host) && identity.pid == std::process::id());
    let loopback = Ok("127.0.0.1:0".to_string());
    let local = |coordinator: &Address, interface| {
        let found = local_address(coordinator, interface, true, Instant::now());
        found.map(|address| address.to_string()).map_err(|error| error.to_string())
    };
    let error = local(&Address::Tcp("no-such-host.invalid:5".into()), None).unwrap_err();
    assert!(error.starts_with("no route to no-such-host.invalid:5"), "{error}");
    assert_eq!(local(&tcp(), None), loopback);
    assert_eq!(local(&unix().1, None), loopback);
    let elsewhere = "10.1.2.3:0".to_string();
    assert_eq!(local(&tcp(), elsewhere.parse().ok()), Ok(elsewhere));
}

/// This is the configuration of the master in a PyTorchJob.
#[test]
fn rank_0_may_listen_on_the_unspecified_address() {
    let Address::Tcp(loopback) = tcp() else { panic!("not a TCP address") };
    let all = loopback.replace("127.0.0.1", "0.0.0.0");
    let outcomes = run_all(&Address::Tcp(loopback.clone()), 3, |config| {
        config.spans_nodes = true;
        if config.process == 0 {
            config.coordinator = Address::Tcp(all.clone());
        }
    });
    for (process, outcome) in outcomes.into_iter().enumerate().skip(1) {
        let (roster, _) = outcome.unwrap();
        assert_eq!(roster.members[0].tcp().unwrap().to_string(), loopback, "at process {process}");
    }
}

#[test]
fn published_addresses_have_no_zone() {
    let published = |text: &str| unzoned(Address::Tcp(text.into())).to_string();
    assert_eq!(published("[fe80::1%lo]:5"), "[fe80::1]:5");
    assert_eq!(published("[fe80::1%7]:5"), "[fe80::1]:5");
    assert_eq!(published("node1:5"), "node1:5");
}

fn failure(rank: u32, exit: u8) -> Report {
    Report { rank, exit, time_unix_ns: 1, cause: "--width is no multiple of --heads".into(), ..Report::default() }
}

/// Returns the exit code and the message for a process that was refused because of a report.
fn failed_refusal(outcome: Outcome) -> (u8, String) {
    let refusal = refusal(outcome);
    let RendezvousRefusal::Failed(report) = &refusal else { panic!("{refusal}") };
    (report.exit, refusal.to_string())
}

#[test]
fn the_failure_of_a_process_before_it_joins_ends_all() {
    let (_folder, unix) = unix();
    for address in [unix, tcp()] {
        scope(|s| {
            let (rank_0, lines) = spawn_rank_0(s, config(&address, 0, 4));
            let joined = spawn(s, config(&address, 1, 4));
            wait_for_line(&lines, "waiting for ranks 2, 3: 2 of 4 joined");
            send_failure(&config(&address, 3, 4), 3..4, &failure(3, 2)).unwrap();
            // This process joins after the report, while rank 0 still answers.
            let late = spawn(s, config(&address, 2, 4));
            let expected = "rank 3 ended before it joined: --width is no multiple of --heads (code 2: usage)";
            for thread in [joined, late, rank_0] {
                assert_eq!(failed_refusal(thread.join().unwrap()), (2, expected.to_string()));
            }
        });
    }
}

#[test]
fn another_process_answers_for_a_failed_rank_0() {
    let (_folder, unix) = unix();
    for address in [unix, tcp()] {
        scope(|s| {
            // Both processes connect before any process listens at rank 0's address.
            let waiting = [1, 2].map(|process| spawn(s, config(&address, process, 4)));
            let reporting = s.spawn(|| send_failure(&config(&address, 3, 4), 3..4, &failure(3, 65)));
            // Returns once all ranks have connected, long before this timeout.
            let patient = RendezvousConfig { report_within: Duration::from_secs(600), ..config(&address, 0, 4) };
            refuse_callers(&patient, 0..1, &failure(0, 2)).unwrap();
            for thread in waiting {
                assert_eq!(failed_refusal(thread.join().unwrap()).0, 2, "the exit code of rank 0");
            }
            reporting.join().unwrap().unwrap();
        });
    }
}

#[test]
fn a_report_without_a_receiver_times_out() {
    let (_folder, address) = unix();
    let brief =
        |process| RendezvousConfig { report_within: Duration::from_millis(100), ..config(&address, process, 2) };
    let error = send_failure(&brief(1), 1..2, &failure(1, 2)).unwrap_err();
    assert!(matches!(error, RendezvousError::Transport(TransportError::Unreachable { .. })), "{error}");
    refuse_callers(&brief(0), 0..1, &failure(0, 2)).unwrap();
}

#[test]
fn a_running_world_refuses_a_report() {
    let (_folder, address) = unix();
    let _running = run_all(&address, 2, |_| {}).into_iter().map(Result::unwrap).collect::<Vec<_>>();
    let error = send_failure(&config(&address, 1, 2), 1..2, &failure(1, 2)).unwrap_err();
    assert!(error.to_string().contains("is running"), "{error}");
}

/// A peer with the secret cannot end the others with code 0, or with a code that restarts them forever.
#[test]
fn reports_without_a_final_failure_are_ignored() {
    let (_folder, address) = unix();
    scope(|s| {
        let (rank_0, lines) = spawn_rank_0(s, config(&address, 0, 2));
        wait_for_line(&lines, "waiting for rank 1: 1 of 2 joined");
        for exit in [0, 69, 70] {
            let brief = RendezvousConfig { report_within: Duration::from_millis(200), ..config(&address, 1, 2) };
            assert!(send_failure(&brief, 1..2, &failure(1, exit)).is_err());
        }
        let other = spawn(s, config(&address, 1, 2));
        for thread in [rank_0, other] {
            thread.join().unwrap().unwrap();
        }
    });
}

#[test]
fn the_end_of_a_node_ends_all_whatever_its_code() {
    let (_folder, address) = unix();
    scope(|s| {
        let (rank_0, lines) = spawn_rank_0(s, config(&address, 0, 4));
        let joined = spawn(s, config(&address, 1, 4));
        wait_for_line(&lines, "waiting for ranks 2, 3: 2 of 4 joined");
        send_failure(&config(&address, 2, 4), 2..4, &departure(2)).unwrap();
        for thread in [joined, rank_0] {
            assert_eq!(failed_refusal(thread.join().unwrap()), (69, "node 1 ended: killed (code 137)".to_string()));
        }
    });
}

/// The report that the node of rank `rank` has left the job.
fn departure(rank: u32) -> Report {
    let cause = "node 1 ended: killed (code 137)".into();
    Report { cause, first_cause_rank: Some(rank), departed: true, ..failure(rank, 69) }
}

#[test]
fn the_end_of_a_node_reaches_a_rank_0_that_restarts() {
    let (_folder, unix) = unix();
    for address in [unix, tcp()] {
        let running = run_all(&address, 2, |_| {}).into_iter().map(Result::unwrap).collect::<Vec<_>>();
        scope(|s| {
            let reporting = s.spawn(|| send_failure(&config(&address, 1, 2), 1..2, &departure(1)));
            wait_for_refusal(&running);
            drop(running);
            let restarted =
                RendezvousConfig { restart: 1, late_grace: Duration::from_secs(10), ..config(&address, 0, 2) };
            assert_eq!(failed_refusal(rendezvous(&restarted, |_| {})).0, 69);
            reporting.join().unwrap().unwrap();
        });
    }
}

#[test]
fn rank_0_refuses_an_address_of_another_program() {
    let other = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = Address::Tcp(other.local_addr().unwrap().to_string());
    let mut lines = Vec::new();
    let rank_0 = RendezvousConfig { late_grace: Duration::from_millis(100), ..config(&address, 0, 2) };
    let error = rendezvous(&rank_0, |line| lines.push(line.to_owned())).unwrap_err();
    assert!(matches!(error, RendezvousError::InUse { .. }), "{error}");
    assert!(lines[0].ends_with("is in use; trying again for 100ms"), "{lines:?}");
}

/// Waits until rank 0 of a running world has refused one more process.
fn wait_for_refusal(running: &[(Roster, Listener)]) {
    let refused = || running[0].1.refused().total();
    let (before, end) = (refused(), Instant::now() + Duration::from_secs(20));
    while refused() == before {
        assert!(Instant::now() < end, "no process was refused");
        std::thread::yield_now();
    }
}

/// Two attempts overlap: each has its own launchers.
#[test]
fn rank_0_waits_until_an_earlier_world_has_ended() {
    let address = tcp();
    for restart in [0, 1] {
        let running = run_all(&address, 2, |_| {}).into_iter().map(Result::unwrap).collect::<Vec<_>>();
        let next = |late_grace| RendezvousConfig { restart, late_grace, ..config(&address, 0, 2) };
        let error = rendezvous(&next(Duration::ZERO), |_| {}).unwrap_err();
        assert!(!matches!(error, RendezvousError::InUse { .. } | RendezvousError::Refused(_)), "{error}");
        scope(|s| {
            let config_0 = next(Duration::from_secs(20));
            let rank_0 = s.spawn(move || rendezvous(&config_0, |_| {}));
            wait_for_refusal(&running);
            drop(running);
            let rank_1 = spawn(s, RendezvousConfig { restart, ..config(&address, 1, 2) });
            for thread in [rank_0, rank_1] {
                thread.join().unwrap().unwrap();
            }
        });
    }
}
