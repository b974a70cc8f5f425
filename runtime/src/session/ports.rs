//! The ports through which a session's processes exchange host data.

use std::collections::BTreeMap;

use shardflow_actors::remote::HostBroadcast;
use shardflow_kernels::tensor::DType;

use crate::graph::{Rate, Var};
use crate::plan::{ActionKey, Plan};
use crate::process_map::ProcessMap;

/// Ports through which processes send host data to each other: fetch results and resident tensors.
#[derive(Clone, Debug, Default)]
pub struct HostPorts {
    pub ports: Vec<HostBroadcast>,
    /// By device and rate: the port of a fetch, and its tensors in order.
    pub fetches: BTreeMap<(usize, Rate), (u32, Vec<Var>)>,
    /// Port of a device's resident tensor, by its index.
    pub residents: BTreeMap<(usize, usize), u32>,
}

impl HostPorts {
    pub fn of(plan: &Plan, process_map: &ProcessMap) -> Self {
        let mut out = Self::default();
        for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
            for action in actions {
                if let (ActionKey::Fetch(rate), Some(host)) = (action.key, &action.host) {
                    let tensors = host.buffers.iter().map(|b| (b.shape.clone(), b.dtype)).collect();
                    let port = out.add(process_map.process_of(actor.device), tensors);
                    out.fetches.insert((actor.device, rate), (port, host.vars.clone()));
                }
            }
        }
        for (device, memory) in plan.memory.iter().enumerate() {
            for (index, resident) in memory.residents.iter().enumerate() {
                let tensors = vec![(resident.region.size.clone(), resident.dtype)];
                let port = out.add(process_map.process_of(device), tensors);
                out.residents.insert((device, index), port);
            }
        }
        out
    }

    fn add(&mut self, process: u32, tensors: Vec<(Vec<usize>, DType)>) -> u32 {
        self.ports.push(HostBroadcast { process, tensors });
        self.ports.len() as u32 - 1
    }
}
