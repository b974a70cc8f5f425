//! Boxes of row-major tensors as contiguous runs of elements.

use std::ops::Range;

use crate::error::{KernelError, Result};
use crate::tensor::Region;

/// Calls `run(from, to, len)` for each run of elements of a box of `size`. A run is contiguous both in a tensor of
/// shape `from_shape` (at `from_start`) and in one of `to_shape` (at `to_start`). All shapes and starts have the same
/// number of dims.
pub(crate) fn for_each_run(
    (from_shape, from_start): (&[usize], &[usize]),
    (to_shape, to_start): (&[usize], &[usize]),
    size: &[usize],
    mut run: impl FnMut(usize, usize, usize),
) {
    if size.contains(&0) {
        return;
    }
    // The dims from `inner` on form one run, because the box has the full extent of both tensors in all of
    // them except the first.
    let mut inner = size.len().saturating_sub(1);
    while inner > 0 && size[inner] == from_shape[inner] && size[inner] == to_shape[inner] {
        inner -= 1;
    }
    let len: usize = size[inner..].iter().product();
    let offset = |shape: &[usize], start: &[usize], index: &[usize]| {
        let place = |d: usize| start[d] + index.get(d).copied().unwrap_or(0);
        (0..shape.len()).fold(0, |sum, d| sum * shape[d] + place(d))
    };
    let mut index = vec![0; inner];
    loop {
        run(offset(from_shape, from_start, &index), offset(to_shape, to_start, &index), len);
        let Some(d) = (0..inner).rev().find(|&d| index[d] + 1 < size[d]) else { return };
        index[d] += 1;
        index[d + 1..].fill(0);
    }
}

impl Region {
    /// Returns the region's contiguous runs, in order, in a row-major tensor of `shape`, which contains the region.
    pub fn runs(&self, shape: &[usize]) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        let all = 0..self.element_count();
        Runs::new(shape, self).for_each(all, |from, _, len| runs.push(from..from + len));
        runs
    }
}

/// A box of a row-major tensor as runs of equal length, for direct access to parts of the box. The elements of the box
/// are numbered in row-major order.
#[derive(Clone, Debug)]
pub(crate) struct Runs {
    /// Index that the box's first element has in the tensor.
    start: usize,
    /// Number of elements of a run; 0 for an empty box.
    len: usize,
    /// Extent and stride (in elements) of each dim that is not part of the runs, innermost first.
    outer: Vec<(usize, usize)>,
}

impl Runs {
    /// Converts the box `region`, which must lie inside a tensor of shape `shape`.
    pub(crate) fn new(shape: &[usize], region: &Region) -> Self {
        let mut inner = shape.len().saturating_sub(1);
        while inner > 0 && region.size[inner] == shape[inner] {
            inner -= 1;
        }
        let (mut start, mut stride, mut outer) = (0, 1, Vec::new());
        for d in (0..shape.len()).rev() {
            start += region.start[d] * stride;
            if d < inner {
                outer.push((region.size[d], stride));
            }
            stride *= shape[d];
        }
        let len = if region.is_empty() { 0 } else { region.size[inner.min(shape.len())..].iter().product() };
        Self { start, len, outer }
    }

    pub(crate) fn flat(range: Range<usize>) -> Self {
        Self { start: range.start, len: range.len(), outer: Vec::new() }
    }

    pub(crate) fn element_count(&self) -> usize {
        self.outer.iter().fold(self.len, |all, (size, _)| all * size)
    }

    fn run_start(&self, mut index: usize) -> usize {
        self.outer.iter().fold(self.start, |place, (size, stride)| {
            let here = index % size;
            index /= size;
            place + here * stride
        })
    }

    /// Calls `run(index in the tensor, offset from range.start, len)` for each contiguous piece of the range.
    pub(crate) fn for_each(&self, range: Range<usize>, mut run: impl FnMut(usize, usize, usize)) {
        let mut next = range.start;
        while next < range.end {
            let inside = next % self.len;
            let len = (self.len - inside).min(range.end - next);
            run(self.run_start(next / self.len) + inside, next - range.start, len);
            next += len;
        }
    }

    /// Converts a range of the box to indices in the tensor. `None` if these indices are not contiguous.
    pub(crate) fn contiguous(&self, range: &Range<usize>) -> Option<Range<usize>> {
        if range.is_empty() {
            return Some(0..0);
        }
        let (run, inside) = (range.start / self.len, range.start % self.len);
        let start = self.run_start(run) + inside;
        (inside + range.len() <= self.len).then(|| start..start + range.len())
    }
}

pub(crate) fn check_inside(op: &str, what: &str, region: &Region, shape: &[usize]) -> Result<()> {
    let inside = region.start.len() == shape.len()
        && region.size.len() == shape.len()
        && (0..shape.len()).all(|d| region.start[d].checked_add(region.size[d]).is_some_and(|end| end <= shape[d]));
    if inside {
        return Ok(());
    }
    Err(KernelError::arguments(op, what, format!("a box inside {shape:?}"), format!("{region:?}")))
}

/// Returns disjoint boxes that cover the part of `region` outside of `hole`.
pub(crate) fn subtract(region: &Region, hole: &Region) -> Vec<Region> {
    let Some(common) = region.intersect(hole) else {
        return if region.is_empty() { Vec::new() } else { vec![region.clone()] };
    };
    let mut left = Vec::new();
    let mut rest = region.clone();
    for d in 0..region.start.len() {
        let (start, end) = (common.start[d], common.start[d] + common.size[d]);
        let outside = [rest.start[d]..start, end..rest.start[d] + rest.size[d]];
        let outside = outside.into_iter().filter(|range| !range.is_empty());
        left.extend(outside.map(|range| rest.clone().with_range(d, range)));
        rest = rest.with_range(d, start..end);
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: &[usize], size: &[usize]) -> Region {
        Region { start: start.to_vec(), size: size.to_vec() }
    }

    #[test]
    fn runs_have_maximal_length() {
        let runs = |from: (&[usize], &[usize]), to: (&[usize], &[usize]), size: &[usize]| {
            let mut all = Vec::new();
            for_each_run(from, to, size, |a, b, len| all.push((a, b, len)));
            all
        };
        assert_eq!(runs((&[4, 6], &[1, 0]), (&[2, 6], &[0, 0]), &[2, 6]), [(6, 0, 12)]);
        assert_eq!(runs((&[4, 6], &[1, 2]), (&[2, 3], &[0, 0]), &[2, 3]), [(8, 0, 3), (14, 3, 3)]);
        assert_eq!(runs((&[2, 2, 3], &[0, 1, 0]), (&[2, 1, 3], &[0, 0, 0]), &[2, 1, 3]), [(3, 0, 3), (9, 3, 3)]);
        assert_eq!(runs((&[], &[]), (&[], &[]), &[]), [(0, 0, 1)]);
        assert_eq!(runs((&[3], &[0]), (&[0], &[0]), &[0]), []);
    }

    #[test]
    fn a_range_of_a_box_has_the_same_elements_as_a_full_walk() {
        for (shape, start, size) in [
            (vec![4, 6], vec![1, 2], vec![2, 3]),
            (vec![2, 3, 4], vec![0, 1, 0], vec![2, 2, 4]),
            (vec![5], vec![1], vec![3]),
            (vec![], vec![], vec![]),
            (vec![3, 2], vec![1, 0], vec![0, 2]),
        ] {
            let region = Region { start, size };
            let zeros = vec![0; shape.len()];
            let mut places = Vec::new();
            for_each_run((&shape, &region.start), (&region.size, &zeros), &region.size, |from, _, len| {
                places.extend(from..from + len);
            });
            let runs = Runs::new(&shape, &region);
            assert_eq!(runs.element_count(), places.len());
            for from in 0..places.len() {
                for to in from..=places.len() {
                    let mut found = Vec::new();
                    runs.for_each(from..to, |place, at, len| {
                        assert_eq!(at, found.len());
                        found.extend(place..place + len);
                    });
                    assert_eq!(found, places[from..to], "elements {from}..{to} of {region:?} in {shape:?}");
                    let is_contiguous =
                        runs.contiguous(&(from..to)).is_some_and(|range| range.eq(found.iter().copied()));
                    let neighbours = found.windows(2).all(|pair| pair[0] + 1 == pair[1]);
                    assert!(!is_contiguous || neighbours);
                }
            }
        }
    }

    #[test]
    fn subtracting_a_hole_returns_disjoint_boxes_that_cover_the_rest() {
        let (whole, hole) = (region(&[0, 0], &[5, 7]), region(&[1, 2], &[2, 9]));
        let left = subtract(&whole, &hole);
        for i in 0..5 {
            for j in 0..7 {
                let holds = |r: &Region| r.intersect(&region(&[i, j], &[1, 1])).is_some();
                assert_eq!(left.iter().filter(|r| holds(r)).count(), usize::from(!holds(&hole)), "element [{i}, {j}]");
            }
        }
        assert_eq!(subtract(&whole, &region(&[5, 0], &[1, 7])), [whole]);
    }
}
