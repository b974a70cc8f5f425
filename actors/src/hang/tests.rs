//! Injects faults into every plan and checks that the explanation of the hang names the injected fault.

use std::sync::Arc;

use super::*;
use crate::protocol::{Protocol, Sequence};
use crate::simulate::tests::{Fault, follows};
use crate::simulate::{SimulationError, SimulationOptions, Timing, plans, simulate};
use crate::spec::{ActorSpec, Pieces};

fn hang(spec: &Arc<Spec>, steps: u32, fault: Fault) -> Option<Hang> {
    let options = SimulationOptions { fault: Some(fault), ..SimulationOptions::steps(steps) };
    match simulate(spec, &Timing::uniform(spec, 2, 1), &options) {
        Err(SimulationError::Stuck(hang)) => Some(*hang),
        // The run completes if nobody waits for the lost message. Even then, the check of CR-6 may report the loss.
        Err(SimulationError::Conservation { .. }) | Ok(_) => None,
        Err(other) => panic!("{fault:?}: {other}"),
    }
}

/// Returns all pieces that readers in other actors get in the first `steps` steps, in order of publication. An entry
/// contains the register, the index of the reader, the reader, and the piece.
pub(crate) fn pieces(spec: &Spec, steps: u32) -> Vec<(RegisterId, u32, ActionRef, u64)> {
    let mut found = Vec::new();
    for (register, r) in spec.registers.values().zip(0..) {
        let id = RegisterId(r);
        for (&reader, index) in register.readers.iter().zip(0..).filter(|(r, _)| r.actor != register.producer) {
            let mut arrivals = Sequence::of_arrivals(spec, id, reader);
            let end = u64::from(register.pieces_per_step * steps + register.initial);
            while arrivals.piece() < end {
                found.push((id, index, reader, arrivals.piece()));
                arrivals.advance();
            }
        }
    }
    found
}

/// True if `root` is the expected cause. A fault loses one piece and all later pieces. If the register does not publish
/// pieces in the order of their numbers, `root` may also be a later lost piece.
pub(crate) fn explains(spec: &Spec, root: &Root, expected: &Root) -> bool {
    let plain = |register: RegisterId, reader: ActionRef| {
        let producer = spec.actor(spec.register(register).producer);
        let written = |(action, port): (u32, u32)| &producer.actions[action as usize].outputs[port as usize].pieces;
        let read = &spec.input(register, reader).expect("it reads the register").pieces;
        let mut all = spec.writers(register).map(written).chain([read]);
        all.all(|pieces| matches!(pieces, Pieces::Rate(_)))
    };
    match (root, expected) {
        (&Root::LostPiece { register, piece, reader }, &Root::LostPiece { register: r, piece: from, reader: a })
            if (register, reader) == (r, a) && !plain(r, a) =>
        {
            follows(Sequence::of_arrivals(spec, r, a), from, piece)
        }
        (
            &Root::LostRelease { register, piece, reader },
            &Root::LostRelease { register: r, piece: from, reader: a },
        ) if (register, reader) == (r, a) && !plain(r, a) => follows(Sequence::of_releases(spec, r, a), from, piece),
        _ => root == expected,
    }
}

#[test]
fn a_lost_message_is_the_root_cause() {
    for (name, spec, steps) in plans::all() {
        let (mut lost_pieces, mut lost_releases) = (0, 0);
        for (register, index, reader, piece) in pieces(&spec, steps) {
            if let Some(hang) = hang(&spec, steps, Fault::LosePieces(register, index, piece)) {
                let expected = Root::LostPiece { register, piece, reader };
                assert!(explains(&spec, &hang.root, &expected), "{name}, {expected:?}: {hang}");
                lost_pieces += 1;
            }
            if let Some(hang) = hang(&spec, steps, Fault::LoseReleases(register, index, piece)) {
                let expected = Root::LostRelease { register, piece, reader };
                assert!(explains(&spec, &hang.root, &expected), "{name}, {expected:?}: {hang}");
                lost_releases += 1;
            }
        }
        assert!(lost_pieces > 0, "{name}: no lost piece caused a hang");
        // A plan with few pieces may reuse no slot, and then no producer waits for a lost release.
        assert!(lost_releases > 0 || pieces(&spec, steps).len() < 10, "{name}: no lost release caused a hang");
    }
}

#[test]
fn a_firing_that_does_not_end_is_the_root_cause() {
    for (name, spec, steps) in plans::all() {
        for (at, action) in spec.all_actions() {
            for firing in 0..u64::from(action.per_step * steps) {
                let hang = hang(&spec, steps, Fault::Hang(at, firing)).expect("the run hangs");
                let root = if action.groups.is_empty() { Root::Firing(at) } else { Root::Collective(at) };
                assert_eq!(hang.root, root, "{name}, firing {firing}: {hang}");
                assert!(hang.chain.iter().all(|waiting| waiting.action != at), "{name}: the root waits: {hang}");
            }
        }
    }
}

/// Snapshots in the middle of a run. Every member of a group has an action in flight.
fn members_in_flight() -> (Arc<Spec>, Vec<ActorSnapshot>) {
    let mut spec = plans::groups();
    // Communicator ids differ from group ids.
    for action in spec.actors.values_mut().flat_map(|actor| &mut actor.actions) {
        action.communicators = action.groups.iter().map(|group| group + 10).collect();
    }
    let spec = Arc::new(spec);
    let snapshot = |(a, actor): (u32, &ActorSpec)| {
        let in_flight = actor.actions.iter().position(|x| !x.groups.is_empty()).map(|x| x as u32);
        ActorSnapshot {
            firings: vec![1; actor.actions.len()],
            waiting: ActorWaits { actor: ActorId(a), in_flight, actions: Vec::new() },
            ..ActorSnapshot::of(&Protocol::new(&spec, ActorId(a)))
        }
    };
    let snapshots = (0..).zip(spec.actors.values()).map(snapshot).collect();
    (spec, snapshots)
}

#[test]
fn the_member_that_is_not_in_the_collective_is_the_root_cause() {
    let (spec, snapshots) = members_in_flight();
    let members: Vec<_> = snapshots.iter().filter(|s| s.waiting.in_flight.is_some()).map(|s| s.actor).collect();
    let device = |actor: ActorId| spec.actor(actor).device;
    let action = |actor: ActorId| snapshots[actor.0 as usize].waiting.in_flight.expect("a member is in flight");
    for late in &members {
        let communicator = spec.action(*late, action(*late)).communicators[0];
        let in_it = |m: &&ActorId| m != &late && spec.action(**m, action(**m)).communicators.contains(&communicator);
        let waits: Vec<CollectiveWait> =
            members.iter().filter(in_it).map(|m| (communicator, device(*m), device(*late))).collect();
        assert!(!waits.is_empty());
        let mut snapshots = snapshots.clone();
        snapshots.retain(|s| s.actor == *late || members.iter().filter(in_it).any(|m| *m == s.actor));
        let alone = HangSnapshot::of_one_process(&spec, &snapshots);
        let input = HangSnapshot { collectives: &waits, knows_collectives: true, ..alone };
        let hang = explain(input, 9).expect("no action has fired nine times");
        assert_eq!(hang.root, Root::Firing(ActionRef { actor: *late, action: action(*late) }), "{hang}");
    }
}

#[test]
fn a_hanging_pipe_is_reported_and_a_collective_is_not() {
    let (spec, _) = members_in_flight();
    let of_plan = spec.actors.values().flat_map(|actor| &actor.actions).flat_map(|action| &action.communicators).max();
    let of_pipe = of_plan.expect("an action has a communicator") + 1;
    let texts = describe_pipe_waits(&spec, &[(of_pipe - 1, 0, 1), (of_pipe, 3, 2)]);
    assert_eq!(texts, ["device 3: a transfer of registers with device 2 is in progress on the GPU and does not end"]);
}

#[test]
fn an_unresponsive_actor_is_the_root_cause_or_its_process_if_it_is_remote() {
    let spec = Arc::new(plans::data_parallel());
    let options = SimulationOptions { fault: Some(Fault::TokensMax(0)), ..SimulationOptions::steps(1) };
    let error = simulate(&spec, &Timing::uniform(&spec, 2, 1), &options);
    let Err(SimulationError::Stuck(all)) = error else { panic!("{error:?}") };
    assert!(matches!(all.root, Root::Token(_)), "{all}");
    // Device 0's reduce actor waits for gradients of device 0's compute actor, whose snapshot is missing.
    let incomplete = [ActorSnapshot::of(&Protocol::new(&spec, ActorId(1)))];
    let input = |process_of| HangSnapshot { process_of, ..HangSnapshot::of_one_process(&spec, &incomplete) };
    let hang = explain(input(&|_| None), 1).expect("nothing has fired");
    assert_eq!(hang.root, Root::Unresponsive(ActorId(0)), "{hang}");
    let without_snapshots = HangSnapshot { snapshots: &[], ..input(&|_| None) };
    let hang = explain(without_snapshots, 1).expect("actors without a snapshot may have firings left");
    assert_eq!((hang.root, hang.also.len()), (Root::Unresponsive(ActorId(0)), spec.actors.len() - 1), "{hang}");
    let hang = explain(input(&|actor| (actor != ActorId(1)).then_some(7)), 1).expect("nothing has fired");
    assert_eq!((hang.root, hang.process()), (Root::Process { process: 7, actor: ActorId(0) }, Some(7)), "{hang}");
}
