//! A plan with the streams, programs and memory of one process, and a check that these parts match the plan.

use std::collections::BTreeMap;
use std::sync::Arc;

use crossbeam_channel::Sender;
use shardflow_kernels::clock::Stamped;
use shardflow_kernels::collective::Collective;
use shardflow_kernels::memory::Base;
use shardflow_kernels::op::Program;
use shardflow_kernels::stream::Stream;

use crate::check::check;
use crate::error::ActorError;
use crate::remote::Peers;
use crate::spec::{ActionRef, ActionSpec, ActorId, RegisterId, Spec};

/// The program that one action launches.
#[derive(Clone, Debug)]
pub struct ActionProgram {
    /// Each signal's tag is the index of an `early` output port. Each of these ports has exactly one signal.
    pub program: Arc<Program>,
    /// The program's base addresses, in the order of the base indices in its launches.
    pub bases: Vec<BaseRef>,
    /// Receives the end of each firing, for a host that then reads what the firing wrote.
    pub ends: Option<Sender<Stamped<FiringEnd>>>,
}

/// The end of a firing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FiringEnd {
    /// The actor and its action.
    pub at: ActionRef,
    /// Number of this firing of the action, from 0.
    pub firing: u64,
}

/// Where a program's base address points.
#[derive(Clone, Debug)]
pub enum BaseRef {
    /// Fixed memory, such as optimizer state and scratch memory.
    Fixed(Base),
    /// The slot that the firing reads through this input port.
    Input(usize),
    /// The slot that the firing writes through this output port.
    Output(usize),
    /// A ring of slots that only this action uses: firing `n` uses slot `n mod slots`.
    Ring {
        /// Start and stride of the slots.
        memory: RegisterMemory,
        /// Number of slots, at least 1.
        slots: u32,
    },
}

/// Location of slots of a register or a ring: slot `i` starts at `base.offset + i * stride`.
#[derive(Clone, Debug)]
pub struct RegisterMemory {
    /// Start of slot 0.
    pub base: Base,
    /// Distance between slots in bytes.
    pub stride: usize,
}

impl RegisterMemory {
    pub(crate) fn offset(&self, slot: u32) -> usize {
        self.base.offset + slot as usize * self.stride
    }

    pub(crate) fn slot(&self, slot: u32) -> Base {
        Base { arena: self.base.arena.clone(), offset: self.offset(slot) }
    }
}

pub(crate) type Memory = Arc<BTreeMap<RegisterId, RegisterMemory>>;

/// The stream and programs of one actor of this process.
#[derive(Debug)]
pub struct ActorHost {
    /// The actor's own stream.
    pub stream: Stream,
    /// Programs by action index.
    pub programs: Vec<ActionProgram>,
}

/// A plan with the streams, programs and memory of this process's part.
#[derive(Debug)]
pub struct LoadedPlan {
    /// The plan, or this process's part of it.
    pub spec: Arc<Spec>,
    /// The actors of this process.
    pub hosted: BTreeMap<ActorId, ActorHost>,
    /// Memory of the registers that these actors write or read. If a peer produces the register, this is the peer's
    /// memory, mapped into this process, or a local mirror.
    pub memory: BTreeMap<RegisterId, RegisterMemory>,
    /// The collective engine. The session aborts it when the session fails.
    pub engine: Arc<dyn Collective>,
    /// The other processes; empty when this process hosts all actors.
    pub peers: Peers,
}

/// Checks the plan, then checks that the loaded parts match the plan. Returns the first inconsistency.
pub(crate) fn check_loaded(loaded: &LoadedPlan) -> Result<(), ActorError> {
    let spec = &loaded.spec;
    check(spec)?;
    for (id, actor) in spec.actors.iter() {
        let others = usize::from(loaded.peers.directory.process_of(actor.device).is_some());
        let Some(own) = loaded.hosted.get(&id) else {
            expect_count(&actor.name, "processes that host the actor", 1, others)?;
            continue;
        };
        expect_count(&actor.name, "other processes that host the actor", 0, others)?;
        expect_count(&actor.name, "actions with programs", actor.actions.len(), own.programs.len())?;
        for (x, (action, program)) in actor.actions.iter().zip(&own.programs).enumerate() {
            let at = spec.action_name(id, x as u32);
            check_program(&at, action, program)?;
            let mut ports = action.inputs.iter().map(|i| i.register).chain(action.outputs.iter().map(|o| o.register));
            if let Some(register) = ports.find(|register| !loaded.memory.contains_key(register)) {
                let expected = format!("memory of register '{}'", spec.register_name(register));
                return mismatch(&at, "memory of a port", expected, "none");
            }
        }
    }
    // An actor of this process must know all readers of its registers.
    for register in spec.registers.values().filter(|register| loaded.hosted.contains_key(&register.producer)) {
        let unknown = register.readers.iter().filter(|reader| spec.actors.get(reader.actor).is_none()).count();
        expect_count(&register.name, "readers outside this process's part of the plan", 0, unknown)?;
    }
    for (id, memory) in &loaded.memory {
        let Some(register) = spec.registers.get(*id) else {
            return mismatch("the session", "id of a register with memory", "a register of the plan", id.0);
        };
        // A single slot needs no stride.
        if register.slots > 1 && memory.stride < register.slot_bytes {
            return mismatch(&register.name, "slot stride", format!("{} or more", register.slot_bytes), memory.stride);
        }
        let end = (register.slots as usize - 1)
            .checked_mul(memory.stride)
            .and_then(|n| n.checked_add(memory.base.offset)?.checked_add(register.slot_bytes));
        if end.is_none_or(|end| end > memory.base.arena.bytes()) {
            let bytes = memory.base.arena.bytes();
            let expected = format!("at most byte {bytes}, the end of the arena");
            return mismatch(&register.name, "end of the slots", expected, format!("{end:?}"));
        }
    }
    Ok(())
}

fn check_program(at: &str, action: &ActionSpec, program: &ActionProgram) -> Result<(), ActorError> {
    for base in &program.bases {
        match *base {
            BaseRef::Input(port) if port >= action.inputs.len() => {
                return mismatch(at, "input port of a base", format!("less than {}", action.inputs.len()), port);
            }
            BaseRef::Output(port) if port >= action.outputs.len() => {
                return mismatch(at, "output port of a base", format!("less than {}", action.outputs.len()), port);
            }
            BaseRef::Ring { slots: 0, .. } => return mismatch(at, "slots of a ring", "1 or more", 0),
            _ => {}
        }
    }
    let mut signals: Vec<_> = program.program.signals.iter().map(|s| s.1).collect();
    signals.sort_unstable();
    let early = (0..action.outputs.len() as u32).filter(|&o| action.outputs[o as usize].early);
    let early: Vec<_> = early.collect();
    if signals != early {
        let expected = format!("the early outputs {early:?}");
        return mismatch(at, "tags of the program's signals", expected, format!("{signals:?}"));
    }
    Ok(())
}

fn expect_count(at: &str, part: &'static str, expected: usize, got: usize) -> Result<(), ActorError> {
    if expected == got { Ok(()) } else { mismatch(at, part, expected, got) }
}

fn mismatch(at: &str, part: &'static str, expected: impl ToString, got: impl ToString) -> Result<(), ActorError> {
    Err(ActorError::Loaded { at: at.into(), part, expected: expected.to_string(), got: got.to_string() })
}
