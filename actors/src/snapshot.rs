//! Snapshots of actors for monitoring.

use crate::protocol::{ActorWaits, Protocol, SlotState};
use crate::spec::{ActorId, RegisterId};
use crate::trace::Idle;

/// The state of one actor at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorSnapshot {
    /// The actor.
    pub actor: ActorId,
    /// Number of begun firings since the start, by action.
    pub firings: Vec<u64>,
    /// For each action: total time from launch to end of its ended firings, as this actor observed it.
    pub busy_ns: Vec<u64>,
    /// Total time of the actor's stream in collectives: waits for other members, and transfers.
    pub collective_ns: u64,
    /// The firing in flight, and why other actions do not fire.
    pub waiting: ActorWaits,
    /// Idle time by cause, up to the actor's last launch.
    pub idle: Idle,
    /// Current idle time; 0 while a firing is in flight.
    pub idle_now_ns: u64,
    /// Launch time of the firing in flight, in nanoseconds since the session's start.
    pub in_flight_since_ns: Option<u64>,
    /// The registers that the actor produces.
    pub registers: Vec<RegisterUse>,
}

/// Slot usage of a register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterUse {
    /// The register.
    pub register: RegisterId,
    /// Number of slots.
    pub slots: u32,
    /// Number of slots that are being written or are filled.
    pub slots_held: u32,
    /// Maximum number of slots held at the same time since the start.
    pub slots_peak: u32,
    /// Number of published pieces since the start, including the initial ones.
    pub published: u64,
    /// Number of pieces that each reader has released, as far as the producer knows, in order of the reader index.
    pub released: Vec<u64>,
    /// The state of each slot, and the indices of the readers that have not released the slot.
    pub states: Vec<(SlotState, Vec<u32>)>,
}

impl RegisterUse {
    /// Number of published slots that some reader has not released.
    pub fn slots_filled(&self) -> u32 {
        self.states.iter().filter(|(state, _)| matches!(state, SlotState::Filled { .. })).count() as u32
    }

    /// True if a slot holds this piece for this reader: the piece was published, and no release has arrived.
    pub(crate) fn is_held(&self, piece: u64, reader: u32) -> bool {
        let holds = |state: &SlotState| matches!(state, SlotState::Filled { piece: held, .. } if *held == piece);
        self.states.iter().any(|(state, readers)| holds(state) && readers.contains(&reader))
    }
}

/// The first output tensor with Inf or NaN in one firing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite {
    /// The actor that wrote the tensor.
    pub actor: ActorId,
    /// Index of the action.
    pub action: u32,
    /// Number of earlier firings of the action since the start.
    pub firing: u64,
    /// Index of the launch in the action's program.
    pub launch: usize,
    /// Index of the tensor among the launch's writes.
    pub write: usize,
    /// Number of elements that are Inf or NaN.
    pub elements: usize,
}

impl ActorSnapshot {
    /// A snapshot without times.
    pub(crate) fn of(protocol: &Protocol) -> Self {
        let uses = protocol.produced().map(|(register, slots)| RegisterUse {
            register,
            slots: slots.count(),
            slots_held: slots.held(),
            slots_peak: slots.peak,
            published: slots.published(),
            released: slots.released().collect(),
            states: (0..)
                .zip(slots.states())
                .map(|(slot, state)| (*state, slots.readers_left(slot).collect()))
                .collect(),
        });
        let (waiting, firings) = (protocol.waiting(), protocol.all_fired());
        Self {
            actor: waiting.actor,
            busy_ns: vec![0; firings.len()],
            firings,
            collective_ns: 0,
            waiting,
            idle: Idle::default(),
            idle_now_ns: 0,
            in_flight_since_ns: None,
            registers: uses.collect(),
        }
    }

    /// Number of ended firings of an action.
    pub fn completed(&self, action: u32) -> u64 {
        let begun = self.firings.get(action as usize).copied().unwrap_or(0);
        begun - u64::from(self.waiting.in_flight == Some(action))
    }

    /// Slot usage of a register that the actor produces.
    pub fn register(&self, register: RegisterId) -> Option<&RegisterUse> {
        self.registers.iter().find(|used| used.register == register)
    }
}
