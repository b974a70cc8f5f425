//! Events for the page: each change is sent once, events have a bounded size, and blocked edges are reported.

use std::sync::Arc;

use shardflow_actors::pipeline::{Pipeline, PipelineSchedule};
use shardflow_actors::protocol::{ActionWaits, ActorWaits, Holder};
use shardflow_actors::spec::ActionRef;
use shardflow_actors::trace::Idle;
use shardflow_kernels::tensor::{DType, HostTensor};

use super::*;
use crate::graph::{AdamW, Graph};
use crate::nn::{self, Parallel};
use crate::passes::{CompileOptions, compile};
use crate::placement::Mesh;
use crate::session::{Session, SessionOptions};

/// A minimal model on two devices.
fn session() -> Session {
    let mut g = Graph::new(&Mesh::parse("data=2").expect("a mesh"));
    let layout = nn::batch_layout(&g);
    let ids = g.input("ids", &[4, 3], DType::I32, layout.clone());
    let x = nn::embedding(&mut g, "table", ids, 5, 4, Parallel::Replicated);
    let logits = nn::linear(&mut g, "last", x, 5, Parallel::Replicated);
    let targets = g.input("targets", &[4, 3], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW { max_norm: 1.0, ..AdamW::default() });
    let options = CompileOptions { threads_per_device: 1, ..CompileOptions::default() };
    let options_of = SessionOptions { steps_planned: Some(9), ..SessionOptions::default() };
    Session::start(compile(g, &options).expect("a plan"), &options_of).expect("a session")
}

fn step(session: &mut Session) -> f32 {
    let tokens = || HostTensor::i32(&[4, 3], (0..12).map(|i| i % 5).collect());
    let report = session.step(&[("ids", tokens()), ("targets", tokens())], 0.01).expect("a step");
    // The loss may be known before all actors have received the end of their firings.
    let observer = session.observer().expect("it runs");
    while observer.control().snapshot().iter().any(|actor| actor.waiting.in_flight.is_some()) {
        std::thread::yield_now();
    }
    report.loss.expect("a loss")
}

#[test]
fn inf_and_nan_are_sent_as_text() {
    let point = Point(3, Some(f64::NAN), Some(f64::INFINITY), 0.5, 2.0);
    assert_eq!(serde_json::to_string(&point).expect("JSON"), r#"[3,"NaN","inf",0.5,2.0]"#);
}

#[test]
fn a_client_receives_each_change_once() {
    let mut session = session();
    let observer = Arc::clone(session.observer().expect("it runs"));
    let spec = &observer.plan().spec;
    let per_step: u32 = spec.actors.values().flat_map(|a| &a.actions).map(|a| a.per_step).sum();
    let losses: Vec<f32> = (0..3).map(|_| step(&mut session)).collect();
    let mut client = Cursor::default();
    let first = client.next_event(&observer);
    assert_eq!((first.health, first.steps, first.steps_planned, first.tokens), ("running", 3, Some(9), 3 * 12));
    assert_eq!(first.session, observer.started.to_string());
    let received: Vec<_> = first.points.iter().map(|point| (point.0, point.1.expect("a loss") as f32)).collect();
    assert_eq!(received, [(1, losses[0]), (2, losses[1]), (3, losses[2])]);
    assert!(first.points.iter().all(|point| point.2.is_some() && point.3 == 0.01 && point.4 > 0.0));
    assert_eq!(first.firings.len(), 3 * per_step as usize * FIRING_FIELDS);
    assert_eq!((first.registers.len(), first.busy.len()), (spec.registers.len(), spec.actors.len()));
    assert!(first.bubble.is_some_and(|share| (0.0..1.0).contains(&share)), "{:?}", first.bubble);
    assert!(first.incidents.is_empty() && first.blocked.is_empty() && first.peers.is_empty());
    let second = client.next_event(&observer);
    assert!(
        second.points.is_empty() && second.firings.is_empty() && second.busy.is_empty() && second.registers.is_empty()
    );
    assert_eq!((second.steps, second.tokens, second.bubble), (3, 36, first.bubble), "current values are sent again");
    let loss = step(&mut session);
    let third = client.next_event(&observer);
    assert_eq!(third.points.iter().map(|point| (point.0, point.1)).collect::<Vec<_>>(), [(4, Some(f64::from(loss)))]);
    assert_eq!(third.firings.len(), per_step as usize * FIRING_FIELDS);
    assert_eq!(third.firings_left_out, 0);
    // A client that connects later receives the recent history.
    let other = Cursor::default().next_event(&observer);
    assert_eq!((other.points.len(), other.firings.len()), (4, 4 * per_step as usize * FIRING_FIELDS));
    session.shutdown().expect("a clean shutdown");
    assert_eq!(client.next_event(&observer).health, "ended");
    assert_eq!(Cursor::no_session().health, "none");
}

#[test]
fn incidents_are_sent_in_order_and_truncated() {
    let session = session();
    let observer = session.observer().expect("it runs");
    observer.note("stall", "é".repeat(TEXT_MAX));
    observer.note("stall", "é".repeat(TEXT_MAX));
    observer.note("refused", "twice".into());
    observer.note("stall", "another".into());
    observer.note("refused", "twice".into());
    let event = Cursor::default().next_event(observer);
    let received: Vec<_> = event.incidents.iter().map(|(_, kind, text)| (*kind, text.as_str())).collect();
    assert_eq!(received, [("stall", "é".repeat(TEXT_MAX / 2).as_str()), ("refused", "twice"), ("stall", "another")]);
    assert!(event.incidents.is_sorted_by_key(|incident| incident.0));
}

fn pipeline() -> Spec {
    let schedule = PipelineSchedule::OneForwardOneBackward;
    Pipeline { micro_batches: 4, credits: vec![2, 1], schedule, ordered: false }.build()
}

fn fired(firing: u64, ended_ns: u64) -> FiringRecord {
    let (idle_ns, launched_ns, early_ns) = (0, 0, ended_ns);
    FiringRecord { action: 0, firing, idle_ns, launched_ns, early_ns, ended_ns, cause: Cause::Host }
}

#[test]
fn too_many_firings_are_limited_to_one_ended_step() {
    let spec = pipeline();
    let few: Vec<_> = (0..FIRINGS_MAX as u64).map(|firing| (ActorId(0), fired(firing, firing))).collect();
    let mut kept = few.clone();
    limit_firings(&spec, &mut kept);
    assert_eq!(kept, few);
    // Four micro-batches per step; the last step has only two so far.
    kept = (0..FIRINGS_MAX as u64 + 2).map(|firing| (ActorId(1), fired(firing, firing))).collect();
    limit_firings(&spec, &mut kept);
    let last = FIRINGS_MAX as u64;
    assert_eq!(
        kept.iter().map(|(_, record)| record.firing).collect::<Vec<_>>(),
        [last - 1, last - 2, last - 3, last - 4]
    );
    // A larger step loses its oldest firings.
    let mut long = pipeline();
    long.actors[ActorId(0)].actions[0].per_step = 20_000;
    kept = (0..20_000).map(|firing| (ActorId(0), fired(firing, firing))).collect();
    limit_firings(&long, &mut kept);
    assert_eq!((kept.len(), kept[0].1.firing), (FIRINGS_MAX, 19_999));
}

/// An actor of the pipeline that waits after these numbers of firings.
fn waits(actor: u32, firings: [u64; 2], idle_now_ns: u64, missing: Vec<(u32, Missing)>) -> ActorSnapshot {
    let actor = ActorId(actor);
    let actions = missing.into_iter().map(|(action, missing)| ActionWaits { action, missing: vec![missing] }).collect();
    ActorSnapshot {
        actor,
        firings: firings.to_vec(),
        busy_ns: vec![0, 0],
        collective_ns: 0,
        waiting: ActorWaits { actor, in_flight: None, actions },
        idle: Idle::default(),
        idle_now_ns,
        in_flight_since_ns: None,
        registers: Vec::new(),
    }
}

#[test]
fn an_edge_is_blocked_only_if_the_running_step_needs_it() {
    let spec = pipeline();
    let register = |name: &str| spec.registers.values().position(|r| r.name.contains(name)).expect("a register") as u32;
    let (activation, stash) = (register("stage0"), register("stash"));
    let reader = |actor, action| ActionRef { actor: ActorId(actor), action };
    let piece = |piece| Missing::Piece { register: RegisterId(activation), piece, writer: reader(0, 0) };
    let holders = vec![Holder { reader: reader(0, 1), slots: 2 }];
    let credit = Missing::Credit { register: RegisterId(stash), slots: 2, piece: 0, holders };
    let blocked_by = |snapshots: &[ActorSnapshot]| {
        let mut event = Event::default();
        add_blocked_edges(&mut event, &spec, snapshots, &snapshots.iter().collect::<Vec<_>>());
        (event.blocked, event.waits.into_iter().map(|wait| wait.0).collect::<Vec<_>>())
    };
    // In the second step, the first stage waits for a slot, and the second one waits longer for a piece.
    let (first, second) =
        (waits(0, [6, 4], 2_000_000, vec![(0, credit)]), waits(1, [5, 5], 3_000_000, vec![(0, piece(5))]));
    let expected = vec![[u64::from(activation), 1, 0, 3000], [u64::from(stash), 0, 1, 2000]];
    assert_eq!(blocked_by(&[first.clone(), second]), (expected, vec![0, 1]));
    // The second stage has finished its part of the running step, and waits for the next one.
    let done = waits(1, [8, 8], 3_000_000, vec![(0, piece(8))]);
    assert_eq!(blocked_by(&[first, done]), (vec![[u64::from(stash), 0, 1, 2000]], vec![0]));
    // A wait for the host blocks no edge.
    let idle = waits(0, [6, 8], 2_000_000, vec![(0, Missing::Token)]);
    assert_eq!(blocked_by(&[idle]), (vec![], vec![]));
}
