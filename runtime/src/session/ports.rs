//! The ports through which a session's processes exchange host data.

use std::collections::BTreeMap;

use shardflow_actors::remote::HostBroadcast;
use shardflow_kernels::tensor::DType;

use super::agreement::{self, SharedInput};
use crate::graph::Var;
use crate::plan::segments::SegmentId;
use crate::plan::{HostTransfer, Instance};
use crate::process_map::ProcessMap;

/// Ports through which processes send host data to each other: fetch results, resident tensors and numbers.
#[derive(Clone, Debug, Default)]
pub struct HostPorts {
    pub ports: Vec<HostBroadcast>,
    /// By device and segment: the port of a fetch, and its tensors in order.
    pub fetches: BTreeMap<(usize, SegmentId), (u32, Vec<Var>)>,
    /// Port of a device's resident tensor, by its index.
    pub residents: BTreeMap<(usize, usize), u32>,
    /// By process: port of its number pair, see `Session::exchange`.
    pub pairs: Vec<u32>,
    /// By process: port of the numbers that it sends in each step, see [`super::agreement`].
    pub steps: Vec<u32>,
    /// By process: port of the numbers that it sends at a load, see [`super::agreement`].
    pub loads: Vec<u32>,
}

impl HostPorts {
    pub fn of(plan: &Instance, process_map: &ProcessMap, shared: &[SharedInput]) -> Self {
        let mut out = Self::default();
        for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
            for action in actions {
                let fetch = action.host.as_ref().filter(|host| host.transfer == HostTransfer::Fetch);
                if let Some(host) = fetch {
                    let tensors = host.buffers.iter().map(|b| (b.shape.clone(), b.dtype)).collect();
                    let port = out.add(process_map.process_of(actor.device), tensors);
                    out.fetches.insert((actor.device, action.segment), (port, host.vars.clone()));
                }
            }
        }
        for (device, residents) in plan.residents.iter().enumerate() {
            for (index, resident) in residents.iter().enumerate() {
                let tensors = vec![(resident.region.size.clone(), resident.dtype)];
                let port = out.add(process_map.process_of(device), tensors);
                out.residents.insert((device, index), port);
            }
        }
        let loads = agreement::load_numbers(plan);
        for process in 0..process_map.processes {
            // A number is sent as two integers.
            let mut port = |numbers: usize| out.add(process, vec![(vec![2 * numbers], DType::I32)]);
            let ports = [2, agreement::step_numbers(shared, process), loads].map(&mut port);
            out.pairs.push(ports[0]);
            out.steps.push(ports[1]);
            out.loads.push(ports[2]);
        }
        out
    }

    fn add(&mut self, process: u32, tensors: Vec<(Vec<usize>, DType)>) -> u32 {
        self.ports.push(HostBroadcast { process, tensors });
        self.ports.len() as u32 - 1
    }
}
