//! Collectives over MPI. The first session that needs MPI starts MPI. This requires the feature `mpi`.

use std::sync::Arc;
use std::time::Duration;

use shardflow_kernels::collective::{Collective, Group};

use super::error::ClusterError;
use crate::process_map::ProcessMap;

pub(super) fn not_built() -> ClusterError {
    ClusterError::Mpi("this program has no MPI: build it with `--features mpi`, or set the variable to `own`".into())
}

/// This process's MPI world. All sessions of a [`super::Cluster`] share it, because MPI can start only once.
#[derive(Clone, Debug, Default)]
pub(crate) struct ByMpi {
    #[cfg(feature = "mpi")]
    world: Arc<std::sync::OnceLock<Arc<shardflow_kernels::collective::mpi::MpiWorld>>>,
}

impl ByMpi {
    /// Creates the engine that runs the collectives of these groups. All processes call it with the same groups.
    #[cfg(feature = "mpi")]
    pub(crate) fn engine(
        &self,
        process_map: &ProcessMap,
        groups: &[Arc<Group>],
        timeout: Duration,
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
                "MPI assigns rank {rank} of {size}, but the environment assigns rank {process} of {processes}: start the processes with \
                 `mpirun -n {processes}`, without another launcher"
            )));
        }
        Ok(Arc::new(Mpi::new(world, groups, &|device| process_map.process_of(device), timeout)?))
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
