//! The ports through which a session's processes exchange host data. Their indices follow from the plan by arithmetic:
//! first the ports of whole tensors (outputs and parameters), which process 0 sends; then for each device the ports of its
//! residents and of its fetches, which process 0 receives.

use std::sync::Arc;

use shardflow_actors::remote::{Directory, HostRoute};

use super::options::Outputs;
use crate::graph::builder::{GRAD_SQUARES_OUTPUT, LOSS_OUTPUT};
use crate::graph::{TensorInfo, Var};
use crate::plan::segments::SegmentId;
use crate::plan::{ClassPlan, HostPort, HostTransfer, Plan};
use crate::process_map::ProcessMap;

/// Ports through which processes send host data to each other: whole tensors, fetch results and resident tensors.
#[derive(Clone, Debug)]
pub struct HostPorts {
    plan: Arc<Plan>,
    process_map: ProcessMap,
    outputs: Outputs,
    /// The tensors that process 0 sends as a whole: outputs, then parameters.
    wholes: Vec<Var>,
    /// The first port of each device. The last entry is the number of ports.
    first: Vec<u32>,
}

impl HostPorts {
    pub fn new(plan: Arc<Plan>, process_map: ProcessMap, outputs: Outputs) -> Self {
        let counts: Vec<u32> =
            (plan.class_plans.iter()).map(|class| (fetches(class).count() + class.residents.len()) as u32).collect();
        let fetched = plan.graph.outputs.iter().map(|output| output.tensor);
        let wholes: Vec<Var> = fetched.chain(plan.graph.parameters()).collect();
        let mut next = wholes.len() as u32;
        let mut first = vec![next];
        for class in &plan.classes.of {
            next += counts[class.index()];
            first.push(next);
        }
        Self { plan, process_map, outputs, wholes, first }
    }

    /// The fetches of a device: each with its segment, its port, and the fetched tensors.
    pub fn fetches(&self, device: usize) -> impl Iterator<Item = (SegmentId, u32, &HostPort)> {
        let class = self.plan.class_plan(device);
        let ports = self.first[device] + class.residents.len() as u32..;
        ports.zip(fetches(class)).map(|(port, (segment, host))| (segment, port, host))
    }

    /// The ports of the graph's outputs, in order. Process 0 sends the whole tensor of each firing through such a port.
    pub fn outputs(&self) -> impl Iterator<Item = u32> + use<> {
        0..self.plan.graph.outputs.len() as u32
    }

    /// The parameters, each with its port. Process 0 sends the whole tensor through it.
    pub fn parameters(&self) -> impl Iterator<Item = (u32, Var)> {
        (0..).zip(self.wholes.iter().copied()).skip(self.plan.graph.outputs.len())
    }

    /// The port of a device's part of a parameter or state.
    pub fn resident(&self, device: usize, var: Var) -> u32 {
        let index = self.plan.class_plan(device).resident_index(var).expect("the device holds a part");
        self.first[device] + index as u32
    }

    /// The process that sends through a port.
    pub fn sender(&self, port: u32) -> u32 {
        self.device(port).map_or(0, |device| self.process_map.process_of(device))
    }

    /// True if process 0 sends this whole tensor to all processes. Every process needs the parameters, and the outputs
    /// that determine whether the update is applied. [`Outputs`] decides on the other outputs.
    pub fn is_for_all(&self, whole: u32) -> bool {
        let name = self.plan.graph.outputs.get(whole as usize).map(|output| output.name.as_str());
        self.outputs == Outputs::AllRanks || matches!(name, None | Some(LOSS_OUTPUT | GRAD_SQUARES_OUTPUT))
    }

    /// The device that sends through a port; `None` if it is the port of a whole tensor.
    fn device(&self, port: u32) -> Option<usize> {
        self.first.partition_point(|first| *first <= port).checked_sub(1)
    }
}

impl Directory for HostPorts {
    fn process_of(&self, device: usize) -> Option<u32> {
        Some(self.process_map.process_of(device)).filter(|process| *process != self.process_map.process)
    }

    fn members_of(&self, communicator: u32) -> Vec<usize> {
        let ranks = self.plan.patterns.ranks(&self.plan.graph, communicator);
        ranks.map(|ranks| ranks.iter().collect()).unwrap_or_default()
    }

    fn route(&self, port: u32) -> Option<HostRoute> {
        if port >= *self.first.last()? {
            return None;
        }
        let Some(device) = self.device(port) else {
            let TensorInfo { shape, dtype, .. } = self.plan.graph.tensor(self.wholes[port as usize]);
            let to = (!self.is_for_all(port)).then_some(0);
            return Some(HostRoute { process: 0, to, tensors: vec![(shape.clone(), *dtype)] });
        };
        let process = self.process_map.process_of(device);
        let class = self.plan.class_plan(device);
        let index = (port - self.first[device]) as usize;
        // All devices of a class have tensors of the same shapes.
        let tensors = match class.residents.get(index) {
            Some(resident) => vec![(resident.region.size.clone(), resident.dtype)],
            None => {
                let (_, host) = fetches(class).nth(index - class.residents.len())?;
                host.buffers.iter().map(|b| (b.shape.clone(), b.dtype)).collect()
            }
        };
        Some(HostRoute { process, to: Some(0), tensors })
    }
}

/// The fetches of a class's devices.
fn fetches(class: &ClassPlan) -> impl Iterator<Item = (SegmentId, &HostPort)> {
    let hosts = class.actions.iter().filter_map(|action| Some((action.plan.segment, action.plan.host.as_ref()?)));
    hosts.filter(|(_, host)| host.transfer == HostTransfer::Fetch)
}
