//! Actors that own streams and exchange registers: the protocol, its simulator and the code that runs it.

pub mod builder;
mod bus;
pub mod check;
pub mod credits;
pub mod error;
pub mod frame;
pub mod hang;
pub mod label;
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
pub mod table;
pub mod trace;
pub mod watchdog;
