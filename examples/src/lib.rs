//! What the example programs share. The modules do not know each other; programs import them all.

pub mod args;
pub mod data;
pub mod files;
pub mod log;
pub mod sample;
