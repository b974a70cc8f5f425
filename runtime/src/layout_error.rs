//! The error type of meshes, layouts, rules and boxing.

use shardflow_job::text::counted;

/// An error in a mesh, a layout, an op's rule or a layout change.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages explain variants and fields")]
pub enum LayoutError {
    #[error("mesh {text:?}: cannot parse {part:?}: write name=size,name=size, such as data=2,tensor=4")]
    MeshSyntax { text: String, part: String },
    #[error("mesh axis {axis} has size 0, expected at least 1")]
    EmptyAxis { axis: String },
    #[error("mesh {mesh} has more than {max} devices")]
    TooManyDevices { mesh: String, max: usize },
    #[error("mesh axis {axis} occurs twice")]
    DuplicateAxis { axis: String },
    #[error("no mesh axis {axis}; the axes are: {}", known.join(", "))]
    UnknownAxis { axis: String, known: Vec<String> },
    #[error("mesh axis {axis} has size {size}, so coordinate {coordinate} is out of range")]
    Coordinate { axis: String, size: usize, coordinate: usize },
    #[error("a placement with axes {axes} needs {expected} distinct devices, got {devices:?}")]
    Devices { axes: String, expected: usize, devices: Vec<usize> },
    #[error("layout {text:?}: cannot parse {part:?}: write S<dim>, B, P or Pmax for each mesh axis, such as (S0, B)")]
    LayoutSyntax { text: String, part: String },
    #[error("layout {layout} of a tensor of shape {shape:?} on mesh {mesh}: {why}")]
    Layout { layout: String, shape: Vec<usize>, mesh: String, why: String },
    #[error("shard {index} of a tensor of shape {shape:?} in layout {layout}: expected {expected}, got {got}")]
    Shard { index: usize, shape: Vec<usize>, layout: String, expected: String, got: String },
    #[error("rule {text:?}: {why}")]
    Rule { text: String, why: String },
    #[error("rule {rule}: expected {expected} inputs, got {got}")]
    InputCount { rule: String, expected: usize, got: usize },
    #[error("rule {rule}: input {input} needs {} ({operand:?}), got shape {shape:?}", counted(operand.len(), "dim"))]
    Rank { rule: String, input: usize, operand: String, shape: Vec<usize> },
    #[error("rule {rule}: factor {factor} has size {size} in input {input}, but size {other_size} in {other}")]
    FactorSize { rule: String, factor: char, input: usize, size: usize, other: String, other_size: usize },
    #[error("cannot change a {dtype} tensor of shape {shape:?} from {from} to {to}: {why}")]
    NoBoxing { from: String, to: String, dtype: String, shape: Vec<usize>, why: String },
    /// The input of the layout search is malformed, or the search has no solution.
    #[error("cannot choose a layout: {node}: {why}")]
    Choice { node: String, why: String },
}
