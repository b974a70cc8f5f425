//! The error of meshes, layouts, rules and boxing: plain data.

/// What can be wrong with a mesh, a layout, an op's rule or a change of layout.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// A mesh that is not written `name=size,name=size`.
    #[error("mesh {text:?}: cannot read {part:?}: write name=size,name=size, such as data=2,tensor=4")]
    MeshSyntax {
        /// All of the mesh's text.
        text: String,
        /// The part that is wrong.
        part: String,
    },
    /// A mesh axis without devices.
    #[error("mesh axis {axis} has size 0, must be 1 or more")]
    EmptyAxis {
        /// The axis.
        axis: String,
    },
    /// More devices than any mesh may name.
    #[error("mesh {mesh} has more than {max} devices")]
    TooManyDevices {
        /// The mesh as written.
        mesh: String,
        /// The most there may be.
        max: usize,
    },
    /// Two mesh axes of one name.
    #[error("mesh axis {axis} is named twice")]
    DuplicateAxis {
        /// The axis.
        axis: String,
    },
    /// A mesh axis that is not there.
    #[error("no mesh axis {axis}; there are: {}", known.join(", "))]
    UnknownAxis {
        /// What was asked for.
        axis: String,
        /// What there is.
        known: Vec<String>,
    },
    /// A coordinate past the end of its axis.
    #[error("mesh axis {axis} has size {size}, no coordinate {coordinate}")]
    Coordinate {
        /// The axis.
        axis: String,
        /// Its size.
        size: usize,
        /// What was asked for.
        coordinate: usize,
    },
    /// A placement whose devices are not as many as its axes say, or one device twice.
    #[error("placement of axes {axes} needs {expected} different devices, got {devices:?}")]
    Devices {
        /// The axes, as written.
        axes: String,
        /// Product of their sizes.
        expected: usize,
        /// What was given.
        devices: Vec<usize>,
    },
    /// A layout that cannot be read.
    #[error("layout {text:?}: cannot read {part:?}: write S<dim>, B, P or Pmax for each mesh axis, such as (S0, B)")]
    LayoutSyntax {
        /// All of the text.
        text: String,
        /// The part that is wrong.
        part: String,
    },
    /// A layout that does not fit its tensor or its placement.
    #[error("layout {layout} of a tensor of shape {shape:?} on mesh {mesh}: {why}")]
    Layout {
        /// The layout.
        layout: String,
        /// The tensor's shape.
        shape: Vec<usize>,
        /// The placement's axes.
        mesh: String,
        /// What does not fit.
        why: String,
    },
    /// Shards that cannot be put together.
    #[error("shard {index} of a tensor of shape {shape:?} as {layout}: expected {expected}, got {got}")]
    Shard {
        /// Index in the placement.
        index: usize,
        /// The whole tensor's shape.
        shape: Vec<usize>,
        /// The layout.
        layout: String,
        /// What the layout asks for.
        expected: String,
        /// What was given.
        got: String,
    },
    /// A rule that cannot be read.
    #[error("rule {text:?}: {why}")]
    Rule {
        /// The rule as written.
        text: String,
        /// What is wrong.
        why: String,
    },
    /// An op's inputs are not as many as its rule says.
    #[error("rule {rule}: expected {expected} inputs, got {got}")]
    InputCount {
        /// The rule.
        rule: String,
        /// Operands in the rule.
        expected: usize,
        /// Inputs given.
        got: usize,
    },
    /// An input's number of dims is not what the rule says.
    #[error("rule {rule}: input {input} is {operand:?}, {} dims, got shape {shape:?}", operand.len())]
    Rank {
        /// The rule.
        rule: String,
        /// Index of the input.
        input: usize,
        /// Its letters.
        operand: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// Two inputs disagree about the size of a factor.
    #[error("rule {rule}: {factor} is {size} in input {input} but {other_size} in {other}")]
    FactorSize {
        /// The rule.
        rule: String,
        /// The factor's letter.
        factor: char,
        /// The input that disagrees.
        input: usize,
        /// Its size there.
        size: usize,
        /// Who set the size, e.g. `input 0`.
        other: String,
        /// The size there.
        other_size: usize,
    },
    /// No sequence of collectives leads from one layout to the other.
    #[error("no way from {from} to {to} for a {dtype} tensor of shape {shape:?}: {why}")]
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
    /// A problem of layout choice that is not well formed, or has no solution.
    #[error("layout choice: {node}: {why}")]
    Choice {
        /// The node, or tensor.
        node: String,
        /// What is wrong.
        why: String,
    },
}
