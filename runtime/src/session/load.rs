//! Converts a plan's actions to the shell's programs: bases become memory, host ports become kernels.

use std::collections::BTreeMap;
use std::sync::Arc;

use crossbeam_channel::{Sender, unbounded};
use shardflow_actors::shell::{ActionProgram, BaseRef};
use shardflow_actors::spec::ActorId;
use shardflow_kernels::clock::Stamped;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::op::{Launch, Op, Program};
use shardflow_kernels::tensor::HostTensor;

use super::host::{Fetched, HostIn, HostOut};
use crate::graph::{Rate, Var};
use crate::plan::{ActionKey, ActionPlan, BaseKey, Plan};

/// The external actions of these actors other than feeds, each with its firings per step.
pub(super) fn external_actions(plan: &Plan, actors: &[ActorId]) -> Vec<(ActorId, u32, u32)> {
    let mut out = Vec::new();
    for actor in actors {
        let (spec, plans) = (&plan.spec.actors[actor.0 as usize], &plan.actions[actor.0 as usize]);
        for (index, (action, plan)) in spec.actions.iter().zip(plans).enumerate() {
            if action.external && !matches!(plan.key, ActionKey::Feed(_) | ActionKey::Decide) {
                out.push((*actor, index as u32, action.per_step));
            }
        }
    }
    out
}

/// Tensors of each device's fetches, in order; for all devices.
pub(super) fn fetches(plan: &Plan) -> BTreeMap<(usize, Rate), Vec<Var>> {
    let mut out = BTreeMap::new();
    for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
        for action in actions {
            if let (ActionKey::Fetch(rate), Some(host)) = (action.key, &action.host) {
                out.insert((actor.device, rate), host.vars.clone());
            }
        }
    }
    out
}

/// Creates the shell's programs from a plan.
pub(super) struct Loader<'a> {
    pub(super) plan: &'a Plan,
    /// By device; includes at least those of this process.
    pub(super) arenas: &'a BTreeMap<usize, Arena>,
    /// Feed ports of the programs created so far.
    pub(super) feeds: Vec<FeedPort>,
    pub(super) sender: Sender<Stamped<Fetched>>,
}

/// Port through which the host sends an action its tensors.
pub(super) struct FeedPort {
    pub(super) actor: ActorId,
    pub(super) action: u32,
    pub(super) device: usize,
    pub(super) rate: Rate,
    /// True if the host feeds it after it has seen the step's results.
    pub(super) decides: bool,
    pub(super) vars: Vec<Var>,
    pub(super) sender: Sender<Vec<HostTensor>>,
}

impl Loader<'_> {
    /// Creates an actor's programs, in the order of its actions.
    pub(super) fn programs(&mut self, actor: ActorId) -> Vec<ActionProgram> {
        (0..self.plan.actions[actor.0 as usize].len()).map(|action| self.program(actor, action)).collect()
    }

    fn program(&mut self, actor: ActorId, index: usize) -> ActionProgram {
        let action = &self.plan.actions[actor.0 as usize][index];
        let device = self.plan.spec.actors[actor.0 as usize].device;
        let mut launches = action.launches.clone();
        launches.extend(self.host_launch(actor, index, device, action));
        let name = format!("{} {}", self.plan.spec.actors[actor.0 as usize].name, action.name);
        let program = Program { name, launches, signals: action.signals.clone() };
        let fixed = |offset: usize| BaseRef::Fixed(Base { arena: self.arenas[&device].clone(), offset });
        let scratch = self.plan.memory[device].scratch.get(&actor).map_or(0, |s| s.0);
        let bases = action.bases.iter().map(|base| match base {
            BaseKey::Fixed => fixed(0),
            BaseKey::Scratch => fixed(scratch),
            BaseKey::Input(port) => BaseRef::Input(*port),
            BaseKey::Output(port) => BaseRef::Output(*port),
        });
        ActionProgram { bases: bases.collect(), program: Arc::new(program) }
    }

    fn host_launch(&mut self, actor: ActorId, index: usize, device: usize, action: &ActionPlan) -> Option<Launch> {
        let port = action.host.as_ref()?;
        let launch = |kernel, reads, writes| Launch {
            op: Op::Custom(kernel),
            reads,
            writes,
            accumulate: false,
            workspace: None,
        };
        match action.key {
            ActionKey::Feed(_) | ActionKey::Decide => {
                let rate = if let ActionKey::Feed(rate) = action.key { rate } else { Rate::Step };
                let decides = action.key == ActionKey::Decide;
                let (sender, receiver) = unbounded();
                let vars = port.vars.clone();
                self.feeds.push(FeedPort { actor, action: index as u32, device, rate, decides, vars, sender });
                Some(launch(Arc::new(HostIn { receiver }), Vec::new(), port.buffers.clone()))
            }
            ActionKey::Fetch(rate) => {
                let kernel = HostOut { device, rate, sender: self.sender.clone() };
                Some(launch(Arc::new(kernel), port.buffers.clone(), Vec::new()))
            }
            _ => None,
        }
    }
}
