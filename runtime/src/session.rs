//! A running plan: devices, arenas and actors; steps, results, parameters, metrics and the end.
//! Imports `plan`, `session::*`, and the actors' shell.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, select, unbounded};
use shardflow_actors::error::{ActorError, Failure};
use shardflow_actors::shell::{ActionProgram, BaseRef, Loaded, RegisterMemory, Running, start};
use shardflow_actors::spec::{ActorId, StreamKind};
use shardflow_actors::watchdog::WatchdogOptions;
use shardflow_kernels::collective::Collective;
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::device::Device;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::op::{Launch, Op, Program};
use shardflow_kernels::tensor::{HostData, HostTensor, Region, element_count};

use crate::graph::builder::{HYPER_INPUT, RNG_INPUT};
use crate::graph::{NodeOp, Rate, Var};
use crate::init;
use crate::layout_error::LayoutError;
use crate::passes::optimizer::GRAD_SQUARES_OUTPUT;
use crate::plan::memory::local_part;
use crate::plan::{ActionKey, ActionPlan, BaseKey, Plan};
use crate::sbp::gather;
use crate::sbp::region::take_box;

pub mod checkpoint;
pub mod host;
pub mod metrics;
pub mod snapshot;
mod tokens;

use checkpoint::CheckpointError;
use host::{Fetched, HostIn, HostOut};
use metrics::StepMetrics;

/// What a session can fail with.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// An actor, kernel or collective failed; the first cause.
    #[error("{0}")]
    Failed(#[from] Failure),
    /// The actors could not be started or told.
    #[error(transparent)]
    Actors(#[from] ActorError),
    /// Devices or memory could not be had.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// What devices gave back does not fit together.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A file.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// `step` was called with tensors that are not what the program's inputs say.
    #[error("input {name}: expected {expected}, got {got}")]
    Input {
        /// Name of the input.
        name: String,
        /// What the graph says.
        expected: String,
        /// What was given.
        got: String,
    },
}

/// How a session is started.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Initial weights and dropout masks are made of it.
    pub seed: u64,
    /// When and how to tell of a stall.
    pub watchdog: WatchdogOptions,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { seed: 1337, watchdog: WatchdogOptions::default() }
    }
}

/// What a step brought.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Steps done before this one.
    pub step: u64,
    /// The loss, if the program minimises one.
    pub loss: Option<f32>,
    /// Global norm of the gradients before clipping, if there are any.
    pub grad_norm: Option<f64>,
    /// Every output by name, whole; those made once a micro-batch joined along their first dim.
    pub outputs: BTreeMap<String, HostTensor>,
}

struct FeedPort {
    actor: ActorId,
    action: u32,
    device: usize,
    rate: Rate,
    vars: Vec<Var>,
    sender: Sender<Vec<HostTensor>>,
}

/// A running plan. Dropping it shuts it down.
pub struct Session {
    plan: Plan,
    devices: Vec<Device>,
    arenas: Vec<Arena>,
    engine: Arc<dyn Collective>,
    running: Option<Running>,
    feeds: Vec<FeedPort>,
    /// External actions that are fed nothing, each with its firings in a step.
    gates: Vec<(ActorId, u32, u32)>,
    fetched: Receiver<Fetched>,
    /// Why a step failed; what devices hold is worth nothing then, and may still change.
    failed: Option<Failure>,
    /// What each device's fetches bring, in order.
    fetches: BTreeMap<(usize, Rate), Vec<Var>>,
    /// Inputs that hold token ids, and how many tokens there are.
    vocabularies: BTreeMap<String, usize>,
    steps: u64,
    seed: u64,
    step_metrics: StepMetrics,
}

impl Session {
    /// Allocates each device's arena, makes the initial weights and starts the actors.
    ///
    /// # Errors
    /// When memory or threads cannot be had.
    pub fn start(plan: Plan, options: &SessionOptions) -> Result<Self, SessionError> {
        let engine: Arc<dyn Collective> = Arc::new(InProcess::new());
        let mut devices = Vec::new();
        let mut arenas = Vec::new();
        for (rank, memory) in plan.memory.iter().enumerate() {
            let device = Device::cpu(rank, plan.threads_per_device, engine.clone());
            arenas.push(device.arena(memory.total_bytes)?);
            devices.push(device);
        }
        let (sender, fetched) = unbounded();
        let mut loader = Loader { plan: &plan, arenas: &arenas, feeds: Vec::new(), fetches: BTreeMap::new(), sender };
        let programs = loader.programs();
        let (feeds, fetches) = (loader.feeds, loader.fetches);
        let gates = gates(&plan);
        let memory = plan.registers.iter().map(|place| RegisterMemory {
            base: Base { arena: arenas[place.device].clone(), offset: place.offset },
            stride: place.stride,
        });
        let mut streams = Vec::new();
        for actor in &plan.spec.actors {
            let threads = if actor.stream == StreamKind::Compute { plan.threads_per_device } else { 1 };
            streams.push(devices[actor.device].stream(&actor.name, threads)?);
        }
        let loaded = Loaded {
            spec: Arc::new(plan.spec.clone()),
            programs,
            memory: memory.collect(),
            streams,
            engine: engine.clone(),
        };
        let mut session = Self {
            vocabularies: tokens::vocabularies(&plan.graph),
            plan,
            devices,
            arenas,
            engine,
            running: None,
            gates,
            feeds,
            fetched,
            failed: None,
            fetches,
            steps: 0,
            seed: options.seed,
            step_metrics: StepMetrics::new(),
        };
        session.initialise()?;
        session.running = Some(start(loaded, options.watchdog.clone())?);
        Ok(session)
    }

    /// Makes each device's part of each parameter.
    fn initialise(&self) -> Result<(), SessionError> {
        for (device, memory) in self.plan.memory.iter().enumerate() {
            for resident in &memory.residents {
                let NodeOp::Parameter { init } = self.plan.graph.producer(resident.var).op else { continue };
                let info = self.plan.graph.tensor(resident.var);
                let mut data = vec![0.0; resident.region.element_count()];
                init::fill(init, self.seed, &info.name, &info.shape, &resident.region, &mut data);
                let part = HostTensor::f32(&resident.region.size, data);
                self.arenas[device].write_host(resident.offset, &part)?;
            }
        }
        Ok(())
    }

    /// The failure of an earlier step, if there was one.
    fn check_alive(&self) -> Result<(), SessionError> {
        self.failed.clone().map_or(Ok(()), |failure| Err(failure.into()))
    }

    /// The plan that runs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Steps done, those before a restored checkpoint included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One step: feeds the whole batch, runs all micro-batches, updates, and gives what the program outputs.
    /// When it returns, no device works any more. `learning_rate` is not used by a program that minimises nothing.
    ///
    /// # Errors
    /// When an input is missing, unknown, of the wrong shape or type, or holds a token outside the vocabulary (nothing was
    /// run then), or the session failed.
    pub fn step(&mut self, inputs: &[(&str, HostTensor)], learning_rate: f32) -> Result<StepReport, SessionError> {
        let begin = Instant::now();
        self.check_inputs(inputs)?;
        let by_name: BTreeMap<&str, &HostTensor> = inputs.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let running = self.running.as_ref().ok_or(KernelError::Closed { device: 0 })?;
        for feed in &self.feeds {
            let firings = feed.rate.per_step(self.plan.micro_batches);
            for micro_batch in 0..firings {
                let parts =
                    feed.vars.iter().map(|var| self.part(*var, feed.device, micro_batch, &by_name, learning_rate));
                let _ = feed.sender.send(parts.collect());
            }
            running.give(feed.actor, feed.action, firings as u32)?;
        }
        for (actor, action, firings) in &self.gates {
            running.give(*actor, *action, *firings)?;
        }
        let mut results: BTreeMap<(usize, Rate), Vec<Vec<HostTensor>>> = BTreeMap::new();
        let fetches: usize = self.fetches.keys().map(|(_, rate)| rate.per_step(self.plan.micro_batches)).sum();
        for _ in 0..fetches {
            select! {
                recv(self.fetched) -> message => if let Ok(message) = message {
                    results.entry((message.device, message.rate)).or_default().push(message.tensors);
                },
                recv(running.failures()) -> failure => match failure {
                    Ok(failure) => {
                        self.failed = Some(failure.clone());
                        return Err(failure.into());
                    }
                    Err(_) => return Err(KernelError::Closed { device: 0 }.into()),
                },
            }
        }
        let report = self.report(results)?;
        self.steps += 1;
        self.step_metrics.record(&report, begin.elapsed());
        Ok(report)
    }

    fn check_inputs(&self, inputs: &[(&str, HostTensor)]) -> Result<(), SessionError> {
        let graph = &self.plan.graph;
        let nodes = graph.nodes().iter().filter(|n| matches!(n.op, NodeOp::Input));
        let expected: BTreeMap<&str, Var> = nodes
            .filter(|n| n.name != RNG_INPUT && n.name != HYPER_INPUT)
            .map(|n| (n.name.as_str(), n.outputs[0]))
            .collect();
        let wrong =
            |name: &str, expected: String, got: String| SessionError::Input { name: name.into(), expected, got };
        for (index, (name, tensor)) in inputs.iter().enumerate() {
            if inputs[..index].iter().any(|other| other.0 == *name) {
                return Err(wrong(name, "one tensor".into(), "two".into()));
            }
            let (elements, held) = (element_count(&tensor.shape), tensor.elements_held());
            if elements != held {
                return Err(wrong(name, format!("{elements} elements for {:?}", tensor.shape), held.to_string()));
            }
            if !expected.contains_key(name) {
                let known: Vec<&str> = expected.keys().copied().collect();
                return Err(wrong(name, format!("one of {known:?}"), "an unknown name".into()));
            }
        }
        for (name, var) in expected {
            let info = graph.tensor(var);
            let mut shape = info.shape.clone();
            if info.rate == Rate::MicroBatch
                && let Some(rows) = shape.first_mut()
            {
                *rows *= self.plan.micro_batches;
            }
            let want = format!("{:?} {shape:?}", info.dtype);
            match inputs.iter().find(|i| i.0 == name) {
                None => return Err(wrong(name, want, "nothing".into())),
                Some((_, t)) if t.shape != shape || t.dtype() != info.dtype => {
                    return Err(wrong(name, want, format!("{:?} {:?}", t.dtype(), t.shape)));
                }
                Some((_, t)) => {
                    if let Some(tokens) = self.vocabularies.get(name) {
                        tokens::check(name, t, *tokens)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A device's part of an input for one micro-batch.
    fn part(
        &self,
        var: Var,
        device: usize,
        micro_batch: usize,
        inputs: &BTreeMap<&str, &HostTensor>,
        learning_rate: f32,
    ) -> HostTensor {
        let graph = &self.plan.graph;
        let name = graph.producer(var).name.as_str();
        let info = graph.tensor(var);
        match name {
            RNG_INPUT => {
                // The session's seed moves the counter, so that seeds give different masks and meshes the same.
                let step = (init::mix(self.seed) as i32).wrapping_add(self.steps as i32);
                HostTensor::i32(&[2], vec![step, (micro_batch * self.rows()) as i32])
            }
            HYPER_INPUT => HostTensor::f32(&[2], vec![learning_rate, (self.steps + 1) as f32]),
            _ => {
                let mut region = local_part(graph, var, device);
                if info.rate == Rate::MicroBatch
                    && let Some(start) = region.start.first_mut()
                {
                    *start += micro_batch * info.shape[0];
                }
                take_box(inputs[name], &region)
            }
        }
    }

    /// Rows of a micro-batch.
    fn rows(&self) -> usize {
        let inputs = self.plan.graph.nodes().iter().filter(|n| matches!(n.op, NodeOp::Input) && n.name != RNG_INPUT);
        let rows = inputs.map(|n| self.plan.graph.tensor(n.outputs[0])).find(|t| t.rate == Rate::MicroBatch);
        rows.and_then(|t| t.shape.first().copied()).unwrap_or(0)
    }

    /// Puts the devices' parts together.
    fn report(&self, results: BTreeMap<(usize, Rate), Vec<Vec<HostTensor>>>) -> Result<StepReport, SessionError> {
        let graph = &self.plan.graph;
        let mut outputs: BTreeMap<String, HostTensor> = BTreeMap::new();
        let mut squares: Vec<f64> = Vec::new();
        for output in &graph.outputs {
            let info = graph.tensor(output.tensor);
            let placement = &graph.placements[graph.placement_of(output.tensor)];
            let layout = info.layout.as_ref().expect("the layout pass gives every tensor a layout");
            let firings = info.rate.per_step(self.plan.micro_batches);
            let shard = |device: &usize, firing: usize| {
                let key = (*device, info.rate);
                let port = self.fetches[&key].iter().position(|v| *v == output.tensor);
                results[&key][firing][port.expect("a device fetches the outputs that it holds")].clone()
            };
            let piece = |firing| {
                let shards: Vec<HostTensor> = placement.devices().iter().map(|d| shard(d, firing)).collect();
                gather(&shards, &info.shape, layout, placement)
            };
            let pieces = (0..firings).map(piece).collect::<Result<_, _>>()?;
            let whole = join(pieces);
            if output.name == GRAD_SQUARES_OUTPUT {
                let values = whole.as_f32().unwrap_or_default();
                squares.resize(values.len(), 0.0);
                squares.iter_mut().zip(values).for_each(|(sum, v)| *sum += f64::from(*v));
            } else {
                outputs.insert(output.name.clone(), whole);
            }
        }
        let loss = outputs.get("loss").and_then(|t| t.as_f32()).and_then(|v| v.first().copied());
        let grad_norm = (!squares.is_empty()).then(|| squares.iter().sum::<f64>().sqrt());
        Ok(StepReport { step: self.steps, loss, grad_norm, outputs })
    }

    /// Ends the session: waits for what runs, then stops all actors.
    ///
    /// # Errors
    /// The first cause, if the session had failed.
    pub fn shutdown(mut self) -> Result<(), SessionError> {
        match self.running.take() {
            Some(running) => Ok(running.shutdown().map(drop)?),
            None => Ok(()),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            // A failure was told by the call that met it.
            let _ = running.shutdown();
        }
    }
}

/// The external actions beside feeds.
fn gates(plan: &Plan) -> Vec<(ActorId, u32, u32)> {
    let mut out = Vec::new();
    for (actor, (spec, plans)) in plan.spec.actors.iter().zip(&plan.actions).enumerate() {
        for (index, (action, plan)) in spec.actions.iter().zip(plans).enumerate() {
            if action.external && !matches!(plan.key, ActionKey::Feed(_)) {
                out.push((ActorId(actor as u32), index as u32, action.per_step));
            }
        }
    }
    out
}

/// Joins tensors along their first dim; a scalar is the last one's.
fn join(mut pieces: Vec<HostTensor>) -> HostTensor {
    let last = pieces.pop().unwrap_or_else(|| HostTensor::f32(&[0], Vec::new()));
    if pieces.is_empty() || last.shape.is_empty() {
        return last;
    }
    pieces.push(last);
    let mut shape = pieces[0].shape.clone();
    shape[0] = pieces.iter().map(|p| p.shape[0]).sum();
    let floats: Option<Vec<&[f32]>> = pieces.iter().map(|p| p.as_f32()).collect();
    let data = match floats {
        Some(parts) => HostData::F32(parts.concat()),
        None => HostData::I32(pieces.iter().filter_map(|p| p.as_i32()).flatten().copied().collect()),
    };
    HostTensor { shape, data }
}

/// Makes the shell's programs of a plan's.
struct Loader<'a> {
    plan: &'a Plan,
    arenas: &'a [Arena],
    feeds: Vec<FeedPort>,
    fetches: BTreeMap<(usize, Rate), Vec<Var>>,
    sender: Sender<Fetched>,
}

impl Loader<'_> {
    fn programs(&mut self) -> Vec<Vec<ActionProgram>> {
        let actors = self.plan.actions.iter().enumerate();
        actors
            .map(|(actor, actions)| {
                let actor = ActorId(actor as u32);
                (0..actions.len()).map(|action| self.program(actor, action)).collect()
            })
            .collect()
    }

    fn program(&mut self, actor: ActorId, index: usize) -> ActionProgram {
        let action = &self.plan.actions[actor.0 as usize][index];
        let device = self.plan.spec.actors[actor.0 as usize].device;
        let mut launches = action.launches.clone();
        launches.extend(self.host_launch(actor, index, device, action));
        let name = format!("{} {}", self.plan.spec.actors[actor.0 as usize].name, action.name);
        let program = Program { name, launches, signals: action.signals.clone() };
        let fixed = |offset: usize| BaseRef::Fixed(Base { arena: self.arenas[device].clone(), offset });
        let scratch = self.plan.memory[device].scratch.get(&actor).map_or(0, |s| s.0);
        let bases = action.bases.iter().map(|base| match base {
            BaseKey::Fixed => fixed(0),
            BaseKey::Scratch => fixed(scratch),
            BaseKey::Input(port) => BaseRef::Input(*port),
            BaseKey::Output(port) => BaseRef::Output(*port),
        });
        ActionProgram { bases: bases.collect(), program: Arc::new(program) }
    }

    fn host_launch(&mut self, actor: ActorId, index: usize, device: usize, action: &ActionPlan) -> Option<Launch> {
        let port = action.host.as_ref()?;
        let launch = |kernel, reads, writes| Launch {
            op: Op::Custom(kernel),
            reads,
            writes,
            accumulate: false,
            workspace: None,
        };
        match action.key {
            ActionKey::Feed(rate) => {
                let (sender, receiver) = unbounded();
                let vars = port.vars.clone();
                self.feeds.push(FeedPort { actor, action: index as u32, device, rate, vars, sender });
                Some(launch(Arc::new(HostIn { receiver }), Vec::new(), port.buffers.clone()))
            }
            ActionKey::Fetch(rate) => {
                self.fetches.insert((device, rate), port.vars.clone());
                let kernel = HostOut { device, rate, sender: self.sender.clone() };
                Some(launch(Arc::new(kernel), port.buffers.clone(), Vec::new()))
            }
            _ => None,
        }
    }
}

/// A resident tensor's part on each device of its placement, in the placement's order.
pub(crate) fn resident_parts(plan: &Plan, var: Var) -> Vec<(usize, usize, Region)> {
    let placement = &plan.graph.placements[plan.graph.placement_of(var)];
    let part = |device: &usize| {
        let resident = plan.memory[*device].residents.iter().find(|r| r.var == var)?;
        Some((*device, resident.offset, resident.region.clone()))
    };
    placement.devices().iter().filter_map(part).collect()
}
