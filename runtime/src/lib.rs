//! Shardflow trains neural networks on many devices.
//!
//! You write a network once, as one logical program over whole tensors. A layout places a tensor on a mesh of devices:
//! along each axis, the tensor is split, copied, or held as partial sums. [`prelude::compile`] derives the backward
//! pass and the communication. Before anything runs, `compile` computes the memory to the byte and checks that no
//! device can wait forever. A [`prelude::Session`] runs the plan: on the cores of one machine, in several processes and
//! nodes, or on GPUs.
//!
//! # A program
//!
//! The input's layout makes this model data-parallel over two devices:
//!
//! ```
//! use shardflow::prelude::*;
//!
//! let mut g = Graph::new(&Mesh::parse("data=2")?);
//! let ids = g.input("ids", &[4, 8], DType::I32, Layout::split("data", 0));
//! let x = nn::embedding(&mut g, "embedding", ids, 16, 16, Parallel::Replicated);
//! let loss = g.cross_entropy(x, ids);
//! g.minimize(loss, AdamW::default());
//!
//! let plan = compile(g, &CompileOptions::default())?;
//! let mut session = Session::start(plan, &SessionOptions::default())?;
//! let report = session.step(&[("ids", HostTensor::i32(&[4, 8], vec![3; 32]))], 1e-3)?;
//! assert!((report.loss.unwrap() - 16f32.ln()).abs() < 0.1);
//! session.shutdown()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The life of a session
//!
//! 1. **Graph.** Ops add nodes to a [`prelude::Graph`]. Errors carry the line of your program; `compile` reports all
//!    errors together.
//! 2. **Plan.** [`prelude::compile`] returns a [`prelude::Plan`]: the actions of each device, all transfers, and the
//!    use of every byte of memory. `shardflow plan` prints the plan without running anything.
//! 3. **Start.** [`prelude::Session::start`] joins the processes of the job ([`cluster::Cluster::from_env`]), compares
//!    the plan and the options of all processes, and allocates all memory.
//! 4. **Steps.** [`prelude::Session::step`] takes the whole batch, or only the part of this rank, and returns the loss.
//!    All processes must call it.
//! 5. **Checkpoints.** A [`prelude::CheckpointManager`] writes checkpoints in the background and resumes from them, on
//!    any mesh and any number of processes.
//! 6. **End.** [`prelude::Session::shutdown`] ends the actors. A failure in any process ends all processes with the
//!    same cause. [`exit`] lists the exit codes.
//!
//! # Where to look
//!
//! | module | what it is for |
//! |---|---|
//! | [`prelude`] | everything that a training program uses |
//! | [`nn`] | layers, and a whole GPT |
//! | [`graph`] | ops, and ops of your own |
//! | [`session`] | reports, metrics and snapshots of a running session |
//! | [`checkpoint`] | stores, savers, resuming |
//! | [`cluster`] | how the processes of a job find each other |
//! | [`metrics`], [`watch`], [`trace`] | every metric; Prometheus and the live page; timelines |
//! | [`program`], [`exit`] | a `main` that reports its failure, and the exit codes |
//! | [`job`] | the crate `shardflow_job`: launcher, rendezvous, connections |
//!
//! The guide, in `docs/guide`, has a page for each task. `docs/architecture.md` shows the path of a step.

pub mod checkpoint;
pub mod cluster;
pub mod graph;
pub mod metrics;
pub mod nn;
pub mod program;
pub mod session;
pub mod trace;
#[cfg(feature = "watch")]
pub mod watch;

// The tests, tools and examples of this workspace use these modules. The prelude has what programs need.
#[doc(hidden)]
pub mod boxing;
#[doc(hidden)]
pub mod checkpoint_manager;
#[doc(hidden)]
pub mod declare;
#[doc(hidden)]
pub mod doctor;
#[doc(hidden)]
pub mod files;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod flags;
#[doc(hidden)]
pub mod init;
#[doc(hidden)]
pub mod json_log;
#[doc(hidden)]
pub mod layout_error;
#[doc(hidden)]
pub mod passes;
#[doc(hidden)]
pub mod placement;
#[doc(hidden)]
pub mod plan;
#[doc(hidden)]
pub mod sbp;

mod clock;
mod devices;
mod explain;
mod lock;
mod process_map;

pub use shardflow_job as job;

/// Exit codes, and the report of a failure to the launcher and to the other processes.
pub mod exit {
    pub use shardflow_job::departure::report;
    pub use shardflow_job::exit::*;
}

/// Everything that a training program or a custom op needs: `use shardflow::prelude::*`.
pub mod prelude {
    pub use shardflow_actors::watchdog::WatchdogOptions;
    pub use shardflow_kernels::error::KernelError;
    pub use shardflow_kernels::op::{CpuArgs, CpuRead, CpuSlice, CpuSliceMut, CpuWrite, CustomKernel};
    pub use shardflow_kernels::tensor::{DType, HostData, HostTensor, Region};

    pub use crate::checkpoint::CheckpointError;
    pub use crate::checkpoint::{Cursor, SaveSchedule, SaveStart, Saver, SaverOptions, SingleProcess, Store, WhenBusy};
    pub use crate::checkpoint_manager::{CheckpointManager, ManagerOptions, Resume};
    pub use crate::cluster::{Cluster, ClusterError};
    pub use crate::declare::{Declarations, OnResume, data_identity};
    pub use crate::devices::gpu_memory_bytes;
    pub use crate::graph::builder::Layout;
    pub use crate::graph::{AdamW, Combine, CustomOp, Graph, GraphError, Var};
    pub use crate::init::Init;
    pub use crate::json_log::JsonLog;
    pub use crate::layout_error::LayoutError;
    pub use crate::nn::{self, GptConfig, Parallel};
    pub use crate::passes::mode::Mode;
    pub use crate::passes::precision::Precision;
    pub use crate::passes::{Boxing, CompileError, CompileOptions, compile};
    pub use crate::placement::Mesh;
    pub use crate::plan::error::PlanError;
    pub use crate::plan::{Plan, Schedule};
    pub use crate::program;
    pub use crate::sbp::rule::Rule;
    pub use crate::session::metrics::{DeviceMetrics, Metrics};
    pub use crate::session::numerics::{NonFinite, OnNonFinite};
    pub use crate::session::{Batch, Outputs, Session, SessionError, SessionOptions, StepReport, Threads};
    pub use shardflow_job::exit::Exit;
    pub use shardflow_job::requests::{Request, Requests};
    pub use shardflow_kernels::device::DeviceKind;
}
