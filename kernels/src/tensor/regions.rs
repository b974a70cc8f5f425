//! Lists of regions of a tensor. The parts of a tensor that is split along axes of devices are computed.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use super::{Region, element_count, split_range};

/// An ordered list of regions of one tensor: the parts of a split, or any other regions. A split and a list of the same
/// regions are different values.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Regions(Form);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Form {
    Split { shape: Arc<[usize]>, axes: Arc<[SplitAxis]> },
    List(Arc<[Region]>),
}

/// One axis of devices among which a tensor is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SplitAxis {
    /// Number of coordinates.
    pub count: usize,
    /// The dim that the axis splits ([`split_range`]). If `None`, all coordinates have the same region.
    pub dim: Option<usize>,
}

impl Regions {
    /// The regions of a tensor of this shape, row-major over axes (outermost first). Each axis splits the parts of the
    /// outer axes.
    pub fn split(shape: &[usize], axes: impl IntoIterator<Item = SplitAxis>) -> Self {
        Self(Form::Split { shape: shape.into(), axes: axes.into_iter().collect() })
    }

    /// Number of regions.
    pub fn len(&self) -> usize {
        match &self.0 {
            Form::Split { axes, .. } => axes.iter().map(|axis| axis.count).product(),
            Form::List(regions) => regions.len(),
        }
    }

    /// True if there is no region.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The region at this index.
    ///
    /// # Panics
    /// Panics if there is no such region.
    pub fn region(&self, index: usize) -> Region {
        let (shape, axes) = match &self.0 {
            Form::Split { shape, axes } => (shape, axes),
            Form::List(regions) => return regions[index].clone(),
        };
        let (mut region, mut inner, mut rest) = (Region::whole(shape), self.len(), index);
        assert!(index < inner, "there is no region {index} among {inner}");
        for axis in axes.iter() {
            inner /= axis.count;
            if let Some(dim) = axis.dim {
                let part = split_range(region.size[dim], axis.count, rest / inner);
                region.start[dim] += part.start;
                region.size[dim] = part.len();
            }
            rest %= inner;
        }
        region
    }

    /// The regions, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Region> {
        (0..self.len()).map(|index| self.region(index))
    }

    /// The regions as a slice. Computes those of a split.
    pub fn list(&self) -> Cow<'_, [Region]> {
        match &self.0 {
            Form::Split { .. } => Cow::Owned(self.iter().collect()),
            Form::List(regions) => Cow::Borrowed(regions),
        }
    }

    /// Shape of the smallest tensor that contains all regions. If the list is empty, the shape has no dims.
    pub fn bounds(&self) -> Vec<usize> {
        let regions = match &self.0 {
            Form::Split { shape, .. } => return shape.to_vec(),
            Form::List(regions) => regions,
        };
        let end = |r: &Region, d: usize| r.start.get(d).zip(r.size.get(d)).map_or(0, |(a, b)| a.saturating_add(*b));
        let dims = 0..regions.first().map_or(0, |region| region.start.len());
        dims.map(|d| regions.iter().map(|region| end(region, d)).max().unwrap_or(0)).collect()
    }

    /// Number of elements of the largest region.
    pub(crate) fn elements_max(&self) -> usize {
        match &self.0 {
            // The first part of a split is the largest one.
            Form::Split { .. } if !self.is_empty() => self.region(0).element_count(),
            _ => self.list().iter().map(Region::element_count).max().unwrap_or(0),
        }
    }

    /// Total number of elements of all regions.
    pub(crate) fn elements_sum(&self) -> usize {
        match &self.0 {
            Form::Split { shape, axes } => {
                let copies: usize = axes.iter().filter(|axis| axis.dim.is_none()).map(|axis| axis.count).product();
                element_count(shape) * copies
            }
            Form::List(regions) => regions.iter().map(Region::element_count).sum(),
        }
    }

    /// True if this is a split of a tensor of shape `whole` into rows: parts of one size that lie one after another.
    /// False for a list, even if its regions are such rows.
    pub(crate) fn is_split_in_rows(&self, whole: &[usize]) -> bool {
        let Form::Split { shape, axes } = &self.0 else { return false };
        let mut dims = axes.iter().filter(|axis| axis.count > 1).map(|axis| axis.dim);
        let Some(Some(dim)) = dims.next() else { return false };
        let is_outermost = shape[..dim].iter().all(|extent| *extent == 1);
        **shape == *whole && dims.all(|other| other == Some(dim)) && is_outermost && shape[dim] % self.len() == 0
    }
}

impl From<Vec<Region>> for Regions {
    fn from(regions: Vec<Region>) -> Self {
        Self(Form::List(regions.into()))
    }
}

impl FromIterator<Region> for Regions {
    fn from_iter<I: IntoIterator<Item = Region>>(regions: I) -> Self {
        Self(Form::List(regions.into_iter().collect()))
    }
}

impl fmt::Debug for Regions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Form::Split { shape, axes } => {
                write!(f, "{shape:?} split by")?;
                axes.iter().try_for_each(|axis| match axis.dim {
                    Some(dim) => write!(f, " {} along dim {dim}", axis.count),
                    None => write!(f, " {} copies", axis.count),
                })
            }
            Form::List(regions) => regions.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::SplitMix64;

    #[test]
    fn the_facts_of_a_split_are_those_of_its_list() {
        let mut random = SplitMix64(18);
        let mut rows = 0;
        for _ in 0..2000 {
            let mut draw = |bound: usize| random.below(bound as u64) as usize;
            let shape: Vec<usize> = (0..1 + draw(3)).map(|_| draw(3) * draw(4) + draw(2)).collect();
            let axis = |_| (1 + draw(4), (draw(4) > 0).then(|| draw(shape.len())));
            let axes: Vec<SplitAxis> = (0..2).map(axis).map(|(count, dim)| SplitAxis { count, dim }).collect();
            let split = Regions::split(&shape, axes.clone());
            let list: Regions = split.iter().collect();
            let (what, count) = (format!("{split:?}"), split.len());
            assert_eq!((count, split.list()), (list.len(), list.list()), "{what}");
            assert_eq!(split.elements_max(), list.elements_max(), "{what}");
            assert_eq!(split.elements_sum(), list.elements_sum(), "{what}");
            for (index, region) in list.iter().enumerate() {
                let mut expected = Region::whole(&shape);
                for (axis, at) in axes.iter().zip([index / axes[1].count, index % axes[1].count]) {
                    let Some(dim) = axis.dim else { continue };
                    let part = split_range(expected.size[dim], axis.count, at);
                    expected = Region { start: expected.start.clone(), ..expected.with_range(dim, part.clone()) };
                    expected.start[dim] += part.start;
                }
                assert_eq!(region, expected, "{what}");
            }
            if element_count(&shape) > 0 {
                assert_eq!(list.bounds(), split.bounds(), "{what}");
            }
            if split.is_split_in_rows(&shape) {
                rows += 1;
                let size = element_count(&shape) / count;
                for (index, region) in list.iter().enumerate() {
                    let at = region.start.iter().zip(&shape).fold(0, |at, (start, extent)| at * extent + start);
                    assert!(region.is_empty() || (region.element_count(), at) == (size, index * size), "{what}");
                }
            }
        }
        assert!(rows > 100, "only {rows} of the tested splits are splits into rows");
    }
}
