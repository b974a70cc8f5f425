//! Collectives and register transfers between GPUs by NCCL.

pub(crate) mod api;
mod comm;
mod engine;
mod pipe;

pub use comm::{GroupMember, UniqueId};
pub use engine::Nccl;
pub use pipe::{Pipe, Sent};
