//! From the user's graph to a plan: THE ordered list of passes is in [`compile`].

use std::collections::BTreeMap;

use shardflow_kernels::device::DeviceKind;

use crate::boxing::CostModel;
use crate::graph::{Combine, Graph, GraphError, Objective};
use crate::plan::lower::{Setting, lower};
use crate::plan::slots::StageCosts;
use crate::plan::validate::{PlanError, validate};
use crate::plan::{Plan, Schedule};
use crate::text::counted;
use mode::Mode;
use precision::Precision;

pub mod autodiff;
pub mod boxing;
pub mod bucket;
mod check;
pub mod layout;
pub mod micro_batch;
pub mod mode;
pub mod optimizer;
pub mod precision;
pub mod stages;

/// What becomes of forward layout changes that the user did not write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Boxing {
    /// They are made, and listed by `explain`.
    #[default]
    Automatic,
    /// They are errors, but for reductions of partial sums, which a `row` layout asks for.
    Explicit,
}

/// How a graph is compiled.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// Training or evaluation. A program that has dropout and minimises nothing needs one.
    pub mode: Option<Mode>,
    /// Micro-batches in a step.
    pub micro_batches: usize,
    /// The schedule of the pipeline.
    pub schedule: Schedule,
    /// Threads that a kernel of a layer shard runs on.
    pub threads_per_device: usize,
    /// Devices that there are.
    pub devices: usize,
    /// Memory of one device, bytes; a plan that needs more is refused. Without it, `Session::start` refuses a plan for CPUs that
    /// needs more than the node has free: see [`crate::machine::free_memory`].
    pub memory_bytes: Option<usize>,
    /// Gradients are all-reduced in buckets of about this many bytes.
    pub bucket_bytes: usize,
    /// What collectives cost.
    pub cost_model: CostModel,
    /// Durations that credits are computed from.
    pub stage_costs: StageCosts,
    /// What becomes of layout changes that the user did not write.
    pub boxing: Boxing,
    /// How activations and their gradients are stored.
    pub precision: Precision,
    /// What the mesh's devices are.
    pub device: DeviceKind,
}

/// CPU devices that one process offers.
pub const CPU_DEVICES_MAX: usize = 64;

/// Micro-batches that a step may have; the check that a plan runs plays each of them.
pub const MICRO_BATCHES_MAX: usize = 1 << 14;

/// Threads that a device may have.
pub const THREADS_MAX: usize = 64;

impl Default for CompileOptions {
    fn default() -> Self {
        Self {
            mode: None,
            micro_batches: 1,
            schedule: Schedule::OneFOneB,
            threads_per_device: 1,
            devices: CPU_DEVICES_MAX,
            memory_bytes: None,
            bucket_bytes: 1 << 20,
            cost_model: CostModel::default(),
            stage_costs: StageCosts::default(),
            boxing: Boxing::default(),
            precision: Precision::default(),
            device: DeviceKind::default(),
        }
    }
}

/// Why there is no plan.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CompileError {
    /// The program is wrong; every place is named.
    #[error("{}", list(.0))]
    Graph(Vec<GraphError>),
    /// The mesh has more devices than there are.
    #[error("mesh {mesh} needs {}, but there are {available}; choose a smaller mesh", counted(.needed, "device"))]
    Devices {
        /// The mesh.
        mesh: String,
        /// Its devices.
        needed: usize,
        /// Devices there are.
        available: usize,
    },
    /// A count that is 0 or too large.
    #[error("{name} is {got}; it must be from 1 to {max}")]
    Range {
        /// The field of [`CompileOptions`].
        name: &'static str,
        /// What it is.
        got: usize,
        /// The most it may be.
        max: usize,
    },
    /// The plan was made and refused.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

fn list(errors: &[GraphError]) -> String {
    errors.iter().map(GraphError::to_string).collect::<Vec<_>>().join("\n")
}

/// Compiles a program. The plan is a pure function of the graph and the options.
///
/// # Errors
/// All that is wrong with the graph, together; or the reason why the plan was refused.
pub fn compile(mut graph: Graph, options: &CompileOptions) -> Result<Plan, CompileError> {
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
    // The passes, in order. Each leaves a graph that the next can rely on.
    mode::apply(&mut graph, options.mode);
    micro_batch::divide(&mut graph, options.micro_batches);
    check::sizes(&mut graph);
    checked(&graph)?;
    check::purpose(&mut graph);
    stages::check(&mut graph);
    checked(&graph)?;
    let grads = match graph.objective {
        Some(objective) => autodiff::backward(&mut graph, objective.loss),
        None => BTreeMap::new(),
    };
    checked(&graph)?;
    check::trained(&mut graph, &grads);
    check::kernels(&mut graph, options.device);
    checked(&graph)?;
    if let Some(Objective { loss, optimizer: adamw, .. }) = graph.objective {
        let total = optimizer::accumulate(&mut graph, loss);
        let of_loss = graph.outputs.iter_mut().filter(|o| o.tensor == loss && o.combine == Some(Combine::Sum));
        of_loss.for_each(|o| o.tensor = total);
        optimizer::add_update(&mut graph, &grads, adamw);
        checked(&graph)?;
    }
    layout::choose(&mut graph, &options.cost_model);
    checked(&graph)?;
    boxing::insert(&mut graph, &options.cost_model, options.boxing);
    checked(&graph)?;
    if options.precision == Precision::BF16 {
        precision::narrow(&mut graph);
    }
    bucket::gather(&mut graph, options.bucket_bytes);
    let setting = Setting {
        micro_batches: options.micro_batches,
        schedule: options.schedule,
        threads_per_device: options.threads_per_device,
        costs: options.stage_costs,
        device: options.device,
    };
    let plan = Plan { memory_bytes: options.memory_bytes, ..lower(graph, setting) };
    validate(&plan)?;
    Ok(plan)
}

fn checked(graph: &Graph) -> Result<(), CompileError> {
    let errors = graph.errors();
    if errors.is_empty() { Ok(()) } else { Err(CompileError::Graph(errors)) }
}
