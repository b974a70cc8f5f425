//! All connections of a job go through a relay that splits, delays and stalls them. The losses are bit-identical to
//! those of one process. The processes are threads of this test, each with its own session.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use shardflow::cluster::{Advertise, Cluster, ClusterOptions, Transport};
use shardflow::job::transport::Address;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::session::{Session, SessionOptions};
use shardflow_integration_tests::relay::{Relay, RelayCounts, RelayOptions};
use shardflow_integration_tests::together::cluster_at;
use shardflow_integration_tests::training::{Model, Scratch, options, within};

const SEEDS: u64 = 200;
const STEPS: usize = 3;
/// Number of seeds that run at the same time. Their trainings mostly wait.
const AT_ONCE: u64 = 3;
/// One seed out of this number has a long stall in each direction of each connection.
const LONG_EVERY: u64 = 20;
const HEARTBEAT_EVERY: Duration = Duration::from_millis(50);
/// Duration of a long stall. It is longer than ten heartbeat periods, and shorter than the deadline for heartbeats.
const LONG: Duration = Duration::from_millis(600);
const DEADLINE: Duration = Duration::from_secs(4);

/// Mesh, number of processes, and transport. The seeds use these cases in turn.
const CASES: [(&str, u32, Transport); 6] = [
    ("data=2,stage=2", 4, Transport::Tcp),
    ("data=2,stage=2", 2, Transport::Unix),
    ("tensor=2", 2, Transport::Tcp),
    ("data=2,stage=2", 4, Transport::Unix),
    ("tensor=2", 2, Transport::Unix),
    ("data=2,stage=2", 2, Transport::Tcp),
];

fn model() -> Model {
    Model { layers: 2, heads: 2, width: 16, context: 8, batch: 4, dropout: 0.1, max_norm: 1.0 }
}

fn bits(losses: &[f32]) -> Vec<u32> {
    losses.iter().map(|loss| loss.to_bits()).collect()
}

/// Trains as one process, and returns the bits of its losses.
fn train(mesh: &str, cluster: Cluster) -> Vec<u32> {
    let model = model();
    let rank = cluster.process();
    let options = SessionOptions { cluster, ..SessionOptions::default() };
    let plan = model.plan(mesh, &self::options(2, OneFOneB));
    let mut session = Session::start(plan, &options).unwrap_or_else(|e| panic!("rank {rank}: {e}"));
    let losses: Vec<f32> = (0..STEPS).map(|_| model.step(&mut session).loss.expect("a loss")).collect();
    session.shutdown().unwrap_or_else(|e| panic!("rank {rank}: {e}"));
    bits(&losses)
}

/// Returns the cluster of process `process`. The other processes reach it through the relay.
fn cluster(
    process: u32,
    processes: u32,
    socket: &Path,
    relay: &Arc<Relay>,
    (transport, encrypt): (Transport, bool),
) -> Cluster {
    let bound = Address::Unix(socket.into());
    let front = relay.connections(&bound).expect("a relay");
    let visible = if process == 0 { bound } else { front };
    let Address::Unix(visible) = visible else { panic!("expected a Unix socket, got {visible}") };
    let options = ClusterOptions {
        transport,
        encrypt,
        advertise: Some(relay.clone()),
        heartbeat_every: HEARTBEAT_EVERY,
        heartbeat_deadline: DEADLINE,
        ..ClusterOptions::default()
    };
    cluster_at(&visible, process, processes, options)
}

/// Trains through a relay with this seed. Checks that all processes get the expected losses.
fn check(seed: u64, expected: &[(&str, Vec<u32>)]) -> RelayCounts {
    let (mesh, processes, transport) = CASES[seed as usize % CASES.len()];
    let long_stall = (seed % LONG_EVERY == LONG_EVERY - 1).then_some((8, LONG));
    let relay = Arc::new(Relay::new(RelayOptions { seed, long_stall, records: false }));
    let folder = Scratch::new(&format!("delays-{seed}"));
    let socket = folder.path().join("meet.sock");
    let losses: Vec<Vec<u32>> = thread::scope(|scope| {
        let start = |process| {
            let cluster = cluster(process, processes, &socket, &relay, (transport, seed % 12 < 6));
            scope.spawn(move || train(mesh, cluster))
        };
        let threads: Vec<_> = (0..processes).map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| panic!("seed {seed}: {transport:?} failed"))).collect()
    });
    let (_, expected) = expected.iter().find(|e| e.0 == mesh).expect("a case's mesh");
    for (rank, losses) in losses.iter().enumerate() {
        assert!(
            losses == expected,
            "seed {seed}, {mesh} on {processes} by {transport:?}: the losses of rank {rank} differ"
        );
    }
    let counts = relay.counts();
    let heartbeat_stalls = if long_stall.is_some() { u64::from(processes) } else { 0 };
    assert_eq!(counts.heartbeat_stalls, heartbeat_stalls, "seed {seed}: stalled heartbeats");
    let has_stalls = counts.stalls > heartbeat_stalls;
    assert_eq!(has_stalls, long_stall.is_some(), "seed {seed}: the relay counted {} stalls", counts.stalls);
    counts
}

#[test]
fn losses_are_bit_identical_under_delays_and_splits() {
    within(600, || {
        let begin = Instant::now();
        let train_locally = |mesh| (mesh, train(mesh, Cluster::local()));
        let expected = [train_locally("data=2,stage=2"), train_locally("tensor=2")];
        let next = AtomicU64::new(0);
        let work = || {
            let mut all = Vec::new();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= SEEDS {
                    return all;
                }
                all.push(check(seed, &expected));
            }
        };
        let counts: Vec<RelayCounts> = thread::scope(|scope| {
            let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
            threads.into_iter().flat_map(|t| t.join().expect("a failed seed has printed its error")).collect()
        });
        let sum = |count: fn(&RelayCounts) -> u64| counts.iter().map(count).sum::<u64>();
        let (connections, pieces, bytes) = (sum(|p| p.connections), sum(|p| p.pieces), sum(|p| p.bytes));
        println!(
            "{SEEDS} seeds in {:.1} s: {connections} connections, {pieces} pieces, {bytes} bytes, {} long stalls",
            begin.elapsed().as_secs_f64(),
            sum(|p| p.stalls)
        );
        assert!(connections >= 5 * SEEDS && pieces >= 100 * SEEDS, "{connections} connections, {pieces} pieces");
    });
}
