//! The ports through which a session's processes exchange host data. Their indices follow from the plan by arithmetic:
//! first the ports of the graph's outputs, then for each device the ports of its residents and of its fetches.

use std::sync::Arc;

use shardflow_actors::remote::{Directory, HostRoute};
use shardflow_kernels::tensor::DType;

use super::options::Outputs;
use crate::graph::Var;
use crate::graph::builder::{GRAD_SQUARES_OUTPUT, LOSS_OUTPUT};
use crate::plan::segments::SegmentId;
use crate::plan::{ClassPlan, HostPort, HostTransfer, Plan};
use crate::process_map::ProcessMap;

/// Ports through which processes send host data to each other: outputs, fetch results and resident tensors.
#[derive(Clone, Debug)]
pub struct HostPorts {
    plan: Arc<Plan>,
    process_map: ProcessMap,
    outputs: Outputs,
    /// For each device: its first port. At the end: the number of ports.
    first: Vec<u32>,
}

impl HostPorts {
    pub fn new(plan: Arc<Plan>, process_map: ProcessMap, outputs: Outputs) -> Self {
        let counts: Vec<u32> =
            (plan.class_plans.iter()).map(|class| (fetches(class).count() + class.residents.len()) as u32).collect();
        let mut next = plan.graph.outputs.len() as u32;
        let mut first = vec![next];
        for class in &plan.classes.of {
            next += counts[class.index()];
            first.push(next);
        }
        Self { plan, process_map, outputs, first }
    }

    /// The fetches of a device: each with its segment, its port, and the fetched tensors.
    pub fn fetches(&self, device: usize) -> impl Iterator<Item = (SegmentId, u32, &HostPort)> {
        let class = self.plan.class_plan(device);
        let ports = self.first[device] + class.residents.len() as u32..;
        ports.zip(fetches(class)).map(|(port, (segment, host))| (segment, port, host))
    }

    /// The port of a device's fetch.
    pub fn fetch(&self, device: usize, segment: SegmentId) -> Option<(u32, &HostPort)> {
        self.fetches(device).find(|(own, ..)| *own == segment).map(|(_, port, host)| (port, host))
    }

    /// The ports of the graph's outputs, in order. Process 0 sends the whole tensor of each firing through such a port.
    pub fn outputs(&self) -> impl Iterator<Item = u32> + use<> {
        0..self.plan.graph.outputs.len() as u32
    }

    /// The port of a device's resident tensor, by the tensor's index among the device's residents.
    pub fn resident(&self, device: usize, index: usize) -> u32 {
        self.first[device] + index as u32
    }

    /// The process that sends through a port.
    pub fn sender(&self, port: u32) -> u32 {
        self.device(port).map_or(0, |device| self.process_map.process_of(device))
    }

    /// True if process 0 sends an output to all processes.
    pub fn is_for_all(&self, output: u32) -> bool {
        self.outputs == Outputs::AllRanks || is_decisive(&self.plan.graph.outputs[output as usize].name)
    }

    /// The device that sends through a port; `None` if it is the port of an output.
    fn device(&self, port: u32) -> Option<usize> {
        self.first.partition_point(|first| *first <= port).checked_sub(1)
    }

    fn output_route(&self, port: u32) -> HostRoute {
        let var = self.plan.graph.outputs[port as usize].tensor;
        let tensors = vec![(self.plan.graph.tensor(var).shape.clone(), self.fetched_dtype(var))];
        HostRoute { process: 0, to: (!self.is_for_all(port)).then_some(0), tensors }
    }

    /// The element type in which devices send an output to the host.
    fn fetched_dtype(&self, var: Var) -> DType {
        let graph = &self.plan.graph;
        let fetch = self.plan.segments.fetch_of(graph, var);
        let mut devices = graph.placements[graph.placement_of(var)].devices().iter();
        let fetched = |device: &usize| {
            let (_, host) = self.fetch(*device, fetch)?;
            let index = host.vars.iter().position(|other| *other == var)?;
            Some(host.buffers.get(index)?.dtype)
        };
        devices.find_map(fetched).unwrap_or(graph.tensor(var).dtype)
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
        let Some(device) = self.device(port) else { return Some(self.output_route(port)) };
        let process = self.process_map.process_of(device);
        let class = self.plan.class_plan(device);
        let index = (port - self.first[device]) as usize;
        // All devices of a class have tensors of the same shapes.
        if let Some(resident) = class.residents.get(index) {
            let tensors = vec![(resident.region.size.clone(), resident.dtype)];
            return Some(HostRoute { process, to: None, tensors });
        }
        let (_, host) = fetches(class).nth(index - class.residents.len())?;
        let tensors = host.buffers.iter().map(|b| (b.shape.clone(), b.dtype)).collect();
        Some(HostRoute { process, to: Some(0), tensors })
    }
}

/// The fetches of a class's devices.
fn fetches(class: &ClassPlan) -> impl Iterator<Item = (SegmentId, &HostPort)> {
    let hosts = class.actions.iter().filter_map(|action| Some((action.plan.segment, action.plan.host.as_ref()?)));
    hosts.filter(|(_, host)| host.transfer == HostTransfer::Fetch)
}

/// True for an output that determines whether the update is applied. All processes need it.
fn is_decisive(output: &str) -> bool {
    output == LOSS_OUTPUT || output == GRAD_SQUARES_OUTPUT
}
