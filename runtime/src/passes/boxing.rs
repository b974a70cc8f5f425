//! Inserts nodes for layout and placement changes. If a node requires an input in another layout, the pass inserts the
//! steps of the cheapest boxing plan. Each step's result is a version of the tensor, which later readers can reuse.

use std::collections::BTreeMap;
use std::sync::Arc;

use shardflow_actors::label::Role;
use shardflow_kernels::op::Op;

use crate::boxing::step::{BoxingStep, StepKind};
use crate::boxing::{BoxingPlan, Planner};
use crate::graph::{Graph, Node, NodeOp, Rate, TensorInfo, Var};
use crate::sbp::{NdSbp, PlacedLayout};

/// Whether forward layout changes that the user did not write are inserted or refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Boxing {
    /// The pass inserts these layout changes, and `explain` lists them.
    #[default]
    Automatic,
    /// These layout changes are errors, except slices, transfers, and the reductions of partial terms that row-parallel
    /// layouts imply.
    Explicit,
}

/// Inserts the steps. Every tensor must have a layout, and every kernel a signature. Records an error in the graph for
/// each change that no sequence of collectives can make, or that `mode` forbids.
pub fn insert(graph: &mut Graph, planner: &mut Planner, mode: Boxing) {
    let mut pass = BoxingPass { planner, mode, graph, rebuilt: Vec::new(), versions: BTreeMap::new() };
    for index in 0..pass.graph.nodes.len() {
        let mut node = pass.graph.nodes[index].clone();
        let placement = pass.graph.placements[node.placement].clone();
        for (port, sbp) in required_layouts(pass.graph, &node) {
            let required = PlacedLayout { placement: placement.clone(), sbp };
            match pass.version(node.inputs[port], &required, &node) {
                Ok(var) => node.inputs[port] = var,
                Err(message) => pass.graph.error(&node.name, message, node.location),
            }
        }
        pass.graph.push_rebuilt(&mut pass.rebuilt, node);
    }
    graph.nodes = pass.rebuilt;
}

/// The layouts in which a node requires its inputs: `(input, layout)`.
fn required_layouts(graph: &Graph, node: &Node) -> Vec<(usize, NdSbp)> {
    let layout = |var: Var| graph.layout(var).clone();
    match &node.op {
        NodeOp::Relayout => vec![(0, layout(node.outputs[0]))],
        NodeOp::Kernel(Op::AdamW { .. }) => vec![(0, layout(node.updates[0]))],
        NodeOp::NormSums { indices } => {
            let parameters = graph.parameters();
            indices.iter().enumerate().map(|(port, p)| (port, layout(parameters[*p]))).collect()
        }
        _ => match &node.signature {
            Some(signature) => signature.inputs.iter().cloned().enumerate().collect(),
            None => Vec::new(),
        },
    }
}

struct BoxingPass<'a> {
    planner: &'a mut Planner,
    mode: Boxing,
    graph: &'a mut Graph,
    rebuilt: Vec<Node>,
    /// The versions of each original tensor. The first version is the original.
    versions: BTreeMap<Var, Vec<Var>>,
}

impl BoxingPass<'_> {
    fn layout(&self, var: Var) -> PlacedLayout {
        let producer = self.graph.tensor(var).producer;
        let placement = self.graph.placements[self.rebuilt[producer.index()].placement].clone();
        PlacedLayout { placement, sbp: self.graph.layout(var).clone() }
    }

    /// Returns the version of `var` in this layout. If there is none, adds the steps that make one for `reader`.
    fn version(&mut self, var: Var, required: &PlacedLayout, reader: &Node) -> Result<Var, String> {
        let versions = self.versions.entry(var).or_insert_with(|| vec![var]).clone();
        if let Some(found) = versions.iter().find(|v| self.layout(**v) == *required) {
            return Ok(*found);
        }
        let info = self.graph.tensor(var).clone();
        let mut best: Option<(Var, BoxingPlan)> = None;
        for version in versions {
            let (layout, planner) = (self.layout(version), &mut self.planner);
            let plan = planner.plan(&info.shape, info.dtype, &layout, required).map_err(|e| e.to_string())?;
            if best.as_ref().is_none_or(|b| plan.cost_seconds < b.1.cost_seconds) {
                best = Some((version, plan));
            }
        }
        let Some((mut current, plan)) = best else { return Ok(var) };
        if self.mode == Boxing::Explicit && reader.role == Role::Forward && !matches!(reader.op, NodeOp::Relayout) {
            let needs_relayout = |s: &&BoxingStep| {
                !matches!(
                    s.kind,
                    StepKind::AllReduce(_) | StepKind::ReduceScatter(_) | StepKind::Slice | StepKind::Transfer
                )
            };
            if let Some(step) = plan.steps.iter().find(needs_relayout) {
                let name = &info.name;
                return Err(format!(
                    "{name} needs a layout change that the program does not contain: {step}; add it with `relayout`, or compile with `Boxing::Automatic`"
                ));
            }
        }
        let transfer = plan.steps.iter().position(|s| s.kind == StepKind::Transfer);
        let source = &self.rebuilt[self.graph.tensor(current).producer.index()];
        let source_role = (source.role, source.rate);
        for (position, step) in plan.steps.into_iter().enumerate() {
            // Steps before a transfer have the role of the tensor's producer, unless the tensor has `Rate::Step`.
            let before = transfer.is_some_and(|t| position < t) && info.rate == Rate::MicroBatch;
            let role = if before { source_role } else { (reader.role, reader.rate) };
            current = self.push_step(current, &info, step, role, reader);
            self.versions.entry(var).or_default().push(current);
        }
        Ok(current)
    }

    fn push_step(
        &mut self,
        input: Var,
        info: &TensorInfo,
        step: BoxingStep,
        (role, rate): (Role, Rate),
        reader: &Node,
    ) -> Var {
        let placement = self.graph.placements.iter().position(|p| *p == step.to.placement);
        let placement = placement.expect("a step starts and ends on placements of the graph");
        let layout = Some(step.to.sbp.clone());
        let name = info.name.clone();
        // For a reader that runs in each micro-batch, a parameter is converted again in each micro-batch.
        let info = TensorInfo { layout, rate, saved_shape: None, ..info.clone() };
        let out = self.graph.new_tensor(info, reader.location);
        let node = Node::between(name, NodeOp::Boxing(Arc::new(step)), (input, out), placement, reader);
        self.graph.push_rebuilt(&mut self.rebuilt, Node { role, rate, ..node });
        out
    }
}
