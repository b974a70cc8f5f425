//! The CUDA backend. What is here compiles without CUDA: the kernels' text and the lowering of launches to steps.
//! Layers: `step <- lower`, `source`.

pub mod lower;
pub mod source;
pub mod step;
