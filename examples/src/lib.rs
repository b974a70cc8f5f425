//! Code shared by the example programs. The modules are independent of each other.

pub mod args;
pub mod data;
pub mod error;
pub mod log;
pub mod sample;
