//! The processes of a job: how they are started, how they find, authenticate and watch each other, and how they end.
//!
//! Nothing here knows of registers, actors or tensors.

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
