//! Starts a session: joins processes, opens devices, allocates memory, connects, creates weights, starts the actors.

use std::collections::BTreeMap;
use std::sync::{Arc, Once, OnceLock, Weak};
use std::thread::available_parallelism;

use shardflow_actors::shell::{LoadedPlan, prepare};
use shardflow_actors::spec::RegisterId;
use shardflow_actors::watchdog::{OnStall, WatchdogOptions};
use shardflow_job::membership::MembershipError;
use shardflow_job::transport::TransportError;
use shardflow_kernels::collective::Group;
use shardflow_kernels::cpu::instruction_set;
use shardflow_kernels::cuda::cudnn::Attention;
use shardflow_kernels::cuda::nccl::UniqueId;
use shardflow_kernels::device::{Device, DeviceKind};
use shardflow_kernels::memory::Arena;
use shardflow_kernels::tensor::HostTensor;

use super::batch::BatchRules;
use super::budget::Budget;
use super::error::SessionError;
use super::load::load;
use super::metrics::{MetricsSource, StepMetrics};
use super::observer::Observer;
use super::options::{SessionOptions, Threads};
use super::ports::HostPorts;
use super::published::Sources;
use super::recent::RecentSteps;
use super::update_guard::UpdateGuard;
use super::{BETWEEN_STEPS, Progress, Session, plan_files, tokens};
use crate::cluster::ClusterError;
use crate::cluster::connector::{Connections, Connector};
use crate::cluster::failure::{is_aborted_by_peer, peer_failure};
use crate::cluster::world::{WAITING, World};
use crate::declare::{Declarations, MAX_NORM, ON_NON_FINITE, OPTIMIZER, OnResume, SEED};
use crate::devices::{self, ProcessDevices};
use crate::graph::NodeOp;
use crate::graph::optimizer::Bounds;
use crate::init;
use crate::metrics as names;
use crate::passes::THREADS_MAX;
use crate::plan::Plan;
use crate::plan::instance::Instance;
use crate::process_map::ProcessMap;
use shardflow_job::exit::Exit;
use shardflow_job::machine::{affinity, threads_per_device};
use shardflow_job::rendezvous::Fact;
use shardflow_job::rendezvous::facts::{COLLECTIVES, ENCRYPTION, KERNELS, MESH, PLAN, TRANSPORT};

/// Name of the fact for [`SessionOptions::outputs`].
const OUTPUTS: &str = "outputs";

/// Returns a warning if kernels built with this optimization level are slow (up to fifty times slower).
fn slow_build_warning(opt_level: &str) -> Option<String> {
    let advice = "build with --release, or add to Cargo.toml: [profile.dev.package.\"*\"] opt-level = 3";
    matches!(opt_level, "0" | "1")
        .then(|| format!("warning: the kernels are built with opt-level {opt_level} and are slow; {advice}"))
}

struct Resources {
    node_processes: Vec<u32>,
    devices: Vec<Device>,
    arenas: BTreeMap<usize, Arena>,
    /// Staging memory of this process's devices.
    staging: BTreeMap<usize, Arena>,
    connections: Connections,
}

impl Session {
    /// Joins the processes, allocates arenas, creates weights, starts actors. All processes call it with the same plan.
    ///
    /// # Errors
    /// Returns an error if memory, threads, devices or peers are unavailable, or if processes differ in a value that
    /// must be equal. [`crate::plan::error::PlanError::NodeMemory`] comes before any allocation. Under
    /// `shardflow plan`, the plan is written, and the error is [`SessionError::PlanWritten`].
    pub fn start(plan: Plan, options: &SessionOptions) -> Result<Self, SessionError> {
        if plan_files::write_requested(&plan).map_err(|(path, source)| SessionError::PlanFile { path, source })? {
            return Err(SessionError::PlanWritten);
        }
        options.declared.check()?;
        let process_map = options.cluster.process_map(plan.device_count())?;
        let plan = Arc::new(plan).instance_of(process_map.own());
        static WARNINGS: Once = Once::new();
        WARNINGS.call_once(|| {
            let slow = slow_build_warning(shardflow_kernels::OPT_LEVEL).filter(|_| options.cluster.is_first());
            slow.into_iter().chain(options.cluster.ignored_launcher()).for_each(|text| eprintln!("{text}"))
        });
        let mut budget = Budget::measure(&plan);
        let (claim, wait_max) = (budget.claim(options.extra_bytes), options.watchdog.wait_max());
        let facts = || facts(&plan, options);
        let joined = World::join(&plan, &options.cluster, process_map, (&claim, facts), wait_max);
        let world = joined.map_err(failed_join)?.map(Arc::new);
        budget.claims = world.as_ref().map_or_else(|| [(0, claim)].into(), |world| world.memory_claims());
        Self::start_in_world(plan, process_map, options, budget, world.clone()).map_err(|error| match world {
            Some(world) => cannot_start(&world, error),
            None => error,
        })
    }

    fn start_in_world(
        mut plan: Instance,
        process_map: ProcessMap,
        options: &SessionOptions,
        budget: Budget,
        world: Option<Arc<World>>,
    ) -> Result<Self, SessionError> {
        let resources = Resources::acquire(&mut plan, process_map, options, &budget, world.as_deref())?;
        let Resources { node_processes, devices, arenas, staging, connections } = resources;
        let engine = connections.engine.clone();
        let ports = Arc::new(HostPorts::new(plan.plan.clone(), process_map, options.outputs));
        world.iter().for_each(|world| world.doing("preparing kernels"));
        let (loaded, host_io, mirrored) = load(&plan, &process_map, &devices, [&arenas, &staging], connections, ports)?;
        let plan = Arc::new(plan);
        let mut session = Self {
            host_io,
            batch_rules: BatchRules::new(&plan, &process_map),
            progress: Progress { seed: options.seed, ..Progress::default() },
            guard: UpdateGuard { on_non_finite: options.on_non_finite, skipped_in_a_row: 0, bounds: Bounds::default() },
            declared: declared(&plan, options),
            ignoring: options.ignoring.clone(),
            step_metrics: StepMetrics::new(&plan, &process_map, options),
            plan,
            process_map,
            node_processes,
            budget,
            metrics_source: MetricsSource { devices, engine },
            arenas,
            running: None,
            world,
            job: options.cluster.job(),
            failed: None,
            requests: options.requests.clone(),
            wait_max: options.watchdog.wait_max(),
            observer: None,
        };
        session.set_activity("making initial weights");
        session.initialize()?;
        session.begin(loaded, options, mirrored)?;
        Ok(session)
    }

    /// Creates each device's part of each parameter.
    fn initialize(&mut self) -> Result<(), SessionError> {
        let plan = self.plan.clone();
        // The bound covers the parameters of all processes, because it must be equal on all of them.
        let largest = plan.graph.nodes().iter().map(|node| match node.op {
            NodeOp::Parameter { init } => init.magnitude_bound(),
            _ => 0.0,
        });
        self.guard.bounds.parameter = largest.fold(0.0, f64::max);
        for device in self.process_map.own() {
            for resident in plan.residents(device) {
                let NodeOp::Parameter { init } = plan.graph.producer(resident.var).op else { continue };
                let info = plan.graph.tensor(resident.var);
                let mut data = vec![0.0; resident.region.element_count()];
                init::fill(init, self.progress.seed, &info.name, &info.shape, &resident.region, &mut data);
                self.write_resident(device, &resident, &HostTensor::f32(&resident.region.size, data))?;
            }
        }
        Ok(())
    }

    /// Starts the actors and their observer. `mirrored` is the field of [`Sources`].
    fn begin(
        &mut self,
        loaded: LoadedPlan,
        options: &SessionOptions,
        mirrored: BTreeMap<RegisterId, &'static str>,
    ) -> Result<(), SessionError> {
        let observer_slot = Arc::new(OnceLock::new());
        let mut running = prepare(loaded, with_stall_recording(&options.watchdog, observer_slot.clone()))?;
        if let Some(world) = &self.world {
            // This call must precede the wait in `begin`, so that a failure of another process ends the wait.
            world.watch(&running);
        }
        self.set_activity(WAITING);
        running.begin()?;
        self.set_activity(BETWEEN_STEPS);
        let sources = Sources {
            plan: self.plan.clone(),
            process_map: self.process_map,
            control: running.control(),
            metrics: self.metrics_source.clone(),
            world: self.world.as_ref().map_or_else(Weak::new, Arc::downgrade),
            mirrored,
        };
        let tokens = tokens::tokens_per_step(&self.plan);
        let steps = RecentSteps { tokens, planned: options.steps_planned, ..RecentSteps::default() };
        let training = options.publishes_metrics.then(|| self.step_metrics.training.clone());
        let observer = Observer::new(sources, steps, training);
        for (index, code) in options.cluster.restart_causes.iter().enumerate() {
            observer.note("restart", format!("attempt {index} of the job ended with {}", Exit::from_code(*code)));
        }
        let observer = Arc::new(observer);
        // Nothing else sets the slot, so this succeeds.
        let _ = observer_slot.set(Arc::downgrade(&observer));
        (self.observer, self.running) = (Some(observer), Some(running));
        Ok(())
    }
}

impl Resources {
    /// Adapts the plan to this node, opens devices, allocates memory, and connects the processes.
    fn acquire(
        plan: &mut Instance,
        process_map: ProcessMap,
        options: &SessionOptions,
        budget: &Budget,
        world: Option<&World>,
    ) -> Result<Self, SessionError> {
        let set_activity = |activity| world.iter().for_each(|world| world.doing(activity));
        set_activity("opening devices");
        if let Some(world) = world {
            world.count_mirrors(plan)?;
        }
        let node_processes = world.map_or(vec![0], |world| world.here());
        if options.threads == Threads::Owned && plan.device == DeviceKind::Cpu {
            plan.set_threads(owned_threads(world, &process_map, &node_processes));
        }
        budget.check(plan, &process_map, &node_processes, 0)?;
        let on_node = process_map.on_node(node_processes.iter().copied(), process_map.process);
        let takes_pipes = world.is_some_and(|world| world.takes_pipes());
        let ids = |groups: &[Arc<Group>]| {
            let Some(world) = world else { return groups.iter().map(|_| UniqueId::new()).collect() };
            world.doing(WAITING);
            world.nccl_ids(groups)
        };
        let ProcessDevices { devices, engine, pipes } = devices::open(plan, &process_map, on_node, takes_pipes, &ids)?;
        set_activity("allocating memory");
        let shared = world.is_some_and(|world| world.shares_memory());
        let (mut arenas, mut staging) = (BTreeMap::new(), BTreeMap::new());
        for device in &devices {
            let memory = plan.memory(device.rank());
            let bytes = memory.arena_bytes;
            arenas.insert(device.rank(), if shared { device.shared_arena(bytes)? } else { device.arena(bytes)? });
            staging.insert(device.rank(), device.staging(memory.staging_end())?);
        }
        set_activity(WAITING);
        let mut connections = match world {
            Some(world) => {
                let connector = Connector { pipes, ..world.connector() };
                connector.connect_all(plan, &devices, &arenas, engine)?
            }
            None => Connections::alone(engine),
        };
        arenas.append(&mut connections.mapped);
        Ok(Self { node_processes, devices, arenas, staging, connections })
    }
}

/// The declared values of the program, and the settings of the optimizer.
fn declared(plan: &Instance, options: &SessionOptions) -> Declarations {
    let declared = options.declared.clone();
    let Some(adamw) = plan.graph.objective.map(|objective| objective.optimizer) else { return declared };
    declared.declare(OPTIMIZER, adamw, OnResume::Warn).declare(MAX_NORM, adamw.max_norm, OnResume::Warn)
}

/// Values that must be equal on all processes, in addition to the build. An error names the first one that differs. The
/// plan is last, because it depends on most of the others.
fn facts(plan: &Instance, options: &SessionOptions) -> Result<Vec<Fact>, ClusterError> {
    let cluster = &options.cluster.options;
    let kernels = match plan.device {
        DeviceKind::Cpu => instruction_set(),
        DeviceKind::Cuda => format!("CUDA, attention {:?}", Attention::from_env()?),
    };
    let mut facts = vec![
        Fact::new(MESH, plan.graph.mesh()),
        Fact::new(TRANSPORT, format_args!("{:?}", cluster.transport)),
        Fact::new(COLLECTIVES, format_args!("{:?}", cluster.collectives)),
        Fact::new(ENCRYPTION, if cluster.encrypt { "on" } else { "off" }),
        Fact::new(KERNELS, kernels),
        Fact::new(SEED, options.seed),
        Fact::new(ON_NON_FINITE, format_args!("{:?}", options.on_non_finite)),
        Fact::new(OUTPUTS, format_args!("{:?}", options.outputs)),
    ];
    facts.extend(options.declared.iter().map(|(name, value)| Fact::new(name, value)));
    facts.push(Fact::new(PLAN, plan.hash()));
    Ok(facts)
}

/// Converts the error of a join. If another process caused it, the result is [`SessionError::Failed`], the error for
/// failures of other processes after the join.
fn failed_join(error: ClusterError) -> SessionError {
    match error {
        ClusterError::Membership(MembershipError::Ended(cause)) => SessionError::Failed(peer_failure(&cause)),
        error => error.into(),
    }
}

/// Reports to the other processes that the start failed here. Returns a peer's cause if it came first, else `error`.
pub(super) fn cannot_start(world: &World, error: SessionError) -> SessionError {
    let report = || world.membership.fail(format!("it cannot start: {error}"), error.exit().code());
    match &error {
        SessionError::Cluster(ClusterError::Transport(
            cause @ (TransportError::Unreachable { to: process, .. }
            | TransportError::Missing { from: Some(process), .. }),
        )) => world.membership.suspect(*process, cause.to_string()),
        // The session has already reported its failure.
        SessionError::Failed(_) => {}
        error if is_interrupted_start(error) => {}
        _ => report(),
    }
    match world.wait_for_cause() {
        Some(cause) if cause.process != world.process_map.process || is_interrupted_start(&error) => {
            SessionError::Failed(peer_failure(&cause))
        }
        _ => {
            report();
            error
        }
    }
}

/// True if another process interrupted the start. That process reports the cause, or heartbeats detect its loss.
fn is_interrupted_start(error: &SessionError) -> bool {
    match error {
        SessionError::Cluster(ClusterError::Transport(broken)) => {
            matches!(broken, TransportError::Io { .. } | TransportError::Closed)
        }
        SessionError::Cluster(ClusterError::Kernel(cause)) | SessionError::Kernel(cause) => is_aborted_by_peer(cause),
        _ => false,
    }
}

/// Number of threads of each device under [`Threads::Owned`].
fn owned_threads(world: Option<&World>, process_map: &ProcessMap, node_processes: &[u32]) -> usize {
    let (quota, own) = (available_parallelism().map_or(1, usize::from), affinity());
    let cores = |process: &u32| world.map_or(&own[..], |world| world.cores(*process));
    let shares = node_processes.iter().map(|process| (cores(process), process_map.devices_of(*process).len()));
    let own_index = node_processes.iter().position(|process| *process == process_map.process);
    threads_per_device(&shares.collect::<Vec<_>>(), own_index.unwrap_or(0), quota).min(THREADS_MAX)
}

/// Returns the options with a callback that also counts stalls and records them as incidents.
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
