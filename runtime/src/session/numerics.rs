//! Steps with an Inf or NaN loss or gradient. The host sees loss and gradient norm before anything is updated (the
//! action `decide` of a plan), so such a step changes no weight. The step then runs again with Inf/NaN checks on all
//! launch outputs, which identifies the first such tensor: weights, batch and masks are the same, so the bits are the
//! same.
//!
//! To roll back further than to the weights before the step, accept the step, load an older checkpoint with
//! [`Session::restore_newest`], and continue with other data: the same batch would fail in the same way.
//!
//! A step whose update could make a parameter or a moment infinite also counts as not finite: see
//! [`crate::graph::optimizer`].

use std::fmt;

use shardflow_actors::snapshot::NotFinite;
use shardflow_kernels::tensor::HostTensor;

use super::exchange::NumberPair;
use super::step::Inputs;
use super::{Session, SessionError, StepReport};
use crate::graph::builder::STATE_PREFIX;
use crate::graph::optimizer::{Bounds, PARAMETER};
use crate::graph::{Node, NodeOp, Phase, Rate, Var};
use crate::plan::ActionKey;
use shardflow_job::text::counted;

/// How a step with an Inf or NaN loss or gradient is handled. In any case it updates nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnNonFinite {
    /// [`Session::step`] fails with [`SessionError::NonFinite`] on all processes. The session keeps the weights from
    /// before.
    #[default]
    Stop,
    /// The step counts as done, and [`StepReport::non_finite`] describes it.
    Skip {
        /// After more than this number of consecutive non-finite steps, the step fails as with `Stop`.
        in_a_row_max: u32,
    },
}

/// Description of a non-finite step; equal on all processes.
#[derive(Clone, Debug, PartialEq)]
pub struct NonFinite {
    /// Steps done before it.
    pub step: u64,
    /// The loss.
    pub loss: Option<f32>,
    /// Global norm of the gradients.
    pub grad_norm: Option<f64>,
    /// The tensors that the update could make infinite although loss and gradients are finite; see
    /// [`crate::graph::optimizer`].
    pub overflow: Option<&'static str>,
    /// The first non-finite tensor. `None` with an `overflow`, or if the repeated step was finite: then memory or a
    /// kernel is at fault.
    pub first: Option<FirstNonFinite>,
}

/// The first tensor with Inf or NaN elements, in the order of the program, in the first micro-batch that has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstNonFinite {
    /// Its name in the program.
    pub tensor: String,
    /// The operation that computes it, for instance `einsum`, `parameter` or `input`.
    pub op: String,
    /// The phase of the step.
    pub phase: Phase,
    /// The micro-batch; `None` for parameters and for tensors computed once per step.
    pub micro_batch: Option<usize>,
    /// The device.
    pub device: usize,
    /// Number of Inf or NaN elements in the device's part.
    pub elements: u64,
    /// Line of the program that creates the operation.
    pub location: String,
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} is not finite", self.step + 1)?;
        self.loss.iter().try_for_each(|loss| write!(f, ", loss {loss}"))?;
        self.grad_norm.iter().try_for_each(|norm| write!(f, ", gradient norm {norm}"))?;
        match (&self.first, self.overflow) {
            (None, Some(tensors)) => {
                let is_parameter = tensors == PARAMETER;
                let advice =
                    if is_parameter { "lower the learning rate" } else { "clip the gradients to a smaller norm" };
                write!(f, "; its update could make {tensors} overflow f32: {advice}")
            }
            (None, None) => {
                write!(f, "; the repeated step was finite: suspect this machine's memory or a kernel")
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
    /// True if loss and gradient norm are neither Inf nor NaN.
    pub(super) fn is_finite(&self) -> bool {
        self.loss.is_none_or(f32::is_finite) && self.grad_norm.is_none_or(f64::is_finite)
    }

    /// A step of which only the update would not be finite: there is no tensor to search for.
    pub(super) fn overflow(&self, overflow: Option<&'static str>) -> NonFinite {
        NonFinite { step: self.step, loss: self.loss, grad_norm: self.grad_norm, overflow, first: None }
    }
}

/// Where a non-finite tensor was computed. Ordered by its fields, the smallest origin is the cause of the others:
/// within a micro-batch nodes run in the program's order, and tensors of the whole step come after all micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Origin {
    once_per_step: bool,
    micro_batch: u32,
    node: u32,
    /// Index among the node's outputs.
    output: u8,
    device: u32,
    elements: u32,
}

impl Origin {
    /// Encodes the origin for an exchange between processes. Encoded pairs are ordered as origins are.
    fn to_pair(self) -> NumberPair {
        let Self { once_per_step, micro_batch, node, output, device, elements } = self;
        let computed = u64::from(once_per_step) << 63 | u64::from(micro_batch) << 40 | u64::from(node) << 8;
        [computed | u64::from(output), u64::from(device) << 32 | u64::from(elements)]
    }

    fn from_pair([computed, place]: NumberPair) -> Self {
        Self {
            once_per_step: computed >> 63 != 0,
            micro_batch: (computed << 1 >> 41) as u32,
            node: (computed >> 8) as u32,
            output: computed as u8,
            device: (place >> 32) as u32,
            elements: place as u32,
        }
    }
}

/// Sent by a process that has found no non-finite tensor.
const NOT_FOUND: NumberPair = [u64::MAX; 2];

impl Session {
    /// Bounds of parameters and moments after the update of this step; default bounds for a program without an
    /// objective.
    pub(super) fn bounds_after(&self, report: &StepReport, learning_rate: f32) -> Bounds {
        match (self.plan.graph.objective, report.grad_norm) {
            (Some(objective), Some(norm)) => objective.optimizer.bounds_after(self.bounds, norm, learning_rate),
            _ => Bounds::default(),
        }
    }

    /// Raises the bounds to the largest element written to a device's part of a parameter or a moment.
    pub(super) fn update_bounds(&mut self, var: Var, part: &HostTensor) {
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

    /// Sets the bounds to the largest of all processes, after each has written its own parts; all processes call it.
    pub(super) fn agree_on_bounds(&mut self) -> Result<(), SessionError> {
        if self.process_map.processes == 1 {
            return Ok(());
        }
        // Non-negative floats are ordered as their bits are.
        let Bounds { parameter, first, second, .. } = self.bounds;
        let half = |bound: f64| u64::from((bound as f32).next_up().to_bits());
        let pairs = self.exchange([parameter.to_bits(), half(first) << 32 | half(second)])?;
        let largest = |part: fn(&NumberPair) -> u64| pairs.iter().map(part).max().unwrap_or_default();
        let moment = |bits: u64| f64::from(f32::from_bits(bits as u32));
        self.bounds.parameter = f64::from_bits(largest(|pair| pair[0]));
        self.bounds.first = moment(largest(|pair| pair[1] >> 32));
        self.bounds.second = moment(largest(|pair| pair[1] & u64::from(u32::MAX)));
        Ok(())
    }

    /// Runs the step whose update was cancelled again, and finds its first non-finite tensor. All processes call it.
    pub(super) fn find_first_non_finite(
        &mut self,
        inputs: &Inputs<'_>,
        report: &StepReport,
    ) -> Result<NonFinite, SessionError> {
        self.check_finite(true);
        let run = self.run(inputs).and_then(|_| self.decide(f32::NAN));
        self.check_finite(false);
        run?;
        let found = self.running.as_ref().map(|running| running.take_not_finite()).unwrap_or_default();
        let computed = found.iter().filter_map(|found| self.origin(found));
        let own = computed.chain(self.non_finite_parameters()?).min().map_or(NOT_FOUND, Origin::to_pair);
        let first = self.exchange(own)?.into_iter().min().filter(|pair| *pair != NOT_FOUND);
        let first = first.and_then(|pair| self.describe(Origin::from_pair(pair)));
        Ok(NonFinite { first, ..report.overflow(None) })
    }

    /// Accepts a non-finite step, or returns an error, as [`OnNonFinite`] requires.
    pub(super) fn accept_non_finite(&mut self, found: &NonFinite) -> Result<(), SessionError> {
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
            // The NaN learning rate that cancelled the update.
            (_, ActionKey::Decide) => return None,
            (Some(node), _) => *node,
            // The host's own tensors, which follow the launches.
            (None, _) => graph.tensor(*plan.host.as_ref()?.vars.get(found.write)?).producer,
        };
        let per_step = u64::from(spec.actions[action].per_step).max(1);
        let once_per_step =
            graph.nodes()[node.index()].outputs.first().is_none_or(|v| graph.tensor(*v).rate == Rate::Step);
        Some(Origin {
            once_per_step,
            micro_batch: if once_per_step { 0 } else { (found.firing % per_step) as u32 },
            node: node.0,
            output: if plan.nodes.len() > found.launch { found.write as u8 } else { 0 },
            device: spec.device as u32,
            elements: u32::try_from(found.elements).unwrap_or(u32::MAX),
        })
    }

    /// Parameters of this process's devices with Inf or NaN elements, for instance from a loaded file.
    fn non_finite_parameters(&self) -> Result<Vec<Origin>, SessionError> {
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
                    out.push(Origin {
                        once_per_step: false,
                        micro_batch: 0,
                        node: node.0,
                        output: 0,
                        device,
                        elements,
                    });
                }
            }
        }
        Ok(out)
    }

    fn describe(&self, origin: Origin) -> Option<FirstNonFinite> {
        let graph = &self.plan.graph;
        let node = graph.nodes().get(origin.node as usize)?;
        let outputs: Vec<&Var> = node.outputs.iter().chain(&node.updates).collect();
        let var = outputs.get(usize::from(origin.output)).or(outputs.first());
        Some(FirstNonFinite {
            tensor: var.map_or(node.name.clone(), |var| graph.tensor(**var).name.clone()),
            op: op_name(node).into(),
            phase: node.phase,
            micro_batch: (!origin.once_per_step).then_some(origin.micro_batch as usize),
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
        NodeOp::Parameter { .. } | NodeOp::Bf16Copy { .. } => "parameter",
        NodeOp::State => "optimizer state",
    }
}
