//! A session runs a plan: it owns devices, arenas and actors, and provides steps, parameters, metrics and shutdown.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use shardflow_actors::error::{Failure, PeerError};
use shardflow_actors::remote::HostPiece;
use shardflow_actors::shell::RunningSession;
use shardflow_kernels::memory::Arena;
use shardflow_kernels::tensor::HostTensor;

use crate::cluster::world::{WAITING, World};
use crate::declare::Declarations;
use crate::plan::ResidentTensor;
use crate::plan::instance::Instance;
use crate::process_map::ProcessMap;
use shardflow_job::exit::Exit;
use shardflow_job::requests::Requests;

pub(crate) mod agreement;
mod batch;
mod budget;
pub(crate) mod checkpoint;
mod error;
mod host_io;
mod load;
pub mod metrics;
mod non_finite;
mod numbers;
pub mod numerics;
pub(crate) mod observer;
mod options;
mod outcome;
mod outputs;
mod passes;
pub mod plan_files;
mod ports;
mod published;
pub(crate) mod recent;
mod report;
mod saver;
pub(crate) mod snapshot;
mod start;
mod step;
mod tokens;
mod update_guard;

pub use batch::Batch;
use batch::BatchRules;
use budget::Budget;
pub use budget::bytes_alone;
pub use error::SessionError;
use error::stopped;
use host_io::HostIo;
use metrics::{Metrics, MetricsSource, StepMetrics};
use observer::Observer;
pub use options::{Outputs, SessionOptions, Threads};
pub use report::StepReport;
pub use shardflow_kernels::error::THREADS_HINT;
use update_guard::UpdateGuard;

/// A running plan, or this process's part of it. Dropping the session shuts it down.
pub struct Session {
    plan: Arc<Instance>,
    process_map: ProcessMap,
    node_processes: Vec<u32>,
    budget: Budget,
    metrics_source: MetricsSource,
    /// Arenas by device: those of this process, and the peers' arenas that this process maps.
    arenas: BTreeMap<usize, Arena>,
    running: Option<RunningSession>,
    world: Option<Arc<World>>,
    /// The job's name, if it has one, and the number of the job's restarts according to the launcher's variables.
    job: (Option<String>, u64),
    host_io: HostIo,
    /// The failure of the session, if it failed. Device memory is then invalid and may still change.
    failed: Option<Failure>,
    batch_rules: BatchRules,
    progress: Progress,
    guard: UpdateGuard,
    declared: Declarations,
    ignoring: Vec<String>,
    requests: Option<Arc<Requests>>,
    /// Longest time that a call between steps waits for a process that is alive.
    wait_max: Duration,
    step_metrics: StepMetrics,
    /// `Some` while the actors run.
    observer: Option<Arc<Observer>>,
}

/// The session's counters and its seed. Steps and loads change them.
#[derive(Debug, Default)]
struct Progress {
    /// Number of steps, including those before a restored checkpoint.
    steps: u64,
    /// Number of updates applied, for the optimizer's bias correction. A skipped step applies no update.
    updates: u64,
    /// Together with the number of steps, the seed determines the random numbers of a step.
    seed: u64,
    /// Checkpoints after the restored one, up to this step, are damaged. New saves replace them.
    damaged_up_to: u64,
    /// Duration of the last step.
    last_step: Duration,
}

/// Longest time that a shutdown waits for running firings. It then waits as long again for the other processes.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(10);

/// Activity of a process between calls of the session. A step does not change it, because the watchdog monitors steps.
const BETWEEN_STEPS: &str = "running the program";

impl Session {
    /// Writes a device's part of a parameter or a state, and its bf16 copy if there is one.
    fn write_resident(
        &mut self,
        device: usize,
        resident: &ResidentTensor,
        part: &HostTensor,
    ) -> Result<(), SessionError> {
        self.guard.raise_bound(&self.plan.graph.tensor(resident.var).name, part);
        let arena = &self.arenas[&device];
        arena.write_host(resident.offset, part)?;
        if let (Some(offset), Some(values)) = (resident.bf16_offset, part.as_f32()) {
            arena.write_host(offset, &HostTensor::bf16(&part.shape, values))?;
        }
        Ok(())
    }

    fn set_activity(&self, activity: &str) {
        self.world.iter().for_each(|world| world.doing(activity));
    }

    fn check_not_failed(&self) -> Result<(), SessionError> {
        self.failed.clone().map_or(Ok(()), |failure| Err(failure.into()))
    }

    /// The plan that runs.
    pub fn plan(&self) -> &Instance {
        &self.plan
    }

    /// The observer, which any thread may use while the session runs; `None` after the session has ended.
    pub fn observer(&self) -> Option<&Arc<Observer>> {
        self.observer.as_ref()
    }

    /// The session's progress and memory use. The call is cheap and pauses no actor.
    pub fn metrics(&self) -> Metrics {
        let after_end = || self.metrics_source.metrics(&self.plan, self.progress.steps, &[]);
        self.observer.as_ref().map_or_else(after_end, |observer| {
            observer.set_steps(self.progress.steps);
            observer.metrics()
        })
    }

    /// True on rank 0, the only process that prints output for all.
    pub fn is_first(&self) -> bool {
        self.process_map.process == 0
    }

    /// Steps done, including those before a restored checkpoint.
    pub fn steps(&self) -> u64 {
        self.progress.steps
    }

    /// The seed. Loading a checkpoint replaces it by the checkpoint's seed.
    pub fn seed(&self) -> u64 {
        self.progress.seed
    }

    /// Number of updates, including restored ones. Less than [`Session::steps`] if non-finite steps were skipped.
    pub fn updates(&self) -> u64 {
        self.progress.updates
    }

    /// Waits for these pieces, and sends this process's fetches meanwhile. If a piece is late, the session fails.
    fn receive(&self, wanted: &[(u32, usize)], limit: Option<Duration>) -> Result<(), Failure> {
        let running = self.running()?;
        let received = self.host_io.receive(running, self.world.as_deref(), wanted, limit);
        if let Err(failure @ Failure::Peer { .. }) = &received {
            running.control().fail(failure.clone());
        }
        received
    }

    /// Sends a tensor to the processes of the port's route.
    fn send(&self, port: u32, tensor: HostTensor) -> Result<(), Failure> {
        let piece = HostPiece { port, tensors: vec![tensor] };
        self.host_io.send(self.running()?, &mut self.host_io.inbox.lock(), piece);
        Ok(())
    }

    /// Sends to each peer the parameters that the peer reads and this process has written. All processes call it.
    fn refresh(&mut self) -> Result<(), SessionError> {
        self.set_activity(WAITING);
        let Some(running) = &mut self.running else { return Ok(()) };
        running.refresh().map_err(|failure| self.fail(failure))?;
        self.agree_on_bounds()?;
        self.set_activity(BETWEEN_STEPS);
        Ok(())
    }

    fn running(&self) -> Result<&RunningSession, Failure> {
        self.running.as_ref().ok_or_else(stopped)
    }

    /// Records a failure. Returns the first failure of any process, or this one if no process reports one in time.
    fn fail(&mut self, failure: Failure) -> SessionError {
        let first = self.settled(failure);
        self.failed = Some(first.clone());
        first.into()
    }

    /// The first cause of all processes, or this failure if no cause arrives in time.
    fn settled(&self, failure: Failure) -> Failure {
        self.world.as_ref().map_or(failure.clone(), |world| world.settle(failure))
    }

    /// Shuts the session down: waits for running work, then stops all actors.
    ///
    /// # Errors
    /// The first cause, if the session has failed.
    pub fn shutdown(mut self) -> Result<(), SessionError> {
        self.end()
    }

    /// Ends the session after a failure that other processes cannot detect, such as a full disk. Those processes end
    /// with this cause and exit code, and do not wait for this process. If the session has already failed, its first
    /// cause stays.
    pub fn abort(mut self, exit: Exit, cause: &impl Display) {
        self.fail_alone(exit, cause);
    }

    /// Reports a failure that only this process has detected. The session then fails on all processes.
    fn fail_alone(&mut self, exit: Exit, cause: &impl Display) {
        let (process, cause, exit) = (self.process_map.process, cause.to_string(), exit.code());
        if let (Some(world), None) = (&self.world, &self.failed) {
            world.membership.fail(cause.clone(), exit);
            world.wait_for_cause();
        }
        self.failed.get_or_insert(Failure::Peer { process, cause: PeerError::Failed { cause, exit } });
    }

    fn end(&mut self) -> Result<(), SessionError> {
        let finished = if self.failed.is_none() { self.finish_with_peers() } else { Ok(()) };
        let finished = finished.map_err(|failure| self.fail(failure));
        let Some(running) = self.running.take() else { return Ok(()) };
        if let Some(observer) = self.observer.take() {
            observer.sample();
        }
        if let Some(world) = &self.world {
            world.membership.leave();
        }
        let ended = running.shutdown();
        finished?;
        Ok(ended.map(drop)?)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // If a call has failed, it has returned its error. No caller can receive an error of this shutdown.
        let _ = self.end();
    }
}
