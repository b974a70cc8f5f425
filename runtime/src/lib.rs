//! An actor-based dataflow runtime for training neural networks on many devices.
//!
//! `graph::builder -> passes -> plan::lower -> actors::spec -> actors::shell -> actors::protocol -> kernels::op`

pub mod boxing;
pub mod layout_error;
pub mod placement;
pub mod sbp;
