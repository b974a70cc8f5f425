//! Actors that own streams and exchange registers: the protocol, its simulator and the code that runs it.
//! Layers: `spec <- check, builder, register <- protocol <- trace <- snapshot <- hang <- simulate, slow, message <- transport, remote, bus, supervisor
//! <- watchdog, shell`; `membership` depends only on `transport`.

pub mod builder;
mod bus;
pub mod check;
pub mod credits;
pub mod error;
pub mod hang;
mod message;
pub mod pipeline;
pub mod protocol;
pub mod register;
pub mod remote;
pub mod shell;
pub mod simulate;
mod slow;
pub mod snapshot;
pub mod spec;
mod supervisor;
pub mod trace;
pub mod watchdog;
