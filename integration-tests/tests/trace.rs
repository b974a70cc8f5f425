//! A trace shows every firing, and every piece from its write to its reads.

use std::collections::BTreeMap;

use shardflow::plan::Schedule::OneFOneB;
use shardflow::session::metrics::Metrics;
use shardflow::trace::TraceFile;
use shardflow::trace::join::{JoinError, JoinedTrace};
use shardflow::trace::summary::{SummaryError, TraceSummary};
use shardflow_integration_tests::training::{Model, Scratch, options};

#[test]
fn a_trace_shows_every_firing_and_every_piece() {
    let model = Model::default();
    let mut session = model.session("data=2,stage=2", &options(4, OneFOneB));
    let scratch = Scratch::new("trace");
    let path = scratch.path().join("trace.json");
    let mut file = TraceFile::create(&path, u64::MAX).expect("a file");
    for _ in 0..3 {
        model.step(&mut session);
        file.add(&session).expect("room");
    }
    let metrics = session.metrics();
    assert_eq!(file.finish().expect("room"), 0, "events were dropped");
    let text = std::fs::read_to_string(&path).expect("a trace");
    let events: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
    let number =
        |event: &serde_json::Value, key: &str| event[key].as_f64().unwrap_or_else(|| panic!("no {key} in {event}"));
    let of = |phase: &'static str| events.iter().filter(move |event| event["ph"] == phase);
    let tracks: BTreeMap<u64, &str> = of("M")
        .filter(|e| e["name"] == "thread_name")
        .map(|e| (e["tid"].as_u64().expect("an id"), e["args"]["name"].as_str().expect("a name")))
        .collect();
    assert_eq!(tracks.len(), metrics.actors.len());
    for (tid, name) in &tracks {
        let actor = metrics.actors.iter().find(|actor| actor.name == *name).expect("an actor");
        let mut slices: Vec<_> = of("X").filter(|e| e["tid"].as_u64() == Some(*tid)).collect();
        assert_eq!(slices.len() as u64, actor.actions.iter().map(|a| a.1).sum::<u64>(), "{name}");
        slices.sort_by(|a, b| number(a, "ts").total_cmp(&number(b, "ts")));
        let overlap = slices.windows(2).find(|w| number(w[0], "ts") + number(w[0], "dur") > number(w[1], "ts") + 1e-3);
        assert_eq!(overlap, None, "{name}: firings of an actor overlap");
    }
    let starts: BTreeMap<&str, f64> = of("s").map(|e| (e["id"].as_str().expect("an id"), number(e, "ts"))).collect();
    assert_eq!(starts.len(), of("s").count(), "flow ids of pieces must be unique");
    let mut ends = 0;
    for end in of("f") {
        let start =
            starts.get(end["id"].as_str().expect("an id")).unwrap_or_else(|| panic!("a read without a write: {end}"));
        assert!(*start <= number(end, "ts"), "read before it was written: {end}");
        ends += 1;
    }
    assert!(ends > 3 * 4 * 4, "{ends}");
    assert!(starts.len() - ends <= metrics.registers.len(), "pieces of earlier steps remain unread");
    check_summary(&text, &metrics);
    check_truncated_trace(&text);
}

/// A killed process leaves a truncated file. The file still shows the earlier events.
fn check_truncated_trace(text: &str) {
    let count = |text: &str| {
        let joined = [text.to_owned()];
        let mut out = Vec::new();
        JoinedTrace::of(&joined).expect("a valid trace").write(&joined, &mut out).expect("room");
        serde_json::from_slice::<Vec<serde_json::Value>>(&out).expect("JSON").len()
    };
    let all = count(text);
    for cut in text.len() - 900..text.len() {
        let left = count(&text[..cut]);
        assert!(left <= all && left + 10 >= all, "{left} of {all} events are left in the first {cut} bytes");
    }
    // Damage in the middle of a file is not a truncation, so it is an error.
    let torn = text.replacen(",\n", ",\n{", 1);
    assert!(matches!(JoinedTrace::of(&[torn]), Err(JoinError::Format { file: 1, .. })));
}

/// Checks that the summary is consistent and matches the session.
fn check_summary(text: &str, metrics: &Metrics) {
    let of = |text: &str| TraceSummary::of(JoinedTrace::of(&[text.to_owned()]).expect("a valid trace"));
    let summary = of(text).expect("a trace");
    assert_eq!(summary.steps, 2, "the first step is excluded");
    assert_eq!(summary.actors.len(), metrics.actors.len());
    for actor in &summary.actors {
        let parts = [actor.host, actor.credit, actor.link, actor.bubble, actor.imbalance, actor.other, actor.busy];
        let all: f64 = parts.iter().sum();
        assert!(parts.iter().all(|part| (0.0..=1.0).contains(part)) && (all - 1.0).abs() < 1e-6, "{actor:?}: {all}");
    }
    let computes = summary.actors.iter().filter(|actor| actor.name.ends_with("compute"));
    assert!(computes.clone().all(|actor| actor.busy > 0.05), "{summary}");
    // The simulator uses the mean time of each firing. It does not model waits for cores, messages or the host. If the
    // firings keep their order, the simulated step is therefore no longer than the mean step.
    let predicted = summary.predicted_seconds.expect("a trace of all actors");
    assert!(predicted > summary.step_seconds * 0.1 && predicted < summary.step_seconds * 1.5, "{summary}");
    assert!(
        summary.edges.iter().any(|(cause, register, _)| cause == "input" && register.contains("pull")),
        "{summary}"
    );
    let path: f64 = summary.path.iter().map(|(_, seconds)| seconds).sum();
    assert!(path > summary.step_seconds * 0.3 && path < summary.step_seconds * 2.0, "a path of {path} s: {summary}");
    assert!(summary.path.iter().any(|(action, _)| action.ends_with("compute backward")), "{summary}");
    assert!(matches!(of("[]"), Err(SummaryError)));
    assert!(matches!(JoinedTrace::of(&["[]".into(), "{}".into()]), Err(JoinError::Format { file: 2, .. })));
}
