//! All that a plan may say of actors to the protocol: registers, credits, actions and firing. Plain data, no device.

/// Index of an actor in [`Spec::actors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ActorId(pub u32);

/// Index of a register in [`Spec::registers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegisterId(pub u32);

/// A whole plan's actors and registers.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Spec {
    /// By [`ActorId`].
    pub actors: Vec<ActorSpec>,
    /// By [`RegisterId`].
    pub registers: Vec<RegisterSpec>,
    /// What the host decides in each step.
    pub decision: Decision,
}

/// What the host decides in a step from what it has seen of it. It gives all other external actions their tokens when a step begins.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Decision {
    /// Actions that must all have fired for the step.
    pub sees: Vec<RegisterReader>,
    /// External actions that get the step's tokens then.
    pub gives: Vec<RegisterReader>,
}

/// The channel from one producing actor to its readers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterSpec {
    /// Shown in errors, e.g. `stage0.forward/h`.
    pub name: String,
    /// Actor whose action writes it.
    pub producer: ActorId,
    /// Number of slots: the producer's credits.
    pub slots: u32,
    /// Bytes of one slot; 0 for a register that only signals.
    pub slot_bytes: usize,
    /// True when slot 0 holds piece 0 before anything fires (parameters).
    pub initial: bool,
    /// Every reader gets every piece. A reader is one action of one actor.
    pub readers: Vec<RegisterReader>,
}

/// One reading action of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegisterReader {
    /// Who reads.
    pub actor: ActorId,
    /// Index of the action in that actor.
    pub action: u32,
}

/// An actor: one stream's worth of actions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorSpec {
    /// Shown in errors, e.g. `device 3 compute`.
    pub name: String,
    /// Rank of the device in the mesh.
    pub device: usize,
    /// Which of the device's streams it owns.
    pub stream: StreamKind,
    /// Which ready action goes first.
    pub firing: Firing,
    /// By index.
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
    /// Any action whose inputs and credits are there; the lowest `priority` value first, then the lowest index.
    Credit,
    /// This list of action indices, once a step, again and again; the next one waits until it is ready.
    Ordered(Vec<u32>),
}

/// One action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActionSpec {
    /// Shown in errors, e.g. `forward`.
    pub name: String,
    /// Lower goes first under [`Firing::Credit`].
    pub priority: i32,
    /// Firings in one step.
    pub per_step: u32,
    /// What it reads.
    pub inputs: Vec<InputSpec>,
    /// What it writes.
    pub outputs: Vec<OutputSpec>,
    /// True when each firing also consumes one token that the host gives.
    pub external: bool,
    /// Groups (by id) whose collectives run inside this action: its n-th firing ends only when the n-th firing of each
    /// other action that names the group has started. Where several actions of one actor name a group (forward and
    /// backward, say), n counts the firings of all of them, in the order in which that actor makes them.
    pub gangs: Vec<u32>,
    /// The engine's groups that those collectives are calls of, by id: what engines tell of waits is told by these.
    pub groups: Vec<u32>,
}

/// An input port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputSpec {
    /// The register read.
    pub register: RegisterId,
    /// The same piece is read by this many firings in a row and then released.
    pub firings_per_piece: u32,
}

/// An output port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputSpec {
    /// The register written; this actor is its producer.
    pub register: RegisterId,
    /// One slot is written by this many firings in a row (accumulation) and published by the last of them.
    pub firings_per_piece: u32,
    /// True when the last firing publishes it by a signal of its program, before the firing ends.
    pub early: bool,
}

impl Spec {
    /// `device 3 compute forward`: how errors and reports name an action.
    pub fn action_name(&self, actor: ActorId, action: u32) -> String {
        match self.actors.get(actor.0 as usize) {
            Some(a) => match a.actions.get(action as usize) {
                Some(b) => format!("{} {}", a.name, b.name),
                None => format!("{} action {action}", a.name),
            },
            None => format!("actor {} action {action}", actor.0),
        }
    }

    /// Name of a register, or its number when there is none.
    pub fn register_name(&self, register: RegisterId) -> String {
        match self.registers.get(register.0 as usize) {
            Some(r) => r.name.clone(),
            None => format!("register {}", register.0),
        }
    }

    /// The action and output port that write a register.
    pub fn writer(&self, register: RegisterId) -> Option<(u32, u32)> {
        let producer = self.registers.get(register.0 as usize)?.producer;
        let actions = &self.actors.get(producer.0 as usize)?.actions;
        actions.iter().enumerate().find_map(|(a, action)| {
            let port = action.outputs.iter().position(|o| o.register == register)?;
            Some((a as u32, port as u32))
        })
    }
}
