//! The ports through which a session's processes exchange host data.

use std::collections::BTreeMap;

use shardflow_actors::remote::HostRoute;
use shardflow_kernels::tensor::DType;

use super::options::Outputs;
use crate::graph::Var;
use crate::graph::builder::{GRAD_SQUARES_OUTPUT, LOSS_OUTPUT};
use crate::plan::HostTransfer;
use crate::plan::instance::Instance;
use crate::plan::segments::SegmentId;
use crate::process_map::ProcessMap;

/// Ports through which processes send host data to each other: fetch results and resident tensors.
#[derive(Clone, Debug, Default)]
pub struct HostPorts {
    pub ports: Vec<HostRoute>,
    /// The port of each fetch and the fetched tensors in order, by device and segment.
    pub fetches: BTreeMap<(usize, SegmentId), (u32, Vec<Var>)>,
    /// The port of each graph output, by index. Process 0 sends the whole tensor of each firing through this port.
    pub outputs: Vec<u32>,
    /// The port of each resident tensor, by device and index.
    pub residents: BTreeMap<(usize, usize), u32>,
}

impl HostPorts {
    pub fn of(plan: &Instance, process_map: &ProcessMap, outputs: Outputs) -> Self {
        let mut out = Self::default();
        for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
            for action in actions {
                let fetch = action.host.as_ref().filter(|host| host.transfer == HostTransfer::Fetch);
                if let Some(host) = fetch {
                    let tensors = host.buffers.iter().map(|b| (b.shape.clone(), b.dtype)).collect();
                    let port = out.add(process_map.process_of(actor.device), Some(0), tensors);
                    out.fetches.insert((actor.device, action.segment), (port, host.vars.clone()));
                }
            }
        }
        for output in &plan.graph.outputs {
            let info = plan.graph.tensor(output.tensor);
            let is_for_all = outputs == Outputs::AllRanks || is_decisive(&output.name);
            // Devices send the tensor as they hold it.
            let dtype = plan.graph.tensor(plan.aliases.resolve(output.tensor)).dtype;
            let port = out.add(0, (!is_for_all).then_some(0), vec![(info.shape.clone(), dtype)]);
            out.outputs.push(port);
        }
        for (device, residents) in plan.residents.iter().enumerate() {
            for (index, resident) in residents.iter().enumerate() {
                let tensors = vec![(resident.region.size.clone(), resident.dtype)];
                let port = out.add(process_map.process_of(device), None, tensors);
                out.residents.insert((device, index), port);
            }
        }
        out
    }

    fn add(&mut self, process: u32, to: Option<u32>, tensors: Vec<(Vec<usize>, DType)>) -> u32 {
        self.ports.push(HostRoute { process, to, tensors });
        self.ports.len() as u32 - 1
    }
}

/// True for an output that determines whether the update is applied. All processes need it.
fn is_decisive(output: &str) -> bool {
    output == LOSS_OUTPUT || output == GRAD_SQUARES_OUTPUT
}
