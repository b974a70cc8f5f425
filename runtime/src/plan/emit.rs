//! Emits the launches of one action on one device, with buffers in register ports, fixed memory or scratch.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shardflow_kernels::collective::{CollectiveCall, CollectiveKind, Group, ReduceOp};
use shardflow_kernels::device::DeviceKind;
use shardflow_kernels::op::{Buffer, Launch, Op};
use shardflow_kernels::tensor::{DType, element_count};

use crate::boxing::step::{BoxingStep, LocalStep};
use crate::graph::{Graph, Node, NodeId, NodeOp, Var, ops};
use crate::plan::assign::{Assignment, DeviceAction, Storage};
use crate::plan::memory::{ArenaMap, Interval, local_part, local_shape, pack};
use crate::plan::{ActionKey, ActionPlan, BaseKey, HostPort};
use crate::sbp::Sbp;

/// The input of [`emit`] that all actions share.
pub struct EmitContext<'a> {
    pub graph: &'a Graph,
    pub assignment: &'a Assignment,
    /// The memory map, except scratch.
    pub arenas: &'a ArenaMap,
    /// Accumulations fused into the producing kernel: value to sum.
    pub fused: &'a BTreeMap<Var, Var>,
    pub device: DeviceKind,
}

/// An action's launches, registers, scratch and groups.
pub struct EmittedAction {
    pub plan: ActionPlan,
    /// Registers read, in port order.
    pub inputs: Vec<usize>,
    /// Registers written, in port order.
    pub outputs: Vec<usize>,
    pub scratch_bytes: usize,
    /// The ranks of each group whose collectives it calls.
    pub groups: BTreeSet<Vec<usize>>,
}

/// Finds accumulations whose value comes from a kernel that can add to its output and has no other reader.
pub fn fuse_accumulation(graph: &Graph) -> BTreeMap<Var, Var> {
    let mut readers: BTreeMap<Var, usize> = BTreeMap::new();
    for var in graph.nodes.iter().flat_map(|n| &n.inputs).chain(graph.outputs.iter().map(|o| &o.tensor)) {
        *readers.entry(*var).or_default() += 1;
    }
    let mut fused = BTreeMap::new();
    for node in graph.nodes.iter().filter(|n| matches!(n.op, NodeOp::Accumulate)) {
        let (value, producer) = (node.inputs[0], graph.producer(node.inputs[0]));
        let NodeOp::Kernel(op) = &producer.op else { continue };
        let can_add = op.can_accumulate().is_some_and(|w| producer.outputs.get(w) == Some(&value));
        let same_action = (producer.phase, producer.placement) == (node.phase, node.placement);
        let already_fused = producer.outputs.iter().any(|o| fused.contains_key(o));
        if can_add && same_action && readers[&value] == 1 && !already_fused {
            fused.insert(value, node.outputs[0]);
        }
    }
    fused
}

pub fn emit(
    context: &EmitContext<'_>,
    site: DeviceAction,
    nodes: &[NodeId],
    group_ids: &mut dyn FnMut(&[usize]) -> Arc<Group>,
) -> EmittedAction {
    let registers = &context.assignment.registers;
    let inputs: Vec<usize> = (0..registers.len()).filter(|r| registers[*r].readers.contains(&site)).collect();
    let outputs: Vec<usize> = (0..registers.len()).filter(|r| registers[*r].producer == site).collect();
    let mut bases = vec![BaseKey::Fixed, BaseKey::Scratch];
    bases.extend((0..inputs.len()).map(BaseKey::Input));
    bases.extend((0..outputs.len()).map(BaseKey::Output));
    let mut emitter = Emitter {
        context,
        site,
        inputs: &inputs,
        outputs: &outputs,
        launches: Vec::new(),
        nodes: Vec::new(),
        current: NodeId(0),
        scratch: Vec::new(),
        scratch_of: BTreeMap::new(),
        written: BTreeMap::new(),
        groups: BTreeSet::new(),
        norm_total: None,
        group_ids,
    };
    let mut host = None;
    match site.1 {
        ActionKey::Feed(_) | ActionKey::Decide => {
            let vars: Vec<Var> = nodes.iter().map(|n| context.graph.nodes[n.index()].outputs[0]).collect();
            host = Some(emitter.host_port(vars));
        }
        ActionKey::Fetch(rate) => {
            let graph = context.graph;
            let is_local = |var: &Var| graph.placements[graph.placement_of(*var)].index_of(site.0).is_some();
            let fetched =
                graph.outputs.iter().map(|o| o.tensor).filter(|v| graph.tensor(*v).rate == rate && is_local(v));
            host = Some(emitter.host_port(fetched.collect()));
        }
        _ => nodes.iter().for_each(|id| {
            emitter.current = *id;
            emitter.emit_node(&context.graph.nodes[id.index()]);
        }),
    }
    let scratch_bytes = emitter.place_scratch(host.as_mut());
    let signals = emitter.signals();
    let (launches, nodes, groups) = (emitter.launches, emitter.nodes, emitter.groups);
    let name = action_name(context.graph, site.1);
    let plan = ActionPlan { key: site.1, name, launches, nodes, signals, bases, host };
    EmittedAction { plan, inputs, outputs, scratch_bytes, groups }
}

pub fn action_name(graph: &Graph, key: ActionKey) -> String {
    match key {
        ActionKey::Feed(rate) => format!("feed ({rate})"),
        ActionKey::Fetch(rate) => format!("fetch ({rate})"),
        ActionKey::Forward => "forward".into(),
        ActionKey::Backward => "backward".into(),
        ActionKey::Norm => "norm".into(),
        ActionKey::Decide => "decide".into(),
        ActionKey::Update => "update".into(),
        ActionKey::Pull(id) => {
            let node = &graph.nodes[id.index()];
            format!("pull {}", graph.tensor(node.inputs[0]).name)
        }
        ActionKey::Bucket(id) => format!("all-reduce {}", graph.nodes[id.index()].name),
    }
}

/// Index of [`BaseKey::Scratch`] in an action's bases.
const SCRATCH: usize = 1;

struct Emitter<'a> {
    context: &'a EmitContext<'a>,
    site: DeviceAction,
    inputs: &'a [usize],
    outputs: &'a [usize],
    launches: Vec<Launch>,
    nodes: Vec<NodeId>,
    current: NodeId,
    /// Lifetimes of scratch buffers. Until [`Emitter::place_scratch`], a scratch buffer's offset is its index here.
    scratch: Vec<Interval>,
    scratch_of: BTreeMap<Var, usize>,
    /// By output port: the number of launches after which it is complete.
    written: BTreeMap<usize, usize>,
    groups: BTreeSet<Vec<usize>>,
    /// The buffer of the squared gradient norms summed over all devices, once it is computed.
    norm_total: Option<Buffer>,
    group_ids: &'a mut dyn FnMut(&[usize]) -> Arc<Group>,
}

impl Emitter<'_> {
    fn buffer(&mut self, var: Var) -> Buffer {
        self.buffer_on(var, self.site.0)
    }

    /// The buffer of a tensor's part on `device`; only pulls use another device's.
    fn buffer_on(&mut self, var: Var, device: usize) -> Buffer {
        let context = self.context;
        let var = context.assignment.resolve_alias(var);
        let var = context.fused.get(&var).copied().unwrap_or(var);
        let shape = local_shape(context.graph, var, device);
        let dtype = context.graph.tensor(var).dtype;
        let storage = context.assignment.storage.get(&(device, var)).copied().unwrap_or(Storage::Scratch);
        let (base, offset) = match storage {
            Storage::Fixed => (0, context.arenas.fixed[&(device, var)]),
            Storage::Register(register) => (self.port_base(register), context.arenas.slot_offsets[register][&var]),
            Storage::Scratch => (SCRATCH, self.scratch_index(var, element_count(&shape) * dtype.bytes())),
        };
        Buffer { base, offset, shape, dtype }
    }

    /// Index of the base for a register's slot: the output port, if the action both reads and writes the register.
    fn port_base(&self, register: usize) -> usize {
        let port_of = |ports: &[usize]| ports.iter().position(|r| *r == register);
        let output = port_of(self.outputs).map(|port| self.inputs.len() + port);
        2 + output.or(port_of(self.inputs)).expect("an action has a port for every register that it uses")
    }

    fn scratch_index(&mut self, var: Var, bytes: usize) -> usize {
        if let Some(index) = self.scratch_of.get(&var) {
            return *index;
        }
        let index = self.new_scratch(bytes);
        self.scratch_of.insert(var, index);
        index
    }

    fn new_scratch(&mut self, bytes: usize) -> usize {
        let now = self.launches.len();
        self.scratch.push(Interval { bytes, first: now, last: now });
        self.scratch.len() - 1
    }

    fn scratch_buffer(&mut self, shape: &[usize]) -> Buffer {
        let offset = self.new_scratch(element_count(shape) * DType::F32.bytes());
        Buffer { base: SCRATCH, offset, shape: shape.to_vec(), dtype: DType::F32 }
    }

    fn launch(&mut self, op: Op, reads: Vec<Buffer>, writes: Vec<Buffer>, accumulate: bool) {
        // A kernel with empty outputs is skipped, but every member must call a collective.
        let no_output = writes.iter().all(|w| element_count(&w.shape) == 0);
        if no_output && !matches!(op, Op::Collective(_)) {
            return;
        }
        let mut launch = Launch { op, reads, writes, accumulate, workspace: None };
        let bytes = self.context.device.workspace_bytes(&launch);
        launch.workspace = (bytes > 0).then(|| self.scratch_buffer(&[bytes.div_ceil(4)]));
        let Launch { reads, writes, workspace, .. } = &launch;
        let index = self.launches.len();
        for buffer in reads.iter().chain(writes).chain(workspace) {
            if buffer.base == SCRATCH {
                self.scratch[buffer.offset].last = index;
            }
        }
        for write in writes {
            if let Some(port) = write.base.checked_sub(2 + self.inputs.len()) {
                self.written.insert(port, index + 1);
            }
        }
        self.nodes.push(self.current);
        self.launches.push(launch);
    }

    fn emit_node(&mut self, node: &Node) {
        let (graph, device) = (self.context.graph, self.site.0);
        let parts = || {
            [&node.inputs, &node.outputs]
                .map(|vars| vars.iter().map(|var| local_part(graph, *var, device)).collect::<Vec<_>>())
        };
        match &node.op {
            NodeOp::Kernel(op) => {
                let accumulate = node.outputs.iter().any(|o| self.context.fused.contains_key(o));
                let [ins, outs] = parts();
                self.launch_node(node, ops::localize(op, &ins, &outs), accumulate);
            }
            NodeOp::Custom(op) => {
                let [ins, outs] = parts();
                self.launch_node(node, Op::Custom(op.kernel(&ins, &outs)), false);
            }
            NodeOp::Accumulate if self.context.fused.contains_key(&node.inputs[0]) => {}
            NodeOp::Accumulate => {
                let (read, write) = (self.buffer(node.inputs[0]), self.buffer(node.outputs[0]));
                self.launch(Op::Copy, vec![read], vec![write], true);
            }
            NodeOp::Boxing(step) => self.emit_boxing(node, step),
            NodeOp::Bucket { axes } => self.emit_bucket(node, axes),
            NodeOp::NormSums { indices } => self.emit_norm_sums(node, indices),
            NodeOp::ClipScale { max_norm } => self.emit_clip_scale(node, *max_norm),
            NodeOp::Relayout | NodeOp::Input | NodeOp::Parameter { .. } | NodeOp::State | NodeOp::Bf16Copy { .. } => {}
        }
    }

    fn launch_node(&mut self, node: &Node, op: Op, accumulate: bool) {
        let reads = node.inputs.iter().map(|v| self.buffer(*v)).collect();
        let writes = node.outputs.iter().chain(&node.updates).map(|v| self.buffer(*v)).collect();
        self.launch(op, reads, writes, accumulate);
    }

    fn collective(&mut self, ranks: &[usize], kind: CollectiveKind, reads: Vec<Buffer>, writes: Vec<Buffer>) {
        let group = (self.group_ids)(ranks);
        let member =
            ranks.iter().position(|r| *r == self.site.0).expect("a device calls only collectives of its own groups");
        self.groups.insert(ranks.to_vec());
        self.launch(Op::Collective(CollectiveCall { group, member, kind }), reads, writes, false);
    }

    fn emit_boxing(&mut self, node: &Node, step: &BoxingStep) {
        let placement = &self.context.graph.placements[node.placement];
        let Some(position) = placement.index_of(self.site.0) else { return };
        match step.local(position) {
            LocalStep::Keep => {
                // If other devices change their part, the output has its own buffer on this device too.
                if self.context.assignment.resolve_alias(node.outputs[0]) == node.outputs[0] {
                    let (read, write) = (self.buffer(node.inputs[0]), self.buffer(node.outputs[0]));
                    self.launch(Op::Copy, vec![read], vec![write], false);
                }
            }
            LocalStep::Call(call) => {
                let (read, write) = (self.buffer(node.inputs[0]), self.buffer(node.outputs[0]));
                self.collective(&call.ranks, call.kind, vec![read], vec![write]);
            }
            LocalStep::Local { fill, copy } => {
                let (read, write) = (self.buffer(node.inputs[0]), self.buffer(node.outputs[0]));
                if let Some(value) = fill {
                    self.launch(Op::Fill { value }, vec![], vec![write.clone()], false);
                }
                if let Some((src, dst)) = copy {
                    self.launch(Op::CopyRegion { src, dst }, vec![read], vec![write], false);
                }
            }
            LocalStep::Pull(pulls) => {
                let write = self.buffer(node.outputs[0]);
                for pull in pulls {
                    let read = self.buffer_on(node.inputs[0], pull.from_device);
                    let op = Op::CopyRegion { src: pull.src, dst: pull.dst };
                    self.launch(op, vec![read], vec![write.clone()], false);
                }
            }
        }
    }

    /// The gradients of a bucket are contiguous in one slot: a single in-place all-reduce of the whole slot.
    fn emit_bucket(&mut self, node: &Node, axes: &[usize]) {
        let graph = self.context.graph;
        let placement = &graph.placements[node.placement];
        let mut groups = placement.groups(axes).into_iter();
        let ranks = groups.find(|group| group.contains(&self.site.0)).expect("every device is in a group");
        let assignment = self.context.assignment;
        let first = (self.site.0, assignment.resolve_alias(node.inputs[0]));
        let Storage::Register(register) = assignment.storage[&first] else { return };
        let (base, bytes) = (self.port_base(register), self.context.arenas.registers[register].stride);
        let slot = Buffer { base, offset: 0, shape: vec![bytes / 4], dtype: DType::F32 };
        self.collective(&ranks, CollectiveKind::AllReduce { op: ReduceOp::Sum }, vec![slot.clone()], vec![slot]);
    }

    /// Sums the squares of the gradient parts of which this device holds the first copy, so each part counts once.
    fn emit_norm_sums(&mut self, node: &Node, indices: &[usize]) {
        let graph = self.context.graph;
        let sums = self.buffer(node.outputs[0]);
        self.launch(Op::Fill { value: 0.0 }, vec![], vec![sums.clone()], false);
        let placement = &graph.placements[node.placement];
        let Some(position) = placement.index_of(self.site.0) else { return };
        let coords = placement.coords(position);
        for (grad, index) in node.inputs.iter().zip(indices) {
            let owner = graph.layout(*grad).0.iter().zip(&coords).all(|(sbp, at)| *sbp != Sbp::Broadcast || *at == 0);
            if owner {
                let read = self.buffer(*grad);
                self.launch(Op::SumSquares { index: *index }, vec![read], vec![sums.clone()], false);
            }
        }
    }

    fn emit_clip_scale(&mut self, node: &Node, max_norm: f32) {
        let graph = self.context.graph;
        let mut ranks: Vec<usize> = (0..graph.mesh.device_count()).collect();
        ranks.retain(|rank| self.context.assignment.actions.contains_key(&(*rank, ActionKey::Update)));
        let total = self.norm_total.take().unwrap_or_else(|| self.norm_total(&ranks));
        let writes = node.outputs.iter().map(|v| self.buffer(*v)).collect();
        self.launch(Op::ClipScale { max_norm }, vec![total.clone()], writes, false);
        self.norm_total = Some(total);
    }

    /// The sums over all devices. A device in several placements adds its parts first, so each calls one all-reduce.
    fn norm_total(&mut self, ranks: &[usize]) -> Buffer {
        let graph = self.context.graph;
        let is_local = |n: &&Node| {
            matches!(n.op, NodeOp::NormSums { .. }) && graph.placements[n.placement].index_of(self.site.0).is_some()
        };
        let parts: Vec<Var> = graph.nodes.iter().filter(is_local).map(|n| n.outputs[0]).collect();
        let mut sums = self.buffer(parts[0]);
        for part in &parts[1..] {
            let (part, total) = (self.buffer(*part), self.scratch_buffer(&sums.shape));
            self.launch(Op::Add, vec![sums, part], vec![total.clone()], false);
            sums = total;
        }
        if ranks.len() > 1 {
            let total = self.scratch_buffer(&sums.shape);
            self.collective(ranks, CollectiveKind::AllReduce { op: ReduceOp::Sum }, vec![sums], vec![total.clone()]);
            sums = total;
        }
        sums
    }

    fn host_port(&mut self, vars: Vec<Var>) -> HostPort {
        let buffers: Vec<Buffer> = vars.iter().map(|v| self.buffer(*v)).collect();
        HostPort { vars, buffers }
    }

    /// Assigns offsets to scratch buffers, including the host's, which hold inputs that nothing on the device reads.
    fn place_scratch(&mut self, host: Option<&mut HostPort>) -> usize {
        let (offsets, bytes) = pack(&self.scratch);
        let launch_buffers = self.launches.iter_mut().flat_map(|launch| {
            let Launch { reads, writes, workspace, .. } = launch;
            reads.iter_mut().chain(writes).chain(workspace)
        });
        let host_buffers = host.into_iter().flat_map(|host| &mut host.buffers);
        for buffer in launch_buffers.chain(host_buffers).filter(|buffer| buffer.base == SCRATCH) {
            buffer.offset = offsets[buffer.offset];
        }
        bytes
    }

    /// Signals to publish early: output ports that other streams wait for and that are complete before the last launch.
    fn signals(&self) -> Vec<(usize, u32)> {
        let registers = &self.context.assignment.registers;
        let has_waiting_stream = |port: usize| {
            let on_other_stream =
                |s: &DeviceAction| matches!(s.1, ActionKey::Bucket(_) | ActionKey::Pull(_) | ActionKey::Fetch(_));
            registers[self.outputs[port]].readers.iter().any(on_other_stream)
        };
        let compute = matches!(self.site.1, ActionKey::Forward | ActionKey::Backward);
        let early =
            |entry: &(&usize, &usize)| compute && *entry.1 < self.launches.len() && has_waiting_stream(*entry.0);
        let mut signals: Vec<(usize, u32)> =
            self.written.iter().filter(early).map(|(port, after)| (*after, *port as u32)).collect();
        signals.sort_unstable();
        signals
    }
}
