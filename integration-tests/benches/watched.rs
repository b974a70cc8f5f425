//! Measures how much monitoring slows down a training step of the default model. Steps of a plain session alternate
//! with steps of a session that exports all metrics and writes a trace while it is scraped.
//!
//! Command: `cargo bench -p shardflow-integration-tests --bench watched [-- THREADS]`

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};

use shardflow::session::{Session, SessionOptions};
use shardflow::trace::TraceFile;
use shardflow::watch::Watch;
use shardflow_integration_tests::default_model::{plan, step};
use shardflow_integration_tests::measure::{median, timed};
use shardflow_integration_tests::training::Scratch;

/// Number of windows. Each has one scrape, so there is about one scrape per second. Prometheus scrapes every 15 s.
const WINDOWS: usize = 30;
const STEPS: usize = 40;
const WARM: usize = 4;

fn scrape(address: SocketAddr) -> usize {
    let mut stream = TcpStream::connect(address).expect("a server");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("the server reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.contains("shardflow_steps_total"), "{answer}");
    answer.len()
}

fn main() {
    let threads = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(1);
    let watch = Watch::listen("127.0.0.1:0".parse().expect("an address")).expect("a server");
    let (scrape_request, scrape_requests): (Sender<()>, Receiver<()>) = channel();
    let (scrape_done, scrapes_done) = channel();
    let address = watch.address();
    std::thread::spawn(move || {
        scrape_requests.into_iter().for_each(|()| scrape_done.send(scrape(address)).expect("the receiver waits"))
    });
    let scratch = Scratch::new("watched");
    let (mut plain_seconds, mut ratios, mut writing) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..WINDOWS {
        // The placement of a session's memory affects its speed. Each window therefore starts two new sessions, in
        // alternating order.
        let start = |publishes_metrics| {
            let options = SessionOptions { publishes_metrics, ..SessionOptions::default() };
            Session::start(plan(threads), &options).expect("a session")
        };
        let is_first = ratios.len() % 2 == 0;
        let first = start(is_first);
        let (mut watched, mut plain) = if is_first { (first, start(false)) } else { (start(true), first) };
        watch.show(&watched);
        let mut trace = TraceFile::create(&scratch.path().join("trace.json"), u64::MAX).expect("a file");
        let (mut plain_total, mut watched_total) = (0.0, 0.0);
        for index in 0..WARM + STEPS {
            let mut plain_step = || timed(|| step(&mut plain));
            let before = (index % 2 == 0).then(&mut plain_step);
            let watched_step = timed(|| {
                let is_scraped = index == WARM + STEPS / 2;
                is_scraped.then(|| scrape_request.send(()).expect("a thread"));
                step(&mut watched);
                writing.push(timed(|| assert!(trace.add(&watched).expect("room"))));
                is_scraped.then(|| scrapes_done.recv().expect("an answer"));
            });
            let plain_seconds_now = before.unwrap_or_else(plain_step);
            if index >= WARM {
                (plain_total, watched_total) = (plain_total + plain_seconds_now, watched_total + watched_step);
            }
        }
        plain_seconds.push(plain_total / STEPS as f64);
        ratios.push(watched_total / plain_total);
        assert_eq!(trace.finish().expect("room"), 0, "trace events were dropped");
        [plain, watched].into_iter().for_each(|session| session.shutdown().expect("a clean shutdown"));
    }
    ratios.sort_by(f64::total_cmp);
    let middle = |values| median(values).expect("windows");
    println!(
        "{threads} threads: a step takes {:.2} ms; with monitoring, {:.4} times as long ({:.4} to {:.4} in {WINDOWS} \
         windows of {STEPS} steps); writing the trace takes {:.0} us per step",
        middle(plain_seconds) * 1e3,
        middle(ratios.clone()),
        ratios[0],
        ratios[ratios.len() - 1],
        middle(writing) * 1e6,
    );
}
