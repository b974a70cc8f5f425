//! The processes of a job: starting them, rendezvous, authentication, failure detection, and ending them.
//!
//! This crate is independent of registers, actors and tensors.

pub mod departure;
pub mod env;
pub mod exit;
pub mod launcher;
pub mod machine;
pub mod membership;
pub mod options;
pub mod output;
pub mod rendezvous;
pub mod requests;
pub mod secret;
pub mod text;
pub mod transport;
