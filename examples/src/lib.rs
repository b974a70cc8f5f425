//! What the example programs share. The modules do not know each other, but for `checkpoints`, which reads `args`.

pub mod args;
pub mod checkpoints;
pub mod data;
pub mod files;
pub mod log;
pub mod sample;
