//! Devices, in-order streams, memory, kernels and collectives: all code that computes on tensors.
//!
//! ```
//! use std::sync::{Arc, mpsc::channel};
//! use shardflow_kernels::collective::in_process::InProcess;
//! use shardflow_kernels::device::Device;
//! use shardflow_kernels::memory::Base;
//! use shardflow_kernels::op::{Buffer, Launch, Op, Program};
//! use shardflow_kernels::stream::{Notification, Submission};
//! use shardflow_kernels::tensor::{DType, HostTensor};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::cpu(0, 2, Arc::new(InProcess::new()));
//! let stream = device.stream("compute", device.threads_per_stream())?;
//! let arena = device.arena(128)?;
//! arena.write_host(0, &HostTensor::f32(&[3], vec![1.0, 2.0, 3.0]))?;
//!
//! let buffer = |offset| Buffer { base: 0, offset, shape: vec![3], dtype: DType::F32 };
//! let op = Op::Scale { factor: 10.0 };
//! let launch = Launch { op, reads: vec![buffer(0)], writes: vec![buffer(64)], accumulate: false, workspace: None };
//! let program = Arc::new(Program { name: "example".to_owned(), launches: vec![launch], signals: vec![] });
//!
//! let (sender, notifications) = channel();
//! let notify = Box::new(move |notification| drop(sender.send(notification)));
//! let bases = vec![Base { arena: arena.clone(), offset: 0 }];
//! stream.submit(Submission { program, bases, repeat: false, notify })?;
//! assert_eq!(notifications.recv()?, Notification::Done);
//! assert_eq!(arena.read_host(64, &[3], DType::F32)?.as_f32(), Some(&[10.0, 20.0, 30.0][..]));
//! # Ok(())
//! # }
//! ```

mod bound;
pub mod clock;
pub mod collective;
pub mod conformance;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod error;
pub mod event;
pub mod hash;
pub mod memory;
pub mod metrics;
pub mod op;
mod region;
pub mod stream;
mod submission;
pub mod tensor;

/// The optimisation level with which the kernels were built: `0` to `3`, `s` or `z`.
pub const OPT_LEVEL: &str = env!("SHARDFLOW_OPT_LEVEL");
