//! Tests the simulator against known schedules, and the protocol under random timing and injected faults.

use super::mutants::Mutation;
use super::*;
use crate::builder::Builder;
use crate::credits;
use crate::hang::{Root, tests::pieces};
use crate::pipeline::{Pipeline, PipelineSchedule};
use crate::protocol::{Sequence, SlotFault};
use crate::spec::{ActorSpec, Firing};

/// A fault to inject. `Lose`, `Repeat`, `NextPiece` and `NextSlot` change the n-th message. `Hang` prevents the end of
/// the n-th firing of an action.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    Lose(u64),
    Repeat(u64),
    NextPiece(u64),
    NextSlot(u64),
    /// Loses the `Filled` messages of a register to one reader (by index), from this piece on.
    LosePieces(RegisterId, u32, u64),
    /// Loses the `Released` messages of one reader to the producer, from this piece on.
    LoseReleases(RegisterId, u32, u64),
    Hang(ActionRef, u64),
    /// A broken rule for slots.
    Slots(SlotFault),
    /// One actor runs a plan with a changed register.
    Plan(ActorId, RegisterId, Mutation),
    /// Limits the tokens of each action to this number.
    TokensMax(u32),
}

pub(super) fn tokens(count: u32, fault: Option<Fault>) -> u32 {
    if let Some(Fault::TokensMax(max)) = fault { count.min(max) } else { count }
}

pub(super) fn protocol(spec: &Arc<Spec>, actor: ActorId, fault: Option<Fault>) -> Protocol {
    if let Some(Fault::Plan(of, register, mutation)) = fault
        && of == actor
    {
        let changed = mutants::mutated(spec, register, mutation).expect("the mutation applies to the register");
        return Protocol::new(&Arc::new(changed), actor);
    }
    let mut protocol = Protocol::new(spec, actor);
    if let Some(Fault::Slots(fault)) = fault {
        protocol.break_slots(fault);
    }
    protocol
}

pub(crate) fn exact(spec: &Arc<Spec>, ticks: u64, hop_ticks: u64, steps: u32) -> Result<SimulatedRun, SimulationError> {
    simulate(spec, &Timing::uniform(spec, ticks, hop_ticks), &SimulationOptions::steps(steps))
}

impl Fault {
    pub(crate) fn apply(self, spec: &Spec, nth: u64, message: Message) -> Vec<Message> {
        let at = |of: RegisterId, to: u32| spec.register(of).readers[to as usize];
        let is_lost = match (self, message) {
            (Self::LosePieces(of, to, from), Message::Filled { register, reader, piece, .. }) => {
                (register, reader) == (of, to) && follows(Sequence::of_arrivals(spec, of, at(of, to)), from, piece)
            }
            (Self::LoseReleases(of, to, from), Message::Released { register, reader, piece, .. }) => {
                (register, reader) == (of, to) && follows(Sequence::of_releases(spec, of, at(of, to)), from, piece)
            }
            _ => false,
        };
        match self {
            _ if is_lost => vec![],
            Fault::Lose(n) if n == nth => vec![],
            Fault::Repeat(n) if n == nth => vec![message, message],
            Fault::NextPiece(n) if n == nth => vec![next_piece(message)],
            Fault::NextSlot(n) if n == nth => vec![next_slot(message)],
            _ => vec![message],
        }
    }
}

/// True if `piece` is `from` or comes after `from` in `sequence`. The sequence must contain at least one of the two.
pub(crate) fn follows(mut sequence: Sequence, from: u64, piece: u64) -> bool {
    while ![from, piece].contains(&sequence.piece()) {
        sequence.advance();
    }
    sequence.piece() == from
}

fn next_piece(mut message: Message) -> Message {
    let (Message::Filled { piece, .. } | Message::Released { piece, .. }) = &mut message;
    *piece += 1;
    message
}

fn next_slot(mut message: Message) -> Message {
    let (Message::Filled { slot, .. } | Message::Released { slot, .. }) = &mut message;
    *slot += 1;
    message
}

fn pipeline(micro_batches: u32, credits: Vec<u32>, schedule: PipelineSchedule, ordered: bool) -> Arc<Spec> {
    Arc::new(Pipeline { micro_batches, credits, schedule, ordered }.build())
}

fn timing(stages: usize, forward_ticks: u64, backward_ticks: u64, hop_ticks: u64) -> Timing {
    Timing { action_ticks: vec![vec![forward_ticks, backward_ticks]; stages], hop_ticks }
}

/// A one-forward-one-backward pipeline whose actors fire by credit, without ordered lists.
fn alternating(micro_batches: u32, credits: Vec<u32>) -> Arc<Spec> {
    pipeline(micro_batches, credits, PipelineSchedule::OneForwardOneBackward, false)
}

fn makespan(spec: &Arc<Spec>, times: &Timing) -> u64 {
    simulate(spec, times, &SimulationOptions::steps(1)).unwrap().makespan
}

fn stash_peaks(spec: &Spec, run: &SimulatedRun) -> Vec<u32> {
    let registers = spec.registers.values().zip(&run.slots_peak);
    registers.filter(|(r, _)| r.name.ends_with("stash")).map(|(_, &peak)| peak).collect()
}

#[test]
fn gpipe_and_1f1b_have_the_optimal_makespan() {
    let (p, m) = (4, 8);
    for ordered in [false, true] {
        let few = (0..p as u32).map(|s| p as u32 - s).collect();
        for (schedule, credits) in
            [(PipelineSchedule::Gpipe, vec![m; p]), (PipelineSchedule::OneForwardOneBackward, few)]
        {
            let spec = pipeline(m, credits.clone(), schedule, ordered);
            let run = simulate(&spec, &timing(p, 1, 2, 0), &SimulationOptions::steps(1)).unwrap();
            assert_eq!((run.makespan, stash_peaks(&spec, &run)), (33, credits), "{schedule:?}, ordered: {ordered}");
        }
    }
}

#[test]
fn latency_needs_more_credits_than_stages_left() {
    let (p, m) = (8, 32);
    let half_ticks = timing(p, 2, 4, 1);
    let few = (0..p as u32).map(|s| p as u32 - s).collect();
    let enough: Vec<u32> = (0..p as u32).map(|s| 2 * (p as u32 - s) - 1).collect();
    let computed: Vec<u32> = (0..p as u32).map(|s| credits::pipeline(p as u32, s, m, 2, 4, 1)).collect();
    assert_eq!(enough, computed);
    assert_eq!(makespan(&alternating(m, few), &half_ticks), 2 * 151);
    assert_eq!(makespan(&alternating(m, enough), &half_ticks), 2 * 124);
}

#[test]
fn fewer_credits_never_shorten_the_makespan() {
    let (p, m) = (6u32, 24);
    for (f, b, c) in [(2, 4, 1), (1, 1, 3), (3, 2, 0), (2, 5, 7)] {
        let times = timing(p as usize, f, b, c);
        let full: Vec<u32> = (0..p).map(|s| credits::pipeline(p, s, m, f, b, c)).collect();
        let mut last = 0;
        for fewer in 0..full[0] {
            let credits = full.iter().map(|w| w.saturating_sub(fewer).max(1)).collect();
            let span = makespan(&alternating(m, credits), &times);
            let durations = format!("forward {f}, backward {b}, hop {c}");
            assert!(span >= last, "{durations}: {fewer} fewer credits take {span}, {} fewer take {last}", fewer - 1);
            last = span;
        }
        assert!(last > makespan(&alternating(m, full), &times));
    }
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { failure_persistence: None, ..Default::default() })]

    #[test]
    fn computed_credits_are_enough(p in 1u32..9, m in 1u32..40, f in 1u64..9, b in 1u64..12, c in 0u64..20) {
        let times = timing(p as usize, f, b, c);
        let computed: Vec<u32> = (0..p).map(|s| credits::pipeline(p, s, m, f, b, c)).collect();
        let unlimited = alternating(m, vec![m; p as usize]);
        let limited = alternating(m, computed.clone());
        let (limited, unlimited) = (makespan(&limited, &times), makespan(&unlimited, &times));
        let text = format!("{computed:?} credits take {limited} ticks, unlimited credits take {unlimited}");
        proptest::prop_assert!(limited <= unlimited, "{}", text);
    }
}

pub(super) fn shuffled(seed: u64, steps: u32) -> SimulationOptions {
    // Some runs delay firings more than messages, others delay messages more, so that either can overtake the other.
    let (action_ticks_max, hop_ticks_max) = [(5, 5), (1, 20), (20, 1), (0, 3)][seed as usize % 4];
    SimulationOptions {
        jitter: Some(Jitter { seed, action_ticks_max, hop_ticks_max }),
        ..SimulationOptions::steps(steps)
    }
}

#[test]
fn all_interleavings_end_with_the_same_digest_and_keep_the_invariants() {
    let mut runs = 0;
    for (name, spec, steps) in plans::all() {
        let times = Timing::uniform(&spec, 2, 1);
        let exact = exact(&spec, 2, 1, steps).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut timelines = std::collections::HashSet::new();
        for seed in 0..1200 {
            let run = simulate(&spec, &times, &shuffled(seed, steps)).unwrap_or_else(|e| panic!("{name} {seed}: {e}"));
            assert_eq!(run.digest, exact.digest, "{name}, seed {seed}");
            for (register, &peak) in spec.registers.values().zip(&run.slots_peak) {
                assert!(peak <= register.slots, "{name}, seed {seed}: '{}' held {peak} slots", register.name);
            }
            timelines.insert(run.timeline.iter().map(|f| (f.actor, f.action, f.firing)).collect::<Vec<_>>());
            runs += 1;
        }
        assert!(timelines.len() > 100, "{name}: only {} different orders occurred", timelines.len());
    }
    assert!(runs >= 10_000);
}

#[test]
fn the_digest_depends_on_the_data() {
    // Different tokens produce different data, so the digest must differ.
    let spec = Arc::new(plans::fan());
    let digest = |steps| exact(&spec, 1, 0, steps).unwrap().digest;
    assert_ne!(digest(1), digest(2));
}

#[test]
fn faulty_messages_are_detected() {
    for (name, spec, steps) in plans::all() {
        let times = Timing::uniform(&spec, 2, 1);
        // Each reader in another actor gets one message per published piece and sends back one release per piece.
        let count = 2 * pieces(&spec, steps).len() as u64;
        let mut caught = 0;
        for nth in 0..count {
            for fault in [Fault::Lose(nth), Fault::Repeat(nth), Fault::NextPiece(nth), Fault::NextSlot(nth)] {
                let options = SimulationOptions { fault: Some(fault), ..shuffled(nth, steps) };
                let result = simulate(&spec, &times, &options);
                assert!(result.is_err(), "{name}: {fault:?} was not detected among {count} messages");
                caught += 1;
            }
        }
        assert!(caught > 10, "{name}: only {caught} faults were tried");
    }
}

#[test]
fn one_credit_too_many_is_detected() {
    let mut caught = 0;
    for (name, spec, steps) in plans::all() {
        let times = Timing::uniform(&spec, 2, 7);
        let mut faulty = 0;
        for seed in 0..20 {
            let options = SimulationOptions { fault: Some(Fault::Slots(SlotFault::Surplus)), ..shuffled(seed, steps) };
            faulty += u32::from(simulate(&spec, &times, &options).is_err());
        }
        // If every micro-batch has a slot, or a list limits the forwards, the credits never run out.
        let listed = |a: &ActorSpec| matches!(a.firing, Firing::Ordered(_));
        let never_full = name.starts_with("gpipe") || spec.actors.values().all(listed);
        assert!(faulty > 0 || never_full, "{name}: {faulty} of 20 runs detected the surplus credit");
        caught += faulty;
    }
    assert!(caught >= 80);
}

#[test]
fn too_few_credits_for_a_cycle_are_reported_as_a_deadlock() {
    // The list has two forwards before the first backward, but the stash has one slot.
    let mut spec = Arc::unwrap_or_clone(pipeline(2, vec![2, 1], PipelineSchedule::Gpipe, false));
    spec.actors[ActorId(0)].firing = Firing::Ordered(vec![0, 0, 1, 1]);
    let stash = spec.registers.values_mut().find(|r| r.name == "stage0.stash").unwrap();
    stash.slots = 1;
    let error = exact(&Arc::new(spec), 1, 0, 1).unwrap_err();
    expect_test::expect!["deadlock: these actions wait in a cycle: stage0.compute forward waits for a credit of register 'stage0.stash' (1 of 1 slots held by stage0.compute backward); stage0.compute backward waits for its turn after stage0.compute forward"].assert_eq(&error.to_string());
    let SimulationError::Stuck(stuck) = error else { panic!("{error}") };
    assert_eq!((stuck.root, stuck.chain.len()), (Root::Cycle, 2));
}

#[test]
fn collectives_in_opposite_orders_are_reported_as_a_deadlock() {
    let mut spec = plans::data_parallel();
    // Device 1 reduces the buckets in the opposite order, as two groups.
    for actor in spec.actors.values_mut().filter(|a| a.name.ends_with("reduce")) {
        for (bucket, action) in actor.actions.iter_mut().enumerate() {
            action.groups = vec![bucket as u32];
        }
    }
    spec.actors[ActorId(3)].firing = Firing::Ordered(vec![1, 0]);
    let error = exact(&Arc::new(spec), 1, 0, 1).unwrap_err();
    expect_test::expect!["deadlock: these actions wait in a cycle: device0.reduce all-reduce0 waits for device1.reduce to join group 0; device1.reduce all-reduce0 waits for device1.reduce all-reduce1, which is in flight; device1.reduce all-reduce1 waits for device0.reduce to join group 1; device0.reduce all-reduce1 waits for device0.reduce all-reduce0, which is in flight"].assert_eq(&error.to_string());
}

#[test]
fn missing_tokens_are_reported_as_starvation() {
    let spec = Arc::new(plans::accumulation());
    let options = SimulationOptions { fault: Some(Fault::TokensMax(3)), ..SimulationOptions::steps(1) };
    let error = simulate(&spec, &Timing::uniform(&spec, 1, 0), &options).unwrap_err();
    expect_test::expect!["starved: host feed waits for a token from the host"].assert_eq(&error.to_string());
}

#[test]
fn the_host_decides_after_the_observed_actions_have_fired() {
    let mut b = Builder::new();
    let [host, shard] = ["host", "shard"].map(|name| b.actor(name, 0, Firing::Credit));
    let (feed, log) = (b.external(host, "feed", 2), b.action(host, "log", 2));
    let (train, update) = (b.action(shard, "train", 2), b.external(shard, "update", 1));
    b.edge("batch", 4, feed, train);
    b.edge("loss", 4, train, log);
    let mut spec = b.build();
    let starts = |spec: &Spec| {
        let run = exact(&Arc::new(spec.clone()), 5, 1, 2).unwrap();
        let of = |at: ActionRef| run.timeline.iter().filter(move |f| (f.actor, f.action) == (at.actor, at.action));
        let (updates, logs): (Vec<_>, Vec<_>) =
            (of(update).map(|f| f.start).collect(), of(log).map(|f| f.end).collect());
        (updates, [logs[1], logs[3]])
    };
    assert_eq!(starts(&spec).0[0], 0, "it does not wait for the decision");
    spec.decision = Decision { observed: vec![log], granted: vec![update] };
    let (updates, logged) = starts(&spec);
    // The actor may be busy when the token arrives.
    assert!(updates[0] >= logged[0] && updates[1] >= logged[1], "{updates:?} {logged:?}");
    assert!(updates[0] < logged[0] + 5, "{updates:?} {logged:?}");
    // The host cannot decide from an action that depends on the decision.
    spec.decision.observed.push(update);
    let error = exact(&Arc::new(spec), 5, 1, 1).unwrap_err();
    assert_eq!(error.to_string(), "starved: shard update waits for a token from the host");
}

#[test]
fn early_publication_shortens_the_makespan() {
    let mut late = plans::data_parallel();
    let early = Arc::new(late.clone());
    for action in late.actors.values_mut().flat_map(|a| &mut a.actions) {
        action.outputs.iter_mut().for_each(|o| o.early = false);
    }
    let late = Arc::new(late);
    let times = Timing::uniform(&early, 6, 0);
    assert!(makespan(&early, &times) < makespan(&late, &times));
}

#[test]
fn a_collective_ends_after_its_last_member_has_started() {
    let spec = Arc::new(plans::groups());
    let mut times = Timing::uniform(&spec, 4, 0);
    // Stage 0's second shard is slow, so its partner waits in every collective.
    times.action_ticks[1] = vec![4, 9];
    let run = simulate(&spec, &times, &SimulationOptions::steps(1)).unwrap();
    let of = |actor| run.timeline.iter().filter(move |f| f.actor == ActorId(actor));
    for (a, b) in of(0).zip(of(1)) {
        assert_eq!((a.action, a.firing), (b.action, b.firing));
        assert!(a.end >= b.start + times.action_ticks[0][a.action as usize]);
        assert!(b.end >= a.start + times.action_ticks[1][b.action as usize]);
    }
}

#[test]
fn waits_for_a_group_are_not_counted_twice() {
    let spec = Arc::new(plans::groups());
    let truth = Timing::uniform(&spec, 4, 0);
    let mut measured = truth.action_ticks.clone();
    // The second shard joined the forwards late, so the first shard's forwards took longer.
    (measured[0][0], measured[0][1], measured[1][1]) = (9, 6, 6);
    let times = Timing::measured(&spec, measured);
    // Forward and backward keep different durations, although both belong to the group.
    assert_eq!(times.action_ticks[..2], [vec![4, 6], vec![4, 6]]);
    assert_eq!(times.action_ticks[2..], truth.action_ticks[2..]);
}

#[test]
fn steps_overlap_as_far_as_credits_allow() {
    // The parameters have one slot, so the first training of step 2 starts after the update of step 1.
    let spec = Arc::new(plans::accumulation());
    let run = exact(&spec, 3, 1, 3).unwrap();
    let end = |actor, action, firing| {
        let mut fired = run.timeline.iter().filter(|f| (f.actor.0, f.action, f.firing) == (actor, action, firing));
        fired.next().copied().unwrap()
    };
    for step in 1..3 {
        assert!(end(1, 0, 4 * step).start >= end(1, 1, step - 1).end);
        // The host feeds the next step early, into the batch register's second slot.
        assert!(end(0, 0, 4 * step).start < end(1, 1, step - 1).end);
    }
}
