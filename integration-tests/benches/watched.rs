//! What watching costs a training step of the default model: a session that nobody watches, beside one that tells all metrics, is
//! scraped and writes a trace, step by step in turn. `cargo bench -p shardflow-integration-tests --bench watched [-- THREADS]`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};

use shardflow::session::{Session, SessionOptions};
use shardflow::trace::TraceFile;
use shardflow::watch::Watch;
use shardflow_integration_tests::default_model::{plan, step};
use shardflow_integration_tests::measure::{median, timed};
use shardflow_integration_tests::training::Scratch;

/// In each of so many windows there is one scrape. Prometheus scrapes every 15 s; here it is about once a second.
const WINDOWS: usize = 30;
const STEPS: usize = 40;
const WARM: usize = 4;

fn scrape(address: SocketAddr) -> usize {
    let mut stream = TcpStream::connect(address).expect("a server");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("it listens");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.contains("shardflow_steps_total"), "{answer}");
    answer.len()
}

fn main() {
    let threads = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(1);
    let watch = Watch::listen("127.0.0.1:0".parse().expect("an address")).expect("a server");
    let (ask, asked): (Sender<()>, Receiver<()>) = channel();
    let (answer, answered) = channel();
    let address = watch.address();
    std::thread::spawn(move || {
        asked.into_iter().for_each(|()| answer.send(scrape(address)).expect("it is waited for"))
    });
    let scratch = Scratch::new("watched");
    let (mut plain_seconds, mut ratios, mut writing) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..WINDOWS {
        // Where a session's memory lies makes its steps longer or shorter; so each window has two new ones, in either order.
        let start = |publishes_metrics| {
            let options = SessionOptions { publishes_metrics, ..SessionOptions::default() };
            Session::start(plan(threads), &options).expect("a session")
        };
        let is_first = ratios.len() % 2 == 0;
        let first = start(is_first);
        let (mut watched, mut plain) = if is_first { (first, start(false)) } else { (start(true), first) };
        watch.show(&watched);
        let mut trace = TraceFile::create(&scratch.path().join("trace.json"), u64::MAX).expect("a file");
        let (mut without, mut with) = (0.0, 0.0);
        for index in 0..WARM + STEPS {
            let mut plainly = || timed(|| step(&mut plain));
            let before = (index % 2 == 0).then(&mut plainly);
            let took = timed(|| {
                let is_scraped = index == WARM + STEPS / 2;
                is_scraped.then(|| ask.send(()).expect("a thread"));
                step(&mut watched);
                writing.push(timed(|| assert!(trace.add(&watched).expect("room"))));
                is_scraped.then(|| answered.recv().expect("an answer"));
            });
            let beside = before.unwrap_or_else(plainly);
            if index >= WARM {
                (without, with) = (without + beside, with + took);
            }
        }
        plain_seconds.push(without / STEPS as f64);
        ratios.push(with / without);
        assert_eq!(trace.finish().expect("room"), 0, "the trace lacks nothing");
        [plain, watched].into_iter().for_each(|session| session.shutdown().expect("it works"));
    }
    ratios.sort_by(f64::total_cmp);
    let middle = |values| median(values).expect("windows");
    println!(
        "{threads} threads: a step takes {:.2} ms; watched, {:.4} of that ({:.4} to {:.4} in {WINDOWS} windows of {STEPS} steps); \
         of it {:.0} us to write the trace",
        middle(plain_seconds) * 1e3,
        middle(ratios.clone()),
        ratios[0],
        ratios[ratios.len() - 1],
        middle(writing) * 1e6,
    );
}
