//! The error type of meshes, layouts, rules and boxing.

use shardflow_job::text::counted;

/// An error in a mesh, a layout, an op's rule or a layout change.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// The mesh text is not of the form `name=size,name=size`.
    #[error("mesh {text:?}: cannot parse {part:?}: write name=size,name=size, such as data=2,tensor=4")]
    MeshSyntax {
        /// The whole text of the mesh.
        text: String,
        /// The invalid part.
        part: String,
    },
    /// A mesh axis has no devices.
    #[error("mesh axis {axis} has size 0, but must have at least 1")]
    EmptyAxis {
        /// The axis.
        axis: String,
    },
    /// The mesh has more devices than any mesh may have.
    #[error("mesh {mesh} has more than {max} devices")]
    TooManyDevices {
        /// The mesh as text.
        mesh: String,
        /// The maximum.
        max: usize,
    },
    /// Two mesh axes have the same name.
    #[error("mesh axis {axis} occurs twice")]
    DuplicateAxis {
        /// The axis.
        axis: String,
    },
    /// The mesh axis does not exist.
    #[error("no mesh axis {axis}; the axes are: {}", known.join(", "))]
    UnknownAxis {
        /// The requested axis.
        axis: String,
        /// The existing axes.
        known: Vec<String>,
    },
    /// The coordinate is past the end of its axis.
    #[error("mesh axis {axis} has size {size}, so coordinate {coordinate} is out of range")]
    Coordinate {
        /// The axis.
        axis: String,
        /// Its size.
        size: usize,
        /// The requested coordinate.
        coordinate: usize,
    },
    /// The number of devices is not the product of the axis sizes, or a device occurs twice.
    #[error("a placement with axes {axes} needs {expected} distinct devices, got {devices:?}")]
    Devices {
        /// The axes as text.
        axes: String,
        /// The product of their sizes.
        expected: usize,
        /// The given devices.
        devices: Vec<usize>,
    },
    /// The layout text is invalid.
    #[error("layout {text:?}: cannot parse {part:?}: write S<dim>, B, P or Pmax for each mesh axis, such as (S0, B)")]
    LayoutSyntax {
        /// The whole text.
        text: String,
        /// The invalid part.
        part: String,
    },
    /// The layout does not fit its tensor or its placement.
    #[error("layout {layout} of a tensor of shape {shape:?} on mesh {mesh}: {why}")]
    Layout {
        /// The layout.
        layout: String,
        /// The tensor's shape.
        shape: Vec<usize>,
        /// The placement's axes.
        mesh: String,
        /// The mismatch.
        why: String,
    },
    /// A shard does not fit the tensor that the shards form.
    #[error("shard {index} of a tensor of shape {shape:?} as {layout}: expected {expected}, got {got}")]
    Shard {
        /// Index in the placement.
        index: usize,
        /// The whole tensor's shape.
        shape: Vec<usize>,
        /// The layout.
        layout: String,
        /// What the layout requires.
        expected: String,
        /// What was given.
        got: String,
    },
    /// The rule is invalid.
    #[error("rule {text:?}: {why}")]
    Rule {
        /// The rule as text.
        text: String,
        /// The cause.
        why: String,
    },
    /// The number of inputs differs from the rule's.
    #[error("rule {rule}: expected {expected} inputs, got {got}")]
    InputCount {
        /// The rule.
        rule: String,
        /// Inputs in the rule.
        expected: usize,
        /// Inputs given.
        got: usize,
    },
    /// The number of dims of an input differs from the rule's.
    #[error("rule {rule}: input {input} needs {} ({operand:?}), got shape {shape:?}", counted(operand.len(), "dim"))]
    Rank {
        /// The rule.
        rule: String,
        /// Index of the input.
        input: usize,
        /// Its letters in the rule.
        operand: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Two inputs have different sizes for one factor.
    #[error("rule {rule}: {factor} is {size} in input {input} but {other_size} in {other}")]
    FactorSize {
        /// The rule.
        rule: String,
        /// The factor's letter.
        factor: char,
        /// The input that differs.
        input: usize,
        /// Its size there.
        size: usize,
        /// The source of the other size, such as `input 0`.
        other: String,
        /// The other size.
        other_size: usize,
    },
    /// No sequence of collectives makes this layout change.
    #[error("cannot change a {dtype} tensor of shape {shape:?} from {from} to {to}: {why}")]
    NoBoxing {
        /// Source layout and mesh.
        from: String,
        /// Target layout and mesh.
        to: String,
        /// Element type.
        dtype: String,
        /// The tensor's shape.
        shape: Vec<usize>,
        /// The cause.
        why: String,
    },
    /// The input of the layout search is malformed, or the search has no solution.
    #[error("layout choice: {node}: {why}")]
    Choice {
        /// The node or tensor.
        node: String,
        /// The cause.
        why: String,
    },
}
