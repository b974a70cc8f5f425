//! Checks that each inconsistency of a plan is rejected with its own error.

use super::*;
use crate::builder::Builder;
use crate::simulate::plans;
use crate::spec::PieceAccess;

type Change = fn(&mut Spec);

fn reject(change: impl FnOnce(&mut Spec)) -> String {
    let mut spec = plans::accumulation();
    change(&mut spec);
    check(&spec).unwrap_err().to_string()
}

#[test]
fn the_plans_of_all_shapes_are_valid() {
    for (name, spec, _) in plans::all() {
        assert_eq!(check(&spec), Ok(()), "{name}");
    }
}

#[test]
fn inconsistent_plans_are_rejected() {
    let faults: [(&str, Change); 14] = [
        ("the decision: no actor has index 9", |s| {
            s.decision.observed.push(ActionRef { actor: ActorId(9), action: 0 });
        }),
        ("the decision, host: no action has index 9", |s| {
            s.decision.granted.push(ActionRef { actor: ActorId(0), action: 9 });
        }),
        ("register 'batch': slots is 0, expected at least 1", |s| s.registers[RegisterId(0)].slots = 0),
        ("register 'batch': no actor has index 9", |s| s.registers[RegisterId(0)].producer = ActorId(9)),
        ("register 'batch': no action has index 9", |s| s.registers[RegisterId(0)].readers[0].action = 9),
        ("host feed: per_step is 0, expected at least 1", |s| s.actors[ActorId(0)].actions[0].per_step = 0),
        ("register 'batch' has 4 pieces per step, but host feed writes 2", |s| {
            s.actors[ActorId(0)].actions[0].per_step = 2
        }),
        ("register 'batch' has 2 pieces per step, but shard train reads 4", |s| {
            s.actors[ActorId(0)].actions[0].per_step = 2;
            s.registers[RegisterId(0)].pieces_per_step = 2;
        }),
        ("shard train fires 4 times per step, expected a multiple of 3, the firings per piece of 'gradient'", |s| {
            s.actors[ActorId(1)].actions[0].outputs[0].pieces = Pieces::Rate(3)
        }),
        (
            "shard train, firing 2: continues a piece of 'gradient' but begins a piece of 'loss': outputs that \
             accumulate must begin their pieces in the same firings",
            |s| {
                s.registers[RegisterId(3)].pieces_per_step = 2;
                s.actors[ActorId(0)].actions[1].per_step = 2;
                s.actors[ActorId(1)].actions[0].outputs[1].pieces = Pieces::Rate(2);
            },
        ),
        ("shard train appears 1 times in its actor's ordered list but fires 4 times per step", |s| {
            s.actors[ActorId(1)].firing = Firing::Ordered(vec![0, 1])
        }),
        ("register 'batch' lists shard train 2 times as a reader, but shard train reads it at 1 input ports", |s| {
            let reader = s.registers[RegisterId(0)].readers[0];
            s.registers[RegisterId(0)].readers.push(reader);
        }),
        ("register 'batch' is written by 0 output ports of actor host, expected at least 1", |s| {
            s.actors[ActorId(0)].actions[0].outputs.clear();
        }),
        ("register 'batch' lists shard train 1 times as a reader, but shard train reads it at 0 input ports", |s| {
            s.actors[ActorId(1)].actions[0].inputs[0].register = RegisterId(77);
        }),
    ];
    for (text, change) in faults {
        assert_eq!(reject(change), text);
    }
}

#[test]
fn unbounded_actions_are_rejected() {
    let text =
        "host feed can fire without end: it is not external and none of its inputs depends on an external action";
    assert_eq!(reject(|s| s.actors[ActorId(0)].actions[0].external = false), text);
    // The action reads the register that it writes. The initial piece would let it start without the host.
    let mut b = Builder::new();
    let actor = b.actor("ring", 0, Firing::Credit);
    let turn = b.action(actor, "turn", 1);
    let register = b.edge("state", 2, turn, turn);
    b.register_mut(register).initial = 1;
    assert!(matches!(check(&b.build()), Err(SpecError::Unbounded { .. })));
}

/// Applies each change to a valid plan and checks the resulting error.
fn reject_all(plan: fn() -> Spec, faults: &[(&str, Change)]) {
    assert_eq!(check(&plan()), Ok(()));
    for (text, change) in faults {
        let mut spec = plan();
        change(&mut spec);
        assert_eq!(check(&spec).map_err(|e| e.to_string()), Err((*text).into()));
    }
}

fn table(pieces: &mut Pieces, change: fn(&mut [PieceAccess])) {
    let Pieces::Table(accesses) = pieces else { panic!("{pieces:?} is not a table") };
    let mut changed = accesses.to_vec();
    change(&mut changed);
    *accesses = changed.into();
}

/// Changes how action 2 or 3 of plan `chunks` writes register 5, `shared`. The order of their writes is 3, 2, 3, 2.
fn shared(spec: &mut Spec, action: usize, change: fn(&mut [PieceAccess])) {
    let outputs = &mut spec.actors[ActorId(0)].actions[action].outputs;
    let output = outputs.iter_mut().find(|output| output.register == RegisterId(5));
    table(&mut output.expect("it writes `shared`").pieces, change);
}

#[test]
fn inconsistent_writers_are_rejected() {
    reject_all(
        plans::chunks,
        &[
            ("register 'shared' is written by 2 actions of actor device, which has no ordered list", |s| {
                s.actors[ActorId(0)].firing = Firing::Credit
            }),
            ("register 'shared' is written by 2 output ports of device backward0, expected at most 1", |s| {
                let outputs = &mut s.actors[ActorId(0)].actions[2].outputs;
                outputs.push(outputs[0].clone());
            }),
            ("register 'shared' is written by host feed, but its producer is actor device", |s| {
                let output = s.actors[ActorId(0)].actions[2].outputs[0].clone();
                s.actors[ActorId(1)].actions[0].outputs.push(output);
            }),
            ("device backward1, firing 0: 'first' is false for piece 0 of register 'shared', expected true", |s| {
                shared(s, 3, |table| table[0].first = false)
            }),
            ("device backward0, firing 0: 'first' is true for piece 0 of register 'shared', expected false", |s| {
                shared(s, 2, |table| table[0].first = true)
            }),
            ("device backward1, firing 1: 'last' is true for piece 0 of register 'shared', expected false", |s| {
                shared(s, 3, |table| table[1].last = true)
            }),
            ("device backward0, firing 1: 'last' is false for piece 0 of register 'shared', expected true", |s| {
                shared(s, 2, |table| table[1].last = false)
            }),
            ("device backward0, firing 1: piece 0 of register 'shared' is written a second time in the step", |s| {
                shared(s, 3, |table| table[1].last = true);
                shared(s, 2, |table| table[1].first = true);
            }),
            ("device backward1 fires 2 times per step, but its table for 'shared' has 1 entries", |s| {
                let output = s.actors[ActorId(0)].actions[3].outputs.iter_mut().find(|o| o.register == RegisterId(5));
                output.expect("it writes `shared`").pieces = Pieces::in_order(&[0]);
            }),
        ],
    );
}

#[test]
fn inconsistent_tables_of_readers_are_rejected() {
    reject_all(
        plans::routes,
        &[
            ("worker0 work, firing 2: its table for 'whole' has piece 6, expected less than 6", |s| {
                table(&mut s.actors[ActorId(2)].actions[0].inputs[0].pieces, |table| table[2].piece = 6)
            }),
            ("worker0 work, firing 1: piece 0 of register 'whole' is read a second time in the step", |s| {
                table(&mut s.actors[ActorId(2)].actions[0].inputs[0].pieces, |table| table[1].piece = 0)
            }),
            ("worker0 work, firing 0: 'last' is false for piece 0 of register 'whole', expected true", |s| {
                table(&mut s.actors[ActorId(2)].actions[0].inputs[0].pieces, |table| table[0].last = false)
            }),
            ("register 'whole' has 6 pieces per step, but worker0 work reads 3", |s| {
                s.actors[ActorId(2)].actions[0].inputs[0].pieces = Pieces::Rate(1)
            }),
        ],
    );
}

#[test]
fn inconsistent_slots_are_rejected() {
    reject_all(
        plans::lagging,
        &[
            ("register 'state': no slot has index 4", |s| s.registers[RegisterId(0)].slot_of = [0, 1, 2, 4].into()),
            ("register 'state': no piece lies in slot 3", |s| s.registers[RegisterId(0)].slot_of = [0, 1, 2].into()),
            ("register 'state': initial pieces 0 and 4 both lie in slot 0", |s| s.registers[RegisterId(0)].initial = 5),
            ("register 'state': initial pieces 0 and 2 both lie in slot 0", |s| {
                (s.registers[RegisterId(0)].slots, s.registers[RegisterId(0)].slot_of) = (2, [].into());
            }),
            ("register 'state', slot 2: piece 4 is written in step 0, but piece 2 is not read until step 1", |s| {
                s.registers[RegisterId(0)].slot_of = [0, 1, 2, 3, 2, 3].into()
            }),
            ("register 'state': pieces_per_step is 0, expected at least 1", |s| {
                s.registers[RegisterId(0)].pieces_per_step = 0
            }),
            ("the assignment of pieces to slots repeats after 1031 steps, expected at most 1024", |s| {
                (s.registers[RegisterId(1)].slots, s.registers[RegisterId(1)].slot_of) =
                    (2, (0..1031).map(|n| u32::from(n > 0)).collect());
            }),
        ],
    );
    reject_all(
        plans::interleaved,
        &[
            ("register 'sums', slot 0: piece 1 is begun before piece 0 is complete", |s| {
                (s.registers[RegisterId(0)].slots, s.registers[RegisterId(0)].slot_of) = (1, [].into())
            }),
            ("register 'sums': no action writes piece 1 of a step", |s| {
                s.actors[ActorId(0)].actions[0].outputs[0].pieces = Pieces::in_order(&[0; 4])
            }),
        ],
    );
}

#[test]
fn the_period_of_slots_ignores_their_names() {
    let period = |slots: u32, slot_of: &[u32], pieces_per_step: u32| {
        let mut register = crate::spec::RegisterSpec::new("r", ActorId(0), slots, pieces_per_step);
        register.slot_of = slot_of.into();
        register.period_steps()
    };
    // A ring has a period of one step, even if the number of pieces is not a multiple of the number of slots.
    assert_eq!((period(3, &[], 4), period(3, &[0, 1, 2], 4)), (1, 1));
    assert_eq!((period(2, &[0, 1, 1, 0], 4), period(2, &[0, 1, 1, 0], 2), period(2, &[0, 1, 1, 0], 1)), (1, 1, 2));
    assert_eq!((period(2, &[0, 0, 1], 1), period(2, &[0, 0, 1], 2), period(2, &[0, 0, 1], 3)), (3, 3, 1));
}
