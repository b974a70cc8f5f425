//! What actors wait for in the step that is under way; what they wait for in the next one is no trouble.

use shardflow_actors::protocol::Missing;
use shardflow_actors::snapshot::ActorSnapshot;
use shardflow_actors::spec::{ActorId, Spec};

/// A step that is under way.
pub(super) struct UnderWay<'a> {
    spec: &'a Spec,
    /// Steps begun, this one among them, as firings count them.
    steps: u64,
}

impl<'a> UnderWay<'a> {
    /// As the actors of this process show it.
    pub(super) fn new(spec: &'a Spec, snapshots: &[ActorSnapshot]) -> Self {
        let begun = |snapshot: &ActorSnapshot| {
            let of = spec.actors[snapshot.actor.0 as usize].actions.iter().zip(&snapshot.firings);
            of.map(|(action, firings)| firings.div_ceil(u64::from(action.per_step.max(1)))).max()
        };
        Self { spec, steps: snapshots.iter().filter_map(begun).max().unwrap_or_default() }
    }

    fn per_step(&self, actor: ActorId, action: u32) -> u64 {
        u64::from(self.spec.actors[actor.0 as usize].actions[action as usize].per_step)
    }

    /// What an actor's actions that have not fired as often as the step wants lack, with the action.
    pub(super) fn missing<'s>(&self, snapshot: &'s ActorSnapshot) -> impl Iterator<Item = (u32, &'s Missing)> {
        let is_due =
            |action: u32| snapshot.firings[action as usize] < self.per_step(snapshot.actor, action) * self.steps;
        let due = snapshot.waiting.actions.iter().filter(move |waits| is_due(waits.action));
        due.flat_map(|waits| waits.missing.iter().map(|missing| (waits.action, missing)))
    }
}
