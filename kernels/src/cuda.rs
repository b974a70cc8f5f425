//! The CUDA backend. It is built without a toolkit: the driver and the libraries above it are loaded at run time, through
//! cudarc's bindings, and a machine without them is told what is missing ([`library::probe`]).
//! Layers: `step <- lower`, `source` (no FFI, and nothing of a GPU); `library <- context <- event, memory, module, blas, spin <- poller, ticket, record
//! <- gpu <- lane, progress, cudnn <- engine, turn, lowered, staged <- issue <- stream <- device`; `nccl` and `local` are engines.

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
