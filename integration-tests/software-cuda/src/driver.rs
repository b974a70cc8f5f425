//! The driver's functions.

pub mod device;
pub mod memory;
pub mod module;
pub mod stream;
