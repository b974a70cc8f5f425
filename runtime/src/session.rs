//! A running plan: devices, arenas and actors; steps, results, parameters, metrics and the end.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError, Weak};
use std::thread::available_parallelism;
use std::time::Duration;

use crossbeam_channel::{Receiver, after, never, select, unbounded};
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

use crate::cluster::connector::Connections;
use crate::cluster::world::{self, WAITING, World};
use crate::cluster::{Cluster, ClusterError};
use crate::declare::{Declarations, DeclareError};
use crate::exit::Exit;
use crate::graph::optimizer::Bounds;
use crate::graph::{NodeOp, Rate, Var};
use crate::init;
use crate::layout_error::LayoutError;
use crate::machine::{affinity, threads_per_device};
use crate::metrics as names;
use crate::passes::THREADS_MAX;
use crate::plan::lower::threads_of;
use crate::plan::validate::PlanError;
use crate::plan::{Plan, ResidentTensor};
use crate::requests::{Request, Requests};

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
pub mod plan_files;
pub mod process_map;
mod saver;
pub mod snapshot;
mod step;
mod tokens;

use agreement::{RankDisagreement, SharedInput, shared_inputs};
use budget::Budget;
use checkpoint::CheckpointError;
use devices::Opened;
use exchange::{Inbox, Word, tensor_of};
use host::Fetched;
use load::{FeedPort, Loader, fetches, gates};
use metrics::{Metrics, Snapshots, StepMetrics};
use numerics::{NonFinite, OnNonFinite};
use observer::{Observer, RecentSteps};
use process_map::{HostPorts, ProcessMap};

/// What a session can fail with.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// An actor, kernel or collective failed; the first cause.
    #[error("{0}")]
    Failed(#[from] Failure),
    /// The actors could not be started or told.
    #[error(transparent)]
    Actors(#[from] ActorError),
    /// With what other processes send, the plan exceeds its budget, or the node's.
    #[error(transparent)]
    Plan(#[from] PlanError),
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
    /// A value that cannot be declared.
    #[error(transparent)]
    Declared(#[from] DeclareError),
    /// Ranks were given different values where they must be equal; nothing was updated or loaded.
    #[error(transparent)]
    Disagreement(#[from] RankDisagreement),
    /// The plan was written to files, as `shardflow plan` asks by variables; nothing was run.
    #[error(
        "the plan was written, and nothing was run, because {} or a variable like it is set",
        plan_files::PLAN_HTML
    )]
    PlanShown,
    /// A file for the plan.
    #[error("cannot write the plan to {path}: {source}")]
    PlanFile {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A step was not finite.
    #[error("{0}")]
    NonFinite(Box<NonFinite>),
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

/// What decides the number of threads of a CPU device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Threads {
    /// [`crate::passes::CompileOptions::threads_per_device`].
    #[default]
    Planned,
    /// This process's even share of the cores that it may use, divided among its devices; known once the processes have met.
    Owned,
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
    /// Requests to this process, such as signals. All processes get them by [`StepReport::request`] after the same step.
    pub requests: Option<Arc<Requests>>,
    /// What becomes of a step whose loss or gradients are not finite.
    pub on_non_finite: OnNonFinite,
    /// Threads of each CPU device; bits do not depend on them.
    pub threads: Threads,
    /// Floating-point operations that one device could do in a second, for [`crate::metrics::MFU`].
    pub peak_flops: Option<f64>,
    /// Steps that the program means to do in all, so that who watches it is told when it will be done.
    pub steps_planned: Option<u64>,
    /// Whether it tells the `metrics` facade of itself: one session of a process should.
    pub tells_metrics: bool,
    /// Values that must be equal on all ranks, that checkpoints record and a resume compares.
    pub declared: Declarations,
    /// Names of parameters that files and checkpoints may have and the program lacks; any other such parameter is an error.
    pub ignoring: Vec<String>,
}

impl Default for SessionOptions {
    fn default() -> Self {
        let (watchdog, cluster) = (WatchdogOptions::default(), Cluster::local());
        Self {
            seed: 1337,
            watchdog,
            cluster,
            requests: None,
            on_non_finite: OnNonFinite::default(),
            threads: Threads::default(),
            peak_flops: None,
            steps_planned: None,
            tells_metrics: true,
            declared: Declarations::default(),
            ignoring: Vec::new(),
        }
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
    /// Every output by name, of the whole batch: see [`crate::graph::Combine`] for those made once a micro-batch.
    pub outputs: BTreeMap<String, HostTensor>,
    /// The request that processes agreed on in this step: the same on all. See [`crate::requests`].
    pub request: Request,
    /// Loss or gradients were not finite, so nothing was updated, and [`SessionOptions::on_non_finite`] lets such a step pass.
    pub non_finite: Option<NonFinite>,
}

/// A running plan, or this process's part of one. Dropping it shuts it down.
pub struct Session {
    plan: Arc<Plan>,
    process_map: ProcessMap,
    /// The processes of this node.
    here: Vec<u32>,
    budget: Budget,
    /// Of this process.
    devices: Vec<Device>,
    /// By device; of this process, and of peers whose memory is mapped here.
    arenas: BTreeMap<usize, Arena>,
    engine: Arc<dyn Collective>,
    running: Option<RunningSession>,
    world: Option<Arc<World>>,
    /// Name of the job, where it has one, and number of this incarnation, as far as this process knows.
    job: (Option<String>, u64),
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
    /// Inputs that several processes feed; the same list on all.
    shared_inputs: Vec<SharedInput>,
    declared: Declarations,
    ignoring: Vec<String>,
    steps: u64,
    /// Updates applied: the count that an optimizer's bias correction takes. A skipped step is none.
    updates: u64,
    /// Checkpoints of later steps up to this one were found damaged.
    passed_over: u64,
    seed: u64,
    requests: Option<Arc<Requests>>,
    /// How long the last step took.
    last_step: Duration,
    /// Limit of waits for live processes between steps.
    wait_max: Duration,
    on_non_finite: OnNonFinite,
    skipped_in_a_row: u32,
    /// Of parameters and moments; all processes have the same.
    bounds: Bounds,
    step_metrics: StepMetrics,
    /// There while the actors run.
    observer: Option<Arc<Observer>>,
}

/// The warning for kernels built with this optimisation level, which may be fifty times slower.
fn slow_build(opt_level: &str) -> Option<String> {
    let advice = "build with --release, or add to Cargo.toml: [profile.dev.package.\"*\"] opt-level = 3";
    matches!(opt_level, "0" | "1")
        .then(|| format!("warning: the kernels are built with opt-level {opt_level} and are slow; {advice}"))
}

/// How long a session that ends waits for firings that are under way.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(10);

/// Activity of a process between calls of the session, and during steps, which the watchdog watches.
const BETWEEN_STEPS: &str = "running the program";

impl Session {
    /// Joins the other processes, if there are any; allocates each device's arena, makes the initial weights and starts the
    /// actors. All processes call it with the same plan.
    ///
    /// # Errors
    /// When memory, threads or peers cannot be had; [`PlanError::NodeMemory`] before anything is allocated.
    pub fn start(plan: Plan, options: &SessionOptions) -> Result<Self, SessionError> {
        plan_files::show(&plan)?;
        options.declared.check()?;
        if options.cluster.is_first() {
            static WARNING: Once = Once::new();
            WARNING.call_once(|| {
                slow_build(shardflow_kernels::OPT_LEVEL).into_iter().for_each(|text| eprintln!("{text}"))
            });
        }
        let budget = Budget::measure(&plan);
        let world = World::join(&plan, options).map_err(world::named)?.map(Arc::new);
        Self::start_among(plan, options, budget, world.clone()).map_err(|error| match world {
            Some(world) => world.cannot_start(error),
            None => error,
        })
    }

    fn start_among(
        mut plan: Plan,
        options: &SessionOptions,
        budget: Budget,
        world: Option<Arc<World>>,
    ) -> Result<Self, SessionError> {
        let doing = |what| world.iter().for_each(|world| world.doing(what));
        doing("opening devices");
        if let Some(world) = &world {
            world.count_mirrors(&mut plan)?;
        }
        let process_map = world.as_ref().map_or(ProcessMap::alone(plan.memory.len()), |w| w.process_map());
        let here = world.as_ref().map_or(vec![0], |world| world.here());
        if options.threads == Threads::Owned && plan.device == DeviceKind::Cpu {
            plan.set_threads(owned_threads(world.as_deref(), &process_map, &here));
        }
        budget.check(&plan, &process_map, &here, 0)?;
        let on_node = process_map.on_node(here.iter().copied(), process_map.process);
        let takes_pipes = world.as_ref().is_some_and(|world| world.takes_pipes());
        let ids: devices::Ids<'_> = &|groups| match &world {
            Some(world) => {
                world.doing(WAITING);
                world.nccl_ids(groups)
            }
            None => devices::new_ids(groups),
        };
        let Opened { devices, engine: in_process, pipes } =
            devices::open(&plan, &process_map, on_node, takes_pipes, ids)?;
        doing("allocating memory");
        let shared = world.as_ref().is_some_and(|world| world.shares_memory(plan.device));
        let mut arenas = BTreeMap::new();
        for device in &devices {
            let bytes = plan.memory[device.rank()].arena_bytes;
            arenas.insert(device.rank(), if shared { device.shared_arena(bytes)? } else { device.arena(bytes)? });
        }
        let shared_inputs = shared_inputs(&plan, &process_map);
        let ports = Arc::new(HostPorts::of(&plan, &process_map, &shared_inputs));
        let (host, from_peers) = unbounded();
        doing(WAITING);
        let ways = match &world {
            Some(world) => world.connect(&plan, &devices, &arenas, in_process, pipes)?,
            None => Connections::alone(in_process),
        };
        arenas.extend(ways.mapped);
        doing("preparing kernels");
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
            let stream = device.stream_with(&actor.name, threads, ways.engine.clone(), priority)?;
            let programs = loader.programs(*id);
            programs.iter().try_for_each(|action| stream.prepare(&action.program))?;
            hosted.insert(*id, ActorHost { stream, programs });
        }
        let feeds = loader.feeds;
        let piped = |register: &RegisterId| ways.peers.iter().any(|peer| peer.pipes.contains_key(register));
        let how = |register: &RegisterId| (*register, if piped(register) { "nccl" } else { "socket" });
        let mirrored = ways.mirrors.keys().map(how).collect();
        let mut memory = ways.mirrors;
        for (index, place) in plan.registers.iter().enumerate() {
            let Some(arena) = arenas.get(&place.device) else { continue };
            let base = Base { arena: arena.clone(), offset: place.offset };
            memory.insert(RegisterId(index as u32), RegisterMemory { base, stride: place.stride });
        }
        let loaded = LoadedPlan {
            spec: Arc::new(plan.spec.clone()),
            hosted,
            memory,
            engine: ways.engine.clone(),
            peers: Peers { peers: ways.peers, host_ports: ports.ports.clone(), host: Some(host) },
        };
        let plan = Arc::new(plan);
        let step_tokens = tokens::in_a_step(&plan);
        let fetches = fetches(&plan);
        // A channel that nothing is left to send on counts as closed.
        let has_fetches = fetches.keys().any(|(device, _)| process_map.own().contains(device));
        let fetched = if has_fetches { fetched } else { never() };
        let tells = options.tells_metrics;
        let step_metrics = StepMetrics::new(&plan, &process_map, step_tokens, options);
        if tells {
            // They are of the process, however many sessions it has.
            static RESTARTS: Once = Once::new();
            let restart = |code: &u8| ::metrics::counter!(names::RESTARTS, "cause" => code.to_string()).increment(1);
            RESTARTS.call_once(|| options.cluster.restart_causes.iter().for_each(restart));
        }
        let mut session = Self {
            vocabularies: tokens::vocabularies(&plan.graph),
            shared_inputs,
            declared: options.declared.clone(),
            ignoring: options.ignoring.clone(),
            gates: gates(&plan, &own),
            fetches,
            plan,
            process_map,
            here,
            budget,
            devices,
            arenas,
            engine: ways.engine,
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
            passed_over: 0,
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
        session.doing("making initial weights");
        session.initialise()?;
        let seen = Arc::new(OnceLock::new());
        let mut running = prepare(loaded, counted(&options.watchdog, seen.clone()))?;
        if let Some(world) = &session.world {
            // Before the wait, which a failure elsewhere ends.
            world.watch(&running);
        }
        session.doing(WAITING);
        running.begin()?;
        session.doing(BETWEEN_STEPS);
        let snapshots = Snapshots { devices: session.devices.clone(), engine: session.engine.clone() };
        let (plan, world) = (session.plan.clone(), session.world.as_ref());
        let steps = RecentSteps { tokens: step_tokens, planned: options.steps_planned, ..RecentSteps::default() };
        let observer = Observer::new(plan, session.process_map, running.control(), snapshots, world, mirrored, steps);
        for (index, code) in options.cluster.restart_causes.iter().enumerate() {
            observer.note("restart", format!("attempt {index} of the job ended with {}", Exit::from_code(*code)));
        }
        let tells = options.tells_metrics;
        let observer = Arc::new(if tells { observer.telling(session.step_metrics.training()) } else { observer });
        // It is set here only.
        let _ = seen.set(Arc::downgrade(&observer));
        session.observer = Some(observer);
        session.running = Some(running);
        Ok(session)
    }

    /// Makes each device's part of each parameter.
    fn initialise(&mut self) -> Result<(), SessionError> {
        let plan = self.plan.clone();
        // Of parameters of other processes, too.
        let largest = plan.graph.nodes().iter().map(|node| match node.op {
            NodeOp::Parameter { init } => init.largest(),
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

    /// Writes a device's part of a parameter or a state, and the copy in bf16 where there is one.
    fn write_resident(
        &mut self,
        device: usize,
        resident: &ResidentTensor,
        part: &HostTensor,
    ) -> Result<(), SessionError> {
        self.note_largest(resident.var, part);
        let arena = &self.arenas[&device];
        arena.write_host(resident.offset, part)?;
        if let (Some(offset), Some(values)) = (resident.half_offset, part.as_f32()) {
            arena.write_host(offset, &HostTensor::bf16(&part.shape, values))?;
        }
        Ok(())
    }

    /// Publishes this process's activity, see [`World::doing`].
    fn doing(&self, what: &str) {
        self.world.iter().for_each(|world| world.doing(what));
    }

    /// The failure of an earlier step, if there was one.
    fn check_alive(&self) -> Result<(), SessionError> {
        self.failed.clone().map_or(Ok(()), |failure| Err(failure.into()))
    }

    /// The plan that runs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// For whoever watches the session while it runs, from any thread; `None` once it has ended.
    pub fn observer(&self) -> Option<&Arc<Observer>> {
        self.observer.as_ref()
    }

    /// What the session has done and holds now. Cheap: nothing stops for it.
    pub fn metrics(&self) -> Metrics {
        let of_the_end = || {
            let (devices, engine) = (self.devices.clone(), self.engine.clone());
            Snapshots { devices, engine }.metrics(&self.plan, self.steps, &[])
        };
        self.observer.as_ref().map_or_else(of_the_end, |observer| {
            observer.set_steps(self.steps);
            observer.metrics()
        })
    }

    /// Steps done, those before a restored checkpoint included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Updates applied, restored ones included: fewer than [`Session::steps`] where non-finite steps were skipped.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Gives this process's word to all.
    fn say(&self, word: Word) {
        self.give_numbers(self.ports.words[self.process_map.process as usize], &word);
    }

    /// Sends numbers to all processes by a port of this one.
    fn give_numbers(&self, port: u32, numbers: &[u64]) {
        self.give(&mut self.lock_inbox(), HostPiece { port, tensors: vec![tensor_of(numbers)] });
    }

    /// Gives a piece of this process to all, itself included.
    fn give(&self, inbox: &mut Inbox, piece: HostPiece) {
        if let Some(running) = self.running.as_ref().filter(|_| self.process_map.processes > 1) {
            running.send_host_piece(piece.clone());
        }
        inbox.put(piece);
    }

    /// Every process's word, by its number, when all have given one: in the same order on all.
    fn exchange(&mut self, word: Word) -> Result<Vec<Word>, SessionError> {
        self.say(word);
        let ports = self.ports.clone();
        let words = self.numbers_between_steps(&ports.words)?.into_iter();
        Ok(words.map(|word| [0, 1].map(|index| word.get(index).copied().unwrap_or_default())).collect())
    }

    /// The numbers that all processes sent by these ports, each by its own. `limit`: as in [`Session::receive`].
    fn numbers(&mut self, ports: &[u32], limit: Option<Duration>) -> Result<Vec<Vec<u64>>, SessionError> {
        let wanted: Vec<_> = ports.iter().map(|port| (*port, 1)).collect();
        self.receive(&wanted, limit).map_err(|failure| self.fail(failure))?;
        Ok(self.lock_inbox().take_numbers(ports))
    }

    fn lock_inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for these pieces, and forwards those of this process's fetches. A piece missing after `limit` fails the session.
    fn receive(&self, wanted: &[(u32, usize)], limit: Option<Duration>) -> Result<(), Failure> {
        let received = self.receive_within(wanted, limit);
        if let (Err(failure @ Failure::Peer { .. }), Some(running)) = (&received, &self.running) {
            running.control().fail(failure.clone());
        }
        received
    }

    /// As [`Session::receive`], without failing the session.
    fn receive_within(&self, wanted: &[(u32, usize)], limit: Option<Duration>) -> Result<(), Failure> {
        let late = limit.map_or_else(never, after);
        let stopped = || {
            let cause = "the session has ended".into();
            Failure::Stalled { idle_ms: 0, cause, process: None, report: String::new() }
        };
        let running = self.running.as_ref().ok_or_else(stopped)?;
        // Channels close because the session has failed: whichever is seen first, that failure is the answer.
        let ended = || running.first_failure().unwrap_or_else(stopped);
        let mut inbox = self.lock_inbox();
        let peers = inbox.peers.clone();
        while !inbox.has(wanted) {
            running.host_waits_for(inbox.giver(wanted).filter(|giver| *giver != self.process_map.process));
            if let Some(process) = inbox.never(wanted) {
                return Err(Failure::Peer { process, cause: PeerError::Ended });
            }
            select! {
                recv(self.fetched) -> message => {
                    let Fetched { device, rate, tensors, clock } = message.map_err(|_| ended())?;
                    clock.join();
                    let port = self.ports.fetches[&(device, rate)];
                    self.give(&mut inbox, HostPiece { port, tensors });
                },
                recv(peers) -> said => inbox.hear(said.map_err(|_| ended())?),
                recv(running.failures()) -> failure => return Err(failure.unwrap_or_else(|_| ended())),
                recv(late) -> _ => {
                    let process = inbox.giver(wanted).unwrap_or(self.process_map.process);
                    let seconds = limit.unwrap_or_default().as_secs();
                    return Err(Failure::Peer { process, cause: PeerError::Late { seconds } });
                }
            }
        }
        running.host_waits_for(None);
        Ok(())
    }

    /// Gives peers the parameters that they read, after they were written here; all processes call it.
    fn refresh(&mut self) -> Result<(), SessionError> {
        self.doing(WAITING);
        let Some(running) = &mut self.running else { return Ok(()) };
        running.refresh().map_err(|failure| self.fail(failure))?;
        self.agree_on_bounds()?;
        self.doing(BETWEEN_STEPS);
        Ok(())
    }

    /// The first cause of a failure, once all processes have said what they saw.
    fn fail(&mut self, failure: Failure) -> SessionError {
        let first = self.world.as_ref().map_or(failure.clone(), |world| world.settle(failure));
        self.failed = Some(first.clone());
        first.into()
    }

    /// Ends the session: waits for what runs, then stops all actors.
    ///
    /// # Errors
    /// The first cause, if the session had failed.
    pub fn shutdown(mut self) -> Result<(), SessionError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), SessionError> {
        let left = if self.failed.is_none() { self.take_leave() } else { Ok(()) };
        let left = left.map_err(|failure| self.fail(failure));
        let Some(running) = self.running.take() else { return Ok(()) };
        if let Some(observer) = self.observer.take() {
            observer.sample();
        }
        if let Some(world) = &self.world {
            world.leave();
        }
        let ended = running.shutdown();
        left?;
        Ok(ended.map(drop)?)
    }

    /// Ends this process's work and waits for the others: closing a connection earlier may lose the data sent last.
    fn take_leave(&self) -> Result<(), Failure> {
        let (Some(running), Some(_)) = (&self.running, &self.world) else { return Ok(()) };
        running.quiesce(QUIESCE_TIMEOUT)?;
        self.say([0; 2]);
        let wanted: Vec<_> = self.ports.words_wanted().collect();
        // Whoever does not come in time, or has left, needs nothing.
        let _ = self.receive_within(&wanted, Some(QUIESCE_TIMEOUT));
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A failure was told by the call that met it.
        let _ = self.end();
    }
}

/// See [`Threads::Owned`].
fn owned_threads(world: Option<&World>, process_map: &ProcessMap, here: &[u32]) -> usize {
    let (quota, own) = (available_parallelism().map_or(1, usize::from), affinity());
    let cores = |process: &u32| world.map_or(&own[..], |world| world.cores(*process));
    let node: Vec<_> = here.iter().map(|process| (cores(process), process_map.devices_of(*process).len())).collect();
    let me = here.iter().position(|process| *process == process_map.process);
    threads_per_device(&node, me.unwrap_or(0), quota).min(THREADS_MAX)
}

/// The same, with stalls counted, and kept as incidents.
fn counted(options: &WatchdogOptions, seen: Arc<OnceLock<Weak<Observer>>>) -> WatchdogOptions {
    let tell = options.on_stall.clone();
    let on_stall: OnStall = Arc::new(move |report| {
        ::metrics::counter!(names::STALLS).increment(1);
        if let Some(observer) = seen.get().and_then(Weak::upgrade) {
            observer.note("stall", report.lines().next().unwrap_or_default().to_owned());
        }
        tell.iter().for_each(|tell| tell(report));
    });
    WatchdogOptions { on_stall: Some(on_stall), ..options.clone() }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_builds_are_reported() {
        assert!(["0", "1"].iter().all(|level| slow_build(level).is_some_and(|text| text.contains("opt-level = 3"))));
        assert!(["2", "3", "s", "z"].iter().all(|level| slow_build(level).is_none()));
        assert_eq!(slow_build(shardflow_kernels::OPT_LEVEL), None, "our own builds are optimised");
    }
}
