//! Checks the shapes and dtypes of a launch's buffers. The checks are the same for every backend.

use std::fmt::{Debug, Display};

use crate::error::{KernelError, Result};
use crate::op::{Buffer, Launch, Op};
use crate::region::check_inside;
use crate::tensor::{DType, Region, element_count};

impl Launch {
    /// Checks the number of buffers, which of them are BF16, and whether the op supports the launch's `accumulate`.
    pub(crate) fn check_op(&self, accumulate: bool) -> Result<()> {
        let count = |(reads, writes)| format!("{reads} read, {writes} written");
        let counts = (self.reads.len(), self.writes.len());
        if let Some(arity) = self.op.arity().filter(|arity| *arity != counts) {
            return Err(self.refused("buffers", count(arity), count(counts)));
        }
        if accumulate && self.op.can_accumulate().is_none() && !matches!(self.op, Op::Custom(_)) {
            return Err(self.refused("accumulate", "an op that can accumulate", self.op.name()));
        }
        let sum = self.op.can_accumulate().filter(|_| accumulate).and_then(|write| self.writes.get(write));
        if sum.is_some_and(|sum| sum.dtype == DType::BF16) {
            return Err(self.refused("accumulate", "a sum of type F32, since BF16 loses small terms", "BF16"));
        }
        if matches!(self.op, Op::Collective(_)) { Ok(()) } else { self.check_bf16() }
    }

    /// Checks BF16 buffers. Their ports must support BF16, and all reads that may be BF16 must have one dtype. If that
    /// dtype is F32, all writes are F32, as only casts convert. If that dtype is BF16, a write may be BF16 or F32: F32
    /// is for sums that later launches or collectives continue.
    fn check_bf16(&self) -> Result<()> {
        let is_half = |buffer: &Buffer| buffer.dtype == DType::BF16;
        let ports = |buffers: &[Buffer], may: fn(&Op, usize) -> bool| {
            buffers.iter().enumerate().position(|(i, buffer)| is_half(buffer) && !may(&self.op, i))
        };
        for (what, unsupported) in
            [("read", ports(&self.reads, Op::reads_bf16)), ("write", ports(&self.writes, Op::writes_bf16))]
        {
            if let Some(i) = unsupported {
                return Err(self.refused(&format!("dtype of {what} {i}"), "F32 or I32", "BF16"));
            }
        }
        let wide = (0..self.reads.len()).find(|&i| self.reads[i].dtype == DType::F32 && self.op.reads_bf16(i));
        let Some(wide) = wide else { return Ok(()) };
        let mixed = self.reads.iter().any(is_half);
        self.require(!mixed, format_args!("dtype of read {wide}"), "BF16, like the other reads", DType::F32)?;
        match self.writes.iter().position(is_half).filter(|_| !matches!(self.op, Op::Cast)) {
            Some(half) => Err(self.refused(&format!("dtype of write {half}"), "F32, like the reads", "BF16")),
            None => Ok(()),
        }
    }

    /// Checks the buffers' shapes and dtypes, not their number. Collectives and custom kernels check their own buffers.
    pub(crate) fn check_buffers(&self, accumulate: bool) -> Result<()> {
        self.check_shapes()?;
        match self.op {
            Op::Collective(_) | Op::Custom(_) => Ok(()),
            Op::Cast => match (self.reads[0].dtype, self.writes[0].dtype) {
                (DType::F32, DType::BF16) | (DType::BF16, DType::F32) => Ok(()),
                (from, to) => Err(self.refused("dtypes", "F32 to BF16 or BF16 to F32", format!("{from:?} to {to:?}"))),
            },
            Op::Copy | Op::CopyRegion { .. } => {
                self.expect_dtype("read", 0, self.reads[0].dtype, self.writes[0].dtype)?;
                self.require(!accumulate || self.writes[0].dtype != DType::I32, "dtype of a sum", "floats", DType::I32)
            }
            _ => self.check_dtypes(),
        }
    }

    /// Checks that indices and dropout's `rng` are integers, and that all other buffers are floats of any width.
    fn check_dtypes(&self) -> Result<()> {
        let integers = match self.op {
            Op::Embedding { .. } | Op::EmbeddingGrad { .. } => Some(0),
            Op::Dropout { .. } => Some(1),
            Op::SumExpTarget { .. } => Some(2),
            Op::CrossEntropyGrad { .. } => Some(4),
            _ => None,
        };
        let float = |dtype: DType| if dtype.is_float() { dtype } else { DType::F32 };
        for (i, &Buffer { dtype, .. }) in self.reads.iter().enumerate() {
            self.expect_dtype("read", i, dtype, if integers == Some(i) { DType::I32 } else { float(dtype) })?;
        }
        let mut writes = self.writes.iter().map(|write| write.dtype).enumerate();
        writes.try_for_each(|(i, dtype)| self.expect_dtype("write", i, dtype, float(dtype)))
    }

    fn check_shapes(&self) -> Result<()> {
        let (read, write) = (|i: usize| &self.reads[i].shape[..], |i: usize| &self.writes[i].shape[..]);
        match &self.op {
            Op::Fill { .. } | Op::Collective(_) | Op::Custom(_) => Ok(()),
            Op::Copy | Op::Scale { .. } | Op::Gelu => self.expect_same_count(0),
            Op::GeluGrad => self.expect_same_count(0).and_then(|()| self.expect_same_count(1)),
            Op::Cast => self.expect(&[], &[(0, read(0))]),
            Op::CopyRegion { src, dst } => {
                check_inside("copy_region", "src", src, read(0))?;
                check_inside("copy_region", "dst", dst, write(0))?;
                self.require(src.size == dst.size, "size of dst", format_args!("{:?}", src.size), &dst.size)
            }
            Op::Add => {
                self.expect(&[], &[(0, read(0))])?;
                self.expect_suffix("shape of read 1", read(0), read(1))
            }
            Op::SumLeading => self.expect_suffix("shape of write 0", read(0), write(0)),
            Op::Einsum(einsum) => self.expect(&[], &[(0, &einsum.output_shape(read(0), read(1))?)]),
            Op::Embedding { .. } => {
                let [_, width] = self.dims("shape of read 1", read(1), "[v, c]")?;
                self.expect(&[], &[(0, &[read(0), &[width]].concat())])
            }
            Op::EmbeddingGrad { .. } => {
                let [_, width] = self.dims("shape of write 0", write(0), "[v, c]")?;
                self.expect(&[(1, &[read(0), &[width]].concat())], &[])
            }
            Op::LayerNorm { .. } | Op::LayerNormGrad | Op::RowMax | Op::SumExpTarget { .. } => self.check_row_shapes(0),
            Op::CrossEntropyGrad { .. } => self.check_row_shapes(1),
            Op::Attention { .. } => {
                let [batch, time, heads, _] = self.attention_dims()?;
                self.expect(&[1, 2].map(|i| (i, read(0))), &[(0, read(0)), (1, &[batch, heads, time])])
            }
            Op::AttentionGrad { .. } => {
                let [batch, time, heads, _] = self.attention_dims()?;
                self.expect(&[1, 2, 3, 4].map(|i| (i, read(0))), &[0, 1, 2].map(|i| (i, read(0))))?;
                self.expect(&[(5, &[batch, heads, time])], &[])
            }
            Op::TokenLoss { .. } => self.expect(&[(1, read(0)), (2, read(0))], &[(0, &[])]),
            Op::Dropout { p, shape, start, .. } => {
                self.expect(&[(1, &[2])], &[(0, read(0))])?;
                let part = Region { start: start.clone(), size: read(0).to_vec() };
                check_inside("dropout", "region of x", &part, shape)?;
                self.require((0.0..=1.0).contains(p), "p", "0 to 1", p)
            }
            Op::SumSquares { index } => {
                let fits = matches!(write(0), [n, 2] if index < n);
                self.require(fits, "shape of write 0", format_args!("[n, 2] with n > {index}"), write(0))
            }
            Op::ClipScale { .. } => {
                self.expect(&[], &[(0, &[]), (1, &[])])?;
                self.require(element_count(read(0)).is_multiple_of(2), "shape of read 0", "[n, 2]", read(0))
            }
            Op::AdamW { .. } => self.expect(&[(1, &[2]), (2, &[])], &[0, 1, 2].map(|i| (i, read(0)))),
        }
    }

    /// Checks the shapes of an op that works on the rows of `reads[i]`. A row lies along the last dim.
    fn check_row_shapes(&self, i: usize) -> Result<()> {
        let (x, (leading, width)) = (&self.reads[i].shape[..], self.rows(i)?);
        match self.op {
            Op::LayerNorm { .. } => self.expect(&[(1, &[width])], &[(0, x), (1, leading), (2, leading)]),
            Op::LayerNormGrad => {
                self.expect(&[(1, x), (2, &[width]), (3, leading), (4, leading)], &[(0, x), (1, &[width])])
            }
            Op::SumExpTarget { .. } => self.expect(&[(1, leading), (2, leading)], &[(0, leading), (1, leading)]),
            Op::CrossEntropyGrad { .. } => {
                self.expect(&[(0, &[]), (2, leading), (3, leading), (4, leading)], &[(0, x)])
            }
            _ => self.expect(&[], &[(0, leading)]),
        }
    }

    pub(crate) fn refused(&self, what: &str, expected: impl Into<String>, got: impl Into<String>) -> KernelError {
        KernelError::arguments(self.op.name(), what, expected, got)
    }

    /// Fails if `holds` is false. Formats the texts only in this case, because most launches pass many checks.
    fn require(&self, holds: bool, what: impl Display, expected: impl Display, got: impl Debug) -> Result<()> {
        if holds { Ok(()) } else { Err(self.refused(&what.to_string(), expected.to_string(), format!("{got:?}"))) }
    }

    pub(crate) fn dims<const N: usize>(&self, what: &str, shape: &[usize], expected: &str) -> Result<[usize; N]> {
        shape.try_into().map_err(|_| self.refused(what, expected, format!("{shape:?}")))
    }

    /// Attention's extents `[b, t, h, d]`.
    pub(crate) fn attention_dims(&self) -> Result<[usize; 4]> {
        self.dims("shape of read 0", &self.reads[0].shape, "[b, t, h, d]")
    }

    /// Splits read `i`'s shape into its leading dims and its last dim.
    fn rows(&self, i: usize) -> Result<(&[usize], usize)> {
        let split = self.reads[i].shape.split_last();
        let (width, leading) =
            split.ok_or_else(|| self.refused(&format!("shape of read {i}"), "at least one dim", "[]"))?;
        Ok((leading, *width))
    }

    /// The number and the width of read `i`'s rows.
    pub(crate) fn rows_of(&self, i: usize) -> Result<[usize; 2]> {
        self.rows(i).map(|(leading, width)| [element_count(leading), width])
    }

    pub(crate) fn expect_dtype(&self, what: &str, i: usize, got: DType, expected: DType) -> Result<()> {
        self.require(got == expected, format_args!("dtype of {what} {i}"), format_args!("{expected:?}"), got)
    }

    fn expect_suffix(&self, what: &str, whole: &[usize], got: &[usize]) -> Result<()> {
        self.require(whole.ends_with(got), what, format_args!("a suffix of {whole:?}"), got)
    }

    fn expect(&self, reads: &[(usize, &[usize])], writes: &[(usize, &[usize])]) -> Result<()> {
        for (what, shapes, buffers) in [("read", reads, &self.reads), ("write", writes, &self.writes)] {
            for (i, shape) in shapes {
                let got = &buffers[*i].shape;
                self.require(got == shape, format_args!("shape of {what} {i}"), format_args!("{shape:?}"), got)?;
            }
        }
        Ok(())
    }

    fn expect_same_count(&self, i: usize) -> Result<()> {
        let (read, write) = (&self.reads[i].shape, &self.writes[0].shape);
        let (expected, got) = (element_count(read), element_count(write));
        let expected_text = format_args!("{expected}, as in read {i} of shape {read:?}");
        let got_text = format_args!("{got} in {write:?}");
        self.require(expected == got, "number of elements of write 0", expected_text, got_text)
    }
}
