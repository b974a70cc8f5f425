//! Collectives by MPI: started when a session first needs them, where the program was built for it. Imports `cluster`,
//! `session::hosting` and kernels.

use std::sync::Arc;
use std::time::Duration;

use shardflow_kernels::collective::{Collective, Group};

use super::ClusterError;
use crate::session::hosting::Hosting;

/// What MPI is refused with where the program was built without it.
pub(super) fn not_built() -> ClusterError {
    ClusterError::Mpi("this program was built without MPI: build it with `--features mpi`, or set it to `own`".into())
}

/// MPI in this process, once it was started: for all sessions of a [`super::Cluster`], since MPI starts only once. It ends
/// with the last of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct ByMpi {
    #[cfg(feature = "mpi")]
    world: Arc<std::sync::OnceLock<Arc<shardflow_kernels::collective::mpi::World>>>,
}

impl ByMpi {
    /// True for a group that MPI can have: its members are in different processes.
    pub(crate) fn takes(hosting: &Hosting, group: &Group) -> bool {
        hosting.processes_of(group).len() == group.ranks.len()
    }

    /// The engine of these groups, which are the same in all processes; all of them call this.
    #[cfg(feature = "mpi")]
    pub(crate) fn engine(
        &self,
        hosting: &Hosting,
        groups: &[Arc<Group>],
        within: Duration,
    ) -> Result<Arc<dyn Collective>, ClusterError> {
        use shardflow_kernels::collective::mpi::{Mpi, World};
        let world = match self.world.get() {
            Some(world) => world.clone(),
            None => {
                let started =
                    World::start().map_err(|cause| ClusterError::Mpi(format!("MPI cannot be used: {cause}")))?;
                self.world.get_or_init(|| started).clone()
            }
        };
        let (rank, size) = (world.rank(), world.size());
        if (rank, size) != (hosting.process, hosting.processes) {
            let (process, processes) = (hosting.process, hosting.processes);
            return Err(ClusterError::Mpi(format!(
                "to MPI this is rank {rank} of {size}, and to us rank {process} of {processes}: start the processes by \
                 `mpirun -n {processes}`, without another launcher"
            )));
        }
        Ok(Arc::new(Mpi::new(world, groups, &|device| hosting.process_of(device), within)?))
    }

    #[cfg(not(feature = "mpi"))]
    pub(crate) fn engine(
        &self,
        _: &Hosting,
        _: &[Arc<Group>],
        _: Duration,
    ) -> Result<Arc<dyn Collective>, ClusterError> {
        Err(not_built())
    }
}
