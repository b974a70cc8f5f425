//! Why a plan is refused.

/// Why a plan is refused.
#[derive(Clone, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages explain variants and fields")]
pub enum PlanError {
    #[error("the plan cannot run to completion: {0}")]
    Liveness(String),
    #[error(
        "devices {} and {} call different collectives of group {group}: {} versus {}",
        first.0, second.0, first.1, second.1
    )]
    CollectiveOrder { group: u32, first: (usize, String), second: (usize, String) },
    #[error(
        "the plan does not fit: each device may use {budget} bytes\n{table}reduce the batch, use more micro-batches or devices"
    )]
    Memory { budget: usize, table: String },
    #[error(
        "the plan does not fit: this node has {budget} bytes free ({bound}), but the job needs {needed} bytes\n{table}reduce \
         the batch, use more micro-batches or more nodes, or give the job more memory"
    )]
    NodeMemory { budget: u64, bound: String, needed: u64, extra: u64, table: String },
    /// A buffer is outside its register, scratch or arena: a planner bug.
    #[error("{action}: launch {launch} ({op}): a buffer ends at byte {end}, but its memory has only {size} bytes")]
    Bounds { action: String, launch: usize, op: String, end: usize, size: usize },
    /// Two parts of a device's arena overlap, or a part exceeds it: a planner bug.
    #[error("device {device}: {first} ends at byte {end}, but {second} starts at byte {start}")]
    Overlap { device: usize, first: String, end: usize, second: String, start: usize },
}
