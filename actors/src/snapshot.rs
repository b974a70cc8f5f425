//! What an actor shows of itself while it runs.

use crate::protocol::{ActorWaits, Protocol};
use crate::spec::{ActorId, RegisterId};
use crate::trace::Idle;

/// The state of one actor at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorSnapshot {
    /// Who.
    pub actor: ActorId,
    /// Firings begun since the start, by action.
    pub firings: Vec<u64>,
    /// Time from launch to the end as this actor saw them, summed over the ended firings, by action.
    pub busy_ns: Vec<u64>,
    /// Time that its stream was in collectives so far: waiting for other members, and moving bytes.
    pub collective_ns: u64,
    /// Why it does not fire.
    pub waiting: ActorWaits,
    /// How long it has stood idle, up to its last launch.
    pub idle: Idle,
    /// How long it stands idle now; 0 while a firing is in flight, and before the session's start.
    pub idle_now_ns: u64,
    /// When the firing in flight was launched, since the session's start.
    pub flying_since_ns: Option<u64>,
    /// The registers that it produces.
    pub registers: Vec<RegisterUse>,
}

/// Slots of a register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterUse {
    /// The register.
    pub register: RegisterId,
    /// All its slots.
    pub slots: u32,
    /// Slots written or filled now.
    pub slots_held: u32,
    /// Most slots held at once since the start.
    pub slots_peak: u32,
    /// Pieces published since the start, the initial one included.
    pub published: u64,
    /// Pieces that each reader has released, as far as the producer knows, by index in the register's readers.
    pub released: Vec<u64>,
}

/// The first tensor of one firing that holds an infinity or no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite {
    /// Who made it.
    pub actor: ActorId,
    /// Index of the action.
    pub action: u32,
    /// Firings of the action before this one, since the start.
    pub firing: u64,
    /// Index of the launch in the action's program.
    pub launch: usize,
    /// Index among the launch's writes.
    pub write: usize,
    /// How many elements are not finite.
    pub elements: usize,
}

impl ActorSnapshot {
    pub(crate) fn of(actor: ActorId, protocol: &Protocol, busy_ns: &[u64]) -> Self {
        let uses = protocol.rings().map(|(register, ring)| RegisterUse {
            register,
            slots: ring.slots(),
            slots_held: ring.held(),
            slots_peak: ring.peak(),
            published: ring.published(),
            released: ring.all_released().to_vec(),
        });
        Self {
            actor,
            firings: (0..busy_ns.len() as u32).map(|a| protocol.fired(a)).collect(),
            busy_ns: busy_ns.to_vec(),
            collective_ns: 0,
            waiting: protocol.waiting(),
            idle: Idle::default(),
            idle_now_ns: 0,
            flying_since_ns: None,
            registers: uses.collect(),
        }
    }

    /// Firings of an action that have ended.
    pub fn completed(&self, action: u32) -> u64 {
        let begun = self.firings.get(action as usize).copied().unwrap_or(0);
        begun - u64::from(self.waiting.in_flight == Some(action))
    }

    /// What it shows of a register that it produces.
    pub fn register(&self, register: RegisterId) -> Option<&RegisterUse> {
        self.registers.iter().find(|of| of.register == register)
    }
}
