//! Tests the protocol of one actor: slots, releases, early outputs, tables of pieces, and events that it must reject.

use std::collections::VecDeque;

use shardflow_kernels::hash::SplitMix64;

use super::*;
use crate::builder::Builder;
use crate::simulate::random;
use crate::spec::{Firing, Pieces};

const SOURCE: ActorId = ActorId(0);
const SINK: ActorId = ActorId(1);
const WIRE: RegisterId = RegisterId(0);
const DONE: ProtocolEvent = ProtocolEvent::Done { action: 0 };

/// The source fills the two slots of `wire`; the sink reads them.
fn source_and_sink() -> (Protocol, Protocol) {
    let mut b = Builder::new();
    let (source, sink) = (b.actor("source", 0, Firing::Credit), b.actor("sink", 1, Firing::Credit));
    let (write, read) = (b.external(source, "write", 4), b.action(sink, "read", 4));
    b.edge("wire", 2, write, read);
    let spec = b.build();
    let started = |actor| {
        let mut protocol = protocol(&spec, actor);
        assert_eq!(handle(&mut protocol, ProtocolEvent::Start), []);
        protocol
    };
    (started(SOURCE), started(SINK))
}

fn protocol(spec: &Spec, actor: ActorId) -> Protocol {
    crate::check::check(spec).unwrap();
    Protocol::new(&Arc::new(spec.clone()), actor)
}

fn handle(protocol: &mut Protocol, event: ProtocolEvent) -> Vec<Effect> {
    let mut effects = Vec::new();
    protocol.handle(event, &mut effects).unwrap();
    effects
}

fn reject(protocol: &mut Protocol, event: ProtocolEvent) -> String {
    protocol.handle(event, &mut Vec::new()).unwrap_err().to_string()
}

fn launch(action: u32, firing: u64) -> [Effect; 1] {
    [Effect::Launch { action, firing }]
}

fn tokens(action: u32, count: u32) -> ProtocolEvent {
    ProtocolEvent::Token { action, count }
}

fn filled(piece: u64, slot: u32) -> ProtocolEvent {
    ProtocolEvent::Message(Message::Filled { register: WIRE, reader: 0, slot, piece })
}

fn released(piece: u64, slot: u32) -> ProtocolEvent {
    ProtocolEvent::Message(Message::Released { register: WIRE, reader: 0, slot, piece })
}

#[test]
fn a_slot_changes_from_free_to_writing_to_filled_to_free() {
    let (mut source, mut sink) = source_and_sink();
    let state = |p: &Protocol| p.slots(WIRE).map(|s| (s.free(), s.published(), s.released().next().unwrap())).unwrap();
    assert_eq!(state(&source), (2, 0, 0));
    assert_eq!(handle(&mut source, tokens(0, 1)), launch(0, 0));
    assert_eq!(state(&source), (1, 0, 0));
    let message = Message::Filled { register: WIRE, reader: 0, slot: 0, piece: 0 };
    assert_eq!(handle(&mut source, DONE), [Effect::Send { to: SINK, message }]);
    assert_eq!(state(&source), (1, 1, 0));
    assert_eq!(handle(&mut sink, ProtocolEvent::Message(message)), launch(0, 0));
    let message = Message::Released { register: WIRE, reader: 0, slot: 0, piece: 0 };
    assert_eq!(handle(&mut sink, DONE), [Effect::Send { to: SOURCE, message }]);
    handle(&mut source, ProtocolEvent::Message(message));
    assert_eq!((state(&source), source.slots(WIRE).unwrap().peak), ((2, 1, 1), 1));
}

#[test]
fn credits_limit_the_pieces_in_flight() {
    let (mut source, _) = source_and_sink();
    handle(&mut source, tokens(0, 4));
    handle(&mut source, DONE);
    let sent = handle(&mut source, DONE);
    assert_eq!(sent.len(), 1, "a third firing has no slot: {sent:?}");
    let spec = source.spec.clone();
    let text = source.waiting().describe(&spec);
    assert_eq!(text, "source write waits for a credit of register 'wire' (2 of 2 slots held by sink read)");
    assert_eq!(handle(&mut source, released(0, 0)), launch(0, 2));
    assert_eq!((source.output_slot(0, 0, 2), source.repeats(0, 0, 2)), (0, false));
}

#[test]
fn invalid_messages_are_rejected() {
    let (_, mut sink) = source_and_sink();
    let text = "register 'wire': the `Filled` message carries piece 1, expected 0 (CR-4)";
    assert_eq!(reject(&mut sink.clone(), filled(1, 1)), text);
    let text = "register 'wire': piece 0 arrived in slot 1, expected 0 (CR-4)";
    assert_eq!(reject(&mut sink.clone(), filled(0, 1)), text);
    handle(&mut sink, filled(0, 0));
    assert_eq!(
        reject(&mut sink.clone(), filled(0, 0)),
        "register 'wire': the `Filled` message carries piece 0, expected 1 (CR-4)"
    );
    handle(&mut sink, filled(1, 1));
    let text = "register 'wire': sink read received piece 2 in slot 0, which still holds piece 0 (CR-3)";
    assert_eq!(reject(&mut sink.clone(), filled(2, 0)), text);
    assert!(reject(&mut sink.clone(), released(0, 0)).contains("a message for another actor"));
    let stray = Message::Filled { register: RegisterId(9), reader: 0, slot: 0, piece: 0 };
    assert!(reject(&mut sink.clone(), ProtocolEvent::Message(stray)).contains("a message for another actor"));
    assert!(reject(&mut sink.clone(), tokens(0, 1)).contains("accepts no tokens"));
    assert!(reject(&mut sink.clone(), tokens(7, 1)).contains("accepts no tokens"));
    assert!(reject(&mut sink.clone(), ProtocolEvent::Signal { action: 0, output: 0 }).contains("not an early output"));
    handle(&mut sink, DONE);
    handle(&mut sink, DONE);
    assert!(reject(&mut sink, DONE).ends_with("(CR-5)"));
}

#[test]
fn releases_are_checked() {
    let (mut source, _) = source_and_sink();
    handle(&mut source, tokens(0, 4));
    let text = "register 'wire': sink read released piece 0 from slot 0, which is being written with piece 0 (CR-1)";
    assert_eq!(reject(&mut source.clone(), released(0, 0)), text);
    handle(&mut source, DONE);
    handle(&mut source, released(0, 0));
    let text = "register 'wire': the `Released` message of sink read carries piece 0, expected 1 (CR-4)";
    assert_eq!(reject(&mut source, released(0, 0)), text);
}

#[test]
fn early_outputs_are_published_once_and_by_a_signal() {
    let mut b = Builder::new();
    let actor = b.actor("shard", 0, Firing::Credit);
    let (backward, update) = (b.external(actor, "backward", 2), b.action(actor, "update", 1));
    let gradient = b.register("gradient", 1, backward, 2);
    b.read(gradient, update, 1);
    b.early(gradient);
    let mut shard = protocol(&b.build(), actor);
    handle(&mut shard, ProtocolEvent::Start);
    handle(&mut shard, tokens(0, 2));
    // The first firing does not complete the piece, so its signal has no effect.
    handle(&mut shard, ProtocolEvent::Signal { action: 0, output: 0 });
    assert_eq!(shard.slots(gradient).unwrap().published(), 0);
    assert_eq!(handle(&mut shard, DONE), launch(0, 1));
    assert!(shard.repeats(0, 0, 1));
    assert!(reject(&mut shard.clone(), DONE).contains("without the signal"));
    handle(&mut shard, ProtocolEvent::Signal { action: 0, output: 0 });
    assert_eq!(shard.slots(gradient).unwrap().published(), 1);
    assert!(reject(&mut shard.clone(), ProtocolEvent::Signal { action: 0, output: 0 }).contains("already published"));
    // The actor's own reader has the piece but cannot fire, because one firing is in flight (CR-5).
    assert_eq!(handle(&mut shard, DONE), launch(1, 0));
}

#[test]
fn an_initial_register_of_one_slot_is_updated_after_its_readers() {
    let mut b = Builder::new();
    let actor = b.actor("shard", 0, Firing::Credit);
    let (train, update) = (b.external(actor, "train", 2), b.external(actor, "update", 1));
    let parameters = b.register("parameters", 1, update, 1);
    b.register_mut(parameters).initial = 1;
    b.read(parameters, train, 2);
    // `update` would fire first if it were ready.
    b.action_mut(update).priority = -1;
    let mut shard = protocol(&b.build(), actor);
    handle(&mut shard, tokens(1, 1));
    handle(&mut shard, tokens(0, 3));
    assert_eq!(handle(&mut shard, ProtocolEvent::Start), launch(0, 0));
    assert_eq!(handle(&mut shard, DONE), launch(0, 1));
    // Both firings have read piece 0, so the slot is free and the next piece is 1.
    assert_eq!(handle(&mut shard, DONE), launch(1, 0));
    assert_eq!(shard.output_slot(1, 0, 0), 0);
    assert_eq!(handle(&mut shard, ProtocolEvent::Done { action: 1 }), launch(0, 2));
}

/// A source writes pieces 0, 1 and 2 of a step into three slots; a sink reads them in the order 2, 0, 1.
fn permuted(slot_of: &[u32]) -> (Protocol, Protocol) {
    let mut b = Builder::new();
    let (source, sink) = (b.actor("source", 0, Firing::Credit), b.actor("sink", 1, Firing::Credit));
    let (write, read) = (b.external(source, "write", 3), b.action(sink, "read", 3));
    let wire = b.register("wire", 3, write, 1);
    b.register_mut(wire).slot_of = slot_of.into();
    b.read_pieces(wire, read, Pieces::in_order(&[2, 0, 1]));
    let spec = b.build();
    let mut both = [SOURCE, SINK].map(|actor| protocol(&spec, actor));
    both.iter_mut().for_each(|protocol| drop(handle(protocol, ProtocolEvent::Start)));
    let [source, sink] = both;
    (source, sink)
}

#[test]
fn slots_are_freed_by_piece_and_not_in_order() {
    let (mut source, mut sink) = permuted(&[0, 1, 2]);
    handle(&mut source, tokens(0, 6));
    (0..3).for_each(|_| drop(handle(&mut source, DONE)));
    // The sink waits for piece 2, although pieces 0 and 1 have arrived.
    assert_eq!(handle(&mut sink, filled(0, 0)), []);
    assert_eq!(handle(&mut sink, filled(1, 1)), []);
    assert_eq!(handle(&mut sink, filled(2, 2)), launch(0, 0));
    assert_eq!(sink.input_slot(0, 0, 0), 2);
    // Slot 2 is free, but the source's next piece, 3, lies in slot 0.
    assert_eq!(handle(&mut source, released(2, 2)), []);
    let states = |p: &Protocol| p.slots(WIRE).unwrap().states().to_vec();
    let held = |piece| SlotState::Filled { piece, readers: 1 };
    assert_eq!(states(&source), [held(0), held(1), SlotState::Free]);
    let text = source.waiting().describe(&source.spec.clone());
    assert_eq!(text, "source write waits for a credit of register 'wire' (2 of 3 slots held by sink read)");
    assert_eq!(handle(&mut source, released(0, 0)), launch(0, 3));
    // The release of piece 1 is due next. After it, the release of piece 5 is due, the first release of the next step.
    let text = "register 'wire': the `Released` message of sink read carries piece 5, expected 1 (CR-4)";
    assert_eq!(reject(&mut source.clone(), released(5, 2)), text);
    handle(&mut source, released(1, 1));
    let text = "register 'wire': sink read released piece 5 from slot 2, which is free (CR-1)";
    assert_eq!(reject(&mut source, released(5, 2)), text);
}

#[test]
fn a_slot_table_is_checked_on_each_message() {
    let (mut source, mut sink) = permuted(&[2, 0, 1]);
    handle(&mut source, tokens(0, 6));
    assert_eq!((source.output_slot(0, 0, 0), source.output_slot(0, 0, 4)), (2, 0));
    let text = "register 'wire': piece 0 arrived in slot 0, expected 2 (CR-4)";
    assert_eq!(reject(&mut sink.clone(), filled(0, 0)), text);
    for event in [filled(0, 2), filled(1, 0), filled(2, 1)] {
        handle(&mut sink, event);
    }
    // The sink reads piece 2, and the other pieces wait.
    let text = "register 'wire': sink read received piece 3 in slot 2, which still holds piece 0 (CR-3)";
    assert_eq!(reject(&mut sink, filled(3, 2)), text);
}

#[test]
fn a_reader_gets_only_the_pieces_of_its_table() {
    let mut b = Builder::new();
    let (source, sink) = (b.actor("source", 0, Firing::Credit), b.actor("sink", 1, Firing::Credit));
    let (write, read) = (b.external(source, "write", 3), b.action(sink, "read", 2));
    let wire = b.register("wire", 1, write, 1);
    b.read_pieces(wire, read, Pieces::in_order(&[0, 2]));
    let spec = b.build();
    let (mut source, mut sink) = (protocol(&spec, SOURCE), protocol(&spec, SINK));
    handle(&mut source, ProtocolEvent::Start);
    handle(&mut source, tokens(0, 3));
    assert_eq!(handle(&mut source, DONE).len(), 1);
    // Nobody reads piece 1, so its slot is free as soon as the firing ends, and no message is sent.
    assert_eq!(handle(&mut source, released(0, 0)), launch(0, 1));
    assert_eq!(handle(&mut source, DONE), launch(0, 2));
    handle(&mut sink, filled(0, 0));
    let text = "register 'wire': the `Filled` message carries piece 1, expected 2 (CR-4)";
    assert_eq!(reject(&mut sink, filled(1, 0)), text);
}

#[test]
fn several_writers_share_a_piece_in_the_order_of_the_list() {
    let mut b = Builder::new();
    let list = vec![1, 0, 0, 1, 2];
    let actor = b.actor("shard", 0, Firing::Ordered(list.clone()));
    let writers = ["early", "late"].map(|name| b.external(actor, name, 2));
    let update = b.action(actor, "update", 1);
    let sum = b.channel("sum", actor, 1, 1);
    let tables = Pieces::of_writers(&list, &[(0, &[0, 0]), (1, &[0, 0])]);
    writers.into_iter().zip(tables).for_each(|(writer, pieces)| b.write(sum, writer, pieces));
    b.read(sum, update, 1);
    let mut shard = protocol(&b.build(), actor);
    handle(&mut shard, tokens(0, 2));
    handle(&mut shard, tokens(1, 2));
    assert_eq!(handle(&mut shard, ProtocolEvent::Start), launch(1, 0));
    let done = |action| ProtocolEvent::Done { action };
    assert_eq!((shard.repeats(1, 0, 0), shard.repeats(0, 0, 0), shard.repeats(1, 0, 1)), (false, true, true));
    for (ended, next) in [(1, launch(0, 0)), (0, launch(0, 1)), (0, launch(1, 1))] {
        assert_eq!(handle(&mut shard, done(ended)), next);
        assert_eq!(shard.slots(sum).unwrap().states(), [SlotState::Writing { piece: 0 }]);
    }
    assert_eq!(handle(&mut shard, done(1)), launch(2, 0));
    assert_eq!(shard.slots(sum).unwrap().states(), [SlotState::Filled { piece: 0, readers: 1 }]);
}

/// A message with random ids, which are often close to ids of the plan.
fn stray(rng: &mut SplitMix64, spec: &Spec) -> Message {
    let register = RegisterId(rng.below(spec.registers.len() as u64 + 1) as u32);
    let (reader, slot) = (rng.below(2) as u32, rng.below(3) as u32);
    let piece = if rng.below(10) == 0 { u64::MAX - rng.below(2) } else { rng.below(8) };
    match rng.below(2) {
        0 => Message::Filled { register, reader, slot, piece },
        _ => Message::Released { register, reader, slot, piece },
    }
}

/// In any state, a message that no correct peer sends causes an error and changes nothing. A message that a correct
/// peer could have sent keeps the invariants.
#[test]
fn stray_messages_neither_panic_nor_change_the_state() {
    let (mut rejected, mut accepted) = (0, 0);
    for seed in 0..60 {
        let spec = Arc::new(random::coloured(&random::unlimited(seed), seed));
        let mut rng = SplitMix64(seed);
        let mut protocols: Vec<_> = (0..spec.actors.len() as u32).map(|a| Protocol::new(&spec, ActorId(a))).collect();
        let mut queue: VecDeque<_> = (0..spec.actors.len()).map(|actor| (actor, ProtocolEvent::Start)).collect();
        for (at, action) in spec.all_actions().filter(|(_, action)| action.external) {
            queue.push_back((at.actor.0 as usize, tokens(at.action, 3 * action.per_step)));
        }
        while let Some((actor, event)) = queue.pop_front() {
            for protocol in &protocols {
                let mut target = protocol.clone();
                match target.apply(ProtocolEvent::Message(stray(&mut rng, &spec)), &mut Vec::new()) {
                    Ok(()) => accepted += 1,
                    Err(_) => {
                        assert_eq!(format!("{target:?}"), format!("{protocol:?}"), "seed {seed}");
                        rejected += 1;
                    }
                }
                target.check().unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            }
            for effect in handle(&mut protocols[actor], event) {
                match effect {
                    Effect::Send { to, message } => queue.push_back((to.0 as usize, ProtocolEvent::Message(message))),
                    Effect::Launch { action, firing } => {
                        for output in 0..spec.actors[ActorId(actor as u32)].actions[action as usize].outputs.len() {
                            let is_early =
                                spec.actors[ActorId(actor as u32)].actions[action as usize].outputs[output].early;
                            if is_early && protocols[actor].completes(action, output, firing) {
                                queue.push_back((actor, ProtocolEvent::Signal { action, output: output as u32 }));
                            }
                        }
                        queue.push_back((actor, ProtocolEvent::Done { action }));
                    }
                }
            }
        }
    }
    assert!(rejected > 10_000 && accepted > 20, "only {rejected} messages were rejected and {accepted} accepted");
}
