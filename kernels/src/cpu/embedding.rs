//! Embedding tables and their gradients.

use crate::cpu::args::Args;
use crate::cpu::pool::Pool;
use crate::error::Result;

pub(crate) fn embedding(args: &mut Args<'_>, pool: &Pool, vocab_start: usize, vocab: usize) -> Result<()> {
    let [held, width] = args.launch.dims("shape of read 1", args.reads[1].shape(), "[v, c]")?;
    let (ids, table, y) = (args.indices(0, vocab)?, args.f32(1)?, args.out(0)?);
    let elements = y.len();
    pool.rows(ids.len(), elements, [y], |rows, [y]| {
        for (i, row) in rows.enumerate() {
            let y = &mut y[i * width..(i + 1) * width];
            match (ids[row] as usize).checked_sub(vocab_start).filter(|&id| id < held) {
                Some(id) => y.copy_from_slice(&table[id * width..(id + 1) * width]),
                None => y.fill(0.0),
            }
        }
    });
    Ok(())
}

/// Each thread owns some rows of the table and scans all ids in order. So each row adds its terms in a fixed order.
pub(crate) fn embedding_grad(args: &mut Args<'_>, pool: &Pool, vocab_start: usize) -> Result<()> {
    let [vocab, width] = args.launch.dims("shape of write 0", args.writes[0].shape(), "[v, c]")?;
    let (ids, dy, accumulate) = (args.i32(0)?, args.f32(1)?, args.accumulate);
    let dtable = args.out(0)?;
    let weight = dy.len() + if accumulate { 0 } else { dtable.len() };
    pool.rows(vocab, weight, [dtable], |rows, [dtable]| {
        if !accumulate {
            dtable.fill(0.0);
        }
        for (i, &id) in ids.iter().enumerate() {
            // The forward kernel has already rejected ids outside of the whole table.
            let Some(id) = (id as usize).checked_sub(vocab_start).filter(|id| rows.contains(id)) else { continue };
            let row = id - rows.start;
            let sums = &mut dtable[row * width..(row + 1) * width];
            sums.iter_mut().zip(&dy[i * width..(i + 1) * width]).for_each(|(sum, dy)| *sum += dy);
        }
    });
    Ok(())
}
