//! Detects this process's rank and world from the launcher's environment variables.
//!
//! If launchers are nested, such as `mpirun` inside `srun`, the variables of the outer launcher remain set. So the
//! variables of the inner launcher are checked first. An empty variable counts as unset.

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
