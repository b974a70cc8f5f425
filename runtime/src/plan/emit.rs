//! Emits the launches of one action on one device, with buffers in register ports, fixed memory or scratch.

use std::collections::BTreeMap;

use shardflow_kernels::collective::{CollectiveCall, CollectiveKind, ReduceOp};
use shardflow_kernels::op::{Buffer, Launch, Op};
use shardflow_kernels::tensor::{DType, element_count};

use crate::boxing::step::{BoxingStep, LocalStep};
use crate::graph::{Graph, Node, NodeId, NodeOp, Var, ops};
use crate::plan::Plan;
use crate::plan::action::{ActionPlan, BaseKey, DeviceRegister, EmittedAction, HostPort};
use crate::plan::assign::Storage;
use crate::plan::groups::collective_axes;
use crate::plan::memory::{Interval, align, local_part, pack};
use crate::plan::segments::{HostTransfer, Segment, SegmentId, Segments};

/// Finds the accumulations that need no kernel of their own, because the kernel that computes the value can add it to
/// the sum. This kernel must be in the same action and able to add to its output, and nothing else may read the value.
pub fn fuse_accumulation(graph: &Graph, segments: &Segments) -> BTreeMap<Var, Var> {
    let mut readers: BTreeMap<Var, usize> = BTreeMap::new();
    for var in graph.nodes.iter().flat_map(|n| &n.inputs) {
        *readers.entry(*var).or_default() += 1;
    }
    let mut fused = BTreeMap::new();
    let accumulations = graph.nodes.iter().enumerate().filter(|(_, n)| matches!(n.op, NodeOp::Accumulate));
    for (index, node) in accumulations {
        let (value, producer) = (node.inputs[0], graph.producer(node.inputs[0]));
        let NodeOp::Kernel(op) = &producer.op else { continue };
        let can_add = op.can_accumulate().is_some_and(|w| producer.outputs.get(w) == Some(&value));
        let same_action = segments.of_node[graph.tensor(value).producer.index()] == segments.of_node[index];
        let already_fused = producer.outputs.iter().any(|o| fused.contains_key(o));
        if can_add && same_action && readers[&value] == 1 && !already_fused {
            fused.insert(value, node.outputs[0]);
        }
    }
    fused
}

/// Emits a segment's action on one device.
pub fn emit(plan: &Plan, device: usize, segment: SegmentId) -> EmittedAction {
    let inputs = inputs(plan, device, segment);
    let ports = plan.class_plan(device).storage.ports.get(&segment);
    let outputs = ports.map(|ports| ports.writes.clone()).unwrap_or_default();
    let mut bases = vec![BaseKey::Fixed, BaseKey::Scratch];
    bases.extend((0..inputs.len()).map(BaseKey::Input));
    bases.extend((0..outputs.len()).map(BaseKey::Output));
    bases.extend(plan.segments.get(segment).host.map(|_| BaseKey::Staging));
    let mut emitter = Emitter {
        plan,
        device,
        segment,
        inputs: &inputs,
        outputs: &outputs,
        launches: Vec::new(),
        nodes: Vec::new(),
        host: None,
        current: NodeId(0),
        scratch: Vec::new(),
        scratch_of: BTreeMap::new(),
        written: BTreeMap::new(),
    };
    let Segment { nodes, name, .. } = plan.segments.get(segment);
    for id in nodes {
        emitter.current = *id;
        emitter.emit_node(&plan.graph.nodes[id.index()]);
    }
    let scratch_bytes = emitter.place_scratch();
    let signals = emitter.signals();
    let Emitter { launches, nodes, host, .. } = emitter;
    let plan = ActionPlan { segment, name: name.clone(), launches, nodes, signals, bases, host };
    EmittedAction { plan, inputs, outputs, scratch_bytes }
}

/// The registers that a segment's action on `device` reads: the device's own registers and, in a transfer, registers of
/// other devices.
pub fn inputs(plan: &Plan, device: usize, segment: SegmentId) -> Vec<DeviceRegister> {
    let own = plan.class_plan(device).storage.ports.get(&segment).into_iter().flat_map(|ports| &ports.reads);
    let mut inputs: Vec<DeviceRegister> = own.map(|register| DeviceRegister { device, register: *register }).collect();
    for id in &plan.segments.get(segment).nodes {
        let node = &plan.graph.nodes[id.index()];
        for source in plan.classes.sources(*id, device).iter().filter(|source| **source != device) {
            let var = plan.aliases.resolve(node.inputs[0]);
            if let Some(Storage::Register(register)) = plan.class_plan(*source).storage.storage.get(&var) {
                inputs.push(DeviceRegister { device: *source, register: *register });
            }
        }
    }
    inputs
}

/// Index of [`BaseKey::Scratch`] in an action's bases.
const SCRATCH: usize = 1;

struct Emitter<'a> {
    plan: &'a Plan,
    device: usize,
    segment: SegmentId,
    inputs: &'a [DeviceRegister],
    outputs: &'a [usize],
    launches: Vec<Launch>,
    nodes: Vec<NodeId>,
    host: Option<HostPort>,
    current: NodeId,
    /// Lifetimes of scratch buffers. Until [`Emitter::place_scratch`], a buffer's offset is its index in this list.
    scratch: Vec<Interval>,
    scratch_of: BTreeMap<Var, usize>,
    /// For each output port: the number of launches after which it is complete.
    written: BTreeMap<usize, usize>,
}

impl Emitter<'_> {
    fn buffer(&mut self, var: Var) -> Buffer {
        self.buffer_on(var, self.device)
    }

    /// The buffer of a tensor's part on `device`. Only pulls use the buffer of another device.
    fn buffer_on(&mut self, var: Var, device: usize) -> Buffer {
        let plan = self.plan;
        let var = plan.aliases.resolve(var);
        let var = plan.fused.get(&var).copied().unwrap_or(var);
        let shape = local_part(&plan.graph, var, device).size;
        let dtype = plan.graph.tensor(var).dtype;
        let class = plan.class_plan(device);
        let storage = class.storage.storage.get(&var).copied().unwrap_or(Storage::Scratch);
        let (base, offset) = match storage {
            Storage::Fixed => (0, class.arena.fixed[&var]),
            Storage::Register(register) => {
                (self.port_base(DeviceRegister { device, register }), class.arena.slot_offsets[register][&var])
            }
            Storage::Scratch => (SCRATCH, self.scratch_index(var, element_count(&shape) * dtype.bytes())),
        };
        Buffer { base, offset, shape, dtype }
    }

    /// Index of a register's base: the output port's base if the action writes the register, else the input port's.
    fn port_base(&self, at: DeviceRegister) -> usize {
        let output = self.outputs.iter().position(|r| at.device == self.device && *r == at.register);
        let input = || self.inputs.iter().position(|r| *r == at);
        let port = output.map(|port| self.inputs.len() + port).or_else(input);
        2 + port.expect("an action has a port for every register that it uses")
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
        // A kernel with empty outputs is skipped, except a collective, which every member must call.
        let no_output = writes.iter().all(|w| element_count(&w.shape) == 0);
        if no_output && !matches!(op, Op::Collective(_)) {
            return;
        }
        let mut launch = Launch { op, reads, writes, accumulate, workspace: None };
        let bytes = self.plan.device.workspace_bytes(&launch);
        launch.workspace = (bytes > 0).then(|| self.scratch_buffer(&[bytes.div_ceil(4)]));
        let Launch { reads, writes, workspace, .. } = &launch;
        let index = self.launches.len();
        for buffer in reads.iter().chain(writes).chain(workspace) {
            if buffer.base == SCRATCH {
                self.scratch[buffer.offset].last = index;
            }
        }
        for write in writes {
            let port = write.base.checked_sub(2 + self.inputs.len());
            if let Some(port) = port.filter(|port| *port < self.outputs.len()) {
                self.written.insert(port, index + 1);
            }
        }
        self.nodes.push(self.current);
        self.launches.push(launch);
    }

    fn emit_node(&mut self, node: &Node) {
        let (graph, device) = (&self.plan.graph, self.device);
        let parts = || {
            [&node.inputs, &node.outputs]
                .map(|vars| vars.iter().map(|var| local_part(graph, *var, device)).collect::<Vec<_>>())
        };
        match &node.op {
            NodeOp::Kernel(op) => {
                let accumulate = node.outputs.iter().any(|o| self.plan.fused.contains_key(o));
                let [ins, outs] = parts();
                self.launch_node(node, ops::localize(op, &ins, &outs), accumulate);
            }
            NodeOp::Custom(op) => {
                let [ins, outs] = parts();
                self.launch_node(node, Op::Custom(op.kernel(&ins, &outs)), false);
            }
            NodeOp::Accumulate if self.plan.fused.contains_key(&node.inputs[0]) => {}
            NodeOp::Accumulate => self.launch_node(node, Op::Copy, true),
            NodeOp::Boxing(step) => self.emit_boxing(node, step),
            NodeOp::Bucket { .. } => self.emit_bucket(node),
            NodeOp::NormSums { indices } => self.emit_norm_sums(node, indices),
            NodeOp::NormTotal => self.emit_norm_total(node),
            NodeOp::ClipScale { max_norm } => {
                self.launch_node(node, Op::ClipScale { max_norm: *max_norm }, false);
            }
            NodeOp::Input => self.emit_host_copies(node.outputs.iter()),
            NodeOp::Fetch => self.emit_host_copies(node.inputs.iter().filter(|var| graph.is_fetched(**var, device))),
            NodeOp::Relayout | NodeOp::Parameter { .. } | NodeOp::State | NodeOp::Bf16Copy { .. } => {}
        }
    }

    fn launch_node(&mut self, node: &Node, op: Op, accumulate: bool) {
        let reads = node.inputs.iter().map(|v| self.buffer(*v)).collect();
        let writes = node.outputs.iter().chain(&node.updates).map(|v| self.buffer(*v)).collect();
        self.launch(op, reads, writes, accumulate);
    }

    fn collective(&mut self, node: &Node, kind: CollectiveKind, read: Buffer, write: Buffer) {
        let plan = self.plan;
        let (stream, axes) = collective_axes(&plan.graph, node).expect("only nodes with groups call collectives");
        let group = plan.patterns.group(&plan.graph, (stream, &axes), node.placement, self.device);
        let member = group.ranks.member_of(self.device).expect("a device is in its own group");
        self.launch(Op::Collective(CollectiveCall { group, member, kind }), vec![read], vec![write], false);
    }

    fn emit_boxing(&mut self, node: &Node, step: &BoxingStep) {
        let placement = &self.plan.graph.placements[node.placement];
        let Some(position) = placement.index_of(self.device) else { return };
        match step.local(position) {
            LocalStep::Keep => {
                // If the step keeps the part of every device, the output shares the input's memory. Otherwise, copy.
                if self.plan.aliases.resolve(node.outputs[0]) == node.outputs[0] {
                    self.launch_node(node, Op::Copy, false);
                }
            }
            LocalStep::Call(call) => {
                let (read, write) = (self.buffer(node.inputs[0]), self.buffer(node.outputs[0]));
                self.collective(node, call.kind, read, write);
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

    /// Emits one in-place all-reduce of a bucket's slot, in which the gradients are contiguous.
    fn emit_bucket(&mut self, node: &Node) {
        let first = self.plan.aliases.resolve(node.inputs[0]);
        let Some(Storage::Register(register)) = self.plan.class_plan(self.device).storage.storage.get(&first).copied()
        else {
            return;
        };
        let base = self.port_base(DeviceRegister { device: self.device, register });
        let bytes = self.plan.class_plan(self.device).arena.registers[register].stride;
        let slot = Buffer { base, offset: 0, shape: vec![bytes / 4], dtype: DType::F32 };
        self.collective(node, CollectiveKind::AllReduce { op: ReduceOp::Sum }, slot.clone(), slot);
    }

    /// Sums the squares of the gradient parts whose first copy is on this device, so each part counts once.
    fn emit_norm_sums(&mut self, node: &Node, indices: &[usize]) {
        let graph = &self.plan.graph;
        let sums = self.buffer(node.outputs[0]);
        self.launch(Op::Fill { value: 0.0 }, vec![], vec![sums.clone()], false);
        let placement = &graph.placements[node.placement];
        let Some(position) = placement.index_of(self.device) else { return };
        let coords = placement.coords(position);
        for (grad, index) in node.inputs.iter().zip(indices) {
            if graph.layout(*grad).is_first_copy(&coords) {
                let read = self.buffer(*grad);
                self.launch(Op::SumSquares { index: *index }, vec![read], vec![sums.clone()], false);
            }
        }
    }

    /// Adds up the inputs that this device holds, in order. Then sums the result over the placement's devices.
    fn emit_norm_total(&mut self, node: &Node) {
        let graph = &self.plan.graph;
        let device = self.device;
        let is_local = |var: &&Var| graph.placements[graph.placement_of(**var)].index_of(device).is_some();
        let parts: Vec<Buffer> = node.inputs.iter().filter(is_local).map(|var| self.buffer(*var)).collect();
        let total = self.buffer(node.outputs[0]);
        let mut parts = parts.into_iter();
        let Some(mut sum) = parts.next() else { return };
        for part in parts {
            let added = self.scratch_buffer(&sum.shape);
            self.launch(Op::Add, vec![sum, part], vec![added.clone()], false);
            sum = added;
        }
        self.collective(node, CollectiveKind::AllReduce { op: ReduceOp::Sum }, sum, total);
    }

    /// Emits a copy of each tensor between the host's staging slot and the device.
    fn emit_host_copies<'v>(&mut self, vars: impl Iterator<Item = &'v Var>) {
        let Some(transfer) = self.plan.segments.get(self.segment).host else { return };
        let base = 2 + self.inputs.len() + self.outputs.len();
        let new = || HostPort { transfer, vars: Vec::new(), buffers: Vec::new(), slot_bytes: 0 };
        let mut port = self.host.take().unwrap_or_else(new);
        for var in vars {
            let own = self.buffer(*var);
            let staged = Buffer { base, offset: port.slot_bytes, ..own.clone() };
            port.slot_bytes = align(staged.offset + element_count(&own.shape) * own.dtype.bytes());
            port.vars.push(*var);
            port.buffers.push(staged.clone());
            let (read, write) = if transfer == HostTransfer::Fetch { (own, staged) } else { (staged, own) };
            self.launch(Op::Copy, vec![read], vec![write], false);
        }
        self.host = Some(port);
    }

    /// Assigns offsets to scratch buffers.
    fn place_scratch(&mut self) -> usize {
        let (offsets, bytes) = pack(&self.scratch);
        for Launch { reads, writes, workspace, .. } in &mut self.launches {
            let buffers = reads.iter_mut().chain(writes).chain(workspace);
            buffers.filter(|buffer| buffer.base == SCRATCH).for_each(|buffer| buffer.offset = offsets[buffer.offset]);
        }
        bytes
    }

    /// An early signal for each output port that is complete before the last launch, if another stream waits for the
    /// port. Host actions have no early signals, because a signal takes as long as the copies that follow it.
    fn signals(&self) -> Vec<(usize, u32)> {
        let Self { plan, written, launches, host, .. } = self;
        let stream = plan.segments.get(self.segment).stream;
        let registers = &plan.class_plan(self.device).storage.registers;
        let has_waiting_stream = |port: usize| {
            let register = &registers[self.outputs[port]];
            let is_other = |reader: &SegmentId| plan.segments.get(*reader).stream != stream;
            !register.transfers.is_empty() || register.readers.iter().any(is_other)
        };
        let is_last = |after: usize| after == launches.len() || host.is_some();
        let early = |(port, after): &(&usize, &usize)| !is_last(**after) && has_waiting_stream(**port);
        let mut signals: Vec<(usize, u32)> =
            written.iter().filter(early).map(|(port, after)| (*after, *port as u32)).collect();
        signals.sort_unstable();
        signals
    }
}
