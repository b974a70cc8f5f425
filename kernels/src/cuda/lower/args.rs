//! A launch whose buffers have been checked for their number, shapes and types.

use crate::error::Result;
use crate::op::Launch;
use crate::tensor::{DType, element_count};

pub(super) struct Args<'a> {
    pub(super) launch: &'a Launch,
    pub(super) accumulate: bool,
}

impl<'a> Args<'a> {
    /// Checks a launch that needs `needed` bytes of workspace.
    pub(super) fn new(launch: &'a Launch, accumulate: bool, needed: usize) -> Result<Self> {
        launch.check_op(accumulate || launch.accumulate)?;
        let given = launch.workspace.as_ref().map_or(0, |b| element_count(&b.shape) * b.dtype.bytes());
        if needed > given {
            return Err(launch.refused("workspace", format!("{needed} bytes"), format!("{given} bytes")));
        }
        launch.check_buffers(accumulate)?;
        Ok(Self { launch, accumulate })
    }

    pub(super) fn read_shape(&self, i: usize) -> &'a [usize] {
        &self.launch.reads[i].shape
    }

    pub(super) fn write_shape(&self, i: usize) -> &'a [usize] {
        &self.launch.writes[i].shape
    }

    pub(super) fn written(&self, i: usize) -> usize {
        element_count(self.write_shape(i))
    }

    pub(super) fn read_dtype(&self, i: usize) -> DType {
        self.launch.reads[i].dtype
    }

    pub(super) fn write_dtype(&self, i: usize) -> DType {
        self.launch.writes[i].dtype
    }

    /// Picks the variant of a kernel (see `kernel::variants`) for the types of read `i` and write `w`.
    pub(super) fn pick(&self, i: usize, w: usize, [f32, bf16, widening]: [&'static str; 3]) -> &'static str {
        match (self.read_dtype(i), self.write_dtype(w)) {
            (DType::BF16, DType::BF16) => bf16,
            (DType::BF16, _) => widening,
            _ => f32,
        }
    }

    /// Picks the variant of a kernel for the type of read `i` alone.
    pub(super) fn pick_by_read(&self, i: usize, [f32, bf16]: [&'static str; 2]) -> &'static str {
        if self.read_dtype(i) == DType::BF16 { bf16 } else { f32 }
    }
}
