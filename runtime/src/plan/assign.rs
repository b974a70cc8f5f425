//! Assigns storage to each tensor's part on the devices of a class. A part is in a register if one action writes it and
//! another action reads it. A part has a fixed address if no action writes it, or if it belongs to a parameter or state
//! that no other action reads. Any other part is in scratch. Tensors of one segment with the same readers and rate
//! share a register.

use std::collections::{BTreeMap, BTreeSet};

use shardflow_actors::spec::StreamKind;

use crate::graph::{Graph, NodeId, NodeOp, Rate, Var};
use crate::plan::classes::Classes;
use crate::plan::segments::{Segment, SegmentId, Segments, producers};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Scratch, for a part that no action reads except the one that writes it.
    Scratch,
    /// A register, by index into [`ClassStorage::registers`].
    Register(usize),
    /// A fixed address for the whole session, for a part that no action writes or that only its own update reads.
    Fixed,
}

/// A register of each device of a class, before memory and slots are assigned.
#[derive(Clone, Debug)]
pub struct RegisterPlan {
    pub producer: SegmentId,
    /// The segments of the same device that read the register, sorted.
    pub readers: Vec<SegmentId>,
    /// The transfers by which other devices read the register, sorted.
    pub transfers: Vec<SegmentId>,
    /// How often the register gets a new piece, that is, new values of its tensors.
    pub rate: Rate,
    /// True if the register holds piece 0 from the start (parameters).
    pub initial: bool,
    /// The tensors in a slot, in order; empty for a register that only signals.
    pub tensors: Vec<Var>,
}

/// What the devices of a class run, and where they store tensors.
#[derive(Clone, Debug, Default)]
pub struct ClassStorage {
    /// The segments that the devices run, in order.
    pub segments: Vec<SegmentId>,
    pub storage: BTreeMap<Var, Storage>,
    pub registers: Vec<RegisterPlan>,
    /// For each segment: the registers that the segment reads and writes on its own device.
    pub ports: BTreeMap<SegmentId, Ports>,
}

/// The registers that a segment reads and writes on its own device, in order.
#[derive(Clone, Debug, Default)]
pub struct Ports {
    pub reads: Vec<usize>,
    pub writes: Vec<usize>,
}

/// Tensors that share the memory of their node's input: results of relayouts, of boxing steps that move no data, and of
/// buckets.
#[derive(Clone, Debug, Default)]
pub struct Aliases(BTreeMap<Var, Var>);

impl Aliases {
    /// The tensor whose memory `var` uses.
    pub fn resolve(&self, var: Var) -> Var {
        self.0.get(&var).copied().unwrap_or(var)
    }
}

/// The segments that read a tensor's part: those on its own device, and transfers to other devices.
#[derive(Default)]
struct Readers {
    own: BTreeSet<SegmentId>,
    transfers: BTreeSet<SegmentId>,
}

/// The storage of each class, and the tensors without memory of their own.
pub fn assign(graph: &Graph, segments: &Segments, classes: &Classes) -> (Vec<ClassStorage>, Aliases) {
    let aliases = aliases(graph);
    let producers = producers(graph, segments);
    let build = |class| {
        let device = classes.representative(class);
        let is_on = graph.placements.iter().map(|placement| placement.index_of(device).is_some()).collect();
        let (readers, out) = (BTreeMap::new(), ClassStorage::default());
        ClassBuilder { graph, segments, classes, aliases: &aliases, device, is_on, readers, out }.build(&producers)
    };
    (classes.ids().map(build).collect(), aliases)
}

fn aliases(graph: &Graph) -> Aliases {
    let mut aliases = Aliases::default();
    for node in &graph.nodes {
        let same_memory = match &node.op {
            NodeOp::Relayout | NodeOp::Bucket { .. } => true,
            NodeOp::Boxing(step) => step.is_kept_everywhere(),
            _ => false,
        };
        if same_memory {
            for (output, input) in node.outputs.iter().zip(&node.inputs) {
                aliases.0.insert(*output, aliases.resolve(*input));
            }
        }
    }
    aliases
}

struct ClassBuilder<'a> {
    graph: &'a Graph,
    segments: &'a Segments,
    classes: &'a Classes,
    aliases: &'a Aliases,
    /// The device that represents the class.
    device: usize,
    /// For each placement: true if the class's devices are in it.
    is_on: Vec<bool>,
    readers: BTreeMap<Var, Readers>,
    out: ClassStorage,
}

impl ClassBuilder<'_> {
    fn build(mut self, producers: &BTreeMap<Var, SegmentId>) -> ClassStorage {
        for id in self.segments.ids() {
            let segment = self.segments.get(id);
            let mut runs = self.is_on[segment.placement] && segment.nodes.is_empty();
            for node_id in &segment.nodes {
                runs |= self.add_reader(id, *node_id);
            }
            if runs {
                self.out.segments.push(id);
            }
        }
        self.add_bucket_signals();
        self.group_registers(producers);
        for (index, register) in self.out.registers.iter().enumerate() {
            self.out.ports.entry(register.producer).or_default().writes.push(index);
            for reader in &register.readers {
                self.out.ports.entry(*reader).or_default().reads.push(index);
            }
        }
        self.out
    }

    /// Records which tensors a node reads on the class's device. Returns true if the device runs the node. A device
    /// whose part of a transfer is empty does not run the transfer, and a device without outputs does not run a fetch.
    fn add_reader(&mut self, segment: SegmentId, id: NodeId) -> bool {
        let (node, is_on) = (&self.graph.nodes[id.index()], self.is_on[self.graph.nodes[id.index()].placement]);
        let device = self.device;
        if node.op.is_transfer() {
            let sources = self.classes.sources(id, device);
            let others = self.classes.readers(id, device).iter().any(|reader| *reader != device);
            let readers = self.readers.entry(self.aliases.resolve(node.inputs[0])).or_default();
            if sources.contains(&device) {
                readers.own.insert(segment);
            }
            if others {
                readers.transfers.insert(segment);
            }
            return !sources.is_empty();
        }
        let is_fetch = matches!(node.op, NodeOp::Fetch);
        let is_read = |input: &&Var| {
            let is_here = is_on && self.is_on[self.graph.placement_of(**input)];
            if is_fetch { self.graph.is_fetched(**input, device) } else { is_here }
        };
        let mut runs = is_on && !is_fetch;
        for input in node.inputs.iter().filter(is_read) {
            self.readers.entry(self.aliases.resolve(*input)).or_default().own.insert(segment);
            runs = true;
        }
        runs
    }

    /// For each bucket and each segment that reads the bucket's result, adds a register without bytes, to signal that
    /// the reduction is complete. A bucket is reduced in place, so readers read the register that backward wrote.
    fn add_bucket_signals(&mut self) {
        let is_bucket = |id: &&SegmentId| {
            let Segment { stream, placement, .. } = self.segments.get(**id);
            *stream == StreamKind::Communication && self.is_on[*placement]
        };
        let read = self.out.segments.iter().flat_map(|id| self.segments.reads[id.index()].iter().map(move |r| (r, id)));
        let waits: BTreeSet<_> =
            read.filter(|(bucket, _)| is_bucket(bucket)).map(|(b, reader)| (*b, *reader)).collect();
        let signal = |(producer, reader)| RegisterPlan {
            producer,
            readers: vec![reader],
            transfers: Vec::new(),
            rate: Rate::Step,
            initial: false,
            tensors: Vec::new(),
        };
        self.out.registers = waits.into_iter().map(signal).collect();
    }

    /// Assigns storage to each tensor. Tensors with the same producer, readers and rate share a register.
    fn group_registers(&mut self, producers: &BTreeMap<Var, SegmentId>) {
        type Key = (SegmentId, Vec<SegmentId>, Vec<SegmentId>, Rate, bool);
        let mut register_of: BTreeMap<Key, usize> = BTreeMap::new();
        // Visits tensors in order, so a bucket's gradients are stored in the order in which backward computes them.
        for index in 0..self.graph.tensors.len() {
            let var = self.graph.var(index);
            if !self.is_on[self.graph.placement_of(var)] || self.aliases.resolve(var) != var {
                continue;
            }
            let readers = self.readers.remove(&var).unwrap_or_default();
            let resident = self.graph.producer(var).op.is_resident();
            let runs = |segment: &&SegmentId| self.out.segments.binary_search(segment).is_ok();
            let Some(producer) = producers.get(&var).filter(runs).copied() else {
                self.out.storage.insert(var, Storage::Fixed);
                continue;
            };
            let own: Vec<SegmentId> = readers.own.into_iter().filter(|reader| *reader != producer).collect();
            let transfers: Vec<SegmentId> = readers.transfers.into_iter().collect();
            if own.is_empty() && transfers.is_empty() {
                self.out.storage.insert(var, if resident { Storage::Fixed } else { Storage::Scratch });
                continue;
            }
            let rate = self.graph.tensor(var).rate;
            let registers = &mut self.out.registers;
            let register = *register_of.entry((producer, own, transfers, rate, resident)).or_insert_with_key(|key| {
                let (producer, readers, transfers, rate, initial) = key.clone();
                registers.push(RegisterPlan { producer, readers, transfers, rate, initial, tensors: Vec::new() });
                registers.len() - 1
            });
            registers[register].tensors.push(var);
            self.out.storage.insert(var, Storage::Register(register));
        }
    }
}
