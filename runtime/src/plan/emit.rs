//! The launches of one action on one device: each node's kernel with local attributes, its buffers bound to ports,
//! fixed memory or scratch.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shardflow_kernels::collective::{CollectiveCall, CollectiveKind, Group, ReduceOp};
use shardflow_kernels::device::DeviceKind;
use shardflow_kernels::op::{Buffer, Launch, Op};
use shardflow_kernels::tensor::{DType, element_count};

use crate::boxing::step::LocalStep;
use crate::graph::{Graph, Node, NodeId, NodeOp, Var, ops};
use crate::plan::assign::{Assignment, Home, Site};
use crate::plan::memory::{ArenaMap, Interval, local_part, local_shape, pack};
use crate::plan::{ActionKey, ActionPlan, BaseKey, HostPort};
use crate::sbp::Sbp;

/// What emission needs beside the graph.
pub struct Context<'a> {
    /// The graph after all passes.
    pub graph: &'a Graph,
    /// Actions and homes.
    pub assignment: &'a Assignment,
    /// Where everything but scratch lies.
    pub arenas: &'a ArenaMap,
    /// Accumulations that the producing kernel does itself: value to sum.
    pub fused: &'a BTreeMap<Var, Var>,
    /// What it runs on.
    pub device: DeviceKind,
}

/// An action's launches, and what they need.
pub struct Emitted {
    /// The plan of the action.
    pub plan: ActionPlan,
    /// Registers read, in port order.
    pub inputs: Vec<usize>,
    /// Registers written, in port order.
    pub outputs: Vec<usize>,
    /// Bytes of scratch.
    pub scratch_bytes: usize,
    /// Members of each group whose collectives it joins.
    pub groups: BTreeSet<Vec<usize>>,
}

/// Accumulations whose value is made by a kernel that can add to its output and is read by nobody else.
pub fn fuse_accumulation(graph: &Graph) -> BTreeMap<Var, Var> {
    let mut readers: BTreeMap<Var, usize> = BTreeMap::new();
    for var in graph.nodes.iter().flat_map(|n| &n.inputs).chain(graph.outputs.iter().map(|o| &o.tensor)) {
        *readers.entry(*var).or_default() += 1;
    }
    let mut fused = BTreeMap::new();
    for node in graph.nodes.iter().filter(|n| matches!(n.op, NodeOp::Accumulate)) {
        let (value, producer) = (node.inputs[0], graph.producer(node.inputs[0]));
        let NodeOp::Kernel(op) = &producer.op else { continue };
        let adds = op.can_accumulate().is_some_and(|w| producer.outputs.get(w) == Some(&value));
        let same_action = (producer.phase, producer.placement) == (node.phase, node.placement);
        let busy = producer.outputs.iter().any(|o| fused.contains_key(o));
        if adds && same_action && readers[&value] == 1 && !busy {
            fused.insert(value, node.outputs[0]);
        }
    }
    fused
}

/// Emits one action.
pub fn emit(
    context: &Context<'_>,
    site: Site,
    nodes: &[NodeId],
    group_ids: &mut dyn FnMut(&[usize]) -> Arc<Group>,
) -> Emitted {
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
            let here = |var: &Var| graph.placements[graph.placement_of(*var)].index_of(site.0).is_some();
            let fetched = graph.outputs.iter().map(|o| o.tensor).filter(|v| graph.tensor(*v).rate == rate && here(v));
            host = Some(emitter.host_port(fetched.collect()));
        }
        _ => nodes.iter().for_each(|id| {
            emitter.current = *id;
            emitter.node(&context.graph.nodes[id.index()]);
        }),
    }
    let scratch_bytes = emitter.place_scratch(host.as_mut());
    let signals = emitter.signals();
    let (launches, nodes, groups) = (emitter.launches, emitter.nodes, emitter.groups);
    let name = action_name(context.graph, site.1);
    let plan = ActionPlan { key: site.1, name, launches, nodes, signals, bases, host };
    Emitted { plan, inputs, outputs, scratch_bytes, groups }
}

/// What an action is called in plans and errors.
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

const SCRATCH: usize = 1;

struct Emitter<'a> {
    context: &'a Context<'a>,
    site: Site,
    inputs: &'a [usize],
    outputs: &'a [usize],
    launches: Vec<Launch>,
    /// The node of each launch.
    nodes: Vec<NodeId>,
    /// The node that is emitted now.
    current: NodeId,
    /// Lifetimes; until they are placed, a scratch buffer's offset is its index here.
    scratch: Vec<Interval>,
    scratch_of: BTreeMap<Var, usize>,
    /// Output port to the number of launches after which it is complete.
    written: BTreeMap<usize, usize>,
    groups: BTreeSet<Vec<usize>>,
    /// Where the squares of all gradients' norms are, once they are summed.
    norm_total: Option<Buffer>,
    group_ids: &'a mut dyn FnMut(&[usize]) -> Arc<Group>,
}

impl Emitter<'_> {
    fn device(&self) -> usize {
        self.site.0
    }

    /// The buffer of a tensor's part on this device.
    fn buffer(&mut self, var: Var) -> Buffer {
        self.buffer_on(var, self.site.0)
    }

    /// The buffer of a tensor's part on `device`, which is another one only for pulls.
    fn buffer_on(&mut self, var: Var, device: usize) -> Buffer {
        let context = self.context;
        let var = context.assignment.storage(var);
        let var = context.fused.get(&var).copied().unwrap_or(var);
        let shape = local_shape(context.graph, var, device);
        let dtype = context.graph.tensor(var).dtype;
        let home = context.assignment.homes.get(&(device, var)).copied().unwrap_or(Home::Scratch);
        let (base, offset) = match home {
            Home::Fixed => (0, context.arenas.fixed[&(device, var)]),
            Home::Register(register) => (self.port_base(register), context.arenas.slot_offsets[register][&var]),
            Home::Scratch => (SCRATCH, self.scratch_index(var, element_count(&shape) * dtype.bytes())),
        };
        Buffer { base, offset, shape, dtype }
    }

    /// Index of the base that a register's slot is; a register that this action both reads and writes is written.
    fn port_base(&self, register: usize) -> usize {
        match self.outputs.iter().position(|r| *r == register) {
            Some(port) => 2 + self.inputs.len() + port,
            None => {
                2 + self.inputs.iter().position(|r| *r == register).expect("a site has the ports of what it touches")
            }
        }
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
        // A kernel without anything to write has nothing to do; a collective must still be joined.
        let idle = writes.iter().all(|w| element_count(&w.shape) == 0);
        if idle && !matches!(op, Op::Collective(_)) {
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

    fn node(&mut self, node: &Node) {
        let graph = self.context.graph;
        match &node.op {
            NodeOp::Kernel(op) => {
                let accumulate = node.outputs.iter().any(|o| self.context.fused.contains_key(o));
                let part = |v: &Var| local_part(graph, *v, self.site.0);
                let (ins, outs): (Vec<_>, Vec<_>) =
                    (node.inputs.iter().map(part).collect(), node.outputs.iter().map(part).collect());
                let op = ops::localize(op, &ins, &outs);
                let reads = node.inputs.iter().map(|v| self.buffer(*v)).collect();
                let writes = node.outputs.iter().chain(&node.updates).map(|v| self.buffer(*v)).collect();
                self.launch(op, reads, writes, accumulate);
            }
            NodeOp::Custom(op) => {
                let part = |v: &Var| local_part(graph, *v, self.site.0);
                let (ins, outs): (Vec<_>, Vec<_>) =
                    (node.inputs.iter().map(part).collect(), node.outputs.iter().map(part).collect());
                let kernel = op.kernel(&ins, &outs);
                let reads = node.inputs.iter().map(|v| self.buffer(*v)).collect();
                let writes = node.outputs.iter().map(|v| self.buffer(*v)).collect();
                self.launch(Op::Custom(kernel), reads, writes, false);
            }
            NodeOp::Accumulate if self.context.fused.contains_key(&node.inputs[0]) => {}
            NodeOp::Accumulate => {
                let (read, write) = (self.buffer(node.inputs[0]), self.buffer(node.outputs[0]));
                self.launch(Op::Copy, vec![read], vec![write], true);
            }
            NodeOp::Boxing(_) => self.boxing(node),
            NodeOp::Bucket { axes } => self.bucket(node, axes),
            NodeOp::NormSums { indices } => self.norm_sums(node, indices),
            NodeOp::ClipScale { max_norm } => self.clip(node, *max_norm),
            NodeOp::Relayout | NodeOp::Input | NodeOp::Parameter { .. } | NodeOp::State | NodeOp::Bf16Copy { .. } => {}
        }
    }

    fn collective(&mut self, ranks: &[usize], kind: CollectiveKind, reads: Vec<Buffer>, writes: Vec<Buffer>) {
        let group = (self.group_ids)(ranks);
        let member = ranks.iter().position(|r| *r == self.device()).expect("a device joins only groups it is in");
        self.groups.insert(ranks.to_vec());
        self.launch(Op::Collective(CollectiveCall { group, member, kind }), reads, writes, false);
    }

    fn boxing(&mut self, node: &Node) {
        let NodeOp::Boxing(step) = &node.op else { return };
        let placement = &self.context.graph.placements[node.placement];
        let Some(position) = placement.index_of(self.device()) else { return };
        match step.local(position) {
            LocalStep::Keep => {
                // Other devices change it, so here too it has a buffer of its own.
                if self.context.assignment.storage(node.outputs[0]) == node.outputs[0] {
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

    /// The gradients of a bucket lie side by side in one slot: one all-reduce of the whole slot, in place.
    fn bucket(&mut self, node: &Node, axes: &[usize]) {
        let graph = self.context.graph;
        let placement = &graph.placements[node.placement];
        let ranks = group_of(placement.groups(axes), self.device());
        let first = self.buffer(node.inputs[0]);
        let Home::Register(register) =
            self.context.assignment.homes[&(self.device(), self.context.assignment.storage(node.inputs[0]))]
        else {
            return;
        };
        let bytes = self.context.arenas.registers[register].stride;
        let slot = Buffer { base: first.base, offset: 0, shape: vec![bytes / 4], dtype: DType::F32 };
        self.collective(&ranks, CollectiveKind::AllReduce { op: ReduceOp::Sum }, vec![slot.clone()], vec![slot]);
    }

    /// Of each gradient the part that this device is the first to hold, so that the sum over all devices is the norm.
    fn norm_sums(&mut self, node: &Node, indices: &[usize]) {
        let graph = self.context.graph;
        let sums = self.buffer(node.outputs[0]);
        self.launch(Op::Fill { value: 0.0 }, vec![], vec![sums.clone()], false);
        let placement = &graph.placements[node.placement];
        let Some(position) = placement.index_of(self.device()) else { return };
        let coords = placement.coords(position);
        for (grad, index) in node.inputs.iter().zip(indices) {
            let layout = graph.tensor(*grad).layout.as_ref().expect("laid out");
            let owner = layout.0.iter().zip(&coords).all(|(sbp, at)| *sbp != Sbp::Broadcast || *at == 0);
            if owner {
                let read = self.buffer(*grad);
                self.launch(Op::SumSquares { index: *index }, vec![read], vec![sums.clone()], false);
            }
        }
    }

    fn clip(&mut self, node: &Node, max_norm: f32) {
        let graph = self.context.graph;
        let mut ranks: Vec<usize> = (0..graph.mesh.device_count()).collect();
        ranks.retain(|rank| self.context.assignment.actions.contains_key(&(*rank, ActionKey::Update)));
        let total = match self.norm_total.take() {
            Some(total) => total,
            None => self.norm_total(&ranks),
        };
        let writes = node.outputs.iter().map(|v| self.buffer(*v)).collect();
        self.launch(Op::ClipScale { max_norm }, vec![total.clone()], writes, false);
        self.norm_total = Some(total);
    }

    /// The sums of all devices and all placements. A device in several placements adds its own first, so that every device
    /// joins one all-reduce.
    fn norm_total(&mut self, ranks: &[usize]) -> Buffer {
        let graph = self.context.graph;
        let here = |n: &&Node| {
            matches!(n.op, NodeOp::NormSums { .. }) && graph.placements[n.placement].index_of(self.site.0).is_some()
        };
        let parts: Vec<Var> = graph.nodes.iter().filter(here).map(|n| n.outputs[0]).collect();
        let mut sums = self.buffer(parts[0]);
        for part in &parts[1..] {
            let (part, both) = (self.buffer(*part), self.scratch_buffer(&sums.shape));
            self.launch(Op::Add, vec![sums, part], vec![both.clone()], false);
            sums = both;
        }
        if ranks.len() > 1 {
            let total = self.scratch_buffer(&sums.shape);
            self.collective(ranks, CollectiveKind::AllReduce { op: ReduceOp::Sum }, vec![sums], vec![total.clone()]);
            sums = total;
        }
        sums
    }

    /// Where the tensors that the host gives or gets lie.
    fn host_port(&mut self, vars: Vec<Var>) -> HostPort {
        let buffers: Vec<Buffer> = vars.iter().map(|v| self.buffer(*v)).collect();
        HostPort { vars, buffers }
    }

    /// Gives scratch buffers their offsets, the host's among them: inputs that nothing on the device reads.
    fn place_scratch(&mut self, host: Option<&mut HostPort>) -> usize {
        let (offsets, bytes) = pack(&self.scratch);
        let of_launches = self.launches.iter_mut().flat_map(|launch| {
            let Launch { reads, writes, workspace, .. } = launch;
            reads.iter_mut().chain(writes).chain(workspace)
        });
        let of_host = host.into_iter().flat_map(|host| &mut host.buffers);
        for buffer in of_launches.chain(of_host).filter(|buffer| buffer.base == SCRATCH) {
            buffer.offset = offsets[buffer.offset];
        }
        bytes
    }

    /// Ports that others wait for and that are complete before the last launch are published early.
    fn signals(&self) -> Vec<(usize, u32)> {
        let registers = &self.context.assignment.registers;
        let waits = |port: usize| {
            let elsewhere = |s: &Site| matches!(s.1, ActionKey::Bucket(_) | ActionKey::Pull(_) | ActionKey::Fetch(_));
            registers[self.outputs[port]].readers.iter().any(elsewhere)
        };
        let compute = matches!(self.site.1, ActionKey::Forward | ActionKey::Backward);
        let early = |entry: &(&usize, &usize)| compute && *entry.1 < self.launches.len() && waits(*entry.0);
        let mut signals: Vec<(usize, u32)> =
            self.written.iter().filter(early).map(|(port, after)| (*after, *port as u32)).collect();
        signals.sort_unstable();
        signals
    }
}

/// The group that a device is in.
pub fn group_of(groups: Vec<Vec<usize>>, device: usize) -> Vec<usize> {
    groups.into_iter().find(|g| g.contains(&device)).unwrap_or_else(|| vec![device])
}
