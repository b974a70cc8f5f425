//! Tests an authenticated peer that sends invalid messages. Each message that the plan does not allow ends the session
//! with an error. The error names the peer and the violation.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardflow_actors::builder::Builder;
use shardflow_actors::error::{Failure, PeerError};
use shardflow_actors::frame::{FRAME_BYTES, Frame, FrameError};
use shardflow_actors::protocol::Message;
use shardflow_actors::remote::{ByteRun, HostRoute, Listed, PeerSpec, Peers};
use shardflow_actors::shell::{ActionProgram, ActorHost, LoadedPlan, RegisterMemory, RunningSession, start};
use shardflow_actors::snapshot::ActorSnapshot;
use shardflow_actors::spec::{ActorId, Firing, Pieces, RegisterId, Spec};
use shardflow_actors::watchdog::WatchdogOptions;
use shardflow_job::secret::Secret;
use shardflow_job::transport::{
    Connection, Hello, ListenAddress, Listener, ListenerOptions, Purpose, SessionId, SettledWorld, connect,
};
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::op::Program;
use shardflow_kernels::tensor::DType;

const TIMEOUT: Duration = Duration::from_secs(20);
const WORLD: SettledWorld = SettledWorld { session: SessionId([3; 16]), epoch: 2, processes: 8 };
/// Process number of the malicious peer.
const PEER: u32 = 7;
/// The peer's device.
const PEERS: usize = 1;
/// A register from the peer to this process, with 2 slots of 8 bytes. The peer sends 4 bytes of each slot.
const IN: RegisterId = RegisterId(0);
/// A register from this process to the peer.
const OUT: RegisterId = RegisterId(1);
/// A register between two actors of the peer.
const THEIRS: RegisterId = RegisterId(2);

/// An initial register from the peer to this process, with one slot of 8 bytes. The peer sends 4 bytes of the slot.
const WEIGHTS: RegisterId = RegisterId(3);
/// An actor of this process. It reads `WEIGHTS` twice per step when it has tokens.
const USER: ActorId = ActorId(4);

/// A register from the peer to this process, with 2 slots of 8 bytes. The peer sends 4 bytes of each slot. Each step
/// publishes piece 1 and then piece 0. Local readers read only piece 0.
const TURNED: RegisterId = RegisterId(5);
/// An actor of this process that reads `TURNED`.
const TAKER: ActorId = ActorId(5);

/// `source (peer) -> middle (here) -> sink (peer) -> end (peer)`, and `source -> user (here)`.
fn spec() -> Spec {
    let mut b = Builder::new();
    let devices = [("source", PEERS), ("middle", 0), ("sink", PEERS), ("end", PEERS)];
    let actors = devices.map(|(name, device)| b.actor(name, device, Firing::Credit));
    let source = b.external(actors[0], "work", 1);
    let [middle, sink, end] = [1, 2, 3].map(|a| b.action(actors[a], "work", 1));
    for (name, writer, reader) in [("in", source, middle), ("out", middle, sink), ("theirs", sink, end)] {
        let register = b.edge(name, 2, writer, reader);
        b.register_mut(register).slot_bytes = 8;
    }
    let update = b.action(actors[0], "update", 1);
    let weights = b.register("weights", 1, update, 1);
    (b.register_mut(weights).initial, b.register_mut(weights).slot_bytes) = (1, 8);
    let user = b.actor("user", 0, Firing::Credit);
    let using = b.external(user, "work", 2);
    b.read(weights, using, 2);
    // An update depends on the step that used the weights.
    let used = b.register("used", 2, using, 2);
    b.read(used, update, 1);
    let turn = b.external(actors[0], "turn", 2);
    let turned = b.channel("turned", actors[0], 2, 2);
    (b.register_mut(turned).slot_of, b.register_mut(turned).slot_bytes) = ([1, 0].into(), 8);
    b.write(turned, turn, Pieces::in_order(&[1, 0]));
    let taker = b.actor("taker", 0, Firing::Credit);
    let take = b.action(taker, "take", 1);
    b.read_pieces(turned, take, Pieces::in_order(&[0]));
    b.read_pieces(turned, end, Pieces::in_order(&[1]));
    b.build()
}

/// An authenticated connection from [`connect`] and [`Listener::wait`]: this process's end and the peer's end.
fn authenticated() -> (Connection, Connection) {
    let secret = Secret::new("a secret of these tests").unwrap();
    let listen = [ListenAddress::Tcp((Ipv4Addr::LOCALHOST, 0).into())];
    let listener = Listener::listen(0, secret.clone(), &listen, ListenerOptions::default()).unwrap();
    listener.begin(WORLD);
    let (deadline, purpose) = (Instant::now() + TIMEOUT, Purpose::Registers { index: 0 });
    let hello = Hello { session: WORLD.session, epoch: WORLD.epoch, from: PEER, to: 0, sealed: true, purpose };
    let peer = connect(&listener.addresses()[0], &secret, &hello, deadline).unwrap();
    (listener.wait(PEER, purpose, deadline).unwrap(), peer)
}

/// Starts this process's part of a session. Also returns the peer's end of the connection and the mirrors' memory.
fn running() -> (RunningSession, Connection, [Arena; 2]) {
    let (connection, mut peer_end) = authenticated();
    let engine = Arc::new(InProcess::new());
    let device = Device::cpu(0, 1, engine.clone());
    let memory = [IN, OUT, WEIGHTS, RegisterId(4), TURNED].map(|register| {
        let arena = device.arena(16).unwrap();
        (register, RegisterMemory { base: Base { arena, offset: 0 }, stride: 8 })
    });
    let mirrors = [0, 2].map(|index: usize| memory[index].1.base.arena.clone());
    let hosted = [(ActorId(1), "middle"), (USER, "user"), (TAKER, "taker")].map(|(actor, name)| {
        let program = Arc::new(Program { name: "work".into(), ..Program::default() });
        let programs = vec![ActionProgram { program, bases: Vec::new(), ends: None }];
        (actor, ActorHost { stream: device.stream(name, 1).unwrap(), programs })
    });
    let half = || vec![ByteRun { offset: 0, bytes: 4 }];
    let peer = PeerSpec {
        process: PEER,
        connection,
        pushes: BTreeMap::from([(OUT, half())]),
        mirrors: BTreeMap::from([(IN, half()), (WEIGHTS, half()), (TURNED, half())]),
        pipes: BTreeMap::new(),
    };
    let routes = [PEER, 0].map(|process| HostRoute { process, to: None, tensors: vec![(vec![2], DType::F32)] }).into();
    let directory = Arc::new(Listed { processes: [(PEERS, PEER)].into(), routes, ..Listed::default() });
    let peers = Peers { peers: vec![peer], directory, ..Peers::default() };
    peer_end.write_all(&Frame::Ready { round: 1 }.encode()).unwrap();
    let loaded = LoadedPlan { spec: Arc::new(spec()), hosted: hosted.into(), memory: memory.into(), engine, peers };
    (start(loaded, WatchdogOptions::default()).unwrap(), peer_end, mirrors)
}

/// The error with which the session ends after the peer has sent these bytes.
fn error_after(bytes: &[u8]) -> PeerError {
    let (running, mut peer, _) = running();
    peer.write_all(bytes).unwrap();
    rejection(&running)
}

fn rejection(running: &RunningSession) -> PeerError {
    match running.failures().recv_timeout(TIMEOUT).expect("the bytes are rejected") {
        Failure::Peer { process: PEER, cause } => cause,
        failure => panic!("wrong process: {failure}"),
    }
}

/// Waits until this number of firings of the actor of this index have ended.
fn wait_for(running: &RunningSession, actor: usize, firings: u64) {
    let deadline = Instant::now() + TIMEOUT;
    let has_ended = |state: &ActorSnapshot| state.firings == [firings] && state.waiting.in_flight.is_none();
    while !has_ended(&running.control().snapshot()[actor]) {
        assert!(Instant::now() < deadline, "{:?}", running.control().snapshot());
        std::thread::yield_now();
    }
}

/// Sends valid bytes, then an invalid frame, and checks the error text.
fn check(valid: &[Vec<u8>], invalid: Frame, expected: &str) {
    match error_after(&[valid.concat(), invalid.encode().to_vec()].concat()) {
        PeerError::Unexpected { message } => assert_eq!(message, expected, "{invalid:?}"),
        PeerError::Protocol(cause) => assert_eq!(cause.to_string(), expected, "{invalid:?}"),
        other => panic!("{invalid:?}: {other}"),
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

/// The bytes of a valid piece.
fn valid_piece(slot: u32, piece: u64) -> Vec<u8> {
    [&data(IN, slot, piece, 4).encode()[..], &[1, 2, 3, 4], &filled(IN, 0, slot, piece).encode()].concat()
}

#[test]
fn valid_pieces_are_accepted() {
    let (running, mut peer, _) = running();
    peer.write_all(&[valid_piece(0, 0), valid_piece(1, 1)].concat()).unwrap();
    peer.write_all(&Frame::Bye.encode()).unwrap();
    // `out` has two slots, so both pieces are processed.
    wait_for(&running, 0, 2);
    running.shutdown().unwrap();
}

#[test]
fn wrong_sizes_are_rejected() {
    check(&[], data(IN, 0, 0, 8), "8 bytes for a slot of register 'in', expected 4");
    check(&[], data(IN, 0, 0, 0), "0 bytes for a slot of register 'in', expected 4");
    check(&[], data(IN, 0, 0, u64::MAX), "18446744073709551615 bytes for a slot of register 'in', expected 4");
    // One of these sizes fits a different element type, and the other size fits a different shape.
    check(&[], Frame::Host { port: 0, bytes: 4 }, "4 bytes for port 0, expected 8");
    let huge = Frame::Host { port: 0, bytes: 1 << 40 };
    check(&[], huge, "1099511627776 bytes for port 0, expected 8");
}

#[test]
fn messages_for_registers_of_others_are_rejected() {
    check(&[], data(OUT, 0, 0, 4), "bytes of register 'out'");
    check(&[], data(THEIRS, 0, 0, 4), "bytes of register 'theirs'");
    check(&[], data(RegisterId(99), 0, 0, 4), "bytes of register 'register 99'");
    check(&[], filled(RegisterId(99), 0, 0, 0), "a message about reader 0 of register 99");
    check(&[], filled(IN, 1, 0, 0), "a message about reader 1 of register 0");
    // The peer does not produce `out` and does not read `in`.
    let between = |name, from, to| format!("a message about register '{name}' from actor {from} to actor {to}");
    check(&[], filled(OUT, 0, 0, 0), &between("out", 1, 2));
    check(&[], released(IN, 0, 0, 0), &between("in", 1, 0));
    check(&[], filled(THEIRS, 0, 0, 0), &between("theirs", 2, 3));
    check(&[], Frame::Host { port: 1, bytes: 8 }, "tensors of port 1, whose sender is not reached through this peer");
    check(&[], Frame::Host { port: 2, bytes: 8 }, "tensors of port 2, which does not exist");
}

#[test]
fn wrong_slots_and_pieces_are_rejected() {
    let due =
        |piece, slot, due| format!("bytes of piece {piece} of register 'in' for slot {slot}, expected piece {due}");
    check(&[], data(IN, 1, 0, 4), &due(0, 1, 0));
    check(&[], data(IN, 2, 0, 4), &due(0, 2, 0));
    check(&[], data(IN, 1, 1, 4), &due(1, 1, 0));
    check(&[valid_piece(0, 0)], data(IN, 0, 0, 4), &due(0, 0, 1));
    check(&[], filled(IN, 0, 0, 0), "piece 0 of register 'in' without its bytes");
    check(&[valid_piece(0, 0)], filled(IN, 0, 1, 1), "piece 1 of register 'in' without its bytes");
    let twice = "register 'in': the `Filled` message carries piece 0, expected 1 (CR-4)";
    check(&[valid_piece(0, 0)], filled(IN, 0, 0, 0), twice);
    let early = "register 'out': sink work released piece 0 from slot 0, which is free (CR-1)";
    check(&[], released(OUT, 0, 0, 0), early);
}

/// Sends four pieces. The credits of `out` allow two firings, which release two pieces. The reader still holds two.
fn with_two_pieces_held() -> (RunningSession, Connection, [Arena; 2]) {
    let (running, mut peer, mirrors) = running();
    peer.write_all(&[valid_piece(0, 0), valid_piece(1, 1)].concat()).unwrap();
    let mut released = 0;
    while released < 2 {
        let mut frame = [0; FRAME_BYTES];
        peer.read_exact(&mut frame).unwrap();
        match Frame::decode(&frame).unwrap() {
            Frame::Message(Message::Released { register: IN, .. }) => released += 1,
            Frame::Data { bytes, .. } => peer.read_exact(&mut vec![0; bytes as usize]).unwrap(),
            _ => {}
        }
    }
    peer.write_all(&[valid_piece(0, 2), valid_piece(1, 3)].concat()).unwrap();
    (running, peer, mirrors)
}

/// The contents of the slots of `in`.
fn slots_of(mirror: &Arena) -> [i32; 2] {
    [0, 8].map(|at| mirror.read_host(at, &[1], DType::I32).unwrap().as_i32().unwrap()[0])
}

#[test]
fn a_slot_that_is_in_use_is_not_overwritten() {
    let (running, mut peer, [mirror, _]) = with_two_pieces_held();
    peer.write_all(&[&data(IN, 0, 4, 4).encode()[..], &[9; 4]].concat()).unwrap();
    let error = rejection(&running).to_string();
    assert!(error.contains("bytes of piece 4 of register 'in' that would overwrite piece 2, still in use"), "{error}");
    let sent = i32::from_le_bytes([1, 2, 3, 4]);
    assert_eq!(slots_of(&mirror), [sent, sent]);
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 32, ..Default::default() })]

    /// Slots that the readers have not released never change, whatever bytes, slot and piece the peer sends.
    #[test]
    fn no_bytes_reach_a_slot_that_is_in_use(
        piece in 0u64..7,
        off in proptest::prop_oneof![4 => proptest::strategy::Just(0), 1 => 0u32..3],
        bytes in proptest::prop_oneof![4 => proptest::strategy::Just(4), 1 => 0u64..9],
        register in proptest::prop_oneof![4 => proptest::strategy::Just(0), 1 => 0u32..3],
    ) {
        let slot = piece as u32 % 2 + off;
        let (running, mut peer, [mirror, _]) = with_two_pieces_held();
        let frame = data(RegisterId(register), slot, piece, bytes);
        peer.write_all(&[&frame.encode()[..], &vec![9; bytes as usize]].concat()).unwrap();
        let error = rejection(&running).to_string();
        proptest::prop_assert!(error.contains("register"), "{}", error);
        let sent = i32::from_le_bytes([1, 2, 3, 4]);
        proptest::prop_assert_eq!(slots_of(&mirror), [sent, sent]);
    }
}

#[test]
fn weights_are_refreshed_only_between_steps() {
    let refresh = [&data(WEIGHTS, 0, 0, 4).encode()[..], &[7; 4]].concat();
    let (mut running, mut peer, [_, mirror]) = running();
    running.add_tokens(USER, 0, 2).unwrap();
    wait_for(&running, 1, 2);
    peer.write_all(&[&refresh[..], &Frame::Ready { round: 2 }.encode()].concat()).unwrap();
    running.refresh().unwrap();
    assert_eq!(mirror.read_host(0, &[1], DType::I32).unwrap().as_i32().unwrap(), [i32::from_le_bytes([7; 4])]);

    // The second step has begun, and one of its two firings has ended.
    let update = [&data(WEIGHTS, 0, 1, 4).encode()[..], &[8; 4], &filled(WEIGHTS, 0, 0, 1).encode()].concat();
    peer.write_all(&update).unwrap();
    running.add_tokens(USER, 0, 1).unwrap();
    wait_for(&running, 1, 3);
    peer.write_all(&refresh).unwrap();
    assert!(rejection(&running).to_string().contains("a refresh of register 'weights' in the middle of a step"));
    assert_eq!(mirror.read_host(0, &[1], DType::I32).unwrap().as_i32().unwrap(), [i32::from_le_bytes([8; 4])]);
}

#[test]
fn the_bytes_of_pieces_follow_the_table() {
    let due =
        |piece, slot, due| format!("bytes of piece {piece} of register 'turned' for slot {slot}, expected piece {due}");
    let piece = |slot, piece| {
        [&data(TURNED, slot, piece, 4).encode()[..], &[5; 4], &filled(TURNED, 0, slot, piece).encode()].concat()
    };
    // This process does not read piece 1. It reads piece 0 in slot 1, and then piece 2 in the same slot.
    check(&[], data(TURNED, 0, 1, 4), &due(1, 0, 0));
    check(&[], data(TURNED, 0, 0, 4), &due(0, 0, 0));
    check(&[], data(TURNED, 1, 2, 4), &due(2, 1, 0));
    check(&[piece(1, 0)], data(TURNED, 0, 1, 4), &due(1, 0, 2));
    check(&[piece(1, 0)], filled(TURNED, 0, 1, 2), "piece 2 of register 'turned' without its bytes");
    let (running, mut peer, _) = running();
    peer.write_all(&piece(1, 0)).unwrap();
    wait_for(&running, 2, 1);
    peer.write_all(&piece(1, 2)).unwrap();
    peer.write_all(&Frame::Bye.encode()).unwrap();
    wait_for(&running, 2, 2);
    running.shutdown().unwrap();
}

#[test]
fn refresh_rounds_out_of_order_are_rejected() {
    for round in [0, 1, 3, u64::MAX] {
        check(&[], Frame::Ready { round }, &format!("a ready message for refresh {round} out of order"));
    }
}

#[test]
fn invalid_frames_are_rejected() {
    let frame = |at: usize, value: u8| {
        let mut bytes = Frame::Ready { round: 2 }.encode();
        bytes[at] = value;
        match error_after(&bytes) {
            PeerError::Frame(error) => error,
            other => panic!("{other}"),
        }
    };
    assert_eq!(frame(0, b'X'), FrameError::Magic { got: [b'X', b'F'] });
    assert_eq!(frame(2, 9), FrameError::Version { got: 9 });
    assert!(matches!(frame(3, 77), FrameError::Malformed { .. }));
    assert!(matches!(frame(31, 1), FrameError::Malformed { .. }));
}

/// The connection ends within a frame or within a piece's bytes.
#[test]
fn a_truncated_message_is_a_lost_peer() {
    for truncated in [&Frame::Bye.encode()[..20], &[&data(IN, 0, 0, 4).encode()[..], &[1, 2]].concat()] {
        let (running, mut peer, _) = running();
        peer.write_all(truncated).unwrap();
        drop(peer);
        let cause = rejection(&running);
        assert!(matches!(cause, PeerError::Lost { .. }), "{cause}");
    }
}
