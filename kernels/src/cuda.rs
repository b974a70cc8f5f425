//! The CUDA backend. It builds without a CUDA toolkit: cudarc loads the driver and libraries at run time, and
//! [`probe`](probe()) reports those that are missing. `step`, `lower` and `source` use neither FFI nor a GPU.

pub(crate) mod attention;
pub(crate) mod blas;
pub(crate) mod context;
pub mod cudnn;
pub(crate) mod device_memory;
pub(crate) mod event;
pub mod gpu;
pub(crate) mod gpu_call;
pub(crate) mod in_flight;
pub(crate) mod issue;
pub mod library;
pub(crate) mod lower;
pub(crate) mod lowered;
pub(crate) mod memory;
pub(crate) mod module;
pub mod nccl;
pub(crate) mod poller;
mod probe;
pub(crate) mod progress;
pub(crate) mod raw_stream;
pub(crate) mod record;
pub mod shared_gpu;
pub mod source;
pub(crate) mod staged;
pub(crate) mod status;
pub(crate) mod step;
pub(crate) mod stream;
pub(crate) mod strided_copy;
pub mod test_delay;

pub use probe::{DeviceFacts, Probe, probe};
