//! Tests how readers handle wrong content of the board, and which arguments the engine rejects.

use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use super::*;
use crate::collective::in_process::InProcess;
use crate::collective::{Ranks, ReduceOp};
use crate::device::Device;
use crate::hash::SplitMix64;
use crate::memory::Access;
use crate::tensor::{DType, HostTensor};

const DEADLINE: Duration = Duration::from_secs(20);

fn group(id: u32, ranks: &[usize]) -> Arc<Group> {
    Arc::new(Group { id, ranks: Ranks::of(ranks) })
}

fn mapped(arena: &Arena, access: Access) -> Arena {
    let file = arena.descriptor().unwrap().try_clone_to_owned().unwrap();
    Arena::map_peer(file, arena.bytes(), access).unwrap()
}

fn engine(groups: &[Arc<Group>], arenas: BTreeMap<usize, Arena>) -> Arc<SharedMemory> {
    Arc::new(SharedMemory::new(Board::create(groups).unwrap(), groups, arenas).unwrap())
}

fn arenas(n: usize, bytes: usize) -> BTreeMap<usize, Arena> {
    let device = Device::cpu(0, 1, Arc::new(InProcess::new()));
    (0..n).map(|rank| (rank, device.shared_arena(bytes).unwrap())).collect()
}

const SUM: CollectiveKind = CollectiveKind::AllReduce { op: ReduceOp::Sum };

/// Runs a call as member 0 of group 1 on a new thread. The returned channel receives the result.
fn call(engine: &Arc<SharedMemory>, kind: CollectiveKind, elements: usize) -> Receiver<Result<()>> {
    let (sender, results) = channel();
    let engine = engine.clone();
    thread::spawn(move || {
        let group = engine.groups[0].group.clone();
        let arena = engine.arenas[&0].clone();
        let shape = [elements];
        let x = View::new("test", &arena, 0, &shape, DType::F32).unwrap();
        let reads = if matches!(kind, CollectiveKind::Receive { .. }) { &[][..] } else { &[x] };
        let _ = sender.send(engine.run(&CollectiveCall { group, member: 0, kind }, reads, &[x]));
    });
    results
}

#[test]
fn memory_that_a_peer_posts_outside_its_arena_is_not_accessed() {
    // These tensors are too large to be copied to the board, so members read each other's arenas.
    let elements = COPY_BYTES_MAX;
    let bytes = elements * 4;
    for (x, y) in [(4, 0), (0, 4), (u64::MAX, 0), (0, u64::MAX - 3), (1, 0), (u64::MAX / 2, 0), (bytes as u64, 0)] {
        let groups = [group(1, &[0, 1])];
        let engine = engine(&groups, arenas(2, bytes));
        let terms = CollectiveCall { group: groups[0].clone(), member: 0, kind: SUM };
        let slot = engine.board.member_slot(0, 1);
        let post = &slot.posts[1];
        post.terms.store(digest(&Terms::of(&terms, &[elements], &[elements], DType::F32)), Ordering::Relaxed);
        post.x.store(x, Ordering::Relaxed);
        post.y.store(y, Ordering::Relaxed);
        post.number.store(1, Ordering::Release);
        engine.board.group_area(0).arrivals.value.fetch_add(1, Ordering::SeqCst);
        let error = call(&engine, SUM, elements).recv_timeout(DEADLINE).unwrap().unwrap_err();
        assert!(error.to_string().contains("got 8192 elements at byte"), "x at {x}, y at {y}: {error}");
    }
}

#[test]
fn memory_that_a_peer_sends_from_outside_its_arena_is_not_accessed() {
    for x in [1, 4, 8, u64::MAX] {
        let groups = [group(1, &[0, 1])];
        let engine = engine(&groups, arenas(2, 8));
        let slot = engine.board.member_slot(0, 1);
        slot.sent.terms.store(digest(&(DType::F32, &[2usize][..])), Ordering::Relaxed);
        slot.sent.x.store(x, Ordering::Relaxed);
        slot.offer.value.store(1, Ordering::SeqCst);
        let error = call(&engine, CollectiveKind::Receive { from: 1 }, 2).recv_timeout(DEADLINE).unwrap().unwrap_err();
        assert!(error.to_string().contains("2 elements at byte"), "x at {x}: {error}");
    }
}

/// Whatever the board contains, a call returns, at the latest after an abort.
#[test]
fn calls_end_with_garbage_on_the_board() {
    let groups = [group(1, &[0, 1, 2])];
    for seed in 0..40u64 {
        let board = Board::create(&groups).unwrap();
        let engine = SharedMemory::new(mapped(&board, Access::ReadWrite), &groups, arenas(3, 1 << 16)).unwrap();
        let engine = Arc::new(engine);
        let mut random = SplitMix64(seed);
        // Three of four words are small, and look like states and member indices.
        let mut word = || if random.below(4) == 0 { random.draw() as i32 } else { random.below(4) as i32 };
        let words = board.bytes() / 4;
        board.write_host(0, &HostTensor::i32(&[words], (0..words).map(|_| word()).collect())).unwrap();
        for (kind, elements) in [(SUM, 10), (SUM, 1 << 14), (CollectiveKind::Receive { from: 2 }, 10)] {
            let results = call(&engine, kind, elements);
            let result = results.recv_timeout(Duration::from_millis(5)).or_else(|_| {
                engine.abort("the call still waits");
                results.recv_timeout(DEADLINE)
            });
            // The test accepts any result, even a sum of whatever buffers the random words seem to post.
            assert!(result.is_ok(), "seed {seed}: {result:?}");
        }
    }
}

#[test]
fn inconsistent_boards_groups_and_arenas_are_rejected() {
    let groups = [group(1, &[0, 1]), group(2, &[1, 2])];
    let board = Board::create(&groups).unwrap();
    let new_error = |board: &Arena, groups: &[Arc<Group>], arenas| {
        SharedMemory::new(mapped(board, Access::ReadWrite), groups, arenas).unwrap_err().to_string()
    };
    assert!(new_error(&board, &groups, arenas(2, 8)).contains("no arena of rank 2"));
    let same_id = [group(1, &[0, 1]), group(1, &[1, 2])];
    let error = new_error(&Board::create(&same_id).unwrap(), &same_id, arenas(3, 8));
    assert!(error.contains("1 different ids for 2 groups"));
    // The board was first opened with `groups`; the next process passes other groups.
    let others = [group(1, &[0, 1]), group(2, &[0, 2])];
    assert!(new_error(&board, &others, arenas(3, 8)).contains("the same groups as the other processes"));
    assert!(new_error(&board, &groups[..1], arenas(3, 8)).contains("bytes of shared memory"));
    let read_only = SharedMemory::new(mapped(&board, Access::Read), &groups, arenas(3, 8)).unwrap_err();
    assert!(read_only.to_string().contains("writable: false"));

    let engine = SharedMemory::new(board, &groups, arenas(3, 64)).unwrap();
    let shape = [2];
    let run = |group: Arc<Group>, arena: &Arena| {
        let x = View::new("test", arena, 0, &shape, DType::F32).unwrap();
        engine.run(&CollectiveCall { group, member: 0, kind: SUM }, &[x], &[x]).unwrap_err().to_string()
    };
    let own = engine.arenas[&0].clone();
    assert!(run(group(3, &[0, 1]), &own).contains("a group of this node"));
    assert!(run(group(1, &[0, 2]), &own).contains("a group of this node"));
    // Buffers must be in the arena that the engine knows: another mapping of its memory is refused. So is a y in a
    // read-only mapping.
    assert!(run(group(1, &[0, 1]), &mapped(&own, Access::ReadWrite)).contains("the shared arena of rank 0"));
    assert!(run(group(2, &[1, 2]), &mapped(&own, Access::Read)).contains("writable memory"));
}

#[test]
fn waits_lists_the_absent_member() {
    let groups = [group(1, &[0, 1])];
    let engine = engine(&groups, arenas(2, 64));
    assert_eq!(engine.waits(), []);
    let result = call(&engine, SUM, 4);
    let until = Instant::now() + DEADLINE;
    while engine.waits() != [MemberWait { group: 1, rank: 0, peer: 1 }] {
        assert!(Instant::now() < until);
        thread::yield_now();
    }
    engine.abort("aborted by the test");
    assert!(result.recv_timeout(DEADLINE).unwrap().is_err());
}
