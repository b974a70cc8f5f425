//! Actors that own streams and exchange registers: the protocol, its simulator and the code that runs it.
//!
//! Layers: `spec <- builder, check, credits, protocol <- frame, pipeline, trace <- snapshot <- hang <- simulate, slow
//! <- error <- remote <- bus, loaded <- supervisor <- watchdog <- shell`.

pub mod builder;
mod bus;
pub mod check;
pub mod credits;
pub mod error;
pub mod frame;
pub mod hang;
mod loaded;
pub mod pipeline;
pub mod protocol;
pub mod remote;
pub mod shell;
pub mod simulate;
mod slow;
pub mod snapshot;
pub mod spec;
mod supervisor;
pub mod trace;
pub mod watchdog;
