//! The logical program: nodes over whole tensors, with the layouts and placements that the user gave.
//! Building never fails; what is wrong is recorded with the user's file and line, and told at `compile`.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::panic::Location;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock, OnceLock};

use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::device::DeviceKind;
use shardflow_kernels::op::{CustomKernel, Op};
use shardflow_kernels::tensor::{DType, Region};

use crate::boxing::step::BoxingStep;
use crate::init::Init;
use crate::layout_error::LayoutError;
use crate::placement::{Mesh, Placement};
use crate::sbp::rule::{NdSignature, Rule};
use crate::sbp::{NdSbp, Sbp};

pub mod builder;
pub mod error;
pub mod ops;
pub mod optimizer;

pub use error::GraphError;
pub use optimizer::AdamW;

/// A tensor of a graph. Another graph refuses it; a clone accepts those that were made before it was cloned.
#[derive(Clone, Copy)]
pub struct Var {
    index: u32,
    /// The graph that made it.
    graph: u32,
    dims: u8,
    location: &'static Location<'static>,
}

/// Equal in their place in the graph. The graph itself does not count, so that equal programs have equal plans.
impl PartialEq for Var {
    fn eq(&self, other: &Self) -> bool {
        self.index == other.index
    }
}

impl Eq for Var {}

impl Ord for Var {
    fn cmp(&self, other: &Self) -> Ordering {
        self.index.cmp(&other.index)
    }
}

impl PartialOrd for Var {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Hash for Var {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.index.hash(state);
    }
}

/// Without the graph's number, which differs between processes: plans are hashed as text.
impl fmt::Debug for Var {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Var({})", self.index)
    }
}

/// Number of a graph, unique in the process. A clone of a graph is another graph.
#[derive(Debug)]
pub(crate) struct GraphId(u32);

impl GraphId {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self(NEXT.fetch_add(1, Relaxed))
    }
}

impl Clone for GraphId {
    fn clone(&self) -> Self {
        Self::new()
    }
}

/// A node of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u32);

impl Var {
    pub(crate) fn index(self) -> usize {
        self.index as usize
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

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Norm => "norm",
            Self::Update => "update",
        })
    }
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

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MicroBatch => "micro-batch",
            Self::Step => "step",
        })
    }
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
    /// Whether its kernel runs on such devices. On GPUs, [`CustomKernel::run_cpu`] works on copies in the host's memory.
    fn runs_on(&self, _device: DeviceKind) -> bool {
        true
    }
    /// The factor rule, e.g. `Rule::parse("bt->bt")`.
    ///
    /// # Errors
    /// When the rule's text is wrong.
    fn rule(&self) -> Result<Rule, LayoutError>;
    /// The kernel for one shard; `inputs` and `outputs` say which region of one micro-batch's whole tensors it works on.
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
    /// The layout of a forward tensor along the micro-batches of a step: divided, the same in each, or terms to be combined;
    /// `None` where no rule says. Given for inputs by the user, and for the others by the micro-batch pass.
    pub loop_sbp: Option<Sbp>,
    /// The shape in files, where it is not `shape`.
    pub saved_shape: Option<Vec<usize>>,
    /// Built from something wrong; errors about it are not repeated.
    pub poisoned: bool,
}

/// Dims that a tensor may have: each needs a letter of its op's rule.
pub const DIMS_MAX: usize = 16;

/// Placeholder facts for tensors of other graphs, by number of dims.
static STAND_INS: LazyLock<Vec<TensorInfo>> = LazyLock::new(|| {
    let stand_in = |dims| TensorInfo {
        name: "a tensor of another graph".into(),
        shape: vec![1; dims],
        dtype: DType::F32,
        producer: NodeId(0),
        rate: Rate::MicroBatch,
        layout: None,
        loop_sbp: None,
        saved_shape: None,
        poisoned: true,
    };
    (0..=DIMS_MAX).map(stand_in).collect()
});

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
    /// The user's line.
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
    /// How the values of micro-batches are combined: given by the user, or set by the micro-batch pass.
    pub combine: Option<Combine>,
    /// The user's line.
    pub location: &'static Location<'static>,
}

/// How an output's values from the micro-batches of a step are combined into one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    /// Concatenated along this dim, which is the batch.
    Concat(usize),
    /// Added. A mean over the batch is a sum, too: each term is divided by the count of the whole step.
    Sum,
    /// The largest, element by element.
    Max,
    /// The first one; all are equal.
    First,
    /// All of them, along a new first dim.
    Stack,
}

impl From<Sbp> for Combine {
    fn from(sbp: Sbp) -> Self {
        match sbp {
            Sbp::Split(dim) => Self::Concat(dim),
            Sbp::Broadcast => Self::First,
            Sbp::Partial(ReduceOp::Sum) => Self::Sum,
            Sbp::Partial(ReduceOp::Max) => Self::Max,
        }
    }
}

/// What the optimizer minimises, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Objective {
    pub(crate) loss: Var,
    pub(crate) optimizer: AdamW,
    /// The user's line.
    pub(crate) location: &'static Location<'static>,
}

/// The logical program under construction. See [`builder`] for the methods that add to it.
#[derive(Clone, Debug)]
pub struct Graph {
    id: GraphId,
    /// Where the graph was made.
    pub(crate) location: &'static Location<'static>,
    pub(crate) mesh: Mesh,
    pub(crate) placements: Vec<Placement>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) tensors: Vec<TensorInfo>,
    /// Of each tensor.
    vars: Vec<Var>,
    pub(crate) outputs: Vec<Output>,
    errors: Vec<GraphError>,
    /// The first query for facts of another graph's tensor.
    misread: OnceLock<GraphError>,
    pub(crate) objective: Option<Objective>,
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

    /// Facts of a tensor. For another graph's tensor they are placeholders, and `compile` reports it.
    #[track_caller]
    pub fn tensor(&self, var: Var) -> &TensorInfo {
        if self.owns(var) {
            return &self.tensors[var.index()];
        }
        let location = self.origin.unwrap_or(Location::caller());
        self.misread.get_or_init(|| GraphError {
            what: "shape".into(),
            message: foreign("the argument", var),
            location,
        });
        &STAND_INS[usize::from(var.dims).min(DIMS_MAX)]
    }

    /// Shape of a whole tensor. For another graph's tensor it is a placeholder with as many dims, and `compile` reports it.
    #[track_caller]
    pub fn shape(&self, var: Var) -> &[usize] {
        &self.tensor(var).shape
    }

    fn owns(&self, var: Var) -> bool {
        self.vars.get(var.index()).is_some_and(|own| own.graph == var.graph)
    }

    /// The tensor of this index.
    pub(crate) fn var(&self, index: usize) -> Var {
        self.vars[index]
    }

    /// Adds a tensor that a node made at this line.
    pub(crate) fn new_tensor(&mut self, info: TensorInfo, location: &'static Location<'static>) -> Var {
        let dims = info.shape.len().min(DIMS_MAX) as u8;
        let var = Var { index: self.tensors.len() as u32, graph: self.id.0, dims, location };
        self.tensors.push(info);
        self.vars.push(var);
        var
    }

    /// Takes all tensors out of a graph that is rebuilt; [`Graph::new_tensor`] numbers those that stay.
    pub(crate) fn take_tensors(&mut self) -> Vec<TensorInfo> {
        self.vars.clear();
        std::mem::take(&mut self.tensors)
    }

    /// All errors of the program so far.
    pub(crate) fn errors(&self) -> Vec<GraphError> {
        let mut errors = self.errors.clone();
        // An op that uses the tensor reports it, too; one error is enough.
        errors.extend(self.misread.get().filter(|e| errors.iter().all(|other| other.location != e.location)).cloned());
        errors
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

/// The error for a tensor of another graph.
fn foreign(which: &str, var: Var) -> String {
    let at = var.location;
    format!("{which} is a tensor of another graph, made at {}:{}; use the tensors of one graph", at.file(), at.line())
}

#[cfg(test)]
mod tests;
