//! The register protocol of one actor: a pure state machine from events to effects. The shell, the simulator and the tests
//! run this one code.
//!
//! Firing `n` of an action reads piece `n / firings_per_piece` of each input and writes piece `n / firings_per_piece` of each
//! output (one later for an `initial` register, whose piece 0 is there from the start). So all state is a few counters, and
//! no event allocates.
//!
//! - **CR-1**, **CR-2**: see [`crate::register`].
//! - **CR-3**: a reader never has more unread pieces than the register has slots; this bounds every queue of messages.
//! - **CR-4**: pieces reach each reader, and come back from it, in order, each once, in slot `piece mod slots`.
//! - **CR-5**: at most one firing of an actor is in flight.
//! - **CR-6** (across actors): `released at the producer <= released by the reader <= filled at the reader <= published`; what
//!   lies between are messages under way.
//! - **CR-7** (across actors): what a firing reads does not change while it is in flight. The simulator checks it on data.

use std::sync::Arc;

use crate::error::ProtocolError;
use crate::register::SlotRing;
use crate::spec::{ActorId, Firing, RegisterId, RegisterReader, Spec};

mod waiting;
pub use waiting::{ActionWaits, ActorWaits, Holder, Missing};

/// What actors tell each other: ids and slots, never addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// From the producer: a piece can be read.
    Filled {
        /// The register.
        register: RegisterId,
        /// Index in the register's readers.
        reader: u32,
        /// Where the piece lies.
        slot: u32,
        /// Its number.
        piece: u64,
    },
    /// From a reader: it has done with a piece.
    Released {
        /// The register.
        register: RegisterId,
        /// Index in the register's readers.
        reader: u32,
        /// Where the piece lies.
        slot: u32,
        /// Its number.
        piece: u64,
    },
}

impl Message {
    /// Who sends it, and to whom; `None` for a register or a reader that the plan does not have.
    pub fn ends(&self, spec: &Spec) -> Option<(ActorId, ActorId)> {
        let (Self::Filled { register, reader, .. } | Self::Released { register, reader, .. }) = self;
        let register = spec.registers.get(register.0 as usize)?;
        let reader = register.readers.get(*reader as usize)?.actor;
        Some(match self {
            Self::Filled { .. } => (register.producer, reader),
            Self::Released { .. } => (reader, register.producer),
        })
    }
}

/// What happens to an actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolEvent {
    /// The session has started; firings may begin.
    Start,
    /// Another actor says something.
    Message(Message),
    /// The firing in flight has written an early output for good.
    Signal {
        /// Index of the action.
        action: u32,
        /// Output port.
        output: u32,
    },
    /// The firing in flight has ended.
    Done {
        /// Index of the action.
        action: u32,
    },
    /// The host lets an external action fire `count` times more.
    Token {
        /// Index of the action.
        action: u32,
        /// How many.
        count: u32,
    },
}

/// What an actor wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Launch a firing; its slots are [`Protocol::input_slot`] and [`Protocol::output_slot`].
    Launch {
        /// Index of the action.
        action: u32,
        /// Counted from 0.
        firing: u64,
    },
    /// Tell another actor. Order between the same two actors must be kept.
    Send {
        /// Whom.
        to: ActorId,
        /// What.
        message: Message,
    },
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
    /// Sorted; position = index in `rings`.
    produced: Box<[RegisterId]>,
    /// Sorted.
    reading: Box<[Reading]>,
    firing: FiringState,
}

/// Where a message from a producer belongs: `(register, reader) -> (action, input port)`.
type Reading = ((RegisterId, u32), (u32, u32));

#[derive(Clone, Debug)]
struct ActionState {
    /// Firings launched.
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
    /// Pieces filled so far, the initial one included.
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
    /// The list and the position of the next firing in it.
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
    /// The actor before [`Event::Start`].
    ///
    /// # Panics
    /// On a plan that [`crate::check::check`] refuses, or an id outside it.
    pub fn new(spec: &Arc<Spec>, me: ActorId) -> Self {
        let own = &spec.actors[me.0 as usize];
        let mut produced: Vec<_> = own.actions.iter().flat_map(|a| &a.outputs).map(|o| o.register).collect();
        produced.sort_unstable();
        let rings = produced.iter().map(|r| SlotRing::new(&spec.registers[r.0 as usize])).collect();
        let mut reading = Vec::new();
        let actions: Box<[ActionState]> = (own.actions.iter().enumerate())
            .map(|(index, action)| {
                let port = |(p, i): (usize, &crate::spec::InputSpec)| {
                    let register = &spec.registers[i.register.0 as usize];
                    let this = RegisterReader { actor: me, action: index as u32 };
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
                let out = |o: &crate::spec::OutputSpec| OutPort {
                    register: o.register,
                    ring: produced.binary_search(&o.register).expect("collected above"),
                    firings_per_piece: o.firings_per_piece.into(),
                    early: o.early,
                    first_piece: spec.registers[o.register.0 as usize].initial.into(),
                };
                let outputs = action.outputs.iter().map(out).collect();
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

    /// [`Protocol::apply`], then [`Protocol::fire`].
    ///
    /// # Errors
    /// As `apply`.
    pub fn handle(&mut self, event: ProtocolEvent, effects: &mut Vec<Effect>) -> Result<(), ProtocolError> {
        self.apply(event, effects)?;
        self.fire(effects);
        Ok(())
    }

    /// Takes an event in without beginning a firing, so that several can be taken in before the next is chosen.
    ///
    /// # Errors
    /// An event that no correct peer sends. The state is then unspecified, and the session has to end.
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
            FiringState::Credit(order) => order.iter().copied().find(|&a| self.ready(a)),
            FiringState::Ordered(list, next) => list.get(*next).copied().filter(|&a| self.ready(a)),
        }
    }

    /// Inputs, credits and tokens for an action's next firing are all there.
    fn ready(&self, action: u32) -> bool {
        let state = &self.actions[action as usize];
        let firing = state.fired;
        (!state.external || state.tokens > 0)
            && state.inputs.iter().all(|i| i.filled > firing / i.firings_per_piece)
            && state.outputs.iter().all(|o| !o.begins(firing) || self.rings[o.ring].free() > 0)
    }

    fn filled(&mut self, register: RegisterId, reader: u32, slot: u32, piece: u64) -> Result<(), ProtocolError> {
        let Ok(found) = self.reading.binary_search_by_key(&(register, reader), |r| r.0) else {
            return Err(self.misrouted(register, reader));
        };
        let (action, port) = self.reading[found].1;
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
        let readers = |id: RegisterId| &self.spec.registers[id.0 as usize].readers;
        let ring = match self.produced.binary_search(&register) {
            Ok(ring) if (reader as usize) < readers(register).len() => &mut self.rings[ring],
            _ => return Err(self.misrouted(register, reader)),
        };
        let reader_name = || {
            let r = readers(register)[reader as usize];
            self.spec.action_name(r.actor, r.action)
        };
        let expected = ring.released(reader as usize);
        if piece != expected {
            let register = self.spec.register_name(register);
            let message = format!("released by {}", reader_name());
            return Err(ProtocolError::WrongPiece { register, message, expected, got: piece });
        }
        if piece >= ring.published() {
            let register = self.spec.register_name(register);
            let published = ring.published();
            return Err(ProtocolError::Unpublished { register, reader: reader_name(), piece, published });
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
        let unexpected = |why| {
            let action = self.spec.action_name(self.me, action);
            Err(ProtocolError::UnexpectedSignal { action, output, why })
        };
        let Some(port) = state.outputs.get(output as usize).filter(|o| o.early) else {
            return unexpected("not an early output");
        };
        // Programs signal on every firing; only the last that writes a slot publishes it.
        if !port.completes(firing) {
            return Ok(());
        }
        if self.rings[port.ring].published() > port.piece(firing) {
            return unexpected("published already");
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
            } else if self.rings[output.ring].published() <= output.piece(firing) {
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

    /// Fills the slot of an output for all readers; those in this actor see it at once.
    fn publish(&mut self, action: u32, port: usize, effects: &mut Vec<Effect>) {
        let output = &self.actions[action as usize].outputs[port];
        let register = output.register;
        let ring = &mut self.rings[output.ring];
        let piece = ring.publish();
        let slot = ring.slot_of(piece);
        for (index, reader) in self.spec.registers[register.0 as usize].readers.iter().enumerate() {
            if reader.actor != self.me {
                let message = Message::Filled { register, reader: index as u32, slot, piece };
                effects.push(Effect::Send { to: reader.actor, message });
                continue;
            }
            let inputs = &mut self.actions[reader.action as usize].inputs;
            let input = inputs.iter_mut().find(|i| i.register == register).expect("checked: reads it");
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

    fn not_in_flight(&self, action: u32, what: String) -> ProtocolError {
        ProtocolError::NotInFlight { actor: self.name().into(), action, what, in_flight: self.in_flight }
    }

    fn name(&self) -> &str {
        &self.spec.actors[self.me.0 as usize].name
    }

    /// Firings of an action that have ended.
    pub fn completed(&self, action: u32) -> u64 {
        self.fired(action) - u64::from(self.in_flight == Some(action))
    }

    /// Firings of an action that have begun.
    pub fn fired(&self, action: u32) -> u64 {
        self.actions[action as usize].fired
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

    /// Register of an output port.
    pub fn output_register(&self, action: u32, port: usize) -> RegisterId {
        self.actions[action as usize].outputs[port].register
    }

    /// True when an earlier firing has written that slot's piece already, so that this one adds to it.
    pub fn repeats(&self, action: u32, port: usize, firing: u64) -> bool {
        !self.actions[action as usize].outputs[port].begins(firing)
    }

    /// True when this firing is the last to write that slot's piece.
    pub fn completes(&self, action: u32, port: usize, firing: u64) -> bool {
        self.actions[action as usize].outputs[port].completes(firing)
    }

    /// The rings of the registers that this actor produces.
    pub fn rings(&self) -> impl Iterator<Item = (RegisterId, &SlotRing)> {
        self.produced.iter().copied().zip(&self.rings)
    }

    /// The ring of a register that this actor produces.
    pub fn ring(&self, register: RegisterId) -> Option<&SlotRing> {
        self.produced.binary_search(&register).ok().map(|r| &self.rings[r])
    }

    /// `(pieces filled, pieces released)` at an input port, as this actor counts them.
    pub fn input_pieces(&self, action: u32, port: usize) -> (u64, u64) {
        let input = &self.actions[action as usize].inputs[port];
        (input.filled, self.completed(action) / input.firings_per_piece)
    }

    /// CR-1, CR-2, CR-3 and CR-5 for this actor.
    ///
    /// # Errors
    /// The first that does not hold.
    pub fn check(&self) -> Result<(), ProtocolError> {
        for (register, ring) in self.rings() {
            ring.check(&self.spec.registers[register.0 as usize].name)?;
        }
        for (index, action) in self.actions.iter().enumerate() {
            for (port, input) in action.inputs.iter().enumerate() {
                let (filled, released) = self.input_pieces(index as u32, port);
                if released > filled || filled - released > u64::from(input.slots) {
                    return Err(ProtocolError::Invariant {
                        label: "CR-3",
                        at: format!("register '{}'", self.spec.register_name(input.register)),
                        numbers: format!("{} slots, filled {filled}, released {released}", input.slots),
                    });
                }
            }
        }
        // CR-5: what is held open by this actor belongs to the one firing in flight, or to an accumulation.
        let writing = |o: &OutPort, fired: u64| o.piece(fired) > self.rings[o.ring].published();
        for (index, action) in self.actions.iter().enumerate() {
            let settled = self.completed(index as u32);
            for output in action.outputs.iter().filter(|o| o.begins(settled)) {
                if writing(output, settled) && self.in_flight != Some(index as u32) {
                    return Err(ProtocolError::Invariant {
                        label: "CR-5",
                        at: self.spec.action_name(self.me, index as u32),
                        numbers: format!("{settled} firings ended, piece {} unpublished", output.piece(settled) - 1),
                    });
                }
            }
        }
        Ok(())
    }

    /// A seeded fault for the tests: every ring believes in one slot too many.
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
