//! The processes that run a plan together: where a program finds out that it is one of several, and how they meet.
//! Imports the actors' transport and membership.
//!
//! ```no_run
//! use shardflow::prelude::*;
//!
//! # fn program(plan: Plan) -> Result<(), Box<dyn std::error::Error>> {
//! let cluster = Cluster::from_env()?; // from the launcher, torchrun, Slurm, ..; alone where there is none of them
//! let session = Session::start(plan, &SessionOptions { cluster, ..SessionOptions::default() })?;
//! # Ok(())
//! # }
//! ```

pub mod env;
pub mod rendezvous;
pub(crate) mod world;
