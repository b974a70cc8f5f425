//! A process that is slow, and alive, is waited for and named; the wait has a limit, and ends at once when the process does.
//! The processes are threads of this test, each with a session of its own; a channel holds the slow one up.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use shardflow::cluster::env::{Endpoint, LaunchContext, LaunchedBy, Secret, SecretSource, World};
use shardflow::cluster::{Cluster, ClusterOptions, Transport};
use shardflow::exit::Exit;
use shardflow::plan::Schedule::GPipe;
use shardflow::session::{SessionError, SessionOptions};
use shardflow_actors::watchdog::WatchdogOptions;
use shardflow_integration_tests::training::{Model, Scratch, options, within};

/// An event that is expected long before.
const PATIENCE: Duration = Duration::from_secs(60);

fn model() -> Model {
    Model { layers: 2, heads: 2, width: 16, context: 8, batch: 4, dropout: 0.0, max_norm: 1.0 }
}

/// Process `process` of two. Lines about waits go to `lines`.
fn cluster(process: u32, meet: &Path, lines: Sender<String>) -> Cluster {
    let world = World {
        process,
        processes: 2,
        local_process: process,
        local_processes: 2,
        node: Some(0),
        endpoint: Endpoint::Unix(meet.into()),
        secret: SecretSource::Text(Secret::new("a secret of these tests", "this test").expect("long enough")),
        restart: 0,
        source: LaunchedBy::Shardflow,
        run_id: "slow".into(),
    };
    let options = ClusterOptions {
        transport: Transport::Unix,
        report_every: Duration::from_millis(20),
        on_waiting: Some(Arc::new(move |line| drop(lines.send(line.to_owned())))),
        ..ClusterOptions::default()
    };
    Cluster::new(LaunchContext::World(world), options)
}

/// What rank 1 does between its start and the point where rank 0 waits for it.
enum Slow {
    /// It is held up until the channel says so, or rank 0 is done.
    Until(Receiver<()>),
    /// It ends in order.
    Ends,
}

/// Rank 0 sets the weights, which rank 1 does late, or never. Gives how that ended on rank 0, how long it took, and the lines
/// of rank 0 go to `lines`.
fn set_weights(
    name: &str,
    wait_max: Duration,
    slow: Slow,
    release: Option<Sender<()>>,
    lines: Sender<String>,
) -> (Result<(), SessionError>, Duration) {
    let folder = Scratch::new(&format!("slow-{name}"));
    let meet = folder.path().join("meet.sock");
    let start = |process: u32, lines| {
        let watchdog = WatchdogOptions { abort_after: Some(wait_max), ..WatchdogOptions::default() };
        let among = SessionOptions { cluster: cluster(process, &meet, lines), watchdog, ..SessionOptions::default() };
        let mut session = model().session_among("stage=2", &options(1, GPipe), &among);
        model().step(&mut session);
        let weights = session.parameters().expect("both ask");
        (session, weights)
    };
    thread::scope(|scope| {
        let start = &start;
        scope.spawn(move || {
            let (mut session, weights) = start(1, channel().0);
            if let Slow::Until(released) = slow {
                // Dropped by the other end: the test is over.
                let _ = released.recv_timeout(PATIENCE);
                // What comes of it, rank 0 says.
                let _ = session.set_parameters(&weights);
            }
        });
        let (mut session, weights) = start(0, lines);
        let begin = Instant::now();
        let set = session.set_parameters(&weights);
        drop(release);
        (set, begin.elapsed())
    })
}

#[test]
fn a_slow_rank_is_waited_for_and_named() {
    within(120, || {
        let (lines, logged) = channel();
        let (release, released) = channel();
        let waiting = thread::spawn(move || set_weights("named", PATIENCE, Slow::Until(released), None, lines));
        let deadline = Instant::now() + PATIENCE;
        let line = loop {
            let line = logged.recv_timeout(deadline.saturating_duration_since(Instant::now())).expect("it is named");
            if line.contains("which has been running the program") {
                break line;
            }
        };
        assert!(line.starts_with("waiting for rank 1, which has been"), "{line}");
        release.send(()).expect("it waits");
        let (set, _) = waiting.join().expect("does not panic");
        set.expect("slow is not dead");
    });
}

#[test]
fn the_wait_for_a_slow_rank_has_a_limit() {
    within(120, || {
        // Long enough for both to start on a busy machine.
        let limit = Duration::from_secs(5);
        let (release, released) = channel();
        let (set, took) = set_weights("limit", limit, Slow::Until(released), Some(release), channel().0);
        let error = set.expect_err("rank 1 does not come");
        assert_eq!((error.exit(), error.first_cause_rank()), (Exit::PeerUnavailable, Some(1)), "{error}");
        assert!((limit..limit * 4).contains(&took), "{took:?}");
    });
}

#[test]
fn a_rank_that_ends_is_not_waited_for() {
    within(120, || {
        let (set, took) = set_weights("ends", Duration::from_secs(600), Slow::Ends, None, channel().0);
        let error = set.expect_err("rank 1 does not come");
        assert_eq!(error.first_cause_rank(), Some(1), "{error}");
        assert!(took < PATIENCE, "{took:?}");
    });
}
