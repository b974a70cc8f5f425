//! A running plan: devices, arenas and actors; steps, results, parameters, metrics and the end.
//! Imports `plan`, `session::*`, and the actors' shell.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, select, unbounded};
use shardflow_actors::error::{ActorError, Failure, PeerError};
use shardflow_actors::remote::{HostPiece, Peers};
use shardflow_actors::shell::{Hosted, Loaded, RegisterMemory, Running, start};
use shardflow_actors::spec::{ActorId, RegisterId, StreamKind};
use shardflow_actors::watchdog::WatchdogOptions;
use shardflow_kernels::collective::Collective;
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::device::Device;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::tensor::{HostData, HostTensor, element_count};

use crate::cluster::roads::Ways;
use crate::cluster::world::World;
use crate::cluster::{Cluster, ClusterError};
use crate::graph::builder::{HYPER_INPUT, RNG_INPUT};
use crate::graph::{NodeOp, Rate, Var};
use crate::init;
use crate::layout_error::LayoutError;
use crate::passes::optimizer::GRAD_SQUARES_OUTPUT;
use crate::plan::memory::local_part;
use crate::plan::{Plan, ResidentTensor};
use crate::sbp::gather;
use crate::sbp::region::take_box;

pub mod checkpoint;
pub(crate) mod ending;
mod exchange;
pub mod host;
pub mod hosting;
mod load;
pub mod metrics;
pub mod snapshot;
mod tokens;

use checkpoint::CheckpointError;
use exchange::{Inbox, Word, tensor_of};
use host::Fetched;
use hosting::{HostPorts, Hosting};
use load::{FeedPort, Loader, fetches, gates};
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
    /// The other processes could not be joined.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
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
    /// The processes that run the plan together.
    pub cluster: Cluster,
    /// Set from outside, by a signal for instance, to have all processes told by [`StepReport::stop`] after the next step.
    pub stop: Option<Arc<AtomicBool>>,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { seed: 1337, watchdog: WatchdogOptions::default(), cluster: Cluster::local(), stop: None }
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
    /// Some process had been asked to stop before this step: the same for all.
    pub stop: bool,
}

/// A running plan, or this process's part of one. Dropping it shuts it down.
pub struct Session {
    plan: Plan,
    hosting: Hosting,
    /// Of this process.
    devices: Vec<Device>,
    /// By device; of this process, and of peers whose memory is mapped here.
    arenas: BTreeMap<usize, Arena>,
    engine: Arc<dyn Collective>,
    running: Option<Running>,
    world: Option<World>,
    feeds: Vec<FeedPort>,
    /// External actions that are fed nothing, each with its firings in a step.
    gates: Vec<(ActorId, u32, u32)>,
    fetched: Receiver<Fetched>,
    /// What processes give each other; all know all of it.
    ports: Arc<HostPorts>,
    inbox: Mutex<Inbox>,
    /// Why a step failed; what devices hold is worth nothing then, and may still change.
    failed: Option<Failure>,
    /// What each device's fetches bring, in order; of all devices.
    fetches: BTreeMap<(usize, Rate), Vec<Var>>,
    /// Inputs that hold token ids, and how many tokens there are.
    vocabularies: BTreeMap<String, usize>,
    steps: u64,
    seed: u64,
    stop: Option<Arc<AtomicBool>>,
    step_metrics: StepMetrics,
}

/// How long a session that ends waits for firings that are under way.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long peers may take to give what all are to have, between steps.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(60);

impl Session {
    /// Joins the other processes, if there are any; allocates each device's arena, makes the initial weights and starts the
    /// actors. All processes call it with the same plan.
    ///
    /// # Errors
    /// When memory, threads or peers cannot be had.
    pub fn start(plan: Plan, options: &SessionOptions) -> Result<Self, SessionError> {
        let world = World::join(&options.cluster, &plan, options.seed)?;
        let hosting = world.as_ref().map_or(Hosting::alone(plan.memory.len()), |w| w.hosting());
        let in_process: Arc<dyn Collective> = Arc::new(InProcess::new());
        let (mut devices, mut arenas) = (Vec::new(), BTreeMap::new());
        for rank in hosting.own() {
            let device = Device::cpu(rank, plan.threads_per_device, in_process.clone());
            let bytes = plan.memory[rank].total_bytes;
            let shared = world.as_ref().is_some_and(World::shares_memory);
            arenas.insert(rank, if shared { device.shared_arena(bytes)? } else { device.arena(bytes)? });
            devices.push(device);
        }
        let ports = Arc::new(HostPorts::of(&plan, &hosting));
        let (host, from_peers) = unbounded();
        let ways = match &world {
            Some(world) => world.connect(&plan, &devices, &arenas, in_process)?,
            None => Ways::alone(in_process),
        };
        arenas.extend(ways.mapped);
        let (sender, fetched) = unbounded();
        let mut loader = Loader { plan: &plan, arenas: &arenas, feeds: Vec::new(), sender };
        let own = hosting.actors_of(&plan, hosting.process);
        let mut hosted = BTreeMap::new();
        for id in &own {
            let actor = &plan.spec.actors[id.0 as usize];
            let device = &devices[actor.device - hosting.own().start];
            let threads = if actor.stream == StreamKind::Compute { plan.threads_per_device } else { 1 };
            let stream = device.stream_with(&actor.name, threads, ways.engine.clone())?;
            hosted.insert(*id, Hosted { stream, programs: loader.programs(*id) });
        }
        let feeds = loader.feeds;
        let mut memory = ways.mirrors;
        for (index, place) in plan.registers.iter().enumerate() {
            let Some(arena) = arenas.get(&place.device) else { continue };
            let base = Base { arena: arena.clone(), offset: place.offset };
            memory.insert(RegisterId(index as u32), RegisterMemory { base, stride: place.stride });
        }
        let loaded = Loaded {
            spec: Arc::new(plan.spec.clone()),
            hosted,
            memory,
            engine: ways.engine.clone(),
            peers: Peers { peers: ways.peers, host_ports: ports.ports.clone(), host: Some(host) },
        };
        let mut session = Self {
            vocabularies: tokens::vocabularies(&plan.graph),
            gates: gates(&plan, &own),
            fetches: fetches(&plan),
            plan,
            hosting,
            devices,
            arenas,
            engine: ways.engine,
            running: None,
            world,
            feeds,
            fetched,
            inbox: Mutex::new(Inbox::new(ports.clone(), from_peers)),
            ports,
            failed: None,
            steps: 0,
            seed: options.seed,
            stop: options.stop.clone(),
            step_metrics: StepMetrics::new(),
        };
        session.initialise()?;
        let running = start(loaded, options.watchdog.clone())?;
        if let Some(world) = &session.world {
            world.watch(&running)?;
        }
        session.running = Some(running);
        Ok(session)
    }

    /// Makes each device's part of each parameter.
    fn initialise(&self) -> Result<(), SessionError> {
        for device in self.hosting.own() {
            for resident in &self.plan.memory[device].residents {
                let NodeOp::Parameter { init } = self.plan.graph.producer(resident.var).op else { continue };
                let info = self.plan.graph.tensor(resident.var);
                let mut data = vec![0.0; resident.region.element_count()];
                init::fill(init, self.seed, &info.name, &info.shape, &resident.region, &mut data);
                let part = HostTensor::f32(&resident.region.size, data);
                self.arenas[&device].write_host(resident.offset, &part)?;
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
        let stop = self.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed));
        self.say([u64::from(stop), 0]);
        let micro_batches = self.plan.micro_batches;
        let ports = self.ports.clone();
        let mut wanted: Vec<_> =
            ports.fetches.iter().map(|((_, rate), port)| (*port, rate.per_step(micro_batches))).collect();
        wanted.extend(ports.words_wanted());
        self.receive(&wanted).map_err(|failure| self.fail(failure))?;
        let mut inbox = self.lock_inbox();
        let results =
            ports.fetches.iter().zip(&wanted).map(|((key, port), (_, count))| (*key, inbox.take(*port, *count)));
        let results = results.collect();
        let stop = inbox.take_words().iter().any(|word| word[0] != 0);
        drop(inbox);
        let report = StepReport { stop, ..self.report(results)? };
        self.steps += 1;
        self.step_metrics.record(&report, begin.elapsed());
        Ok(report)
    }

    /// Gives this process's word to all.
    fn say(&self, word: Word) {
        let port = self.ports.words[self.hosting.process as usize];
        self.give(&mut self.lock_inbox(), HostPiece { port, tensors: vec![tensor_of(word)] });
    }

    /// Gives a piece of this process to all, itself included.
    fn give(&self, inbox: &mut Inbox, piece: HostPiece) {
        if let Some(running) = self.running.as_ref().filter(|_| self.hosting.processes > 1) {
            running.give_host(piece.clone());
        }
        inbox.put(piece);
    }

    /// Every process's word, by its number, when all have given one: between steps, in the same order on all.
    fn exchange(&mut self, word: Word) -> Result<Vec<Word>, SessionError> {
        self.say(word);
        let wanted: Vec<_> = self.ports.words_wanted().collect();
        self.receive(&wanted).map_err(|failure| self.fail(failure))?;
        Ok(self.lock_inbox().take_words())
    }

    fn lock_inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all these pieces have come, and passes on those of this process's fetches.
    fn receive(&self, wanted: &[(u32, usize)]) -> Result<(), Failure> {
        let ended = || Failure::Stalled { idle_ms: 0, report: "the session has ended".into() };
        let running = self.running.as_ref().ok_or_else(ended)?;
        let mut inbox = self.lock_inbox();
        let peers = inbox.peers.clone();
        while !inbox.has(wanted) {
            if let Some(process) = inbox.never(wanted) {
                let failure = Failure::Peer { process, cause: PeerError::Ended };
                running.control().fail(failure.clone());
                return Err(failure);
            }
            select! {
                recv(self.fetched) -> message => {
                    let Fetched { device, rate, tensors } = message.map_err(|_| ended())?;
                    let port = self.ports.fetches[&(device, rate)];
                    self.give(&mut inbox, HostPiece { port, tensors });
                },
                recv(peers) -> said => inbox.hear(said.map_err(|_| ended())?),
                recv(running.failures()) -> failure => return Err(failure.unwrap_or_else(|_| ended())),
            }
        }
        Ok(())
    }

    /// Gives peers the parameters that they read, after they were written here; all processes call it.
    fn refresh(&mut self) -> Result<(), SessionError> {
        let Some(running) = &mut self.running else { return Ok(()) };
        running.refresh(EXCHANGE_TIMEOUT).map_err(|failure| self.fail(failure))
    }

    /// The first cause of a failure, once all processes have said what they saw.
    fn fail(&mut self, failure: Failure) -> SessionError {
        let first = self.world.as_ref().map_or(failure.clone(), |world| world.settle(failure));
        self.failed = Some(first.clone());
        first.into()
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
        Ok(StepReport { step: self.steps, loss, grad_norm, outputs, stop: false })
    }

    /// Ends the session: waits for what runs, then stops all actors.
    ///
    /// # Errors
    /// The first cause, if the session had failed.
    pub fn shutdown(mut self) -> Result<(), SessionError> {
        Ok(self.end()?)
    }

    fn end(&mut self) -> Result<(), Failure> {
        let Some(running) = self.running.take() else { return Ok(()) };
        if self.failed.is_none() && self.world.is_some() {
            // Peers may still need what is under way here.
            running.quiesce(QUIESCE_TIMEOUT)?;
        }
        if let Some(world) = &self.world {
            world.leave();
        }
        running.shutdown().map(drop)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A failure was told by the call that met it.
        let _ = self.end();
    }
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

/// A resident tensor's part on each device of its placement, in the placement's order, with its index among the device's.
pub(crate) fn resident_parts(plan: &Plan, var: Var) -> Vec<(usize, usize, &ResidentTensor)> {
    let placement = &plan.graph.placements[plan.graph.placement_of(var)];
    let part = |device: &usize| {
        let mut residents = plan.memory[*device].residents.iter().enumerate();
        let (index, resident) = residents.find(|(_, r)| r.var == var)?;
        Some((*device, index, resident))
    };
    placement.devices().iter().filter_map(part).collect()
}
