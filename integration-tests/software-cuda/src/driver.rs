//! The driver's functions. Its parts import `world` and what they need.

pub mod device;
pub mod memory;
pub mod module;
pub mod stream;
