//! A CUDA driver, NVRTC, NCCL, cuBLASLt and cuDNN's graph API in software, for tests on machines without a GPU.
//!
//! The library replaces NVIDIA's five libraries; see [`install`] and [`command`]. It records errors as findings of
//! these kinds:
//!
//! | kind | meaning |
//! |---|---|
//! | `race` | two accesses to the same bytes, at least one of them a write, in no defined order |
//! | `race-in-launch` | a race in global memory between two threads of one launch |
//! | `shared-race` | a race in shared memory, because a `__syncthreads` or `__syncwarp` is missing |
//! | `bounds` | an access outside of all allocations, of its pointer's region, or of dynamic shared memory |
//! | `use-after-free` | a use of freed device or pinned memory, or a free while an operation may still use the memory |
//! | `bad-free` | a second free, or a free of memory that was never allocated |
//! | `uninitialised` | a read of bytes that nothing has written |
//! | `peer` | an access to another device's memory without peer access, or to another device's memory pool |
//! | `staged` | a copy between devices that goes through host memory, because peer access is missing |
//! | `barrier`, `warp` | threads wait for other threads that never arrive; lanes misuse a warp function |
//! | `alignment`, `trap` | a misaligned access; a kernel that traps |
//! | `collective-mismatch`, `collective-order`, `ungrouped`, `aborted` | a violation of NCCL's rules |
//! | `deadlock` | no operation can continue; the message contains the chain of waits |
//! | `misuse` | a wait inside a host function, a wait for an event that was never recorded, or an invalid call |
//! | `leak` | an object that still exists at exit |
//!
//! A stream, an event, a host thread or a collective can define the order of two accesses.
//!
//! g++ compiles a kernel's text at run time with the headers in `shim/`; the kernel's threads are fibers. One thread
//! executes all operations, one at a time. A policy and a seed determine their order. No check depends on this order.
//!
//! The ranks of one communicator may be in several processes, each with its own software machine. These processes
//! connect to a socket of the process that created the communicator's id.
//!
//! # Use in tests
//!
//! The dynamic linker reads its search path only when a process starts. A test therefore starts a child process on the
//! software device and reads the child's report:
//!
//! ```no_run
//! let folder = std::env::temp_dir().join("a-test");
//! let program = std::env::current_exe()?;
//! let mut child = shardflow_software_cuda::command(program, &folder, 4, "adversarial", 7)?;
//! assert!(child.args(["--exact", "child", "--ignored"]).status()?.success());
//! assert_eq!(shardflow_software_cuda::SimReport::read(&folder)?.findings, []);
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! | environment | meaning | default |
//! |---|---|---|
//! | `SOFTWARE_CUDA_DEVICES` | number of devices | 1 |
//! | `SOFTWARE_CUDA_POLICY` | `in-order`, `lazy`, `random`, `adversarial`, `starve` ([`SchedulePolicy`]) | `random` |
//! | `SOFTWARE_CUDA_SEED` | seed of the schedule and of the order of blocks and threads | 1 |
//! | `SOFTWARE_CUDA_MEMORY` | memory of each device in bytes | 8 GiB |
//! | `SOFTWARE_CUDA_SHARED` | bytes of shared memory that a block may request | 227 KiB |
//! | `SOFTWARE_CUDA_ABORT_MS` | how long `ncclCommAbort` takes, in milliseconds | 0 |
//! | `SOFTWARE_CUDA_REPORT` | file for the [`SimReport`] that is written at exit | none |
//! | `SOFTWARE_CUDA_FAULT` | `KIND:DEVICE:LAUNCH`, where KIND is `kill`, `hang` or `die` (abort the process) | none |
//! | `SOFTWARE_CUDA_HANG_MS` | how long a call waits for a hung launch, in milliseconds | 60000 |
//! | `SOFTWARE_CUDA_DEADLOCK_MS` | milliseconds without progress before a deadlock is reported | 10000 |
//! | `SOFTWARE_CUDA_NCCL` | the version that NCCL reports | 23003, which is 2.30.3 |
//! | `SOFTWARE_CUDA_CACHE` | folder for compiled kernels | the system's temporary folder |
//! | `SOFTWARE_CUDA_HOST` | `global`: treats all host threads as one, for programs that pass no clock tokens | none |
//! | `SOFTWARE_CUDA_NODE` | name of this process's node; NCCL refuses two ranks on one device of a node | empty |
//! | `SOFTWARE_CUDA_TRACE` | `1`: prints each operation when it is executed | none |
//!
//! If streams wait for each other in a cycle, the library reports the deadlock immediately.
//!
//! The names of the functions in `control.rs` begin with `software_cuda_`. Some functions return findings, counters and
//! leaks at any time. Others change the schedule, inject faults, pass clocks between host threads, name the slots of an
//! arena, or record the host's own accesses to pinned memory, which the library cannot detect itself.
//!
//! # Limits
//!
//! The library does not model speed, occupancy, the weak memory model or the numerics of the real libraries. A kernel
//! that spins until another kernel writes never ends. Static shared arrays have no separate bounds. If two threads each
//! use two bytes of a four-byte word, the library knows the thread of the last access only. PTX, inline assembly,
//! tensor cores other than `wmma` in bf16, textures, graphs, cooperative groups and clusters are not supported.

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

pub use config::{POLICIES, SchedulePolicy};
pub use findings::{SimFinding, SimReport};
pub use support::{CASE, ChildRun, case, command, install, library, report_path, run_child, run_child_in};
