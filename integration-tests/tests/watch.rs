//! A running session exports every documented metric in Prometheus' text format. The values match the session's own.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use shardflow::checkpoint::{SaverOptions, SingleProcess, Store, save_now};
use shardflow::metrics as names;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::plan::flops::step_flops;
use shardflow::session::metrics::Metrics;
use shardflow::session::{Session, SessionError, SessionOptions, StepReport};
use shardflow::watch::status::DeviceStatus;
use shardflow::watch::{Watch, WatchError, client};
use shardflow_integration_tests::training::{LEARNING_RATE, Model, Scratch, options};

const STEPS: u64 = 5;
const PEAK: f64 = 1e12;
/// Labels of the edge from the first stage to the second stage.
const EDGE: &str = "from=\"device 0 compute\",to=\"device 1 copy\",transport=\"process\"";

fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("a server");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a time-out");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("a request");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, body.to_owned())
}

/// Values of metrics by name and labels.
type Values = BTreeMap<String, f64>;

/// Parses Prometheus' text.
fn values(text: &str) -> Values {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let value = |line: &str| {
        let (name, value) = line.rsplit_once(' ').expect("a value");
        (name.to_owned(), value.parse().expect("a number"))
    };
    lines.map(value).collect()
}

/// Returns the sum of all series that are called `name` and whose labels contain the text `labels`.
fn sum(values: &Values, name: &str, labels: &str) -> f64 {
    let of = |series: &&String| series.split('{').next() == Some(name) && series.contains(labels);
    values.iter().filter(|(series, _)| of(series)).map(|(_, value)| value).sum()
}

/// This file has only one test, because a process can install only one recorder of metrics.
#[test]
fn metrics_match_the_session() {
    let watch = Watch::listen("127.0.0.1:0".parse().expect("an address")).expect("a server");
    assert!(watch.address().ip().is_loopback());
    assert!(matches!(Watch::listen("127.0.0.1:0".parse().expect("an address")), Err(WatchError::Recorder)));
    assert_eq!(get(watch.address(), "/healthz").0, 503, "no session yet");
    let model = Model::default();
    let plan = model.plan("data=2,stage=2", &options(2, OneFOneB));
    let flops = step_flops(&plan.graph, 2) as f64;
    let mut cluster = shardflow::cluster::Cluster::local();
    cluster.restart_causes = vec![137, 75, 137];
    let settings = SessionOptions { peak_flops: Some(PEAK), cluster, ..SessionOptions::default() };
    let mut session = Session::start(plan, &settings).expect("a session");
    watch.show(&session);
    let reports: Vec<_> = (0..STEPS).map(|_| model.step(&mut session)).collect();
    let scratch = Scratch::new("watch");
    let store = Store::open(scratch.path().to_str().expect("text")).expect("a store");
    let snapshot = session.snapshot(None).expect("a snapshot");
    save_now(&store, &snapshot, &SingleProcess, &SaverOptions::default(), 0)
        .expect("options")
        .result
        .expect("a checkpoint");

    assert_eq!(get(watch.address(), "/healthz"), (200, format!("ok, {STEPS} steps\n")));
    let (status, text) = get(watch.address(), "/metrics");
    assert_eq!(status, 200);
    let (got, last, metrics) = (values(&text), &reports[STEPS as usize - 1], session.metrics());
    check_steps(&got, last, flops, &model);
    check_job(&got);
    check_actors(&got, &metrics);
    check_devices(&got, &metrics);
    // The edge carries the activations of two micro-batches per step.
    let rows = model.batch / 2 / 2 * model.context * model.width * 4;
    let edge = sum(&got, names::EDGE_BYTES, EDGE);
    let collectives = session_collectives(&session);
    assert_eq!(edge, (rows * 2 * STEPS as usize) as f64);
    check_status(watch.address(), last, &metrics);
    assert_complete(&text);
    promtool(&text);
    session.shutdown().expect("a clean shutdown");
    assert_eq!(get(watch.address(), "/healthz").0, 503, "the session has ended");
    assert_eq!(get(watch.address(), "/nothing").0, 404);
    check_diverging_session(&watch, &model, edge, collectives);
    check_attempts_of_a_job(&watch, &model);
}

/// Checks the values of the last step and the totals of all steps.
fn check_steps(got: &Values, last: &StepReport, flops: f64, model: &Model) {
    let value = |name: &str| got[name];
    assert_eq!((value(names::STEPS), value(names::STEPS_NON_FINITE)), (STEPS as f64, 0.0));
    assert_eq!(value(names::STEP), STEPS as f64);
    assert!(value(names::START) > 1.7e9);
    assert_eq!(value(names::TOKENS), (STEPS as usize * model.batch * model.context) as f64);
    assert_eq!(value(names::LOSS) as f32, last.loss.expect("a loss"));
    assert_eq!(value(names::GRADIENT_NORM), last.grad_norm.expect("a norm"));
    assert_eq!(value(names::LEARNING_RATE) as f32, LEARNING_RATE);
    assert_eq!(value(names::STEP_FLOPS), flops);
    assert_eq!(value("shardflow_step_duration_seconds_count"), STEPS as f64);
    let mfu = value(names::MFU);
    assert!(mfu > flops / PEAK / 4.0 / 60.0 && mfu < 1.0, "{mfu}");
    let ratio = value(names::TRAINING_RATIO);
    assert!(ratio > 0.0 && ratio <= 1.0, "{ratio}");
}

/// Checks the values of the job and of its checkpoint.
fn check_job(got: &Values) {
    let value = |name: &str| got[name];
    assert_eq!(sum(got, names::BUILD_INFO, "mesh=\"data=2,stage=2\""), 1.0);
    assert_eq!((sum(got, names::RESTARTS, "137"), sum(got, names::RESTARTS, "")), (2.0, 3.0));
    assert_eq!(sum(got, names::STALLS, ""), 0.0);
    assert_eq!(value("shardflow_checkpoint_duration_seconds_count"), 1.0);
    let saves =
        ["committed", "failed"].map(|outcome| value(&format!("{}{{outcome=\"{outcome}\"}}", names::CHECKPOINTS)));
    assert_eq!(saves, [1.0, 0.0]);
    assert!(value(names::CHECKPOINT_LAST_SUCCESS) > 1.7e9);
}

fn check_actors(got: &Values, metrics: &Metrics) {
    let value = |name: &str| got[name];
    for actor in &metrics.actors {
        for (action, firings, seconds) in &actor.actions {
            let labels = format!("{{actor=\"{}\",action=\"{action}\",role=\"", actor.name);
            let [count, busy] = ["count", "sum"].map(|kind| sum(got, &format!("{}_{kind}", names::FIRING), &labels));
            assert_eq!(count, *firings as f64, "{labels}");
            assert!((busy - seconds).abs() < 1e-6, "{labels}: got {busy}, expected {seconds}");
        }
    }
    let firings: u64 = metrics.actors.iter().flat_map(|a| &a.actions).map(|a| a.1).sum();
    assert_eq!(sum(got, &format!("{}_count", names::WAIT), ""), firings as f64);
    assert!(sum(got, &format!("{}_sum", names::WAIT), "reason=\"host\"") > 0.0);
    for register in &metrics.registers {
        let of = |state: &str| value(&format!("{}{{register=\"{}\",state=\"{state}\"}}", names::SLOTS, register.name));
        let slots = ["free", "writing", "filled"].map(of);
        assert_eq!(slots.iter().sum::<f64>(), f64::from(register.slots), "{}", register.name);
        assert_eq!(slots[1] + slots[2], f64::from(register.slots_held), "{}", register.name);
    }
    // An actor's busy time includes its time in collectives.
    let mut collect = BTreeSet::new();
    for actor in &metrics.actors {
        let labels = format!("actor=\"{}\"", actor.name);
        let spent = sum(got, "shardflow_collective_seconds_sum", &labels);
        let busy: f64 = actor.actions.iter().map(|(_, _, seconds)| seconds).sum();
        assert!(spent <= busy, "{labels}: {spent} s in collectives, but only {busy} s busy");
        if spent > 0.0 {
            collect.insert(actor.name.split(' ').take(2).collect::<Vec<_>>().join(" "));
        }
    }
    assert_eq!(collect.into_iter().collect::<Vec<_>>(), ["device 0", "device 1", "device 2", "device 3"]);
    assert!(sum(got, "shardflow_collective_seconds_count", "kind=\"all_reduce\"") > 0.0);
}

fn check_devices(got: &Values, metrics: &Metrics) {
    let value = |name: &str| got[name];
    for device in &metrics.devices {
        let of = |kind: &str| value(&format!("{}{{device=\"{}\",kind=\"{kind}\"}}", names::MEMORY, device.device));
        let bytes = [device.planned_peak_bytes, device.allocated_bytes, device.measured_peak_bytes].map(|b| b as f64);
        assert_eq!(["planned", "allocated", "peak"].map(of), bytes);
        let collective = value(&format!("{}{{device=\"{}\"}}", names::COLLECTIVE_BYTES, device.device));
        assert_eq!(collective, device.collective_bytes as f64);
        assert!(collective > 0.0, "gradients are reduced");
    }
}

fn check_status(address: SocketAddr, last: &StepReport, metrics: &Metrics) {
    let status = client::status(address).expect("a session");
    assert_eq!((status.steps, status.gradient_norm), (STEPS, last.grad_norm));
    assert_eq!(status.loss, last.loss.map(f64::from));
    assert_eq!((&*status.mesh, &*status.device, status.process, status.processes), ("data=2,stage=2", "cpu", 0, 1));
    let memory = |d: &DeviceStatus| (d.device, d.planned_bytes, d.peak_bytes);
    let expected = metrics.devices.iter().map(|d| (d.device, d.planned_peak_bytes, d.measured_peak_bytes));
    assert_eq!(status.devices.iter().map(memory).collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    assert_eq!(status.actors.len(), metrics.actors.len());
    assert!(status.actors.iter().all(|actor| (0.0..=1.0).contains(&actor.busy)), "{status}");
    assert!(status.actors.iter().any(|actor| actor.busy > 0.0 && actor.now.contains("waits for")), "{status}");
    let header = "  busy      now for  what each actor does or waits for\n";
    assert!(status.to_string().contains(header), "{status}");
    assert!(!status.waits.is_empty() && status.to_string().lines().count() > 8, "{status}");
}

/// A second session adds its counts to those of the first session. The failed step of the second session is recorded.
fn check_diverging_session(watch: &Watch, model: &Model, edge: f64, collectives: f64) {
    let mut session = model.session("data=2,stage=2", &options(2, OneFOneB));
    watch.show(&session);
    session.step(&model.batch(0), 1e30).expect("the weights are still finite");
    assert!(matches!(session.step(&model.batch(1), LEARNING_RATE), Err(SessionError::NonFinite(_))));
    let got = values(&get(watch.address(), "/metrics").1);
    assert_eq!((got[names::STEPS], got[names::STEPS_NON_FINITE]), (STEPS as f64 + 2.0, 1.0));
    assert_eq!(got[names::STEP], 1.0, "the last step changed nothing");
    // The last step ran a second time to find the first non-finite tensor.
    let edge_now = sum(&got, names::EDGE_BYTES, EDGE);
    assert_eq!(edge_now, edge + edge / STEPS as f64 * 3.0);
    assert_eq!(sum(&got, names::COLLECTIVE_BYTES, ""), collectives + session_collectives(&session));
    assert_eq!(sum(&got, names::RESTARTS, ""), 3.0, "restarts belong to the process, not to the session");
    let status = client::status(watch.address()).expect("a session");
    let norm = status.gradient_norm.expect("a norm");
    assert!(!norm.is_finite() && status.to_string().contains(&format!("gradient norm {norm}")), "{status}");
    let observer = session.observer().expect("a running session");
    assert_eq!(observer.marks(), [(0, 0), (2, 1)], "the second step ran again");
    let incidents = observer.incidents();
    assert!(matches!(&incidents[..], [only] if only.kind == "not finite"), "{incidents:?}");
    session.shutdown().expect("a clean shutdown");
}

/// The training ratio covers all attempts of a job. The steps up to the restored checkpoint count as training time.
/// Steps after the checkpoint are lost and do not count.
fn check_attempts_of_a_job(watch: &Watch, model: &Model) {
    const EARLIER_MS: u64 = 1_000_000;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_millis() as u64;
    let scratch = Scratch::new("watch-job");
    let store = Store::open(scratch.path().to_str().expect("text")).expect("a store");
    let attempt = |began_ms: u64| {
        let mut cluster = shardflow::cluster::Cluster::local();
        cluster.job_began_ms = Some(began_ms);
        let plan = model.plan("data=2,stage=2", &options(2, OneFOneB));
        let session = Session::start(plan, &SessionOptions { cluster, ..SessionOptions::default() });
        session.expect("a session")
    };
    let job = |session: &Session| session.snapshot(None).expect("a snapshot").manifest.job;
    let ratio = || values(&get(watch.address(), "/metrics").1)[names::TRAINING_RATIO];

    let mut first = attempt(now - EARLIER_MS);
    watch.show(&first);
    while job(&first).productive_ms < 2 {
        model.step(&mut first);
    }
    let saved = job(&first);
    assert_eq!(saved.began_ms, now - EARLIER_MS);
    let expected = |productive_ms: u64| {
        let most = (productive_ms + 1) as f64 / EARLIER_MS as f64;
        most / 2.0 * (productive_ms as f64 / (productive_ms + 1) as f64)..=most
    };
    let before = ratio();
    assert!(expected(saved.productive_ms).contains(&before), "the ratio is {before} for {saved:?}");
    assert!(ratio() < before, "the ratio must fall while no step ends");
    let snapshot = first.snapshot(None).expect("a snapshot");
    save_now(&store, &snapshot, &SingleProcess, &SaverOptions::default(), 0)
        .expect("options")
        .result
        .expect("a checkpoint");
    while job(&first).productive_ms < saved.productive_ms + 2 {
        model.step(&mut first);
    }
    first.restore_newest(&store).expect("the checkpoint");
    assert_eq!(job(&first), saved, "steps after the checkpoint are lost");
    first.shutdown().expect("a clean shutdown");

    let mut second = attempt(now - EARLIER_MS);
    watch.show(&second);
    assert_eq!(job(&second).productive_ms, 0, "the second attempt starts without progress");
    second.restore_newest(&store).expect("the checkpoint");
    assert_eq!(job(&second), saved);
    assert!(expected(saved.productive_ms).contains(&ratio()), "the ratio is {} for {saved:?}", ratio());
    second.shutdown().expect("a clean shutdown");

    let mut other = attempt(now);
    other.restore_newest(&store).expect("the checkpoint");
    assert_eq!(job(&other).productive_ms, 0, "the checkpoint belongs to another job");
    other.shutdown().expect("a clean shutdown");
}

fn session_collectives(session: &Session) -> f64 {
    session.metrics().devices.iter().map(|device| device.collective_bytes as f64).sum()
}

/// Checks that exactly the documented metrics are exported, except for those that need other processes.
fn assert_complete(text: &str) {
    let documented = include_str!("../../runtime/src/metrics.rs").lines();
    let documented = documented.filter_map(|line| line.split_once(" = \"shardflow_")?.1.split('"').next());
    let mut documented: BTreeSet<&str> = documented.collect();
    assert!(documented.len() > 15, "{documented:?}");
    documented.insert("collective_seconds");
    assert!(documented.remove("refused_total"));
    let exported = text.lines().filter_map(|line| line.strip_prefix("# TYPE shardflow_")?.split(' ').next());
    assert_eq!(exported.collect::<BTreeSet<&str>>(), documented);
    for name in documented {
        assert!(text.contains(&format!("# HELP shardflow_{name} ")), "{name} has no help");
    }
}

/// Runs Prometheus' own check if its tool is installed.
fn promtool(text: &str) {
    let child =
        Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let Ok(mut child) = child else {
        println!("SKIPPED: no promtool");
        return;
    };
    child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("promtool reads");
    let output = child.wait_with_output().expect("promtool");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
