//! A session waits for a slow process and reports this process. The wait has a time limit, and ends immediately if the
//! slow process ends. The processes are threads, each with its own session. A channel blocks the slow process.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use shardflow::cluster::{Cluster, ClusterOptions, Transport};
use shardflow::exit::Exit;
use shardflow::plan::Schedule::GPipe;
use shardflow::session::{SessionError, SessionOptions};
use shardflow_actors::watchdog::WatchdogOptions;
use shardflow_integration_tests::together::cluster_at;
use shardflow_integration_tests::training::{Model, Scratch, options, within};

/// Much longer than any expected wait.
const PATIENCE: Duration = Duration::from_secs(60);

fn model() -> Model {
    Model { layers: 2, heads: 2, width: 16, context: 8, batch: 4, dropout: 0.0, max_norm: 1.0 }
}

/// Returns the cluster of one of the two processes. Messages about waits go to `lines`.
fn cluster(process: u32, socket: &Path, lines: Sender<String>) -> Cluster {
    let options = ClusterOptions {
        transport: Transport::Unix,
        report_every: Duration::from_millis(20),
        on_waiting: Some(Arc::new(move |line| drop(lines.send(line.to_owned())))),
        ..ClusterOptions::default()
    };
    cluster_at(socket, process, 2, options)
}

/// What rank 1 does while rank 0 waits for it.
enum Rank1 {
    /// Rank 1 is blocked until a value arrives in the channel or the channel closes.
    Until(Receiver<()>),
    /// Rank 1 ends without an error.
    Ends,
}

/// Rank 0 sets the weights, and rank 1 sets them late or never. Returns the result of rank 0 and the duration of its
/// call. Messages of rank 0 go to `lines`.
fn set_weights(
    name: &str,
    wait_max: Duration,
    slow: Rank1,
    release: Option<Sender<()>>,
    lines: Sender<String>,
) -> (Result<(), SessionError>, Duration) {
    let folder = Scratch::new(&format!("slow-{name}"));
    let socket = folder.path().join("meet.sock");
    let start = |process: u32, lines| {
        let watchdog = WatchdogOptions { abort_after: Some(wait_max), ..WatchdogOptions::default() };
        let session_options =
            SessionOptions { cluster: cluster(process, &socket, lines), watchdog, ..SessionOptions::default() };
        let mut session = model().session_with("stage=2", &options(1, GPipe), &session_options);
        model().step(&mut session);
        let weights = session.parameters().expect("both ranks request the parameters");
        (session, weights)
    };
    thread::scope(|scope| {
        let start = &start;
        scope.spawn(move || {
            let (mut session, weights) = start(1, channel().0);
            if let Rank1::Until(released) = slow {
                // A closed channel also ends the wait.
                let _ = released.recv_timeout(PATIENCE);
                // Ignore the outcome here, because rank 0 checks it.
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
fn a_session_waits_for_a_slow_rank_and_reports_it() {
    within(120, || {
        let (lines, logged) = channel();
        let (release, released) = channel();
        let waiting = thread::spawn(move || set_weights("named", PATIENCE, Rank1::Until(released), None, lines));
        let deadline = Instant::now() + PATIENCE;
        let line = loop {
            let line = logged.recv_timeout(deadline.saturating_duration_since(Instant::now())).expect("a message");
            if line.contains("which has been running the program") {
                break line;
            }
        };
        assert!(line.starts_with("waiting for rank 1, which has been"), "{line}");
        release.send(()).expect("rank 1 waits");
        let (set, _) = waiting.join().expect("no panic");
        set.expect("rank 1 continues");
    });
}

#[test]
fn the_wait_for_a_slow_rank_has_a_limit() {
    within(120, || {
        // The limit is long enough for both ranks to start on a busy machine.
        let limit = Duration::from_secs(5);
        let (release, released) = channel();
        let (set, duration) = set_weights("limit", limit, Rank1::Until(released), Some(release), channel().0);
        let error = set.expect_err("rank 1 does not come");
        assert_eq!((error.exit(), error.first_cause_rank()), (Exit::PeerUnavailable, Some(1)), "{error}");
        assert!((limit..limit * 4).contains(&duration), "{duration:?}");
    });
}

#[test]
fn the_wait_ends_when_the_rank_ends() {
    within(120, || {
        let (set, duration) = set_weights("ends", Duration::from_secs(600), Rank1::Ends, None, channel().0);
        let error = set.expect_err("rank 1 does not come");
        assert_eq!(error.first_cause_rank(), Some(1), "{error}");
        assert!(duration < PATIENCE, "{duration:?}");
    });
}
