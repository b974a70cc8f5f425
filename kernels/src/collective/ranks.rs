//! The ranks of a group, in order. Groups along axes of a mesh are grids, so their members are computed.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

/// Maximum number of ranks of a grid that a text lists one by one.
const LISTED_MAX: usize = 16;

/// An ordered list of ranks. A list that is a grid is stored as its first rank and its axes, any other list as it is.
///
/// - RANKS-1: equal lists have the same form, so they are equal values with equal hashes. A grid has no axis of one
///   coordinate. Two adjacent axes that form one longer axis are merged.
/// - RANKS-2: in a grid, the distance `|stride|` of each axis exceeds the sum of `distance * (count - 1)` over the
///   other axes of no larger distance. So the ranks are distinct, and a rank determines its coordinates.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Ranks(Form);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Form {
    /// One or more ranks.
    Grid(Grid),
    List(Arc<[usize]>),
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Grid {
    /// The rank of member 0.
    start: usize,
    /// Outermost first: the members are in row-major order.
    axes: Arc<[RankAxis]>,
}

/// One axis of a grid of ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RankAxis {
    /// Difference between the ranks at adjacent coordinates.
    pub stride: isize,
    /// Number of coordinates.
    pub count: usize,
}

impl Ranks {
    /// The ranks of a grid, row-major over axes (outermost first). Takes time proportional to the number of axes,
    /// unless the axes break RANKS-2.
    pub fn grid(start: usize, axes: impl IntoIterator<Item = RankAxis>) -> Self {
        let mut merged: Vec<RankAxis> = Vec::new();
        for axis in axes {
            match merged.last_mut() {
                _ if axis.count == 1 => {}
                Some(outer) if axis.stride.checked_mul(axis.count as isize) == Some(outer.stride) => {
                    *outer = RankAxis { stride: axis.stride, count: outer.count * axis.count };
                }
                _ => merged.push(axis),
            }
        }
        let grid = Grid { start, axes: merged.into() };
        if grid.is_separable() { Self(Form::Grid(grid)) } else { Self(Form::List(grid.iter().collect())) }
    }

    /// These ranks, in this order.
    pub fn of(ranks: &[usize]) -> Self {
        Self(Grid::find(ranks).map_or_else(|| Form::List(ranks.into()), Form::Grid))
    }

    /// Number of members.
    pub fn len(&self) -> usize {
        match &self.0 {
            Form::Grid(grid) => grid.len(),
            Form::List(ranks) => ranks.len(),
        }
    }

    /// True if there is no member.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The rank of a member.
    ///
    /// # Panics
    /// Panics if there is no such member.
    pub fn rank(&self, member: usize) -> usize {
        match &self.0 {
            Form::Grid(grid) => grid.rank(member),
            Form::List(ranks) => ranks[member],
        }
    }

    /// The member with this rank; the first one if a rank occurs twice.
    pub fn member_of(&self, rank: usize) -> Option<usize> {
        match &self.0 {
            Form::Grid(grid) => grid.member_of(rank),
            Form::List(ranks) => ranks.iter().position(|other| *other == rank),
        }
    }

    /// True if a member has this rank.
    pub fn contains(&self, rank: usize) -> bool {
        self.member_of(rank).is_some()
    }

    /// The ranks, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = usize> + DoubleEndedIterator + Clone {
        (0..self.len()).map(|member| self.rank(member))
    }

    /// True if the members are computed, not listed.
    pub fn is_grid(&self) -> bool {
        matches!(self.0, Form::Grid(_))
    }
}

impl Grid {
    /// The grid of a list, if there is one. Each axis is as long as possible, from the innermost axis on (RANKS-1).
    fn find(ranks: &[usize]) -> Option<Self> {
        let (start, mut axes, mut covered) = (*ranks.first()?, Vec::new(), 1);
        while covered < ranks.len() {
            let stride = isize::try_from(ranks[covered]).ok()? - isize::try_from(start).ok()?;
            let mut firsts = ranks.iter().step_by(covered).enumerate();
            let end = firsts.position(|(i, rank)| start.wrapping_add_signed(stride.wrapping_mul(i as isize)) != *rank);
            let count = end.unwrap_or(ranks.len().div_ceil(covered));
            axes.insert(0, RankAxis { stride, count });
            covered *= count;
        }
        let grid = Self { start, axes: axes.into() };
        (covered == ranks.len() && grid.is_separable() && grid.iter().eq(ranks.iter().copied())).then_some(grid)
    }

    /// Checks RANKS-2.
    fn is_separable(&self) -> bool {
        let mut axes = self.axes.to_vec();
        axes.sort_unstable_by_key(RankAxis::distance);
        let mut extent = 0usize;
        axes.iter().all(|axis| {
            let is_apart = axis.count > 0 && axis.distance() > extent;
            extent = extent.saturating_add(axis.extent());
            is_apart
        })
    }

    fn len(&self) -> usize {
        self.axes.iter().map(|axis| axis.count).product()
    }

    fn rank(&self, member: usize) -> usize {
        let (mut rank, mut rest) = (self.start, member);
        for axis in self.axes.iter().rev() {
            rank = rank.wrapping_add_signed(axis.stride.wrapping_mul((rest % axis.count) as isize));
            rest /= axis.count;
        }
        assert!(rest == 0, "there is no member {member} among {} ranks", self.len());
        rank
    }

    fn iter(&self) -> impl Iterator<Item = usize> {
        (0..self.len()).map(|member| self.rank(member))
    }

    fn member_of(&self, rank: usize) -> Option<usize> {
        let descents = self.axes.iter().filter(|axis| axis.stride < 0).map(RankAxis::extent);
        let mut rest = rank.checked_sub(self.start - descents.sum::<usize>())?;
        let (mut member, mut above) = (0, usize::MAX);
        let distance = |at: &usize| self.axes[*at].distance();
        // Visits the axes in the descending order of their distances (RANKS-2).
        while let Some(at) = (0..self.axes.len()).filter(|at| distance(at) < above).max_by_key(distance) {
            let axis = self.axes[at];
            above = axis.distance();
            let from_lowest = rest / above;
            if from_lowest >= axis.count {
                return None;
            }
            rest %= above;
            let coordinate = if axis.stride < 0 { axis.count - 1 - from_lowest } else { from_lowest };
            member += coordinate * self.axes[at + 1..].iter().map(|inner| inner.count).product::<usize>();
        }
        (rest == 0).then_some(member)
    }
}

impl RankAxis {
    fn distance(&self) -> usize {
        self.stride.unsigned_abs()
    }

    /// Difference between the largest and the smallest rank.
    fn extent(&self) -> usize {
        self.distance().saturating_mul(self.count.saturating_sub(1))
    }
}

impl From<Vec<usize>> for Ranks {
    fn from(ranks: Vec<usize>) -> Self {
        Self::of(&ranks)
    }
}

impl FromIterator<usize> for Ranks {
    fn from_iter<I: IntoIterator<Item = usize>>(ranks: I) -> Self {
        Self::of(&Vec::from_iter(ranks))
    }
}

/// Compares the lists of ranks lexicographically.
impl Ord for Ranks {
    fn cmp(&self, other: &Self) -> Ordering {
        self.iter().cmp(other.iter())
    }
}

impl PartialOrd for Ranks {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A large grid is shown by its axes, such as `5 + 64*(0..48) + 8*(0..4)`. All other ranks are shown as a list.
impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Form::Grid(grid) if grid.len() > LISTED_MAX => {
                write!(f, "{}", grid.start)?;
                grid.axes.iter().try_for_each(|RankAxis { stride, count }| write!(f, " + {stride}*(0..{count})"))
            }
            _ => f.debug_list().entries(self.iter()).finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::hash::{Hash, Hasher};

    use super::*;
    use crate::hash::{Fnv, SplitMix64};

    fn hash(ranks: &Ranks) -> u64 {
        let mut hash = Fnv::default();
        ranks.hash(&mut hash);
        hash.finish()
    }

    /// Checks that `ranks` has the members of `list`, in this order.
    fn check(ranks: &Ranks, list: &[usize]) {
        assert_eq!(ranks.iter().collect::<Vec<_>>(), list);
        assert_eq!((ranks.len(), ranks.is_empty()), (list.len(), list.is_empty()));
        if list.len() <= LISTED_MAX || !ranks.is_grid() {
            assert_eq!(format!("{ranks:?}"), format!("{list:?}"));
        }
        for rank in list.iter().flat_map(|rank| rank.saturating_sub(1)..=rank + 1) {
            let member = list.iter().position(|other| *other == rank);
            assert_eq!((ranks.member_of(rank), ranks.contains(rank)), (member, member.is_some()), "{rank} in {list:?}");
        }
        let again = Ranks::of(list);
        assert!(*ranks == again && hash(ranks) == hash(&again) && ranks.is_grid() == again.is_grid(), "{list:?}");
    }

    fn axis(stride: isize, count: usize) -> RankAxis {
        RankAxis { stride, count }
    }

    #[test]
    fn random_grids_list_their_members() {
        let mut random = SplitMix64(16);
        let (mut grids, mut lists) = (0, 0);
        for _ in 0..4000 {
            let mut draw = |bound: usize| random.below(bound as u64) as usize;
            let separable = draw(2) == 0;
            let (mut axes, mut extent) = (Vec::new(), 0);
            for _ in 0..draw(5) {
                let (distance, count) = (if separable { extent } else { 0 } + draw(3), 1 + draw(4));
                extent += distance * (count - 1);
                axes.push(axis(if draw(3) == 0 { -(distance as isize) } else { distance as isize }, count));
            }
            for last in (1..axes.len()).rev() {
                axes.swap(last, draw(last + 1));
            }
            let start = extent + draw(100);
            let mut list = vec![start as isize];
            for axis in &axes {
                let along = |rank: &isize| (0..axis.count as isize).map(|i| rank + i * axis.stride).collect::<Vec<_>>();
                list = list.iter().flat_map(along).collect();
            }
            let list: Vec<usize> = list.into_iter().map(|rank| rank as usize).collect();
            let ranks = Ranks::grid(start, axes);
            if ranks.is_grid() {
                grids += 1
            } else {
                lists += 1
            }
            check(&ranks, &list);
        }
        assert!(grids > 1000 && lists > 500, "only {grids} grids, {lists} lists");
    }

    #[test]
    fn random_lists_are_kept() {
        let mut random = SplitMix64(17);
        for _ in 0..4000 {
            let len = random.below(9);
            let list: Vec<usize> = (0..len).map(|_| random.below(12) as usize).collect();
            check(&Ranks::of(&list), &list);
        }
        check(&Ranks::of(&[usize::MAX - 1, 3]), &[usize::MAX - 1, 3]);
    }

    #[test]
    fn equal_lists_have_one_form() {
        assert_eq!(Ranks::grid(4, [axis(4, 2), axis(9, 1), axis(1, 4)]), (4..12).collect());
        assert_eq!(Ranks::grid(7, []), vec![7].into());
        assert_eq!(Ranks::grid(7, [axis(1, 0)]), Ranks::of(&[]));
        assert!(Ranks::of(&[5, 3]).is_grid() && Ranks::of(&[6, 4, 2, 7, 5, 3]).is_grid());
        // A list that is no grid, a list with one rank twice, and a grid that breaks RANKS-2.
        for list in [&[4, 2, 9][..], &[1, 1], &[0, 2, 4, 3, 5, 7]] {
            assert!(!Ranks::of(list).is_grid(), "{list:?}");
        }
    }

    #[test]
    fn a_large_grid_is_shown_by_its_axes() {
        assert_eq!(format!("{:?}", Ranks::grid(5, [axis(64, 48), axis(8, 4)])), "5 + 64*(0..48) + 8*(0..4)");
        assert_eq!(format!("{:?}", Ranks::grid(1, [axis(-1, 2)])), "[1, 0]");
    }
}
