//! The conditions that actors wait for in the running step. Waits for the next step are normal and do not count.

use shardflow_actors::protocol::Missing;
use shardflow_actors::snapshot::ActorSnapshot;
use shardflow_actors::spec::{ActorId, Spec};

pub(super) struct RunningStep<'a> {
    spec: &'a Spec,
    /// Number of steps that have begun, including this one, counted from the actors' firings.
    steps: u64,
}

impl<'a> RunningStep<'a> {
    /// The running step, according to the actors of this process.
    pub(super) fn new(spec: &'a Spec, snapshots: &[ActorSnapshot]) -> Self {
        let begun = |snapshot: &ActorSnapshot| {
            let actions = spec.actors[snapshot.actor].actions.iter().zip(&snapshot.firings);
            actions.map(|(action, firings)| firings.div_ceil(u64::from(action.per_step.max(1)))).max()
        };
        Self { spec, steps: snapshots.iter().filter_map(begun).max().unwrap_or_default() }
    }

    fn per_step(&self, actor: ActorId, action: u32) -> u64 {
        u64::from(self.spec.actors[actor].actions[action as usize].per_step)
    }

    /// The conditions for which an actor's unfinished actions of this step wait, each with its action.
    pub(super) fn missing<'s>(&self, snapshot: &'s ActorSnapshot) -> impl Iterator<Item = (u32, &'s Missing)> {
        let is_due =
            |action: u32| snapshot.firings[action as usize] < self.per_step(snapshot.actor, action) * self.steps;
        let due = snapshot.waiting.actions.iter().filter(move |waits| is_due(waits.action));
        due.flat_map(|waits| waits.missing.iter().map(|missing| (waits.action, missing)))
    }
}
