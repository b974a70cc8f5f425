//! Reports why an actor does not fire, for the watchdog and for deadlock reports.

use std::fmt::Write;

use super::{FiringState, Protocol};
use crate::spec::{ActorId, RegisterId, RegisterReader, Spec};

/// An actor's firing in flight, and the waits of its actions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorWaits {
    /// The actor.
    pub actor: ActorId,
    /// The action in flight; no other action of this actor can fire until it ends.
    pub in_flight: Option<u32>,
    /// The actions that cannot fire, with the reasons.
    pub actions: Vec<ActionWaits>,
}

/// The reasons why one action cannot fire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActionWaits {
    /// Index of the action.
    pub action: u32,
    /// The action needs all of these; never empty.
    pub missing: Vec<Missing>,
}

/// One thing that an action needs and does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// A piece of an input.
    Piece {
        /// The register.
        register: RegisterId,
        /// Number of the piece.
        piece: u64,
        /// The action that writes it.
        writer: RegisterReader,
    },
    /// A free slot of an output.
    Credit {
        /// The register.
        register: RegisterId,
        /// Its number of slots; all are held.
        slots: u32,
        /// Readers that have not released the oldest piece.
        holders: Vec<Holder>,
    },
    /// A token from the host.
    Token,
    /// Its turn: the next action in the actor's ordered list is another one.
    Turn {
        /// Index of that action.
        next: u32,
    },
}

/// A reader that holds slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The reader.
    pub reader: RegisterReader,
    /// Number of slots that it has not released, as far as the producer knows.
    pub slots: u32,
}

impl Protocol {
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
                let writer = RegisterReader { actor: input.producer, action };
                missing.push(Missing::Piece { register: input.register, piece, writer });
            }
        }
        for output in state.outputs.iter().filter(|o| o.begins(firing)) {
            let ring = &self.rings[output.ring];
            if ring.free() > 0 {
                continue;
            }
            let readers = self.spec.registers[output.register.0 as usize].readers.iter().enumerate();
            let oldest = (0..readers.len()).map(|r| ring.released(r)).min().unwrap_or(0);
            let holders = readers.filter(|(r, _)| ring.released(*r) == oldest);
            let held = |r| (ring.published() - ring.released(r)) as u32;
            let holders = holders.map(|(r, &reader)| Holder { reader, slots: held(r) }).collect();
            missing.push(Missing::Credit { register: output.register, slots: ring.slots(), holders });
        }
        if state.external && state.tokens == 0 {
            missing.push(Missing::Token);
        }
        missing
    }
}

impl Missing {
    /// Describes it: `piece 0 of register 'x' from y`, `a credit of register 'x' (2 of 2 slots held by y)` and so on.
    pub fn describe(&self, spec: &Spec, actor: ActorId) -> String {
        match self {
            Missing::Piece { register, piece, writer } => {
                let from = spec.action_name(writer.actor, writer.action);
                format!("piece {piece} of register '{}' from {from}", spec.register_name(*register))
            }
            Missing::Credit { register, slots, holders } => {
                let held = |h: &Holder| {
                    let by = spec.action_name(h.reader.actor, h.reader.action);
                    format!("{} of {slots} slots held by {by}", h.slots)
                };
                let held: Vec<_> = holders.iter().map(held).collect();
                format!("a credit of register '{}' ({})", spec.register_name(*register), held.join(", "))
            }
            Missing::Token => "a token from the host".into(),
            Missing::Turn { next } => format!("its turn after {}", spec.action_name(actor, *next)),
        }
    }
}

impl ActorWaits {
    /// One line per waiting action, or a single line for the action in flight.
    pub fn describe(&self, spec: &Spec) -> String {
        if let Some(action) = self.in_flight {
            return format!("{} is in flight", spec.action_name(self.actor, action));
        }
        let mut text = String::new();
        for waits in &self.actions {
            let missing: Vec<_> = waits.missing.iter().map(|m| m.describe(spec, self.actor)).collect();
            let _ =
                writeln!(text, "{} waits for {}", spec.action_name(self.actor, waits.action), missing.join(" and "));
        }
        text.truncate(text.trim_end().len());
        text
    }
}
