//! Assigns each node to an action of a device, and each tensor's local part to storage: an action's scratch if no other
//! action reads it, a register if others do, a fixed address if nothing replaces it. Tensors of one action with the
//! same readers share a register: the stash, activations for another stage, gradients and parameters are alike.

use std::collections::{BTreeMap, BTreeSet};

use crate::boxing::step::{LocalStep, StepKind};
use crate::graph::{Graph, Node, NodeId, NodeOp, Phase, Rate, Var};
use crate::placement::Placement;
use crate::plan::ActionKey;

/// An action on one device: its rank and key.
pub type DeviceAction = (usize, ActionKey);

/// A tensor's part on one device, identified by rank and tensor.
pub type LocalTensor = (usize, Var);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Scratch of the only action that makes and reads it.
    Scratch,
    /// A register, by index into [`Assignment::registers`].
    Register(usize),
    /// A fixed address for the whole session.
    Fixed,
}

/// A register before memory and slots are assigned.
#[derive(Clone, Debug)]
pub struct RegisterPlan {
    pub producer: DeviceAction,
    /// The actions that read it, sorted.
    pub readers: Vec<DeviceAction>,
    /// How many pieces a step has.
    pub rate: Rate,
    /// True if it holds piece 0 from the start (parameters).
    pub initial: bool,
    /// The local tensors in a slot, in order; empty for a register that only signals.
    pub tensors: Vec<Var>,
}

/// The assignment of all nodes and tensors.
#[derive(Clone, Debug, Default)]
pub struct Assignment {
    /// Nodes of each action, in graph order.
    pub actions: BTreeMap<DeviceAction, Vec<NodeId>>,
    pub storage: BTreeMap<LocalTensor, Storage>,
    pub registers: Vec<RegisterPlan>,
    /// Tensors that share another's memory: relayouts that move no data, and reduced buckets.
    pub alias: BTreeMap<Var, Var>,
}

impl Assignment {
    /// The tensor whose memory `var` uses.
    pub fn resolve_alias(&self, var: Var) -> Var {
        let mut var = var;
        while let Some(next) = self.alias.get(&var) {
            var = *next;
        }
        var
    }
}

/// The action that runs a node on the devices of its placement; `None` for resident tensors, which do not run.
pub fn action_of(graph: &Graph, id: NodeId, node: &Node) -> Option<ActionKey> {
    match &node.op {
        op if op.is_resident() => None,
        NodeOp::Input if node.phase == Phase::Update => Some(ActionKey::Decide),
        NodeOp::Input => Some(ActionKey::Feed(graph.tensor(node.outputs[0]).rate)),
        NodeOp::Boxing(step) if step.kind == StepKind::Transfer => Some(ActionKey::Pull(id)),
        NodeOp::Bucket { .. } => Some(ActionKey::Bucket(id)),
        _ => Some(ActionKey::of_phase(node.phase)),
    }
}

pub fn assign(graph: &Graph) -> Assignment {
    let mut out = Assignment { alias: aliases(graph), ..Assignment::default() };
    let mut producer: BTreeMap<LocalTensor, DeviceAction> = BTreeMap::new();
    let mut readers: BTreeMap<LocalTensor, BTreeSet<DeviceAction>> = BTreeMap::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        let id = NodeId(index as u32);
        let placement = &graph.placements[node.placement];
        let Some(key) = action_of(graph, id, node) else { continue };
        for (position, &device) in placement.devices().iter().enumerate() {
            let site = (device, key);
            // A device with an empty shard needs no action and no memory.
            let sources = source_devices(node, placement, position);
            if sources.is_empty() {
                continue;
            }
            out.actions.entry(site).or_default().push(id);
            let written = node.outputs.iter().filter(|o| out.resolve_alias(**o) == **o).chain(&node.updates);
            producer.extend(written.map(|var| ((device, *var), site)));
            for input in &node.inputs {
                for from in &sources {
                    readers.entry((*from, out.resolve_alias(*input))).or_default().insert(site);
                }
            }
        }
    }
    for output in &graph.outputs {
        let (var, rate) = (out.resolve_alias(output.tensor), graph.tensor(output.tensor).rate);
        for &device in graph.placements[graph.placement_of(output.tensor)].devices() {
            let site = (device, ActionKey::Fetch(rate));
            readers.entry((device, var)).or_default().insert(site);
            out.actions.entry(site).or_default();
        }
    }
    // A parameter that nothing updates also reaches other devices through a register: it gets an empty update.
    for (&(device, var), sites) in &readers {
        let never_updated = graph.producer(var).op.is_resident() && !producer.contains_key(&(device, var));
        if never_updated && sites.iter().any(|site| site.0 != device) {
            let site = (device, ActionKey::Update);
            producer.insert((device, var), site);
            out.actions.entry(site).or_default();
        }
    }
    out.registers = bucket_signals(graph, &out.actions);
    group_registers(graph, &mut out, &producer, &readers);
    out
}

fn aliases(graph: &Graph) -> BTreeMap<Var, Var> {
    let mut alias = BTreeMap::new();
    for node in &graph.nodes {
        let same_memory = match &node.op {
            NodeOp::Relayout | NodeOp::Bucket { .. } => true,
            NodeOp::Boxing(step) => step.is_kept_everywhere(),
            _ => false,
        };
        if same_memory {
            alias.extend(node.outputs.iter().copied().zip(node.inputs.iter().copied()));
        }
    }
    alias
}

/// A bucket is reduced in place, so its readers read the register that backward wrote. A register without bytes, from
/// each bucket to each action that reads its result, signals that the reduction is complete.
fn bucket_signals(graph: &Graph, actions: &BTreeMap<DeviceAction, Vec<NodeId>>) -> Vec<RegisterPlan> {
    let mut waits: BTreeSet<(DeviceAction, DeviceAction)> = BTreeSet::new();
    for (site, nodes) in actions {
        for input in nodes.iter().flat_map(|id| &graph.nodes[id.index()].inputs) {
            if let NodeOp::Bucket { .. } = graph.producer(*input).op {
                let bucket = ActionKey::Bucket(graph.tensor(*input).producer);
                waits.insert(((site.0, bucket), *site));
            }
        }
    }
    let signal = |(producer, reader)| RegisterPlan {
        producer,
        readers: vec![reader],
        rate: Rate::Step,
        initial: false,
        tensors: Vec::new(),
    };
    waits.into_iter().map(signal).collect()
}

/// The devices whose parts of a node's input the device at `position` of the placement reads.
fn source_devices(node: &Node, placement: &Placement, position: usize) -> Vec<usize> {
    if let NodeOp::Boxing(step) = &node.op
        && let LocalStep::Pull(pulls) = step.local(position)
    {
        let devices: BTreeSet<usize> = pulls.iter().map(|p| p.from_device).collect();
        return devices.into_iter().collect();
    }
    vec![placement.devices()[position]]
}

/// Assigns storage to each local tensor; those with the same producer, readers and rate share a register.
fn group_registers(
    graph: &Graph,
    out: &mut Assignment,
    producer: &BTreeMap<LocalTensor, DeviceAction>,
    readers: &BTreeMap<LocalTensor, BTreeSet<DeviceAction>>,
) {
    let mut register_of: BTreeMap<(DeviceAction, Vec<DeviceAction>, Rate, bool), usize> = BTreeMap::new();
    // In the order of the tensors: a bucket's gradients are stored in the order in which backward computes them.
    for index in 0..graph.tensors.len() {
        let var = graph.var(index);
        if out.resolve_alias(var) != var {
            continue;
        }
        for &device in graph.placements[graph.placement_of(var)].devices() {
            let local = (device, var);
            let resident = graph.producer(var).op.is_resident();
            let Some(site) = producer.get(&local).copied() else {
                out.storage.insert(local, Storage::Fixed);
                continue;
            };
            let others = readers.get(&local).into_iter().flatten().filter(|r| **r != site);
            let others: Vec<DeviceAction> = others.copied().collect();
            if others.is_empty() {
                out.storage.insert(local, if resident { Storage::Fixed } else { Storage::Scratch });
                continue;
            }
            let rate = graph.tensor(var).rate;
            let key = (site, others.clone(), rate, resident);
            let register = *register_of.entry(key).or_insert_with(|| {
                let plan =
                    RegisterPlan { producer: site, readers: others, rate, initial: resident, tensors: Vec::new() };
                out.registers.push(plan);
                out.registers.len() - 1
            });
            out.registers[register].tensors.push(var);
            out.storage.insert(local, Storage::Register(register));
        }
    }
}
