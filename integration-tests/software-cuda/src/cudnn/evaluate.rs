//! Evaluates a graph operation by operation in plain f32 loops, through the checked memory.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use cudarc::cudnn::sys::cudnnPointwiseMode_t as Mode;

use super::graph::{BFLOAT16, BOOLEAN, FLOAT, Graph, INT32, Node, Tensor};
use crate::nccl::data::to_bf16;
use crate::shadow::{Access, Accessor};

/// An execution of a graph.
pub(crate) struct GraphExecution {
    graph: Arc<Graph>,
    /// Addresses by tensor id.
    addresses: HashMap<i64, usize>,
    /// Values of host scalars by tensor id. They were read when the execution was submitted.
    numbers: HashMap<i64, f32>,
    workspace: (usize, usize),
}

impl GraphExecution {
    /// # Safety
    ///
    /// For each tensor by value, the pointer points to an f32.
    pub(super) unsafe fn new(
        graph: Arc<Graph>,
        pointers: &HashMap<i64, usize>,
        workspace: (usize, usize),
    ) -> Result<GraphExecution, String> {
        let (mut addresses, mut numbers) = (HashMap::new(), HashMap::new());
        for (id, tensor) in graph.tensors.iter().filter(|(_, tensor)| !tensor.is_virtual) {
            let address = pointers.get(id).copied().unwrap_or(0);
            if address == 0 {
                return Err(format!("executes a plan without an address for tensor {id}"));
            }
            if tensor.is_by_value {
                // SAFETY: the caller keeps the contract above.
                numbers.insert(*id, unsafe { *(address as *const f32) });
            } else if !address.is_multiple_of(tensor.alignment) {
                return Err(format!("executes a plan with tensor {id} not aligned to {} bytes", tensor.alignment));
            } else {
                addresses.insert(*id, address);
            }
        }
        Ok(GraphExecution { graph, addresses, numbers, workspace })
    }
}

/// The elements of a tensor. The strides determine the offset of each element.
type Values = Vec<f32>;

/// Executes the graph.
pub fn run(accessor: &mut Accessor, execution: &GraphExecution) {
    let pointers: Vec<usize> = execution.addresses.values().copied().chain([execution.workspace.0]).collect();
    accessor.allow_only(&pointers);
    if !accessor.touch(execution.workspace.0, execution.workspace.1, Access::Write) {
        return;
    }
    let mut known: HashMap<i64, Values> = HashMap::new();
    for node in &execution.graph.nodes {
        let (reads, write) = node.ids();
        for id in reads {
            let Entry::Vacant(new) = known.entry(id) else { continue };
            let values = match execution.numbers.get(&id) {
                Some(number) => Some(vec![*number]),
                None => load(accessor, execution.addresses[&id], &execution.graph.tensors[&id]),
            };
            let Some(values) = values else { return };
            new.insert(values);
        }
        let to = &execution.graph.tensors[&write];
        let mut made = evaluate(&execution.graph, node, &known);
        // If a product is an f32 tensor in memory and is read later, NVIDIA's engines add it to the old values.
        let is_read = || execution.graph.nodes.iter().any(|other| other.ids().0.contains(&write));
        if matches!(node, Node::Matmul { .. }) && !to.is_virtual && to.data == FLOAT && is_read() {
            let Some(before) = load(accessor, execution.addresses[&write], to) else { return };
            made.iter_mut().zip(before).for_each(|(value, before)| *value += before);
        }
        made.iter_mut().for_each(|value| *value = rounded(*value, to.data));
        if !to.is_virtual && store(accessor, execution.addresses[&write], to, &made).is_none() {
            return;
        }
        known.insert(write, made);
    }
}

fn rounded(value: f32, data: i64) -> f32 {
    match data {
        BFLOAT16 => f32::from_bits(u32::from(to_bf16(value)) << 16),
        INT32 | BOOLEAN => value.trunc(),
        _ => value,
    }
}

fn span(tensor: &Tensor) -> usize {
    1 + tensor.dims.iter().zip(&tensor.strides).map(|(extent, stride)| (extent - 1) * stride).sum::<usize>()
}

/// Calls `f` with each index, in order.
fn indices(dims: &[usize], mut f: impl FnMut(&[usize])) {
    let mut index = vec![0; dims.len()];
    for _ in 0..dims.iter().product::<usize>() {
        f(&index);
        for (at, extent) in index.iter_mut().zip(dims).rev() {
            *at += 1;
            if *at < *extent {
                break;
            }
            *at = 0;
        }
    }
}

/// Returns the offset of an element. A dim of size 1 is broadcast.
fn place(tensor: &Tensor, index: &[usize]) -> usize {
    let sides = tensor.dims.iter().zip(&tensor.strides);
    sides.zip(index).map(|((extent, stride), at)| if *extent == 1 { 0 } else { at * stride }).sum()
}

fn evaluate(graph: &Graph, node: &Node, known: &HashMap<i64, Values>) -> Values {
    let of = |id: &i64| (&graph.tensors[id], &known[id][..]);
    let (_, write) = node.ids();
    let to = &graph.tensors[&write];
    let mut out = vec![0.0; span(to)];
    match node {
        Node::Matmul { a, b, .. } => {
            let ((ta, a), (tb, b)) = (of(a), of(b));
            let rank = to.dims.len();
            let (step_a, step_b, inner) = (ta.strides[rank - 1], tb.strides[rank - 2], ta.dims[rank - 1]);
            let (mut at_a, mut at_b) = (vec![0; rank], vec![0; rank]);
            indices(&to.dims, |index| {
                at_a.copy_from_slice(index);
                at_b.copy_from_slice(index);
                (at_a[rank - 1], at_b[rank - 2]) = (0, 0);
                let (first_a, first_b) = (place(ta, &at_a), place(tb, &at_b));
                let products =
                    (0..inner).map(|k| f64::from(a[first_a + k * step_a]) * f64::from(b[first_b + k * step_b]));
                out[place(to, index)] = products.sum::<f64>() as f32;
            });
        }
        Node::Pointwise { mode, axis, x, b, t, .. } => {
            let (x, b, t) = (of(x), b.as_ref().map(of), t.as_ref().map(of));
            let value = |(tensor, values): (&Tensor, &[f32]), index: &[usize]| values[place(tensor, index)];
            indices(&to.dims, |index| {
                let get = |operand: Option<(&Tensor, &[f32])>| operand.map_or(0.0, |operand| value(operand, index));
                let index_of = axis.map_or(0, |axis| index[axis]);
                out[place(to, index)] = pointwise(*mode, [value(x, index), get(b), get(t)], index_of);
            });
        }
        Node::Reduction { is_max, x, .. } => {
            let (tensor, values) = of(x);
            let mut sums = vec![if *is_max { f64::NEG_INFINITY } else { 0.0 }; out.len()];
            indices(&tensor.dims, |index| {
                let (sum, value) = (&mut sums[place(to, index)], f64::from(values[place(tensor, index)]));
                *sum = if *is_max { sum.max(value) } else { *sum + value };
            });
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum as f32);
        }
        Node::Reshape { x, .. } => {
            let values = of(x).1;
            indices(&to.dims, |index| {
                let at = place(to, index);
                out[at] = values[at];
            });
        }
    }
    out
}

fn pointwise(mode: i64, [x, b, t]: [f32; 3], index: usize) -> f32 {
    let is = |expected: Mode| mode == expected as i64;
    if is(Mode::CUDNN_POINTWISE_ADD) {
        x + b
    } else if is(Mode::CUDNN_POINTWISE_SUB) {
        x - b
    } else if is(Mode::CUDNN_POINTWISE_MUL) {
        x * b
    } else if is(Mode::CUDNN_POINTWISE_DIV) {
        x / b
    } else if is(Mode::CUDNN_POINTWISE_EXP) {
        x.exp()
    } else if is(Mode::CUDNN_POINTWISE_LOG) {
        x.ln()
    } else if is(Mode::CUDNN_POINTWISE_IDENTITY) {
        x
    } else if is(Mode::CUDNN_POINTWISE_GEN_INDEX) {
        index as f32
    } else if is(Mode::CUDNN_POINTWISE_CMP_GE) {
        f32::from(x >= b)
    } else if is(Mode::CUDNN_POINTWISE_BINARY_SELECT) {
        if t != 0.0 { x } else { b }
    } else {
        // The mode is not emulated. If a test uses the result, the NaN makes the test fail.
        f32::NAN
    }
}

fn bytes_of(data: i64) -> usize {
    match data {
        BFLOAT16 => 2,
        BOOLEAN => 1,
        _ => 4,
    }
}

/// Calls `f` with the offset and length of each contiguous run of elements.
fn runs(tensor: &Tensor, mut f: impl FnMut(usize, usize) -> Option<()>) -> Option<()> {
    let along = tensor.dims.iter().zip(&tensor.strides).position(|(extent, stride)| *stride == 1 && *extent > 1);
    let mut dims = tensor.dims.clone();
    let length = along.map_or(1, |along| std::mem::replace(&mut dims[along], 1));
    let mut starts = Vec::new();
    let shortened = Tensor { dims: dims.clone(), ..tensor.clone() };
    indices(&dims, |index| starts.push(place(&shortened, index)));
    starts.into_iter().try_for_each(|start| f(start, length))
}

fn load(accessor: &mut Accessor, address: usize, tensor: &Tensor) -> Option<Values> {
    let (mut out, bytes) = (vec![0.0; span(tensor)], bytes_of(tensor.data));
    runs(tensor, |start, length| {
        let at = address + start * bytes;
        if !accessor.touch(at, length * bytes, Access::Read) {
            return None;
        }
        // SAFETY: the run was checked above.
        let raw = unsafe { std::slice::from_raw_parts(at as *const u8, length * bytes) };
        for (value, element) in out[start..].iter_mut().zip(raw.chunks_exact(bytes)) {
            *value = match *element {
                [a, b] => f32::from_bits(u32::from(u16::from_le_bytes([a, b])) << 16),
                [a, b, c, d] if tensor.data == INT32 => i32::from_le_bytes([a, b, c, d]) as f32,
                [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                _ => f32::from(element[0]),
            };
        }
        Some(())
    })?;
    Some(out)
}

fn store(accessor: &mut Accessor, address: usize, tensor: &Tensor, values: &[f32]) -> Option<()> {
    let bytes = bytes_of(tensor.data);
    runs(tensor, |start, length| {
        let at = address + start * bytes;
        if !accessor.touch(at, length * bytes, Access::Write) {
            return None;
        }
        // SAFETY: the run was checked above. Only operations access it, and operations run one at a time.
        let raw = unsafe { std::slice::from_raw_parts_mut(at as *mut u8, length * bytes) };
        for (element, value) in raw.chunks_exact_mut(bytes).zip(&values[start..]) {
            match (bytes, tensor.data) {
                (2, _) => element.copy_from_slice(&to_bf16(*value).to_le_bytes()),
                (4, INT32) => element.copy_from_slice(&(*value as i32).to_le_bytes()),
                (4, _) => element.copy_from_slice(&value.to_le_bytes()),
                _ => element[0] = u8::from(*value != 0.0),
            }
        }
        Some(())
    })
}
