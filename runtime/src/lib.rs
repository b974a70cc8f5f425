//! An actor-based dataflow runtime for training neural networks on many devices.
//!
//! `graph::builder -> passes -> plan::lower -> actors::spec -> actors::shell -> actors::protocol -> kernels::op`

pub mod boxing;
pub mod graph;
pub mod init;
pub mod layout_error;
pub mod nn;
pub mod passes;
pub mod placement;
pub mod plan;
pub mod sbp;
pub mod session;
