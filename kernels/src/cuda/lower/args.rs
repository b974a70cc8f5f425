//! A launch whose buffers have been checked: number, shapes and types, as in the CPU backend's `launch`.

use crate::cuda::step::Element;
use crate::error::KernelError;
use crate::op::{Buffer, Launch};
use crate::tensor::{DType, element_count};

fn element(dtype: DType) -> Element {
    match dtype {
        DType::BF16 => Element::Bf16,
        DType::F32 | DType::I32 => Element::F32,
    }
}

/// A launch, and whether it adds to its accumulating write.
pub(super) struct Args<'a> {
    pub(super) launch: &'a Launch,
    pub(super) accumulate: bool,
}

impl<'a> Args<'a> {
    /// Checks a launch that needs `needed` bytes of workspace.
    pub(super) fn new(launch: &'a Launch, accumulate: bool, needed: usize) -> Result<Self, KernelError> {
        let args = Self { launch, accumulate };
        let counts = (launch.reads.len(), launch.writes.len());
        if let Some(arity) = launch.op.arity()
            && arity != counts
        {
            let count = |(reads, writes)| format!("{reads} read, {writes} written");
            return Err(args.refused("buffers", count(arity), count(counts)));
        }
        if (accumulate || launch.accumulate) && launch.op.can_accumulate().is_none() {
            return Err(args.refused("accumulate", "an op that can accumulate", launch.op.name()));
        }
        let types = |buffers: &[Buffer]| buffers.iter().map(|buffer| buffer.dtype).collect::<Vec<_>>();
        if let Some((what, expected, got)) = launch.op.bf16_fault(&types(&launch.reads), &types(&launch.writes)) {
            return Err(args.refused(&what, expected, got));
        }
        let sum = launch.op.can_accumulate().filter(|_| accumulate || launch.accumulate);
        if sum.is_some_and(|i| launch.writes[i].dtype == DType::BF16) {
            return Err(args.refused("accumulate", "a sum of type F32, since BF16 loses small terms", "BF16"));
        }
        let given = launch.workspace.as_ref().map_or(0, |b| element_count(&b.shape) * b.dtype.bytes());
        if needed > given {
            return Err(args.refused("workspace", format!("{needed} bytes"), format!("{given} bytes")));
        }
        Ok(args)
    }

    pub(super) fn refused(&self, what: &str, expected: impl Into<String>, got: impl Into<String>) -> KernelError {
        KernelError::arguments(self.launch.op.name(), what, expected, got)
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

    fn check_dtype(&self, what: &str, i: usize, buffer: &Buffer, dtype: DType) -> Result<(), KernelError> {
        if buffer.dtype == dtype {
            return Ok(());
        }
        Err(self.refused(&format!("dtype of {what} {i}"), format!("{dtype:?}"), format!("{:?}", buffer.dtype)))
    }

    /// Fails unless these reads and all writes are floats, and all other reads are integers. `new` checks which floats
    /// may be bf16.
    pub(super) fn expect_floats(&self, reads: &[usize]) -> Result<(), KernelError> {
        for (i, buffer) in self.launch.reads.iter().enumerate() {
            match reads.contains(&i) {
                true if buffer.dtype.is_float() => {}
                true => self.check_dtype("read", i, buffer, DType::F32)?,
                false => self.check_dtype("read", i, buffer, DType::I32)?,
            }
        }
        let mut integers = self.launch.writes.iter().enumerate().filter(|(_, buffer)| !buffer.dtype.is_float());
        integers.try_for_each(|(i, buffer)| self.check_dtype("write", i, buffer, DType::F32))
    }

    /// Picks the variant of a kernel (see [`variants`](super::kernel::variants)) for the types of read `i` and write `w`.
    pub(super) fn pick(&self, i: usize, w: usize, [f32, bf16, widening]: [&'static str; 3]) -> &'static str {
        match (self.read_dtype(i), self.write_dtype(w)) {
            (DType::BF16, DType::BF16) => bf16,
            (DType::BF16, _) => widening,
            _ => f32,
        }
    }

    pub(super) fn read_element(&self, i: usize) -> Element {
        element(self.read_dtype(i))
    }

    pub(super) fn write_element(&self, i: usize) -> Element {
        element(self.write_dtype(i))
    }

    /// Fails unless read `i` is of the type of write 0.
    pub(super) fn expect_same_dtype(&self, i: usize) -> Result<(), KernelError> {
        self.check_dtype("read", i, &self.launch.reads[i], self.write_dtype(0))
    }

    fn expect(&self, what: &str, got: &[usize], expected: &[usize]) -> Result<(), KernelError> {
        if got == expected {
            return Ok(());
        }
        Err(self.refused(what, format!("{expected:?}"), format!("{got:?}")))
    }

    pub(super) fn expect_reads(&self, reads: &[usize], shape: &[usize]) -> Result<(), KernelError> {
        reads.iter().try_for_each(|&i| self.expect(&format!("shape of read {i}"), self.read_shape(i), shape))
    }

    pub(super) fn expect_writes(&self, writes: &[usize], shape: &[usize]) -> Result<(), KernelError> {
        writes.iter().try_for_each(|&i| self.expect(&format!("shape of write {i}"), self.write_shape(i), shape))
    }

    /// Fails unless write 0 has as many elements as read `r`.
    pub(super) fn expect_same_count(&self, r: usize) -> Result<(), KernelError> {
        let (expected, got) = (self.read_shape(r), self.write_shape(0));
        if element_count(expected) == element_count(got) {
            return Ok(());
        }
        let got = format!("{got:?}, {}", element_count(got));
        Err(self.refused("elements of write 0", format!("as many as {expected:?}"), got))
    }

    /// Returns the leading dims of read `i`, their element count (the rows), and the last dim.
    pub(super) fn rows_of(&self, i: usize) -> Result<(&'a [usize], usize, usize), KernelError> {
        let split = self.read_shape(i).split_last();
        let (width, leading) =
            split.ok_or_else(|| self.refused(&format!("shape of read {i}"), "at least one dim", "[]"))?;
        Ok((leading, element_count(leading), *width))
    }
}
