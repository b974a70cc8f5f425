//! Maps passes over the plan to steps.

use std::collections::VecDeque;

use shardflow_actors::spec::{ActorId, RegisterId, Spec};
use shardflow_actors::trace::{Cause, FiringRecord};

/// The passes of a session over its plan. The number of a firing gives a pass, not a step: a non-finite step runs twice
/// to find its first non-finite tensor, and a restore continues from another step.
#[derive(Clone, Debug, Default)]
pub(super) struct Passes {
    begun: u64,
    /// Passes, each with the number of steps done before it. From one mark to the next, steps are consecutive.
    pub(super) marks: VecDeque<(u64, u64)>,
}

const MARKS_MAX: usize = 256;

/// The pass over the plan to which a firing belongs.
pub fn pass_of(spec: &Spec, actor: ActorId, fired: &FiringRecord) -> u64 {
    let per_step = spec.actors[actor].actions[fired.action as usize].per_step;
    fired.firing / u64::from(per_step.max(1))
}

/// The condition that a firing waited for last, as text, and the register of this condition.
pub(crate) fn cause_of(cause: Cause) -> (&'static str, Option<RegisterId>) {
    match cause {
        Cause::Input(register) => ("input", Some(register)),
        Cause::Credit(register) => ("credit", Some(register)),
        Cause::Host => ("host", None),
        Cause::Own => ("own", None),
    }
}

impl Passes {
    pub(super) fn step_of(&self, pass: u64) -> u64 {
        let mark = self.marks.iter().rev().find(|(first, _)| *first <= pass);
        mark.map_or(pass, |(first, steps)| steps + (pass - first))
    }

    /// Records the start of a pass; `steps` is the number of steps done before it.
    pub(super) fn begin(&mut self, steps: u64) {
        if self.step_of(self.begun) != steps || self.marks.is_empty() {
            self.marks.push_back((self.begun, steps));
            if self.marks.len() > MARKS_MAX {
                self.marks.pop_front();
            }
        }
        self.begun += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::Passes;

    #[test]
    fn each_pass_maps_to_the_step_for_which_it_ran() {
        let mut passes = Passes::default();
        // Start from a checkpoint, repeat a non-finite step, and return to the checkpoint.
        let steps = [60, 61, 61, 62, 63, 60, 61];
        for step in steps {
            passes.begin(step);
        }
        assert_eq!((0..7).map(|pass| passes.step_of(pass)).collect::<Vec<_>>(), steps);
        assert_eq!(Vec::from(passes.marks), [(0, 60), (2, 61), (5, 60)]);
        assert_eq!(Passes::default().step_of(3), 3);
    }
}
