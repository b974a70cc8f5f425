//! The register protocol of one actor. It is a pure state machine that turns events into effects. The shell, the
//! simulator and the tests run it.
//!
//! For each port, the plan fixes the piece and the slot of every firing, by a rate or a table. The producer stores the
//! state of its registers' slots. Each input port stores which piece it holds in each slot. No event allocates memory.
//!
//! - **CR-1**, **CR-2**: see `protocol/slots.rs`.
//! - **CR-3**: a reader holds at most one piece in each slot; this bounds every queue of messages.
//! - **CR-4**: the plan fixes the order in which pieces reach each reader, the order in which the reader releases them,
//!   and the slot of each piece. Each reader receives and releases each of its pieces exactly once.
//! - **CR-5**: at most one firing of an actor is in flight.
//! - **CR-6** (across actors): `released at the producer <= released by the reader <= filled at the reader <= published
//!   to it`. The differences are messages in transit. If a reader holds a piece in a slot, that slot is filled with the
//!   same piece at the producer, and the producer still waits for this reader's release.
//! - **CR-7** (across actors): the inputs of a firing do not change while it is in flight. The simulator checks this.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::spec::{ActionRef, ActorId, Firing, RegisterId, Spec};

mod error;
mod ports;
mod sequence;
mod slot;
mod slots;
mod waiting;

pub use error::ProtocolError;
use ports::{InPort, OutPort};
pub(crate) use sequence::Sequence;
pub use slot::SlotState;
pub use slots::RegisterSlots;
#[cfg(test)]
pub(crate) use slots::SlotFault;
pub use waiting::{ActionWaits, ActorWaits, Holder, Missing};

/// A message between actors. It carries ids and slots, never addresses. `reader` is an index in the register's readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the comments of the types name the fields")]
pub enum Message {
    /// From the producer: a piece can be read.
    Filled { register: RegisterId, reader: u32, slot: u32, piece: u64 },
    /// From a reader: the reader no longer needs a piece.
    Released { register: RegisterId, reader: u32, slot: u32, piece: u64 },
}

impl Message {
    /// Returns the sender and the receiver, or `None` for a register or reader that the plan does not have.
    pub fn route(&self, spec: &Spec) -> Option<(ActorId, ActorId)> {
        let (Self::Filled { register, reader, .. } | Self::Released { register, reader, .. }) = self;
        let register = spec.registers.get(*register)?;
        let reader = register.readers.get(*reader as usize)?.actor;
        Some(match self {
            Self::Filled { .. } => (register.producer, reader),
            Self::Released { .. } => (reader, register.producer),
        })
    }
}

/// An input event of an actor. `action` is the index of an action, and `output` is the index of an output port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the comments of the types name the fields")]
pub enum ProtocolEvent {
    /// The session has started; the actor may fire.
    Start,
    Message(Message),
    /// The firing in flight has finished writing an early output.
    Signal {
        action: u32,
        output: u32,
    },
    /// The firing in flight has ended.
    Done {
        action: u32,
    },
    /// The host allows `count` more firings of an external action.
    Token {
        action: u32,
        count: u32,
    },
}

/// The output of an actor: an operation that the caller executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the comments of the types name the fields")]
pub enum Effect {
    /// Launch firing `firing`, counted from 0. [`Protocol::input_slot`] and [`Protocol::output_slot`] return its slots.
    Launch { action: u32, firing: u64 },
    /// Send a message to an actor. Messages between the same two actors must keep their order.
    Send { to: ActorId, message: Message },
}

/// One actor's state.
#[derive(Clone, Debug)]
pub struct Protocol {
    spec: Arc<Spec>,
    me: ActorId,
    started: bool,
    in_flight: Option<u32>,
    actions: Box<[ActionState]>,
    slots: Box<[RegisterSlots]>,
    /// The produced registers, sorted. The position of a register is its index in `slots`.
    produced: Box<[RegisterId]>,
    /// Routes producers' messages to input ports. Sorted by register and reader.
    reading: Box<[Reading]>,
    firing: FiringState,
}

/// Routing of a producer's message: `(register, reader) -> (action, input port)`.
type Reading = ((RegisterId, u32), (u32, u32));

#[derive(Clone, Debug)]
struct ActionState {
    fired: u64,
    external: bool,
    tokens: u64,
    inputs: Box<[InPort]>,
    outputs: Box<[OutPort]>,
}

#[derive(Clone, Debug)]
enum FiringState {
    /// Action indices, sorted by priority.
    Credit(Box<[u32]>),
    /// The ordered list, and the position of the next firing in that list.
    Ordered(Box<[u32]>, usize),
}

impl Protocol {
    /// Creates the actor's state before [`ProtocolEvent::Start`].
    ///
    /// # Panics
    /// Panics if [`crate::check::check`] rejects the plan, or the plan has no such actor.
    pub fn new(spec: &Arc<Spec>, me: ActorId) -> Self {
        let own = spec.actor(me);
        let mut produced: Vec<_> = own.actions.iter().flat_map(|a| &a.outputs).map(|o| o.register).collect();
        produced.sort_unstable();
        produced.dedup();
        let slots = produced.iter().map(|register| RegisterSlots::new(spec, *register, me)).collect();
        let mut reading = Vec::new();
        let mut actions = Vec::new();
        for (action, of) in (0..).zip(&own.actions) {
            let input = |input| InPort::new(spec, ActionRef { actor: me, action }, input);
            let inputs: Box<[InPort]> = of.inputs.iter().map(input).collect();
            reading.extend((0..).zip(&inputs).map(|(port, input)| ((input.register, input.reader), (action, port))));
            let index = |register| produced.binary_search(&register).expect("collected above");
            let outputs = of.outputs.iter().map(|output| OutPort::new(spec, output, index(output.register))).collect();
            actions.push(ActionState { fired: 0, external: of.external, tokens: 0, inputs, outputs });
        }
        reading.sort_unstable();
        let firing = match &own.firing {
            Firing::Ordered(list) => FiringState::Ordered(list.clone().into(), 0),
            Firing::Credit => {
                let mut order: Box<[u32]> = (0..own.actions.len() as u32).collect();
                order.sort_by_key(|&a| (own.actions[a as usize].priority, a));
                FiringState::Credit(order)
            }
        };
        let (spec, actions, produced, reading) = (spec.clone(), actions.into(), produced.into(), reading.into());
        Self { spec, me, started: false, in_flight: None, actions, slots, produced, reading, firing }
    }

    /// Calls [`Protocol::apply`], then [`Protocol::fire`].
    pub fn handle(&mut self, event: ProtocolEvent, effects: &mut Vec<Effect>) -> Result<(), ProtocolError> {
        self.apply(event, effects)?;
        self.fire(effects);
        Ok(())
    }

    /// Processes an event but launches nothing. The caller can apply several events before it calls [`Protocol::fire`].
    ///
    /// # Errors
    /// Fails for an event that no correct peer sends. The state is then unspecified, and the session must end.
    pub fn apply(&mut self, event: ProtocolEvent, effects: &mut Vec<Effect>) -> Result<(), ProtocolError> {
        match event {
            ProtocolEvent::Start => self.started = true,
            ProtocolEvent::Message(Message::Filled { register, reader, slot, piece }) => {
                self.filled(register, reader, slot, piece)?
            }
            ProtocolEvent::Message(Message::Released { register, reader, slot, piece }) => {
                self.released(register, reader, slot, piece)?
            }
            ProtocolEvent::Signal { action, output } => self.signal(action, output, effects)?,
            ProtocolEvent::Done { action } => self.done(action, effects)?,
            ProtocolEvent::Token { action, count } => self.token(action, count)?,
        }
        if cfg!(debug_assertions) {
            self.check()?;
        }
        Ok(())
    }

    /// Launches the next firing, if the actor is idle and an action is ready.
    pub fn fire(&mut self, effects: &mut Vec<Effect>) {
        if !self.started || self.in_flight.is_some() {
            return;
        }
        let Some(action) = self.choose() else { return };
        let state = &mut self.actions[action as usize];
        let firing = state.fired;
        for output in state.outputs.iter().filter(|o| o.current.first) {
            self.slots[output.slots].acquire(output.current.slot, output.current.piece);
        }
        state.fired += 1;
        state.tokens -= u64::from(state.external);
        self.in_flight = Some(action);
        if let FiringState::Ordered(list, next) = &mut self.firing {
            *next = (*next + 1) % list.len();
        }
        effects.push(Effect::Launch { action, firing });
    }

    fn choose(&self) -> Option<u32> {
        match &self.firing {
            FiringState::Credit(order) => order.iter().copied().find(|&a| self.is_ready(a)),
            FiringState::Ordered(list, next) => list.get(*next).copied().filter(|&a| self.is_ready(a)),
        }
    }

    /// True if inputs, credits and tokens for an action's next firing are available.
    fn is_ready(&self, action: u32) -> bool {
        let state = &self.actions[action as usize];
        (!state.external || state.tokens > 0)
            && state.inputs.iter().all(InPort::is_ready)
            && state.outputs.iter().all(|o| !o.current.first || self.slots[o.slots].is_free(o.current.slot))
    }

    fn filled(&mut self, register: RegisterId, reader: u32, slot: u32, piece: u64) -> Result<(), ProtocolError> {
        let Ok(index) = self.reading.binary_search_by_key(&(register, reader), |r| r.0) else {
            return Err(self.misrouted(register, reader));
        };
        let (action, port) = self.reading[index].1;
        let input = &mut self.actions[action as usize].inputs[port as usize];
        let (expected, expected_slot) = (input.arrivals.piece(), input.arrivals.slot());
        if piece != expected {
            let register = self.spec.register_name(register);
            return Err(ProtocolError::WrongPiece {
                register,
                message: "the `Filled` message".into(),
                expected,
                got: piece,
            });
        }
        check_slot(&self.spec, register, piece, expected_slot, slot)?;
        if let Some(unread) = input.held_in(slot) {
            let reader = self.spec.action_name(self.me, action);
            let register = self.spec.register_name(register);
            return Err(ProtocolError::Overflow { register, reader, slot, unread, piece });
        }
        input.fill(slot, piece);
        Ok(())
    }

    fn released(&mut self, register: RegisterId, reader: u32, slot: u32, piece: u64) -> Result<(), ProtocolError> {
        let index = reader as usize;
        let slots = match self.produced.binary_search(&register) {
            Ok(at) if index < self.slots[at].readers.len() => &mut self.slots[at],
            _ => return Err(self.misrouted(register, reader)),
        };
        let spec = &self.spec;
        let name = |at: ActionRef| spec.action_name(at.actor, at.action);
        let slots::ReaderState { at, ref releases, .. } = slots.readers[index];
        let (expected, expected_slot) = (releases.piece(), releases.slot());
        if piece != expected {
            let (register, message) = (spec.register_name(register), format!("the `Released` message of {}", name(at)));
            return Err(ProtocolError::WrongPiece { register, message, expected, got: piece });
        }
        check_slot(spec, register, piece, expected_slot, slot)?;
        slots.release(index, slot, piece).map_err(|state| {
            let (register, reader) = (spec.register_name(register), name(at));
            ProtocolError::Unpublished { register, reader, piece, slot, state }
        })
    }

    fn signal(&mut self, action: u32, output: u32, effects: &mut Vec<Effect>) -> Result<(), ProtocolError> {
        if self.in_flight != Some(action) {
            return Err(self.not_in_flight(action, format!("a signal of output {output}")));
        }
        let unexpected = |reason| {
            let action = self.spec.action_name(self.me, action);
            Err(ProtocolError::UnexpectedSignal { action, output, reason })
        };
        let outputs = &self.actions[action as usize].outputs;
        let Some(port) = outputs.get(output as usize).filter(|o| o.early) else {
            return unexpected("not an early output");
        };
        // Programs signal in every firing. Only the last firing that writes a piece publishes the piece.
        if !port.current.last {
            return Ok(());
        }
        if !self.slots[port.slots].is_writing(port.current.slot, port.current.piece) {
            return unexpected("already published");
        }
        self.publish(action, output as usize, effects);
        Ok(())
    }

    fn done(&mut self, action: u32, effects: &mut Vec<Effect>) -> Result<(), ProtocolError> {
        if self.in_flight != Some(action) {
            return Err(self.not_in_flight(action, "the end of its firing".into()));
        }
        let index = action as usize;
        let next = self.actions[index].fired;
        for port in 0..self.actions[index].outputs.len() {
            let OutPort { early, current, slots, .. } = &self.actions[index].outputs[port];
            if current.last && !early {
                self.publish(action, port, effects);
            } else if current.last && self.slots[*slots].is_writing(current.slot, current.piece) {
                let action = self.spec.action_name(self.me, action);
                return Err(ProtocolError::MissingSignal { action, output: port as u32 });
            }
            self.actions[index].outputs[port].advance(next);
        }
        self.in_flight = None;
        for port in 0..self.actions[index].inputs.len() {
            let input = &mut self.actions[index].inputs[port];
            let ports::Reach { piece, slot, last, .. } = input.current;
            if last {
                input.release();
            }
            input.advance(next);
            if !last {
                continue;
            }
            let (register, reader, producer) = (input.register, input.reader, input.producer);
            if producer == self.me {
                self.released(register, reader, slot, piece)?;
            } else {
                let message = Message::Released { register, reader, slot, piece };
                effects.push(Effect::Send { to: producer, message });
            }
        }
        Ok(())
    }

    /// Publishes the piece in an output's slot to the piece's readers. Readers in this actor get the piece immediately.
    fn publish(&mut self, action: u32, port: usize, effects: &mut Vec<Effect>) {
        let output = &self.actions[action as usize].outputs[port];
        let (register, ports::Reach { piece, slot, .. }) = (output.register, output.current);
        let slots = &mut self.slots[output.slots];
        slots.publish(slot);
        let is_uniform = slots.is_uniform();
        for (index, reader) in slots.readers.iter().enumerate() {
            if !is_uniform && !slots.reads(index, piece) {
                continue;
            }
            if let Some(port) = reader.own_port {
                self.actions[reader.at.action as usize].inputs[port as usize].fill(slot, piece);
            } else {
                let message = Message::Filled { register, reader: index as u32, slot, piece };
                effects.push(Effect::Send { to: reader.at.actor, message });
            }
        }
    }

    fn token(&mut self, action: u32, count: u32) -> Result<(), ProtocolError> {
        match self.actions.get_mut(action as usize) {
            Some(state) if state.external => {
                state.tokens += u64::from(count);
                Ok(())
            }
            _ => Err(ProtocolError::UnexpectedToken { actor: self.name().into(), action }),
        }
    }

    fn misrouted(&self, register: RegisterId, reader: u32) -> ProtocolError {
        ProtocolError::Misrouted { actor: self.name().into(), register, reader }
    }

    fn not_in_flight(&self, action: u32, event: String) -> ProtocolError {
        ProtocolError::NotInFlight { actor: self.name().into(), action, event, in_flight: self.in_flight }
    }

    fn name(&self) -> &str {
        &self.spec.actor(self.me).name
    }

    /// Number of ended firings of an action.
    pub fn completed(&self, action: u32) -> u64 {
        self.actions[action as usize].fired - u64::from(self.in_flight == Some(action))
    }

    pub(crate) fn all_fired(&self) -> Vec<u64> {
        self.actions.iter().map(|action| action.fired).collect()
    }

    /// The action in flight.
    pub fn in_flight(&self) -> Option<u32> {
        self.in_flight
    }

    /// The slot that a firing reads at an input port.
    pub fn input_slot(&self, action: u32, port: usize, firing: u64) -> u32 {
        self.actions[action as usize].inputs[port].map.reach(firing).slot
    }

    /// The slot that a firing writes at an output port.
    pub fn output_slot(&self, action: u32, port: usize, firing: u64) -> u32 {
        self.actions[action as usize].outputs[port].map.reach(firing).slot
    }

    /// True if an earlier firing has already written the slot's piece, and this firing accumulates into the piece.
    pub fn repeats(&self, action: u32, port: usize, firing: u64) -> bool {
        !self.actions[action as usize].outputs[port].map.reach(firing).first
    }

    /// True if this firing is the last one that writes the slot's piece.
    pub fn completes(&self, action: u32, port: usize, firing: u64) -> bool {
        self.actions[action as usize].outputs[port].map.reach(firing).last
    }

    /// The slots of the registers that this actor produces.
    pub fn produced(&self) -> impl Iterator<Item = (RegisterId, &RegisterSlots)> {
        self.produced.iter().copied().zip(&self.slots)
    }

    /// The slots of a register that this actor produces.
    pub fn slots(&self, register: RegisterId) -> Option<&RegisterSlots> {
        self.produced.binary_search(&register).ok().map(|r| &self.slots[r])
    }

    /// `(filled, released)` pieces at an input port, as counted by this actor.
    pub fn input_pieces(&self, action: u32, port: usize) -> (u64, u64) {
        let input = &self.actions[action as usize].inputs[port];
        (input.filled, input.released)
    }

    /// The pieces that an input port holds (filled and not released), as `(slot, piece)`.
    pub fn input_held(&self, action: u32, port: usize) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.actions[action as usize].inputs[port].held()
    }

    /// Reports why this actor does not fire.
    pub fn waiting(&self) -> ActorWaits {
        let next = match &self.firing {
            FiringState::Ordered(list, next) => list.get(*next).copied(),
            FiringState::Credit(_) => None,
        };
        let mut actions = Vec::new();
        for action in 0..self.actions.len() as u32 {
            let missing = match next {
                Some(next) if next != action => vec![Missing::Turn { next }],
                _ => self.missing(action),
            };
            if !missing.is_empty() {
                actions.push(ActionWaits { action, missing });
            }
        }
        ActorWaits { actor: self.me, in_flight: self.in_flight, actions }
    }

    fn missing(&self, action: u32) -> Vec<Missing> {
        let state = &self.actions[action as usize];
        let mut missing = Vec::new();
        for input in &state.inputs {
            let (register, reach) = (input.register, input.map.reach(state.fired));
            if !input.holds(reach) {
                let first = ActionRef { actor: input.producer, action: 0 };
                let writer = self.spec.publisher(register, reach.piece).unwrap_or(first);
                missing.push(Missing::Piece { register, piece: reach.piece, writer });
            }
        }
        for output in &state.outputs {
            let (slots, reach) = (&self.slots[output.slots], output.map.reach(state.fired));
            if !reach.first || slots.is_free(reach.slot) {
                continue;
            }
            let held = |reader: u32| (0..slots.count()).filter(|slot| slots.is_left(*slot, reader as usize)).count();
            let holder = |reader| Holder { reader: slots.readers[reader as usize].at, slots: held(reader) as u32 };
            let holders = slots.readers_left(reach.slot).map(holder).collect();
            let held = match slots.states()[reach.slot as usize] {
                SlotState::Free => None,
                SlotState::Writing { piece } | SlotState::Filled { piece, .. } => Some(piece),
            };
            let (register, slots, piece) = (output.register, slots.count(), held.unwrap_or(reach.piece));
            missing.push(Missing::Credit { register, slots, piece, holders });
        }
        if state.external && state.tokens == 0 {
            missing.push(Missing::Token);
        }
        missing
    }

    /// Checks CR-1 to CR-5 for this actor.
    pub fn check(&self) -> Result<(), ProtocolError> {
        for (register, slots) in self.produced() {
            slots.check(&self.spec.register(register).name)?;
        }
        for (index, action) in (0..).zip(&self.actions) {
            for input in &action.inputs {
                let (held, InPort { register, filled, released, .. }) = (input.held().count() as u64, input);
                if released + held != *filled {
                    return Err(ProtocolError::Invariant {
                        label: "CR-3",
                        at: format!("register '{}'", self.spec.register_name(*register)),
                        numbers: format!("an input got {filled} pieces and released {released}, but holds {held}"),
                    });
                }
            }
            // CR-5: a slot that is being written belongs to the firing in flight or to an accumulation.
            let begun =
                |o: &&OutPort| o.current.first && self.slots[o.slots].is_writing(o.current.slot, o.current.piece);
            if let Some(output) = action.outputs.iter().find(begun)
                && self.in_flight != Some(index)
            {
                return Err(ProtocolError::Invariant {
                    label: "CR-5",
                    at: self.spec.action_name(self.me, index),
                    numbers: format!(
                        "after {} ended firings, no firing is in flight, but piece {} is begun",
                        action.fired, output.current.piece
                    ),
                });
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn break_slots(&mut self, fault: SlotFault) {
        self.slots.iter_mut().for_each(|slots| slots.fault = Some(fault));
    }
}

fn check_slot(spec: &Spec, register: RegisterId, piece: u64, expected: u32, got: u32) -> Result<(), ProtocolError> {
    if expected == got {
        return Ok(());
    }
    Err(ProtocolError::WrongSlot { register: spec.register_name(register), piece, expected, got })
}

#[cfg(test)]
mod tests;
