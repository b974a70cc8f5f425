//! Detects this process's rank and world from its launcher's variables and the names of this node's interfaces.
//!
//! Inner launchers are checked first: they add their variables to those of outer ones. An empty variable is unset.

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
