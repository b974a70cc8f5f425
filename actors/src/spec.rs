//! The part of a plan that the protocol uses: registers, credits, actions and firing. Plain data, no device.

use serde::{Deserialize, Serialize};

use crate::label::Label;

/// Index of an actor in [`Spec::actors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ActorId(pub u32);

/// Index of a register in [`Spec::registers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RegisterId(pub u32);

/// The actors and registers of a whole plan.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Spec {
    /// Actors, indexed by [`ActorId`].
    pub actors: Vec<ActorSpec>,
    /// Registers, indexed by [`RegisterId`].
    pub registers: Vec<RegisterSpec>,
    /// The decision that the host makes in each step.
    pub decision: Decision,
}

/// A decision of the host within a step. All external actions other than `granted` get their tokens when a step begins.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Decision {
    /// Actions that must all have fired for the step before the host decides.
    pub observed: Vec<ActionRef>,
    /// External actions that get the step's tokens after the decision.
    pub granted: Vec<ActionRef>,
}

/// The channel from one producing actor to its readers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterSpec {
    /// Shown in errors, e.g. `stage0.forward/h`.
    pub name: String,
    /// The actor whose action writes it.
    pub producer: ActorId,
    /// Number of slots; these are the producer's credits.
    pub slots: u32,
    /// Bytes of one slot; 0 for a register that only signals.
    pub slot_bytes: usize,
    /// True if slot 0 holds piece 0 before any firing (parameters).
    pub initial: bool,
    /// Every reader gets every piece. A reader is one action of one actor.
    pub readers: Vec<ActionRef>,
}

/// One action of one actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ActionRef {
    /// The actor.
    pub actor: ActorId,
    /// Index of the action in that actor.
    pub action: u32,
}

/// An actor: the actions that run on one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorSpec {
    /// Shown in errors, e.g. `device 3 compute`.
    pub name: String,
    /// Rank of the device in the mesh.
    pub device: usize,
    /// The stream of the device that it owns.
    pub stream: StreamKind,
    /// How it chooses among ready actions.
    pub firing: Firing,
    /// Actions by index.
    pub actions: Vec<ActionSpec>,
}

/// The streams of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamKind {
    /// Layer shards.
    Compute,
    /// Collectives that overlap compute.
    Communication,
    /// Transfers from other placements and from the host.
    Copy,
}

/// How an actor chooses its next action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Firing {
    /// Any action whose inputs and credits are available: the lowest `priority` value first, then the lowest index.
    Credit,
    /// This list of action indices, repeated in every step; each action waits until it is ready and its turn comes.
    Ordered(Vec<u32>),
}

/// One action.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActionSpec {
    /// Shown in errors, e.g. `forward`.
    pub name: String,
    /// What it does.
    pub label: Label,
    /// Lower values fire first under [`Firing::Credit`].
    pub priority: i32,
    /// Firings in one step.
    pub per_step: u32,
    /// Input ports.
    pub inputs: Vec<InputSpec>,
    /// Output ports.
    pub outputs: Vec<OutputSpec>,
    /// True if each firing also consumes one token from the host.
    pub external: bool,
    /// Ids of groups whose collectives run in this action: its n-th firing ends only after every other member's n-th has
    /// begun. If several actions of an actor belong to a group, n counts the firings of all of them in the actor's order.
    pub groups: Vec<u32>,
    /// Ids of the communicators that those collectives use. Engines report waits by these ids.
    pub communicators: Vec<u32>,
}

/// An input port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputSpec {
    /// The register read.
    pub register: RegisterId,
    /// This many consecutive firings read the same piece; then it is released.
    pub firings_per_piece: u32,
}

/// An output port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputSpec {
    /// The register written; this actor is its producer.
    pub register: RegisterId,
    /// This many consecutive firings write one slot (accumulation); the last one publishes it.
    pub firings_per_piece: u32,
    /// True if the last firing publishes it by a signal of its program, before the firing ends.
    pub early: bool,
}

impl Spec {
    /// An actor of this plan.
    pub fn actor(&self, id: ActorId) -> &ActorSpec {
        &self.actors[id.0 as usize]
    }

    /// An action of this plan.
    pub fn action(&self, actor: ActorId, action: u32) -> &ActionSpec {
        &self.actor(actor).actions[action as usize]
    }

    /// All actions of all actors.
    pub fn all_actions(&self) -> impl Iterator<Item = (ActionRef, &ActionSpec)> {
        (0..).zip(&self.actors).flat_map(|(a, actor)| {
            (0..).zip(&actor.actions).map(move |(action, x)| (ActionRef { actor: ActorId(a), action }, x))
        })
    }

    /// A register of this plan.
    pub fn register(&self, id: RegisterId) -> &RegisterSpec {
        &self.registers[id.0 as usize]
    }

    /// The name of an action in errors and reports, such as `device 3 compute forward`.
    pub fn action_name(&self, actor: ActorId, action: u32) -> String {
        let Some(own) = self.actors.get(actor.0 as usize) else {
            return format!("actor {} action {action}", actor.0);
        };
        let name = own.actions.get(action as usize).map_or_else(|| format!("action {action}"), |a| a.name.clone());
        format!("{} {name}", own.name)
    }

    /// Name of a register; `register N` for an unknown id.
    pub fn register_name(&self, register: RegisterId) -> String {
        self.registers.get(register.0 as usize).map_or_else(|| format!("register {}", register.0), |r| r.name.clone())
    }

    /// The action and output port that write a register, if it exists.
    pub fn writer(&self, register: RegisterId) -> Option<(u32, u32)> {
        let producer = self.registers.get(register.0 as usize)?.producer;
        let actions = &self.actors.get(producer.0 as usize)?.actions;
        actions.iter().enumerate().find_map(|(a, action)| {
            let port = action.outputs.iter().position(|o| o.register == register)?;
            Some((a as u32, port as u32))
        })
    }
}
