//! The logical program: nodes over whole tensors, with the layouts and placements that the user gave.
//! Building never fails; what is wrong is recorded with the user's file and line, and told at `compile`.
//! Imports `placement`, `sbp`, `init`, and the kernels' `Op`.

use std::panic::Location;
use std::sync::Arc;

use shardflow_kernels::op::{CustomKernel, Op};
use shardflow_kernels::tensor::{DType, Region};

use crate::boxing::step::BoxingStep;
use crate::init::Init;
use crate::layout_error::LayoutError;
use crate::placement::{Mesh, Placement};
use crate::sbp::NdSbp;
use crate::sbp::rule::{NdSignature, Rule};

pub mod builder;
pub mod error;
pub mod ops;
pub mod optimizer;

pub use error::GraphError;
pub use optimizer::AdamW;

/// A tensor of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Var(pub(crate) u32);

/// A node of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u32);

impl Var {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

impl NodeId {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// When a node runs within a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Once a micro-batch.
    Forward,
    /// Once a micro-batch, after its forward.
    Backward,
    /// Once a step, after all micro-batches: gradients come to lie as their parameters, and are measured.
    Norm,
    /// Once a step, when the host has seen the norm and decided.
    Update,
}

impl Phase {
    /// How often its nodes run.
    pub fn rate(self) -> Rate {
        match self {
            Self::Forward | Self::Backward => Rate::MicroBatch,
            Self::Norm | Self::Update => Rate::Step,
        }
    }
}

/// How often a tensor gets a new value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rate {
    /// Once a micro-batch.
    MicroBatch,
    /// Once a step.
    Step,
}

impl Rate {
    /// Values in a step of so many micro-batches.
    pub fn per_step(self, micro_batches: usize) -> usize {
        match self {
            Self::MicroBatch => micro_batches,
            Self::Step => 1,
        }
    }
}

/// What a node does.
#[derive(Clone, Debug)]
pub enum NodeOp {
    /// Fed by the host.
    Input,
    /// A trained tensor; the optimizer updates it in place.
    Parameter {
        /// How its first value is made.
        init: Init,
    },
    /// Memory that only the update touches (moments), zero at first.
    State,
    /// A parameter's values in bf16, beside them: whoever writes the parameter writes this too. Made by the precision pass.
    Half {
        /// The parameter.
        of: Var,
    },
    /// A kernel of the library.
    Kernel(Op),
    /// A kernel from outside.
    Custom(Arc<dyn CustomOp>),
    /// A change of layout that the user wrote.
    Relayout,
    /// Sums a value over the micro-batches of a step.
    Accumulate,
    /// One step of a boxing plan; made by the boxing pass.
    Boxing(Arc<BoxingStep>),
    /// All-reduce in place of several accumulated gradients by one call on the communication stream; made by the bucket pass.
    Bucket {
        /// Axes of the placement that are reduced over.
        axes: Vec<usize>,
    },
    /// `[number of parameters, 2]`: the sum of squares of each gradient that this placement holds, in the columns of
    /// [`Op::SumSquares`]; zero elsewhere.
    NormSums {
        /// For each input, its parameter's index in the graph.
        indices: Vec<usize>,
    },
    /// Sums `NormSums` over all devices and makes the clipping factor of them.
    ClipScale {
        /// Largest global norm.
        max_norm: f32,
    },
}

impl NodeOp {
    /// True for what is there before anything runs, and stays: parameters, their copies and states.
    pub fn is_resident(&self) -> bool {
        matches!(self, Self::Parameter { .. } | Self::State | Self::Half { .. })
    }
}

/// An op from outside the workspace's crates.
pub trait CustomOp: std::fmt::Debug + Send + Sync {
    /// Shown in plans and errors.
    fn name(&self) -> &str;
    /// The factor rule, e.g. `Rule::parse("bt->bt")`.
    ///
    /// # Errors
    /// When the rule's text is wrong.
    fn rule(&self) -> Result<Rule, LayoutError>;
    /// The kernel for one shard; `inputs` and `outputs` say which region of the whole tensors it works on.
    fn kernel(&self, inputs: &[Region], outputs: &[Region]) -> Arc<dyn CustomKernel>;
    /// Gradient: adds nodes to `graph` and gives, for each input, its gradient (`None` where there is none).
    /// `grads` has one entry for each output.
    fn backward(&self, graph: &mut Graph, inputs: &[Var], outputs: &[Var], grads: &[Option<Var>]) -> Vec<Option<Var>>;
}

/// A tensor's facts.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Shown in plans and errors.
    pub name: String,
    /// Of the whole tensor, one micro-batch's worth.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// Who makes it.
    pub producer: NodeId,
    /// How often.
    pub rate: Rate,
    /// The layout: given by the user before the layout pass, by that pass after it.
    pub layout: Option<NdSbp>,
    /// The shape in files, where it is not `shape`.
    pub saved_shape: Option<Vec<usize>>,
    /// Built from something wrong; errors about it are not repeated.
    pub poisoned: bool,
}

/// A node.
#[derive(Clone, Debug)]
pub struct Node {
    /// Shown in plans and errors.
    pub name: String,
    /// What it does.
    pub op: NodeOp,
    /// What it reads.
    pub inputs: Vec<Var>,
    /// What it makes.
    pub outputs: Vec<Var>,
    /// Tensors whose memory it updates in place (parameters and states), after `outputs` in the kernel's writes.
    pub updates: Vec<Var>,
    /// Index into [`Graph::placements`].
    pub placement: usize,
    /// When it runs.
    pub phase: Phase,
    /// Where the user wrote it.
    pub location: &'static Location<'static>,
    /// Chosen by the layout pass.
    pub signature: Option<NdSignature>,
}

/// An output that the host gets.
#[derive(Clone, Debug)]
pub struct Output {
    /// The name it is fetched by.
    pub name: String,
    /// The tensor.
    pub tensor: Var,
}

/// The logical program under construction. See [`builder`] for the methods that add to it.
#[derive(Clone, Debug)]
pub struct Graph {
    pub(crate) mesh: Mesh,
    pub(crate) placements: Vec<Placement>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) tensors: Vec<TensorInfo>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) errors: Vec<GraphError>,
    /// What the optimizer minimises, and how.
    pub(crate) objective: Option<(Var, AdamW)>,
    /// Placement of the nodes that are added next.
    pub(crate) current: usize,
    /// Phase of the nodes that are added next; passes change it.
    pub(crate) phase: Phase,
    /// Line of the layer under construction.
    pub(crate) origin: Option<&'static Location<'static>>,
}

impl Graph {
    /// The nodes, in an order in which every node comes after what it reads.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Facts of a tensor.
    pub fn tensor(&self, var: Var) -> &TensorInfo {
        &self.tensors[var.index()]
    }

    /// Shape of a whole tensor.
    pub fn shape(&self, var: Var) -> &[usize] {
        &self.tensors[var.index()].shape
    }

    /// The mesh it is built for.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// The placements in use, by index.
    pub fn placements(&self) -> &[Placement] {
        &self.placements
    }

    pub(crate) fn producer(&self, var: Var) -> &Node {
        &self.nodes[self.tensors[var.index()].producer.index()]
    }

    pub(crate) fn placement_of(&self, var: Var) -> usize {
        self.producer(var).placement
    }

    /// Parameters in the order they were added.
    pub fn parameters(&self) -> Vec<Var> {
        let is_parameter = |n: &&Node| matches!(n.op, NodeOp::Parameter { .. });
        self.nodes.iter().filter(is_parameter).map(|n| n.outputs[0]).collect()
    }
}

#[cfg(test)]
mod tests;
