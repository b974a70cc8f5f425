//! Whatever is done to whatever plan, the simulator's end is explained by just that.

use std::sync::Arc;

use super::*;
use crate::simulate::tests::Fault;
use crate::simulate::{SimulationError, SimulationOptions, Timing, plans, simulate};

/// Runs a plan with a fault: what it hangs for, unless it comes to its end.
fn hang(spec: &Arc<Spec>, steps: u32, fault: Fault) -> Option<Hang> {
    let options = SimulationOptions { fault: Some(fault), ..SimulationOptions::steps(steps) };
    match simulate(spec, &Timing::uniform(spec, 2, 1), &options) {
        Err(SimulationError::Stuck(hang)) => Some(*hang),
        // At the end, messages are missed that nobody waited for.
        Err(SimulationError::Conservation { .. }) | Ok(_) => None,
        Err(other) => panic!("{fault:?}: {other}"),
    }
}

/// Pieces of a register in so many steps, each with its reader that is another actor.
pub(crate) fn pieces(spec: &Spec, steps: u32) -> Vec<(RegisterId, u32, RegisterReader, u64)> {
    let mut found = Vec::new();
    for (register, r) in spec.registers.iter().zip(0..) {
        let id = RegisterId(r);
        let (action, port) = spec.writer(id).expect("every register has a writer");
        let action = &spec.actors[register.producer.0 as usize].actions[action as usize];
        let count = action.per_step / action.outputs[port as usize].firings_per_piece * steps;
        let first = u64::from(register.initial);
        for (&reader, index) in register.readers.iter().zip(0..).filter(|(r, _)| r.actor != register.producer) {
            found.extend((first..first + u64::from(count)).map(|piece| (id, index, reader, piece)));
        }
    }
    found
}

#[test]
fn a_message_that_is_lost_is_the_cause() {
    for (name, spec, steps) in plans::all() {
        let (mut unheard, mut unreturned) = (0, 0);
        for (register, index, reader, piece) in pieces(&spec, steps) {
            if let Some(hang) = hang(&spec, steps, Fault::Unheard(register, index, piece)) {
                assert_eq!(hang.root, Root::Unheard { register, piece, reader }, "{name}: {hang}");
                unheard += 1;
            }
            if let Some(hang) = hang(&spec, steps, Fault::Unreturned(register, index, piece)) {
                assert_eq!(hang.root, Root::Unreturned { register, piece, reader }, "{name}: {hang}");
                unreturned += 1;
            }
        }
        assert!(unheard > 0, "{name}: nothing hung for want of a piece");
        // Accumulation's only register between actors has as many slots as pieces.
        assert!(unreturned > 0 || pieces(&spec, steps).len() < 10, "{name}: nothing hung for want of a credit");
    }
}

#[test]
fn a_firing_that_does_not_end_is_the_cause() {
    for (name, spec, steps) in plans::all() {
        for (a, actor) in spec.actors.iter().enumerate() {
            for (x, action) in actor.actions.iter().enumerate() {
                let at = RegisterReader { actor: ActorId(a as u32), action: x as u32 };
                for firing in 0..u64::from(action.per_step * steps) {
                    let hang = hang(&spec, steps, Fault::Hang(at, firing)).expect("its end is waited for");
                    let root = if action.gangs.is_empty() { Root::Firing(at) } else { Root::Collective(at) };
                    assert_eq!(hang.root, root, "{name}, firing {firing}: {hang}");
                    assert!(hang.chain.iter().all(|link| link.action != at), "{name}: it waits for nobody: {hang}");
                }
            }
        }
    }
}

/// States of actors in the middle of a run that hangs.
fn two_members() -> (Arc<Spec>, Vec<ActorSnapshot>) {
    let mut spec = plans::gangs();
    // The engine numbers its groups otherwise.
    for action in spec.actors.iter_mut().flat_map(|actor| &mut actor.actions) {
        action.groups = action.gangs.iter().map(|gang| gang + 10).collect();
    }
    let spec = Arc::new(spec);
    let flying = |(a, actor): (usize, &crate::spec::ActorSpec)| ActorSnapshot {
        actor: ActorId(a as u32),
        firings: actor.actions.iter().map(|_| 1).collect(),
        busy_ns: actor.actions.iter().map(|_| 0).collect(),
        collective_ns: 0,
        waiting: ActorWaits {
            actor: ActorId(a as u32),
            in_flight: actor.actions.iter().position(|x| !x.gangs.is_empty()).map(|x| x as u32),
            actions: Vec::new(),
        },
        idle: Default::default(),
        idle_now_ns: 0,
        flying_since_ns: None,
        registers: Vec::new(),
    };
    let snapshots = spec.actors.iter().enumerate().map(flying).collect();
    (spec, snapshots)
}

#[test]
fn the_member_that_is_not_in_the_collective_is_the_cause() {
    let (spec, snapshots) = two_members();
    let members: Vec<_> = snapshots.iter().filter(|s| s.waiting.in_flight.is_some()).map(|s| s.actor).collect();
    let device = |actor: ActorId| spec.actors[actor.0 as usize].device;
    let action = |actor: ActorId| snapshots[actor.0 as usize].waiting.in_flight.expect("a member");
    for late in &members {
        let group = spec.actors[late.0 as usize].actions[action(*late) as usize].groups[0];
        let in_it = |m: &&ActorId| {
            let action = &spec.actors[m.0 as usize].actions[action(**m) as usize];
            m != &late && action.groups.contains(&group)
        };
        let waits: Vec<CollectiveWait> =
            members.iter().filter(in_it).map(|m| (group, device(*m), device(*late))).collect();
        assert!(!waits.is_empty());
        // Members of other groups are not asked.
        let mut snapshots = snapshots.clone();
        snapshots.retain(|s| s.actor == *late || members.iter().filter(in_it).any(|m| *m == s.actor));
        let scene = HangSnapshot {
            spec: &spec,
            snapshots: &snapshots,
            collectives: &waits,
            knows_collectives: true,
            is_checked: true,
            host_waits_for: None,
            process_of: &|_| None,
        };
        let hang = explain(scene, 9).expect("none has fired nine times");
        assert_eq!(hang.root, Root::Firing(RegisterReader { actor: *late, action: action(*late) }), "{hang}");
    }
}

#[test]
fn a_pipe_that_hangs_is_named_and_a_collective_is_not_one() {
    let (spec, _) = two_members();
    let of_plan = spec.actors.iter().flat_map(|actor| &actor.actions).flat_map(|action| &action.groups).max();
    let group = of_plan.expect("a group") + 1;
    let told = pipes(&spec, &[(group - 1, 0, 1), (group, 3, 2)]);
    assert_eq!(told, ["device 3: a transfer of registers with device 2 is under way on the GPU, and does not end"]);
}

#[test]
fn an_actor_that_does_not_answer_is_the_cause_here_and_its_process_is_elsewhere() {
    let spec = Arc::new(plans::data_parallel());
    let error = simulate(
        &spec,
        &Timing::uniform(&spec, 2, 1),
        &SimulationOptions { tokens: Some(Vec::new()), ..SimulationOptions::steps(1) },
    );
    let Err(SimulationError::Stuck(all)) = error else { panic!("{error:?}") };
    assert!(matches!(all.root, Root::Token(_)), "{all}");
    // Device 0's reduce waits for gradients of its compute, which is left out.
    let mut silent = two_actors(&spec);
    silent.retain(|s| s.actor != ActorId(0));
    let scene = |process_of| HangSnapshot {
        spec: &spec,
        snapshots: &silent,
        collectives: &[],
        knows_collectives: false,
        is_checked: true,
        host_waits_for: None,
        process_of,
    };
    let hang = explain(scene(&|_| None), 1).expect("nothing has fired");
    assert_eq!(hang.root, Root::Silent(ActorId(0)), "{hang}");
    let nobody = HangSnapshot { snapshots: &[], ..scene(&|_| None) };
    let hang = explain(nobody, 1).expect("whoever is silent has not said that it is done");
    assert_eq!((hang.root, hang.also.len()), (Root::Silent(ActorId(0)), spec.actors.len() - 1), "{hang}");
    let hang = explain(scene(&|actor| (actor != ActorId(1)).then_some(7)), 1).expect("nothing has fired");
    assert_eq!((hang.root, hang.process()), (Root::Process { process: 7, actor: ActorId(0) }, Some(7)), "{hang}");
}

/// Device 0's actors, before anything fired.
fn two_actors(spec: &Arc<Spec>) -> Vec<ActorSnapshot> {
    let of = |a: u32| {
        let protocol = crate::protocol::Protocol::new(spec, ActorId(a));
        ActorSnapshot::of(ActorId(a), &protocol, &vec![0; spec.actors[a as usize].actions.len()])
    };
    (0..2).map(of).collect()
}
