//! A CUDA driver, NVRTC, NCCL, cuBLASLt and cuDNN's graphs in software, for tests on machines without a GPU.
//!
//! The library takes the place of NVIDIA's five: see [`install`] and [`command`]. What it finds wrong it keeps as
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
//! | `peer` | another device's memory, without access to it enabled, or out of a pool |
//! | `staged` | a copy between devices that a driver takes through the host's memory, for want of the same |
//! | `barrier`, `warp` | threads that never meet |
//! | `alignment`, `trap` | fragments off their alignment; a kernel that gives up |
//! | `collective-mismatch`, `collective-order`, `ungrouped`, `aborted` | NCCL's rules |
//! | `deadlock` | who waits for whom, and nothing can go on |
//! | `misuse` | waits inside host functions, waits for events never recorded; cuDNN's descriptors |
//! | `leak` | what exists at exit |
//!
//! A kernel's text is compiled at run time by g++, with the headers in `shim/`; its threads are fibers. All is executed by
//! one thread, one operation at a time, in an order that a policy and a seed give; the checks do not depend on it.
//!
//! Ranks of one communicator may be in several processes, each with a software machine of its own: they meet at a socket of
//! the process that made the communicator's id.
//!
//! # How a test uses it
//!
//! The dynamic linker reads its path when a process starts, so the test starts a child on the device and reads the report
//! that it leaves:
//!
//! ```no_run
//! let folder = std::env::temp_dir().join("a-test");
//! let program = std::env::current_exe()?;
//! let mut child = shardflow_software_cuda::command(program, &folder, 4, "adversarial", 7)?;
//! assert!(child.args(["--exact", "child", "--ignored"]).status()?.success());
//! assert_eq!(shardflow_software_cuda::Report::read(&folder)?.findings, []);
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! | environment | what | default |
//! |---|---|---|
//! | `SOFTWARE_CUDA_DEVICES` | devices | 1 |
//! | `SOFTWARE_CUDA_POLICY` | `in-order`, `lazy`, `random`, `adversarial`, `starve`: see [`Policy`] | `random` |
//! | `SOFTWARE_CUDA_SEED` | of the schedule, and of the order of blocks and threads | 1 |
//! | `SOFTWARE_CUDA_MEMORY` | bytes of each device | 8 GiB |
//! | `SOFTWARE_CUDA_SHARED` | bytes of shared memory that a block may ask for | 227 KiB |
//! | `SOFTWARE_CUDA_ABORT_MS` | how long `ncclCommAbort` takes | 0 |
//! | `SOFTWARE_CUDA_REPORT` | the file of [`Report`], written at exit | none |
//! | `SOFTWARE_CUDA_FAULT` | `kill:DEVICE:LAUNCH`, `hang:DEVICE:LAUNCH`, or `die:DEVICE:LAUNCH`, which ends the process | none |
//! | `SOFTWARE_CUDA_HANG_MS` | how long a call waits for a launch that hangs | 60000 |
//! | `SOFTWARE_CUDA_DEADLOCK_MS` | how long nothing may move while work is queued; rings are found at once | 10000 |
//! | `SOFTWARE_CUDA_NCCL` | the version that NCCL says it is | 23003, which is 2.30.3 |
//! | `SOFTWARE_CUDA_CACHE` | where compiled kernels are kept | the temporary folder |
//! | `SOFTWARE_CUDA_HOST` | `global`: host threads count as one, where no message carries its clock | none |
//! | `SOFTWARE_CUDA_NODE` | which node plays in this process: NCCL takes no two ranks on one device of a node | empty |
//! | `SOFTWARE_CUDA_TRACE` | `1`: prints each operation as it is executed | none |
//!
//! Symbols that begin with `software_cuda_` (in `control.rs`) give findings, counters and leaks at any time, change the
//! schedule, inject faults, carry clocks between host threads, name the slots of an arena, and tell of the host's own
//! accesses to pinned memory, which nobody sees otherwise.
//!
//! # What it does not show
//!
//! Speed, occupancy, the weak memory model, the numerics of the real libraries. Kernels that spin until another kernel
//! writes never end. Static shared arrays have no bounds of their own. Two threads that share a word of four bytes, with
//! two each, are told apart only by whoever touched it last. PTX, inline assembly, tensor cores other than by `wmma` in
//! bf16, textures, graphs, cooperative groups and clusters are not there.

mod clock;
mod config;
mod control;
mod cublaslt;
mod cudnn;
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
pub use support::{CASE, Ran, case, command, install, library, report_path, run_child, run_child_in};
