//! Compares the engine bit by bit with the in-process engine. Tests peers that break, stall or send wrong headers.

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
use crate::hash::SplitMix64;
use crate::memory::Arena;
use crate::region::Runs;
use crate::tensor::{HostTensor, split_range};

const LONG_TIMEOUT: Duration = Duration::from_secs(30);
const SHORT_TIMEOUT: Duration = Duration::from_millis(200);

type Channels = Vec<BTreeMap<ChannelKey, Channel>>;

const ALL_REDUCE: CollectiveKind = CollectiveKind::AllReduce { op: ReduceOp::Sum };

/// Returns values of very different magnitudes, so that the order of additions affects the result. The values are the
/// same in every run.
fn floats(random: &mut SplitMix64, len: usize) -> Vec<f32> {
    let float = |bits: u64| (bits as f32 / 1e9 - 1.0) * [1.0, 1e-4, 1e5, -0.0][bits as usize % 4];
    (0..len).map(|_| float(random.draw() >> 33)).collect()
}

fn group(n: usize) -> Arc<Group> {
    Arc::new(Group { id: 7, ranks: (0..n).map(|member| 10 + member).collect() })
}

/// For each member of a group of n: its channels to the members with which these calls connect it.
fn mesh(n: usize, calls: &[&CollectiveKind], pair: &mut dyn FnMut() -> [UnixStream; 2]) -> Channels {
    let mut all: Channels = (0..n).map(|_| BTreeMap::new()).collect();
    for a in 0..n {
        let peers: BTreeSet<usize> = calls.iter().flat_map(|kind| peers(kind, n, a)).collect();
        for b in peers.into_iter().filter(|b| *b < a) {
            let [one, other] = pair();
            all[a].insert((7, a, b), Channel::Unix(one));
            all[b].insert((7, b, a), Channel::Unix(other));
        }
    }
    all
}

fn unix_pair() -> [UnixStream; 2] {
    UnixStream::pair().expect("a socket pair").into()
}

/// One engine per member, as if each ran in its own process. The engines have only the channels of these calls.
fn engines(n: usize, calls: &[&CollectiveKind]) -> Vec<Wire> {
    mesh(n, calls, &mut unix_pair).into_iter().map(|channels| Wire::new(channels, LONG_TIMEOUT)).collect()
}

fn kinds(cases: &[Case]) -> Vec<&CollectiveKind> {
    cases.iter().map(|case| &case.kind).collect()
}

/// One call by all members: each member's tensor, and the shape of each member's result.
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

/// Runs the case as one member and returns the bits of its result.
fn run_case(engine: &dyn Collective, member: usize, case: &Case) -> Result<Vec<u32>> {
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

/// Runs each member's cases, with all members at once. Returns the results by member, then by case.
fn run_all<'a>(
    engines: impl IntoIterator<Item = &'a dyn Collective>,
    cases_of: impl Fn(usize) -> &'a [Case],
) -> Vec<Vec<Result<Vec<u32>>>> {
    thread::scope(|scope| {
        let run = |(member, engine): (usize, &'a dyn Collective)| {
            let cases = cases_of(member);
            scope.spawn(move || cases.iter().map(|case| run_case(engine, member, case)).collect())
        };
        let threads: Vec<_> = engines.into_iter().enumerate().map(run).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

fn as_engines(wires: &[Wire]) -> impl Iterator<Item = &dyn Collective> {
    wires.iter().map(|wire| wire as &dyn Collective)
}

/// Checks that the socket engines return the same results as the in-process engine.
fn check_same(wires: &[Wire], cases: &[Case]) {
    let local = InProcess::new();
    let expected = run_all(vec![&local as &dyn Collective; wires.len()], |_| cases);
    let got = run_all(as_engines(wires), |_| cases);
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

fn all_reduces(n: usize, lengths: impl IntoIterator<Item = usize>) -> Vec<Case> {
    let mut random = SplitMix64(n as u64);
    let mut cases = Vec::new();
    for len in lengths {
        for op in [ReduceOp::Sum, ReduceOp::Max] {
            for in_place in [false, true] {
                let xs = (0..n).map(|_| HostTensor::f32(&[len], floats(&mut random, len))).collect();
                let y_shapes = vec![vec![len]; n];
                cases.push(Case { kind: CollectiveKind::AllReduce { op }, xs, y_shapes, in_place });
            }
        }
    }
    cases
}

#[test]
fn whole_and_divided_tensors_return_the_bits_of_the_in_process_engine() {
    for n in 1..=6 {
        for whole_bytes_max in [0, usize::MAX] {
            let wires = engines(n, &[&ALL_REDUCE]);
            wires.iter().for_each(|wire| wire.set_whole_bytes_max(whole_bytes_max));
            check_same(&wires, &all_reduces(n, 0..=40));
        }
    }
}

/// Splits the shape along a dim: evenly, or with all but one element in the first part.
fn split(shape: &[usize], n: usize, dim: usize, uneven: bool) -> Vec<Region> {
    let extent = shape[dim];
    let part = |i: usize| {
        let range = split_range(extent, n, i);
        let range = match (uneven, i) {
            (false, _) => range,
            (true, 0) => 0..extent - 1,
            (true, _) => extent - 1..extent - usize::from(i + 1 != n),
        };
        Region::whole(shape).with_range(dim, range)
    };
    (0..n).map(part).collect()
}

/// Calls of every kind. The parts are scattered and uneven, and larger than a piece.
fn large_cases(n: usize, shape: &[usize]) -> Vec<Case> {
    let mut random = SplitMix64(n as u64);
    let len = shape.iter().product();
    let mut cases = all_reduces(n, [len]);
    let whole = floats(&mut random, len);
    let cut = |region: &Region| {
        let mut part = Vec::new();
        let runs = Runs::new(shape, region);
        runs.for_each(0..runs.element_count(), |place, _, len| part.extend_from_slice(&whole[place..place + len]));
        HostTensor::f32(&region.size, part)
    };
    let sizes = |parts: &[Region]| parts.iter().map(|part| part.size.clone()).collect::<Vec<_>>();
    let whole_of_each = || (0..n).map(|_| HostTensor::f32(shape, whole.clone())).collect::<Vec<_>>();
    let mut add = |kind, xs, y_shapes| cases.push(Case { kind, xs, y_shapes, in_place: false });
    for (dim, uneven) in [(0, false), (1, false), (0, true), (1, true)] {
        let parts = split(shape, n, dim, uneven);
        let other = split(shape, n, 1 - dim, uneven);
        let xs = (0..n).map(|_| HostTensor::f32(shape, floats(&mut random, len))).collect();
        let kind = CollectiveKind::ReduceScatter { op: ReduceOp::Sum, parts: parts.clone().into() };
        add(kind, xs, sizes(&parts));
        let xs: Vec<_> = parts.iter().map(cut).collect();
        add(CollectiveKind::AllGather { parts: parts.clone().into() }, xs.clone(), vec![shape.to_vec(); n]);
        add(CollectiveKind::AllToAll { sources: parts.into(), targets: other.clone().into() }, xs, sizes(&other));
        add(CollectiveKind::Broadcast { root: n - 1 }, whole_of_each(), vec![shape.to_vec(); n]);
    }
    // Overlapping parts: every member has the whole tensor.
    let parts = vec![Region::whole(shape); n];
    add(CollectiveKind::AllGather { parts: parts.into() }, whole_of_each(), vec![shape.to_vec(); n]);
    cases
}

#[test]
fn every_kind_is_correct_over_many_pieces() {
    for n in [2, 3, 4, 6, 8, 9] {
        let cases = large_cases(n, &[701, 433]);
        check_same(&engines(n, &kinds(&cases)), &cases);
    }
}

/// More calls with few elements: broadcasts from each member, and exchanges between some pairs of members only.
fn small_cases(n: usize) -> Vec<Case> {
    let mut cases = large_cases(n, &[n + 3, 5]);
    let whole = HostTensor::f32(&[7], floats(&mut SplitMix64(n as u64), 7));
    let mut add = |kind, xs, y_shapes| cases.push(Case { kind, xs, y_shapes, in_place: false });
    for root in 0..n {
        add(CollectiveKind::Broadcast { root }, vec![whole.clone(); n], vec![vec![7]; n]);
    }
    // Even parts become uneven parts of the same dim.
    let (sources, targets) = (split(&[n + 3, 5], n, 0, false), split(&[n + 3, 5], n, 0, true));
    let halves = |part: &Region| HostTensor::f32(&part.size, vec![0.5; part.element_count()]);
    let (xs, sizes) = (sources.iter().map(halves).collect(), targets.iter().map(|part| part.size.clone()).collect());
    add(CollectiveKind::AllToAll { sources: sources.into(), targets: targets.into() }, xs, sizes);
    // The parts of an all-gather overlap: member i has the part of i / 2.
    let part = |member: usize| Region::whole(&[7]).with_range(0, split_range(7, n.div_ceil(2), member / 2));
    let parts: Vec<Region> = (0..n).map(part).collect();
    let xs = parts.iter().map(halves).collect();
    add(CollectiveKind::AllGather { parts: parts.into() }, xs, vec![vec![7]; n]);
    cases
}

#[test]
fn every_kind_needs_only_the_links_of_its_peers() {
    for n in 2..=17 {
        for case in small_cases(n) {
            for whole_bytes_max in [0, usize::MAX] {
                let wires = engines(n, &[&case.kind]);
                wires.iter().for_each(|wire| wire.set_whole_bytes_max(whole_bytes_max));
                check_same(&wires, std::slice::from_ref(&case));
            }
        }
    }
}

#[test]
fn peers_are_symmetric_and_few() {
    for n in 1..=17 {
        let of = |case: &Case| (0..n).map(|member| peers(&case.kind, n, member)).collect::<Vec<_>>();
        for case in if n > 1 { small_cases(n) } else { all_reduces(1, [1]) } {
            let all = of(&case);
            for (a, peers) in all.iter().enumerate() {
                assert!(peers.iter().all(|b| *b != a && *b < n && all[*b].contains(&a)), "{:?}: {all:?}", case.kind);
            }
        }
    }
    let most = |n: usize| (0..n).map(|member| peers(&ALL_REDUCE, n, member).len()).max();
    assert_eq!([3, 16, 384, 4096].map(most), [2, 4, 9, 12].map(Some));
    assert_eq!(peers(&RECEIVE, 4, 2), [1].into());
    assert_eq!(peers(&CollectiveKind::Send { to: 2 }, 4, 1), [2].into());
    // Each member gets rows only from itself and from the previous member.
    let [sources, targets] = [50, 48].map(|rows| split(&[rows, 2], 16, 0, false));
    let rows = CollectiveKind::AllToAll { sources: sources.clone().into(), targets: targets.into() };
    assert!((0..16).all(|member| peers(&rows, 16, member).len() <= 2));
    let kept = CollectiveKind::AllToAll { sources: sources.clone().into(), targets: sources.into() };
    assert!((0..16).all(|member| peers(&kept, 16, member).is_empty()));
}

/// Forwards bytes in pieces of 1 to 7 bytes until `from` ends. Yields to other threads between pieces.
fn split_bytes(mut from: UnixStream, mut to: UnixStream, seed: u64) {
    let mut random = SplitMix64(seed);
    let mut buffer = [0; 7];
    loop {
        let wanted = 1 + random.below(7) as usize;
        (0..random.below(3)).for_each(|_| thread::yield_now());
        match from.read(&mut buffer[..wanted]) {
            Ok(bytes) if bytes > 0 && to.write_all(&buffer[..bytes]).is_ok() => {}
            _ => break,
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

#[test]
fn fragmented_reads_do_not_change_results() {
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
            let mut cases = all_reduces(3, [0, 1, 100]);
            cases.extend(large_cases(3, &[7, 9]));
            let channels = mesh(3, &kinds(&cases), &mut pair).into_iter();
            let wires: Vec<_> = channels.map(|all| Wire::new(all, LONG_TIMEOUT)).collect();
            wires.iter().for_each(|wire| wire.set_whole_bytes_max([0, WHOLE_BYTES_MAX][seed as usize % 2]));
            check_same(&wires, &cases);
        });
    }
}

/// Member 0 of a call with `len` floats. The test itself acts as the peer, with `peer` as its end of the channel.
struct MemberUnderTest {
    wire: Wire,
    peer: UnixStream,
    call: CollectiveCall,
    len: usize,
}

impl MemberUnderTest {
    fn new(kind: CollectiveKind, len: usize) -> Self {
        let [own, peer] = unix_pair();
        let wire = Wire::new(BTreeMap::from([((7, 0, 1), Channel::Unix(own))]), SHORT_TIMEOUT);
        Self { wire, peer, call: CollectiveCall { group: group(2), member: 0, kind }, len }
    }

    /// The header that a peer in the same call would send.
    fn header(&self, length: usize) -> Header {
        let (memory, shape) = (arena(4 * self.len), [self.len]);
        let view = View::new("test", &memory, 0, &shape, DType::F32).expect("inside");
        let (digest, _) = agreement(&self.call, &[view], &[]);
        Header { kind: Kind::Data, group: 7, sender: 1, sequence: 0, digest, length: length as u64 }
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let mut bytes = Vec::new();
        header.encode("receive or send", &mut bytes);
        bytes.extend_from_slice(payload);
        self.peer.write_all(&bytes).expect("room in the socket");
    }

    fn run(&self) -> Result<()> {
        let (memory, shape) = (arena(4 * self.len), [self.len]);
        let view = [View::new("test", &memory, 0, &shape, DType::F32)?];
        match self.call.kind {
            CollectiveKind::Send { .. } => self.wire.run(&self.call, &view, &[]),
            _ => self.wire.run(&self.call, &[], &view),
        }
    }
}

fn link_cause(result: Result<()>) -> String {
    match result {
        Err(KernelError::Link { group: 7, rank: 10, peer: 11, cause }) => cause,
        other => panic!("expected a failed link from 10 to 11, got {other:?}"),
    }
}

const RECEIVE: CollectiveKind = CollectiveKind::Receive { from: 1 };
const SEND: CollectiveKind = CollectiveKind::Send { to: 1 };

#[test]
fn a_peer_that_closes_during_a_transfer_is_reported_and_the_group_stays_failed() {
    let mut member = MemberUnderTest::new(RECEIVE, 100);
    member.send(member.header(400), &[0; 399]);
    member.peer.shutdown(Shutdown::Write).expect("an open socket");
    let cause = link_cause(member.run());
    assert!(cause.contains("the peer closed the connection during receive from member 1 of F32 [100]"));
    assert!(link_cause(member.run()).contains("the peer closed the connection"));
}

#[test]
fn a_peer_that_reads_nothing_fails_the_write_after_the_timeout() {
    let mut member = MemberUnderTest::new(SEND, 2 << 20);
    member.send(member.header(0), &[]);
    let began = Instant::now();
    assert!(link_cause(member.run()).contains("the peer has accepted no bytes for 200 ms"));
    assert!(began.elapsed() >= SHORT_TIMEOUT && began.elapsed() < LONG_TIMEOUT);
}

#[test]
fn every_wrong_header_is_rejected() {
    let good = MemberUnderTest::new(RECEIVE, 4);
    let mut bytes = Vec::new();
    good.header(16).encode("", &mut bytes);
    for (at, _) in bytes.iter().enumerate() {
        let mut member = MemberUnderTest::new(RECEIVE, 4);
        let mut bad = bytes.clone();
        bad[at] ^= 0xff;
        member.peer.write_all(&bad).expect("room in the socket");
        member.peer.write_all(&[0; 300]).expect("room in the socket");
        member.peer.shutdown(Shutdown::Write).expect("an open socket");
        let error = member.run().expect_err("a wrong header");
        let is_expected = matches!(error, KernelError::Link { .. } | KernelError::CollectiveMismatch { .. });
        assert!(is_expected, "byte {at}: {error:?}");
    }
    let mut random = SplitMix64(3);
    for _ in 0..200 {
        let mut member = MemberUnderTest::new(RECEIVE, 4);
        let garbage: Vec<u8> = (0..random.below(100)).map(|_| random.draw() as u8).collect();
        member.peer.write_all(&garbage).expect("room in the socket");
        member.peer.shutdown(Shutdown::Write).expect("an open socket");
        link_cause(member.run());
    }
}

#[test]
fn a_length_other_than_the_calls_is_rejected() {
    for length in [0, 15, 17, usize::MAX] {
        let mut member = MemberUnderTest::new(RECEIVE, 4);
        member.send(member.header(length), &[0; 16]);
        assert!(link_cause(member.run()).contains(&format!("announced {length} bytes, but the call has 16")));
    }
    let mut member = MemberUnderTest::new(RECEIVE, 4);
    member.send(member.header(16), &[0; 16]);
    assert_eq!(member.run(), Ok(()));
}

#[test]
fn an_abort_ends_a_stalled_write() {
    let mut member = MemberUnderTest::new(SEND, 2 << 20);
    member.wire.write_timeout = LONG_TIMEOUT;
    member.send(member.header(0), &[]);
    let (started_sender, started) = channel();
    thread::scope(|scope| {
        let (member, mut peer) = (&member, member.peer.try_clone().expect("a copy"));
        scope.spawn(move || {
            // A received byte shows that the writer has started.
            let mut byte = [0];
            peer.read_exact(&mut byte).expect("a byte");
            started_sender.send(()).expect("a reader");
        });
        let run = scope.spawn(|| member.run());
        started.recv_timeout(LONG_TIMEOUT).expect("the writer starts");
        member.wire.abort("aborted by the test");
        let aborted = KernelError::Aborted { cause: "aborted by the test".to_owned() };
        assert_eq!(run.join().expect("no panic"), Err(aborted));
    });
}

#[test]
fn all_other_members_report_a_member_that_leaves() {
    // The others divide the tensor, or exchange it whole.
    for (n, len) in [(4, 100_000), (9, 100_000), (9, 1)] {
        let mut wires = engines(n, &[&ALL_REDUCE]);
        drop(wires.pop());
        let cases = all_reduces(n, [len]);
        for result in run_all(as_engines(&wires), |_| &cases[..1]).iter().flatten() {
            assert!(matches!(result, Err(KernelError::Link { peer, .. }) if *peer == 10 + n - 1), "{result:?}");
        }
    }
}

/// Member `odd_member` of n makes a different call from the others. All members report the mismatch.
fn check_all_report_the_mismatch(odd_member: usize, different: &[Case], common: &[Case], odd_whole_bytes_max: usize) {
    let wires = engines(common[0].xs.len(), &[&common[0].kind, &different[0].kind]);
    wires[odd_member].set_whole_bytes_max(odd_whole_bytes_max);
    let cases_of = |member| if member == odd_member { different } else { common };
    for result in run_all(as_engines(&wires), cases_of).iter().flatten() {
        assert!(matches!(result, Err(KernelError::CollectiveMismatch { .. })), "{result:?}");
    }
}

#[test]
fn members_that_wait_for_each_other_in_different_calls_report_a_mismatch() {
    for (n, odd_member) in [(3, 0), (3, 1), (3, 2), (9, 0), (9, 3), (9, 8)] {
        let cases = all_reduces(n, [10, 11]);
        // The odd member divides the tensor and the others exchange it whole, so they wait for each other.
        check_all_report_the_mismatch(odd_member, &cases[4..5], &cases[..1], 0);
        // Two members wait for each other, and neither has sent anything.
        let broadcast = Case {
            kind: CollectiveKind::Broadcast { root: usize::from(odd_member == 0) },
            xs: vec![HostTensor::f32(&[10], vec![0.0; 10]); n],
            y_shapes: vec![vec![10]; n],
            in_place: false,
        };
        check_all_report_the_mismatch(odd_member, &[broadcast], &cases[..1], WHOLE_BYTES_MAX);
        // The others are in the middle of transfers, so they cannot report the mismatch to the next member.
        let large = all_reduces(n, [100_000]);
        check_all_report_the_mismatch(odd_member, &large[2..3], &large[..1], WHOLE_BYTES_MAX);
    }
}

#[test]
fn routed_calls_run_on_their_groups_engine() {
    let wires: Vec<Arc<Wire>> = engines(2, &[&ALL_REDUCE]).into_iter().map(Arc::new).collect();
    let routed = wires.iter().map(|wire| {
        let by_group = BTreeMap::from([(7, wire.clone() as Arc<dyn Collective>)]);
        Routed::new(by_group, Arc::new(InProcess::new()))
    });
    let routed: Vec<Routed> = routed.collect();
    let cases = all_reduces(2, [6]);
    let results = run_all(routed.iter().map(|engine| engine as &dyn Collective), |_| &cases);
    assert!(results.iter().flatten().all(Result::is_ok));
    assert!(routed[0].bytes_received(10) > 0);
    assert_eq!(routed[0].bytes_received(10), wires[0].bytes_received(10));
    routed[0].abort("aborted by the test");
    let aborted = Err(KernelError::Aborted { cause: "aborted by the test".to_owned() });
    assert_eq!(run_case(&routed[0], 0, &cases[0]), aborted);
}

#[test]
fn waits_lists_the_absent_member() {
    let wires = engines(2, &[&ALL_REDUCE]);
    let case = &all_reduces(2, [6])[0];
    thread::scope(|scope| {
        let early = scope.spawn(|| run_case(&wires[0], 0, case));
        let deadline = Instant::now() + LONG_TIMEOUT;
        // The member waits in ticks with short gaps. During a gap, `waits` does not list the member, so the test polls.
        while wires[0].waits() != [MemberWait { group: 7, rank: 10, peer: 11 }] {
            assert!(Instant::now() < deadline && !early.is_finished());
            thread::yield_now();
        }
        assert_eq!(wires[1].waits(), []);
        assert!(run_case(&wires[1], 1, case).is_ok() && early.join().expect("no panic").is_ok());
    });
    assert_eq!(wires[0].waits(), []);
}
