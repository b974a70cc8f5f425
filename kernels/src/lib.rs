//! Devices, in-order streams, memory, kernels and collectives: all that touches numbers.
//! Layers: `error <- tensor <- collective (calls), op <- memory <- stream, device <- cpu, collective engines`.

pub mod collective;
pub mod conformance;
pub mod cpu;
pub mod device;
pub mod error;
pub mod event;
pub mod memory;
pub mod op;
mod region;
pub mod stream;
pub mod tensor;
