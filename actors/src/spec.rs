//! The part of a plan that the protocol uses: registers, credits, actions and firing rules. All of it is plain data.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::label::Label;
use crate::table::{Id, Table};

mod pieces;

pub use pieces::{PieceAccess, Pieces};

/// Id of an actor: unique in the whole plan, and the same in all processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ActorId(pub u32);

/// Id of a register: unique in the whole plan, and the same in all processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RegisterId(pub u32);

impl Id for ActorId {
    fn from_number(number: u32) -> Self {
        Self(number)
    }

    fn number(self) -> u32 {
        self.0
    }
}

impl Id for RegisterId {
    fn from_number(number: u32) -> Self {
        Self(number)
    }

    fn number(self) -> u32 {
        self.0
    }
}

/// The actors and registers of a plan, or the part of them that one process knows.
///
/// A part contains the actors of the process and the registers that these actors write or read. It also contains the
/// actors of other processes that write or read these registers, with only the ports for these registers.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Spec {
    /// Actors.
    pub actors: Table<ActorId, ActorSpec>,
    /// Registers.
    pub registers: Table<RegisterId, RegisterSpec>,
    /// The decision that the host makes in each step.
    pub decision: Decision,
}

/// A decision of the host within a step. All external actions other than `granted` get their tokens when a step begins.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Decision {
    /// The host decides for a step after all these actions have fired for the step.
    pub observed: Vec<ActionRef>,
    /// External actions that get the step's tokens after the decision.
    pub granted: Vec<ActionRef>,
}

/// The channel from one producing actor to its readers.
///
/// In step `s`, a writer's access to piece `p` means piece `s * pieces_per_step + p + initial`. A reader's access to
/// piece `p` means piece `s * pieces_per_step + p`. So readers lag behind the writers by `initial` pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterSpec {
    /// The name shown in errors, e.g. `stage0.forward/h`.
    pub name: String,
    /// The actor whose actions write the register. If several actions write it, the actor fires by an ordered list.
    pub producer: ActorId,
    /// Number of slots; these are the producer's credits.
    pub slots: u32,
    /// Bytes of one slot; 0 for a register that only signals.
    pub slot_bytes: usize,
    /// Number of pieces written in one step.
    pub pieces_per_step: u32,
    /// Pieces `0..initial` exist before any firing. A parameter register has one initial piece.
    pub initial: u32,
    /// Piece `n` lies in slot `slot_of[n mod slot_of.len()]` or, if `slot_of` is empty, in slot `n mod slots` (a ring).
    pub slot_of: Arc<[u32]>,
    /// A reader is one action of one actor. It gets the pieces that its input port accesses.
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
    /// The name shown in errors, e.g. `device 3 compute`.
    pub name: String,
    /// Rank of the device in the mesh.
    pub device: usize,
    /// Which of the device's streams the actor owns.
    pub stream: StreamKind,
    /// How the actor chooses among ready actions.
    pub firing: Firing,
    /// Actions by index.
    pub actions: Vec<ActionSpec>,
}

/// The streams of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamKind {
    /// Runs layer shards.
    Compute,
    /// Runs collectives that overlap compute.
    Communication,
    /// Runs transfers from other placements and from the host.
    Copy,
}

impl fmt::Display for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Compute => "compute",
            Self::Communication => "communication",
            Self::Copy => "copy",
        })
    }
}

/// The name of the actor of a device's stream, such as `device 3 compute`.
pub fn actor_name(device: usize, stream: StreamKind) -> String {
    format!("device {device} {stream}")
}

/// How an actor chooses its next action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Firing {
    /// Any action with available inputs and credits may fire. Among several such actions, the one with the lowest
    /// `priority` value fires first. Among equal values, the lowest index decides.
    Credit,
    /// Actions fire in the order of this list of action indices, which repeats every step. The actor waits until the
    /// list's next action is ready.
    Ordered(Vec<u32>),
}

/// One action.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ActionSpec {
    /// The name shown in errors, e.g. `forward`.
    pub name: String,
    /// What the action does.
    pub label: Label,
    /// Lower values fire first under [`Firing::Credit`].
    pub priority: i32,
    /// Number of firings in one step.
    pub per_step: u32,
    /// Input ports.
    pub inputs: Vec<InputSpec>,
    /// Output ports.
    pub outputs: Vec<OutputSpec>,
    /// True if each firing also consumes one token from the host.
    pub external: bool,
    /// Ids of groups whose collectives run in this action. A member's n-th firing ends only after the n-th firings of
    /// all members have begun. If several actions of an actor belong to a group, n counts the firings of all of them.
    pub groups: Vec<u32>,
    /// Ids of the communicators that those collectives use. Engines report waits by these ids.
    pub communicators: Vec<u32>,
}

/// An input port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputSpec {
    /// The register read.
    pub register: RegisterId,
    /// The piece that each firing reads. The last read of a piece releases it.
    pub pieces: Pieces,
}

/// An output port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputSpec {
    /// The register written; this actor is its producer.
    pub register: RegisterId,
    /// The piece that each firing writes. The first write of a piece acquires its slot, later writes accumulate into
    /// the piece, and the last write publishes it.
    pub pieces: Pieces,
    /// True if a signal of the program publishes the piece before the piece's last write firing has ended.
    pub early: bool,
}

impl RegisterSpec {
    /// A register without readers, bytes and initial pieces, whose slots form a ring.
    pub fn new(name: impl Into<String>, producer: ActorId, slots: u32, pieces_per_step: u32) -> Self {
        Self {
            name: name.into(),
            producer,
            slots,
            slot_bytes: 0,
            pieces_per_step,
            initial: 0,
            slot_of: Arc::default(),
            readers: Vec::new(),
        }
    }

    /// The slot of a piece.
    pub fn slot(&self, piece: u64) -> u32 {
        slot_in(self.slots, &self.slot_of, piece)
    }

    /// Number of steps after which the assignment of pieces to slots repeats, up to a renaming of the slots. Always 1
    /// for a ring.
    pub fn period_steps(&self) -> u32 {
        let count = self.slot_of.len();
        let renames = |steps: usize| {
            let mut renamed = BTreeMap::new();
            let shift = steps * self.pieces_per_step as usize;
            (0..count).all(|n| {
                let to = self.slot_of[(n + shift) % count];
                *renamed.entry(self.slot_of[n]).or_insert(to) == to
            })
        };
        (1..=count).find(|steps| renames(*steps)).map_or(1, |steps| steps as u32)
    }
}

/// The slot of a piece: by `table`, or in a ring of `slots` if the table is empty.
pub(crate) fn slot_in(slots: u32, table: &[u32], piece: u64) -> u32 {
    if table.is_empty() { (piece % u64::from(slots)) as u32 } else { table[(piece % table.len() as u64) as usize] }
}

impl Spec {
    /// True if this is the whole plan, not a part.
    pub fn is_whole(&self) -> bool {
        self.actors.is_whole() && self.registers.is_whole()
    }

    /// An actor of this plan.
    pub fn actor(&self, id: ActorId) -> &ActorSpec {
        &self.actors[id]
    }

    /// An action of this plan.
    pub fn action(&self, actor: ActorId, action: u32) -> &ActionSpec {
        &self.actor(actor).actions[action as usize]
    }

    /// All actions of all actors.
    pub fn all_actions(&self) -> impl Iterator<Item = (ActionRef, &ActionSpec)> {
        self.actors
            .iter()
            .flat_map(|(actor, spec)| (0..).zip(&spec.actions).map(move |(action, x)| (ActionRef { actor, action }, x)))
    }

    /// A register of this plan.
    pub fn register(&self, id: RegisterId) -> &RegisterSpec {
        &self.registers[id]
    }

    /// The name of an action in errors and reports, such as `device 3 compute forward`.
    pub fn action_name(&self, actor: ActorId, action: u32) -> String {
        let Some(own) = self.actors.get(actor) else {
            return format!("actor {} action {action}", actor.0);
        };
        let name = own.actions.get(action as usize).map_or_else(|| format!("action {action}"), |a| a.name.clone());
        format!("{} {name}", own.name)
    }

    /// Name of a register, or `register N` if the id is unknown.
    pub fn register_name(&self, register: RegisterId) -> String {
        self.registers.get(register).map_or_else(|| format!("register {}", register.0), |r| r.name.clone())
    }

    /// Each action and output port that writes a register, ordered by action.
    pub fn writers(&self, register: RegisterId) -> impl Iterator<Item = (u32, u32)> + '_ {
        let producer = self.registers.get(register).and_then(|r| self.actors.get(r.producer));
        let actions = producer.into_iter().flat_map(|actor| (0..).zip(&actor.actions));
        actions.flat_map(move |(a, action)| {
            let ports = (0..).zip(&action.outputs).filter(move |(_, output)| output.register == register);
            ports.map(move |(port, _)| (a, port))
        })
    }

    /// The first of [`Spec::writers`].
    pub fn writer(&self, register: RegisterId) -> Option<(u32, u32)> {
        self.writers(register).next()
    }

    /// The writes of a register in one step, in order: the writing action and its access. If several actions write the
    /// register, they write in the order of the actor's list.
    pub fn writes(&self, register: RegisterId) -> Vec<(u32, PieceAccess)> {
        let Some(actor) = self.registers.get(register).map(|r| self.actor(r.producer)) else {
            return Vec::new();
        };
        let accesses = |(action, port): (u32, u32)| {
            let action = &actor.actions[action as usize];
            action.outputs[port as usize].pieces.accesses(action.per_step)
        };
        let mut writers: Vec<_> = self.writers(register).map(|writer| (writer.0, accesses(writer))).collect();
        match (&actor.firing, &mut *writers) {
            (Firing::Ordered(list), [_, _, ..]) => {
                let write = |action: &u32| {
                    let (action, accesses) = writers.iter_mut().find(|(a, _)| a == action)?;
                    Some((*action, accesses.next()?))
                };
                list.iter().filter_map(write).collect()
            }
            (_, [(action, accesses), ..]) => accesses.map(|access| (*action, access)).collect(),
            (_, []) => Vec::new(),
        }
    }

    /// The action that publishes a piece; for an initial piece, the first writer.
    pub fn publisher(&self, register: RegisterId, piece: u64) -> Option<ActionRef> {
        let spec = self.registers.get(register)?;
        let mut writers = self.writers(register).map(|(action, _)| action);
        let (first, more) = (writers.next()?, writers.next().is_some());
        let own = piece.checked_sub(u64::from(spec.initial)).filter(|_| more);
        let publishes = |own: u64| {
            let within = (own % u64::from(spec.pieces_per_step)) as u32;
            self.writes(register).into_iter().find(|(_, access)| access.piece == within && access.last)
        };
        let action = own.and_then(publishes).map_or(first, |(action, _)| action);
        Some(ActionRef { actor: spec.producer, action })
    }

    /// The input port through which an action reads a register.
    pub fn input(&self, register: RegisterId, reader: ActionRef) -> Option<&InputSpec> {
        let action = self.actors.get(reader.actor)?.actions.get(reader.action as usize)?;
        action.inputs.iter().find(|input| input.register == register)
    }

    /// Number of steps that a simulation must cover: the least common multiple of the registers' periods.
    pub fn period_steps(&self) -> u64 {
        let divisor = |mut a: u64, mut b: u64| {
            while b > 0 {
                (a, b) = (b, a % b);
            }
            a
        };
        let periods = self.registers.values().map(|register| u64::from(register.period_steps()));
        periods.fold(1, |all: u64, own| (all / divisor(all, own)).saturating_mul(own))
    }
}
