//! The methods by which a user writes a [`Graph`]. None fails: errors are recorded with the caller's line.

use std::panic::Location;
use std::sync::{Arc, OnceLock};

use shardflow_kernels::op::{Einsum, Op};
use shardflow_kernels::tensor::DType;

use super::{
    AdamW, Combine, CustomOp, DIMS_MAX, Graph, GraphError, GraphId, Node, NodeId, NodeOp, Objective, Output, Phase,
    Rate, TensorInfo, Var, foreign, ops,
};
use crate::init::Init;
use crate::layout_error::LayoutError;
use crate::placement::{Mesh, Placement};
use crate::sbp::rule::{Rule, plausible_shapes};
use crate::sbp::{NdSbp, Sbp};

/// A layout in user words: for some mesh axes, what happens to the tensor along them; along all others it is
/// broadcast. `Layout::split("data", 0).and_split("tensor", 2)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout(Vec<(String, Sbp)>);

impl Layout {
    /// The same copy on every device.
    pub fn broadcast() -> Self {
        Self::default()
    }

    /// Split along a dim over a mesh axis, broadcast along the other axes.
    pub fn split(axis: &str, dim: usize) -> Self {
        Self::broadcast().and_split(axis, dim)
    }

    /// Also split along a dim over another mesh axis.
    pub fn and_split(mut self, axis: &str, dim: usize) -> Self {
        self.0.push((axis.to_string(), Sbp::Split(dim)));
        self
    }
}

impl Graph {
    /// An empty program for this mesh. Nodes are placed on the whole mesh until [`Graph::place`] says otherwise.
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
            misread: OnceLock::new(),
            objective: None,
            current: 0,
            phase: Phase::Forward,
            origin: None,
        }
    }

    /// Builds a layer of several nodes: what goes wrong inside is told with `location`, the line of whoever asked for the
    /// layer. The outermost layer's line counts.
    pub fn layer<T>(&mut self, location: &'static Location<'static>, build: impl FnOnce(&mut Self) -> T) -> T {
        let outer = self.origin;
        self.origin = Some(outer.unwrap_or(location));
        let out = build(self);
        self.origin = outer;
        out
    }

    /// Places the nodes that follow, on devices of the graph's own mesh.
    #[track_caller]
    pub fn place(&mut self, placement: Placement) {
        let count = self.mesh.device_count();
        if let Some(device) = placement.devices().iter().find(|device| **device >= count) {
            let message = format!(
                "there is no device {device} in mesh {}, which has {count}; place on a part of the graph's own mesh",
                self.mesh
            );
            return self.error("placement", message, Location::caller());
        }
        self.current = self.placements.iter().position(|p| *p == placement).unwrap_or_else(|| {
            self.placements.push(placement);
            self.placements.len() - 1
        });
    }

    /// Places the nodes that follow on the devices at `index` of the mesh axis `axis`.
    #[track_caller]
    pub fn place_at(&mut self, axis: &str, index: usize) {
        match self.mesh.at(axis, index) {
            Ok(placement) => self.place(placement),
            Err(e) => self.error("placement", e.to_string(), Location::caller()),
        }
    }

    /// A tensor that the host feeds. Its first dim is the batch: a session's `step` takes the whole of it, and
    /// micro-batches are parts of it.
    #[track_caller]
    pub fn input(&mut self, name: &str, shape: &[usize], dtype: DType, layout: Layout) -> Var {
        self.fed(name, shape, dtype, Rate::MicroBatch, (layout, Sbp::Split(0)), Location::caller())
    }

    /// As [`Graph::input`], for a tensor whose batch is another dim than the first: `[time, batch, features]`, say. Inputs
    /// may have batches of different sizes, along different dims.
    #[track_caller]
    pub fn input_with_batch_dim(
        &mut self,
        name: &str,
        shape: &[usize],
        batch_dim: usize,
        dtype: DType,
        layout: Layout,
    ) -> Var {
        let location = Location::caller();
        if batch_dim >= shape.len() {
            let message = format!("the batch is dim {batch_dim}, but the shape {shape:?} has {} dims", shape.len());
            self.error(name, message, location);
            return self.poison(shape);
        }
        self.fed(name, shape, dtype, Rate::MicroBatch, (layout, Sbp::Split(batch_dim)), location)
    }

    /// A tensor that the host feeds once a step, without micro-batches.
    #[track_caller]
    pub fn step_input(&mut self, name: &str, shape: &[usize], dtype: DType) -> Var {
        self.fed(name, shape, dtype, Rate::Step, (Layout::broadcast(), Sbp::Broadcast), Location::caller())
    }

    /// A trained tensor. Names are unique; they are those of the checkpoint.
    #[track_caller]
    pub fn parameter(&mut self, name: &str, shape: &[usize], init: Init, layout: Layout) -> Var {
        let location = Location::caller();
        self.check_shape(name, shape, location);
        if let Init::Normal { std } = init
            && !(std >= 0.0 && std.is_finite())
        {
            let message = format!("the standard deviation is {std}: it must be finite and not negative");
            self.error(name, message, location);
        }
        let duplicate = |n: &Node| matches!(n.op, NodeOp::Parameter { .. }) && n.name == name;
        if self.nodes.iter().any(duplicate) {
            let message = "a parameter of this name is there already; give each its own name".to_string();
            self.error(name, message, location);
        }
        if name.starts_with(STATE_PREFIX) {
            let message = format!("names that begin with `{STATE_PREFIX}` are the optimizer's; choose another");
            self.error(name, message, location);
        }
        if name == FILE_METADATA {
            self.error(name, "files use this name for their metadata; choose another".to_string(), location);
        }
        self.source(name, NodeOp::Parameter { init }, shape, DType::F32, Rate::Step, layout, location)
    }

    /// Saves a parameter under another shape of as many elements: `[heads * head_dim, width]`, say, for a tensor that the
    /// program sees as `[heads, head_dim, width]`.
    #[track_caller]
    pub fn saved_as(&mut self, parameter: Var, shape: &[usize]) {
        let [parameter] = self.own("saved_as", [parameter], Location::caller());
        let own = self.shape(parameter).to_vec();
        let count = |shape: &[usize]| shape.iter().try_fold(1usize, |count, extent| count.checked_mul(*extent));
        if count(&own) != count(shape) && !self.is_poisoned(&[parameter]) {
            let message = format!("shape {own:?} cannot be saved as {shape:?}: the numbers of elements differ");
            self.error("saved_as", message, Location::caller());
        }
        if !matches!(self.producer(parameter).op, NodeOp::Parameter { .. }) && !self.is_poisoned(&[parameter]) {
            let message = format!("{} is not a parameter, so it is not saved", self.tensor(parameter).name);
            self.error("saved_as", message, Location::caller());
        }
        self.tensors[parameter.index()].saved_shape = Some(shape.to_vec());
    }

    /// Rows of `table [v, c]` by `ids [..]`: `[.., c]`.
    #[track_caller]
    pub fn embedding(&mut self, ids: Var, table: Var) -> Var {
        let location = Location::caller();
        let [ids, table] = self.own("embedding", [ids, table], location);
        let vocab = self.shape(table).first().copied().unwrap_or(0);
        self.kernel("embedding", Op::Embedding { vocab_start: 0, vocab }, &[ids, table], location)[0]
    }

    /// `a + b`, b's shape being a suffix of a's.
    #[track_caller]
    pub fn add(&mut self, a: Var, b: Var) -> Var {
        let location = Location::caller();
        let [a, b] = self.own("add", [a, b], location);
        let (shape_a, shape_b) = (self.shape(a).to_vec(), self.shape(b).to_vec());
        if !shape_a.ends_with(&shape_b) && !self.is_poisoned(&[a, b]) {
            let message =
                format!("cannot add {shape_b:?} to {shape_a:?}: the second shape must be a suffix of the first");
            self.error("add", message, location);
            return self.poison(&shape_a);
        }
        self.kernel("add", Op::Add, &[a, b], location)[0]
    }

    /// A product over named indices, such as `"btc,hdc->bthd"`; see [`Einsum`] for what is allowed.
    #[track_caller]
    pub fn einsum(&mut self, spec: &str, a: Var, b: Var) -> Var {
        let location = Location::caller();
        let [a, b] = self.own("einsum", [a, b], location);
        match Einsum::parse(spec) {
            Ok(e) => self.kernel("einsum", Op::Einsum(e), &[a, b], location)[0],
            Err(e) => {
                let text = e.to_string();
                self.error("einsum", text.strip_prefix("einsum: ").unwrap_or(&text).to_string(), location);
                let shapes = plausible_shapes(spec, &[self.shape(a), self.shape(b)]);
                self.poison(&shapes[0])
            }
        }
    }

    /// Layer norm over the last dim, with a weight and no bias.
    #[track_caller]
    pub fn layer_norm(&mut self, x: Var, weight: Var, eps: f32) -> Var {
        let location = Location::caller();
        if !(eps >= 0.0 && eps.is_finite()) {
            self.error("layer_norm", format!("eps is {eps}: it must be finite and not negative"), location);
        }
        let args = self.own("layer_norm", [x, weight], location);
        self.kernel("layer_norm", Op::LayerNorm { eps }, &args, location)[0]
    }

    /// Exact (erf) GELU.
    #[track_caller]
    pub fn gelu(&mut self, x: Var) -> Var {
        let args = self.own("gelu", [x], Location::caller());
        self.kernel("gelu", Op::Gelu, &args, Location::caller())[0]
    }

    /// `factor * x`.
    #[track_caller]
    pub fn scale(&mut self, x: Var, factor: f32) -> Var {
        let location = Location::caller();
        if !factor.is_finite() {
            self.error("scale", format!("the factor is {factor}: it must be finite"), location);
        }
        let args = self.own("scale", [x], location);
        self.kernel("scale", Op::Scale { factor }, &args, location)[0]
    }

    /// Causal attention of `[batch, time, head, dim]` tensors, scores scaled by `1/sqrt(dim)`.
    #[track_caller]
    pub fn attention(&mut self, q: Var, k: Var, v: Var) -> Var {
        let location = Location::caller();
        let args = self.own("attention", [q, k, v], location);
        let scale = 1.0 / (*self.shape(args[0]).last().unwrap_or(&1) as f32).sqrt();
        self.kernel("attention", Op::Attention { scale }, &args, location)[0]
    }

    /// Zeroes elements with probability `p` and scales the others up, in training; in evaluation the identity, see
    /// [`Mode`](crate::passes::mode::Mode). Which elements is a function of the session's seed, the step, `seed` and the
    /// element's place in the step's whole tensor, whatever the layout, the batch's dim and the number of micro-batches.
    /// `seed` must differ for each dropout of a model.
    #[track_caller]
    pub fn dropout(&mut self, x: Var, p: f32, seed: u64) -> Var {
        let location = Location::caller();
        if !(0.0..1.0).contains(&p) {
            self.error("dropout", format!("p is {p}: it must be at least 0 and below 1"), location);
        }
        let [x] = self.own("dropout", [x], location);
        let rng = self.rng(location);
        let op = Op::Dropout { p, seed, shape: Vec::new(), start: Vec::new(), stride: 0 };
        self.kernel("dropout", op, &[x, rng], location)[0]
    }

    /// Mean over all tokens of a step of the cross-entropy between `logits [.., v]` and `targets [..]` (i32): `[]`.
    /// The vocabulary may be split.
    #[track_caller]
    pub fn cross_entropy(&mut self, logits: Var, targets: Var) -> Var {
        let location = Location::caller();
        let [logits, targets] = self.own("cross_entropy", [logits, targets], location);
        // A product past the end is refused at `compile`.
        let tokens = self.shape(targets).iter().fold(1usize, |n, extent| n.saturating_mul(*extent));
        let scale = 1.0 / tokens.max(1) as f32;
        let max = self.kernel("row_max", Op::RowMax, &[logits], location)[0];
        let vocab = self.shape(logits).last().copied().unwrap_or(0);
        let op = Op::SumExpTarget { vocab_start: 0, vocab };
        let stats = self.kernel("sum_exp", op, &[logits, max, targets], location);
        self.kernel("loss", Op::TokenLoss { scale }, &[max, stats[0], stats[1]], location)[0]
    }

    /// Changes the layout; the value stays.
    #[track_caller]
    pub fn relayout(&mut self, x: Var, layout: Layout) -> Var {
        let location = Location::caller();
        let [x] = self.own("relayout", [x], location);
        let (shape, dtype, rate) = (self.shape(x).to_vec(), self.tensor(x).dtype, self.tensor(x).rate);
        let out = self.push("relayout", NodeOp::Relayout, &[x], &[(shape, dtype, rate)], location)[0];
        self.tensors[out.index()].layout = self.resolve("relayout", &layout, out, location);
        out
    }

    /// An op from outside.
    #[track_caller]
    pub fn custom(&mut self, op: Arc<dyn CustomOp>, inputs: &[Var]) -> Vec<Var> {
        let (rule, location) = (op.rule(), Location::caller());
        let name = op.name().to_string();
        let inputs: Vec<Var> = inputs
            .iter()
            .enumerate()
            .map(|(port, input)| self.own_one(&name, &format!("input {port}"), *input, location))
            .collect();
        if let Some(port) = inputs.iter().position(|input| self.tensor(*input).dtype == DType::BF16) {
            let message = format!("input {port} is BF16, but custom ops read F32 or I32; feed it as F32");
            self.error(&name, message, location);
        }
        self.node_by_rule(&name, NodeOp::Custom(op), rule, &inputs, None, location)
    }

    /// Trains every parameter that `loss`, a scalar, depends on to make it small. There must be one.
    #[track_caller]
    pub fn minimize(&mut self, loss: Var, optimizer: AdamW) {
        let location = Location::caller();
        if self.objective.is_some() {
            let message = "the program minimises a loss already; add the losses and minimise their sum".to_string();
            return self.error("minimize", message, location);
        }
        if let Some(message) = optimizer.wrong() {
            self.error("minimize", message, location);
        }
        let [loss] = self.own("minimize", [loss], location);
        if !self.shape(loss).is_empty() && !self.is_poisoned(&[loss]) {
            let message = format!("the loss has shape {:?}: only a scalar can be minimised", self.shape(loss));
            self.error("minimize", message, location);
        }
        self.objective = Some(Objective { loss, optimizer, location: self.origin.unwrap_or(location) });
        self.output_as("loss", loss, None, location);
    }

    /// Lets the host fetch a tensor by this name after each step: its value for the whole batch, for any number of
    /// micro-batches. The ops' rules decide how the values of micro-batches are combined: parts of the batch are concatenated,
    /// sums and means over the batch are added, and a value that does not depend on the batch is taken once. Where the rules do
    /// not determine it, as for a nonlinear function of a sum over the batch, `compile` asks for [`Graph::output_with`]. Names
    /// are unique; `minimize` gives the loss the name `loss`.
    #[track_caller]
    pub fn output(&mut self, name: &str, tensor: Var) {
        self.output_as(name, tensor, None, Location::caller());
    }

    /// As [`Graph::output`], and states how the values of micro-batches are combined.
    #[track_caller]
    pub fn output_with(&mut self, name: &str, tensor: Var, combine: Combine) {
        self.output_as(name, tensor, Some(combine), Location::caller());
    }

    fn output_as(&mut self, name: &str, tensor: Var, combine: Option<Combine>, location: &'static Location<'static>) {
        let [tensor] = self.own("output", [tensor], location);
        let (shape, dtype) = (self.shape(tensor), self.tensor(tensor).dtype);
        let message = match combine {
            Some(Combine::Concat(dim)) if dim >= shape.len() => {
                Some(format!("`Combine::Concat({dim})`, but the shape {shape:?} has {} dims", shape.len()))
            }
            Some(how @ (Combine::Sum | Combine::Max)) if dtype != DType::F32 => {
                Some(format!("`Combine::{how:?}` combines F32, got {dtype:?}"))
            }
            _ => None,
        };
        if let Some(message) = message.filter(|_| !self.is_poisoned(&[tensor])) {
            self.error(name, message, location);
        }
        if self.outputs.iter().any(|other| other.name == name && other.tensor != tensor) {
            let message = "another output has this name already; give each its own name".to_string();
            return self.error(name, message, location);
        }
        if name == GRAD_SQUARES_OUTPUT {
            self.error(name, "the session makes an output of this name itself; choose another".to_string(), location);
        }
        self.fetched(name, tensor, combine, location);
    }

    // ---- what the methods above and the passes share ----

    pub(crate) fn fetched(
        &mut self,
        name: &str,
        tensor: Var,
        combine: Option<Combine>,
        location: &'static Location<'static>,
    ) {
        let location = self.origin.unwrap_or(location);
        self.outputs.push(Output { name: name.to_string(), tensor, combine, location });
    }

    /// Adds a user's input. Several inputs of one name are one tensor of the host, fed to several placements; so they must be
    /// equal.
    fn fed(
        &mut self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        rate: Rate,
        (layout, loop_sbp): (Layout, Sbp),
        location: &'static Location<'static>,
    ) -> Var {
        self.check_shape(name, shape, location);
        if name == RNG_INPUT || name == HYPER_INPUT {
            self.error(name, "the session feeds an input of this name itself; choose another".to_string(), location);
        }
        let others = self.nodes.iter().filter(|n| matches!(n.op, NodeOp::Input) && n.name == name);
        let unlike = others.map(|n| self.tensor(n.outputs[0])).find(|other| {
            (&other.shape[..], other.dtype, other.rate, other.loop_sbp) != (shape, dtype, rate, Some(loop_sbp))
        });
        if let Some(other) = unlike {
            let batch = |sbp: Option<Sbp>| match sbp {
                Some(Sbp::Split(dim)) => format!("with the batch as dim {dim}"),
                _ => "once a step".to_string(),
            };
            let message = format!(
                "an input of this name is {:?} {:?} {}, this one {dtype:?} {shape:?} {}; inputs of one name are one tensor of the host",
                other.dtype,
                other.shape,
                batch(other.loop_sbp),
                batch(Some(loop_sbp))
            );
            self.error(name, message, location);
        }
        let out = self.source(name, NodeOp::Input, shape, dtype, rate, layout, location);
        self.tensors[out.index()].loop_sbp = Some(loop_sbp);
        out
    }

    pub(crate) fn error(&mut self, what: &str, message: String, location: &'static Location<'static>) {
        let location = self.origin.unwrap_or(location);
        self.errors.push(GraphError { what: what.to_string(), message, location });
    }

    pub(crate) fn is_poisoned(&self, vars: &[Var]) -> bool {
        vars.iter().any(|v| self.tensor(*v).poisoned)
    }

    /// An op's arguments. One of another graph is an error, and replaced by a tensor with as many dims.
    fn own<const N: usize>(&mut self, what: &str, args: [Var; N], location: &'static Location<'static>) -> [Var; N] {
        std::array::from_fn(|port| self.own_one(what, &format!("input {port}"), args[port], location))
    }

    pub(crate) fn own_one(&mut self, what: &str, which: &str, arg: Var, location: &'static Location<'static>) -> Var {
        if self.owns(arg) {
            return arg;
        }
        self.error(what, foreign(which, arg), location);
        self.poison(&vec![1; arg.dims.into()])
    }

    fn poison(&mut self, shape: &[usize]) -> Var {
        let node = NodeOp::Kernel(Op::Fill { value: f32::NAN });
        let out = self.push("error", node, &[], &[(shape.to_vec(), DType::F32, Rate::MicroBatch)], Location::caller());
        self.tensors[out[0].index()].poisoned = true;
        out[0]
    }

    /// Tensors without elements have no use, and each dim needs a letter in the rules of ops.
    fn check_shape(&mut self, name: &str, shape: &[usize], location: &'static Location<'static>) {
        if let Some(dim) = shape.iter().position(|extent| *extent == 0) {
            let message = format!("dim {dim} of the shape {shape:?} is 0; give each dim at least one element");
            self.error(name, message, location);
        }
        if shape.len() > DIMS_MAX {
            let message = format!("the shape {shape:?} has {} dims; the most is {DIMS_MAX}", shape.len());
            self.error(name, message, location);
        }
    }

    /// The `[step, micro-batch]` input of dropout on the current placement.
    fn rng(&mut self, location: &'static Location<'static>) -> Var {
        let here = self.current;
        let found = self.nodes.iter().find(|n| n.name == RNG_INPUT && n.placement == here).map(|n| n.outputs[0]);
        found.unwrap_or_else(|| {
            let layout = Layout::broadcast();
            self.source(RNG_INPUT, NodeOp::Input, &[2], DType::I32, Rate::MicroBatch, layout, location)
        })
    }

    #[allow(clippy::too_many_arguments)]
    pub(crate) fn source(
        &mut self,
        name: &str,
        op: NodeOp,
        shape: &[usize],
        dtype: DType,
        rate: Rate,
        layout: Layout,
        location: &'static Location<'static>,
    ) -> Var {
        let out = self.push(name, op, &[], &[(shape.to_vec(), dtype, rate)], location)[0];
        self.tensors[out.index()].name = name.to_string();
        self.tensors[out.index()].layout = self.resolve(name, &layout, out, location);
        out
    }

    /// The layout on the tensor's placement; axes of one device count as broadcast.
    fn resolve(
        &mut self,
        what: &str,
        layout: &Layout,
        var: Var,
        location: &'static Location<'static>,
    ) -> Option<NdSbp> {
        let placement = self.placements[self.placement_of(var)].clone();
        let rank = self.shape(var).len();
        let mut out = vec![Sbp::Broadcast; placement.axes().len()];
        for (axis, sbp) in &layout.0 {
            let Some(position) = placement.axes().iter().position(|a| a.name == *axis) else {
                let known: Vec<&str> = placement.axes().iter().map(|a| a.name.as_str()).collect();
                let message = format!("layout names the mesh axis `{axis}`, but the placement has {known:?}");
                self.error(what, message, location);
                return None;
            };
            if layout.0.iter().filter(|(other, _)| other == axis).count() > 1 {
                self.error(what, format!("layout names the mesh axis `{axis}` twice"), location);
                return None;
            }
            if let Sbp::Split(dim) = sbp
                && *dim >= rank
            {
                let message = format!(
                    "layout splits dim {dim} over `{axis}`, but the shape {:?} has {rank} dims",
                    self.shape(var)
                );
                self.error(what, message, location);
                return None;
            }
            if placement.axes()[position].size > 1 {
                out[position] = *sbp;
            }
        }
        Some(NdSbp(out))
    }

    /// Adds a kernel node, shapes by its rule.
    pub(crate) fn kernel(
        &mut self,
        name: &str,
        op: Op,
        inputs: &[Var],
        location: &'static Location<'static>,
    ) -> Vec<Var> {
        let shapes: Vec<Vec<usize>> = inputs.iter().map(|v| self.shape(*v).to_vec()).collect();
        let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
        let rule = ops::rule(&op, &shapes);
        self.node_by_rule(name, NodeOp::Kernel(op), rule, inputs, None, location)
    }

    /// Adds a node whose output shapes are given (by `shapes`) or follow from the rule.
    pub(crate) fn node_by_rule(
        &mut self,
        name: &str,
        op: NodeOp,
        rule: Result<Rule, LayoutError>,
        inputs: &[Var],
        shapes: Option<Vec<Vec<usize>>>,
        location: &'static Location<'static>,
    ) -> Vec<Var> {
        let rate = inputs.iter().map(|v| self.tensor(*v)).filter(|t| t.rate == Rate::MicroBatch).count();
        let rate = if rate > 0 || self.phase.rate() == Rate::MicroBatch { Rate::MicroBatch } else { Rate::Step };
        let text = match &rule {
            Ok(rule) => rule.to_string(),
            Err(LayoutError::Rule { text, .. }) => text.clone(),
            Err(_) => String::new(),
        };
        let given: Vec<Vec<usize>> = inputs.iter().map(|v| self.shape(*v).to_vec()).collect();
        let given: Vec<&[usize]> = given.iter().map(Vec::as_slice).collect();
        let inferred = rule.and_then(|rule| shapes.map_or_else(|| rule.infer_shapes(&given), Ok));
        let inferred = match inferred {
            Ok(shapes) if shapes.iter().any(|shape| shape.len() > DIMS_MAX) => {
                Err(format!("the result has more than {DIMS_MAX} dims"))
            }
            other => other.map_err(|e| e.to_string()),
        };
        if let (NodeOp::Kernel(op), Ok(_)) = (&op, &inferred)
            && let Some(message) = self.wrong_dtype(op, inputs)
            && !self.is_poisoned(inputs)
        {
            self.error(name, message, location);
        }
        match inferred {
            Ok(shapes) => {
                let dtypes: Vec<DType> = inputs.iter().map(|v| self.tensor(*v).dtype).collect();
                let dtypes = match &op {
                    NodeOp::Kernel(op) => ops::output_dtypes(op, &dtypes, shapes.len()),
                    _ => vec![DType::F32; shapes.len()],
                };
                let facts: Vec<_> = shapes.into_iter().zip(dtypes).map(|(s, d)| (s, d, rate)).collect();
                self.push(name, op, inputs, &facts, location)
            }
            Err(e) => {
                let shapes = plausible_shapes(&text, &given);
                if !self.is_poisoned(inputs) {
                    let shapes: Vec<String> = given.iter().map(|shape| format!("{shape:?}")).collect();
                    self.error(name, format!("{e}; the inputs have shapes {}", shapes.join(", ")), location);
                }
                shapes.iter().map(|shape| self.poison(shape)).collect()
            }
        }
    }

    fn wrong_dtype(&self, op: &Op, inputs: &[Var]) -> Option<String> {
        inputs.iter().enumerate().find_map(|(port, input)| {
            let (want, got) = (ops::input_dtype(op, port)?, self.tensor(*input).dtype);
            let name = &self.tensor(*input).name;
            (want != got).then(|| format!("input {port} ({name}) is {got:?}, but must be {want:?}"))
        })
    }

    /// Adds a node at the end, on the current placement and in the current phase.
    pub(crate) fn push(
        &mut self,
        name: &str,
        op: NodeOp,
        inputs: &[Var],
        outputs: &[(Vec<usize>, DType, Rate)],
        location: &'static Location<'static>,
    ) -> Vec<Var> {
        let location = self.origin.unwrap_or(location);
        let producer = NodeId(self.nodes.len() as u32);
        let poisoned = self.is_poisoned(inputs);
        let mut made = Vec::new();
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
            made.push(self.new_tensor(info, location));
        }
        self.nodes.push(Node {
            name: name.to_string(),
            op,
            inputs: inputs.to_vec(),
            outputs: made.clone(),
            updates: Vec::new(),
            placement: self.current,
            phase: self.phase,
            location,
            signature: None,
        });
        made
    }
}

/// The entry of a safetensors file that is no tensor.
const FILE_METADATA: &str = "__metadata__";
/// How the names of the optimizer's state begin, in checkpoints.
pub const STATE_PREFIX: &str = "adamw.";
/// Name of the input that dropout reads: `[step, micro-batch]`; the session feeds it.
pub const RNG_INPUT: &str = "rng";
/// Name of the step input `[learning rate, update counted from 1]` that the update reads; the session feeds it.
pub const HYPER_INPUT: &str = "hyper";
/// Name of the output that holds each parameter's sum of squared gradients, in the two columns of [`Op::SumSquares`].
pub const GRAD_SQUARES_OUTPUT: &str = "grad_squares";
