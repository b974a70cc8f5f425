//! Actors that own streams and exchange registers: the protocol, its simulator and its shell.
//! Layers: `spec <- check, builder, register <- protocol <- simulate, shell`.

pub mod builder;
pub mod check;
pub mod credits;
pub mod error;
pub mod pipeline;
pub mod protocol;
pub mod register;
pub mod simulate;
pub mod spec;
