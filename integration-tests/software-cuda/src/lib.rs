//! A CUDA driver, NVRTC, NCCL and cuBLASLt in software, for tests on machines without a GPU. Imports nothing of Shardflow.
//!
//! The library takes the place of NVIDIA's four: see [`install`] and [`command`]. What it finds wrong it keeps as
//! findings, by kind:
//!
//! | kind | what |
//! |---|---|
//! | `race` | two accesses, one a write, that streams, events, host threads and collectives leave unordered |
//! | `race-in-launch` | the same between threads of one launch, in global memory |
//! | `shared-race` | the same in shared memory: a `__syncthreads` or `__syncwarp` is missing |
//! | `bounds` | outside of allocations, regions, what a pointer was given for, or dynamic shared memory |
//! | `use-after-free` | of device or pinned memory, or freed while somebody may still use it |
//! | `bad-free` | freed twice, or never allocated |
//! | `uninitialised` | read before anything was written |
//! | `peer` | another device's memory, without access to it enabled |
//! | `barrier`, `warp` | threads that never meet |
//! | `alignment`, `trap` | fragments off their alignment; a kernel that gives up |
//! | `collective-mismatch`, `collective-order`, `ungrouped`, `aborted` | NCCL's rules |
//! | `deadlock` | who waits for whom, and nothing can go on |
//! | `misuse` | waits inside host functions, waits for events never recorded |
//! | `leak` | what exists at exit |
//!
//! A kernel's text is compiled at run time by g++, with the headers in `shim/`; its threads are fibers. All is executed by
//! one thread, one operation at a time, in an order that a policy and a seed give; the checks do not depend on it.

mod clock;
mod config;
mod control;
mod cublaslt;
mod driver;
mod exit;
mod export;
mod findings;
mod host;
mod kernel;
mod memory;
mod nccl;
mod nvrtc;
mod run;
mod scheduler;
mod shadow;
mod support;
mod world;

pub use config::{POLICIES, Policy};
pub use findings::{Finding, Report};
pub use support::{command, install, library, report_path};
