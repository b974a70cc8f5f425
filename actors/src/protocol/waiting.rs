//! The reasons why an actor does not fire, for the watchdog and for deadlock reports.

use crate::spec::{ActionRef, ActorId, RegisterId, Spec};

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
    /// Everything that the action lacks; never empty.
    pub missing: Vec<Missing>,
}

/// One thing that an action needs and does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the comments of the variants name the fields")]
pub enum Missing {
    /// An unavailable piece of an input, and the action that writes it.
    Piece {
        register: RegisterId,
        piece: u64,
        writer: ActionRef,
    },
    /// The slot of an output's next piece. The slot still holds `piece`, which `holders` have not released.
    Credit {
        register: RegisterId,
        slots: u32,
        piece: u64,
        holders: Vec<Holder>,
    },
    Token,
    /// The action's turn: another action, `next`, is the next one in the actor's ordered list.
    Turn {
        next: u32,
    },
}

/// A reader that holds slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The reader.
    pub reader: ActionRef,
    /// Number of slots that the reader has not released, as far as the producer knows.
    pub slots: u32,
}

impl Missing {
    /// Describes the wait as `piece 0 of register 'x' from y` or `a credit of register 'x' (2 of 2 slots held by y)`.
    pub fn describe(&self, spec: &Spec, actor: ActorId) -> String {
        match self {
            Missing::Piece { register, piece, writer } => {
                let from = spec.action_name(writer.actor, writer.action);
                format!("piece {piece} of register '{}' from {from}", spec.register_name(*register))
            }
            Missing::Credit { register, slots, holders, .. } => {
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
        let line = |waits: &ActionWaits| {
            let missing: Vec<_> = waits.missing.iter().map(|m| m.describe(spec, self.actor)).collect();
            format!("{} waits for {}", spec.action_name(self.actor, waits.action), missing.join(" and "))
        };
        self.actions.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}
