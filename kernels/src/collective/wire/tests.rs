//! The engine against the one within a process, bit by bit; and against peers that break, stall and lie.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Instant;

use super::frame::{Header, Kind};
use super::*;
use crate::collective::ReduceOp;
use crate::collective::in_process::InProcess;
use crate::collective::routed::Routed;
use crate::device::Device;
use crate::memory::Arena;
use crate::tensor::{HostTensor, split_range};

const PATIENT: Duration = Duration::from_secs(30);
const HASTY: Duration = Duration::from_millis(200);

/// Numbers of very different sizes, so that the order of additions shows; the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        let float = |bits: u64| (bits as f32 / 1e9 - 1.0) * [1.0, 1e-4, 1e5, -0.0][bits as usize % 4];
        (0..len).map(|_| float(self.next())).collect()
    }
}

fn group(n: usize) -> Arc<Group> {
    Arc::new(Group { id: 7, ranks: (0..n).map(|member| 10 + member).collect() })
}

/// Channels between all members of a group of n, by member.
fn mesh(n: usize, pair: &mut dyn FnMut() -> [UnixStream; 2]) -> Vec<BTreeMap<ChannelKey, Channel>> {
    let mut all: Vec<BTreeMap<_, _>> = (0..n).map(|_| BTreeMap::new()).collect();
    for a in 0..n {
        for b in 0..a {
            let [one, other] = pair();
            all[a].insert((7, a, b), one.into());
            all[b].insert((7, b, a), other.into());
        }
    }
    all
}

fn unix_pair() -> [UnixStream; 2] {
    UnixStream::pair().expect("a socket pair").into()
}

/// An engine for each member, as in so many processes.
fn engines(n: usize, write_timeout: Duration) -> Vec<Wire> {
    mesh(n, &mut unix_pair).into_iter().map(|channels| Wire::new(channels, write_timeout)).collect()
}

/// One call of all members: what each brings, and the shape of what it gets.
struct Case {
    kind: CollectiveKind,
    xs: Vec<HostTensor>,
    y_shapes: Vec<Vec<usize>>,
    in_place: bool,
}

fn arena(bytes: usize) -> Arena {
    Device::cpu(0, 1, Arc::new(InProcess::new())).arena(bytes).expect("memory")
}

fn bits(tensor: &HostTensor) -> Vec<u32> {
    tensor.as_f32().expect("floats").iter().map(|value| value.to_bits()).collect()
}

/// What one member gets.
fn play(engine: &dyn Collective, member: usize, case: &Case) -> Result<Vec<u32>, KernelError> {
    let (x, y_shape) = (&case.xs[member], &case.y_shapes[member]);
    let y_offset = if case.in_place { 0 } else { 4 * x.elements_held() };
    let arena = arena(y_offset + 4 * y_shape.iter().product::<usize>());
    arena.write_host(0, x)?;
    let call = CollectiveCall { group: group(case.xs.len()), member, kind: case.kind.clone() };
    let read = View::new("test", &arena, 0, &x.shape, DType::F32)?;
    let write = View::new("test", &arena, y_offset, y_shape, DType::F32)?;
    engine.run(&call, &[read], &[write])?;
    Ok(bits(&arena.read_host(y_offset, y_shape, DType::F32)?))
}

/// Plays all cases on all members at once; results by member, then by case.
fn play_all(engines: &[&dyn Collective], cases: &[Case]) -> Vec<Vec<Result<Vec<u32>, KernelError>>> {
    thread::scope(|scope| {
        let all = engines.iter().copied().enumerate();
        let play = |member, engine| move || cases.iter().map(|case| play(engine, member, case)).collect();
        let threads: Vec<_> = all.map(|(member, engine)| scope.spawn(play(member, engine))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// The sockets' engines give what the one within a process gives.
fn check_same(wires: &[Wire], cases: &[Case]) {
    let local = InProcess::new();
    let expected = play_all(&vec![&local as &dyn Collective; wires.len()], cases);
    let got = play_all(&wires.iter().map(|wire| wire as &dyn Collective).collect::<Vec<_>>(), cases);
    for (member, (got, expected)) in got.iter().zip(&expected).enumerate() {
        for ((got, expected), case) in got.iter().zip(expected).zip(cases) {
            let (n, kind, x) = (wires.len(), &case.kind, &case.xs[member].shape);
            assert!(expected.is_ok(), "{expected:?}");
            assert!(got == expected, "member {member} of {n}, {kind:?} of {x:?}, in place {}", case.in_place);
        }
        let (rank, wire) = (10 + member, &wires[member]);
        assert_eq!(wire.bytes_received(rank), local.bytes_received(rank), "bytes of member {member}");
    }
}

fn all_reduces(n: usize, lengths: impl Iterator<Item = usize>) -> Vec<Case> {
    let mut numbers = Numbers(n as u64);
    let mut cases = Vec::new();
    for len in lengths {
        for op in [ReduceOp::Sum, ReduceOp::Max] {
            for in_place in [false, true] {
                let xs = (0..n).map(|_| HostTensor::f32(&[len], numbers.floats(len))).collect();
                let y_shapes = vec![vec![len]; n];
                cases.push(Case { kind: CollectiveKind::AllReduce { op }, xs, y_shapes, in_place });
            }
        }
    }
    cases
}

#[test]
fn trees_and_rings_give_the_bits_of_one_process() {
    for n in 1..=6 {
        for tree_bytes_max in [0, SCRATCH_BYTES] {
            let wires = engines(n, PATIENT);
            wires.iter().for_each(|wire| wire.set_tree_bytes_max(tree_bytes_max));
            check_same(&wires, &all_reduces(n, 0..=40));
        }
    }
}

/// Parts along a dim: even, or all but one element on the first.
fn split(shape: &[usize], n: usize, dim: usize, uneven: bool) -> Vec<Region> {
    let extent = shape[dim];
    let part = |i: usize| {
        let range = split_range(extent, n, i);
        let range = match (uneven, i) {
            (false, _) => range,
            (true, 0) => 0..extent - 1,
            (true, _) => extent - 1..extent - usize::from(i + 1 != n),
        };
        let mut region = Region::whole(shape);
        (region.start[dim], region.size[dim]) = (range.start, range.len());
        region
    };
    (0..n).map(part).collect()
}

/// Every kind, with strewn and uneven parts, larger than a piece.
fn large_cases(n: usize, shape: &[usize]) -> Vec<Case> {
    let mut numbers = Numbers(n as u64);
    let len = shape.iter().product();
    let mut cases = all_reduces(n, std::iter::once(len));
    let whole = numbers.floats(len);
    let cut = |region: &Region| {
        let mut part = Vec::new();
        let runs = Runs::new(shape, region);
        runs.for_each(0..runs.element_count(), |place, _, len| part.extend_from_slice(&whole[place..place + len]));
        HostTensor::f32(&region.size, part)
    };
    let sizes = |parts: &[Region]| parts.iter().map(|part| part.size.clone()).collect::<Vec<_>>();
    let whole_of_each = || (0..n).map(|_| HostTensor::f32(shape, whole.clone())).collect::<Vec<_>>();
    for (dim, uneven) in [(0, false), (1, false), (0, true), (1, true)] {
        let parts = split(shape, n, dim, uneven);
        let other = split(shape, n, 1 - dim, uneven);
        let in_place = false;
        let xs: Vec<_> = (0..n).map(|_| HostTensor::f32(shape, numbers.floats(len))).collect();
        let kind = CollectiveKind::ReduceScatter { op: ReduceOp::Sum, parts: parts.clone() };
        cases.push(Case { kind, xs, y_shapes: sizes(&parts), in_place });
        let kind = CollectiveKind::AllGather { parts: parts.clone() };
        let xs: Vec<_> = parts.iter().map(cut).collect();
        cases.push(Case { kind, xs: xs.clone(), y_shapes: vec![shape.to_vec(); n], in_place });
        let kind = CollectiveKind::AllToAll { sources: parts, targets: other.clone() };
        cases.push(Case { kind, xs, y_shapes: sizes(&other), in_place });
        let kind = CollectiveKind::Broadcast { root: n - 1 };
        cases.push(Case { kind, xs: whole_of_each(), y_shapes: vec![shape.to_vec(); n], in_place });
    }
    // Parts that overlap: everybody has everything.
    let kind = CollectiveKind::AllGather { parts: vec![Region::whole(shape); n] };
    cases.push(Case { kind, xs: whole_of_each(), y_shapes: vec![shape.to_vec(); n], in_place: false });
    cases
}

#[test]
fn every_kind_is_right_over_many_pieces() {
    for n in [2, 3, 4] {
        check_same(&engines(n, PATIENT), &large_cases(n, &[701, 433]));
    }
}

/// Passes bytes on, in pieces of 1 to 7 and with other threads let through between, until its source ends.
fn split_bytes(mut from: UnixStream, mut to: UnixStream, seed: u64) {
    let mut numbers = Numbers(seed);
    let mut buffer = [0; 7];
    loop {
        let wanted = 1 + numbers.next() as usize % buffer.len();
        (0..numbers.next() % 3).for_each(|_| thread::yield_now());
        match from.read(&mut buffer[..wanted]) {
            Ok(bytes) if bytes > 0 && to.write_all(&buffer[..bytes]).is_ok() => {}
            _ => break,
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

#[test]
fn bytes_that_come_in_crumbs_change_nothing() {
    for seed in 0..3 {
        thread::scope(|scope| {
            let mut seeds = seed * 100..;
            let mut pair = || {
                let [[a, b], [c, d]] = [unix_pair(), unix_pair()];
                for (from, to) in [(&b, &c), (&c, &b)] {
                    let copies = (from.try_clone().expect("a copy"), to.try_clone().expect("a copy"));
                    let seed = seeds.next().unwrap_or_default();
                    scope.spawn(move || split_bytes(copies.0, copies.1, seed));
                }
                [a, d]
            };
            let wires: Vec<_> = mesh(3, &mut pair).into_iter().map(|all| Wire::new(all, PATIENT)).collect();
            let mut cases = all_reduces(3, [0, 1, 100].into_iter());
            cases.extend(large_cases(3, &[7, 9]));
            wires.iter().for_each(|wire| wire.set_tree_bytes_max([0, TREE_BYTES_MAX][seed as usize % 2]));
            check_same(&wires, &cases);
        });
    }
}

/// A receive of `len` floats by member 0 from a peer that is this test; the peer's end of the channel.
struct Victim {
    wire: Wire,
    peer: UnixStream,
    call: CollectiveCall,
    len: usize,
}

impl Victim {
    fn new(kind: CollectiveKind, len: usize) -> Self {
        let [own, peer] = unix_pair();
        let wire = Wire::new(BTreeMap::from([((7, 0, 1), own.into())]), HASTY);
        Self { wire, peer, call: CollectiveCall { group: group(2), member: 0, kind }, len }
    }

    /// The header that the other side of the call would send.
    fn header(&self, length: usize) -> Header {
        let memory = arena(4 * self.len);
        let shape = [self.len];
        let view = View::new("test", &memory, 0, &shape, DType::F32).expect("inside");
        let (digest, _) = agreement(&self.call, &[view], &[]);
        Header { kind: Kind::Data, group: 7, sender: 1, sequence: 0, digest, length: length as u64 }
    }

    fn tell(&mut self, header: Header, payload: &[u8]) {
        let mut bytes = Vec::new();
        header.encode("receive or send", &mut bytes);
        bytes.extend_from_slice(payload);
        self.peer.write_all(&bytes).expect("room in the socket");
    }

    fn run(&self) -> Result<(), KernelError> {
        let memory = arena(4 * self.len);
        let shape = [self.len];
        let view = [View::new("test", &memory, 0, &shape, DType::F32)?];
        match self.call.kind {
            CollectiveKind::Send { .. } => self.wire.run(&self.call, &view, &[]),
            _ => self.wire.run(&self.call, &[], &view),
        }
    }
}

fn link_cause(result: Result<(), KernelError>) -> String {
    match result {
        Err(KernelError::Link { group: 7, rank: 10, peer: 11, cause }) => cause,
        other => panic!("expected a failed link from 10 to 11, got {other:?}"),
    }
}

const RECEIVE: CollectiveKind = CollectiveKind::Receive { from: 1 };
const SEND: CollectiveKind = CollectiveKind::Send { to: 1 };

#[test]
fn a_peer_that_closes_in_a_transfer_is_named_and_the_group_stays_failed() {
    let mut victim = Victim::new(RECEIVE, 100);
    victim.tell(victim.header(400), &[0; 399]);
    victim.peer.shutdown(Shutdown::Write).expect("an open socket");
    assert!(link_cause(victim.run()).contains("closed by the peer during receive from member 1 of F32 [100]"));
    assert!(link_cause(victim.run()).contains("closed by the peer"));
}

#[test]
fn a_peer_that_reads_nothing_fails_the_write_in_time() {
    let mut victim = Victim::new(SEND, 2 << 20);
    victim.tell(victim.header(0), &[]);
    let began = Instant::now();
    assert!(link_cause(victim.run()).contains("takes no bytes for 200 ms"));
    assert!(began.elapsed() >= HASTY && began.elapsed() < PATIENT);
}

#[test]
fn every_header_that_is_wrong_is_refused() {
    let good = Victim::new(RECEIVE, 4);
    let mut bytes = Vec::new();
    good.header(16).encode("", &mut bytes);
    for (at, _) in bytes.iter().enumerate() {
        let mut victim = Victim::new(RECEIVE, 4);
        let mut bad = bytes.clone();
        bad[at] ^= 0xff;
        victim.peer.write_all(&bad).expect("room in the socket");
        victim.peer.write_all(&[0; 300]).expect("room in the socket");
        victim.peer.shutdown(Shutdown::Write).expect("an open socket");
        let refused = victim.run();
        let typed = matches!(refused, Err(KernelError::Link { .. } | KernelError::CollectiveMismatch { .. }));
        assert!(typed, "byte {at}: {refused:?}");
    }
    let mut numbers = Numbers(3);
    for _ in 0..200 {
        let mut victim = Victim::new(RECEIVE, 4);
        let garbage: Vec<u8> = (0..numbers.next() % 100).map(|_| numbers.next() as u8).collect();
        victim.peer.write_all(&garbage).expect("room in the socket");
        victim.peer.shutdown(Shutdown::Write).expect("an open socket");
        link_cause(victim.run());
    }
}

#[test]
fn a_length_that_is_not_the_calls_is_refused() {
    for length in [0, 15, 17, usize::MAX] {
        let mut victim = Victim::new(RECEIVE, 4);
        victim.tell(victim.header(length), &[0; 16]);
        assert!(link_cause(victim.run()).contains(&format!("{length} bytes was announced, expected 16")));
    }
    let mut victim = Victim::new(RECEIVE, 4);
    victim.tell(victim.header(16), &[0; 16]);
    assert_eq!(victim.run(), Ok(()));
}

#[test]
fn an_abort_ends_a_write_that_stalls() {
    let mut victim = Victim::new(SEND, 2 << 20);
    victim.wire.write_timeout = PATIENT;
    victim.tell(victim.header(0), &[]);
    let (began, seen) = channel();
    thread::scope(|scope| {
        let (victim, mut peer) = (&victim, victim.peer.try_clone().expect("a copy"));
        scope.spawn(move || {
            // What has come shows that the writer is at it.
            let mut byte = [0];
            peer.read_exact(&mut byte).expect("a byte");
            began.send(()).expect("a reader");
        });
        let run = scope.spawn(|| victim.run());
        seen.recv_timeout(PATIENT).expect("the writer begins");
        victim.wire.abort("the test says so");
        let aborted = KernelError::Aborted { cause: "the test says so".to_owned() };
        assert_eq!(run.join().expect("no panic"), Err(aborted));
    });
}

/// Whoever is left names the one that has gone, also where it was no neighbour.
#[test]
fn a_member_that_goes_is_named_by_all_others() {
    let mut wires = engines(4, PATIENT);
    let gone = wires.pop().expect("four");
    let case = all_reduces(4, std::iter::once(100_000)).swap_remove(0);
    drop(gone);
    let results = thread::scope(|scope| {
        let case = &case;
        let threads: Vec<_> =
            wires.iter().enumerate().map(|(i, wire)| scope.spawn(move || play(wire, i, case))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
    });
    for result in results {
        assert!(matches!(result, Err(KernelError::Link { peer: 13, .. })), "{result:?}");
    }
}

/// Member `odd_member` of 3 calls what the others do not.
fn check_all_are_told(odd_member: usize, odd: &Case, usual: &Case, odd_tree_bytes_max: usize) {
    let wires = engines(3, PATIENT);
    wires[odd_member].set_tree_bytes_max(odd_tree_bytes_max);
    let results = thread::scope(|scope| {
        let case_of = |member| if member == odd_member { odd } else { usual };
        let all = wires.iter().enumerate();
        let threads: Vec<_> = all.map(|(i, wire)| scope.spawn(move || play(wire, i, case_of(i)))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
    });
    for result in results {
        assert!(matches!(result, Err(KernelError::CollectiveMismatch { .. })), "{result:?}");
    }
}

#[test]
fn members_that_wait_for_each_other_in_different_calls_find_out() {
    let cases = all_reduces(3, [10, 11].into_iter());
    for odd_member in 0..3 {
        // A tree's root waits for one that goes round the ring, and so on.
        check_all_are_told(odd_member, &cases[4], &cases[0], 0);
        // Two wait for each other, and neither has sent anything.
        let broadcast = Case {
            kind: CollectiveKind::Broadcast { root: usize::from(odd_member == 0) },
            xs: (0..3).map(|_| HostTensor::f32(&[10], vec![0.0; 10])).collect(),
            y_shapes: vec![vec![10]; 3],
            in_place: false,
        };
        check_all_are_told(odd_member, &broadcast, &cases[0], TREE_BYTES_MAX);
    }
}

#[test]
fn calls_go_to_their_groups_engine() {
    let wires = engines(2, PATIENT);
    let wires: Vec<Arc<Wire>> = wires.into_iter().map(Arc::new).collect();
    let routed: Vec<Routed> = wires
        .iter()
        .map(|wire| {
            let by_group = BTreeMap::from([(7, wire.clone() as Arc<dyn Collective>)]);
            Routed::new(by_group, Arc::new(InProcess::new()))
        })
        .collect();
    let engines: Vec<&dyn Collective> = routed.iter().map(|engine| engine as &dyn Collective).collect();
    let cases = all_reduces(2, std::iter::once(6));
    assert!(play_all(&engines, &cases).iter().flatten().all(Result::is_ok));
    assert!(routed[0].bytes_received(10) > 0);
    assert_eq!(routed[0].bytes_received(10), wires[0].bytes_received(10));
    routed[0].abort("the test says so");
    let aborted = Err(KernelError::Aborted { cause: "the test says so".to_owned() });
    assert_eq!(play(&routed[0], 0, &cases[0]), aborted);
}

#[test]
fn who_waits_for_whom_is_known() {
    let wires = engines(2, PATIENT);
    let case = &all_reduces(2, std::iter::once(6))[0];
    thread::scope(|scope| {
        let early = scope.spawn(|| play(&wires[0], 0, case));
        let deadline = Instant::now() + PATIENT;
        // It waits a tick at a time.
        while wires[0].waits() != [MemberWait { group: 7, rank: 10, peer: 11 }] {
            assert!(Instant::now() < deadline && !early.is_finished());
            thread::yield_now();
        }
        assert_eq!(wires[1].waits(), []);
        assert!(play(&wires[1], 1, case).is_ok() && early.join().expect("no panic").is_ok());
    });
    assert_eq!(wires[0].waits(), []);
}
