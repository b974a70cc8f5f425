//! What the example programs share.
//! `data`, `args` and `log` do not know each other; programs import them all.

pub mod args;
pub mod data;
pub mod log;
