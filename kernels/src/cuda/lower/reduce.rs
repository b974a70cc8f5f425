//! Sums over rows and over all elements. The shape alone determines how a sum is split into parts.

use super::args::Args;
use super::kernel::{PACK, Steps, THREADS, blocks, long, read, variants, write};
use crate::cuda::step::{Arg, Place, Step};
use crate::tensor::{DType, element_count};

/// Target number of blocks, enough to fill a device several times.
const BLOCKS: usize = 512;

/// Threads of a block along a row. Together they process 512 bytes of the row.
const COLUMN_THREADS: usize = 32;

/// A sum is not split further if a thread would then have fewer rows than this.
const ROWS_PER_THREAD: usize = 4;

/// Minimum elements per block of a sum of squares, so that a 768 x 768 weight occupies a GPU of 132 multiprocessors.
const SQUARES_PER_BLOCK: usize = 8 * THREADS;

/// Maximum number of parts of a sum of squares. One block can add up the sums of this many parts at once.
const SQUARES_PARTS_MAX: usize = 4 * THREADS;

/// How a sum over `rows` rows of `width` columns is split.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ColumnSum {
    columns: usize,
    /// Number of blocks along the rows. If there are several, a second pass adds up their partial sums.
    pub(super) parts: usize,
    rows_per_part: usize,
    threads: [usize; 2],
}

impl ColumnSum {
    pub(super) fn new(rows: usize, width: usize) -> Self {
        let packs = width.div_ceil(PACK).max(1);
        let x = packs.next_power_of_two().min(COLUMN_THREADS);
        let (y, columns) = (THREADS / x, packs.div_ceil(x));
        let parts = rows.div_ceil(y * ROWS_PER_THREAD).min(BLOCKS / columns).max(1);
        let rows_per_part = rows.div_ceil(parts).max(1);
        Self { columns, parts: rows.div_ceil(rows_per_part).max(1), rows_per_part, threads: [x, y] }
    }

    /// Number of floats for the partial sums that the second pass reads.
    pub(super) fn workspace_floats(&self, width: usize) -> usize {
        if self.parts > 1 { self.parts * width } else { 0 }
    }

    /// Creates the steps of one pass. The arguments of the kernel are `arguments`, the output, the number of rows, the
    /// width, the number of rows per part, and whether to add to the output.
    fn pass(
        &self,
        function: &'static str,
        arguments: Vec<Arg>,
        out: Place,
        dims: [usize; 2],
        accumulate: bool,
    ) -> Steps {
        let [rows, width] = dims.map(long);
        let trailing = [Arg::Pointer(out), rows, width, long(self.rows_per_part), Arg::I32(i32::from(accumulate))];
        let mut steps = blocks(function, self.columns, THREADS, 0, [&arguments[..], &trailing].concat())?;
        let [x, y] = self.threads.map(|threads| threads as u32);
        for step in &mut steps {
            if let Step::Kernel(kernel) = step {
                // `parts` is at most BLOCKS.
                (kernel.grid[1], kernel.block) = (self.parts as u32, [x, y, 1]);
            }
        }
        Ok(steps)
    }
}

/// Sums columns into `out`: in one pass with the kernel `only`, or in two passes with `first` and `second`.
pub(super) fn sum_columns(
    [only, first, second]: [&'static str; 3],
    inputs: Vec<Arg>,
    out: Place,
    [rows, width]: [usize; 2],
    accumulate: bool,
) -> Steps {
    let sum = ColumnSum::new(rows, width);
    if sum.parts == 1 {
        return sum.pass(only, inputs, out, [rows, width], accumulate);
    }
    let partial = Place::workspace(0);
    let mut steps = sum.pass(first, inputs, partial, [rows, width], false)?;
    let rest = ColumnSum { parts: 1, rows_per_part: sum.parts, ..sum };
    steps.extend(rest.pass(second, vec![Arg::Pointer(partial)], out, [sum.parts, width], accumulate)?);
    Ok(steps)
}

/// Upper bound of [`ColumnSum::workspace_floats`] over all widths.
pub(super) fn sum_workspace_floats(elements: usize) -> usize {
    // A sum over at most this number of rows has one part.
    if elements <= THREADS / COLUMN_THREADS * ROWS_PER_THREAD {
        return 0;
    }
    elements.min(BLOCKS * COLUMN_THREADS * PACK)
}

pub(super) fn sum_leading(args: &Args<'_>) -> Steps {
    let (x, y) = (args.read_shape(0), args.write_shape(0));
    let (rows, width) = (element_count(&x[..x.len() - y.len()]), element_count(y));
    if width == 0 {
        return Ok(vec![]);
    }
    let [f32, _, widening] = variants!("sum_leading");
    // Partial sums are f32.
    let only = args.pick(0, 0, variants!("sum_leading"));
    let first = args.pick(0, 0, [f32, widening, widening]);
    let second = if args.write_dtype(0) == DType::BF16 { "sum_leading_f32_bf16" } else { f32 };
    sum_columns([only, first, second], vec![read(0)], Place::write(0), [rows, width], args.accumulate)
}

/// Returns the number of parts of a sum of squares, and the number of elements per part.
fn squares_parts(n: usize) -> (usize, usize) {
    let parts = n.div_ceil(SQUARES_PER_BLOCK).clamp(1, SQUARES_PARTS_MAX);
    // Each part is a multiple of 16 bytes.
    let per_part = n.div_ceil(parts).next_multiple_of(PACK).max(PACK);
    (n.div_ceil(per_part).max(1), per_part)
}

/// Number of floats for the partial sums. Two floats hold the bits of one f64.
pub(super) fn squares_workspace_floats(n: usize) -> usize {
    let (parts, _) = squares_parts(n);
    if parts > 1 { 2 * parts } else { 0 }
}

pub(super) fn sum_squares(args: &Args<'_>, index: usize) -> Steps {
    let n = element_count(args.read_shape(0));
    if n == 0 {
        return Ok(vec![]);
    }
    let out = Arg::Pointer(Place { offset_bytes: 2 * index * DType::F32.bytes(), ..Place::write(0) });
    let (parts, per_part) = squares_parts(n);
    if parts == 1 {
        return blocks("sum_squares_f32", 1, THREADS, 0, vec![read(0), Arg::Null, out, long(n), long(per_part)]);
    }
    let partial = Arg::Pointer(Place::workspace(0));
    let arguments = vec![read(0), partial, Arg::Null, long(n), long(per_part)];
    let mut steps = blocks("sum_squares_f32", parts, THREADS, 0, arguments)?;
    steps.extend(blocks("add_partial_sums", 1, THREADS, 0, vec![partial, out, long(parts)])?);
    Ok(steps)
}

pub(super) fn clip_scale(args: &Args<'_>, max_norm: f32) -> Steps {
    let n = element_count(args.read_shape(0));
    blocks("clip_scale", 1, THREADS, 0, vec![read(0), write(0), write(1), long(n), Arg::F32(max_norm)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_rows_and_their_sums_fit_the_workspace() {
        for rows in (0..70).chain([127, 1000, 1023, 8192, 1 << 20, (1 << 31) + 7]) {
            for width in [1, 3, 4, 5, 127, 128, 129, 768, 3072, 50_257, 1 << 22] {
                let columns = ColumnSum::new(rows, width);
                let ColumnSum { columns: across, parts, rows_per_part, threads: [x, y] } = columns;
                assert!(across * x * PACK >= width && (across - 1) * x * PACK < width, "{columns:?}");
                assert!(parts * rows_per_part >= rows && (parts - 1) * rows_per_part < rows.max(1), "{columns:?}");
                assert!(x * y == THREADS && y.is_power_of_two() && parts <= BLOCKS);
                let needed = columns.workspace_floats(width);
                assert!(needed <= sum_workspace_floats(rows * width), "{rows} x {width} needs {needed}: {columns:?}");
            }
        }
    }

    #[test]
    fn parts_of_squares_cover_all_elements() {
        for n in (1..100).chain([16_384, 16_385, 70_003, 1 << 24, (1 << 40) + 1]) {
            let (parts, per_part) = squares_parts(n);
            assert!(parts * per_part >= n && (parts - 1) * per_part < n && per_part.is_multiple_of(4), "{n}");
            assert!(parts <= SQUARES_PARTS_MAX);
        }
    }
}
