//! A graph of operations, read from descriptors and checked: shapes fit, ids are unique, what is nowhere is made
//! before it is used.

use std::collections::{HashMap, HashSet};

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Attribute, cudnnBackendDescriptorType_t as DescriptorKind,
    cudnnPointwiseMode_t as Mode, cudnnReduceTensorOp_t as Reduction, cudnnStatus_t as Answer,
};

use super::{Descriptor, misuse, refuse};

/// Numbers of the types of elements.
pub const FLOAT: i64 = 0;
/// The same.
pub const INT32: i64 = 4;
/// The same.
pub const BFLOAT16: i64 = 9;
/// The same.
pub const BOOLEAN: i64 = 11;

/// A tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Extents.
    pub dims: Vec<usize>,
    /// Elements from one index to the next.
    pub strides: Vec<usize>,
    /// Number of its type.
    pub data: i64,
    /// Bytes that its address is a multiple of.
    pub alignment: usize,
    /// It is nowhere in memory.
    pub is_virtual: bool,
    /// It is a number of the host.
    pub is_by_value: bool,
}

/// What an operation does, to tensors by their ids.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// `c = a b`.
    Matmul { a: i64, b: i64, c: i64 },
    /// Element by element.
    Pointwise { mode: i64, axis: Option<usize>, x: i64, b: Option<i64>, t: Option<i64>, y: i64 },
    /// Over the dims that y has not.
    Reduction { is_max: bool, x: i64, y: i64 },
    /// The same memory, seen with other dims and strides.
    Reshape { x: i64, y: i64 },
}

impl Node {
    /// Ids that are read, and the one that is written.
    pub fn ids(&self) -> (Vec<i64>, i64) {
        match *self {
            Node::Matmul { a, b, c } => (vec![a, b], c),
            Node::Pointwise { x, b, t, y, .. } => ([Some(x), b, t].into_iter().flatten().collect(), y),
            Node::Reduction { x, y, .. } | Node::Reshape { x, y } => (vec![x], y),
        }
    }
}

/// The graph.
#[derive(Debug, Default)]
pub struct Graph {
    /// By their unique ids.
    pub tensors: HashMap<i64, Tensor>,
    /// In order.
    pub nodes: Vec<Node>,
}

fn wrong<T>(what: &str) -> Result<T, Answer> {
    misuse(Answer::CUDNN_STATUS_BAD_PARAM, what)
}

fn tensor(descriptor: &Descriptor) -> Tensor {
    let many = |name| descriptor.longs(name).iter().map(|&value| value.max(0) as usize).collect();
    let is = |name| descriptor.long(name).unwrap_or(0) != 0;
    Tensor {
        dims: many(Attribute::CUDNN_ATTR_TENSOR_DIMENSIONS),
        strides: many(Attribute::CUDNN_ATTR_TENSOR_STRIDES),
        data: descriptor.long(Attribute::CUDNN_ATTR_TENSOR_DATA_TYPE).unwrap_or(-1),
        alignment: descriptor.long(Attribute::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT).unwrap_or(0).max(0) as usize,
        is_virtual: is(Attribute::CUDNN_ATTR_TENSOR_IS_VIRTUAL),
        is_by_value: is(Attribute::CUDNN_ATTR_TENSOR_IS_BY_VALUE),
    }
}

/// Whether a tensor makes sense by itself.
pub(super) fn check_tensor(descriptor: &Descriptor) -> Result<(), Answer> {
    let tensor = tensor(descriptor);
    let extents = || tensor.dims.iter().chain(&tensor.strides);
    if tensor.dims.len() != tensor.strides.len() || extents().any(|&extent| extent == 0) {
        return wrong("a tensor's dims and strides do not fit together");
    }
    if !tensor.alignment.is_power_of_two() || (tensor.is_virtual && tensor.is_by_value) {
        return wrong("a tensor's alignment or place makes no sense");
    }
    if ![FLOAT, INT32, BFLOAT16, BOOLEAN].contains(&tensor.data) || (tensor.is_by_value && tensor.data != FLOAT) {
        return refuse(&format!("a tensor of type {}", tensor.data));
    }
    // Each index has an element of its own, or results would depend on the order of writing.
    let mut sides: Vec<(usize, usize)> = tensor.strides.iter().copied().zip(tensor.dims.iter().copied()).collect();
    sides.retain(|(_, extent)| *extent > 1);
    sides.sort_unstable();
    let mut end = 1;
    for (stride, extent) in sides {
        if stride < end {
            return wrong("a tensor's elements lie over each other");
        }
        end += stride * (extent - 1);
    }
    Ok(())
}

impl Graph {
    /// Adds an operation, which may not be sealed yet.
    pub(super) fn add(&mut self, all: &HashMap<u64, Descriptor>, operation: &Descriptor) -> Result<(), Answer> {
        use Attribute::*;
        let found = |name: Attribute| all.get(&(operation.long(name)? as u64));
        let mut id = |name: Attribute| -> Result<Option<i64>, Answer> {
            let Some(descriptor) = found(name) else { return Ok(None) };
            let Some(id) = descriptor.long(CUDNN_ATTR_TENSOR_UNIQUE_ID) else {
                return wrong("an operand is no tensor");
            };
            let new = tensor(descriptor);
            if self.tensors.insert(id, new.clone()).is_some_and(|old| old != new) {
                return wrong(&format!("two tensors have the unique id {id}"));
            }
            Ok(Some(id))
        };
        let mut must = |name| id(name).and_then(|id| id.ok_or(Answer::CUDNN_STATUS_BAD_PARAM));
        let of = |name: Attribute, what: Attribute| found(name).and_then(|descriptor| descriptor.long(what));
        let node = match operation.kind {
            DescriptorKind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR => {
                if of(CUDNN_ATTR_OPERATION_MATMUL_DESC, CUDNN_ATTR_MATMUL_COMP_TYPE) != Some(FLOAT) {
                    return refuse("a product that is not computed in floats");
                }
                let [a, b, c] = [
                    CUDNN_ATTR_OPERATION_MATMUL_ADESC,
                    CUDNN_ATTR_OPERATION_MATMUL_BDESC,
                    CUDNN_ATTR_OPERATION_MATMUL_CDESC,
                ]
                .map(&mut must);
                Node::Matmul { a: a?, b: b?, c: c? }
            }
            DescriptorKind::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR => {
                let operator = of(CUDNN_ATTR_OPERATION_REDUCTION_DESC, CUDNN_ATTR_REDUCTION_OPERATOR);
                let is = |kind: Reduction| operator == Some(kind as i64);
                let is_max = is(Reduction::CUDNN_REDUCE_TENSOR_MAX);
                if !is_max && !is(Reduction::CUDNN_REDUCE_TENSOR_ADD) {
                    return refuse(&format!("reduction {operator:?}"));
                }
                let [x, y] =
                    [CUDNN_ATTR_OPERATION_REDUCTION_XDESC, CUDNN_ATTR_OPERATION_REDUCTION_YDESC].map(&mut must);
                Node::Reduction { is_max, x: x?, y: y? }
            }
            DescriptorKind::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR => {
                let [x, y] = [CUDNN_ATTR_OPERATION_RESHAPE_XDESC, CUDNN_ATTR_OPERATION_RESHAPE_YDESC].map(&mut must);
                Node::Reshape { x: x?, y: y? }
            }
            DescriptorKind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR => {
                let what = CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR;
                let Some(mode) = of(what, CUDNN_ATTR_POINTWISE_MODE) else {
                    return wrong("an operation without a mode");
                };
                let axis = of(what, CUDNN_ATTR_POINTWISE_AXIS).map(|axis| axis as usize);
                let (x, y) = (must(CUDNN_ATTR_OPERATION_POINTWISE_XDESC)?, must(CUDNN_ATTR_OPERATION_POINTWISE_YDESC)?);
                let b = id(CUDNN_ATTR_OPERATION_POINTWISE_BDESC)?;
                let t = id(CUDNN_ATTR_OPERATION_POINTWISE_TDESC)?;
                Node::Pointwise { mode, axis, x, b, t, y }
            }
            other => return wrong(&format!("a graph has a {other:?} as an operation")),
        };
        self.check_node(&node)?;
        self.nodes.push(node);
        Ok(())
    }

    fn check_node(&self, node: &Node) -> Result<(), Answer> {
        let dims = |id: &i64| &self.tensors[id].dims[..];
        let fits = match node {
            Node::Matmul { a, b, c } => {
                let (a, b, c) = (dims(a), dims(b), dims(c));
                let rank = c.len();
                let same = rank >= 2 && [a.len(), b.len()] == [rank; 2];
                same && a[..rank - 2] == c[..rank - 2]
                    && b[..rank - 2] == c[..rank - 2]
                    && [a[rank - 2], b[rank - 1], a[rank - 1]] == [c[rank - 2], c[rank - 1], b[rank - 2]]
            }
            Node::Pointwise { mode, axis, x, b, t, y } => {
                let is = |wanted: Mode| *mode == wanted as i64;
                let operands = match (b, t) {
                    (None, None) => 1,
                    (Some(_), None) => 2,
                    (Some(_), Some(_)) => 3,
                    (None, Some(_)) => 0,
                };
                let wanted = if is(Mode::CUDNN_POINTWISE_BINARY_SELECT) {
                    3
                } else if [Mode::CUDNN_POINTWISE_EXP, Mode::CUDNN_POINTWISE_LOG, Mode::CUDNN_POINTWISE_IDENTITY]
                    .into_iter()
                    .any(is)
                {
                    1
                } else if is(Mode::CUDNN_POINTWISE_GEN_INDEX) {
                    if axis.is_none_or(|axis| axis >= dims(y).len()) {
                        return wrong("an index without a dim");
                    }
                    1
                } else {
                    2
                };
                let repeats = |id: &i64| {
                    let (from, to) = (dims(id), dims(y));
                    from.len() == to.len() && from.iter().zip(to).all(|(from, to)| from == to || *from == 1)
                };
                operands == wanted && repeats(x) && b.iter().chain(t).all(repeats)
            }
            Node::Reduction { x, y, .. } => {
                let (x, y) = (dims(x), dims(y));
                x.len() == y.len() && x.iter().zip(y).all(|(x, y)| x == y || *y == 1)
            }
            Node::Reshape { x, y } => dims(x).iter().product::<usize>() == dims(y).iter().product::<usize>(),
        };
        if fits { Ok(()) } else { wrong(&format!("operands do not fit together: {node:?}")) }
    }

    /// Checks the graph as a whole.
    pub(super) fn check(&self) -> Result<(), Answer> {
        let mut written = HashSet::new();
        for node in &self.nodes {
            let (reads, write) = node.ids();
            if let Some(id) = reads.iter().find(|id| self.tensors[id].is_virtual && !written.contains(*id)) {
                return wrong(&format!("tensor {id} is read before it is made"));
            }
            if !written.insert(write) || self.tensors[&write].is_by_value {
                return wrong(&format!("tensor {write} is made twice, or is given"));
            }
        }
        Ok(())
    }

    /// Whether a fused engine of attention would take it: two products at least, with heads of a depth that 8 divides.
    pub(super) fn has_engine(&self) -> bool {
        let products = self.nodes.iter().filter(|node| matches!(node, Node::Matmul { .. })).count();
        let deep = |t: &Tensor| {
            let runs = t.dims.iter().zip(&t.strides).filter(|(_, stride)| **stride == 1);
            runs.map(|(extent, _)| extent).max().is_some_and(|depth| depth.is_multiple_of(8) && *depth <= 256)
        };
        let halves = |t: &&Tensor| t.data == BFLOAT16 && !t.is_virtual;
        products >= 2 && self.tensors.values().filter(halves).all(deep)
    }
}
