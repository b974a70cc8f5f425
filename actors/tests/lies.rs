//! A peer that holds the job's key and lies once it is let in: whatever it sends that the plan does not allow ends the session
//! with an error that names the peer and what was wrong.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardflow_actors::builder::Builder;
use shardflow_actors::error::{Failure, PeerError};
use shardflow_actors::protocol::Message;
use shardflow_actors::remote::{ByteRun, HostBroadcast, PeerSpec, Peers};
use shardflow_actors::shell::{ActionProgram, ActorHost, LoadedPlan, RegisterMemory, RunningSession, start};
use shardflow_actors::spec::{ActorId, Firing, RegisterId, Spec};
use shardflow_actors::transport::{
    Connection, FRAME_BYTES, Frame, FrameError, Hello, ListenAddress, Listener, ListenerOptions, Purpose, SessionId,
    SettledWorld, SharedKey, connect,
};
use shardflow_actors::watchdog::WatchdogOptions;
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::op::Program;
use shardflow_kernels::tensor::DType;

const PATIENCE: Duration = Duration::from_secs(20);
const WORLD: SettledWorld = SettledWorld { session: SessionId([3; 16]), epoch: 2, processes: 8 };
/// The liar.
const LIAR: u32 = 7;
/// Of the liar to this process; 2 slots of 8 bytes, of which 4 are sent.
const IN: RegisterId = RegisterId(0);
/// Of this process to the liar.
const OUT: RegisterId = RegisterId(1);
/// Between two actors of the liar.
const THEIRS: RegisterId = RegisterId(2);

/// Of the liar to this process, there from the start; one slot of 8 bytes, of which 4 are sent.
const WEIGHTS: RegisterId = RegisterId(3);
/// Here: reads `WEIGHTS`, twice a step, when it gets tokens.
const USER: ActorId = ActorId(4);

/// `source (liar) -> middle (here) -> sink (liar) -> end (liar)`, and `source -> user (here)`.
fn spec() -> Spec {
    let mut b = Builder::new();
    let actors = ["source", "middle", "sink", "end"].map(|name| b.actor(name, 0, Firing::Credit));
    let source = b.external(actors[0], "work", 1);
    let [middle, sink, end] = [1, 2, 3].map(|a| b.action(actors[a], "work", 1));
    for (name, writer, reader) in [("in", source, middle), ("out", middle, sink), ("theirs", sink, end)] {
        let register = b.edge(name, 2, writer, reader);
        b.register_mut(register).slot_bytes = 8;
    }
    let update = b.action(actors[0], "update", 1);
    let weights = b.register("weights", 1, update, 1);
    (b.register_mut(weights).initial, b.register_mut(weights).slot_bytes) = (true, 8);
    let user = b.actor("user", 0, Firing::Credit);
    let using = b.external(user, "work", 2);
    b.read(weights, using, 2);
    // An update follows from the step that used the weights.
    let used = b.register("used", 2, using, 2);
    b.read(used, update, 1);
    b.build()
}

/// A connection on which both sides have proved the key, as [`connect`] and [`Listener::wait`] give it: here, and the liar's.
fn authenticated() -> (Connection, Connection) {
    let secret = SharedKey::from_text("a secret of these tests").unwrap();
    let listen = [ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 0).into())];
    let endpoint = Listener::listen(0, secret.clone(), &listen, ListenerOptions::default()).unwrap();
    endpoint.begin(WORLD);
    let (deadline, purpose) = (Instant::now() + PATIENCE, Purpose::Registers { lane: 0 });
    let hello = Hello { session: WORLD.session, epoch: WORLD.epoch, from: LIAR, to: 0, purpose };
    let liar = connect(&endpoint.addresses()[0], &secret, &hello, deadline).unwrap();
    (endpoint.wait(LIAR, purpose, deadline).unwrap(), liar)
}

/// This process's part, up and running, and the liar's end of the connection.
fn running() -> (RunningSession, Connection) {
    let (running, liar, _) = running_with_mirrors();
    (running, liar)
}

/// The same, and the memory that the liar's bytes go to.
fn running_with_mirrors() -> (RunningSession, Connection, [Arena; 2]) {
    let (link, mut liar) = authenticated();
    let engine = Arc::new(InProcess::new());
    let device = Device::cpu(0, 1, engine.clone());
    let memory = [IN, OUT, WEIGHTS, RegisterId(4)].map(|register| {
        let arena = device.arena(16).unwrap();
        (register, RegisterMemory { base: Base { arena, offset: 0 }, stride: 8 })
    });
    let mirrors = [0, 2].map(|index: usize| memory[index].1.base.arena.clone());
    let hosted = [(ActorId(1), "middle"), (USER, "user")].map(|(actor, name)| {
        let program = Arc::new(Program { name: "work".into(), ..Program::default() });
        let programs = vec![ActionProgram { program, bases: Vec::new() }];
        (actor, ActorHost { stream: device.stream(name, 1).unwrap(), programs })
    });
    let half = || vec![ByteRun { offset: 0, bytes: 4 }];
    let peer = PeerSpec {
        process: LIAR,
        actors: [0, 2, 3].map(ActorId).into(),
        link,
        pushes: BTreeMap::from([(OUT, half())]),
        mirrors: BTreeMap::from([(IN, half()), (WEIGHTS, half())]),
        pipes: BTreeMap::new(),
    };
    let host_ports = [LIAR, 0].map(|process| HostBroadcast { process, tensors: vec![(vec![2], DType::F32)] }).into();
    let peers = Peers { peers: vec![peer], host_ports, host: None };
    liar.write_all(&Frame::Ready { round: 1 }.encode()).unwrap();
    let loaded = LoadedPlan { spec: Arc::new(spec()), hosted: hosted.into(), memory: memory.into(), engine, peers };
    (start(loaded, WatchdogOptions::default()).unwrap(), liar, mirrors)
}

/// How the session ends when the liar sends this and says no more.
fn after(lie: &[u8]) -> PeerError {
    let (running, mut liar) = running();
    liar.write_all(lie).unwrap();
    let failure = running.failures().recv_timeout(PATIENCE).expect("it is refused");
    let Failure::Peer { process: LIAR, cause } = failure else { panic!("another is blamed: {failure}") };
    cause
}

/// The lie comes after what is right, and is refused with this text.
fn check(right: &[Vec<u8>], lie: Frame, expected: &str) {
    match after(&[right.concat(), lie.encode().to_vec()].concat()) {
        PeerError::Unexpected { what } => assert_eq!(what, expected, "{lie:?}"),
        PeerError::Protocol(cause) => assert_eq!(cause.to_string(), expected, "{lie:?}"),
        other => panic!("{lie:?}: {other}"),
    }
}

fn data(register: RegisterId, slot: u32, piece: u64, bytes: u64) -> Frame {
    Frame::Data { register, slot, piece, bytes }
}

fn filled(register: RegisterId, reader: u32, slot: u32, piece: u64) -> Frame {
    Frame::Message(Message::Filled { register, reader, slot, piece })
}

fn released(register: RegisterId, reader: u32, slot: u32, piece: u64) -> Frame {
    Frame::Message(Message::Released { register, reader, slot, piece })
}

/// A piece with its bytes, as an honest peer sends it.
fn honest(slot: u32, piece: u64) -> Vec<u8> {
    [&data(IN, slot, piece, 4).encode()[..], &[1, 2, 3, 4], &filled(IN, 0, slot, piece).encode()].concat()
}

#[test]
fn honest_pieces_are_taken() {
    let (running, mut liar) = running();
    liar.write_all(&[honest(0, 0), honest(1, 1)].concat()).unwrap();
    liar.write_all(&Frame::Bye.encode()).unwrap();
    let deadline = Instant::now() + PATIENCE;
    // Both are worked on as credits allow: `out` has two slots.
    while running.snapshot()[0].firings != [2] {
        assert!(Instant::now() < deadline, "{:?}", running.snapshot());
        std::thread::yield_now();
    }
    running.shutdown().unwrap();
}

#[test]
fn lies_about_shapes_are_refused() {
    check(&[], data(IN, 0, 0, 8), "8 bytes for a slot of register 'in', not 4");
    check(&[], data(IN, 0, 0, 0), "0 bytes for a slot of register 'in', not 4");
    check(&[], data(IN, 0, 0, u64::MAX), "18446744073709551615 bytes for a slot of register 'in', not 4");
    // Two values of another element type, or of another shape.
    check(&[], Frame::Host { port: 0, bytes: 4 }, "4 bytes for port 0, not 8, or too many pieces");
    check(&[], Frame::Host { port: 0, bytes: 1 << 40 }, "1099511627776 bytes for port 0, not 8, or too many pieces");
}

#[test]
fn lies_about_whose_register_it_is_are_refused() {
    check(&[], data(OUT, 0, 0, 4), "bytes of register 'out'");
    check(&[], data(THEIRS, 0, 0, 4), "bytes of register 'theirs'");
    check(&[], data(RegisterId(99), 0, 0, 4), "bytes of register 'register 99'");
    check(&[], filled(RegisterId(99), 0, 0, 0), "a message about reader 0 of register 99");
    check(&[], filled(IN, 1, 0, 0), "a message about reader 1 of register 0");
    // It is not the producer of this one, nor the reader of that one.
    let between = |name, from, to| {
        format!("a message about register '{name}' between actors {:?} and {:?}", ActorId(from), ActorId(to))
    };
    check(&[], filled(OUT, 0, 0, 0), &between("out", 1, 2));
    check(&[], released(IN, 0, 0, 0), &between("in", 1, 0));
    check(&[], filled(THEIRS, 0, 0, 0), &between("theirs", 2, 3));
    check(&[], Frame::Host { port: 1, bytes: 8 }, "tensors for port 1, which is not its own");
    check(&[], Frame::Host { port: 2, bytes: 8 }, "tensors for port 2, which is not its own");
}

#[test]
fn lies_about_slots_and_pieces_are_refused() {
    let due =
        |piece, slot, due| format!("bytes of piece {piece} of register 'in' for slot {slot}, piece {due} being due");
    check(&[], data(IN, 1, 0, 4), &due(0, 1, 0));
    check(&[], data(IN, 2, 0, 4), &due(0, 2, 0));
    check(&[], data(IN, 1, 1, 4), &due(1, 1, 0));
    check(&[honest(0, 0)], data(IN, 0, 0, 4), &due(0, 0, 1));
    check(&[], filled(IN, 0, 0, 0), "piece 0 of register 'in' without its bytes");
    check(&[honest(0, 0)], filled(IN, 0, 1, 1), "piece 1 of register 'in' without its bytes");
    let twice = "CR-4 register 'in': filled carries piece 0, expected 1";
    check(&[honest(0, 0)], filled(IN, 0, 0, 0), twice);
    let early = "CR-1 register 'out': sink work released piece 0, only 0 were published";
    check(&[], released(OUT, 0, 0, 0), early);
}

/// Four pieces are under way: of these, credits of `out` let two be worked on and released, and hold the other two.
fn with_two_pieces_held() -> (RunningSession, Connection, [Arena; 2]) {
    let (running, mut liar, mirrors) = running_with_mirrors();
    liar.write_all(&[honest(0, 0), honest(1, 1)].concat()).unwrap();
    let mut released = 0;
    while released < 2 {
        let mut frame = [0; FRAME_BYTES];
        liar.read_exact(&mut frame).unwrap();
        match Frame::decode(&frame).unwrap() {
            Frame::Message(Message::Released { register: IN, .. }) => released += 1,
            Frame::Data { bytes, .. } => liar.read_exact(&mut vec![0; bytes as usize]).unwrap(),
            _ => {}
        }
    }
    liar.write_all(&[honest(0, 2), honest(1, 3)].concat()).unwrap();
    (running, liar, mirrors)
}

/// What the slots of `in` hold.
fn slots_of(mirror: &Arena) -> [i32; 2] {
    [0, 8].map(|at| mirror.read_host(at, &[1], DType::I32).unwrap().as_i32().unwrap()[0])
}

fn refused(running: &RunningSession) -> String {
    match running.failures().recv_timeout(PATIENCE).expect("it is refused") {
        Failure::Peer { process: LIAR, cause } => cause.to_string(),
        failure => panic!("another is blamed: {failure}"),
    }
}

#[test]
fn a_slot_that_is_in_use_is_not_overwritten() {
    let (running, mut liar, [mirror, _]) = with_two_pieces_held();
    liar.write_all(&[&data(IN, 0, 4, 4).encode()[..], &[9; 4]].concat()).unwrap();
    let refusal = refused(&running);
    assert!(refusal.contains("bytes of piece 4 of register 'in' over piece 2, which is in use"), "{refusal}");
    let sent = i32::from_le_bytes([1, 2, 3, 4]);
    assert_eq!(slots_of(&mirror), [sent, sent]);
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 32, ..Default::default() })]

    /// Whatever bytes the liar sends, and for whatever slot and piece, what the readers have not released stays as it was.
    #[test]
    fn no_bytes_reach_a_slot_that_is_in_use(
        piece in 0u64..7,
        off in proptest::prop_oneof![4 => proptest::strategy::Just(0), 1 => 0u32..3],
        bytes in proptest::prop_oneof![4 => proptest::strategy::Just(4), 1 => 0u64..9],
        register in proptest::prop_oneof![4 => proptest::strategy::Just(0), 1 => 0u32..3],
    ) {
        let slot = piece as u32 % 2 + off;
        let (running, mut liar, [mirror, _]) = with_two_pieces_held();
        let frame = data(RegisterId(register), slot, piece, bytes);
        liar.write_all(&[&frame.encode()[..], &vec![9; bytes as usize]].concat()).unwrap();
        let refusal = refused(&running);
        proptest::prop_assert!(refusal.contains("register"), "{}", refusal);
        let sent = i32::from_le_bytes([1, 2, 3, 4]);
        proptest::prop_assert_eq!(slots_of(&mirror), [sent, sent]);
    }
}

#[test]
fn weights_are_refreshed_between_steps_only() {
    let refresh = [&data(WEIGHTS, 0, 0, 4).encode()[..], &[7; 4]].concat();
    let (mut running, mut liar, [_, mirror]) = running_with_mirrors();
    let fired = |running: &RunningSession, firings: u64| {
        let deadline = Instant::now() + PATIENCE;
        while running.snapshot()[1].firings != [firings] {
            assert!(Instant::now() < deadline, "{:?}", running.snapshot());
            std::thread::yield_now();
        }
    };
    running.give(USER, 0, 2).unwrap();
    fired(&running, 2);
    liar.write_all(&[&refresh[..], &Frame::Ready { round: 2 }.encode()].concat()).unwrap();
    running.refresh().unwrap();
    assert_eq!(mirror.read_host(0, &[1], DType::I32).unwrap().as_i32().unwrap(), [i32::from_le_bytes([7; 4])]);

    // The second step has begun: one of its two firings is done.
    let update = [&data(WEIGHTS, 0, 1, 4).encode()[..], &[8; 4], &filled(WEIGHTS, 0, 0, 1).encode()].concat();
    liar.write_all(&update).unwrap();
    running.give(USER, 0, 1).unwrap();
    fired(&running, 3);
    liar.write_all(&refresh).unwrap();
    assert!(refused(&running).contains("a refresh of register 'weights' in the middle of a step"));
    assert_eq!(mirror.read_host(0, &[1], DType::I32).unwrap().as_i32().unwrap(), [i32::from_le_bytes([8; 4])]);
}

#[test]
fn a_peer_is_ready_for_one_refresh_after_the_other() {
    for round in [0, 1, 3, u64::MAX] {
        check(&[], Frame::Ready { round }, &format!("ready for refresh {round} out of order"));
    }
}

#[test]
fn frames_that_are_none_are_refused() {
    let frame = |at: usize, value: u8| {
        let mut bytes = Frame::Ready { round: 2 }.encode();
        bytes[at] = value;
        match after(&bytes) {
            PeerError::Frame(error) => error,
            other => panic!("{other}"),
        }
    };
    assert_eq!(frame(0, b'X'), FrameError::Magic { got: [b'X', b'F'] });
    assert_eq!(frame(2, 9), FrameError::Version { theirs: 9 });
    assert_eq!(frame(3, 77), FrameError::Kind { kind: 77 });
    assert!(matches!(frame(8, 1), FrameError::Unused { field: "reader", value: 1, .. }));
}

/// Half a frame, or half of a piece's bytes, and then the end.
#[test]
fn what_is_cut_short_is_a_lost_peer() {
    for lie in [&Frame::Bye.encode()[..20], &[&data(IN, 0, 0, 4).encode()[..], &[1, 2]].concat()] {
        let (running, mut liar) = running();
        liar.write_all(lie).unwrap();
        drop(liar);
        let failure = running.failures().recv_timeout(PATIENCE).expect("it is noticed");
        assert!(matches!(failure, Failure::Peer { process: LIAR, cause: PeerError::Lost { .. } }), "{failure}");
    }
}
