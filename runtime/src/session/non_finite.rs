//! Maintains the bounds of parameters and moments, and finds the first Inf or NaN of a non-finite step.

use shardflow_actors::snapshot::NotFinite;

use super::Session;
use super::batch::Inputs;
use super::error::SessionError;
use super::numerics::{FirstNonFinite, NonFinite};
use super::report::StepReport;
use crate::graph::optimizer::Bounds;
use crate::graph::{Node, NodeOp, Rate, Var};
use crate::plan::HostTransfer;

/// Where a non-finite tensor was computed: 1 if once per step, else 0; micro-batch; node; index among its outputs;
/// device; number of non-finite elements. Micro-batches come first, each with its nodes in the program's order. No
/// tensor depends on one with a greater origin, so the smallest origin is the first cause.
type Origin = [u64; 6];

/// The origin of a process that has found no non-finite tensor.
const NOT_FOUND: Origin = [u64::MAX; 6];

impl Session {
    /// Sets each bound to its largest value on any process. All processes call it after writing their own parts.
    pub(super) fn agree_on_bounds(&mut self) -> Result<(), SessionError> {
        if self.process_map.processes == 1 {
            return Ok(());
        }
        // Non-negative floats have the same order as their bits.
        let Bounds { parameter, first, second, .. } = self.guard.bounds;
        let moment = |bound: f64| f64::from((bound as f32).next_up()).to_bits();
        let largest = self.largest_of_each(&[parameter.to_bits(), moment(first), moment(second)]);
        let largest = largest.map_err(|failure| self.fail(failure))?;
        let bounds = &mut self.guard.bounds;
        let own = [&mut bounds.parameter, &mut bounds.first, &mut bounds.second];
        own.into_iter().zip(largest).for_each(|(bound, largest)| *bound = f64::from_bits(largest));
        Ok(())
    }

    /// Repeats the step whose update was cancelled, and finds its first non-finite tensor. All processes call it.
    pub(super) fn find_first_non_finite(
        &mut self,
        inputs: &Inputs<'_>,
        report: &StepReport,
    ) -> Result<NonFinite, SessionError> {
        self.running.iter().for_each(|running| running.check_finite(true));
        let run = self.run(inputs, &[].into(), Vec::new()).and_then(|_| self.take_results());
        let run = run.and_then(|_| self.decide(f32::NAN));
        self.running.iter().for_each(|running| running.check_finite(false));
        run?;
        let found = self.running.as_ref().map(|running| running.take_not_finite()).unwrap_or_default();
        let computed = found.iter().filter_map(|found| self.origin(found));
        let own = computed.chain(self.non_finite_parameters()?).min().unwrap_or(NOT_FOUND);
        let first = self.largest(own.map(|word| !word))?.map(|word| !word);
        let first = Some(first).filter(|origin| *origin != NOT_FOUND).and_then(|origin| self.describe(origin));
        Ok(NonFinite { first, ..report.overflow(None) })
    }

    fn origin(&self, found: &NotFinite) -> Option<Origin> {
        let action = found.action as usize;
        let (spec, plan) = (self.plan.spec.actor(found.actor), &self.plan.actions[found.actor][action]);
        let graph = &self.plan.graph;
        // Not an origin: a decision copies the NaN learning rate that cancelled the update, a fetch copies results.
        if plan.host.as_ref().is_some_and(|host| host.transfer != HostTransfer::Feed) {
            return None;
        }
        let node = *plan.nodes.get(found.launch)?;
        let per_step = u64::from(spec.actions[action].per_step).max(1);
        let once_per_step =
            graph.nodes()[node.index()].outputs.first().is_none_or(|v| graph.tensor(*v).rate == Rate::Step);
        let micro_batch = if once_per_step { 0 } else { found.firing % per_step };
        let (output, device) = (found.write as u64, spec.device as u64);
        Some([once_per_step.into(), micro_batch, node.0.into(), output, device, found.elements as u64])
    }

    /// Finds parameters with Inf or NaN elements on this process's devices. They may come from a loaded file.
    fn non_finite_parameters(&self) -> Result<Vec<Origin>, SessionError> {
        let graph = &self.plan.graph;
        let mut out = Vec::new();
        for device in self.process_map.own() {
            for resident in self.plan.residents(device) {
                let node = graph.tensor(resident.var).producer;
                if !matches!(graph.nodes()[node.index()].op, NodeOp::Parameter { .. }) {
                    continue;
                }
                let part = self.arenas[&device].read_host(resident.offset, &resident.region.size, resident.dtype)?;
                let bad = part.as_f32().unwrap_or_default().iter().filter(|value| !value.is_finite()).count();
                if bad > 0 {
                    out.push([0, 0, node.0.into(), 0, device as u64, bad as u64]);
                }
            }
        }
        Ok(out)
    }

    fn describe(&self, [once_per_step, micro_batch, node, output, device, elements]: Origin) -> Option<FirstNonFinite> {
        let graph = &self.plan.graph;
        let node = graph.nodes().get(node as usize)?;
        let outputs: Vec<&Var> = node.outputs.iter().chain(&node.updates).collect();
        let var = outputs.get(output as usize).or(outputs.first());
        Some(FirstNonFinite {
            tensor: var.map_or(node.name.clone(), |var| graph.tensor(**var).name.clone()),
            op: op_name(node).into(),
            role: node.role,
            micro_batch: (once_per_step == 0).then_some(micro_batch as usize),
            device: device as usize,
            elements,
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
        NodeOp::NormTotal => "gradient norm",
        NodeOp::ClipScale { .. } => "clip scale",
        NodeOp::Fetch => "fetch",
        NodeOp::Input => "input",
        NodeOp::Parameter { .. } | NodeOp::Bf16Copy { .. } => "parameter",
        NodeOp::State => "optimizer state",
    }
}
