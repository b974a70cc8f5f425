//! A process's rank in its job, detected from the environment, and the options of the rendezvous.
//!
//! ```no_run
//! use shardflow::prelude::*;
//!
//! # fn program(plan: Plan) -> Result<(), Box<dyn std::error::Error>> {
//! let cluster = Cluster::from_env()?; // one process, unless the launcher, torchrun, Slurm, .. started several
//! let session = Session::start(plan, &SessionOptions { cluster, ..SessionOptions::default() })?;
//! # Ok(())
//! # }
//! ```

use std::sync::atomic::{AtomicBool, Ordering};

use shardflow_job::env::{JOB_BEGAN_MS, LaunchContext, Launched, RESTART_CAUSES, detect, process_variables};
pub use shardflow_job::options::{Advertise, ClusterOptions, Collectives, Transport};
use shardflow_job::text::counted;

use crate::process_map::ProcessMap;

mod by_mpi;
pub(crate) mod connector;
mod error;
pub(crate) mod failure;
mod nccl_ids;
mod save_agreement;
pub(crate) mod world;

use by_mpi::ByMpi;
pub use error::ClusterError;

/// This process's rank and options, known before the rendezvous.
#[derive(Clone, Debug)]
pub struct Cluster {
    launch: LaunchContext,
    by_mpi: ByMpi,
    /// Options of the rendezvous and the connections.
    pub options: ClusterOptions,
    /// The exit codes for which the launcher has restarted the job so far.
    pub restart_causes: Vec<u8>,
    /// When the launcher began the job: Unix time in milliseconds, the same for all attempts.
    pub job_began_ms: Option<u64>,
}

/// True once the program has read the variables of its launcher.
static READ: AtomicBool = AtomicBool::new(false);

impl Cluster {
    /// A single process.
    pub fn local() -> Self {
        Self::new(LaunchContext::Local, ClusterOptions::default())
    }

    /// A process with this launch context.
    pub fn new(launch: LaunchContext, options: ClusterOptions) -> Self {
        Self { launch, by_mpi: ByMpi::default(), options, restart_causes: Vec::new(), job_began_ms: None }
    }

    /// Reads the variables of the launcher, torchrun, Slurm, OpenMPI, MPICH or a Kubernetes indexed job; without them,
    /// this is a single process. Connects nothing: the processes meet when a session starts.
    ///
    /// # Errors
    /// Returns an error if the environment contradicts itself. The error names the variable and the fix.
    pub fn from_env() -> Result<Self, ClusterError> {
        READ.store(true, Ordering::Relaxed);
        let variables = process_variables();
        let options = ClusterOptions::read(&variables)?;
        if options.collectives == Collectives::Mpi && cfg!(not(feature = "mpi")) {
            return Err(by_mpi::not_built());
        }
        let launch = detect(&variables)?;
        let causes = variables.get(RESTART_CAUSES).map_or("", |text| text.as_str());
        // Used for metrics only, so values that cannot be parsed are skipped.
        let restart_causes = causes.split(',').filter_map(|code| code.parse().ok()).collect();
        let job_began_ms = variables.get(JOB_BEGAN_MS).and_then(|text| text.parse().ok());
        Ok(Self { launch, by_mpi: ByMpi::default(), options, restart_causes, job_began_ms })
    }

    /// A warning if a launcher has started several processes, but the program has not read the launcher's variables.
    pub(crate) fn ignored_launcher(&self) -> Option<String> {
        if READ.load(Ordering::Relaxed) || self.world().is_some() {
            return None;
        }
        let Ok(LaunchContext::World(world)) = detect(&process_variables()) else { return None };
        let (rank, processes) = (world.process, world.processes);
        Some(format!(
            "warning: rank {rank} of {processes} trains alone: its `SessionOptions::cluster` is not from `Cluster::from_env`"
        ))
    }

    fn world(&self) -> Option<&Launched> {
        if let LaunchContext::World(world) = &self.launch { Some(world) } else { None }
    }

    /// How this number of devices is divided among the job's processes.
    ///
    /// # Errors
    /// [`ClusterError::Refused`] if there are more processes than devices.
    pub(crate) fn process_map(&self, devices: usize) -> Result<ProcessMap, ClusterError> {
        let (process, processes) = self.world().map_or((0, 1), |world| (world.process, world.processes));
        if processes as usize > devices {
            let mesh = counted(devices, "device");
            return Err(ClusterError::Refused(format!(
                "a mesh of {mesh} cannot be split over {processes} processes: start at most {devices}"
            )));
        }
        Ok(ProcessMap { process, processes, devices })
    }

    /// The rank of this process.
    pub fn process(&self) -> u32 {
        self.world().map_or(0, |world| world.process)
    }

    /// The job's name, if it has one, and how many times it was restarted.
    pub(crate) fn job(&self) -> (Option<String>, u64) {
        (self.world().map(|world| world.run_id.clone()).filter(|id| id != "none"), self.restart())
    }

    /// The world size: the number of processes.
    pub fn processes(&self) -> u32 {
        self.world().map_or(1, |world| world.processes)
    }

    /// The number of processes on this node, which share its cores.
    pub fn local_processes(&self) -> u32 {
        self.world().map_or(1, |world| world.local_processes)
    }

    /// How many of the mesh's devices are on this node and share its cores and memory. The rendezvous may not have
    /// happened yet, so this assumes that the ranks of a node are consecutive. If they are not consecutive and the
    /// devices do not divide evenly, the result may be off by one for each process.
    pub fn devices_here(&self, devices: usize) -> usize {
        let Some(world) = self.world() else { return devices };
        let first = world.process.saturating_sub(world.local_process);
        let process_map = ProcessMap { process: world.process, processes: world.processes, devices };
        process_map.on_node(first..(first + world.local_processes).min(world.processes), world.process).all
    }

    /// How many times the job was restarted, according to the launcher's variables.
    pub fn restart(&self) -> u64 {
        self.world().map_or(0, |world| world.restart)
    }

    /// True for rank 0, the only process that prints output about the whole job.
    pub fn is_first(&self) -> bool {
        self.process() == 0
    }
}
