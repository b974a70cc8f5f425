//! A launch whose buffers have been checked: number, shapes and types.

use crate::error::Result;
use crate::op::{Buffer, Launch};
use crate::tensor::{DType, element_count};

pub(super) struct Args<'a> {
    pub(super) launch: &'a Launch,
    pub(super) accumulate: bool,
}

impl<'a> Args<'a> {
    /// Checks a launch that needs `needed` bytes of workspace.
    pub(super) fn new(launch: &'a Launch, accumulate: bool, needed: usize) -> Result<Self> {
        let counts = (launch.reads.len(), launch.writes.len());
        if let Some(arity) = launch.op.arity()
            && arity != counts
        {
            let count = |(reads, writes)| format!("{reads} read, {writes} written");
            return Err(launch.refused("buffers", count(arity), count(counts)));
        }
        if (accumulate || launch.accumulate) && launch.op.can_accumulate().is_none() {
            return Err(launch.refused("accumulate", "an op that can accumulate", launch.op.name()));
        }
        let types = |buffers: &[Buffer]| buffers.iter().map(|buffer| buffer.dtype).collect::<Vec<_>>();
        if let Some((what, expected, got)) = launch.op.bf16_fault(&types(&launch.reads), &types(&launch.writes)) {
            return Err(launch.refused(&what, expected, got));
        }
        let sum = launch.op.can_accumulate().filter(|_| accumulate || launch.accumulate);
        if sum.is_some_and(|i| launch.writes[i].dtype == DType::BF16) {
            return Err(launch.refused("accumulate", "a sum of type F32, since BF16 loses small terms", "BF16"));
        }
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

    /// Picks the variant of a kernel (see [`variants`](super::kernel::variants)) for the types of read `i` and write `w`.
    pub(super) fn pick(&self, i: usize, w: usize, [f32, bf16, widening]: [&'static str; 3]) -> &'static str {
        match (self.read_dtype(i), self.write_dtype(w)) {
            (DType::BF16, DType::BF16) => bf16,
            (DType::BF16, _) => widening,
            _ => f32,
        }
    }
}
