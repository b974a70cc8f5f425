//! Actors that own streams and exchange registers: the protocol, its simulator and its shell.

pub mod spec;
