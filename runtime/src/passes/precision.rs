//! Stores activations and their gradients in bf16, where all who read them take that: products, attention and elementwise ops
//! then compute on half the bytes, in f32 inside. Parameters, their sums over micro-batches, statistics, scalars, the update and
//! whatever a collective moves stay in f32; who reads one of these in bf16 gets a cast of it, which of a parameter as it lies
//! is made once a step, by the update.
//!
//! Micikevicius et al. 2018, <https://arxiv.org/abs/1710.03740>, with the range of bf16, so without scaling of the loss
//! (Kalamkar et al. 2019, <https://arxiv.org/abs/1905.12322>).
//!
//! It runs when layouts and their changes are settled, so a cast is local, and lies as what it casts.

use std::collections::BTreeMap;
use std::sync::Arc;

use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::DType;

use crate::boxing::step::{BoxingStep, StepKind};
use crate::graph::{Graph, Node, NodeId, NodeOp, Phase, Rate, TensorInfo, Var};

/// How the floats of a step are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// All of them in f32.
    #[default]
    F32,
    /// Activations and their gradients in bf16, all else in f32.
    BF16,
}

/// What a tensor's readers ask of its type.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    /// Somebody reads it in bf16.
    half: bool,
    /// Somebody reads or makes it in f32.
    whole: bool,
}

impl Asked {
    fn is_half(self) -> bool {
        self.half && !self.whole
    }
}

/// Gives tensors the type bf16, and puts in the casts that this needs.
pub fn narrow(graph: &mut Graph) {
    let (classes, given) = (Classes::of(graph), given(graph));
    let mut asked = vec![Asked::default(); graph.tensors.len()];
    // The host gets floats as it knows them.
    for output in &graph.outputs {
        asked[classes.root(output.tensor)].whole = true;
    }
    // Backwards, so that what a node makes is settled before what it reads.
    for node in graph.nodes.iter().rev() {
        for (port, output) in node.outputs.iter().enumerate() {
            asked[classes.root(*output)].whole |= !may_write_half(graph, &given, node, port);
        }
        let half = |port: usize| asked[classes.root(node.outputs[port])].is_half();
        let made_half = half_ports(node).next().is_some() && half_ports(node).all(half);
        if matches!(how(graph, node), Reads::AsWritten) && !made_half {
            half_ports(node).for_each(|port| asked[classes.root(node.outputs[port])].whole = true);
        }
        for (port, input) in node.inputs.iter().enumerate() {
            let asked = &mut asked[classes.root(*input)];
            match reads(graph, node, port) {
                Reads::InPlace => {}
                Reads::Half => asked.half = true,
                Reads::AsWritten if made_half => asked.half = true,
                Reads::AsWritten | Reads::Whole => asked.whole = true,
            }
        }
    }
    for index in 0..graph.tensors.len() {
        let is_half = asked[classes.root(graph.var(index))].is_half();
        let tensor = &mut graph.tensors[index];
        if tensor.dtype == DType::F32 && is_half {
            tensor.dtype = DType::BF16;
        }
    }
    insert_casts(graph);
}

/// How a node reads its floats.
enum Reads {
    /// What it makes is what it reads, or a part of it.
    InPlace,
    /// In the type that it writes: so a term of a sum that is in f32, be it over devices or over uses of a weight, is f32.
    AsWritten,
    Half,
    Whole,
}

fn how(graph: &Graph, node: &Node) -> Reads {
    match &node.op {
        NodeOp::Kernel(op) if computes(graph, node) => match op {
            Op::Einsum(_) | Op::Attention { .. } | Op::LayerNorm { .. } => Reads::Half,
            Op::RowMax | Op::SumExpTarget { .. } | Op::SumLeading | Op::EmbeddingGrad { .. } => Reads::Half,
            _ => Reads::AsWritten,
        },
        _ if stays_here(node) => Reads::InPlace,
        _ if is_transfer(node) => Reads::AsWritten,
        _ => Reads::Whole,
    }
}

fn reads(graph: &Graph, node: &Node, port: usize) -> Reads {
    match &node.op {
        NodeOp::Kernel(op) if !op.reads_bf16(port) => Reads::Whole,
        _ => how(graph, node),
    }
}

/// The outputs of a node that may be bf16.
fn half_ports(node: &Node) -> impl Iterator<Item = usize> + '_ {
    (0..node.outputs.len()).filter(|port| match &node.op {
        NodeOp::Kernel(op) => op.writes_bf16(*port),
        _ => true,
    })
}

/// For each tensor: is it an input, a parameter, or what they are moved to? They are there before anything runs, and a cast would
/// make whoever fetches them wait for it.
fn given(graph: &Graph) -> Vec<bool> {
    let mut given = vec![false; graph.tensors.len()];
    for node in &graph.nodes {
        let is_given = match &node.op {
            NodeOp::Input | NodeOp::Parameter { .. } => true,
            _ => (stays_here(node) || is_transfer(node)) && node.inputs.iter().all(|input| given[input.index()]),
        };
        node.outputs.iter().for_each(|output| given[output.index()] = is_given);
    }
    given
}

fn stays_here(node: &Node) -> bool {
    match &node.op {
        NodeOp::Relayout => true,
        NodeOp::Boxing(step) => step.kind == StepKind::Slice,
        _ => false,
    }
}

fn is_transfer(node: &Node) -> bool {
    matches!(&node.op, NodeOp::Boxing(step) if step.kind == StepKind::Transfer)
}

/// True for nodes that may compute on bf16: those of each micro-batch, but for what is done with scalars, such as losses.
fn computes(graph: &Graph, node: &Node) -> bool {
    let is_scalar = node.outputs.iter().all(|output| graph.shape(*output).is_empty());
    node.phase.rate() == Rate::MicroBatch && !is_scalar
}

fn may_write_half(graph: &Graph, given: &[bool], node: &Node, port: usize) -> bool {
    match &node.op {
        NodeOp::Kernel(op) => computes(graph, node) && op.writes_bf16(port),
        _ => (stays_here(node) || is_transfer(node)) && !given[node.outputs[port].index()],
    }
}

/// Tensors that must have one type, because one is the other's memory or a part of it.
struct Classes(Vec<usize>);

impl Classes {
    fn of(graph: &Graph) -> Self {
        let mut classes = Self((0..graph.tensors.len()).collect());
        for node in graph.nodes.iter().filter(|node| stays_here(node)) {
            for (input, output) in node.inputs.iter().zip(&node.outputs) {
                let (from, to) = (classes.root(*input), classes.root(*output));
                classes.0[to] = from;
            }
        }
        classes
    }

    fn root(&self, var: Var) -> usize {
        let mut index = var.index();
        while self.0[index] != index {
            index = self.0[index];
        }
        index
    }
}

/// Casts what a node reads in another type than it has: once for all nodes of a phase. A parameter that is read as it lies has a
/// copy instead, which the update casts anew, so no micro-batch has to.
fn insert_casts(graph: &mut Graph) {
    let nodes = std::mem::take(&mut graph.nodes);
    let mut made: Vec<Node> = Vec::new();
    // By the phase that a cast is made in; a parameter's copy is there in all of them.
    let mut casts: BTreeMap<(Var, Option<Phase>), Var> = BTreeMap::new();
    for mut node in nodes {
        for port in 0..node.inputs.len() {
            let input = node.inputs[port];
            let has = graph.tensor(input).dtype;
            let wants_half = match reads(graph, &node, port) {
                Reads::Half => true,
                Reads::AsWritten => half_ports(&node).any(|p| graph.tensor(node.outputs[p]).dtype == DType::BF16),
                Reads::InPlace | Reads::Whole => false,
            };
            if !wants_half || has != DType::F32 {
                continue;
            }
            let producer = &made[graph.tensor(input).producer.index()];
            let as_it_lies = matches!(producer.op, NodeOp::Parameter { .. }) && producer.placement == node.placement;
            // What travels is cast where and when it is made.
            let at = if is_transfer(&node) { producer } else { &node };
            let key = (input, (!as_it_lies).then_some(at.phase));
            node.inputs[port] = match casts.get(&key) {
                Some(cast) => *cast,
                None => {
                    let (placement, phase) = (at.placement, at.phase);
                    let cast = if as_it_lies {
                        half(graph, input, producer.clone())
                    } else {
                        cast(graph, input, (placement, phase), &node)
                    };
                    let out = cast.outputs[0];
                    casts.insert(key, out);
                    push(graph, &mut made, cast);
                    out
                }
            };
        }
        if let NodeOp::Boxing(step) = &node.op
            && graph.tensor(node.outputs[0]).dtype == DType::BF16
        {
            node.op = NodeOp::Boxing(Arc::new(of_half_the_bytes(step)));
        }
        let updated = node.updates.first().and_then(|var| Some((*var, *casts.get(&(*var, None))?)));
        let refreshed = updated.map(|(parameter, copy)| Node {
            name: format!("{}.cast", graph.tensor(parameter).name),
            op: NodeOp::Kernel(Op::Cast),
            inputs: vec![parameter],
            updates: vec![copy],
            ..node.clone()
        });
        push(graph, &mut made, node);
        refreshed.into_iter().for_each(|cast| push(graph, &mut made, cast));
    }
    graph.nodes = made;
}

/// A parameter's copy in bf16.
fn half(graph: &mut Graph, of: Var, parameter: Node) -> Node {
    let info = graph.tensor(of).clone();
    let name = format!("{}.bf16", info.name);
    let info = TensorInfo { name: name.clone(), dtype: DType::BF16, saved_shape: None, ..info };
    let out = graph.new_tensor(info, parameter.location);
    Node { name, op: NodeOp::Half { of }, outputs: vec![out], ..parameter }
}

fn push(graph: &mut Graph, made: &mut Vec<Node>, node: Node) {
    for output in &node.outputs {
        graph.tensors[output.index()].producer = NodeId(made.len() as u32);
    }
    made.push(node);
}

fn of_half_the_bytes(step: &BoxingStep) -> BoxingStep {
    let halved = |bytes: &usize| bytes / DType::F32.bytes() * DType::BF16.bytes();
    BoxingStep { bytes_received: step.bytes_received.iter().map(halved).collect(), ..step.clone() }
}

/// A cast of `input` to bf16 for `reader`.
fn cast(graph: &mut Graph, input: Var, (placement, phase): (usize, Phase), reader: &Node) -> Node {
    let info = graph.tensor(input).clone();
    let name = format!("{}.cast", info.name);
    let (dtype, rate) = (DType::BF16, phase.rate());
    let info = TensorInfo { name: name.clone(), dtype, rate, saved_shape: None, ..info };
    let out = graph.new_tensor(info, reader.location);
    Node {
        name,
        op: NodeOp::Kernel(Op::Cast),
        inputs: vec![input],
        outputs: vec![out],
        updates: Vec::new(),
        placement,
        phase,
        location: reader.location,
        signature: None,
    }
}
