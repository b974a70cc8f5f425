//! The logical program: nodes over whole tensors, with the user's layouts and placements.
//! Building never fails: errors are recorded with the user's file and line, and `compile` returns them.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock, OnceLock};

pub use shardflow_actors::label::Role;
use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::device::DeviceKind;
use shardflow_kernels::op::{CustomKernel, Op};
use shardflow_kernels::tensor::{DType, Region};

use crate::boxing::step::{BoxingStep, StepKind};
use crate::init::Init;
use crate::layout_error::LayoutError;
use crate::placement::{Mesh, Placement};
use crate::sbp::rule::{NdSignature, Rule};
use crate::sbp::{NdSbp, Sbp};

pub mod builder;
pub(crate) mod error;
pub mod ops;
pub mod optimizer;

pub use error::{GraphError, SourceLine};
pub use optimizer::AdamW;

/// A tensor of a graph. Other graphs refuse the tensor, except later clones of the graph that created the tensor.
#[derive(Clone, Copy)]
pub struct Var {
    index: u32,
    /// The [`GraphId`] of the graph that created the tensor.
    graph: u32,
    dims: u8,
    location: SourceLine,
}

/// Compares the index only, not the graph, so that equal programs have equal plans.
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

/// Omits the graph's id, because the id differs between processes, and the hash of a plan covers this text.
impl fmt::Debug for Var {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Var({})", self.index)
    }
}

/// Id of a graph, unique in the process. A clone gets a new id.
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

/// Index of a node in its graph.
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

/// How often a tensor gets a new value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rate {
    /// Once per micro-batch.
    MicroBatch,
    /// Once per step.
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
    /// Number of values in a step of `micro_batches` micro-batches.
    pub fn per_step(self, micro_batches: usize) -> usize {
        match self {
            Self::MicroBatch => micro_batches,
            Self::Step => 1,
        }
    }
}

/// The operation of a node.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the comments of the variants name the fields")]
pub enum NodeOp {
    /// A tensor that the host feeds.
    Input,
    /// A trainable tensor with its initial value; the optimizer updates it in place.
    Parameter {
        init: Init,
    },
    /// Memory that only the update uses, such as moments; initially zero.
    State,
    /// A parameter's bf16 copy. Each write to the parameter also writes the copy. Inserted by the precision pass.
    Bf16Copy {
        of: Var,
    },
    Kernel(Op),
    Custom(Arc<dyn CustomOp>),
    /// A layout change that the user requested.
    Relayout,
    /// Sums a value over the micro-batches of a step.
    Accumulate,
    /// One step of a boxing plan; inserted by the boxing pass.
    Boxing(Arc<BoxingStep>),
    /// One in-place all-reduce of accumulated gradients over these axes of the placement; inserted by the bucket pass.
    Bucket {
        axes: Vec<usize>,
    },
    /// Sums of squares of this placement's gradients, of shape `[number of parameters, 2]`. The columns are those of
    /// [`Op::SumSquares`]; a row is zero if the node has no gradient of its parameter as input. `indices` has the row
    /// of each input: the index of its parameter in [`Graph::parameters`].
    NormSums {
        indices: Vec<usize>,
    },
    /// Sums the totals of `NormSums` of several placements over all devices of its own placement. Only the first device of
    /// a placement has its total; other devices have zeros. Each device first adds up the inputs that it holds, in order.
    NormTotal,
    /// Computes the clipping factor from `NormTotal`.
    ClipScale {
        max_norm: f32,
    },
    /// The host fetches the inputs. Inserted when the graph is lowered.
    Fetch,
}

impl NodeOp {
    /// True if the tensor stays allocated from the start: parameters, their bf16 copies and states.
    pub fn is_resident(&self) -> bool {
        matches!(self, Self::Parameter { .. } | Self::State | Self::Bf16Copy { .. })
    }

    pub(crate) fn is_transfer(&self) -> bool {
        matches!(self, Self::Boxing(step) if step.kind == StepKind::Transfer)
    }
}

/// A user-defined op.
pub trait CustomOp: std::fmt::Debug + Send + Sync {
    /// The name in plans and errors.
    fn name(&self) -> &str;
    /// True if the op runs on this kind of device. On GPUs, [`CustomKernel::run_cpu`] gets copies in host memory.
    fn runs_on(&self, _device: DeviceKind) -> bool {
        true
    }
    /// The factor rule, e.g. `Rule::parse("bt->bt")`.
    ///
    /// # Errors
    /// Returns an error if the rule is invalid.
    fn rule(&self) -> Result<Rule, LayoutError>;
    /// The kernel for one shard. `inputs` and `outputs` are the shard's regions in the whole tensors of a micro-batch.
    fn kernel(&self, inputs: &[Region], outputs: &[Region]) -> Arc<dyn CustomKernel>;
    /// Adds the backward nodes to `graph`. Returns the inputs' gradients; `grads` has the outputs' gradients.
    fn backward(&self, graph: &mut Graph, inputs: &[Var], outputs: &[Var], grads: &[Option<Var>]) -> Vec<Option<Var>>;
}

/// The properties of a tensor.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// The name in plans and errors.
    pub name: String,
    /// Shape of the whole tensor in one micro-batch.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// The node that produces the tensor.
    pub producer: NodeId,
    /// How often the tensor gets a new value.
    pub rate: Rate,
    /// The layout that the user gave, if any. After the layout pass, the layout that the pass chose.
    pub layout: Option<NdSbp>,
    /// The layout of a forward tensor along the micro-batches of a step: split, equal in each micro-batch, or terms to
    /// combine. `None` if no rule determines this layout. The user sets it for inputs, and the micro-batch pass sets it
    /// for other tensors.
    pub loop_sbp: Option<Sbp>,
    /// The shape in checkpoint files, if it differs from `shape`.
    pub saved_shape: Option<Vec<usize>>,
    /// True if the tensor results from an error. Further errors about the tensor are suppressed.
    pub poisoned: bool,
}

/// Maximum number of dims of a tensor: each dim needs a letter in the op's rule.
pub const DIMS_MAX: usize = 16;

/// Placeholder properties for tensors of other graphs, by number of dims.
static PLACEHOLDERS: LazyLock<Vec<TensorInfo>> = LazyLock::new(|| {
    let placeholder = |dims| TensorInfo {
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
    (0..=DIMS_MAX).map(placeholder).collect()
});

/// A node: one op on one placement.
#[derive(Clone, Debug)]
pub struct Node {
    /// The name in plans and errors.
    pub name: String,
    /// The operation.
    pub op: NodeOp,
    /// The tensors that the node reads.
    pub inputs: Vec<Var>,
    /// The tensors that the node produces.
    pub outputs: Vec<Var>,
    /// Tensors that the node updates in place (parameters and states); they follow `outputs` in the kernel's writes.
    pub updates: Vec<Var>,
    /// Index into [`Graph::placements`].
    pub placement: usize,
    /// The node's role in a step, as a label.
    pub role: Role,
    /// How often the node runs. An accumulated sum changes once per step, but its node runs in each micro-batch.
    pub rate: Rate,
    /// The user's source line.
    pub location: SourceLine,
    /// The signature chosen by the layout pass.
    pub signature: Option<NdSignature>,
}

impl Node {
    /// A node with one input and one output, which is inserted for `reader`.
    pub(crate) fn between(
        name: String,
        op: NodeOp,
        (input, output): (Var, Var),
        placement: usize,
        reader: &Self,
    ) -> Self {
        let (inputs, outputs) = (vec![input], vec![output]);
        Self { name, op, inputs, outputs, updates: Vec::new(), placement, signature: None, ..reader.clone() }
    }
}

/// A tensor that the host fetches.
#[derive(Clone, Debug)]
pub struct Output {
    /// The name under which the host fetches the tensor.
    pub name: String,
    /// The tensor.
    pub tensor: Var,
    /// How the values of micro-batches are combined: given by the user, or derived by the micro-batch pass.
    pub combine: Option<Combine>,
    /// The user's source line.
    pub location: SourceLine,
}

/// How an output's values from the micro-batches of a step are combined into one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    /// Concatenate along this dim, which is the batch dim.
    Concat(usize),
    /// Add. This also fits a mean over the batch, because each term is divided by the element count of the whole step.
    Sum,
    /// Take the elementwise maximum.
    Max,
    /// Take the first value; all values are equal.
    First,
    /// Keep all values, stacked along a new first dim.
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

#[derive(Clone, Copy, Debug)]
pub(crate) struct Objective {
    pub(crate) loss: Var,
    pub(crate) optimizer: AdamW,
    pub(crate) location: SourceLine,
}

/// The logical program under construction. The methods that add nodes are in [`builder`].
#[derive(Clone, Debug)]
pub struct Graph {
    id: GraphId,
    /// The source line of [`Graph::new`].
    pub(crate) location: SourceLine,
    pub(crate) mesh: Mesh,
    pub(crate) placements: Vec<Placement>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) tensors: Vec<TensorInfo>,
    vars: Vec<Var>,
    pub(crate) outputs: Vec<Output>,
    errors: Vec<GraphError>,
    /// The error of the first query about another graph's tensor.
    foreign_query: OnceLock<GraphError>,
    pub(crate) objective: Option<Objective>,
    /// Index of the placement of nodes that are added next.
    pub(crate) current_placement: usize,
    /// Role and rate of nodes that are added next. Passes change them.
    pub(crate) role: Role,
    pub(crate) rate: Rate,
    /// Source line of the layer under construction.
    pub(crate) origin: Option<SourceLine>,
}

impl Graph {
    /// The nodes in topological order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The properties of a tensor. For a tensor of another graph, returns placeholders, and `compile` reports an error.
    #[track_caller]
    pub fn tensor(&self, var: Var) -> &TensorInfo {
        if self.owns(var) {
            return &self.tensors[var.index()];
        }
        let location = self.here();
        self.foreign_query.get_or_init(|| GraphError {
            subject: "shape".into(),
            message: foreign_tensor_message("the argument", var),
            location,
        });
        &PLACEHOLDERS[usize::from(var.dims).min(DIMS_MAX)]
    }

    /// Shape of a whole tensor. For another graph's tensor, returns a shape of equal rank, and `compile` reports an
    /// error.
    #[track_caller]
    pub fn shape(&self, var: Var) -> &[usize] {
        &self.tensor(var).shape
    }

    fn owns(&self, var: Var) -> bool {
        self.vars.get(var.index()).is_some_and(|own| own.graph == var.graph)
    }

    pub(crate) fn var(&self, index: usize) -> Var {
        self.vars[index]
    }

    pub(crate) fn new_tensor(&mut self, info: TensorInfo, location: SourceLine) -> Var {
        let dims = info.shape.len().min(DIMS_MAX) as u8;
        let var = Var { index: self.tensors.len() as u32, graph: self.id.0, dims, location };
        self.tensors.push(info);
        self.vars.push(var);
        var
    }

    /// Removes and returns all tensors, for a pass that rebuilds the graph with [`Graph::new_tensor`].
    pub(crate) fn take_tensors(&mut self) -> Vec<TensorInfo> {
        self.vars.clear();
        std::mem::take(&mut self.tensors)
    }

    /// Adds a node to `rebuilt` and records the node as its outputs' producer, for a pass that rebuilds the list of
    /// nodes.
    pub(crate) fn push_rebuilt(&mut self, rebuilt: &mut Vec<Node>, node: Node) {
        let id = NodeId(rebuilt.len() as u32);
        node.outputs.iter().for_each(|output| self.tensors[output.index()].producer = id);
        rebuilt.push(node);
    }

    pub(crate) fn errors(&self) -> Vec<GraphError> {
        // An op that uses the other graph's tensor also reports an error. One error per source line is enough.
        let is_new = |error: &&GraphError| self.errors.iter().all(|other| other.location != error.location);
        self.errors.iter().chain(self.foreign_query.get().filter(is_new)).cloned().collect()
    }

    /// The mesh that the graph is built for.
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

    /// The layout of a parameter, or of any tensor after the layout pass.
    pub(crate) fn layout(&self, var: Var) -> &NdSbp {
        self.tensor(var).layout.as_ref().expect("the layout pass gives every tensor a layout")
    }

    pub(crate) fn placement_of(&self, var: Var) -> usize {
        self.producer(var).placement
    }

    /// True if the host fetches an output from this device. Of equal copies, the host fetches only the first one. Of sums
    /// of squares, the host fetches those of devices with the first copy of a gradient, because other sums are 0.
    pub(crate) fn is_fetched(&self, output: Var, device: usize) -> bool {
        let (node, placement) = (self.producer(output), &self.placements[self.placement_of(output)]);
        let Some(coords) = placement.index_of(device).map(|index| placement.coords(index)) else { return false };
        let is_first_copy = |var: &Var| self.layout(*var).is_first_copy(&coords);
        match &node.op {
            NodeOp::NormSums { .. } => node.inputs.iter().any(is_first_copy),
            _ => is_first_copy(&output),
        }
    }

    /// Parameters and optimizer states, in the program's order.
    pub(crate) fn residents(&self) -> impl Iterator<Item = Var> {
        let nodes = self.nodes.iter();
        nodes.filter(|n| matches!(n.op, NodeOp::Parameter { .. } | NodeOp::State)).map(|n| n.outputs[0])
    }

    /// The parameters, in the order of their creation.
    pub fn parameters(&self) -> Vec<Var> {
        let is_parameter = |n: &&Node| matches!(n.op, NodeOp::Parameter { .. });
        self.nodes.iter().filter(is_parameter).map(|n| n.outputs[0]).collect()
    }
}

fn foreign_tensor_message(role: &str, var: Var) -> String {
    let (file, line) = (var.location.file(), var.location.line());
    format!("{role} is a tensor of another graph, created at {file}:{line}; use tensors of one graph only")
}

#[cfg(test)]
mod tests;
