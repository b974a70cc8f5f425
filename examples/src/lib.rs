//! Code shared by the example programs. Modules are independent, except `error`, which has the errors of all others.

pub mod args;
pub mod data;
pub mod error;
pub mod log;
pub mod sample;
