//! Code shared by the example programs. Modules are independent, except `checkpoints`, which uses `args`, `files` and
//! `log`.

pub mod args;
pub mod checkpoints;
pub mod data;
pub mod files;
pub mod log;
pub mod sample;
