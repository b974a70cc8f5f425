//! The ports through which a session's processes exchange host data.

use std::collections::BTreeMap;

use shardflow_actors::remote::HostBroadcast;
use shardflow_kernels::tensor::DType;

use super::agreement::{self, SharedInput};
use crate::graph::Rate;
use crate::plan::{ActionKey, Plan};
use crate::process_map::ProcessMap;

/// Ports through which processes send host data to each other: fetch results, resident tensors and numbers.
#[derive(Clone, Debug, Default)]
pub struct HostPorts {
    /// All ports, by number.
    pub ports: Vec<HostBroadcast>,
    /// Port of a device's fetch.
    pub fetches: BTreeMap<(usize, Rate), u32>,
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
    /// The ports of a plan.
    pub fn of(plan: &Plan, process_map: &ProcessMap, shared: &[SharedInput]) -> Self {
        let mut out = Self::default();
        for (actor, actions) in plan.spec.actors.iter().zip(&plan.actions) {
            for action in actions {
                if let (ActionKey::Fetch(rate), Some(host)) = (action.key, &action.host) {
                    let tensors = host.buffers.iter().map(|b| (b.shape.clone(), b.dtype)).collect();
                    out.fetches.insert((actor.device, rate), out.ports.len() as u32);
                    out.ports.push(HostBroadcast { process: process_map.process_of(actor.device), tensors });
                }
            }
        }
        for (device, memory) in plan.memory.iter().enumerate() {
            for (index, resident) in memory.residents.iter().enumerate() {
                out.residents.insert((device, index), out.ports.len() as u32);
                let tensors = vec![(resident.region.size.clone(), resident.dtype)];
                out.ports.push(HostBroadcast { process: process_map.process_of(device), tensors });
            }
        }
        let loads = agreement::load_numbers(plan);
        for process in 0..process_map.processes {
            // A number is sent as two integers.
            let mut port = |numbers: usize| {
                out.ports.push(HostBroadcast { process, tensors: vec![(vec![2 * numbers], DType::I32)] });
                out.ports.len() as u32 - 1
            };
            out.pairs.push(port(2));
            out.steps.push(port(agreement::step_numbers(shared, process)));
            out.loads.push(port(loads));
        }
        out
    }

    /// One number pair of each process, as a list of wanted pieces.
    pub fn wanted_pairs(&self) -> impl Iterator<Item = (u32, usize)> {
        self.pairs.iter().map(|port| (*port, 1))
    }
}
