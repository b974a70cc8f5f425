//! The CUDA backend. It builds without a CUDA toolkit: cudarc's bindings load the driver and the libraries at run time.
//! On a machine without them, [`library::probe`] reports what is missing. Layers: `step <- lower`, `source` (no FFI, no
//! GPU); `library <- context <- event, memory, module, blas, test_delay <- poller, in_flight, record <- gpu <-
//! raw_stream, progress, cudnn <- engine, issue_order, lowered, staged <- issue <- stream <- device`; `nccl` and
//! `shared_gpu` are collective engines.

pub(crate) mod blas;
pub(crate) mod context;
pub mod cudnn;
pub mod device;
pub mod engine;
pub(crate) mod event;
pub mod gpu;
pub(crate) mod in_flight;
pub(crate) mod issue;
pub mod issue_order;
pub mod library;
pub mod lower;
pub(crate) mod lowered;
pub(crate) mod memory;
pub mod module;
pub mod nccl;
pub(crate) mod poller;
pub(crate) mod progress;
pub(crate) mod raw_stream;
pub(crate) mod record;
pub mod shared_gpu;
pub mod source;
pub(crate) mod staged;
pub mod step;
pub mod stream;
pub(crate) mod strided_copy;
pub mod test_delay;

pub use library::probe;
