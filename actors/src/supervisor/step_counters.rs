//! Counts the firings of this process's actors, and the steps that the host has begun.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use shardflow_kernels::clock::ReleaseClocks;

use crate::spec::{ActionRef, ActorId, ActorSpec, RegisterId, Spec};
use crate::table::Table;

const IDLE: u32 = u32::MAX;

pub(crate) struct StepCounters {
    spec: Arc<Spec>,
    hosted: Vec<ActorId>,
    /// For each actor: index of the action in flight, or `IDLE`.
    in_flight: Table<ActorId, AtomicU32>,
    /// Launched firings by actor and action.
    launched: Table<ActorId, Vec<AtomicU64>>,
    /// Ended firings by actor and action. A single total is not enough: an early firing of one action would hide a late
    /// firing of another action.
    completed: Table<ActorId, Vec<AtomicU64>>,
    /// Clocks of the race checker, from the times when actions last finished all their firings of a step.
    pub(crate) clocks: ReleaseClocks,
    /// Number of steps for which all tokens have been added.
    whole: AtomicU64,
    /// Number of steps for which some tokens have been added.
    begun: AtomicU64,
}

impl StepCounters {
    pub(super) fn new(spec: Arc<Spec>, hosted: Vec<ActorId>) -> Self {
        let zeros = |(_, actor): (ActorId, &ActorSpec)| actor.actions.iter().map(|_| AtomicU64::new(0)).collect();
        Self {
            hosted,
            in_flight: spec.actors.map(|_| AtomicU32::new(IDLE)),
            launched: spec.actors.map(zeros),
            completed: spec.actors.map(zeros),
            clocks: ReleaseClocks::default(),
            whole: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            spec,
        }
    }

    pub(crate) fn launch(&self, actor: ActorId, action: u32) {
        self.in_flight[actor].store(action, Ordering::Relaxed);
        self.launched[actor][action as usize].fetch_add(1, Ordering::AcqRel);
    }

    /// Records the end of a firing. Returns true if the firing ends the last step that has all its tokens.
    pub(crate) fn complete(&self, actor: ActorId, action: u32) -> bool {
        let completed = &self.completed[actor][action as usize];
        self.in_flight[actor].store(IDLE, Ordering::Relaxed);
        let per_step = u64::from(self.spec.action(actor, action).per_step);
        // Only this actor writes these counters. The race clock must be added before the count becomes visible.
        if (completed.load(Ordering::Relaxed) + 1).is_multiple_of(per_step) {
            self.clocks.add();
        }
        let completed = completed.fetch_add(1, Ordering::AcqRel) + 1;
        let whole = self.whole.load(Ordering::Acquire);
        // A step can end only when an action ends its last firing of that step.
        completed == whole * per_step && self.has_ended(whole)
    }

    pub(crate) fn set_steps(&self, whole: u64, begun: u64) {
        self.whole.store(whole, Ordering::Release);
        self.begun.store(begun, Ordering::Release);
    }

    pub(super) fn begun(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    /// True when every action of this process has finished its firings of the first `steps` steps.
    fn has_ended(&self, steps: u64) -> bool {
        self.hosted.iter().all(|actor| {
            let mut actions = self.completed[*actor].iter().zip(&self.spec.actor(*actor).actions);
            actions.all(|(done, action)| done.load(Ordering::Acquire) >= steps * u64::from(action.per_step))
        })
    }

    pub(crate) fn whole_steps_have_ended(&self) -> bool {
        self.has_ended(self.whole.load(Ordering::Acquire))
    }

    /// True while a begun step has firings left, even if they only wait for a token from the host.
    pub(crate) fn outstanding(&self) -> bool {
        !self.has_ended(self.begun())
    }

    /// Number of ended firings of this process's readers of a register; `None` while one of them is in the middle
    /// of a step.
    pub(crate) fn firings_of_readers(&self, register: RegisterId) -> Option<u64> {
        let readers = self.spec.register(register).readers.iter();
        let firings = |reader: &ActionRef| {
            let (actor, action) = (reader.actor, reader.action as usize);
            let done = self.completed[actor][action].load(Ordering::Acquire);
            let per_step = u64::from(self.spec.action(reader.actor, reader.action).per_step);
            let is_idle = self.launched[actor][action].load(Ordering::Acquire) == done;
            (is_idle && done.is_multiple_of(per_step)).then_some(done)
        };
        readers.filter(|reader| self.hosted.contains(&reader.actor)).map(firings).sum()
    }

    pub(crate) fn any_in_flight(&self) -> bool {
        self.in_flight.values().any(|a| a.load(Ordering::Relaxed) != IDLE)
    }

    pub(super) fn in_flight(&self, actor: ActorId) -> Option<String> {
        let action = self.in_flight[actor].load(Ordering::Relaxed);
        self.spec.actor(actor).actions.get(action as usize).map(|action| action.name.clone())
    }
}
