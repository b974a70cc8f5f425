//! The error type of meshes, layouts, rules and boxing.

use shardflow_job::text::counted;

/// An error in a mesh, a layout, an op's rule or a layout change.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the messages explain the fields")]
pub enum LayoutError {
    /// The mesh text is not of the form `name=size,name=size`.
    #[error("mesh {text:?}: cannot parse {part:?}: write name=size,name=size, such as data=2,tensor=4")]
    MeshSyntax { text: String, part: String },
    /// A mesh axis has no devices.
    #[error("mesh axis {axis} has size 0, but must have at least 1")]
    EmptyAxis { axis: String },
    /// The mesh has more devices than any mesh may have.
    #[error("mesh {mesh} has more than {max} devices")]
    TooManyDevices { mesh: String, max: usize },
    /// Two mesh axes have the same name.
    #[error("mesh axis {axis} occurs twice")]
    DuplicateAxis { axis: String },
    /// The mesh axis does not exist.
    #[error("no mesh axis {axis}; the axes are: {}", known.join(", "))]
    UnknownAxis { axis: String, known: Vec<String> },
    /// The coordinate is past the end of its axis.
    #[error("mesh axis {axis} has size {size}, so coordinate {coordinate} is out of range")]
    Coordinate { axis: String, size: usize, coordinate: usize },
    /// The number of devices is not the product of the axis sizes, or a device occurs twice.
    #[error("a placement with axes {axes} needs {expected} distinct devices, got {devices:?}")]
    Devices { axes: String, expected: usize, devices: Vec<usize> },
    /// The layout text is invalid.
    #[error("layout {text:?}: cannot parse {part:?}: write S<dim>, B, P or Pmax for each mesh axis, such as (S0, B)")]
    LayoutSyntax { text: String, part: String },
    /// The layout does not fit its tensor or its placement.
    #[error("layout {layout} of a tensor of shape {shape:?} on mesh {mesh}: {why}")]
    Layout { layout: String, shape: Vec<usize>, mesh: String, why: String },
    /// A shard does not fit the tensor that the shards form.
    #[error("shard {index} of a tensor of shape {shape:?} as {layout}: expected {expected}, got {got}")]
    Shard { index: usize, shape: Vec<usize>, layout: String, expected: String, got: String },
    /// The rule is invalid.
    #[error("rule {text:?}: {why}")]
    Rule { text: String, why: String },
    /// The number of inputs differs from the rule's.
    #[error("rule {rule}: expected {expected} inputs, got {got}")]
    InputCount { rule: String, expected: usize, got: usize },
    /// The number of dims of an input differs from the rule's.
    #[error("rule {rule}: input {input} needs {} ({operand:?}), got shape {shape:?}", counted(operand.len(), "dim"))]
    Rank { rule: String, input: usize, operand: String, shape: Vec<usize> },
    /// Two inputs have different sizes for one factor.
    #[error("rule {rule}: {factor} is {size} in input {input} but {other_size} in {other}")]
    FactorSize { rule: String, factor: char, input: usize, size: usize, other: String, other_size: usize },
    /// No sequence of collectives makes this layout change.
    #[error("cannot change a {dtype} tensor of shape {shape:?} from {from} to {to}: {why}")]
    NoBoxing { from: String, to: String, dtype: String, shape: Vec<usize>, why: String },
    /// The input of the layout search is malformed, or the search has no solution.
    #[error("layout choice: {node}: {why}")]
    Choice { node: String, why: String },
}
