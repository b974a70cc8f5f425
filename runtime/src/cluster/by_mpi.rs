//! Collectives by MPI: started when a session first needs them, where the program was built for it.

use std::sync::Arc;
use std::time::Duration;

use shardflow_kernels::collective::{Collective, Group};

use super::ClusterError;
use crate::session::process_map::ProcessMap;

/// What MPI is refused with where the program was built without it.
pub(super) fn not_built() -> ClusterError {
    ClusterError::Mpi("this program was built without MPI: build it with `--features mpi`, or set it to `own`".into())
}

/// MPI in this process, once it was started: for all sessions of a [`super::Cluster`], since MPI starts only once. It ends
/// with the last of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct ByMpi {
    #[cfg(feature = "mpi")]
    world: Arc<std::sync::OnceLock<Arc<shardflow_kernels::collective::mpi::MpiWorld>>>,
}

impl ByMpi {
    /// True for a group that MPI can have: its members are in different processes.
    pub(crate) fn takes(process_map: &ProcessMap, group: &Group) -> bool {
        process_map.processes_of(group).len() == group.ranks.len()
    }

    /// The engine of these groups, which are the same in all processes; all of them call this.
    #[cfg(feature = "mpi")]
    pub(crate) fn engine(
        &self,
        process_map: &ProcessMap,
        groups: &[Arc<Group>],
        within: Duration,
    ) -> Result<Arc<dyn Collective>, ClusterError> {
        use shardflow_kernels::collective::mpi::{Mpi, MpiWorld};
        let world = match self.world.get() {
            Some(world) => world.clone(),
            None => {
                let started =
                    MpiWorld::start().map_err(|cause| ClusterError::Mpi(format!("MPI cannot be used: {cause}")))?;
                self.world.get_or_init(|| started).clone()
            }
        };
        let (rank, size) = (world.rank(), world.size());
        if (rank, size) != (process_map.process, process_map.processes) {
            let (process, processes) = (process_map.process, process_map.processes);
            return Err(ClusterError::Mpi(format!(
                "to MPI this is rank {rank} of {size}, and to us rank {process} of {processes}: start the processes by \
                 `mpirun -n {processes}`, without another launcher"
            )));
        }
        Ok(Arc::new(Mpi::new(world, groups, &|device| process_map.process_of(device), within)?))
    }

    #[cfg(not(feature = "mpi"))]
    pub(crate) fn engine(
        &self,
        _: &ProcessMap,
        _: &[Arc<Group>],
        _: Duration,
    ) -> Result<Arc<dyn Collective>, ClusterError> {
        Err(not_built())
    }
}
