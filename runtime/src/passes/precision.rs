//! Stores activations and their gradients in bf16 where all their readers accept bf16. Products, attention and
//! elementwise ops then read and write bf16, and compute in f32. Parameters, their accumulated gradients, statistics,
//! scalars, the update and everything that a collective moves stay in f32. Readers that need bf16 get a cast. A
//! parameter that is read on its own placement gets a bf16 copy instead, which the update refreshes once per step.
//!
//! This is the mixed precision of Micikevicius et al. 2018, <https://arxiv.org/abs/1710.03740>. The range of bf16 makes
//! loss scaling unnecessary (Kalamkar et al. 2019, <https://arxiv.org/abs/1905.12322>).
//!
//! The pass runs after layouts are chosen and boxing is inserted, so a cast is local and has the layout of its input.

use std::collections::BTreeMap;
use std::sync::Arc;

use shardflow_actors::label::Role;
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::DType;

use crate::boxing::step::{BoxingStep, StepKind};
use crate::graph::{Graph, Node, NodeOp, Rate, TensorInfo, Var};

/// The element type of activations and their gradients. All other floating-point tensors are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    #[cfg_attr(feature = "cli", value(name = "f32"))]
    F32,
    /// 16-bit floats with the range of 32-bit floats. On CPUs, bf16 is slower than f32 and serves as a reference.
    #[cfg_attr(feature = "cli", value(name = "bf16"))]
    BF16,
}

/// The element types that the producer and the readers of a tensor need.
#[derive(Clone, Copy, Debug, Default)]
struct NeededTypes {
    /// True if a node reads the tensor in bf16.
    bf16: bool,
    /// True if a node reads or makes the tensor in f32.
    f32: bool,
}

impl NeededTypes {
    fn is_bf16(self) -> bool {
        self.bf16 && !self.f32
    }
}

/// Sets the type of tensors to bf16 where possible, and inserts the required casts.
pub fn narrow(graph: &mut Graph) {
    let (roots, sources) = (roots(graph), sources(graph));
    let mut needed = vec![NeededTypes::default(); graph.tensors.len()];
    // The host fetches f32.
    for output in &graph.outputs {
        needed[roots[output.tensor.index()]].f32 = true;
    }
    // Visits nodes in reverse order, so that the types of a node's outputs are known before those of its inputs.
    for node in graph.nodes.iter().rev() {
        for (port, output) in node.outputs.iter().enumerate() {
            needed[roots[output.index()]].f32 |= !may_write_bf16(graph, &sources, node, port);
        }
        let is_bf16 = |port: usize| needed[roots[node.outputs[port].index()]].is_bf16();
        let writes_bf16 = bf16_ports(node).next().is_some() && bf16_ports(node).all(is_bf16);
        if matches!(node_read_type(graph, node), ReadType::AsWritten) && !writes_bf16 {
            bf16_ports(node).for_each(|port| needed[roots[node.outputs[port].index()]].f32 = true);
        }
        for (port, input) in node.inputs.iter().enumerate() {
            let needed = &mut needed[roots[input.index()]];
            match read_type(graph, node, port) {
                ReadType::SharedMemory => {}
                ReadType::Bf16 => needed.bf16 = true,
                ReadType::AsWritten if writes_bf16 => needed.bf16 = true,
                ReadType::AsWritten | ReadType::F32 => needed.f32 = true,
            }
        }
    }
    for (tensor, root) in graph.tensors.iter_mut().zip(roots) {
        if tensor.dtype == DType::F32 && needed[root].is_bf16() {
            tensor.dtype = DType::BF16;
        }
    }
    insert_casts(graph);
}

/// The type in which a node reads a floating-point input.
enum ReadType {
    /// The type of the node's output, which shares the input's memory.
    SharedMemory,
    /// The type that the node writes. So if a sum must be f32 because it is accumulated, its terms are f32 too.
    AsWritten,
    Bf16,
    F32,
}

fn node_read_type(graph: &Graph, node: &Node) -> ReadType {
    match &node.op {
        NodeOp::Kernel(op) if may_compute_in_bf16(graph, node) => match op {
            Op::Einsum(_) | Op::Attention { .. } | Op::LayerNorm { .. } => ReadType::Bf16,
            Op::RowMax | Op::SumExpTarget { .. } | Op::SumLeading | Op::EmbeddingGrad { .. } => ReadType::Bf16,
            _ => ReadType::AsWritten,
        },
        _ if shares_memory(node) => ReadType::SharedMemory,
        op if op.is_transfer() => ReadType::AsWritten,
        _ => ReadType::F32,
    }
}

fn read_type(graph: &Graph, node: &Node, port: usize) -> ReadType {
    match &node.op {
        NodeOp::Kernel(op) if !op.reads_bf16(port) => ReadType::F32,
        _ => node_read_type(graph, node),
    }
}

/// Indices of a node's outputs that may be bf16.
fn bf16_ports(node: &Node) -> impl Iterator<Item = usize> + '_ {
    (0..node.outputs.len()).filter(|port| match &node.op {
        NodeOp::Kernel(op) => op.writes_bf16(*port),
        _ => true,
    })
}

/// For each tensor: true if it is an input, a parameter, or a relayout, slice or transfer of one. Such a tensor exists
/// before any computation; if it were bf16, its readers would have to wait for a cast.
fn sources(graph: &Graph) -> Vec<bool> {
    let mut sources = vec![false; graph.tensors.len()];
    for node in &graph.nodes {
        let is_source = match &node.op {
            NodeOp::Input | NodeOp::Parameter { .. } => true,
            op => (shares_memory(node) || op.is_transfer()) && node.inputs.iter().all(|input| sources[input.index()]),
        };
        node.outputs.iter().for_each(|output| sources[output.index()] = is_source);
    }
    sources
}

/// True if the output shares the input's memory or a part of it.
fn shares_memory(node: &Node) -> bool {
    match &node.op {
        NodeOp::Relayout => true,
        NodeOp::Boxing(step) => step.kind == StepKind::Slice,
        _ => false,
    }
}

/// True for nodes that may compute on bf16: those that run in each micro-batch, except ops on scalars such as losses.
fn may_compute_in_bf16(graph: &Graph, node: &Node) -> bool {
    let is_scalar = node.outputs.iter().all(|output| graph.shape(*output).is_empty());
    node.rate == Rate::MicroBatch && !is_scalar
}

fn may_write_bf16(graph: &Graph, sources: &[bool], node: &Node, port: usize) -> bool {
    match &node.op {
        NodeOp::Kernel(op) => may_compute_in_bf16(graph, node) && op.writes_bf16(port),
        op => (shares_memory(node) || op.is_transfer()) && !sources[node.outputs[port].index()],
    }
}

/// For each tensor: the first of the tensors with which it shares memory. They must have the same type.
fn roots(graph: &Graph) -> Vec<usize> {
    let mut roots: Vec<usize> = (0..graph.tensors.len()).collect();
    for node in graph.nodes.iter().filter(|node| shares_memory(node)) {
        roots[node.outputs[0].index()] = roots[node.inputs[0].index()];
    }
    roots
}

/// Inserts a cast, or a parameter's bf16 copy, where a node reads an f32 input in bf16. Nodes of one role share a cast.
fn insert_casts(graph: &mut Graph) {
    let nodes = std::mem::take(&mut graph.nodes);
    let mut rebuilt: Vec<Node> = Vec::new();
    // The casts by tensor and role. The role is `None` for a parameter's copy, which nodes of all roles read.
    let mut casts: BTreeMap<(Var, Option<Role>), Var> = BTreeMap::new();
    for mut node in nodes {
        for port in 0..node.inputs.len() {
            let input = node.inputs[port];
            let dtype = graph.tensor(input).dtype;
            let reads_bf16 = match read_type(graph, &node, port) {
                ReadType::Bf16 => true,
                ReadType::AsWritten => bf16_ports(&node).any(|p| graph.tensor(node.outputs[p]).dtype == DType::BF16),
                ReadType::SharedMemory | ReadType::F32 => false,
            };
            if !reads_bf16 || dtype != DType::F32 {
                continue;
            }
            let producer = &rebuilt[graph.tensor(input).producer.index()];
            let has_copy = matches!(producer.op, NodeOp::Parameter { .. }) && producer.placement == node.placement;
            // A cast before a transfer runs on the placement and with the role of the producer.
            let at = if node.op.is_transfer() { producer } else { &node };
            let key = (input, (!has_copy).then_some(at.role));
            node.inputs[port] = match casts.get(&key) {
                Some(cast) => *cast,
                None => {
                    let cast = if has_copy {
                        bf16_copy(graph, input, producer.clone())
                    } else {
                        cast(graph, input, at, &node)
                    };
                    let out = cast.outputs[0];
                    casts.insert(key, out);
                    graph.push_rebuilt(&mut rebuilt, cast);
                    out
                }
            };
        }
        if let NodeOp::Boxing(step) = &node.op
            && graph.tensor(node.outputs[0]).dtype == DType::BF16
        {
            node.op = NodeOp::Boxing(Arc::new(BoxingStep { dtype: DType::BF16, ..(**step).clone() }));
        }
        let updated = node.updates.first().and_then(|var| Some((*var, *casts.get(&(*var, None))?)));
        let refreshed = updated.map(|(parameter, copy)| Node {
            name: format!("{}.cast", graph.tensor(parameter).name),
            op: NodeOp::Kernel(Op::Cast),
            inputs: vec![parameter],
            updates: vec![copy],
            ..node.clone()
        });
        graph.push_rebuilt(&mut rebuilt, node);
        refreshed.into_iter().for_each(|cast| graph.push_rebuilt(&mut rebuilt, cast));
    }
    graph.nodes = rebuilt;
}

fn bf16_copy(graph: &mut Graph, of: Var, parameter: Node) -> Node {
    let info = graph.tensor(of).clone();
    let name = format!("{}.bf16", info.name);
    let info = TensorInfo { name: name.clone(), dtype: DType::BF16, saved_shape: None, ..info };
    let out = graph.new_tensor(info, parameter.location);
    Node { name, op: NodeOp::Bf16Copy { of }, outputs: vec![out], ..parameter }
}

/// A cast for `reader`, with the placement, role and rate of `at`.
fn cast(graph: &mut Graph, input: Var, at: &Node, reader: &Node) -> Node {
    let info = graph.tensor(input).clone();
    let name = format!("{}.cast", info.name);
    let (dtype, rate) = (DType::BF16, at.rate);
    let info = TensorInfo { name: name.clone(), dtype, rate, saved_shape: None, ..info };
    let out = graph.new_tensor(info, reader.location);
    let node = Node::between(name, NodeOp::Kernel(Op::Cast), (input, out), at.placement, reader);
    Node { role: at.role, rate: at.rate, ..node }
}
