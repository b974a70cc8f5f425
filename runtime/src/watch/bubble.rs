//! The pipeline bubble, measured and predicted by the same code: the share of a step in which compute actors are idle,
//! 1 - busy / (actors x elapsed). A step lasts from the first launch to the last end of a compute actor's firing.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use shardflow_actors::simulate::{SimulationOptions, Timing, simulate};
use shardflow_actors::spec::{ActionSpec, ActorId, ActorSpec, Spec, StreamKind};

use crate::session::observer::Observer;

/// The bubble is the mean over this number of newest complete steps.
const STEPS_COUNTED: usize = 8;
/// Maximum number of incomplete steps that are kept; a step with lost firings never becomes complete.
const STEPS_OPEN_MAX: usize = 64;
/// Predicted durations of firings are means over this number of newest steps.
const STEPS_TIMED: u64 = 32;

#[derive(Clone, Copy, Debug, Default)]
struct StepUse {
    firings: u64,
    first_ns: u64,
    last_ns: u64,
    busy_ns: u64,
}

/// Computes the bubble from firings in any order.
#[derive(Debug)]
pub(super) struct Bubble {
    /// Number of compute actors of the plan, or of this process's part of it.
    actors: u64,
    firings_per_step: u64,
    open: BTreeMap<u64, StepUse>,
    complete: BTreeMap<u64, f64>,
}

impl Bubble {
    pub(super) fn new(spec: &Spec, is_here: impl Fn(usize) -> bool) -> Self {
        let compute = spec.actors.values().filter(|actor| actor.stream == StreamKind::Compute && is_here(actor.device));
        let per_step = compute.map(|actor| actor.actions.iter().map(|action| u64::from(action.per_step)).sum::<u64>());
        let (actors, firings_per_step) = per_step.fold((0, 0), |(actors, firings), more| (actors + 1, firings + more));
        Self { actors, firings_per_step, open: BTreeMap::new(), complete: BTreeMap::new() }
    }

    pub(super) fn add(&mut self, spec: &Spec, actor: ActorId, (action, firing): (u32, u64), (from, to): (u64, u64)) {
        let actor = &spec.actors[actor];
        let per_step = u64::from(actor.actions[action as usize].per_step);
        if actor.stream != StreamKind::Compute || per_step == 0 {
            return;
        }
        let step = firing / per_step;
        let step_use = self.open.entry(step).or_insert(StepUse { first_ns: u64::MAX, ..StepUse::default() });
        step_use.firings += 1;
        step_use.busy_ns += to.saturating_sub(from);
        (step_use.first_ns, step_use.last_ns) = (step_use.first_ns.min(from), step_use.last_ns.max(to));
        if step_use.firings == self.firings_per_step {
            let elapsed_ns = self.actors * (step_use.last_ns - step_use.first_ns);
            let share = 1.0 - step_use.busy_ns as f64 / elapsed_ns.max(1) as f64;
            self.open.remove(&step);
            self.complete.insert(step, share);
        }
        while self.open.len() > STEPS_OPEN_MAX {
            self.open.pop_first();
        }
        while self.complete.len() > STEPS_COUNTED {
            self.complete.pop_first();
        }
    }

    /// The mean over the newest complete steps.
    pub(super) fn share(&self) -> Option<f64> {
        let steps = self.complete.len();
        (steps > 0).then(|| self.complete.values().sum::<f64>() / steps as f64)
    }
}

/// The simulator's prediction of one step, from the mean duration of each action's newest firings.
#[derive(Debug, Serialize)]
pub(super) struct Prediction {
    session: String,
    step_us: u64,
    bubble: Option<f64>,
    /// Five numbers per firing: actor, action, firing, start in microseconds, duration in microseconds.
    firings: Vec<u64>,
}

impl Prediction {
    /// `None` until each action has fired. Also `None` if other processes host a part of the plan, because the firings
    /// of that part have unknown durations.
    pub(super) fn of(observer: &Observer) -> Option<Self> {
        if observer.process_map().processes > 1 {
            return None;
        }
        let spec = Arc::new(observer.plan().spec.clone());
        Self::from(&spec, durations_ns(observer)?, observer.started.to_string())
    }

    fn from(spec: &Arc<Spec>, durations_ns: Vec<Vec<u64>>, session: String) -> Option<Self> {
        let run = simulate(spec, &Timing::measured(spec, durations_ns), &SimulationOptions::steps(1)).ok()?;
        let mut bubble = Bubble::new(spec, |_| true);
        let mut firings = Vec::with_capacity(run.timeline.len() * 5);
        for fired in &run.timeline {
            bubble.add(spec, fired.actor, (fired.action, fired.firing), (fired.start, fired.end));
            let (actor, action) = (u64::from(fired.actor.0), u64::from(fired.action));
            firings.extend([actor, action, fired.firing, fired.start / 1000, (fired.end - fired.start) / 1000]);
        }
        Some(Self { session, step_us: run.makespan / 1000, bubble: bubble.share(), firings })
    }
}

/// Mean durations, by actor and action.
fn durations_ns(observer: &Observer) -> Option<Vec<Vec<u64>>> {
    let spec = &observer.plan().spec;
    let mean_durations = |(id, actor): (ActorId, &ActorSpec)| {
        let recent = observer.kept_firings(id);
        let mean = |(action, spec): (usize, &ActionSpec)| {
            let of_action = || recent.iter().filter(|fired| fired.action == action as u32);
            let newest = of_action().map(|fired| fired.firing).max()?;
            let from = newest.saturating_sub(STEPS_TIMED * u64::from(spec.per_step));
            let timed: Vec<u64> =
                of_action().filter(|f| f.firing >= from).map(|f| f.ended_ns - f.launched_ns).collect();
            Some(timed.iter().sum::<u64>() / timed.len().max(1) as u64)
        };
        actor.actions.iter().enumerate().map(mean).collect()
    };
    spec.actors.iter().map(mean_durations).collect()
}

#[cfg(test)]
mod tests {
    use shardflow_actors::pipeline::{Pipeline, PipelineSchedule};

    use super::*;

    const MS: u64 = 1_000_000;

    fn pipeline(stages: u32, micro_batches: u32, schedule: PipelineSchedule) -> Spec {
        let credits = match schedule {
            PipelineSchedule::Gpipe => vec![micro_batches; stages as usize],
            PipelineSchedule::OneForwardOneBackward => (1..=stages).rev().collect(),
        };
        Pipeline { micro_batches, credits, schedule, ordered: false }.build()
    }

    #[test]
    fn predicted_bubbles_match_the_formula() {
        for schedule in [PipelineSchedule::Gpipe, PipelineSchedule::OneForwardOneBackward] {
            let spec = Arc::new(pipeline(4, 8, schedule));
            let durations = vec![vec![MS, 2 * MS]; 4];
            let predicted = Prediction::from(&spec, durations, "7".into()).expect("the simulation ends");
            assert_eq!((predicted.session.as_str(), predicted.step_us), ("7", 33_000), "{schedule:?}");
            assert!((predicted.bubble.expect("a step") - 3.0 / 11.0).abs() < 1e-9, "{schedule:?}: {predicted:?}");
            assert_eq!(predicted.firings.len(), 5 * 4 * 2 * 8);
            let last = predicted.firings.chunks(5).map(|firing| firing[3] + firing[4]).max();
            assert_eq!(last, Some(33_000), "{schedule:?}");
        }
    }

    /// One micro-batch through two stages: forward takes 10, backward 20, and each stage is idle while the other works.
    const STEP: [(u32, u32, u64, u64); 4] = [(0, 0, 0, 10), (1, 0, 10, 20), (1, 1, 20, 40), (0, 1, 40, 60)];

    fn add(bubble: &mut Bubble, spec: &Spec, step: u64, firings: &[(u32, u32, u64, u64)]) {
        for (actor, action, from, to) in firings {
            bubble.add(spec, ActorId(*actor), (*action, step), (*from, *to));
        }
    }

    #[test]
    fn a_step_counts_once_it_is_complete() {
        let spec = pipeline(2, 1, PipelineSchedule::Gpipe);
        let mut bubble = Bubble::new(&spec, |_| true);
        // Firings are read actor by actor, so steps interleave.
        add(&mut bubble, &spec, 0, &STEP[..3]);
        add(&mut bubble, &spec, 1, &[(0, 0, 0, 10), (1, 0, 0, 10), (0, 1, 10, 20)]);
        assert_eq!(bubble.share(), None);
        add(&mut bubble, &spec, 0, &STEP[3..]);
        assert_eq!(bubble.share(), Some(0.5));
        add(&mut bubble, &spec, 1, &[(1, 1, 10, 20)]);
        assert_eq!(bubble.share(), Some(0.25), "the mean of one step that is half idle and one without idle time");
        for step in 2..10 {
            add(&mut bubble, &spec, step, &[(0, 0, 0, 10), (1, 0, 0, 10), (0, 1, 10, 20), (1, 1, 10, 20)]);
        }
        assert_eq!(bubble.share(), Some(0.0), "the mean of the newest eight steps");
    }

    #[test]
    fn steps_with_lost_firings_are_dropped() {
        let spec = pipeline(2, 1, PipelineSchedule::Gpipe);
        let mut bubble = Bubble::new(&spec, |_| true);
        for step in 0..200 {
            add(&mut bubble, &spec, step, &STEP[1..]);
        }
        assert_eq!((bubble.share(), bubble.open.len()), (None, STEPS_OPEN_MAX));
        add(&mut bubble, &spec, 200, &STEP);
        assert_eq!(bubble.share(), Some(0.5));
    }

    #[test]
    fn only_compute_actors_of_this_process_count() {
        let mut spec = pipeline(2, 1, PipelineSchedule::Gpipe);
        let mut own = Bubble::new(&spec, |device| device == 0);
        add(&mut own, &spec, 0, &[STEP[0], STEP[3]]);
        assert_eq!(own.share(), Some(0.5), "idle for 30 of 60");
        spec.actors[ActorId(1)].stream = StreamKind::Communication;
        let mut all = Bubble::new(&spec, |_| true);
        add(&mut all, &spec, 0, &STEP);
        assert_eq!(all.share(), Some(0.5));
    }
}
