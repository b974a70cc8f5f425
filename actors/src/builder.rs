//! Builds a [`Spec`] incrementally and keeps readers and ports consistent.

use crate::spec::{
    ActionRef, ActionSpec, ActorId, ActorSpec, Firing, InputSpec, OutputSpec, Pieces, RegisterId, RegisterSpec, Spec,
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

    /// Creates a builder that adds to an existing plan.
    #[cfg(test)]
    pub(crate) fn extend(spec: Spec) -> Self {
        Self { spec }
    }

    /// Adds an actor on a device's compute stream.
    pub fn actor(&mut self, name: impl Into<String>, device: usize, firing: Firing) -> ActorId {
        let (name, stream) = (name.into(), StreamKind::Compute);
        self.spec.actors.push(ActorSpec { name, device, stream, firing, actions: Vec::new() })
    }

    /// Adds an action of priority 0.
    ///
    /// # Panics
    /// Panics if the actor does not belong to this builder. The methods below also panic on unknown ids.
    pub fn action(&mut self, actor: ActorId, name: impl Into<String>, per_step: u32) -> ActionRef {
        let actions = &mut self.spec.actors[actor].actions;
        actions.push(ActionSpec { name: name.into(), per_step, ..ActionSpec::default() });
        ActionRef { actor, action: actions.len() as u32 - 1 }
    }

    /// Adds an action that consumes tokens from the host.
    pub fn external(&mut self, actor: ActorId, name: impl Into<String>, per_step: u32) -> ActionRef {
        let action = self.action(actor, name, per_step);
        self.action_mut(action).external = true;
        action
    }

    /// Adds a register that `writer` writes. `firings_per_piece` firings in a row write the same piece.
    pub fn register(
        &mut self,
        name: impl Into<String>,
        slots: u32,
        writer: ActionRef,
        firings_per_piece: u32,
    ) -> RegisterId {
        let pieces_per_step = self.action_mut(writer).per_step.checked_div(firings_per_piece).unwrap_or(0);
        let register = self.channel(name, writer.actor, slots, pieces_per_step);
        self.write(register, writer, Pieces::Rate(firings_per_piece));
        register
    }

    /// Adds a register whose writers are added with [`Builder::write`].
    pub fn channel(
        &mut self,
        name: impl Into<String>,
        producer: ActorId,
        slots: u32,
        pieces_per_step: u32,
    ) -> RegisterId {
        self.spec.registers.push(RegisterSpec::new(name, producer, slots, pieces_per_step))
    }

    /// Adds an output port to `writer`. The port writes `pieces` of the register.
    pub fn write(&mut self, register: RegisterId, writer: ActionRef, pieces: Pieces) {
        self.action_mut(writer).outputs.push(OutputSpec { register, pieces, early: false });
    }

    /// Adds a reader. `firings_per_piece` firings in a row read the same piece.
    pub fn read(&mut self, register: RegisterId, reader: ActionRef, firings_per_piece: u32) {
        self.read_pieces(register, reader, Pieces::Rate(firings_per_piece));
    }

    /// Adds a reader that reads `pieces`.
    pub fn read_pieces(&mut self, register: RegisterId, reader: ActionRef, pieces: Pieces) {
        self.spec.registers[register].readers.push(reader);
        self.action_mut(reader).inputs.push(InputSpec { register, pieces });
    }

    /// Adds a register with one reader and one piece per firing.
    pub fn edge(&mut self, name: impl Into<String>, slots: u32, writer: ActionRef, reader: ActionRef) -> RegisterId {
        let register = self.register(name, slots, writer, 1);
        self.read(register, reader, 1);
        register
    }

    /// Returns mutable access to an action.
    pub fn action_mut(&mut self, action: ActionRef) -> &mut ActionSpec {
        &mut self.spec.actors[action.actor].actions[action.action as usize]
    }

    /// Returns mutable access to an actor.
    pub fn actor_mut(&mut self, actor: ActorId) -> &mut ActorSpec {
        &mut self.spec.actors[actor]
    }

    /// Returns mutable access to a register.
    pub fn register_mut(&mut self, register: RegisterId) -> &mut RegisterSpec {
        &mut self.spec.registers[register]
    }

    /// Marks a register as early: a signal publishes each piece before the piece's last write firing has ended.
    pub fn early(&mut self, register: RegisterId) {
        let writers: Vec<_> = self.spec.writers(register).collect();
        for (action, port) in writers {
            let actor = self.spec.registers[register].producer;
            self.action_mut(ActionRef { actor, action }).outputs[port as usize].early = true;
        }
    }

    /// Returns the plan without checking it.
    pub fn build(self) -> Spec {
        self.spec
    }
}
