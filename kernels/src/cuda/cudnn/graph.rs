//! Causal attention and its gradient as graphs of cuDNN's operations: plain data, from which `plan` makes descriptors.
//! cuDNN knows the patterns and runs each as one fused kernel (forward) or as few (backward); scores stay virtual, so
//! they are never stored. Dao 2023, <https://arxiv.org/abs/2307.08691>.

use crate::cuda::step::{Flash, Pass, Place};

/// Elements of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Data {
    Bf16,
    F32,
    I32,
    Bool,
}

/// Where a tensor's elements are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Home {
    /// In a buffer of the launch.
    Buffer(Place),
    /// In the stream's workspace, so many bytes from its start.
    Scratch(usize),
    /// With the host: one number, read when the graph is executed.
    Number(f32),
    /// Nowhere: it is never whole.
    Virtual,
}

/// A tensor of four dims: batch, head, and two more. Its number in the graph, from 1, is its unique id.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    pub(super) dims: [i64; 4],
    pub(super) strides: [i64; 4],
    pub(super) data: Data,
    pub(super) home: Home,
}

/// A tensor's index in the graph.
pub(super) type Id = usize;

/// What a pointwise operation does with x, b and t.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Add,
    Sub,
    Mul,
    Div,
    Exp,
    Log,
    Identity,
    /// An element's index along a dim.
    Index(i64),
    /// `x >= b`.
    IsNotLess,
    /// `if t { x } else { b }`.
    Select,
}

/// What a reduction gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    Max,
    Sum,
}

/// An operation.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node {
    /// `c = a b`, over the last two dims.
    Matmul { a: Id, b: Id, c: Id },
    /// Element by element; dims of 1 are repeated.
    Pointwise { mode: Mode, x: Id, b: Option<Id>, t: Option<Id>, y: Id },
    /// Over the last dim.
    Reduce { of: Of, x: Id, y: Id },
    /// `y` is x with its last two dims exchanged.
    Transpose { x: Id, y: Id },
}

/// What cuDNN is asked to do.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Graph {
    pub(super) tensors: Vec<Tensor>,
    pub(super) nodes: Vec<Node>,
    /// Bytes of the tensors in the workspace.
    pub(super) scratch_bytes: usize,
    /// The tensor in the workspace that parts are added to as they come, which has to be 0 before: where it begins, and floats.
    pub(super) summed: Option<(usize, usize)>,
}

impl Graph {
    /// The graph of a launch.
    pub(super) fn of(flash: &Flash) -> Self {
        let sides = [flash.batch, flash.heads, flash.time, flash.depth].map(|extent| extent as i64);
        let mut builder =
            Builder { graph: Graph { tensors: vec![], nodes: vec![], scratch_bytes: 0, summed: None }, sides };
        match flash.pass {
            Pass::Forward => builder.forward(flash.scale),
            Pass::Backward => builder.backward(flash.scale),
        }
        builder.graph
    }
}

struct Builder {
    graph: Graph,
    /// Batch, heads, time, depth.
    sides: [i64; 4],
}

impl Builder {
    fn tensor(&mut self, dims: [i64; 4], strides: [i64; 4], data: Data, home: Home) -> Id {
        self.graph.tensors.push(Tensor { dims, strides, data, home });
        self.graph.tensors.len() - 1
    }

    /// `[b, t, h, d]` in memory, as batch, head, time, depth.
    fn activation(&mut self, home: Home) -> Id {
        let [b, h, t, d] = self.sides;
        self.tensor([b, h, t, d], [t * h * d, d, h * d, 1], Data::Bf16, home)
    }

    /// The same, as batch, head, depth, time.
    fn transposed(&mut self, place: Place) -> Id {
        let [b, h, t, d] = self.sides;
        self.tensor([b, h, d, t], [t * h * d, d, 1, h * d], Data::Bf16, Home::Buffer(place))
    }

    /// A number for each row of scores, `[b, h, t]` in memory.
    fn rows(&mut self, home: Home) -> Id {
        let [b, h, t, _] = self.sides;
        self.tensor([b, h, t, 1], [h * t, t, 1, 1], Data::F32, home)
    }

    /// Scores, or what is made of them.
    fn scores(&mut self, data: Data) -> Id {
        let [b, h, t, _] = self.sides;
        self.tensor([b, h, t, t], [h * t * t, t * t, t, 1], data, Home::Virtual)
    }

    fn number(&mut self, value: f32) -> Id {
        self.tensor([1; 4], [1; 4], Data::F32, Home::Number(value))
    }

    /// Room in the workspace for floats.
    fn scratch(&mut self, floats: i64) -> Home {
        let start = self.graph.scratch_bytes;
        self.graph.scratch_bytes = (start + floats as usize * size_of::<f32>()).next_multiple_of(Flash::ALIGNMENT);
        Home::Scratch(start)
    }

    fn matmul(&mut self, a: Id, b: Id, c: Id) {
        self.graph.nodes.push(Node::Matmul { a, b, c });
    }

    fn to(&mut self, y: Id, mode: Mode, x: Id, b: Option<Id>) -> Id {
        self.graph.nodes.push(Node::Pointwise { mode, x, b, t: None, y });
        y
    }

    /// Scores from scores.
    fn map(&mut self, mode: Mode, x: Id, b: Option<Id>) -> Id {
        let y = self.scores(Data::F32);
        self.to(y, mode, x, b)
    }

    /// Scores with their last two dims exchanged, as products take them.
    fn turned(&mut self, x: Id) -> Id {
        let [b, h, t, _] = self.sides;
        let y = self.tensor([b, h, t, t], [h * t * t, t * t, 1, t], Data::Bf16, Home::Virtual);
        self.graph.nodes.push(Node::Transpose { x, y });
        y
    }

    /// Minus infinity for keys behind the query.
    fn masked(&mut self, x: Id) -> Id {
        let [row, column] = [self.scores(Data::I32), self.scores(Data::I32)];
        self.to(row, Mode::Index(2), x, None);
        self.to(column, Mode::Index(3), x, None);
        let keep = self.scores(Data::Bool);
        self.to(keep, Mode::IsNotLess, row, Some(column));
        let lowest = self.number(f32::NEG_INFINITY);
        let y = self.scores(Data::F32);
        self.graph.nodes.push(Node::Pointwise { mode: Mode::Select, x, b: Some(lowest), t: Some(keep), y });
        y
    }

    /// `q k' * scale`, and the scale.
    fn scaled(&mut self, q: Id, k: Id, scale: f32) -> (Id, Id) {
        let (scale, products) = (self.number(scale), self.scores(Data::F32));
        self.matmul(q, k, products);
        (self.map(Mode::Mul, products, Some(scale)), scale)
    }

    /// Reads are q, k, v; writes o and lse, the log of the sum of exponentials of each row.
    fn forward(&mut self, scale: f32) {
        let q = self.activation(Home::Buffer(Place::read(0)));
        let k = self.transposed(Place::read(1));
        let v = self.activation(Home::Buffer(Place::read(2)));
        let o = self.activation(Home::Buffer(Place::write(0)));
        let lse = self.rows(Home::Buffer(Place::write(1)));
        let (scores, _) = self.scaled(q, k, scale);
        let scores = self.masked(scores);
        let [max, sum, log] = [0; 3].map(|_| self.rows(Home::Virtual));
        self.graph.nodes.push(Node::Reduce { of: Of::Max, x: scores, y: max });
        let shifted = self.map(Mode::Sub, scores, Some(max));
        let exp = self.map(Mode::Exp, shifted, None);
        self.graph.nodes.push(Node::Reduce { of: Of::Sum, x: exp, y: sum });
        self.to(log, Mode::Log, sum, None);
        self.to(lse, Mode::Add, max, Some(log));
        let probabilities = self.scores(Data::Bf16);
        self.to(probabilities, Mode::Div, exp, Some(sum));
        self.matmul(probabilities, v, o);
    }

    /// Reads are do, q, k, v, o, lse; writes dq, dk, dv.
    fn backward(&mut self, scale: f32) {
        let [b, h, t, d] = self.sides;
        let [d_o, q, o] = [0, 1, 4].map(|i| self.activation(Home::Buffer(Place::read(i))));
        let [k, v] = [2, 3].map(|i| self.transposed(Place::read(i)));
        let lse = self.rows(Home::Buffer(Place::read(5)));
        let [dq, dk, dv] = [0, 1, 2].map(|i| self.activation(Home::Buffer(Place::write(i))));
        // The row sums of do o lie in memory, between two kernels. cuDNN's pattern has a factor there, of dropout.
        let product = self.tensor([b, h, t, d], [t * h * d, t * d, d, 1], Data::F32, Home::Virtual);
        self.to(product, Mode::Mul, d_o, Some(o));
        let sums = self.rows(Home::Virtual);
        self.graph.nodes.push(Node::Reduce { of: Of::Sum, x: product, y: sums });
        let room = self.scratch(b * h * t);
        let (delta, one) = (self.rows(room), self.number(1.0));
        self.to(delta, Mode::Mul, sums, Some(one));
        // Probabilities, from the scores; dv.
        let (scores, scale) = self.scaled(q, k, scale);
        let shifted = self.map(Mode::Sub, scores, Some(lse));
        let shifted = self.masked(shifted);
        let probabilities = self.map(Mode::Exp, shifted, None);
        let turned = self.turned(probabilities);
        self.matmul(turned, d_o, dv);
        // The scores' gradients; dk.
        let grads = self.scores(Data::F32);
        self.matmul(d_o, v, grads);
        let grads = self.map(Mode::Sub, grads, Some(delta));
        let grads = self.map(Mode::Mul, grads, Some(probabilities));
        let grads = self.map(Mode::Mul, grads, Some(scale));
        let turned = self.turned(grads);
        self.matmul(turned, q, dk);
        // dq is added up in floats, by whoever has a part of it.
        let keys = self.activation(Home::Virtual);
        self.graph.nodes.push(Node::Transpose { x: k, y: keys });
        let room = self.scratch(b * h * t * d);
        if let Home::Scratch(start) = room {
            self.graph.summed = Some((start, (b * h * t * d) as usize));
        }
        let sum = self.tensor([b, h, t, d], [h * t * d, t * d, d, 1], Data::F32, room);
        self.matmul(grads, keys, sum);
        self.to(dq, Mode::Identity, sum, None);
    }
}
