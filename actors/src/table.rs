//! Values by id. A process knows only its part of a plan, so a table may lack some of the plan's ids.

use std::fmt::{self, Debug};
use std::ops::{Index, IndexMut};

/// An id: a number that is unique in the whole plan.
pub trait Id: Copy + Debug + Ord {
    /// The id with this number.
    fn from_number(number: u32) -> Self;
    /// The number of the id.
    fn number(self) -> u32;
}

/// Values for some of the ids `0..bound`, in the order of their ids.
#[derive(Clone, PartialEq, Eq)]
pub struct Table<K, V> {
    ids: Vec<K>,
    values: Vec<V>,
    bound: u32,
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self { ids: Vec::new(), values: Vec::new(), bound: 0 }
    }
}

impl<K: Id, V: Debug> Debug for Table<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Id, V> Table<K, V> {
    /// An empty table of a plan whose ids are below `bound`.
    pub fn with_bound(bound: u32) -> Self {
        Self { bound, ..Self::default() }
    }

    /// Adds a value under the id after the last one, and returns this id.
    pub fn push(&mut self, value: V) -> K {
        let id = K::from_number(self.ids.last().map_or(0, |last| last.number() + 1));
        self.insert(id, value);
        id
    }

    /// Adds a value.
    ///
    /// # Panics
    /// Panics if `id` does not follow all ids of the table.
    pub fn insert(&mut self, id: K, value: V) {
        assert!(self.ids.last().is_none_or(|last| *last < id), "{id:?} does not follow the ids of the table");
        self.ids.push(id);
        self.values.push(value);
        self.bound = self.bound.max(id.number() + 1);
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// True if the table has no values.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// True if the table has a value for every id of the plan.
    pub fn is_whole(&self) -> bool {
        self.len() == self.bound as usize
    }

    /// True if the plan has this id. The table may still lack its value.
    pub fn has_id(&self, id: K) -> bool {
        id.number() < self.bound
    }

    /// Ids in order.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = K> + DoubleEndedIterator + use<'_, K, V> {
        self.ids.iter().copied()
    }

    /// Values in the order of their ids.
    pub fn values(&self) -> impl ExactSizeIterator<Item = &V> + DoubleEndedIterator + Clone {
        self.values.iter()
    }

    /// Like [`Table::values`], to change the values.
    pub fn values_mut(&mut self) -> impl ExactSizeIterator<Item = &mut V> {
        self.values.iter_mut()
    }

    /// Ids with their values, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (K, &V)> + DoubleEndedIterator + Clone {
        self.ids.iter().copied().zip(&self.values)
    }

    /// A table with the same ids. Calls `value` in the order of the ids.
    pub fn map<W>(&self, value: impl FnMut((K, &V)) -> W) -> Table<K, W> {
        Table { ids: self.ids.clone(), values: self.iter().map(value).collect(), bound: self.bound }
    }

    /// The value of an id, if the table has one.
    pub fn get(&self, id: K) -> Option<&V> {
        self.position(id).map(|position| &self.values[position])
    }

    /// Like [`Table::get`], to change the value.
    pub fn get_mut(&mut self, id: K) -> Option<&mut V> {
        self.position(id).map(|position| &mut self.values[position])
    }

    fn position(&self, id: K) -> Option<usize> {
        // The ids of a whole table, and of a process with adjacent devices, have no gaps.
        let first = self.ids.first()?.number();
        let position = id.number().checked_sub(first)? as usize;
        if self.ids.get(position) == Some(&id) { Some(position) } else { self.ids.binary_search(&id).ok() }
    }
}

impl<K: Id, V> FromIterator<V> for Table<K, V> {
    fn from_iter<I: IntoIterator<Item = V>>(values: I) -> Self {
        let mut table = Self::default();
        for value in values {
            table.push(value);
        }
        table
    }
}

impl<K: Id, V> Index<K> for Table<K, V> {
    type Output = V;

    /// # Panics
    /// Panics if the table lacks the id.
    fn index(&self, id: K) -> &V {
        self.get(id).unwrap_or_else(|| panic!("{id:?} is not in the table"))
    }
}

impl<K: Id, V> IndexMut<K> for Table<K, V> {
    fn index_mut(&mut self, id: K) -> &mut V {
        self.get_mut(id).unwrap_or_else(|| panic!("{id:?} is not in the table"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::spec::ActorId;

    proptest! {
        #[test]
        fn a_table_equals_a_map(ids in prop::collection::btree_set(0u32..40, 0..20), bound in 0u32..60) {
            let mut table = Table::with_bound(bound);
            let map: BTreeMap<ActorId, u32> = ids.iter().map(|id| (ActorId(*id), id * 7)).collect();
            map.iter().for_each(|(id, value)| table.insert(*id, *value));
            prop_assert!(table.iter().eq(map.iter().map(|(id, value)| (*id, value))));
            for id in (0..64).map(ActorId) {
                prop_assert_eq!(table.get(id), map.get(&id));
                prop_assert!(table.has_id(id) == (id.0 < bound || ids.range(id.0..).next().is_some()));
            }
            let next = ids.last().map_or(0, |last| last + 1);
            prop_assert_eq!(table.is_whole(), map.len() as u32 == next.max(bound));
            prop_assert_eq!(table.push(0), ActorId(next));
        }
    }
}
