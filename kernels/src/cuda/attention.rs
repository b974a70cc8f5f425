//! Selects the implementation of attention on a GPU, and counts the launches that each implementation runs.

use std::sync::atomic::{AtomicU64, Ordering};

use super::step::Pass;
use crate::error::{KernelError, Result};
use crate::op::Op;

/// Environment variable that selects the attention implementation.
pub const ATTENTION_ENV: &str = "SHARDFLOW_ATTENTION";

/// The attention implementation of a GPU. All processes of a job must use the same one: results differ by rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Attention {
    /// Shardflow's kernels.
    Own,
    /// cuDNN if it has an engine that gives the same bits in every run. Otherwise, Shardflow's kernels.
    #[default]
    Ordered,
    /// cuDNN, even if its backward engine sums dq in arbitrary order. Results may then differ from run to run.
    AnyOrder,
}

impl Attention {
    /// Reads `SHARDFLOW_ATTENTION`: `own`, `cudnn` (the default) or `cudnn-any-order`.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] for any other value.
    pub fn from_env() -> Result<Self> {
        Self::parse(std::env::var_os(ATTENTION_ENV).map(|value| value.to_string_lossy().into_owned()).as_deref())
    }

    fn parse(value: Option<&str>) -> Result<Self> {
        match value {
            None | Some("" | "cudnn") => Ok(Self::Ordered),
            Some("own") => Ok(Self::Own),
            Some("cudnn-any-order") => Ok(Self::AnyOrder),
            Some(other) => Err(KernelError::Unavailable {
                what: format!("unknown attention implementation {other:?}"),
                hint: format!("set {ATTENTION_ENV} to own, cudnn or cudnn-any-order"),
            }),
        }
    }
}

/// Launch counters, indexed by [`Pass`].
#[derive(Debug, Default)]
pub(crate) struct AttentionCounters([PassCounters; 2]);

/// Launch counts of one pass: all launches, and the launches that cuDNN ran.
#[derive(Debug, Default)]
struct PassCounters {
    all: AtomicU64,
    cudnn: AtomicU64,
}

impl AttentionCounters {
    /// Counts the launch if its op is attention, whichever implementation runs it.
    pub(crate) fn count_launch(&self, op: &Op) {
        let pass = match op {
            Op::Attention { .. } => Pass::Forward,
            Op::AttentionGrad { .. } => Pass::Backward,
            _ => return,
        };
        self.0[pass as usize].all.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_cudnn(&self, pass: Pass, issued: bool) {
        self.0[pass as usize].cudnn.fetch_add(u64::from(issued), Ordering::Relaxed);
    }

    pub(crate) fn by_name(&self) -> [(&'static str, u64); 4] {
        let [forward, backward] = self.0.each_ref().map(|counters| {
            let cudnn = counters.cudnn.load(Ordering::Relaxed);
            (cudnn, counters.all.load(Ordering::Relaxed).saturating_sub(cudnn))
        });
        [
            ("attention_forward_cudnn", forward.0),
            ("attention_forward_own", forward.1),
            ("attention_backward_cudnn", backward.0),
            ("attention_backward_own", backward.1),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attention_implementation_is_selected_by_name() {
        assert_eq!(Attention::parse(None), Ok(Attention::Ordered));
        assert_eq!(Attention::parse(Some("own")), Ok(Attention::Own));
        assert_eq!(Attention::parse(Some("cudnn-any-order")), Ok(Attention::AnyOrder));
        let error = Attention::parse(Some("fast")).unwrap_err().to_string();
        assert_eq!(
            error,
            "unknown attention implementation \"fast\": set SHARDFLOW_ATTENTION to own, cudnn or cudnn-any-order"
        );
    }
}
