//! The share of a step in which compute actors stand idle, measured and predicted: 1 - busy / (actors x elapsed), where a step
//! lasts from the first launch of a compute actor in it to the last end. Both are counted by the same code.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use shardflow_actors::simulate::{SimulationOptions, Timing, simulate};
use shardflow_actors::spec::{ActorId, Spec, StreamKind};
use shardflow_actors::trace::RING_FIRINGS;

use crate::session::observer::Observer;

/// Shares are the mean of so many newest whole steps.
const STEPS_COUNTED: usize = 8;
/// Steps that are not whole yet, or never will be because firings were lost.
const STEPS_OPEN_MAX: usize = 64;
/// Durations of firings are the mean over so many newest steps.
const STEPS_TIMED: u64 = 32;

/// One step of all compute actors.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    firings: u64,
    first_ns: u64,
    last_ns: u64,
    busy_ns: u64,
}

/// Counts steps as firings come in, in any order.
#[derive(Debug)]
pub(super) struct Bubble {
    /// Of the plan, or of this process's part of it.
    actors: u64,
    firings_per_step: u64,
    open: BTreeMap<u64, Use>,
    whole: BTreeMap<u64, f64>,
}

impl Bubble {
    pub(super) fn new(spec: &Spec, is_here: impl Fn(usize) -> bool) -> Self {
        let compute = spec.actors.iter().filter(|actor| actor.stream == StreamKind::Compute && is_here(actor.device));
        let per_step = compute.map(|actor| actor.actions.iter().map(|action| u64::from(action.per_step)).sum::<u64>());
        let (actors, firings_per_step) = per_step.fold((0, 0), |(actors, firings), more| (actors + 1, firings + more));
        Self { actors, firings_per_step, open: BTreeMap::new(), whole: BTreeMap::new() }
    }

    /// One firing that has ended.
    pub(super) fn add(&mut self, spec: &Spec, actor: ActorId, (action, firing): (u32, u64), (from, to): (u64, u64)) {
        let actor = &spec.actors[actor.0 as usize];
        let per_step = u64::from(actor.actions[action as usize].per_step);
        if actor.stream != StreamKind::Compute || per_step == 0 {
            return;
        }
        let step = firing / per_step;
        let of = self.open.entry(step).or_insert(Use { first_ns: u64::MAX, ..Use::default() });
        of.firings += 1;
        of.busy_ns += to.saturating_sub(from);
        (of.first_ns, of.last_ns) = (of.first_ns.min(from), of.last_ns.max(to));
        if of.firings == self.firings_per_step {
            let elapsed_ns = self.actors * (of.last_ns - of.first_ns);
            let share = 1.0 - of.busy_ns as f64 / elapsed_ns.max(1) as f64;
            self.open.remove(&step);
            self.whole.insert(step, share);
        }
        while self.open.len() > STEPS_OPEN_MAX {
            self.open.pop_first();
        }
        while self.whole.len() > STEPS_COUNTED {
            self.whole.pop_first();
        }
    }

    /// The mean of the newest whole steps.
    pub(super) fn share(&self) -> Option<f64> {
        let steps = self.whole.len();
        (steps > 0).then(|| self.whole.values().sum::<f64>() / steps as f64)
    }
}

/// What the simulator says of one step, from the mean duration of each action's newest firings.
#[derive(Debug, Serialize)]
pub(super) struct Prediction {
    session: String,
    step_us: u64,
    bubble: Option<f64>,
    /// Of each firing: actor, action, firing, first microsecond, duration.
    firings: Vec<u64>,
}

impl Prediction {
    /// `None` before each action has fired, and where the process hosts a part of the plan only: it knows no durations of the others.
    pub(super) fn of(observer: &Observer) -> Option<Self> {
        if observer.process_map().processes > 1 {
            return None;
        }
        let spec = Arc::new(observer.plan().spec.clone());
        Self::from(&spec, durations_ns(observer)?, observer.started().to_string())
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

/// By actor and action: the mean.
fn durations_ns(observer: &Observer) -> Option<Vec<Vec<u64>>> {
    let spec = &observer.plan().spec;
    let mut all = Vec::with_capacity(spec.actors.len());
    for (index, actor) in spec.actors.iter().enumerate() {
        let id = ActorId(index as u32);
        let end = observer.fired(id, u64::MAX).next;
        let told = observer.fired(id, end.saturating_sub(RING_FIRINGS as u64)).firings;
        let mut own = Vec::with_capacity(actor.actions.len());
        for (action, spec) in actor.actions.iter().enumerate() {
            let mine = || told.iter().filter(|fired| fired.action == action as u32);
            let newest = mine().map(|fired| fired.firing).max()?;
            let from = newest.saturating_sub(STEPS_TIMED * u64::from(spec.per_step));
            let timed: Vec<u64> = mine().filter(|f| f.firing >= from).map(|f| f.ended_ns - f.launched_ns).collect();
            own.push(timed.iter().sum::<u64>() / timed.len().max(1) as u64);
        }
        all.push(own);
    }
    Some(all)
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
    fn predicted_bubbles_are_those_of_the_formula() {
        for schedule in [PipelineSchedule::Gpipe, PipelineSchedule::OneForwardOneBackward] {
            let spec = Arc::new(pipeline(4, 8, schedule));
            let durations = vec![vec![MS, 2 * MS]; 4];
            let predicted = Prediction::from(&spec, durations, "7".into()).expect("it does not get stuck");
            assert_eq!((predicted.session.as_str(), predicted.step_us), ("7", 33_000), "{schedule:?}");
            assert!((predicted.bubble.expect("a step") - 3.0 / 11.0).abs() < 1e-9, "{schedule:?}: {predicted:?}");
            assert_eq!(predicted.firings.len(), 5 * 4 * 2 * 8);
            let last = predicted.firings.chunks(5).map(|firing| firing[3] + firing[4]).max();
            assert_eq!(last, Some(33_000), "{schedule:?}");
        }
    }

    /// One micro-batch through two stages: forward takes 10, backward 20, and each stage stands idle while the other works.
    const STEP: [(u32, u32, u64, u64); 4] = [(0, 0, 0, 10), (1, 0, 10, 20), (1, 1, 20, 40), (0, 1, 40, 60)];

    fn add(bubble: &mut Bubble, spec: &Spec, step: u64, firings: &[(u32, u32, u64, u64)]) {
        for (actor, action, from, to) in firings {
            bubble.add(spec, ActorId(*actor), (*action, step), (*from, *to));
        }
    }

    #[test]
    fn a_step_counts_when_it_is_whole() {
        let spec = pipeline(2, 1, PipelineSchedule::Gpipe);
        let mut bubble = Bubble::new(&spec, |_| true);
        // As actors tell: one after the other, so that steps mix.
        add(&mut bubble, &spec, 0, &STEP[..3]);
        add(&mut bubble, &spec, 1, &[(0, 0, 0, 10), (1, 0, 0, 10), (0, 1, 10, 20)]);
        assert_eq!(bubble.share(), None);
        add(&mut bubble, &spec, 0, &STEP[3..]);
        assert_eq!(bubble.share(), Some(0.5));
        add(&mut bubble, &spec, 1, &[(1, 1, 10, 20)]);
        assert_eq!(bubble.share(), Some(0.25), "the mean of one that is half idle and one that is not at all");
        for step in 2..10 {
            add(&mut bubble, &spec, step, &[(0, 0, 0, 10), (1, 0, 0, 10), (0, 1, 10, 20), (1, 1, 10, 20)]);
        }
        assert_eq!(bubble.share(), Some(0.0), "of the newest eight");
    }

    #[test]
    fn steps_with_lost_firings_are_forgotten() {
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
    fn only_actors_that_compute_here_count() {
        let mut spec = pipeline(2, 1, PipelineSchedule::Gpipe);
        let mut own = Bubble::new(&spec, |device| device == 0);
        add(&mut own, &spec, 0, &[STEP[0], STEP[3]]);
        assert_eq!(own.share(), Some(0.5), "30 of 60");
        spec.actors[1].stream = StreamKind::Communication;
        let mut computing = Bubble::new(&spec, |_| true);
        add(&mut computing, &spec, 0, &STEP);
        assert_eq!(computing.share(), Some(0.5));
    }
}
