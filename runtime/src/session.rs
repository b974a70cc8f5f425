//! A session runs a plan: it owns devices, arenas and actors, and provides steps, results, parameters, metrics and
//! shutdown.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Once, OnceLock, Weak};
use std::thread::available_parallelism;
use std::time::Duration;

use crossbeam_channel::{Receiver, after, never, select, unbounded};
use parking_lot::Mutex;
use shardflow_actors::error::{ActorError, Failure, PeerError};
use shardflow_actors::remote::{HostPiece, Peers};
use shardflow_actors::shell::{ActorHost, LoadedPlan, RegisterMemory, RunningSession, prepare};
use shardflow_actors::spec::{ActorId, RegisterId, StreamKind};
use shardflow_actors::watchdog::{OnStall, WatchdogOptions};
use shardflow_kernels::collective::Collective;
use shardflow_kernels::device::{Device, DeviceKind, Priority};
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::{Arena, Base};
use shardflow_kernels::tensor::HostTensor;

use crate::cluster::ClusterError;
use crate::cluster::connector::Connections;
use crate::cluster::world::{self, WAITING, World};
use crate::declare::{Declarations, DeclareError, MAX_NORM, OPTIMIZER, OnResume};
use crate::graph::optimizer::Bounds;
use crate::graph::{NodeOp, Rate, Var};
use crate::init;
use crate::layout_error::LayoutError;
use crate::metrics as names;
use crate::passes::THREADS_MAX;
use crate::plan::lower::threads_of;
use crate::plan::validate::PlanError;
use crate::plan::{Plan, ResidentTensor};
use shardflow_job::exit::Exit;
use shardflow_job::machine::{affinity, threads_per_device};
use shardflow_job::requests::{Request, Requests};

pub mod agreement;
pub(crate) mod budget;
pub mod checkpoint;
pub mod devices;
pub(crate) mod error_exit;
mod exchange;
pub mod host;
mod load;
pub mod metrics;
pub mod numerics;
pub mod observer;
mod options;
pub mod plan_files;
pub mod process_map;
mod saver;
pub mod snapshot;
mod step;
mod tokens;

use agreement::{RankDisagreement, SharedInput, shared_inputs};
use budget::Budget;
use checkpoint::CheckpointError;
use devices::ProcessDevices;
use exchange::{Inbox, NumberPair, tensor_of};
use host::Fetched;
use load::{FeedPort, Loader, external_actions, fetches};
use metrics::{Metrics, MetricsSource, StepMetrics};
use numerics::{NonFinite, OnNonFinite};
use observer::{Observer, RecentSteps};
pub use options::{SessionOptions, Threads};
use process_map::{HostPorts, ProcessMap};

/// Errors of a session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// An actor, a kernel or a collective failed; this is the first cause.
    #[error("{0}")]
    Failed(#[from] Failure),
    /// The actors cannot be started, or do not accept a message.
    #[error(transparent)]
    Actors(#[from] ActorError),
    /// With the buffers for data of other processes, the plan exceeds its memory budget or the node's memory.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A device is not available, or memory cannot be allocated.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The devices' results do not form the tensors of the program.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// This process cannot join the other processes.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// A checkpoint or a parameter file cannot be read or written, or does not fit the program.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A value cannot be declared.
    #[error(transparent)]
    Declared(#[from] DeclareError),
    /// Ranks have different values where all must have the same; nothing was updated or loaded.
    #[error(transparent)]
    Disagreement(#[from] RankDisagreement),
    /// The plan was written to files, as the variables of `shardflow plan` request; nothing was run.
    #[error("the plan was written and nothing was run, because {} or a related variable is set", plan_files::PLAN_HTML)]
    PlanWritten,
    /// A file for the plan cannot be written.
    #[error("cannot write the plan to {path}: {source}")]
    PlanFile {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The loss or the gradients of a step are Inf or NaN.
    #[error("{0}")]
    NonFinite(Box<NonFinite>),
    /// A tensor given to [`Session::step`] does not match the program's input.
    #[error("input {name}: expected {expected}, got {got}")]
    Input {
        /// Name of the input.
        name: String,
        /// What the graph requires.
        expected: String,
        /// The given tensor.
        got: String,
    },
}

/// The result of a step.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Steps done before this one.
    pub step: u64,
    /// The loss, if the program minimizes one.
    pub loss: Option<f32>,
    /// Global norm of the gradients before clipping, if there are any.
    pub grad_norm: Option<f64>,
    /// Every output by name, for the whole batch; [`crate::graph::Combine`] describes outputs computed once per
    /// micro-batch.
    pub outputs: BTreeMap<String, HostTensor>,
    /// The request that the processes agreed on in this step; equal on all of them. See [`shardflow_job::requests`].
    pub request: Request,
    /// Set if the loss or gradients are Inf or NaN and [`SessionOptions::on_non_finite`] accepts that; nothing was
    /// updated.
    pub non_finite: Option<NonFinite>,
}

/// A running plan, or this process's part of it. Dropping the session shuts it down.
pub struct Session {
    plan: Arc<Plan>,
    process_map: ProcessMap,
    /// The processes of this node.
    node_processes: Vec<u32>,
    budget: Budget,
    /// Devices of this process.
    devices: Vec<Device>,
    /// By device: arenas of this process, and those of peers whose memory is mapped here.
    arenas: BTreeMap<usize, Arena>,
    engine: Arc<dyn Collective>,
    running: Option<RunningSession>,
    world: Option<Arc<World>>,
    /// Name of the job, if it has one, and the number of its current incarnation, as known to this process.
    job: (Option<String>, u64),
    feeds: Vec<FeedPort>,
    /// External actions without input tensors, each with its firings per step.
    external_actions: Vec<(ActorId, u32, u32)>,
    fetched: Receiver<Fetched>,
    /// Ports of host data between processes; equal on all processes.
    ports: Arc<HostPorts>,
    inbox: Mutex<Inbox>,
    /// Why a step failed. After a failure the contents of device memory are invalid and may still change.
    failed: Option<Failure>,
    /// Tensors of each device's fetches, in order; for all devices.
    fetches: BTreeMap<(usize, Rate), Vec<Var>>,
    /// Inputs that hold token ids, with the size of the vocabulary.
    vocabularies: BTreeMap<String, usize>,
    /// Inputs that several processes feed; the same list on all processes.
    shared_inputs: Vec<SharedInput>,
    declared: Declarations,
    ignoring: Vec<String>,
    steps: u64,
    /// Updates applied, as used by the optimizer's bias correction. A skipped step applies none.
    updates: u64,
    /// Checkpoints of steps after the restored one, up to this step, were found damaged.
    damaged_up_to: u64,
    seed: u64,
    requests: Option<Arc<Requests>>,
    /// Duration of the last step.
    last_step: Duration,
    /// Longest wait for live processes between steps.
    wait_max: Duration,
    on_non_finite: OnNonFinite,
    skipped_in_a_row: u32,
    /// Bounds of parameters and moments; equal on all processes.
    bounds: Bounds,
    step_metrics: StepMetrics,
    /// `Some` while the actors run.
    observer: Option<Arc<Observer>>,
}

/// The warning for kernels built with this optimization level, which may be fifty times slower.
fn slow_build_warning(opt_level: &str) -> Option<String> {
    let advice = "build with --release, or add to Cargo.toml: [profile.dev.package.\"*\"] opt-level = 3";
    matches!(opt_level, "0" | "1")
        .then(|| format!("warning: the kernels are built with opt-level {opt_level} and are slow; {advice}"))
}

/// How long a session that shuts down waits for running firings.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(10);

/// Activity of a process between calls of the session, and during steps, which the watchdog monitors.
const BETWEEN_STEPS: &str = "running the program";

impl Session {
    /// Joins the other processes, if any, allocates each device's arena, creates the initial weights and starts the
    /// actors. All processes call it with the same plan.
    ///
    /// # Errors
    /// When memory, threads or peers are not available; [`PlanError::NodeMemory`] before anything is allocated.
    pub fn start(plan: Plan, options: &SessionOptions) -> Result<Self, SessionError> {
        plan_files::write_requested(&plan)?;
        options.declared.check()?;
        if options.cluster.is_first() {
            static WARNING: Once = Once::new();
            WARNING.call_once(|| {
                slow_build_warning(shardflow_kernels::OPT_LEVEL).into_iter().for_each(|text| eprintln!("{text}"))
            });
        }
        let budget = Budget::measure(&plan);
        let world = World::join(&plan, options).map_err(world::named)?.map(Arc::new);
        Self::start_in_world(plan, options, budget, world.clone()).map_err(|error| match world {
            Some(world) => world.cannot_start(error),
            None => error,
        })
    }

    fn start_in_world(
        mut plan: Plan,
        options: &SessionOptions,
        budget: Budget,
        world: Option<Arc<World>>,
    ) -> Result<Self, SessionError> {
        let set_activity = |activity| world.iter().for_each(|world| world.doing(activity));
        set_activity("opening devices");
        if let Some(world) = &world {
            world.count_mirrors(&mut plan)?;
        }
        let process_map = world.as_ref().map_or(ProcessMap::alone(plan.memory.len()), |w| w.process_map());
        let node_processes = world.as_ref().map_or(vec![0], |world| world.here());
        if options.threads == Threads::Owned && plan.device == DeviceKind::Cpu {
            plan.set_threads(owned_threads(world.as_deref(), &process_map, &node_processes));
        }
        budget.check(&plan, &process_map, &node_processes, 0)?;
        let on_node = process_map.on_node(node_processes.iter().copied(), process_map.process);
        let takes_pipes = world.as_ref().is_some_and(|world| world.takes_pipes());
        let ids: devices::IdSource<'_> = &|groups| match &world {
            Some(world) => {
                world.doing(WAITING);
                world.nccl_ids(groups)
            }
            None => devices::new_ids(groups),
        };
        let ProcessDevices { devices, engine: in_process, pipes } =
            devices::open(&plan, &process_map, on_node, takes_pipes, ids)?;
        set_activity("allocating memory");
        let shared = world.as_ref().is_some_and(|world| world.shares_memory(plan.device));
        let mut arenas = BTreeMap::new();
        for device in &devices {
            let bytes = plan.memory[device.rank()].arena_bytes;
            arenas.insert(device.rank(), if shared { device.shared_arena(bytes)? } else { device.arena(bytes)? });
        }
        let shared_inputs = shared_inputs(&plan, &process_map);
        let ports = Arc::new(HostPorts::of(&plan, &process_map, &shared_inputs));
        let (host, from_peers) = unbounded();
        set_activity(WAITING);
        let connections = match &world {
            Some(world) => world.connect(&plan, &devices, &arenas, in_process, pipes)?,
            None => Connections::alone(in_process),
        };
        arenas.extend(connections.mapped);
        set_activity("preparing kernels");
        let (sender, fetched) = unbounded();
        let mut loader = Loader { plan: &plan, arenas: &arenas, feeds: Vec::new(), sender };
        let own = process_map.actors_of(&plan, process_map.process);
        let mut hosted = BTreeMap::new();
        for id in &own {
            let actor = &plan.spec.actors[id.0 as usize];
            let device = &devices[actor.device - process_map.own().start];
            let threads = threads_of(actor.stream, plan.threads_per_device);
            let urgent = actor.stream == StreamKind::Communication;
            let priority = if urgent { Priority::High } else { Priority::Normal };
            let stream = device.stream_with(&actor.name, threads, connections.engine.clone(), priority)?;
            let programs = loader.programs(*id);
            programs.iter().try_for_each(|action| stream.prepare(&action.program))?;
            hosted.insert(*id, ActorHost { stream, programs });
        }
        let feeds = loader.feeds;
        let is_piped = |register: &RegisterId| connections.peers.iter().any(|peer| peer.pipes.contains_key(register));
        let transport = |register: &RegisterId| (*register, if is_piped(register) { "nccl" } else { "socket" });
        let mirrored = connections.mirrors.keys().map(transport).collect();
        let mut memory = connections.mirrors;
        for (index, place) in plan.registers.iter().enumerate() {
            let Some(arena) = arenas.get(&place.device) else { continue };
            let base = Base { arena: arena.clone(), offset: place.offset };
            memory.insert(RegisterId(index as u32), RegisterMemory { base, stride: place.stride });
        }
        let loaded = LoadedPlan {
            spec: Arc::new(plan.spec.clone()),
            hosted,
            memory,
            engine: connections.engine.clone(),
            peers: Peers { peers: connections.peers, host_ports: ports.ports.clone(), host: Some(host) },
        };
        let plan = Arc::new(plan);
        let step_tokens = tokens::tokens_per_step(&plan);
        let fetches = fetches(&plan);
        // A channel without senders counts as closed.
        let has_fetches = fetches.keys().any(|(device, _)| process_map.own().contains(device));
        let fetched = if has_fetches { fetched } else { never() };
        let publishes = options.publishes_metrics;
        let step_metrics = StepMetrics::new(&plan, &process_map, step_tokens, options);
        if publishes {
            // Once per process, even if it starts several sessions.
            static RESTARTS: Once = Once::new();
            let restart = |code: &u8| ::metrics::counter!(names::RESTARTS, "cause" => code.to_string()).increment(1);
            RESTARTS.call_once(|| options.cluster.restart_causes.iter().for_each(restart));
        }
        let mut session = Self {
            vocabularies: tokens::vocabularies(&plan.graph),
            shared_inputs,
            declared: match plan.graph.objective.map(|objective| objective.optimizer) {
                Some(adamw) => {
                    let declared = options.declared.clone().declare(OPTIMIZER, adamw, OnResume::Warn);
                    declared.declare(MAX_NORM, adamw.max_norm, OnResume::Warn)
                }
                None => options.declared.clone(),
            },
            ignoring: options.ignoring.clone(),
            external_actions: external_actions(&plan, &own),
            fetches,
            plan,
            process_map,
            node_processes,
            budget,
            devices,
            arenas,
            engine: connections.engine,
            running: None,
            world,
            job: options.cluster.job(),
            feeds,
            fetched,
            inbox: Mutex::new(Inbox::new(ports.clone(), from_peers)),
            ports,
            failed: None,
            steps: 0,
            updates: 0,
            damaged_up_to: 0,
            seed: options.seed,
            requests: options.requests.clone(),
            last_step: Duration::ZERO,
            wait_max: options.watchdog.wait_max(),
            on_non_finite: options.on_non_finite,
            skipped_in_a_row: 0,
            bounds: Bounds::default(),
            step_metrics,
            observer: None,
        };
        session.set_activity("making initial weights");
        session.initialize()?;
        let observer_slot = Arc::new(OnceLock::new());
        let mut running = prepare(loaded, with_stall_recording(&options.watchdog, observer_slot.clone()))?;
        if let Some(world) = &session.world {
            // Before `begin` waits, so that a failure elsewhere can end that wait.
            world.watch(&running);
        }
        session.set_activity(WAITING);
        running.begin()?;
        session.set_activity(BETWEEN_STEPS);
        let source = MetricsSource { devices: session.devices.clone(), engine: session.engine.clone() };
        let (plan, world) = (session.plan.clone(), session.world.as_ref());
        let steps = RecentSteps { tokens: step_tokens, planned: options.steps_planned, ..RecentSteps::default() };
        let observer = Observer::new(plan, session.process_map, running.control(), source, world, mirrored, steps);
        for (index, code) in options.cluster.restart_causes.iter().enumerate() {
            observer.note("restart", format!("attempt {index} of the job ended with {}", Exit::from_code(*code)));
        }
        let publishes = options.publishes_metrics;
        let training_time = session.step_metrics.training_time();
        let observer = Arc::new(if publishes { observer.with_metrics(training_time) } else { observer });
        // This is the only place that sets it.
        let _ = observer_slot.set(Arc::downgrade(&observer));
        session.observer = Some(observer);
        session.running = Some(running);
        Ok(session)
    }

    /// Creates each device's part of each parameter.
    fn initialize(&mut self) -> Result<(), SessionError> {
        let plan = self.plan.clone();
        // Including parameters of other processes.
        let largest = plan.graph.nodes().iter().map(|node| match node.op {
            NodeOp::Parameter { init } => init.magnitude_bound(),
            _ => 0.0,
        });
        self.bounds.parameter = largest.fold(0.0, f64::max);
        for device in self.process_map.own() {
            for resident in &plan.memory[device].residents {
                let NodeOp::Parameter { init } = plan.graph.producer(resident.var).op else { continue };
                let info = plan.graph.tensor(resident.var);
                let mut data = vec![0.0; resident.region.element_count()];
                init::fill(init, self.seed, &info.name, &info.shape, &resident.region, &mut data);
                self.write_resident(device, resident, &HostTensor::f32(&resident.region.size, data))?;
            }
        }
        Ok(())
    }

    /// Writes a device's part of a parameter or a state, and its bf16 copy if there is one.
    fn write_resident(
        &mut self,
        device: usize,
        resident: &ResidentTensor,
        part: &HostTensor,
    ) -> Result<(), SessionError> {
        self.update_bounds(resident.var, part);
        let arena = &self.arenas[&device];
        arena.write_host(resident.offset, part)?;
        if let (Some(offset), Some(values)) = (resident.bf16_offset, part.as_f32()) {
            arena.write_host(offset, &HostTensor::bf16(&part.shape, values))?;
        }
        Ok(())
    }

    /// Publishes this process's activity, see [`World::doing`].
    fn set_activity(&self, activity: &str) {
        self.world.iter().for_each(|world| world.doing(activity));
    }

    /// Returns the failure of an earlier step, if there was one.
    fn check_not_failed(&self) -> Result<(), SessionError> {
        self.failed.clone().map_or(Ok(()), |failure| Err(failure.into()))
    }

    /// The plan that runs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The observer, which any thread may use while the session runs; `None` after the session has ended.
    pub fn observer(&self) -> Option<&Arc<Observer>> {
        self.observer.as_ref()
    }

    /// The session's progress and memory use. Cheap: it pauses nothing.
    pub fn metrics(&self) -> Metrics {
        let after_end = || {
            let (devices, engine) = (self.devices.clone(), self.engine.clone());
            MetricsSource { devices, engine }.metrics(&self.plan, self.steps, &[])
        };
        self.observer.as_ref().map_or_else(after_end, |observer| {
            observer.set_steps(self.steps);
            observer.metrics()
        })
    }

    /// True on rank 0, the only process that prints output for all.
    pub fn is_first(&self) -> bool {
        self.process_map.process == 0
    }

    /// Steps done, including those before a restored checkpoint.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Updates applied, including restored ones; fewer than [`Session::steps`] if non-finite steps were skipped.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Sends this process's number pair to all processes.
    fn send_pair(&self, pair: NumberPair) {
        self.send_numbers(self.ports.pairs[self.process_map.process as usize], &pair);
    }

    /// Sends numbers to all processes through a port of this process.
    fn send_numbers(&self, port: u32, numbers: &[u64]) {
        self.send(&mut self.inbox.lock(), HostPiece { port, tensors: vec![tensor_of(numbers)] });
    }

    /// Sends a piece of this process to all processes, including itself.
    fn send(&self, inbox: &mut Inbox, piece: HostPiece) {
        if let Some(running) = self.running.as_ref().filter(|_| self.process_map.processes > 1) {
            running.send_host_piece(piece.clone());
        }
        inbox.put(piece);
    }

    /// Sends a number pair and waits for one of every process. Returns them in the order of ranks.
    fn exchange(&mut self, pair: NumberPair) -> Result<Vec<NumberPair>, SessionError> {
        self.send_pair(pair);
        let ports = self.ports.clone();
        let pairs = self.receive_numbers_between_steps(&ports.pairs)?.into_iter();
        Ok(pairs.map(|pair| [0, 1].map(|index| pair.get(index).copied().unwrap_or_default())).collect())
    }

    /// Receives one message of numbers from each of these ports. `limit`: as in [`Session::receive`].
    fn receive_numbers(&mut self, ports: &[u32], limit: Option<Duration>) -> Result<Vec<Vec<u64>>, SessionError> {
        let wanted: Vec<_> = ports.iter().map(|port| (*port, 1)).collect();
        self.receive(&wanted, limit).map_err(|failure| self.fail(failure))?;
        Ok(self.inbox.lock().take_numbers(ports))
    }

    /// Waits for these pieces, and forwards results of this process's fetches. A piece missing after `limit` fails the
    /// session.
    fn receive(&self, wanted: &[(u32, usize)], limit: Option<Duration>) -> Result<(), Failure> {
        let received = self.receive_within(wanted, limit);
        if let (Err(failure @ Failure::Peer { .. }), Some(running)) = (&received, &self.running) {
            running.control().fail(failure.clone());
        }
        received
    }

    /// Like [`Session::receive`], without failing the session.
    fn receive_within(&self, wanted: &[(u32, usize)], limit: Option<Duration>) -> Result<(), Failure> {
        let timeout = limit.map_or_else(never, after);
        let stopped = || {
            let cause = "the session has ended".into();
            Failure::Stalled { idle_ms: 0, cause, process: None, report: String::new() }
        };
        let running = self.running.as_ref().ok_or_else(stopped)?;
        // A closed channel means that the session has failed, so that failure is the result.
        let ended = || running.first_failure().unwrap_or_else(stopped);
        let mut inbox = self.inbox.lock();
        let peers = inbox.peers.clone();
        while !inbox.has_all(wanted) {
            running.host_waits_for(inbox.missing_sender(wanted).filter(|sender| *sender != self.process_map.process));
            if let Some(process) = inbox.ended_sender(wanted) {
                return Err(Failure::Peer { process, cause: PeerError::Ended });
            }
            select! {
                recv(self.fetched) -> message => {
                    let Fetched { device, rate, tensors, clock } = message.map_err(|_| ended())?;
                    clock.join();
                    let port = self.ports.fetches[&(device, rate)];
                    self.send(&mut inbox, HostPiece { port, tensors });
                },
                recv(peers) -> message => inbox.receive(message.map_err(|_| ended())?),
                recv(running.failures()) -> failure => return Err(failure.unwrap_or_else(|_| ended())),
                recv(timeout) -> _ => {
                    let process = inbox.missing_sender(wanted).unwrap_or(self.process_map.process);
                    let seconds = limit.unwrap_or_default().as_secs();
                    return Err(Failure::Peer { process, cause: PeerError::Late { seconds } });
                }
            }
        }
        running.host_waits_for(None);
        Ok(())
    }

    /// Sends peers the parameters that they read, after this process has written them; all processes call it.
    fn refresh(&mut self) -> Result<(), SessionError> {
        self.set_activity(WAITING);
        let Some(running) = &mut self.running else { return Ok(()) };
        running.refresh().map_err(|failure| self.fail(failure))?;
        self.agree_on_bounds()?;
        self.set_activity(BETWEEN_STEPS);
        Ok(())
    }

    /// Records a failure and returns its first cause, once all processes have reported theirs.
    fn fail(&mut self, failure: Failure) -> SessionError {
        let first = self.world.as_ref().map_or(failure.clone(), |world| world.settle(failure));
        self.failed = Some(first.clone());
        first.into()
    }

    /// Shuts the session down: waits for running work, then stops all actors.
    ///
    /// # Errors
    /// The first cause, if the session has failed.
    pub fn shutdown(mut self) -> Result<(), SessionError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), SessionError> {
        let finished = if self.failed.is_none() { self.finish_with_peers() } else { Ok(()) };
        let finished = finished.map_err(|failure| self.fail(failure));
        let Some(running) = self.running.take() else { return Ok(()) };
        if let Some(observer) = self.observer.take() {
            observer.sample();
        }
        if let Some(world) = &self.world {
            world.leave();
        }
        let ended = running.shutdown();
        finished?;
        Ok(ended.map(drop)?)
    }

    /// Finishes this process's work and waits for the others: closing a connection earlier may lose the last data sent.
    fn finish_with_peers(&self) -> Result<(), Failure> {
        let (Some(running), Some(_)) = (&self.running, &self.world) else { return Ok(()) };
        running.quiesce(QUIESCE_TIMEOUT)?;
        self.send_pair([0; 2]);
        let wanted: Vec<_> = self.ports.wanted_pairs().collect();
        // A peer that is late or has left needs nothing from this process.
        let _ = self.receive_within(&wanted, Some(QUIESCE_TIMEOUT));
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The call that failed has returned its error already.
        let _ = self.end();
    }
}

/// Threads of each device under [`Threads::Owned`].
fn owned_threads(world: Option<&World>, process_map: &ProcessMap, node_processes: &[u32]) -> usize {
    let (quota, own) = (available_parallelism().map_or(1, usize::from), affinity());
    let cores = |process: &u32| world.map_or(&own[..], |world| world.cores(*process));
    let shares = node_processes.iter().map(|process| (cores(process), process_map.devices_of(*process).len()));
    let own_index = node_processes.iter().position(|process| *process == process_map.process);
    threads_per_device(&shares.collect::<Vec<_>>(), own_index.unwrap_or(0), quota).min(THREADS_MAX)
}

/// The same options, with a callback that counts stalls and records them as incidents.
fn with_stall_recording(options: &WatchdogOptions, observer: Arc<OnceLock<Weak<Observer>>>) -> WatchdogOptions {
    let user_callback = options.on_stall.clone();
    let on_stall: OnStall = Arc::new(move |report| {
        ::metrics::counter!(names::STALLS).increment(1);
        if let Some(observer) = observer.get().and_then(Weak::upgrade) {
            observer.note("stall", report.lines().next().unwrap_or_default().to_owned());
        }
        user_callback.iter().for_each(|callback| callback(report));
    });
    WatchdogOptions { on_stall: Some(on_stall), ..options.clone() }
}

/// A resident tensor's part on each device of its placement, in the placement's order, with its index among the
/// device's residents.
pub(crate) fn resident_parts(plan: &Plan, var: Var) -> Vec<(usize, usize, &ResidentTensor)> {
    let placement = &plan.graph.placements[plan.graph.placement_of(var)];
    let part = |device: &usize| {
        let mut residents = plan.memory[*device].residents.iter().enumerate();
        let (index, resident) = residents.find(|(_, r)| r.var == var)?;
        Some((*device, index, resident))
    };
    placement.devices().iter().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_builds_are_reported() {
        assert!(
            ["0", "1"].iter().all(|level| slow_build_warning(level).is_some_and(|text| text.contains("opt-level = 3")))
        );
        assert!(["2", "3", "s", "z"].iter().all(|level| slow_build_warning(level).is_none()));
        assert_eq!(slow_build_warning(shardflow_kernels::OPT_LEVEL), None, "the project's own builds are optimized");
    }
}
