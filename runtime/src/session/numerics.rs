//! Steps that are not finite. The host sees loss and gradient norm before anything is updated (the action `decide` of a plan),
//! so such a step changes no weight, whatever is to become of it. It is then run once more, with every stream looking at what
//! it writes, which is how the first tensor gets its name: same weights, same batch, same masks, so the same bits.
//!
//! To go back further than to the weights before the step, let the step pass, load an older checkpoint with
//! [`Session::restore_newest`], and train on with other data: the same batch would give the same end.
//!
//! A step whose update would make a parameter or a moment infinite counts as not finite, too: see [`crate::graph::optimizer`].

use std::fmt;

use shardflow_actors::snapshot::NotFinite;
use shardflow_kernels::tensor::HostTensor;

use super::exchange::Word;
use super::step::Inputs;
use super::{Session, SessionError, StepReport};
use crate::graph::builder::STATE_PREFIX;
use crate::graph::optimizer::Bounds;
use crate::graph::{Node, NodeOp, Phase, Rate, Var};
use crate::plan::ActionKey;
use crate::text::counted;

/// What becomes of a step whose loss or gradients are not finite. Nothing is updated by it in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnNonFinite {
    /// [`Session::step`] fails with [`SessionError::NonFinite`], on all processes. The session holds the weights of before.
    #[default]
    Stop,
    /// The step counts as done, and [`StepReport::non_finite`] tells of it.
    Skip {
        /// With more of them one after another, the step fails as with `Stop`.
        in_a_row_max: u32,
    },
}

/// A step that was not finite: the same on all processes.
#[derive(Clone, Debug, PartialEq)]
pub struct NonFinite {
    /// Steps done before it.
    pub step: u64,
    /// The loss.
    pub loss: Option<f32>,
    /// Global norm of the gradients.
    pub grad_norm: Option<f64>,
    /// The tensors that the update could have made infinite from a finite loss and gradients; see [`crate::graph::optimizer`].
    pub overflow: Option<&'static str>,
    /// Where it began. `None` with an `overflow`, or where the same step came out finite when it was run again: memory or a
    /// kernel is at fault.
    pub first: Option<FirstNonFinite>,
}

/// The first tensor, in the order of the program and in the first micro-batch that has one, which is not finite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstNonFinite {
    /// Its name in the program.
    pub tensor: String,
    /// What makes it, for instance `einsum`, `parameter` or `input`.
    pub op: String,
    /// When.
    pub phase: Phase,
    /// In which micro-batch; `None` for what is made once a step, and for parameters.
    pub micro_batch: Option<usize>,
    /// On which device.
    pub device: usize,
    /// Elements of the device's part that are infinite or no number.
    pub elements: u64,
    /// Line of the program that asks for it.
    pub location: String,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} is not finite", self.step + 1)?;
        self.loss.iter().try_for_each(|loss| write!(f, ", loss {loss}"))?;
        self.grad_norm.iter().try_for_each(|norm| write!(f, ", gradient norm {norm}"))?;
        match (&self.first, self.overflow) {
            (None, Some(what)) => {
                write!(
                    f,
                    "; its update could make {what} larger than any float: clip the gradients, or lower the learning rate"
                )
            }
            (None, None) => {
                write!(f, "; the repeated step was finite: suspect the memory of this machine, or a kernel")
            }
            (Some(first), _) => write!(f, "; first in {first}"),
        }
    }
}

impl fmt::Display for FirstNonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tensor, op, device, elements, location, .. } = self;
        write!(f, "{tensor} ({op}), ")?;
        match (op.as_str(), self.micro_batch, self.phase) {
            ("parameter", ..) => {}
            (_, Some(micro_batch), Phase::Backward) => write!(f, "backward of micro-batch {micro_batch}, ")?,
            (_, Some(micro_batch), _) => write!(f, "forward of micro-batch {micro_batch}, ")?,
            (_, None, _) => write!(f, "at the end of the step, ")?,
        }
        write!(f, "{} on device {device} ({location})", counted(elements, "element"))
    }
}

impl StepReport {
    /// Loss and gradient norm are numbers.
    pub(super) fn is_finite(&self) -> bool {
        self.loss.is_none_or(f32::is_finite) && self.grad_norm.is_none_or(f64::is_finite)
    }

    /// A step whose update alone would not be finite: there is no tensor to look for.
    pub(super) fn overflow(&self, overflow: Option<&'static str>) -> NonFinite {
        NonFinite { step: self.step, loss: self.loss, grad_norm: self.grad_norm, overflow, first: None }
    }
}

/// Where a tensor that is not finite was made. In the order of the fields, the first is the cause of what follows: within a
/// micro-batch nodes run in the program's order, and what is made once a step comes after all micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Origin {
    once_a_step: bool,
    micro_batch: u32,
    node: u32,
    /// Index among what the node makes.
    output: u8,
    device: u32,
    elements: u32,
}

impl Origin {
    /// Its place in a word that processes exchange; words are in the same order as origins.
    fn word(self) -> Word {
        let Self { once_a_step, micro_batch, node, output, device, elements } = self;
        let made = u64::from(once_a_step) << 63 | u64::from(micro_batch) << 40 | u64::from(node) << 8;
        [made | u64::from(output), u64::from(device) << 32 | u64::from(elements)]
    }

    fn of_word([made, place]: Word) -> Self {
        Self {
            once_a_step: made >> 63 != 0,
            micro_batch: (made << 1 >> 41) as u32,
            node: (made >> 8) as u32,
            output: made as u8,
            device: (place >> 32) as u32,
            elements: place as u32,
        }
    }
}

/// Said by a process that has found nothing.
const NOTHING: Word = [u64::MAX; 2];

impl Session {
    /// Bounds of parameters and moments after the update that this step asks for; those of now where it updates nothing.
    pub(super) fn bounds_after(&self, report: &StepReport, learning_rate: f32) -> Bounds {
        match (self.plan.graph.objective, report.grad_norm) {
            (Some(objective), Some(norm)) => objective.optimizer.bounds_after(self.bounds, norm, learning_rate),
            _ => Bounds::default(),
        }
    }

    /// Notes the largest element of what is written to a device's part of a parameter or a moment.
    pub(super) fn note_largest(&mut self, var: Var, part: &HostTensor) {
        let largest = part.as_f32().unwrap_or_default().iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let bounds = &mut self.bounds;
        let name = self.plan.graph.tensor(var).name.strip_prefix(STATE_PREFIX);
        let bound = match name.and_then(|name| name.split_once('/')) {
            None => &mut bounds.parameter,
            Some(("m", _)) => &mut bounds.first,
            Some(_) => &mut bounds.second,
        };
        *bound = bound.max(f64::from(largest));
    }

    /// Takes the largest bounds that any process has, after each has written its own parts; all processes call it.
    pub(super) fn agree_on_bounds(&mut self) -> Result<(), SessionError> {
        if self.process_map.processes == 1 {
            return Ok(());
        }
        // Numbers that are not negative are in the order of their bits.
        let Bounds { parameter, first, second, .. } = self.bounds;
        let half = |bound: f64| u64::from((bound as f32).next_up().to_bits());
        let words = self.exchange([parameter.to_bits(), half(first) << 32 | half(second)])?;
        let largest = |of: fn(&Word) -> u64| words.iter().map(of).max().unwrap_or_default();
        let moment = |bits: u64| f64::from(f32::from_bits(bits as u32));
        self.bounds.parameter = f64::from_bits(largest(|word| word[0]));
        self.bounds.first = moment(largest(|word| word[1] >> 32));
        self.bounds.second = moment(largest(|word| word[1] & u64::from(u32::MAX)));
        Ok(())
    }

    /// Runs the step that has just been called off once more, and finds where it goes wrong. All processes call it.
    pub(super) fn trace(&mut self, inputs: &Inputs<'_>, report: &StepReport) -> Result<NonFinite, SessionError> {
        self.check_finite(true);
        let run = self.run(inputs).and_then(|_| self.decide(f32::NAN));
        self.check_finite(false);
        run?;
        let found = self.running.as_ref().map(|running| running.take_not_finite()).unwrap_or_default();
        let made = found.iter().filter_map(|found| self.origin(found));
        let own = made.chain(self.parameters_not_finite()?).min().map_or(NOTHING, Origin::word);
        let first = self.exchange(own)?.into_iter().min().filter(|word| *word != NOTHING);
        let first = first.and_then(|word| self.describe(Origin::of_word(word)));
        Ok(NonFinite { first, ..report.overflow(None) })
    }

    /// Lets the step pass, or not.
    pub(super) fn pass_over(&mut self, found: &NonFinite) -> Result<(), SessionError> {
        self.skipped_in_a_row += 1;
        match self.on_non_finite {
            OnNonFinite::Skip { in_a_row_max } if self.skipped_in_a_row <= in_a_row_max => Ok(()),
            _ => Err(SessionError::NonFinite(Box::new(found.clone()))),
        }
    }

    fn check_finite(&self, on: bool) {
        self.running.iter().for_each(|running| running.check_finite(on));
    }

    fn origin(&self, found: &NotFinite) -> Option<Origin> {
        let (actor, action) = (found.actor.0 as usize, found.action as usize);
        let (spec, plan) = (&self.plan.spec.actors[actor], &self.plan.actions[actor][action]);
        let graph = &self.plan.graph;
        let node = match (plan.nodes.get(found.launch), plan.key) {
            // The learning rate that called the update off.
            (_, ActionKey::Decide) => return None,
            (Some(node), _) => *node,
            // The host's own tensors, which come in after the launches.
            (None, _) => graph.tensor(*plan.host.as_ref()?.vars.get(found.write)?).producer,
        };
        let per_step = u64::from(spec.actions[action].per_step).max(1);
        let once_a_step =
            graph.nodes()[node.index()].outputs.first().is_none_or(|v| graph.tensor(*v).rate == Rate::Step);
        Some(Origin {
            once_a_step,
            micro_batch: if once_a_step { 0 } else { (found.firing % per_step) as u32 },
            node: node.0,
            output: if plan.nodes.len() > found.launch { found.write as u8 } else { 0 },
            device: spec.device as u32,
            elements: u32::try_from(found.elements).unwrap_or(u32::MAX),
        })
    }

    /// Parameters of this process's devices; they may have been loaded so.
    fn parameters_not_finite(&self) -> Result<Vec<Origin>, SessionError> {
        let graph = &self.plan.graph;
        let mut out = Vec::new();
        for device in self.process_map.own() {
            for resident in &self.plan.memory[device].residents {
                let node = graph.tensor(resident.var).producer;
                if !matches!(graph.nodes()[node.index()].op, NodeOp::Parameter { .. }) {
                    continue;
                }
                let part = self.arenas[&device].read_host(resident.offset, &resident.region.size, resident.dtype)?;
                let bad = part.as_f32().unwrap_or_default().iter().filter(|value| !value.is_finite()).count();
                if bad > 0 {
                    let elements = u32::try_from(bad).unwrap_or(u32::MAX);
                    let device = device as u32;
                    out.push(Origin { once_a_step: false, micro_batch: 0, node: node.0, output: 0, device, elements });
                }
            }
        }
        Ok(out)
    }

    fn describe(&self, origin: Origin) -> Option<FirstNonFinite> {
        let graph = &self.plan.graph;
        let node = graph.nodes().get(origin.node as usize)?;
        let made: Vec<&Var> = node.outputs.iter().chain(&node.updates).collect();
        let var = made.get(usize::from(origin.output)).or(made.first());
        Some(FirstNonFinite {
            tensor: var.map_or(node.name.clone(), |var| graph.tensor(**var).name.clone()),
            op: op_name(node).into(),
            phase: node.phase,
            micro_batch: (!origin.once_a_step).then_some(origin.micro_batch as usize),
            device: origin.device as usize,
            elements: u64::from(origin.elements),
            location: format!("{}:{}", node.location.file(), node.location.line()),
        })
    }
}

fn op_name(node: &Node) -> &str {
    match &node.op {
        NodeOp::Kernel(op) => op.name(),
        NodeOp::Custom(_) => "custom kernel",
        NodeOp::Accumulate => "sum over micro-batches",
        NodeOp::Boxing(_) | NodeOp::Relayout => "change of layout",
        NodeOp::Bucket { .. } => "all-reduce of gradients",
        NodeOp::NormSums { .. } => "squares of gradients",
        NodeOp::ClipScale { .. } => "clip scale",
        NodeOp::Input => "input",
        NodeOp::Parameter { .. } | NodeOp::Half { .. } => "parameter",
        NodeOp::State => "optimizer state",
    }
}
