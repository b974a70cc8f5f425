//! The register protocol of one actor: a pure state machine from events to effects, for shell, simulator and tests.
//!
//! Firing `n` reads and writes piece `n / firings_per_piece` of each input and output (one later to write an `initial`
//! register, whose piece 0 exists from the start). So the state is a few counters; events do not allocate.
//!
//! - **CR-1**, **CR-2**: see `protocol/register.rs`.
//! - **CR-3**: a reader never has more unread pieces than the register has slots; this bounds every queue of messages.
//! - **CR-4**: pieces reach each reader, and each reader releases them, in order, each once, in slot `piece mod slots`.
//! - **CR-5**: at most one firing of an actor is in flight.
//! - **CR-6** (across actors): `released at the producer <= released by the reader <= filled at the reader <=
//!   published`; the differences are messages in transit.
//! - **CR-7** (across actors): the inputs of a firing do not change while it is in flight; the simulator checks it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::spec::{ActionRef, ActorId, Firing, InputSpec, OutputSpec, RegisterId, Spec};

mod error;
mod register;
mod waiting;

pub use error::ProtocolError;
pub use register::SlotRing;
pub use waiting::{ActionWaits, ActorWaits, Holder, Missing};

/// A message between actors: ids and slots, never addresses. `reader` is an index in the register's readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the comments of the types name the fields")]
pub enum Message {
    /// From the producer: a piece can be read.
    Filled { register: RegisterId, reader: u32, slot: u32, piece: u64 },
    /// From a reader: it no longer needs a piece.
    Released { register: RegisterId, reader: u32, slot: u32, piece: u64 },
}

impl Message {
    /// The sender and the receiver; `None` for a register or reader that the plan does not have.
    pub fn route(&self, spec: &Spec) -> Option<(ActorId, ActorId)> {
        let (Self::Filled { register, reader, .. } | Self::Released { register, reader, .. }) = self;
        let register = spec.registers.get(register.0 as usize)?;
        let reader = register.readers.get(*reader as usize)?.actor;
        Some(match self {
            Self::Filled { .. } => (register.producer, reader),
            Self::Released { .. } => (reader, register.producer),
        })
    }
}

/// The input of an actor. `action` is an index in its actions, `output` an output port.
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
    /// Launch a firing, counted from 0; its slots are [`Protocol::input_slot`] and [`Protocol::output_slot`].
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
    rings: Box<[SlotRing]>,
    /// Sorted; the position is the index in `rings`.
    produced: Box<[RegisterId]>,
    /// Sorted.
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
struct InPort {
    register: RegisterId,
    reader: u32,
    producer: ActorId,
    slots: u32,
    firings_per_piece: u64,
    /// Number of filled pieces, including the initial one.
    filled: u64,
}

#[derive(Clone, Debug)]
struct OutPort {
    register: RegisterId,
    ring: usize,
    firings_per_piece: u64,
    early: bool,
    /// Number of the piece that firing 0 writes.
    first_piece: u64,
}

#[derive(Clone, Debug)]
enum FiringState {
    /// Action indices, by priority.
    Credit(Box<[u32]>),
    /// The list, and the position of the next firing in it.
    Ordered(Box<[u32]>, usize),
}

impl OutPort {
    fn piece(&self, firing: u64) -> u64 {
        self.first_piece + firing / self.firings_per_piece
    }

    /// True for the firing that acquires the slot.
    fn begins(&self, firing: u64) -> bool {
        firing.is_multiple_of(self.firings_per_piece)
    }

    /// True for the firing that publishes it.
    fn completes(&self, firing: u64) -> bool {
        (firing + 1).is_multiple_of(self.firings_per_piece)
    }
}

impl Protocol {
    /// Creates the actor's state before [`ProtocolEvent::Start`].
    ///
    /// # Panics
    /// If [`crate::check::check`] rejects the plan, or the plan has no such actor.
    pub fn new(spec: &Arc<Spec>, me: ActorId) -> Self {
        let own = spec.actor(me);
        let mut produced: Vec<_> = own.actions.iter().flat_map(|a| &a.outputs).map(|o| o.register).collect();
        produced.sort_unstable();
        let rings = produced.iter().map(|r| SlotRing::new(spec.register(*r))).collect();
        let mut reading = Vec::new();
        let actions: Box<[ActionState]> = (own.actions.iter().enumerate())
            .map(|(index, action)| {
                let port = |(p, i): (usize, &InputSpec)| {
                    let register = spec.register(i.register);
                    let this = ActionRef { actor: me, action: index as u32 };
                    let reader = register.readers.iter().position(|r| *r == this).expect("checked: is listed") as u32;
                    reading.push(((i.register, reader), (index as u32, p as u32)));
                    InPort {
                        register: i.register,
                        reader,
                        producer: register.producer,
                        slots: register.slots,
                        firings_per_piece: i.firings_per_piece.into(),
                        filled: register.initial.into(),
                    }
                };
                let inputs = action.inputs.iter().enumerate().map(port).collect();
                let output = |o: &OutputSpec| OutPort {
                    register: o.register,
                    ring: produced.binary_search(&o.register).expect("collected above"),
                    firings_per_piece: o.firings_per_piece.into(),
                    early: o.early,
                    first_piece: spec.register(o.register).initial.into(),
                };
                let outputs = action.outputs.iter().map(output).collect();
                ActionState { fired: 0, external: action.external, tokens: 0, inputs, outputs }
            })
            .collect();
        reading.sort_unstable();
        let firing = match &own.firing {
            Firing::Ordered(list) => FiringState::Ordered(list.clone().into(), 0),
            Firing::Credit => {
                let mut order: Box<[u32]> = (0..own.actions.len() as u32).collect();
                order.sort_by_key(|&a| (own.actions[a as usize].priority, a));
                FiringState::Credit(order)
            }
        };
        let (spec, produced, reading) = (spec.clone(), produced.into(), reading.into());
        Self { spec, me, started: false, in_flight: None, actions, rings, produced, reading, firing }
    }

    /// Calls [`Protocol::apply`], then [`Protocol::fire`].
    pub fn handle(&mut self, event: ProtocolEvent, effects: &mut Vec<Effect>) -> Result<(), ProtocolError> {
        self.apply(event, effects)?;
        self.fire(effects);
        Ok(())
    }

    /// Processes an event without launching a firing, so that the caller can apply several before the next choice.
    ///
    /// # Errors
    /// An event that no correct peer sends. The state is then unspecified, and the session must end.
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

    /// Launches the next firing, if the actor is idle and one is ready.
    pub fn fire(&mut self, effects: &mut Vec<Effect>) {
        if !self.started || self.in_flight.is_some() {
            return;
        }
        let Some(action) = self.choose() else { return };
        let state = &mut self.actions[action as usize];
        let firing = state.fired;
        for output in state.outputs.iter().filter(|o| o.begins(firing)) {
            self.rings[output.ring].acquire();
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
        let firing = state.fired;
        (!state.external || state.tokens > 0)
            && state.inputs.iter().all(|i| i.filled > firing / i.firings_per_piece)
            && state.outputs.iter().all(|o| !o.begins(firing) || self.rings[o.ring].free() > 0)
    }

    fn filled(&mut self, register: RegisterId, reader: u32, slot: u32, piece: u64) -> Result<(), ProtocolError> {
        let Ok(index) = self.reading.binary_search_by_key(&(register, reader), |r| r.0) else {
            return Err(self.misrouted(register, reader));
        };
        let (action, port) = self.reading[index].1;
        let done = self.completed(action);
        let input = &mut self.actions[action as usize].inputs[port as usize];
        if piece != input.filled {
            let (register, expected) = (self.spec.register_name(register), input.filled);
            return Err(ProtocolError::WrongPiece { register, message: "filled".into(), expected, got: piece });
        }
        check_slot(&self.spec, register, piece, (piece % u64::from(input.slots)) as u32, slot)?;
        if input.filled - done / input.firings_per_piece >= u64::from(input.slots) {
            let reader = self.spec.action_name(self.me, action);
            let register = self.spec.register_name(register);
            return Err(ProtocolError::Overflow { register, reader, slots: input.slots, piece });
        }
        input.filled += 1;
        Ok(())
    }

    fn released(&mut self, register: RegisterId, reader: u32, slot: u32, piece: u64) -> Result<(), ProtocolError> {
        let readers = |id: RegisterId| &self.spec.register(id).readers;
        let ring = match self.produced.binary_search(&register) {
            Ok(ring) if (reader as usize) < readers(register).len() => &mut self.rings[ring],
            _ => return Err(self.misrouted(register, reader)),
        };
        let reader_name = || {
            let r = readers(register)[reader as usize];
            self.spec.action_name(r.actor, r.action)
        };
        let (name, expected, published) =
            (|| self.spec.register_name(register), ring.released()[reader as usize], ring.published);
        if piece != expected {
            let message = format!("released by {}", reader_name());
            return Err(ProtocolError::WrongPiece { register: name(), message, expected, got: piece });
        }
        if piece >= published {
            return Err(ProtocolError::Unpublished { register: name(), reader: reader_name(), piece, published });
        }
        check_slot(&self.spec, register, piece, ring.slot_of(piece), slot)?;
        ring.release(reader as usize);
        Ok(())
    }

    fn signal(&mut self, action: u32, output: u32, effects: &mut Vec<Effect>) -> Result<(), ProtocolError> {
        if self.in_flight != Some(action) {
            return Err(self.not_in_flight(action, format!("signal of output {output}")));
        }
        let state = &self.actions[action as usize];
        let firing = state.fired - 1;
        let unexpected = |reason| {
            let action = self.spec.action_name(self.me, action);
            Err(ProtocolError::UnexpectedSignal { action, output, reason })
        };
        let Some(port) = state.outputs.get(output as usize).filter(|o| o.early) else {
            return unexpected("not an early output");
        };
        // Programs signal on every firing; only the last that writes a slot publishes it.
        if !port.completes(firing) {
            return Ok(());
        }
        if self.rings[port.ring].published > port.piece(firing) {
            return unexpected("already published");
        }
        self.publish(action, output as usize, effects);
        Ok(())
    }

    fn done(&mut self, action: u32, effects: &mut Vec<Effect>) -> Result<(), ProtocolError> {
        if self.in_flight != Some(action) {
            return Err(self.not_in_flight(action, "done".into()));
        }
        let index = action as usize;
        let firing = self.actions[index].fired - 1;
        for port in 0..self.actions[index].outputs.len() {
            let output = &self.actions[index].outputs[port];
            if !output.completes(firing) {
                continue;
            }
            if !output.early {
                self.publish(action, port, effects);
            } else if self.rings[output.ring].published <= output.piece(firing) {
                let action = self.spec.action_name(self.me, action);
                return Err(ProtocolError::MissingSignal { action, output: port as u32 });
            }
        }
        self.in_flight = None;
        for port in 0..self.actions[index].inputs.len() {
            let input = &self.actions[index].inputs[port];
            if !(firing + 1).is_multiple_of(input.firings_per_piece) {
                continue;
            }
            let (register, reader, producer) = (input.register, input.reader, input.producer);
            let piece = firing / input.firings_per_piece;
            let slot = (piece % u64::from(input.slots)) as u32;
            if producer == self.me {
                self.released(register, reader, slot, piece)?;
            } else {
                let message = Message::Released { register, reader, slot, piece };
                effects.push(Effect::Send { to: producer, message });
            }
        }
        Ok(())
    }

    /// Publishes the slot of an output to all readers; readers in this actor see it at once.
    fn publish(&mut self, action: u32, port: usize, effects: &mut Vec<Effect>) {
        let output = &self.actions[action as usize].outputs[port];
        let register = output.register;
        let ring = &mut self.rings[output.ring];
        let piece = ring.publish();
        let slot = ring.slot_of(piece);
        for (index, reader) in self.spec.register(register).readers.iter().enumerate() {
            if reader.actor != self.me {
                let message = Message::Filled { register, reader: index as u32, slot, piece };
                effects.push(Effect::Send { to: reader.actor, message });
                continue;
            }
            let inputs = &mut self.actions[reader.action as usize].inputs;
            let input = inputs.iter_mut().find(|i| i.register == register).expect("checked: has the port");
            input.filled += 1;
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

    /// Slot that a firing reads at an input port.
    pub fn input_slot(&self, action: u32, port: usize, firing: u64) -> u32 {
        let input = &self.actions[action as usize].inputs[port];
        (firing / input.firings_per_piece % u64::from(input.slots)) as u32
    }

    /// Slot that a firing writes at an output port.
    pub fn output_slot(&self, action: u32, port: usize, firing: u64) -> u32 {
        let output = &self.actions[action as usize].outputs[port];
        self.rings[output.ring].slot_of(output.piece(firing))
    }

    /// True if an earlier firing has already written that slot's piece, so that this one accumulates into it.
    pub fn repeats(&self, action: u32, port: usize, firing: u64) -> bool {
        !self.actions[action as usize].outputs[port].begins(firing)
    }

    /// True if this firing is the last one that writes that slot's piece.
    pub fn completes(&self, action: u32, port: usize, firing: u64) -> bool {
        self.actions[action as usize].outputs[port].completes(firing)
    }

    /// The slot rings of the registers that this actor produces.
    pub fn rings(&self) -> impl Iterator<Item = (RegisterId, &SlotRing)> {
        self.produced.iter().copied().zip(&self.rings)
    }

    /// The slot ring of a register that this actor produces.
    pub fn ring(&self, register: RegisterId) -> Option<&SlotRing> {
        self.produced.binary_search(&register).ok().map(|r| &self.rings[r])
    }

    /// `(filled, released)` pieces at an input port, as counted by this actor.
    pub fn input_pieces(&self, action: u32, port: usize) -> (u64, u64) {
        let input = &self.actions[action as usize].inputs[port];
        (input.filled, self.completed(action) / input.firings_per_piece)
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
        let firing = state.fired;
        let mut missing = Vec::new();
        for input in &state.inputs {
            let piece = firing / input.firings_per_piece;
            if input.filled <= piece {
                let action = self.spec.writer(input.register).map_or(0, |w| w.0);
                let writer = ActionRef { actor: input.producer, action };
                missing.push(Missing::Piece { register: input.register, piece, writer });
            }
        }
        for output in state.outputs.iter().filter(|o| o.begins(firing)) {
            let ring = &self.rings[output.ring];
            if ring.free() > 0 {
                continue;
            }
            let readers = self.spec.register(output.register).readers.iter();
            let oldest = ring.released().iter().min();
            let holders = readers.zip(ring.released()).filter(|(_, released)| Some(*released) == oldest);
            let held = |released| (ring.published - released) as u32;
            let holders = holders.map(|(&reader, released)| Holder { reader, slots: held(released) }).collect();
            missing.push(Missing::Credit { register: output.register, slots: ring.slots, holders });
        }
        if state.external && state.tokens == 0 {
            missing.push(Missing::Token);
        }
        missing
    }

    /// Checks CR-1, CR-2, CR-3 and CR-5 for this actor.
    pub fn check(&self) -> Result<(), ProtocolError> {
        for (register, ring) in self.rings() {
            ring.check(&self.spec.register(register).name)?;
        }
        for (index, action) in (0..).zip(&self.actions) {
            for (port, input) in action.inputs.iter().enumerate() {
                let (filled, released) = self.input_pieces(index, port);
                if released > filled || filled - released > u64::from(input.slots) {
                    return Err(ProtocolError::Invariant {
                        label: "CR-3",
                        at: format!("register '{}'", self.spec.register_name(input.register)),
                        numbers: format!("{} slots, filled {filled}, released {released}", input.slots),
                    });
                }
            }
            // CR-5: an unpublished piece belongs to the firing in flight or to an accumulation.
            let ended = self.completed(index);
            let writing = |o: &&OutPort| o.begins(ended) && o.piece(ended) > self.rings[o.ring].published;
            if let Some(output) = action.outputs.iter().find(writing)
                && self.in_flight != Some(index)
            {
                return Err(ProtocolError::Invariant {
                    label: "CR-5",
                    at: self.spec.action_name(self.me, index),
                    numbers: format!("{ended} firings ended, piece {} unpublished", output.piece(ended) - 1),
                });
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn add_surplus_credit(&mut self) {
        self.rings.iter_mut().for_each(|r| r.surplus = 1);
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
