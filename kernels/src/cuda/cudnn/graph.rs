//! Causal attention and its gradient as graphs of cuDNN operations. `plan` turns a graph into descriptors. cuDNN
//! recognizes both graphs as patterns. It runs the forward pattern as one kernel, and the backward pattern as a few
//! kernels. Scores are virtual tensors, so they are never stored. See Dao 2023, <https://arxiv.org/abs/2307.08691>.

use cudarc::cudnn::sys::cudnnDataType_t::{self as DataType, *};
use cudarc::cudnn::sys::cudnnPointwiseMode_t::{self as PointwiseMode, *};
use cudarc::cudnn::sys::cudnnReduceTensorOp_t::{self as Reduction, *};

use crate::cuda::step::{AttentionShape, Pass, Place};

const BF16: DataType = CUDNN_DATA_BFLOAT16;
const F32: DataType = CUDNN_DATA_FLOAT;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Storage {
    Buffer(Place),
    /// In the launch's workspace, at this byte offset.
    Workspace(usize),
    /// One scalar on the host, which cuDNN reads when it executes the graph.
    HostScalar(f32),
    /// Not stored: cuDNN never writes the tensor to memory.
    Virtual,
}

/// A tensor of four dims: batch, head, and two more. Its unique id is its index in the graph plus 1.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    pub(super) dims: [i64; 4],
    pub(super) strides: [i64; 4],
    pub(super) data: DataType,
    pub(super) storage: Storage,
}

pub(super) type TensorId = usize;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node {
    /// The matrix product `c = a b` over the last two dims.
    Matmul { a: TensorId, b: TensorId, c: TensorId },
    /// Applies `mode` to each element, and broadcasts dims of extent 1. An index mode returns each element's index
    /// along `axis`. The select mode computes `if t { x } else { b }`.
    Pointwise {
        mode: PointwiseMode,
        axis: Option<i64>,
        x: TensorId,
        b: Option<TensorId>,
        t: Option<TensorId>,
        y: TensorId,
    },
    /// Reduces the last dim.
    Reduce { op: Reduction, x: TensorId, y: TensorId },
    /// `y` is `x` with its last two dims swapped.
    Transpose { x: TensorId, y: TensorId },
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Graph {
    pub(super) tensors: Vec<Tensor>,
    pub(super) nodes: Vec<Node>,
    pub(super) workspace_bytes: usize,
    /// The workspace tensor of cuDNN's partial sums: (byte offset, number of floats). Must be zeroed before each run.
    pub(super) accumulated: Option<(usize, usize)>,
}

impl Graph {
    pub(super) fn of(shape: &AttentionShape) -> Self {
        let extents = [shape.batch, shape.heads, shape.time, shape.depth].map(|extent| extent as i64);
        let mut builder =
            Builder { graph: Graph { tensors: vec![], nodes: vec![], workspace_bytes: 0, accumulated: None }, extents };
        match shape.pass {
            Pass::Forward => builder.forward(shape.scale),
            Pass::Backward => builder.backward(shape.scale),
        }
        builder.graph
    }
}

struct Builder {
    graph: Graph,
    /// The extents of batch, heads, time and depth, in this order.
    extents: [i64; 4],
}

impl Builder {
    fn tensor(&mut self, dims: [i64; 4], strides: [i64; 4], data: DataType, storage: Storage) -> TensorId {
        self.graph.tensors.push(Tensor { dims, strides, data, storage });
        self.graph.tensors.len() - 1
    }

    /// A tensor stored as `[b, t, h, d]`, with dims batch, head, time, depth.
    fn activation(&mut self, storage: Storage) -> TensorId {
        let [b, h, t, d] = self.extents;
        self.tensor([b, h, t, d], [t * h * d, d, h * d, 1], BF16, storage)
    }

    /// A transposed view of an activation, with dims batch, head, depth, time.
    fn transposed(&mut self, place: Place) -> TensorId {
        let [b, h, t, d] = self.extents;
        self.tensor([b, h, d, t], [t * h * d, d, 1, h * d], BF16, Storage::Buffer(place))
    }

    /// A tensor with one value per row of scores, stored as `[b, h, t]`.
    fn rows(&mut self, storage: Storage) -> TensorId {
        let [b, h, t, _] = self.extents;
        self.tensor([b, h, t, 1], [h * t, t, 1, 1], F32, storage)
    }

    fn scores(&mut self, data: DataType) -> TensorId {
        let [b, h, t, _] = self.extents;
        self.tensor([b, h, t, t], [h * t * t, t * t, t, 1], data, Storage::Virtual)
    }

    fn scalar(&mut self, value: f32) -> TensorId {
        self.tensor([1; 4], [1; 4], F32, Storage::HostScalar(value))
    }

    fn reserve(&mut self, floats: i64) -> Storage {
        let start = self.graph.workspace_bytes;
        self.graph.workspace_bytes =
            (start + floats as usize * size_of::<f32>()).next_multiple_of(AttentionShape::ALIGNMENT);
        Storage::Workspace(start)
    }

    fn matmul(&mut self, a: TensorId, b: TensorId, c: TensorId) {
        self.graph.nodes.push(Node::Matmul { a, b, c });
    }

    fn pointwise(&mut self, y: TensorId, mode: PointwiseMode, x: TensorId, b: Option<TensorId>) -> TensorId {
        self.graph.nodes.push(Node::Pointwise { mode, axis: None, x, b, t: None, y });
        y
    }

    fn map(&mut self, mode: PointwiseMode, x: TensorId, b: Option<TensorId>) -> TensorId {
        let y = self.scores(F32);
        self.pointwise(y, mode, x, b)
    }

    /// Converts scores to bf16 and swaps their last two dims, as the matrix products for dk and dv require.
    fn transposed_scores(&mut self, x: TensorId) -> TensorId {
        let [b, h, t, _] = self.extents;
        let y = self.tensor([b, h, t, t], [h * t * t, t * t, 1, t], BF16, Storage::Virtual);
        self.graph.nodes.push(Node::Transpose { x, y });
        y
    }

    /// Sets the score of each key that comes after the query to minus infinity.
    fn masked(&mut self, x: TensorId) -> TensorId {
        let [row, column] = [2, 3].map(|axis| {
            let (mode, y) = (CUDNN_POINTWISE_GEN_INDEX, self.scores(CUDNN_DATA_INT32));
            self.graph.nodes.push(Node::Pointwise { mode, axis: Some(axis), x, b: None, t: None, y });
            y
        });
        let keep = self.scores(CUDNN_DATA_BOOLEAN);
        self.pointwise(keep, CUDNN_POINTWISE_CMP_GE, row, Some(column));
        let lowest = self.scalar(f32::NEG_INFINITY);
        let (mode, y) = (CUDNN_POINTWISE_BINARY_SELECT, self.scores(F32));
        self.graph.nodes.push(Node::Pointwise { mode, axis: None, x, b: Some(lowest), t: Some(keep), y });
        y
    }

    /// Returns `q k' * scale` and the scale.
    fn scaled(&mut self, q: TensorId, k: TensorId, scale: f32) -> (TensorId, TensorId) {
        let (scale, products) = (self.scalar(scale), self.scores(F32));
        self.matmul(q, k, products);
        (self.map(CUDNN_POINTWISE_MUL, products, Some(scale)), scale)
    }

    /// Reads q, k, v; writes o and lse, the log of each row's sum of exponentials.
    fn forward(&mut self, scale: f32) {
        let q = self.activation(Storage::Buffer(Place::read(0)));
        let k = self.transposed(Place::read(1));
        let v = self.activation(Storage::Buffer(Place::read(2)));
        let o = self.activation(Storage::Buffer(Place::write(0)));
        let lse = self.rows(Storage::Buffer(Place::write(1)));
        let (scores, _) = self.scaled(q, k, scale);
        let scores = self.masked(scores);
        let [max, sum, log] = [0; 3].map(|_| self.rows(Storage::Virtual));
        self.graph.nodes.push(Node::Reduce { op: CUDNN_REDUCE_TENSOR_MAX, x: scores, y: max });
        let shifted = self.map(CUDNN_POINTWISE_SUB, scores, Some(max));
        let exp = self.map(CUDNN_POINTWISE_EXP, shifted, None);
        self.graph.nodes.push(Node::Reduce { op: CUDNN_REDUCE_TENSOR_ADD, x: exp, y: sum });
        self.pointwise(log, CUDNN_POINTWISE_LOG, sum, None);
        self.pointwise(lse, CUDNN_POINTWISE_ADD, max, Some(log));
        let probabilities = self.scores(BF16);
        self.pointwise(probabilities, CUDNN_POINTWISE_DIV, exp, Some(sum));
        self.matmul(probabilities, v, o);
    }

    /// Reads do, q, k, v, o, lse; writes dq, dk, dv.
    fn backward(&mut self, scale: f32) {
        let [b, h, t, d] = self.extents;
        let [d_o, q, o] = [0, 1, 4].map(|i| self.activation(Storage::Buffer(Place::read(i))));
        let [k, v] = [2, 3].map(|i| self.transposed(Place::read(i)));
        let lse = self.rows(Storage::Buffer(Place::read(5)));
        let [dq, dk, dv] = [0, 1, 2].map(|i| self.activation(Storage::Buffer(Place::write(i))));
        // cuDNN's kernels exchange the row sums of do * o through memory. The pattern that cuDNN recognizes scales
        // these sums by a dropout factor, which is 1 here.
        let product = self.tensor([b, h, t, d], [t * h * d, t * d, d, 1], F32, Storage::Virtual);
        self.pointwise(product, CUDNN_POINTWISE_MUL, d_o, Some(o));
        let sums = self.rows(Storage::Virtual);
        self.graph.nodes.push(Node::Reduce { op: CUDNN_REDUCE_TENSOR_ADD, x: product, y: sums });
        let storage = self.reserve(b * h * t);
        let (delta, one) = (self.rows(storage), self.scalar(1.0));
        self.pointwise(delta, CUDNN_POINTWISE_MUL, sums, Some(one));
        // Recompute the probabilities from the scores. Then compute dv.
        let (scores, scale) = self.scaled(q, k, scale);
        let shifted = self.map(CUDNN_POINTWISE_SUB, scores, Some(lse));
        let shifted = self.masked(shifted);
        let probabilities = self.map(CUDNN_POINTWISE_EXP, shifted, None);
        let transposed_scores = self.transposed_scores(probabilities);
        self.matmul(transposed_scores, d_o, dv);
        // Compute the gradient of the scores. Then compute dk.
        let grads = self.scores(F32);
        self.matmul(d_o, v, grads);
        let grads = self.map(CUDNN_POINTWISE_SUB, grads, Some(delta));
        let grads = self.map(CUDNN_POINTWISE_MUL, grads, Some(probabilities));
        let grads = self.map(CUDNN_POINTWISE_MUL, grads, Some(scale));
        let transposed_scores = self.transposed_scores(grads);
        self.matmul(transposed_scores, q, dk);
        // dq is summed in f32 over all blocks of keys.
        let keys = self.activation(Storage::Virtual);
        self.graph.nodes.push(Node::Transpose { x: k, y: keys });
        let storage = self.reserve(b * h * t * d);
        if let Storage::Workspace(start) = storage {
            self.graph.accumulated = Some((start, (b * h * t * d) as usize));
        }
        let sum = self.tensor([b, h, t, d], [h * t * d, t * d, d, 1], F32, storage);
        self.matmul(grads, keys, sum);
        self.pointwise(dq, CUDNN_POINTWISE_IDENTITY, sum, None);
    }
}
