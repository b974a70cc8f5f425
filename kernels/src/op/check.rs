//! Checks the shapes and dtypes of a launch's buffers: the same for every backend.

use crate::error::{KernelError, Result};
use crate::op::{Buffer, Launch, Op};
use crate::region::check_inside;
use crate::tensor::{DType, Region, element_count};

impl Launch {
    /// Checks the buffers of a built-in op, whose number has been checked. `accumulate` is true if the launch adds to
    /// its accumulating write. Collectives and custom kernels check their own.
    pub(crate) fn check_buffers(&self, accumulate: bool) -> Result<()> {
        self.check_shapes()?;
        match self.op {
            Op::Collective(_) | Op::Custom(_) => Ok(()),
            Op::Cast => match (self.reads[0].dtype, self.writes[0].dtype) {
                (DType::F32, DType::BF16) | (DType::BF16, DType::F32) => Ok(()),
                (from, to) => Err(self.refused("dtypes", "F32 to BF16 or BF16 to F32", format!("{from:?} to {to:?}"))),
            },
            Op::Copy | Op::CopyRegion { .. } => {
                self.expect_dtype("read", 0, &self.reads[0], self.writes[0].dtype)?;
                if accumulate && self.writes[0].dtype == DType::I32 {
                    return Err(self.refused("accumulate", "floats", "integers"));
                }
                Ok(())
            }
            _ => self.check_dtypes(),
        }
    }

    /// Fails unless indices and random numbers are integers and all else is floats. [`Op::bf16_fault`] checks which
    /// floats may be bf16.
    fn check_dtypes(&self) -> Result<()> {
        let integers = match self.op {
            Op::Embedding { .. } | Op::EmbeddingGrad { .. } => Some(0),
            Op::Dropout { .. } => Some(1),
            Op::SumExpTarget { .. } => Some(2),
            Op::CrossEntropyGrad { .. } => Some(4),
            _ => None,
        };
        let float = |buffer: &Buffer| if buffer.dtype.is_float() { buffer.dtype } else { DType::F32 };
        for (i, read) in self.reads.iter().enumerate() {
            self.expect_dtype("read", i, read, if integers == Some(i) { DType::I32 } else { float(read) })?;
        }
        let mut writes = self.writes.iter().enumerate();
        writes.try_for_each(|(i, write)| self.expect_dtype("write", i, write, float(write)))
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
                self.expect_equal("size of dst", &src.size, &dst.size)
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
            Op::LayerNorm { .. } => {
                let (leading, width) = self.rows(0)?;
                self.expect(&[(1, &[width])], &[(0, read(0)), (1, leading), (2, leading)])
            }
            Op::LayerNormGrad => {
                let (leading, width) = self.rows(0)?;
                let reads = [(1, read(0)), (2, &[width]), (3, leading), (4, leading)];
                self.expect(&reads, &[(0, read(0)), (1, &[width])])
            }
            Op::Attention { .. } => {
                let [batch, time, heads, _] = self.attention_dims()?;
                self.expect(&[1, 2].map(|i| (i, read(0))), &[(0, read(0)), (1, &[batch, heads, time])])
            }
            Op::AttentionGrad { .. } => {
                let [batch, time, heads, _] = self.attention_dims()?;
                self.expect(&[1, 2, 3, 4].map(|i| (i, read(0))), &[0, 1, 2].map(|i| (i, read(0))))?;
                self.expect(&[(5, &[batch, heads, time])], &[])
            }
            Op::RowMax => self.expect(&[], &[(0, self.rows(0)?.0)]),
            Op::SumExpTarget { .. } => {
                let (leading, _) = self.rows(0)?;
                self.expect(&[(1, leading), (2, leading)], &[(0, leading), (1, leading)])
            }
            Op::TokenLoss { .. } => self.expect(&[(1, read(0)), (2, read(0))], &[(0, &[])]),
            Op::CrossEntropyGrad { .. } => {
                let (leading, _) = self.rows(1)?;
                self.expect(&[(0, &[]), (2, leading), (3, leading), (4, leading)], &[(0, read(1))])
            }
            Op::Dropout { p, shape, start, .. } => {
                self.expect(&[], &[(0, read(0))])?;
                self.expect(&[(1, &[2])], &[])?;
                let part = Region { start: start.clone(), size: read(0).to_vec() };
                check_inside("dropout", "x in the whole tensor", &part, shape)?;
                let fits = (0.0..=1.0).contains(p);
                if fits { Ok(()) } else { Err(self.refused("p", "0 to 1", p.to_string())) }
            }
            Op::SumSquares { index } => match write(0) {
                [n, 2] if index < n => Ok(()),
                other => {
                    Err(self.refused("shape of write 0", format!("[n, 2] with n > {index}"), format!("{other:?}")))
                }
            },
            Op::ClipScale { .. } => {
                self.expect(&[], &[(0, &[]), (1, &[])])?;
                let fits = element_count(read(0)).is_multiple_of(2);
                if fits { Ok(()) } else { Err(self.refused("shape of read 0", "[n, 2]", format!("{:?}", read(0)))) }
            }
            Op::AdamW { .. } => self.expect(&[(1, &[2]), (2, &[])], &[0, 1, 2].map(|i| (i, read(0)))),
        }
    }

    pub(crate) fn refused(&self, what: &str, expected: impl Into<String>, got: impl Into<String>) -> KernelError {
        KernelError::arguments(self.op.name(), what, expected, got)
    }

    /// The extents of a shape of `N` dims.
    pub(crate) fn dims<const N: usize>(&self, what: &str, shape: &[usize], expected: &str) -> Result<[usize; N]> {
        shape.try_into().map_err(|_| self.refused(what, expected, format!("{shape:?}")))
    }

    /// The extents `[b, t, h, d]` of attention.
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

    /// The number of rows of read `i`, and their width.
    pub(crate) fn rows_of(&self, i: usize) -> Result<[usize; 2]> {
        self.rows(i).map(|(leading, width)| [element_count(leading), width])
    }

    fn expect_dtype(&self, what: &str, i: usize, buffer: &Buffer, dtype: DType) -> Result<()> {
        if buffer.dtype == dtype {
            return Ok(());
        }
        Err(self.refused(&format!("dtype of {what} {i}"), format!("{dtype:?}"), format!("{:?}", buffer.dtype)))
    }

    fn expect_equal(&self, what: &str, expected: &[usize], got: &[usize]) -> Result<()> {
        if got == expected {
            return Ok(());
        }
        Err(self.refused(what, format!("{expected:?}"), format!("{got:?}")))
    }

    fn expect_suffix(&self, what: &str, whole: &[usize], got: &[usize]) -> Result<()> {
        if whole.ends_with(got) {
            return Ok(());
        }
        Err(self.refused(what, format!("a suffix of {whole:?}"), format!("{got:?}")))
    }

    /// Fails unless these reads and these writes have these shapes.
    fn expect(&self, reads: &[(usize, &[usize])], writes: &[(usize, &[usize])]) -> Result<()> {
        for (what, shapes, buffers) in [("read", reads, &self.reads), ("write", writes, &self.writes)] {
            for (i, shape) in shapes {
                self.expect_equal(&format!("shape of {what} {i}"), shape, &buffers[*i].shape)?;
            }
        }
        Ok(())
    }

    /// Fails unless write 0 has as many elements as read `i`.
    fn expect_same_count(&self, i: usize) -> Result<()> {
        let (expected, got) = (&self.reads[i].shape, &self.writes[0].shape);
        if element_count(expected) == element_count(got) {
            return Ok(());
        }
        let got = format!("{got:?}, {}", element_count(got));
        Err(self.refused("elements of write 0", format!("as many as {expected:?}"), got))
    }
}
