//! Compiles the user's graph to a plan. [`compile`] holds the ordered list of passes.

use std::collections::BTreeMap;
use std::time::Duration;

pub use shardflow_kernels::cpu::THREADS_MAX;
use shardflow_kernels::device::DeviceKind;

use crate::boxing::{CostModel, Planner};
use crate::graph::{Combine, Graph, GraphError, Objective};
use crate::placement::MESH_DEVICES_MAX;
use crate::plan::error::PlanError;
use crate::plan::lower::lower;
use crate::plan::validate::validate;
use crate::plan::{Plan, Schedule};
pub use boxing::Boxing;
use mode::Mode;
use precision::Precision;
use progress::{OnSlow, RunningPart};
use shardflow_job::text::counted;

pub(crate) mod autodiff;
pub(crate) mod boxing;
pub(crate) mod bucket;
mod check;
pub(crate) mod layout;
pub(crate) mod micro_batch;
pub mod mode;
pub(crate) mod optimizer;
pub mod precision;
pub(crate) mod progress;

/// How a graph is compiled.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// Training or evaluation. Required for a program that has dropout and minimises nothing.
    pub mode: Option<Mode>,
    /// Micro-batches per step.
    pub micro_batches: usize,
    /// The schedule of the pipeline.
    pub schedule: Schedule,
    /// Number of threads that run one compute kernel.
    pub threads_per_device: usize,
    /// Number of available devices.
    pub devices: usize,
    /// Memory of one device, in bytes. A plan that needs more is refused. `Session::start` also refuses a plan for CPUs
    /// that needs more than the node's free memory, see [`shardflow_job::machine::free_memory`].
    pub memory_bytes: Option<usize>,
    /// Approximate size, in bytes, of a bucket: the gradients that one all-reduce sums.
    pub bucket_bytes: usize,
    /// Costs of collectives.
    pub cost_model: CostModel,
    /// Whether layout changes that the user did not write are inserted or refused.
    pub boxing: Boxing,
    /// How activations and their gradients are stored.
    pub precision: Precision,
    /// The kind of the mesh's devices.
    pub device: DeviceKind,
    /// Called once per second while the compilation runs, so never if it takes less than a second.
    pub on_slow: Option<OnSlow>,
}

/// Maximum number of micro-batches in a step; plan validation simulates each of them.
pub const MICRO_BATCHES_MAX: usize = 1 << 14;

impl Default for CompileOptions {
    fn default() -> Self {
        Self {
            mode: None,
            micro_batches: 1,
            schedule: Schedule::OneFOneB,
            threads_per_device: 1,
            devices: MESH_DEVICES_MAX,
            memory_bytes: None,
            bucket_bytes: 1 << 20,
            cost_model: CostModel::default(),
            boxing: Boxing::default(),
            precision: Precision::default(),
            device: DeviceKind::default(),
            on_slow: None,
        }
    }
}

/// Why compilation failed.
#[derive(Clone, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages explain variants and fields")]
pub enum CompileError {
    #[error("{}", .0.iter().map(GraphError::to_string).collect::<Vec<_>>().join("\n"))]
    Graph(Vec<GraphError>),
    #[error("mesh {mesh} needs {}, but only {available} are available; choose a smaller mesh", counted(.needed, "device"))]
    Devices { mesh: String, needed: usize, available: usize },
    #[error("{name} is {got}; it must be from 1 to {max}")]
    Range { name: &'static str, got: usize, max: usize },
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// Compiles a program. The plan is a pure function of the graph and the options.
///
/// # Errors
/// Returns an error for an invalid option, all errors that the first failing check finds in the graph, or the reason
/// why validation refused the plan.
pub fn compile(graph: Graph, options: &CompileOptions) -> Result<Plan, CompileError> {
    progress::report(options.on_slow, Duration::from_secs(1), |part| compile_parts(graph, options, part))
}

fn compile_parts(mut graph: Graph, options: &CompileOptions, part: &RunningPart) -> Result<Plan, CompileError> {
    let needed = graph.mesh().device_count();
    if needed > options.devices {
        let mesh = graph.mesh().to_string();
        return Err(CompileError::Devices { mesh, needed, available: options.devices });
    }
    let counts = [
        ("micro_batches", options.micro_batches, MICRO_BATCHES_MAX),
        ("threads_per_device", options.threads_per_device, THREADS_MAX),
    ];
    if let Some((name, got, max)) = counts.into_iter().find(|(_, got, max)| !(1..=*max).contains(got)) {
        return Err(CompileError::Range { name, got, max });
    }
    let begin = |name| *part.lock() = name;
    begin("micro-batches and gradients");
    // The passes, in order. Each pass establishes what the next pass requires.
    mode::apply(&mut graph, options.mode);
    micro_batch::divide(&mut graph, options.micro_batches);
    check::sizes(&mut graph);
    check_errors(&graph)?;
    check::purpose(&mut graph);
    check_errors(&graph)?;
    let grads = match graph.objective {
        Some(objective) => autodiff::backward(&mut graph, objective.loss),
        None => BTreeMap::new(),
    };
    check_errors(&graph)?;
    check::trained(&mut graph, &grads);
    check::kernels(&mut graph, options.device);
    check_errors(&graph)?;
    if let Some(Objective { loss, optimizer: adamw, .. }) = graph.objective {
        let total = optimizer::accumulate(&mut graph, loss);
        let loss_outputs = graph.outputs.iter_mut().filter(|o| o.tensor == loss && o.combine == Some(Combine::Sum));
        loss_outputs.for_each(|o| o.tensor = total);
        optimizer::add_update(&mut graph, &grads, adamw);
        check_errors(&graph)?;
    }
    begin("layouts");
    let mut planner = Planner::new(options.cost_model);
    layout::choose(&mut graph, &mut planner);
    check_errors(&graph)?;
    begin("layout changes");
    boxing::insert(&mut graph, &mut planner, options.boxing);
    check_errors(&graph)?;
    if options.precision == Precision::BF16 {
        precision::narrow(&mut graph);
    }
    bucket::gather(&mut graph, options.bucket_bytes);
    begin("segments, classes and memory");
    let CompileOptions { micro_batches, schedule, threads_per_device, device, memory_bytes, .. } = *options;
    let plan = lower(graph, micro_batches, schedule, (threads_per_device, device), memory_bytes);
    begin("checks of the plan");
    validate(&plan)?;
    Ok(plan)
}

fn check_errors(graph: &Graph) -> Result<(), CompileError> {
    let errors = graph.errors();
    if errors.is_empty() { Ok(()) } else { Err(CompileError::Graph(errors)) }
}

#[cfg(test)]
mod tests;
