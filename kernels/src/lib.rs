//! Devices, in-order streams, memory, kernels and collectives: all that touches numbers.
//! Layers: `error <- tensor <- collective (calls), op <- memory <- stream, device <- cpu, collective engines`.

pub mod collective;
pub mod error;
pub mod op;
pub mod tensor;
