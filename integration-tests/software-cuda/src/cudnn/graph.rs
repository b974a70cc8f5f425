//! Reads a graph of operations from descriptors. Checks that shapes match, that ids are unique, and that virtual
//! tensors (tensors without memory) are written before they are read.

use std::collections::{HashMap, HashSet};

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Attribute, cudnnBackendDescriptorType_t as DescriptorKind,
    cudnnPointwiseMode_t as Mode, cudnnReduceTensorOp_t as Reduction, cudnnStatus_t as CudnnStatus,
};

use super::{Descriptor, misuse, refuse};

/// Element type f32.
pub const FLOAT: i64 = 0;
/// Element type i32.
pub const INT32: i64 = 4;
/// Element type bf16.
pub const BFLOAT16: i64 = 9;
/// Element type bool.
pub const BOOLEAN: i64 = 11;

/// A tensor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    /// Size of each dim.
    pub dims: Vec<usize>,
    /// For each dim, the number of elements from one index to the next.
    pub strides: Vec<usize>,
    /// The element type.
    pub data: i64,
    /// Alignment of the address in bytes.
    pub alignment: usize,
    /// Whether the tensor has no memory.
    pub is_virtual: bool,
    /// Whether the tensor is a host scalar.
    pub is_by_value: bool,
}

/// An operation. Its tensors are given by their ids.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Node {
    /// `c = a b`.
    Matmul { a: i64, b: i64, c: i64 },
    /// An elementwise function.
    Pointwise { mode: i64, axis: Option<usize>, x: i64, b: Option<i64>, t: Option<i64>, y: i64 },
    /// A reduction over the dims that have size 1 in y.
    Reduction { is_max: bool, x: i64, y: i64 },
    /// Gives y the memory of x, with other dims and strides.
    Reshape { x: i64, y: i64 },
}

impl Node {
    /// Returns the ids of the tensors that the operation reads, and the id of the tensor that it writes.
    pub fn ids(&self) -> (Vec<i64>, i64) {
        match *self {
            Node::Matmul { a, b, c } => (vec![a, b], c),
            Node::Pointwise { x, b, t, y, .. } => ([Some(x), b, t].into_iter().flatten().collect(), y),
            Node::Reduction { x, y, .. } | Node::Reshape { x, y } => (vec![x], y),
        }
    }
}

/// A graph of operations.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    /// Tensors by their unique ids.
    pub tensors: HashMap<i64, Tensor>,
    /// Operations in order.
    pub nodes: Vec<Node>,
}

fn invalid<T>(message: &str) -> Result<T, CudnnStatus> {
    misuse(CudnnStatus::CUDNN_STATUS_BAD_PARAM, &format!("describes an invalid graph: {message}"))
}

fn tensor(descriptor: &Descriptor) -> Tensor {
    let sizes = |name| descriptor.longs(name).iter().map(|&value| value.max(0) as usize).collect();
    let is = |name| descriptor.long(name).unwrap_or(0) != 0;
    Tensor {
        dims: sizes(Attribute::CUDNN_ATTR_TENSOR_DIMENSIONS),
        strides: sizes(Attribute::CUDNN_ATTR_TENSOR_STRIDES),
        data: descriptor.long(Attribute::CUDNN_ATTR_TENSOR_DATA_TYPE).unwrap_or(-1),
        alignment: descriptor.long(Attribute::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT).unwrap_or(0).max(0) as usize,
        is_virtual: is(Attribute::CUDNN_ATTR_TENSOR_IS_VIRTUAL),
        is_by_value: is(Attribute::CUDNN_ATTR_TENSOR_IS_BY_VALUE),
    }
}

/// Checks a tensor without the rest of its graph.
pub(super) fn check_tensor(descriptor: &Descriptor) -> Result<(), CudnnStatus> {
    let tensor = tensor(descriptor);
    let extents = || tensor.dims.iter().chain(&tensor.strides);
    if tensor.dims.len() != tensor.strides.len() || extents().any(|&extent| extent == 0) {
        return invalid("a tensor's dims and strides differ in number or contain a 0");
    }
    if !tensor.alignment.is_power_of_two() || (tensor.is_virtual && tensor.is_by_value) {
        return invalid("a tensor's alignment or memory flags are invalid");
    }
    if ![FLOAT, INT32, BFLOAT16, BOOLEAN].contains(&tensor.data) || (tensor.is_by_value && tensor.data != FLOAT) {
        return refuse(&format!("a tensor of type {}", tensor.data));
    }
    // Each index needs its own element in memory. Otherwise, results would depend on the order of writes.
    let mut sides: Vec<(usize, usize)> = tensor.strides.iter().copied().zip(tensor.dims.iter().copied()).collect();
    sides.retain(|(_, extent)| *extent > 1);
    sides.sort_unstable();
    let mut end = 1;
    for (stride, extent) in sides {
        if stride < end {
            return invalid("a tensor's elements overlap");
        }
        end += stride * (extent - 1);
    }
    Ok(())
}

impl Graph {
    /// Adds an operation. The descriptors of its tensors need not be finalised yet.
    pub(super) fn add(&mut self, all: &HashMap<u64, Descriptor>, operation: &Descriptor) -> Result<(), CudnnStatus> {
        use Attribute::*;
        let found = |name: Attribute| all.get(&(operation.long(name)? as u64));
        let mut id = |name: Attribute| -> Result<Option<i64>, CudnnStatus> {
            let Some(descriptor) = found(name) else { return Ok(None) };
            let Some(id) = descriptor.long(CUDNN_ATTR_TENSOR_UNIQUE_ID) else {
                return invalid("an operand is not a tensor");
            };
            let new = tensor(descriptor);
            if self.tensors.insert(id, new.clone()).is_some_and(|old| old != new) {
                return invalid(&format!("two tensors have the unique id {id}"));
            }
            Ok(Some(id))
        };
        let mut required = |name| id(name).and_then(|id| id.ok_or(CudnnStatus::CUDNN_STATUS_BAD_PARAM));
        let of = |name: Attribute, attribute: Attribute| found(name).and_then(|descriptor| descriptor.long(attribute));
        let node = match operation.kind {
            DescriptorKind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR => {
                if of(CUDNN_ATTR_OPERATION_MATMUL_DESC, CUDNN_ATTR_MATMUL_COMP_TYPE) != Some(FLOAT) {
                    return refuse("a product that is not computed in f32");
                }
                let [a, b, c] = [
                    CUDNN_ATTR_OPERATION_MATMUL_ADESC,
                    CUDNN_ATTR_OPERATION_MATMUL_BDESC,
                    CUDNN_ATTR_OPERATION_MATMUL_CDESC,
                ]
                .map(&mut required);
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
                    [CUDNN_ATTR_OPERATION_REDUCTION_XDESC, CUDNN_ATTR_OPERATION_REDUCTION_YDESC].map(&mut required);
                Node::Reduction { is_max, x: x?, y: y? }
            }
            DescriptorKind::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR => {
                let [x, y] =
                    [CUDNN_ATTR_OPERATION_RESHAPE_XDESC, CUDNN_ATTR_OPERATION_RESHAPE_YDESC].map(&mut required);
                Node::Reshape { x: x?, y: y? }
            }
            DescriptorKind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR => {
                let pointwise = CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR;
                let Some(mode) = of(pointwise, CUDNN_ATTR_POINTWISE_MODE) else {
                    return invalid("a pointwise operation has no mode");
                };
                let axis = of(pointwise, CUDNN_ATTR_POINTWISE_AXIS).map(|axis| axis as usize);
                let (x, y) =
                    (required(CUDNN_ATTR_OPERATION_POINTWISE_XDESC)?, required(CUDNN_ATTR_OPERATION_POINTWISE_YDESC)?);
                let b = id(CUDNN_ATTR_OPERATION_POINTWISE_BDESC)?;
                let t = id(CUDNN_ATTR_OPERATION_POINTWISE_TDESC)?;
                Node::Pointwise { mode, axis, x, b, t, y }
            }
            other => return invalid(&format!("{other:?} is not an operation")),
        };
        self.check_node(&node)?;
        self.nodes.push(node);
        Ok(())
    }

    fn check_node(&self, node: &Node) -> Result<(), CudnnStatus> {
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
                let is = |expected: Mode| *mode == expected as i64;
                let operands = match (b, t) {
                    (None, None) => 1,
                    (Some(_), None) => 2,
                    (Some(_), Some(_)) => 3,
                    (None, Some(_)) => 0,
                };
                let expected = if is(Mode::CUDNN_POINTWISE_BINARY_SELECT) {
                    3
                } else if [Mode::CUDNN_POINTWISE_EXP, Mode::CUDNN_POINTWISE_LOG, Mode::CUDNN_POINTWISE_IDENTITY]
                    .into_iter()
                    .any(is)
                {
                    1
                } else if is(Mode::CUDNN_POINTWISE_GEN_INDEX) {
                    if axis.is_none_or(|axis| axis >= dims(y).len()) {
                        return invalid("an index operation has no valid axis");
                    }
                    1
                } else {
                    2
                };
                let repeats = |id: &i64| {
                    let (from, to) = (dims(id), dims(y));
                    from.len() == to.len() && from.iter().zip(to).all(|(from, to)| from == to || *from == 1)
                };
                operands == expected && repeats(x) && b.iter().chain(t).all(repeats)
            }
            Node::Reduction { x, y, .. } => {
                let (x, y) = (dims(x), dims(y));
                x.len() == y.len() && x.iter().zip(y).all(|(x, y)| x == y || *y == 1)
            }
            Node::Reshape { x, y } => dims(x).iter().product::<usize>() == dims(y).iter().product::<usize>(),
        };
        if fits { Ok(()) } else { invalid(&format!("the operands of {node:?} do not match")) }
    }

    /// Checks that virtual tensors are written before they are read, and that no tensor is written twice.
    pub(super) fn check(&self) -> Result<(), CudnnStatus> {
        let mut written = HashSet::new();
        for node in &self.nodes {
            let (reads, write) = node.ids();
            if let Some(id) = reads.iter().find(|id| self.tensors[id].is_virtual && !written.contains(*id)) {
                return invalid(&format!("tensor {id} is read before it is written"));
            }
            if !written.insert(write) || self.tensors[&write].is_by_value {
                return invalid(&format!("tensor {write} is written twice or is a host scalar"));
            }
        }
        Ok(())
    }

    /// Whether a fused attention engine supports the graph. Such a graph has at least two products, and its head depths
    /// are multiples of 8 up to 256.
    pub(super) fn has_engine(&self) -> bool {
        let products = self.nodes.iter().filter(|node| matches!(node, Node::Matmul { .. })).count();
        let has_valid_depth = |t: &Tensor| {
            let runs = t.dims.iter().zip(&t.strides).filter(|(_, stride)| **stride == 1);
            runs.map(|(extent, _)| extent).max().is_some_and(|depth| depth.is_multiple_of(8) && *depth <= 256)
        };
        let is_stored_bf16 = |t: &&Tensor| t.data == BFLOAT16 && !t.is_virtual;
        products >= 2 && self.tensors.values().filter(is_stored_bf16).all(has_valid_depth)
    }
}
