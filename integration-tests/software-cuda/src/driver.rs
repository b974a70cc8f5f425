//! The functions of the CUDA driver.

pub mod device;
pub mod memory;
pub mod module;
pub mod stream;
