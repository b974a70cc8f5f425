//! Builds a [`Spec`] incrementally and keeps readers and ports consistent.

use crate::spec::{
    ActionRef, ActionSpec, ActorId, ActorSpec, Firing, InputSpec, OutputSpec, RegisterId, RegisterSpec, Spec,
    StreamKind,
};

/// A plan under construction. An [`ActionRef`] (actor and index) identifies an action.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    spec: Spec,
}

impl Builder {
    /// Creates an empty plan.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an actor on a device's compute stream.
    pub fn actor(&mut self, name: impl Into<String>, device: usize, firing: Firing) -> ActorId {
        let (name, stream) = (name.into(), StreamKind::Compute);
        self.spec.actors.push(ActorSpec { name, device, stream, firing, actions: Vec::new() });
        ActorId(self.spec.actors.len() as u32 - 1)
    }

    /// Adds an action of priority 0.
    ///
    /// # Panics
    /// If the actor does not belong to this builder. The methods below do the same for their ids.
    pub fn action(&mut self, actor: ActorId, name: impl Into<String>, per_step: u32) -> ActionRef {
        let actions = &mut self.spec.actors[actor.0 as usize].actions;
        actions.push(ActionSpec { name: name.into(), per_step, ..ActionSpec::default() });
        ActionRef { actor, action: actions.len() as u32 - 1 }
    }

    /// Adds an action that consumes tokens from the host.
    pub fn external(&mut self, actor: ActorId, name: impl Into<String>, per_step: u32) -> ActionRef {
        let action = self.action(actor, name, per_step);
        self.action_mut(action).external = true;
        action
    }

    /// Adds a register written by `writer`; `firings_per_piece` firings share a piece.
    pub fn register(
        &mut self,
        name: impl Into<String>,
        slots: u32,
        writer: ActionRef,
        firings_per_piece: u32,
    ) -> RegisterId {
        let register = RegisterId(self.spec.registers.len() as u32);
        let (name, producer) = (name.into(), writer.actor);
        let readers = Vec::new();
        self.spec.registers.push(RegisterSpec { name, producer, slots, slot_bytes: 0, initial: false, readers });
        self.action_mut(writer).outputs.push(OutputSpec { register, firings_per_piece, early: false });
        register
    }

    /// Adds a reader.
    pub fn read(&mut self, register: RegisterId, reader: ActionRef, firings_per_piece: u32) {
        self.spec.registers[register.0 as usize].readers.push(reader);
        self.action_mut(reader).inputs.push(InputSpec { register, firings_per_piece });
    }

    /// Adds a register with one reader and one piece per firing.
    pub fn edge(&mut self, name: impl Into<String>, slots: u32, writer: ActionRef, reader: ActionRef) -> RegisterId {
        let register = self.register(name, slots, writer, 1);
        self.read(register, reader, 1);
        register
    }

    /// Mutable access to an action.
    pub fn action_mut(&mut self, action: ActionRef) -> &mut ActionSpec {
        &mut self.spec.actors[action.actor.0 as usize].actions[action.action as usize]
    }

    /// Mutable access to an actor.
    pub fn actor_mut(&mut self, actor: ActorId) -> &mut ActorSpec {
        &mut self.spec.actors[actor.0 as usize]
    }

    /// Mutable access to a register.
    pub fn register_mut(&mut self, register: RegisterId) -> &mut RegisterSpec {
        &mut self.spec.registers[register.0 as usize]
    }

    /// Marks a register as early: a signal publishes it before the last firing that writes it ends.
    pub fn early(&mut self, register: RegisterId) {
        if let Some((action, port)) = self.spec.writer(register) {
            let actor = self.spec.registers[register.0 as usize].producer;
            self.action_mut(ActionRef { actor, action }).outputs[port as usize].early = true;
        }
    }

    /// Returns the plan without checking it.
    pub fn build(self) -> Spec {
        self.spec
    }
}
