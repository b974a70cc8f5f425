//! The methods that add nodes to a [`Graph`]. They never fail: they record errors with the caller's source line.

use std::panic::Location;
use std::sync::{Arc, OnceLock};

use shardflow_actors::label::Role;
use shardflow_kernels::op::{Einsum, Op};
use shardflow_kernels::tensor::DType;

use super::{
    AdamW, Combine, CustomOp, DIMS_MAX, Graph, GraphError, GraphId, Node, NodeId, NodeOp, Objective, Output, Rate,
    SourceLine, TensorInfo, Var, foreign_tensor_message, ops,
};
use crate::init::Init;
use crate::layout_error::LayoutError;
use crate::placement::{Mesh, Placement};
use crate::sbp::rule::{Rule, plausible_shapes};
use crate::sbp::{NdSbp, Sbp};
use shardflow_job::text::counted;

/// A layout as the user writes it. It names the mesh axes over which dims are split; along all other axes the tensor is
/// broadcast. Example: `Layout::split("data", 0).and_split("tensor", 2)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout(Vec<(String, usize)>);

impl Layout {
    /// A layout with the same copy on every device.
    pub fn broadcast() -> Self {
        Self::default()
    }

    /// Splits a dim over a mesh axis; along the other axes the tensor is broadcast.
    pub fn split(axis: &str, dim: usize) -> Self {
        Self::broadcast().and_split(axis, dim)
    }

    /// Also splits a dim over another mesh axis.
    pub fn and_split(mut self, axis: &str, dim: usize) -> Self {
        self.0.push((axis.to_string(), dim));
        self
    }

    /// The layout of a tensor of this shape on a placement, or an error message. Axes of size 1 are `Broadcast`.
    fn on(&self, placement: &Placement, shape: &[usize]) -> Result<NdSbp, String> {
        let axes = placement.axes();
        let mut out = NdSbp::broadcast(axes.len());
        for (axis, dim) in &self.0 {
            let Some(position) = axes.iter().position(|a| a.name == *axis) else {
                let known: Vec<&str> = axes.iter().map(|a| a.name.as_str()).collect();
                return Err(format!("the layout names mesh axis `{axis}`, but the placement has the axes {known:?}"));
            };
            if self.0.iter().filter(|(other, _)| other == axis).count() > 1 {
                return Err(format!("the layout names mesh axis `{axis}` twice"));
            }
            let rank = shape.len();
            if *dim >= rank {
                return Err(format!(
                    "the layout splits dim {dim} over `{axis}`, but the shape {shape:?} has {rank} dims"
                ));
            }
            if axes[position].size > 1 {
                out.0[position] = Sbp::Split(*dim);
            }
        }
        Ok(out)
    }
}

impl Graph {
    /// An empty program for this mesh. Nodes are placed on the whole mesh until [`Graph::place`] is called.
    #[track_caller]
    pub fn new(mesh: &Mesh) -> Self {
        Self {
            id: GraphId::new(),
            location: Location::caller(),
            mesh: mesh.clone(),
            placements: vec![mesh.whole()],
            nodes: Vec::new(),
            tensors: Vec::new(),
            vars: Vec::new(),
            outputs: Vec::new(),
            errors: Vec::new(),
            foreign_query: OnceLock::new(),
            objective: None,
            current_placement: 0,
            role: Role::Forward,
            rate: Rate::MicroBatch,
            origin: None,
        }
    }

    /// Builds a layer of several nodes. Its errors are reported at `location`, the line that calls the outermost layer.
    pub fn layer<T>(&mut self, location: SourceLine, build: impl FnOnce(&mut Self) -> T) -> T {
        let outer = self.origin;
        self.origin = Some(outer.unwrap_or(location));
        let out = build(self);
        self.origin = outer;
        out
    }

    /// Places all nodes that are added after this call. The devices must belong to the graph's mesh.
    #[track_caller]
    pub fn place(&mut self, placement: Placement) {
        let count = self.mesh.device_count();
        if let Some(device) = placement.devices().iter().find(|device| **device >= count) {
            let (mesh, devices) = (&self.mesh, counted(count, "device"));
            let message = format!(
                "device {device} is not in mesh {mesh}, which has {devices}; use a placement of the graph's own mesh"
            );
            return self.refuse("placement", message);
        }
        self.current_placement = self.placement_index(placement);
    }

    /// Returns the index of a placement. Adds the placement if it is new.
    pub(crate) fn placement_index(&mut self, placement: Placement) -> usize {
        self.placements.iter().position(|p| *p == placement).unwrap_or_else(|| {
            self.placements.push(placement);
            self.placements.len() - 1
        })
    }

    /// Places all nodes that are added after this call on the devices at coordinate `index` of the mesh axis `axis`.
    #[track_caller]
    pub fn place_at(&mut self, axis: &str, index: usize) {
        match self.mesh.at(axis, index) {
            Ok(placement) => self.place(placement),
            Err(e) => self.refuse("placement", e.to_string()),
        }
    }

    /// A tensor that the host feeds. Its first dim is the whole batch of a step, which is divided into micro-batches.
    #[track_caller]
    pub fn input(&mut self, name: &str, shape: &[usize], dtype: DType, layout: Layout) -> Var {
        self.add_input(name, shape, dtype, Rate::MicroBatch, (layout, Sbp::Split(0)))
    }

    /// Like [`Graph::input`], with the given batch dim, for instance 1 for `[time, batch, features]`. Inputs may have
    /// batches of different sizes.
    #[track_caller]
    pub fn input_with_batch_dim(
        &mut self,
        name: &str,
        shape: &[usize],
        batch_dim: usize,
        dtype: DType,
        layout: Layout,
    ) -> Var {
        if batch_dim >= shape.len() {
            let message = format!("the batch is dim {batch_dim}, but the shape {shape:?} has {} dims", shape.len());
            self.refuse(name, message);
            return self.poison(shape);
        }
        self.add_input(name, shape, dtype, Rate::MicroBatch, (layout, Sbp::Split(batch_dim)))
    }

    /// A tensor that the host feeds once per step; it is not divided into micro-batches.
    #[track_caller]
    pub fn step_input(&mut self, name: &str, shape: &[usize], dtype: DType) -> Var {
        self.add_input(name, shape, dtype, Rate::Step, (Layout::broadcast(), Sbp::Broadcast))
    }

    /// A trainable tensor. Its name must be unique, because checkpoints identify parameters by name.
    #[track_caller]
    pub fn parameter(&mut self, name: &str, shape: &[usize], init: Init, layout: Layout) -> Var {
        self.check_shape(name, shape);
        if let Init::Normal { std } = init
            && !(std >= 0.0 && std.is_finite())
        {
            self.refuse(name, format!("the standard deviation is {std}: it must be finite and not negative"));
        }
        let duplicate = |n: &Node| matches!(n.op, NodeOp::Parameter { .. }) && n.name == name;
        if self.nodes.iter().any(duplicate) {
            self.refuse(name, "a parameter with this name already exists; give each parameter a unique name");
        }
        if name.starts_with(STATE_PREFIX) {
            let message = format!(
                "names that start with `{STATE_PREFIX}` are reserved for the optimizer's state; choose another name"
            );
            self.refuse(name, message);
        }
        if name == FILE_METADATA {
            self.refuse(name, "this name is reserved for the metadata of checkpoint files; choose another name");
        }
        self.source(name, NodeOp::Parameter { init }, shape, DType::F32, Rate::Step, layout)
    }

    /// Sets the shape that a parameter has in checkpoints. Both shapes must have the same number of elements. Example:
    /// `[heads * head_dim, width]` for a tensor that the program uses as `[heads, head_dim, width]`.
    #[track_caller]
    pub fn saved_as(&mut self, parameter: Var, shape: &[usize]) {
        let [parameter] = self.check_args("saved_as", [parameter]);
        let own = self.shape(parameter).to_vec();
        let count = |shape: &[usize]| shape.iter().try_fold(1usize, |count, extent| count.checked_mul(*extent));
        if count(&own) != count(shape) && !self.is_poisoned(&[parameter]) {
            let message = format!("shape {own:?} cannot be saved as {shape:?}: the number of elements differs");
            self.refuse("saved_as", message);
        }
        if !matches!(self.producer(parameter).op, NodeOp::Parameter { .. }) && !self.is_poisoned(&[parameter]) {
            let message = format!("{} is not a parameter; only parameters are saved", self.tensor(parameter).name);
            self.refuse("saved_as", message);
        }
        self.tensors[parameter.index()].saved_shape = Some(shape.to_vec());
    }

    /// Looks up rows of `table [v, c]` by `ids [..]`. The result has the shape `[.., c]`.
    #[track_caller]
    pub fn embedding(&mut self, ids: Var, table: Var) -> Var {
        let [ids, table] = self.check_args("embedding", [ids, table]);
        let vocab = self.shape(table).first().copied().unwrap_or(0);
        self.kernel("embedding", Op::Embedding { vocab_start: 0, vocab }, &[ids, table])[0]
    }

    /// `a + b`; the shape of `b` must be a suffix of the shape of `a`.
    #[track_caller]
    pub fn add(&mut self, a: Var, b: Var) -> Var {
        let [a, b] = self.check_args("add", [a, b]);
        let (shape_a, shape_b) = (self.shape(a).to_vec(), self.shape(b).to_vec());
        if !shape_a.ends_with(&shape_b) && !self.is_poisoned(&[a, b]) {
            let message =
                format!("cannot add {shape_b:?} to {shape_a:?}: the second shape must be a suffix of the first");
            self.refuse("add", message);
            return self.poison(&shape_a);
        }
        self.kernel("add", Op::Add, &[a, b])[0]
    }

    /// A product over named indices, such as `"btc,hdc->bthd"`; [`Einsum`] states which specs are allowed.
    #[track_caller]
    pub fn einsum(&mut self, spec: &str, a: Var, b: Var) -> Var {
        let [a, b] = self.check_args("einsum", [a, b]);
        match Einsum::parse(spec) {
            Ok(e) => self.kernel("einsum", Op::Einsum(e), &[a, b])[0],
            Err(e) => {
                let text = e.to_string();
                self.refuse("einsum", text.strip_prefix("einsum: ").unwrap_or(&text).to_string());
                let shapes = plausible_shapes(spec, &[self.shape(a), self.shape(b)]);
                self.poison(&shapes[0])
            }
        }
    }

    /// Layer norm over the last dim, with a weight and no bias.
    #[track_caller]
    pub fn layer_norm(&mut self, x: Var, weight: Var, eps: f32) -> Var {
        if !(eps >= 0.0 && eps.is_finite()) {
            self.refuse("layer_norm", format!("eps is {eps}: it must be finite and not negative"));
        }
        self.op("layer_norm", Op::LayerNorm { eps }, [x, weight])
    }

    /// Exact (erf) GELU.
    #[track_caller]
    pub fn gelu(&mut self, x: Var) -> Var {
        self.op("gelu", Op::Gelu, [x])
    }

    /// `factor * x`.
    #[track_caller]
    pub fn scale(&mut self, x: Var, factor: f32) -> Var {
        if !factor.is_finite() {
            self.refuse("scale", format!("the factor is {factor}: it must be finite"));
        }
        self.op("scale", Op::Scale { factor }, [x])
    }

    /// Causal attention of `[batch, time, head, dim]` tensors, scores scaled by `1/sqrt(dim)`.
    #[track_caller]
    pub fn attention(&mut self, q: Var, k: Var, v: Var) -> Var {
        let args = self.check_args("attention", [q, k, v]);
        let scale = 1.0 / (*self.shape(args[0]).last().unwrap_or(&1) as f32).sqrt();
        self.kernel("attention", Op::Attention { scale }, &args)[0]
    }

    /// In training, zeroes elements with probability `p` and scales up the others. In evaluation, changes nothing; see
    /// [`Mode`](crate::passes::mode::Mode). The mask depends on the session's seed, the step, `seed` and the element's
    /// index in the step's whole tensor, not on layout, batch dim or micro-batches. Each dropout needs its own `seed`.
    #[track_caller]
    pub fn dropout(&mut self, x: Var, p: f32, seed: u64) -> Var {
        if !(0.0..1.0).contains(&p) {
            self.refuse("dropout", format!("p is {p}: it must be at least 0 and below 1"));
        }
        let [x] = self.check_args("dropout", [x]);
        let rng = self.rng();
        let op = Op::Dropout { p, seed, shape: Vec::new(), start: Vec::new(), stride: 0 };
        self.kernel("dropout", op, &[x, rng])[0]
    }

    /// Cross-entropy, averaged over a step's tokens, of `logits [.., v]` (v may be split) and i32 `targets [..]`.
    #[track_caller]
    pub fn cross_entropy(&mut self, logits: Var, targets: Var) -> Var {
        let [logits, targets] = self.check_args("cross_entropy", [logits, targets]);
        let rows = self.shape(logits).split_last().map_or(&[][..], |(_, rows)| rows);
        let (dtype, shape) = (self.tensor(targets).dtype, self.shape(targets));
        if (dtype, shape) != (DType::I32, rows) && !self.is_poisoned(&[logits, targets]) {
            let all = self.shape(logits);
            let message = format!(
                "targets are {dtype:?} {shape:?}, but must be I32 {rows:?}, the shape of the logits {all:?} without the last dim"
            );
            self.refuse("cross_entropy", message);
            return self.poison(&[]);
        }
        // `compile` refuses a shape whose product overflows.
        let tokens = self.shape(targets).iter().fold(1usize, |n, extent| n.saturating_mul(*extent));
        let scale = 1.0 / tokens.max(1) as f32;
        let max = self.kernel("row_max", Op::RowMax, &[logits])[0];
        let vocab = self.shape(logits).last().copied().unwrap_or(0);
        let op = Op::SumExpTarget { vocab_start: 0, vocab };
        let stats = self.kernel("sum_exp", op, &[logits, max, targets]);
        self.kernel("loss", Op::TokenLoss { scale }, &[max, stats[0], stats[1]])[0]
    }

    /// Changes the layout of a tensor, not its value.
    #[track_caller]
    pub fn relayout(&mut self, x: Var, layout: Layout) -> Var {
        let [x] = self.check_args("relayout", [x]);
        let (shape, dtype, rate) = (self.shape(x).to_vec(), self.tensor(x).dtype, self.tensor(x).rate);
        let out = self.push("relayout", NodeOp::Relayout, &[x], &[(shape, dtype, rate)])[0];
        self.set_layout("relayout", out, &layout);
        out
    }

    /// Adds a user-defined op.
    #[track_caller]
    pub fn custom(&mut self, op: Arc<dyn CustomOp>, inputs: &[Var]) -> Vec<Var> {
        let (name, rule, location) = (op.name().to_string(), op.rule(), self.here());
        let check = |(port, input): (usize, &Var)| self.check_arg(&name, &format!("input {port}"), *input, location);
        let inputs: Vec<Var> = inputs.iter().enumerate().map(check).collect();
        if let Some(port) = inputs.iter().position(|input| self.tensor(*input).dtype == DType::BF16) {
            self.refuse(&name, format!("input {port} is BF16, but custom ops read F32 or I32; feed it as F32"));
        }
        self.node_by_rule(&name, NodeOp::Custom(op), rule, &inputs)
    }

    /// Minimises the scalar `loss` by training every parameter on which it depends. At least one parameter is required.
    #[track_caller]
    pub fn minimize(&mut self, loss: Var, optimizer: AdamW) {
        if self.objective.is_some() {
            return self
                .refuse("minimize", "the program already minimises a loss; add the losses and minimise their sum");
        }
        if let Some(message) = optimizer.invalid() {
            self.refuse("minimize", message);
        }
        let [loss] = self.check_args("minimize", [loss]);
        if !self.shape(loss).is_empty() && !self.is_poisoned(&[loss]) {
            let message = format!("the loss has shape {:?}: only a scalar can be minimised", self.shape(loss));
            self.refuse("minimize", message);
        }
        self.objective = Some(Objective { loss, optimizer, location: self.here() });
        self.output_as(LOSS_OUTPUT, loss, None);
    }

    /// Sends a tensor's value to the host after each step, under a unique name; `minimize` names the loss `loss`. The
    /// value is that of the whole batch. The ops' rules determine how micro-batches are combined: parts of the batch
    /// are concatenated, sums and means over the batch are added, and a value that does not depend on the batch is
    /// taken once. If the rules do not determine the combination, as for a nonlinear function of a sum over the batch,
    /// `compile` requires [`Graph::output_with`].
    #[track_caller]
    pub fn output(&mut self, name: &str, tensor: Var) {
        self.output_as(name, tensor, None);
    }

    /// Like [`Graph::output`], with an explicit way to combine the values of micro-batches.
    #[track_caller]
    pub fn output_with(&mut self, name: &str, tensor: Var, combine: Combine) {
        self.output_as(name, tensor, Some(combine));
    }

    #[track_caller]
    fn output_as(&mut self, name: &str, tensor: Var, combine: Option<Combine>) {
        let [tensor] = self.check_args("output", [tensor]);
        let (shape, dtype) = (self.shape(tensor), self.tensor(tensor).dtype);
        let message = match combine {
            Some(Combine::Concat(dim)) if dim >= shape.len() => {
                Some(format!("`Combine::Concat({dim})` is given, but the shape {shape:?} has {} dims", shape.len()))
            }
            Some(combine @ (Combine::Sum | Combine::Max)) if dtype != DType::F32 => {
                Some(format!("`Combine::{combine:?}` requires F32, got {dtype:?}"))
            }
            _ => None,
        };
        if let Some(message) = message.filter(|_| !self.is_poisoned(&[tensor])) {
            self.refuse(name, message);
        }
        if self.outputs.iter().any(|other| other.name == name && other.tensor != tensor) {
            return self.refuse(name, "another output already has this name; give each output a unique name");
        }
        if name == GRAD_SQUARES_OUTPUT {
            self.refuse(name, "this name is reserved for an output of the session; choose another name");
        }
        self.push_output(name, tensor, combine);
    }

    // ---- shared by the methods above and the passes ----

    #[track_caller]
    pub(crate) fn push_output(&mut self, name: &str, tensor: Var, combine: Option<Combine>) {
        let location = self.here();
        self.outputs.push(Output { name: name.to_string(), tensor, combine, location });
    }

    /// Adds an input. Inputs of the same name are one host tensor on several placements; their properties must match.
    #[track_caller]
    fn add_input(
        &mut self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        rate: Rate,
        (layout, loop_sbp): (Layout, Sbp),
    ) -> Var {
        self.check_shape(name, shape);
        if name == RNG_INPUT || name == HYPER_INPUT {
            self.refuse(name, "this name is reserved for an input that the session feeds; choose another name");
        }
        let others = self.nodes.iter().filter(|n| matches!(n.op, NodeOp::Input) && n.name == name);
        let different = others.map(|n| self.tensor(n.outputs[0])).find(|other| {
            (&other.shape[..], other.dtype, other.rate, other.loop_sbp) != (shape, dtype, rate, Some(loop_sbp))
        });
        if let Some(other) = different {
            let batch = |sbp: Option<Sbp>| match sbp {
                Some(Sbp::Split(dim)) => format!("with the batch as dim {dim}"),
                _ => "once per step".to_string(),
            };
            let message = format!(
                "another input with this name is {:?} {:?} {}, but this one is {dtype:?} {shape:?} {}; inputs with the same name are one tensor of the host, so type, shape and batch dim must be equal",
                other.dtype,
                other.shape,
                batch(other.loop_sbp),
                batch(Some(loop_sbp))
            );
            self.refuse(name, message);
        }
        let out = self.source(name, NodeOp::Input, shape, dtype, rate, layout);
        self.tensors[out.index()].loop_sbp = Some(loop_sbp);
        out
    }

    /// The source line of the layer under construction, or else of the user's call.
    #[track_caller]
    pub(super) fn here(&self) -> SourceLine {
        self.origin.unwrap_or(Location::caller())
    }

    #[track_caller]
    pub(crate) fn refuse(&mut self, subject: &str, message: impl Into<String>) {
        self.error(subject, message, self.here());
    }

    pub(crate) fn error(&mut self, subject: &str, message: impl Into<String>, location: SourceLine) {
        self.errors.push(GraphError { subject: subject.into(), message: message.into(), location });
    }

    pub(crate) fn node_error(&mut self, index: usize, message: impl Into<String>) {
        let (name, location) = (self.nodes[index].name.clone(), self.nodes[index].location);
        self.error(&name, message, location);
    }

    pub(crate) fn is_poisoned(&self, vars: &[Var]) -> bool {
        vars.iter().any(|v| self.tensor(*v).poisoned)
    }

    #[track_caller]
    fn check_args<const N: usize>(&mut self, op: &str, args: [Var; N]) -> [Var; N] {
        let location = self.here();
        std::array::from_fn(|port| self.check_arg(op, &format!("input {port}"), args[port], location))
    }

    /// Returns `arg`. If `arg` belongs to another graph, records an error and returns a placeholder with the same rank.
    pub(crate) fn check_arg(&mut self, op: &str, role: &str, arg: Var, location: SourceLine) -> Var {
        if self.owns(arg) {
            return arg;
        }
        self.error(op, foreign_tensor_message(role, arg), location);
        self.poison(&vec![1; arg.dims.into()])
    }

    /// Adds a placeholder for the result of an op with an error.
    fn poison(&mut self, shape: &[usize]) -> Var {
        let node = NodeOp::Kernel(Op::Fill { value: f32::NAN });
        let out = self.push("error", node, &[], &[(shape.to_vec(), DType::F32, Rate::MicroBatch)]);
        self.tensors[out[0].index()].poisoned = true;
        out[0]
    }

    /// Refuses dims of size 0, and tensors with more than `DIMS_MAX` dims.
    #[track_caller]
    fn check_shape(&mut self, name: &str, shape: &[usize]) {
        if let Some(dim) = shape.iter().position(|extent| *extent == 0) {
            self.refuse(name, format!("dim {dim} of shape {shape:?} is 0; each dim must be at least 1"));
        }
        if shape.len() > DIMS_MAX {
            self.refuse(name, format!("the shape {shape:?} has {} dims; the maximum is {DIMS_MAX}", shape.len()));
        }
    }

    /// The input `[step, micro-batch]` of dropout on the current placement; added at its first use.
    #[track_caller]
    fn rng(&mut self) -> Var {
        let placement = self.current_placement;
        match self.nodes.iter().find(|n| n.name == RNG_INPUT && n.placement == placement) {
            Some(node) => node.outputs[0],
            None => self.source(RNG_INPUT, NodeOp::Input, &[2], DType::I32, Rate::MicroBatch, Layout::broadcast()),
        }
    }

    /// Adds a node without inputs and resolves its layout.
    #[track_caller]
    pub(crate) fn source(
        &mut self,
        name: &str,
        op: NodeOp,
        shape: &[usize],
        dtype: DType,
        rate: Rate,
        layout: Layout,
    ) -> Var {
        let out = self.push(name, op, &[], &[(shape.to_vec(), dtype, rate)])[0];
        self.tensors[out.index()].name = name.to_string();
        if let Some(node) = self.nodes.last_mut() {
            node.rate = rate;
        }
        self.set_layout(name, out, &layout);
        out
    }

    #[track_caller]
    fn set_layout(&mut self, subject: &str, var: Var, layout: &Layout) {
        match layout.on(&self.placements[self.placement_of(var)], self.shape(var)) {
            Ok(sbp) => self.tensors[var.index()].layout = Some(sbp),
            Err(message) => self.refuse(subject, message),
        }
    }

    /// Adds an op that the user called, with one output.
    #[track_caller]
    fn op<const N: usize>(&mut self, name: &str, op: Op, args: [Var; N]) -> Var {
        let args = self.check_args(name, args);
        self.kernel(name, op, &args)[0]
    }

    #[track_caller]
    pub(crate) fn kernel(&mut self, name: &str, op: Op, inputs: &[Var]) -> Vec<Var> {
        let shapes: Vec<&[usize]> = inputs.iter().map(|v| self.shape(*v)).collect();
        let rule = ops::rule(&op, &shapes);
        self.node_by_rule(name, NodeOp::Kernel(op), rule, inputs)
    }

    /// Adds a node; the output shapes follow from the rule.
    #[track_caller]
    pub(crate) fn node_by_rule(
        &mut self,
        name: &str,
        op: NodeOp,
        rule: Result<Rule, LayoutError>,
        inputs: &[Var],
    ) -> Vec<Var> {
        let rate = inputs.iter().map(|v| self.tensor(*v)).filter(|t| t.rate == Rate::MicroBatch).count();
        let rate = if rate > 0 || self.rate == Rate::MicroBatch { Rate::MicroBatch } else { Rate::Step };
        let text = match &rule {
            Ok(rule) => rule.to_string(),
            Err(LayoutError::Rule { text, .. }) => text.clone(),
            Err(_) => String::new(),
        };
        let given: Vec<Vec<usize>> = inputs.iter().map(|v| self.shape(*v).to_vec()).collect();
        let given: Vec<&[usize]> = given.iter().map(Vec::as_slice).collect();
        let inferred = rule.and_then(|rule| rule.infer_shapes(&given));
        let inferred = match inferred {
            Ok(shapes) if shapes.iter().any(|shape| shape.len() > DIMS_MAX) => {
                Err(format!("the result has more than {DIMS_MAX} dims"))
            }
            other => other.map_err(|e| e.to_string()),
        };
        if let (NodeOp::Kernel(op), Ok(_)) = (&op, &inferred)
            && let Some(message) = self.dtype_mismatch(op, inputs)
            && !self.is_poisoned(inputs)
        {
            self.refuse(name, message);
        }
        match inferred {
            Ok(shapes) => {
                let outputs: Vec<_> = shapes.into_iter().map(|shape| (shape, DType::F32, rate)).collect();
                self.push(name, op, inputs, &outputs)
            }
            Err(e) => {
                let shapes = plausible_shapes(&text, &given);
                if !self.is_poisoned(inputs) {
                    let shapes: Vec<String> = given.iter().map(|shape| format!("{shape:?}")).collect();
                    self.refuse(name, format!("{e}; the inputs have shapes {}", shapes.join(", ")));
                }
                shapes.iter().map(|shape| self.poison(shape)).collect()
            }
        }
    }

    fn dtype_mismatch(&self, op: &Op, inputs: &[Var]) -> Option<String> {
        inputs.iter().enumerate().find_map(|(port, input)| {
            let (want, got) = (ops::input_dtype(op, port), self.tensor(*input).dtype);
            let name = &self.tensor(*input).name;
            (want != got).then(|| format!("input {port} ({name}) is {got:?}, but must be {want:?}"))
        })
    }

    /// Adds a node at the end, on the current placement with the current role.
    #[track_caller]
    pub(crate) fn push(
        &mut self,
        name: &str,
        op: NodeOp,
        inputs: &[Var],
        outputs: &[(Vec<usize>, DType, Rate)],
    ) -> Vec<Var> {
        let location = self.here();
        let producer = NodeId(self.nodes.len() as u32);
        let poisoned = self.is_poisoned(inputs);
        let mut created = Vec::new();
        for (shape, dtype, rate) in outputs {
            let info = TensorInfo {
                name: format!("{name}.{}", producer.0),
                shape: shape.clone(),
                dtype: *dtype,
                producer,
                rate: *rate,
                layout: None,
                loop_sbp: Some(Sbp::Broadcast),
                saved_shape: None,
                poisoned,
            };
            created.push(self.new_tensor(info, location));
        }
        self.nodes.push(Node {
            name: name.to_string(),
            op,
            inputs: inputs.to_vec(),
            outputs: created.clone(),
            updates: Vec::new(),
            placement: self.current_placement,
            role: self.role,
            rate: self.rate,
            location,
            signature: None,
        });
        created
    }
}

/// Name of the loss, as the host fetches it.
pub const LOSS_OUTPUT: &str = "loss";

/// Name of the metadata entry in a safetensors file. No parameter may have this name.
const FILE_METADATA: &str = "__metadata__";
/// Prefix of the names of the optimizer's state in checkpoints.
pub const STATE_PREFIX: &str = "adamw.";
/// Name of the input `[step, micro-batch]` that dropout reads; the session feeds it.
pub const RNG_INPUT: &str = "rng";
/// Name of the step input `[learning rate, update number from 1]` that the update reads; the session feeds it.
pub const HYPER_INPUT: &str = "hyper";
/// Name of the output with each parameter's sum of squared gradients, in the two columns of [`Op::SumSquares`].
pub const GRAD_SQUARES_OUTPUT: &str = "grad_squares";
