//! Checks that token ids are in the vocabulary, because a shard of a split table cannot detect invalid ids.

use std::collections::BTreeMap;

use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::{HostTensor, element_count};

use super::error::SessionError;
use crate::graph::{Graph, Node, NodeOp, Var};
use crate::plan::Plan;

/// For each input of token ids, by name: the vocabulary size, the smallest one if several tables or logits use the ids.
pub(super) fn vocabularies(graph: &Graph) -> BTreeMap<String, usize> {
    let mut out = BTreeMap::new();
    for node in graph.nodes() {
        let NodeOp::Kernel(op) = &node.op else { continue };
        let (ids, tokens) = match op {
            Op::Embedding { .. } => (node.inputs[0], graph.shape(node.inputs[1]).first()),
            Op::SumExpTarget { .. } => (node.inputs[2], graph.shape(node.inputs[0]).last()),
            _ => continue,
        };
        if let (Some(name), Some(&tokens)) = (input_name(graph, ids), tokens) {
            out.entry(name).and_modify(|least: &mut usize| *least = tokens.min(*least)).or_insert(tokens);
        }
    }
    out
}

/// Number of tokens per step: the elements of the largest input of token ids.
pub(super) fn tokens_per_step(plan: &Plan) -> u64 {
    let vocabularies = vocabularies(&plan.graph);
    let inputs = plan.graph.nodes().iter().filter(|node| vocabularies.contains_key(&node.name));
    let elements = |node: &Node| {
        let info = plan.graph.tensor(node.outputs[0]);
        element_count(&info.shape) * info.rate.per_step(plan.micro_batches)
    };
    inputs.map(elements).max().unwrap_or(0) as u64
}

/// Name of the input from which this value comes, in any layout.
fn input_name(graph: &Graph, mut var: Var) -> Option<String> {
    loop {
        let node = graph.producer(var);
        match node.op {
            NodeOp::Input => return Some(node.name.clone()),
            NodeOp::Relayout | NodeOp::Boxing(_) => var = node.inputs[0],
            _ => return None,
        }
    }
}

/// Returns an error if an id is negative or at least `tokens`.
pub(super) fn check_ids(name: &str, ids: &HostTensor, tokens: usize) -> Result<(), SessionError> {
    let values = ids.as_i32().unwrap_or_default();
    let Some(position) = values.iter().position(|id| usize::try_from(*id).map_or(true, |id| id >= tokens)) else {
        return Ok(());
    };
    let mut place = vec![0; ids.shape.len()];
    let mut rest = position;
    for (index, extent) in place.iter_mut().zip(&ids.shape).rev() {
        *index = rest % extent;
        rest /= extent;
    }
    let got = format!("token {} at {place:?}", values[position]);
    Err(SessionError::Input { name: name.into(), expected: format!("tokens of a vocabulary of {tokens}"), got })
}
