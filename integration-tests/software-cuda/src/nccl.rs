//! NCCL's functions.

pub mod data;
pub mod engine;
