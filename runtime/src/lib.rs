//! An actor-based dataflow runtime for training neural networks on many devices.
//!
//! `graph::builder -> passes -> plan::lower -> actors::spec -> actors::shell -> actors::protocol -> kernels::op`

pub mod boxing;
pub mod checkpoint;
pub mod checkpoint_manager;
mod clock;
pub mod cluster;
pub mod declare;
mod devices;
pub mod doctor;
pub mod files;
#[cfg(feature = "cli")]
pub mod flags;
pub mod graph;
pub mod init;
pub mod json_log;
pub mod layout_error;
mod lock;
pub mod metrics;
pub mod nn;
pub mod passes;
pub mod placement;
pub mod plan;
pub(crate) mod process_map;
pub mod program;
pub mod sbp;
pub mod session;
pub mod trace;
#[cfg(feature = "watch")]
pub mod watch;

pub use shardflow_job as job;

/// Exit codes, and the report of a failure to the launcher and to the other processes.
pub mod exit {
    pub use shardflow_job::departure::report;
    pub use shardflow_job::exit::*;
}

/// Everything that a training program or a custom op needs: `use shardflow::prelude::*`.
///
/// ```
/// use shardflow::prelude::*;
///
/// let mut g = Graph::new(&Mesh::parse("data=2")?);
/// let ids = g.input("ids", &[4, 8], DType::I32, Layout::split("data", 0));
/// let x = nn::embedding(&mut g, "embedding", ids, 16, 16, Parallel::Replicated);
/// let loss = g.cross_entropy(x, ids);
/// g.minimize(loss, AdamW::default());
/// let mut session = Session::start(compile(g, &CompileOptions::default())?, &SessionOptions::default())?;
/// let report = session.step(&[("ids", HostTensor::i32(&[4, 8], vec![3; 32]))], 1e-3)?;
/// assert!((report.loss.unwrap() - 16f32.ln()).abs() < 0.1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
    pub use crate::plan::validate::PlanError;
    pub use crate::plan::{Plan, Schedule};
    pub use crate::program;
    pub use crate::sbp::rule::Rule;
    pub use crate::session::metrics::{DeviceMetrics, Metrics};
    pub use crate::session::numerics::{NonFinite, OnNonFinite};
    pub use crate::session::{Session, SessionError, SessionOptions, StepReport, Threads};
    pub use shardflow_job::exit::Exit;
    pub use shardflow_job::requests::{Request, Requests};
    pub use shardflow_kernels::device::DeviceKind;
}
