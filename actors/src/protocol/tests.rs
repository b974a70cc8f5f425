//! Events that no correct peer sends, and the small print of registers.

use super::*;
use crate::builder::Builder;
use crate::register::SlotState;
use crate::spec::Firing;

const FEED: ActorId = ActorId(0);
const WORK: ActorId = ActorId(1);
const WIRE: RegisterId = RegisterId(0);

/// `feed` fills the two slots of `wire`; `work` reads them.
fn two() -> (Protocol, Protocol) {
    let mut b = Builder::new();
    let (feed, work) = (b.actor("feed", 0, Firing::Credit), b.actor("work", 1, Firing::Credit));
    let (write, read) = (b.external(feed, "write", 4), b.action(work, "read", 4));
    b.edge("wire", 2, write, read);
    let spec = Arc::new(b.build());
    crate::check::check(&spec).unwrap();
    (Protocol::new(&spec, FEED), Protocol::new(&spec, WORK))
}

fn handle(protocol: &mut Protocol, event: ProtocolEvent) -> Vec<Effect> {
    let mut effects = Vec::new();
    protocol.handle(event, &mut effects).unwrap();
    effects
}

fn refuse(protocol: &mut Protocol, event: ProtocolEvent) -> String {
    protocol.handle(event, &mut Vec::new()).unwrap_err().to_string()
}

fn filled(piece: u64, slot: u32) -> ProtocolEvent {
    ProtocolEvent::Message(Message::Filled { register: WIRE, reader: 0, slot, piece })
}

fn released(piece: u64, slot: u32) -> ProtocolEvent {
    ProtocolEvent::Message(Message::Released { register: WIRE, reader: 0, slot, piece })
}

#[test]
fn a_slot_goes_from_free_to_writing_to_filled_to_free() {
    let (mut feed, mut work) = two();
    let state = |p: &Protocol| p.ring(WIRE).unwrap().state(0);
    assert_eq!(handle(&mut feed, ProtocolEvent::Start), []);
    assert_eq!(state(&feed), SlotState::Free);
    assert_eq!(
        handle(&mut feed, ProtocolEvent::Token { action: 0, count: 1 }),
        [Effect::Launch { action: 0, firing: 0 }]
    );
    assert_eq!(state(&feed), SlotState::Writing);
    let message = Message::Filled { register: WIRE, reader: 0, slot: 0, piece: 0 };
    assert_eq!(handle(&mut feed, ProtocolEvent::Done { action: 0 }), [Effect::Send { to: WORK, message }]);
    assert_eq!(state(&feed), SlotState::Filled { readers_left: 1 });
    handle(&mut work, ProtocolEvent::Start);
    assert_eq!(handle(&mut work, ProtocolEvent::Message(message)), [Effect::Launch { action: 0, firing: 0 }]);
    let message = Message::Released { register: WIRE, reader: 0, slot: 0, piece: 0 };
    assert_eq!(handle(&mut work, ProtocolEvent::Done { action: 0 }), [Effect::Send { to: FEED, message }]);
    handle(&mut feed, ProtocolEvent::Message(message));
    assert_eq!((state(&feed), feed.ring(WIRE).unwrap().peak()), (SlotState::Free, 1));
}

#[test]
fn credits_bound_what_is_ahead() {
    let (mut feed, _) = two();
    handle(&mut feed, ProtocolEvent::Start);
    handle(&mut feed, ProtocolEvent::Token { action: 0, count: 4 });
    handle(&mut feed, ProtocolEvent::Done { action: 0 });
    let sent = handle(&mut feed, ProtocolEvent::Done { action: 0 });
    assert_eq!(sent.len(), 1, "a third firing has no slot: {sent:?}");
    let spec = feed.spec.clone();
    let text = feed.waiting().describe(&spec);
    assert_eq!(text, "feed write waits for a credit of register 'wire' (2 of 2 slots held by work read)");
    assert_eq!(handle(&mut feed, released(0, 0)), [Effect::Launch { action: 0, firing: 2 }]);
    assert_eq!((feed.output_slot(0, 0, 2), feed.repeats(0, 0, 2)), (0, false));
}

#[test]
fn what_no_correct_peer_sends_is_refused() {
    let (_, mut work) = two();
    handle(&mut work, ProtocolEvent::Start);
    let text = "CR-4 register 'wire': filled carries piece 1, expected 0";
    assert_eq!(refuse(&mut work.clone(), filled(1, 1)), text);
    assert_eq!(refuse(&mut work.clone(), filled(0, 1)), "CR-4 register 'wire': piece 0 comes in slot 1, expected 0");
    handle(&mut work, filled(0, 0));
    assert_eq!(refuse(&mut work.clone(), filled(0, 0)), "CR-4 register 'wire': filled carries piece 0, expected 1");
    handle(&mut work, filled(1, 1));
    let text = "CR-3 register 'wire': reader work read of 2 slots got piece 2 with all of them unread";
    assert_eq!(refuse(&mut work.clone(), filled(2, 0)), text);
    assert!(refuse(&mut work.clone(), released(0, 0)).contains("not its own"));
    let stray = Message::Filled { register: RegisterId(9), reader: 0, slot: 0, piece: 0 };
    assert!(refuse(&mut work.clone(), ProtocolEvent::Message(stray)).contains("not its own"));
    assert!(refuse(&mut work.clone(), ProtocolEvent::Token { action: 0, count: 1 }).contains("takes no tokens"));
    assert!(refuse(&mut work.clone(), ProtocolEvent::Token { action: 7, count: 1 }).contains("takes no tokens"));
    assert!(refuse(&mut work.clone(), ProtocolEvent::Signal { action: 0, output: 0 }).contains("not an early output"));
    handle(&mut work, ProtocolEvent::Done { action: 0 });
    handle(&mut work, ProtocolEvent::Done { action: 0 });
    assert!(refuse(&mut work, ProtocolEvent::Done { action: 0 }).starts_with("CR-5"));
}

#[test]
fn releases_are_checked() {
    let (mut feed, _) = two();
    handle(&mut feed, ProtocolEvent::Start);
    handle(&mut feed, ProtocolEvent::Token { action: 0, count: 4 });
    let text = "CR-1 register 'wire': work read released piece 0, only 0 were published";
    assert_eq!(refuse(&mut feed.clone(), released(0, 0)), text);
    handle(&mut feed, ProtocolEvent::Done { action: 0 });
    handle(&mut feed, released(0, 0));
    let text = "CR-4 register 'wire': released by work read carries piece 0, expected 1";
    assert_eq!(refuse(&mut feed, released(0, 0)), text);
}

#[test]
fn early_outputs_are_published_once_and_by_a_signal() {
    let mut b = Builder::new();
    let actor = b.actor("shard", 0, Firing::Credit);
    let (backward, update) = (b.external(actor, "backward", 2), b.action(actor, "update", 1));
    let gradient = b.register("gradient", 1, backward, 2);
    b.read(gradient, update, 1);
    b.early(gradient);
    let spec = Arc::new(b.build());
    crate::check::check(&spec).unwrap();
    let mut shard = Protocol::new(&spec, actor);
    handle(&mut shard, ProtocolEvent::Start);
    handle(&mut shard, ProtocolEvent::Token { action: 0, count: 2 });
    // The first firing does not complete the piece; its signal says nothing.
    handle(&mut shard, ProtocolEvent::Signal { action: 0, output: 0 });
    assert_eq!(shard.ring(gradient).unwrap().published(), 0);
    assert_eq!(handle(&mut shard, ProtocolEvent::Done { action: 0 }), [Effect::Launch { action: 0, firing: 1 }]);
    assert!(shard.repeats(0, 0, 1));
    assert!(refuse(&mut shard.clone(), ProtocolEvent::Done { action: 0 }).contains("without the signal"));
    handle(&mut shard, ProtocolEvent::Signal { action: 0, output: 0 });
    assert_eq!(shard.ring(gradient).unwrap().published(), 1);
    assert!(refuse(&mut shard.clone(), ProtocolEvent::Signal { action: 0, output: 0 }).contains("published already"));
    // The actor's own reader has the piece, but one firing is in flight (CR-5).
    assert_eq!(handle(&mut shard, ProtocolEvent::Done { action: 0 }), [Effect::Launch { action: 1, firing: 0 }]);
}

#[test]
fn an_initial_register_of_one_slot_is_updated_after_its_readers() {
    let mut b = Builder::new();
    let actor = b.actor("shard", 0, Firing::Credit);
    let (train, update) = (b.external(actor, "train", 2), b.external(actor, "update", 1));
    let parameters = b.register("parameters", 1, update, 1);
    b.register_mut(parameters).initial = true;
    b.read(parameters, train, 2);
    // It would go first, if it could.
    b.action_mut(update).priority = -1;
    let spec = Arc::new(b.build());
    crate::check::check(&spec).unwrap();
    let mut shard = Protocol::new(&spec, actor);
    handle(&mut shard, ProtocolEvent::Token { action: 1, count: 1 });
    handle(&mut shard, ProtocolEvent::Token { action: 0, count: 3 });
    assert_eq!(handle(&mut shard, ProtocolEvent::Start), [Effect::Launch { action: 0, firing: 0 }]);
    assert_eq!(handle(&mut shard, ProtocolEvent::Done { action: 0 }), [Effect::Launch { action: 0, firing: 1 }]);
    // Both readings of piece 0 are over: now the slot is free, and the next piece is 1.
    assert_eq!(handle(&mut shard, ProtocolEvent::Done { action: 0 }), [Effect::Launch { action: 1, firing: 0 }]);
    assert_eq!(shard.output_slot(1, 0, 0), 0);
    assert_eq!(handle(&mut shard, ProtocolEvent::Done { action: 1 }), [Effect::Launch { action: 0, firing: 2 }]);
}
