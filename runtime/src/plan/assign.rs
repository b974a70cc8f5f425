//! Which action of which device runs each node, and where each tensor's local part lies: in an action's scratch when
//! nobody else reads it, in a register when others do, fixed in memory when nothing replaces it or nobody else reads it.
//! Tensors of one action with the same readers share a register; so the stash, activations on their way to another
//! stage, gradients and parameters are all the same thing.

use std::collections::{BTreeMap, BTreeSet};

use crate::boxing::step::{LocalStep, StepKind};
use crate::graph::{Graph, Node, NodeId, NodeOp, Phase, Rate, Var};
use crate::placement::Placement;
use crate::plan::ActionKey;

/// An action of a device.
pub type Site = (usize, ActionKey);

/// A tensor's part on one device.
pub type LocalTensor = (usize, Var);

/// Where a local tensor lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// Scratch of the one action that makes and reads it.
    Scratch,
    /// A register, by index into [`Assignment::registers`].
    Register(usize),
    /// At a fixed place for the whole session.
    Fixed,
}

/// A register before memory and slots are known.
#[derive(Clone, Debug)]
pub struct RegisterPlan {
    /// Who writes it.
    pub producer: Site,
    /// Who reads it, sorted.
    pub readers: Vec<Site>,
    /// Pieces in a step.
    pub rate: Rate,
    /// Holds piece 0 from the start (parameters).
    pub initial: bool,
    /// The local tensors in a slot, in order; none for a register that only signals.
    pub tensors: Vec<Var>,
}

/// The outcome.
#[derive(Clone, Debug, Default)]
pub struct Assignment {
    /// Nodes of each action, in graph order.
    pub actions: BTreeMap<Site, Vec<NodeId>>,
    /// Home of each local tensor.
    pub homes: BTreeMap<LocalTensor, Home>,
    /// The registers.
    pub registers: Vec<RegisterPlan>,
    /// Tensors that are another's memory: relayouts that change nothing, and reduced buckets.
    pub alias: BTreeMap<Var, Var>,
}

impl Assignment {
    /// The tensor whose memory `var` is.
    pub fn storage(&self, var: Var) -> Var {
        let mut var = var;
        while let Some(next) = self.alias.get(&var) {
            var = *next;
        }
        var
    }
}

/// The action that runs a node on the devices of its placement; `None` for what is resident, which does not run.
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

/// Assigns every node and tensor.
pub fn assign(graph: &Graph) -> Assignment {
    let mut out = Assignment { alias: aliases(graph), ..Assignment::default() };
    let mut producer: BTreeMap<LocalTensor, Site> = BTreeMap::new();
    let mut readers: BTreeMap<LocalTensor, BTreeSet<Site>> = BTreeMap::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        let id = NodeId(index as u32);
        let placement = &graph.placements[node.placement];
        let Some(key) = action_of(graph, id, node) else { continue };
        for (position, &device) in placement.devices().iter().enumerate() {
            let site = (device, key);
            // A device whose shard is empty has nothing to fetch: no action, and no bytes wherever its shard lies.
            let sources = source_devices(node, placement, position);
            if sources.is_empty() {
                continue;
            }
            out.actions.entry(site).or_default().push(id);
            let made = node.outputs.iter().filter(|o| out.storage(**o) == **o).chain(&node.updates);
            producer.extend(made.map(|var| ((device, *var), site)));
            for input in &node.inputs {
                for from in &sources {
                    readers.entry((*from, out.storage(*input))).or_default().insert(site);
                }
            }
        }
    }
    for output in &graph.outputs {
        let (var, rate) = (out.storage(output.tensor), graph.tensor(output.tensor).rate);
        for &device in graph.placements[graph.placement_of(output.tensor)].devices() {
            let site = (device, ActionKey::Fetch(rate));
            readers.entry((device, var)).or_default().insert(site);
            out.actions.entry(site).or_default();
        }
    }
    // What nothing updates is read on other devices as what is updated: an update that changes nothing gives it to them.
    for (&(device, var), sites) in &readers {
        let fixed = graph.producer(var).op.is_resident() && !producer.contains_key(&(device, var));
        if fixed && sites.iter().any(|site| site.0 != device) {
            let site = (device, ActionKey::Update);
            producer.insert((device, var), site);
            out.actions.entry(site).or_default();
        }
    }
    out.registers = bucket_signals(graph, &out.actions);
    group_registers(graph, &mut out, &producer, &readers);
    out
}

/// Tensors that are another's memory.
fn aliases(graph: &Graph) -> BTreeMap<Var, Var> {
    let mut alias = BTreeMap::new();
    for node in &graph.nodes {
        let same_memory = match &node.op {
            NodeOp::Relayout | NodeOp::Bucket { .. } => true,
            NodeOp::Boxing(step) if step.kind != StepKind::Transfer => {
                let devices = graph.placements[node.placement].device_count();
                (0..devices).all(|device| step.local(device) == LocalStep::Keep)
            }
            _ => false,
        };
        if same_memory {
            alias.extend(node.outputs.iter().copied().zip(node.inputs.iter().copied()));
        }
    }
    alias
}

/// A bucket is reduced in place, so whoever reads it reads the register that backward wrote; that the reduction is done is
/// told by a register without bytes, from each bucket to each action that reads what it reduced.
fn bucket_signals(graph: &Graph, actions: &BTreeMap<Site, Vec<NodeId>>) -> Vec<RegisterPlan> {
    let mut waits: BTreeSet<(Site, Site)> = BTreeSet::new();
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

/// The devices whose part of a node's input is read by the device at `position` of its placement.
fn source_devices(node: &Node, placement: &Placement, position: usize) -> Vec<usize> {
    if let NodeOp::Boxing(step) = &node.op
        && let LocalStep::Pull(pulls) = step.local(position)
    {
        let devices: BTreeSet<usize> = pulls.iter().map(|p| p.from_device).collect();
        return devices.into_iter().collect();
    }
    vec![placement.devices()[position]]
}

/// Gives each local tensor its home; those of one producer with the same readers and rate share a register.
fn group_registers(
    graph: &Graph,
    out: &mut Assignment,
    producer: &BTreeMap<LocalTensor, Site>,
    readers: &BTreeMap<LocalTensor, BTreeSet<Site>>,
) {
    let mut found: BTreeMap<(Site, Vec<Site>, Rate, bool), usize> = BTreeMap::new();
    // In the order of the tensors, so that a bucket's gradients lie in the order in which backward makes them.
    for index in 0..graph.tensors.len() {
        let var = graph.var(index);
        if out.storage(var) != var {
            continue;
        }
        for &device in graph.placements[graph.placement_of(var)].devices() {
            let local = (device, var);
            let made_by = graph.producer(var);
            let resident = made_by.op.is_resident();
            let Some(site) = producer.get(&local).copied() else {
                out.homes.insert(local, Home::Fixed);
                continue;
            };
            let others = readers.get(&local).into_iter().flatten().filter(|r| **r != site);
            let others: Vec<Site> = others.copied().collect();
            if others.is_empty() {
                out.homes.insert(local, if resident { Home::Fixed } else { Home::Scratch });
                continue;
            }
            let rate = graph.tensor(var).rate;
            let key = (site, others.clone(), rate, resident);
            let register = *found.entry(key).or_insert_with(|| {
                let plan =
                    RegisterPlan { producer: site, readers: others, rate, initial: resident, tensors: Vec::new() };
                out.registers.push(plan);
                out.registers.len() - 1
            });
            out.registers[register].tensors.push(var);
            out.homes.insert(local, Home::Register(register));
        }
    }
}
