//! Detects this process's rank and world from the variables that `shardflow launch`, torchrun, OpenMPI, Slurm, MPICH or
//! Kubernetes set. A function of the variables, and of the names of this node's interfaces.
//!
//! Launchers are checked from the innermost to the outermost: an inner launcher adds its variables to those of the
//! outer one. An empty variable counts as unset.

mod context;
mod detect;
mod endpoint;
mod error;
mod names;
mod secret_source;
mod slurm;
#[cfg(test)]
mod tests;

pub use context::{LaunchContext, Launched, LaunchedBy};
pub use detect::{DERIVED_PORTS, detect};
pub use endpoint::{Endpoint, PORT_DEFAULT};
pub use error::EnvError;
pub use names::*;
pub use secret_source::SecretSource;
