//! The rules that combine numbers of all processes along the control tree, and the messages that carry these numbers.
//!
//! Every rule gives the same result for any tree: a maximum and a comparison do not depend on the order, and process
//! 0's value needs no combination. There is no rule for sums of floats, because their bits would depend on the tree.

use std::collections::BTreeMap;
use std::sync::Arc;

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use serde::{Deserialize, Serialize};

use super::control_message::MESSAGE_BYTES_MAX;
use super::tree::ControlTree;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<MESSAGE_BYTES_MAX>> =
    bincode::config::legacy().with_limit::<MESSAGE_BYTES_MAX>();

/// How the words (u64) of one field are combined. A topic's round has one rule per field, the same on all processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MergeRule {
    /// The largest of the processes' word lists, compared lexicographically.
    Max {
        /// Number of words.
        words: usize,
    },
    /// The words of process 0; other processes supply none.
    First {
        /// Number of words.
        words: usize,
    },
    /// One word, which must be equal on the listed processes, or on all processes if there is no list. The list is in
    /// ascending order. Processes that are not listed supply no word. The word travels up the tree only until the words
    /// of all listed processes have been compared.
    Same(Option<Arc<[u32]>>),
}

/// The combined numbers of all processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reduced {
    /// For each field: the combined words; none for [`MergeRule::Same`].
    pub words: Vec<Vec<u64>>,
    /// The first field whose words differ, although its rule is [`MergeRule::Same`].
    pub difference: Option<Difference>,
}

/// Words that differ although they must be the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Index of the field.
    pub field: u32,
    /// The word of each process that has one, in order of processes.
    pub values: Vec<(u32, u64)>,
}

/// The combined numbers of a process and of the processes below it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Partial {
    /// The words of all [`MergeRule::Max`] fields, in order.
    max: Vec<u64>,
    /// Index and word of each [`MergeRule::Same`] field whose words are equal here and must be compared further up.
    same: Vec<(u32, u64)>,
    difference: Option<Difference>,
}

/// The combined numbers of all processes, as process 0 sends them down the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Total {
    /// The words of all [`MergeRule::Max`] and [`MergeRule::First`] fields, in order.
    words: Vec<u64>,
    difference: Option<Difference>,
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    // Writing to a vector does not fail, and `Shared::supply` has checked the size.
    bincode::serde::encode_to_vec(value, CONFIG).unwrap_or_default()
}

fn decode<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Option<T> {
    let (value, read) = bincode::serde::decode_from_slice(bytes, CONFIG).ok()?;
    (read == bytes.len()).then_some(value)
}

/// Maximum size in bytes of a message with numbers for these rules, in a world with this number of processes.
pub(crate) fn bytes_max(rules: &[MergeRule], processes: u32) -> usize {
    let words = |rule: &MergeRule| match rule {
        MergeRule::Max { words } | MergeRule::First { words } => 8 * words,
        MergeRule::Same(_) => 12,
    };
    64 + rules.iter().map(words).sum::<usize>() + 12 * processes as usize
}

/// True if process `own` supplies the number of words that each rule requires.
pub(crate) fn fits(rules: &[MergeRule], own: u32, fields: &[Vec<u64>]) -> bool {
    let count = |rule: &MergeRule| match rule {
        MergeRule::Max { words } => *words,
        MergeRule::First { words } => *words * usize::from(own == 0),
        MergeRule::Same(processes) => usize::from(has(processes.as_deref(), own)),
    };
    rules.len() == fields.len() && rules.iter().zip(fields).all(|(rule, words)| words.len() == count(rule))
}

fn has(processes: Option<&[u32]>, process: u32) -> bool {
    processes.is_none_or(|processes| processes.binary_search(&process).is_ok())
}

impl Partial {
    /// The numbers of one process.
    pub(crate) fn new(rules: &[MergeRule], fields: &[Vec<u64>]) -> Self {
        let mut out = Self::default();
        for (index, (rule, words)) in (0..).zip(rules.iter().zip(fields)) {
            match rule {
                MergeRule::Max { .. } => out.max.extend(words),
                MergeRule::First { .. } => {}
                MergeRule::Same(_) => out.same.extend(words.first().map(|word| (index, *word))),
            }
        }
        out
    }

    pub(crate) fn write(&self) -> Vec<u8> {
        encode(self)
    }

    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        decode(bytes)
    }

    /// True if a process `top` with these rules could have sent this for its subtree.
    pub(crate) fn is_valid(&self, rules: &[MergeRule], tree: &ControlTree, top: u32) -> bool {
        let max = rules.iter().map(|rule| if let MergeRule::Max { words } = rule { *words } else { 0 }).sum::<usize>();
        let is_same = |field: u32| matches!(rules.get(field as usize), Some(MergeRule::Same(_)));
        let is_listed = |Difference { field, values }: &Difference| {
            let Some(MergeRule::Same(processes)) = rules.get(*field as usize) else { return false };
            let is_below = |process: u32| {
                process < tree.processes() && tree.is_below(process, top) && has(processes.as_deref(), process)
            };
            values.is_sorted_by(|a, b| a.0 < b.0) && values.iter().all(|(process, _)| is_below(*process))
        };
        self.max.len() == max
            && self.same.is_sorted_by(|a, b| a.0 < b.0)
            && self.same.iter().all(|(field, _)| is_same(*field))
            && self.difference.iter().all(|found| self.same.iter().all(|(field, _)| *field < found.field))
            && self.difference.as_ref().is_none_or(is_listed)
    }

    /// Combines the numbers of `own` with those of its children's subtrees.
    pub(crate) fn combine(self, rules: &[MergeRule], tree: &ControlTree, own: u32, children: Vec<(u32, Self)>) -> Self {
        let mut out = Self { max: self.max, ..Self::default() };
        let mut equal: BTreeMap<u32, Vec<(Source, u64)>> = BTreeMap::new();
        let mut differing: BTreeMap<u32, Vec<(u32, u64)>> = BTreeMap::new();
        self.same.into_iter().for_each(|(field, word)| equal.entry(field).or_default().push((Source::Own, word)));
        for (child, partial) in children {
            take_larger(rules, &mut out.max, &partial.max);
            for (field, word) in partial.same {
                equal.entry(field).or_default().push((Source::Below(child), word));
            }
            if let Some(Difference { field, values }) = partial.difference {
                differing.entry(field).or_default().extend(values);
            }
        }
        let is_unequal = |words: &Vec<(Source, u64)>| words.iter().any(|(_, word)| *word != words[0].1);
        let unequal = equal.iter().find(|(_, words)| is_unequal(words)).map(|(field, _)| *field);
        let first = unequal.into_iter().chain(differing.keys().copied()).min();
        if let Some(field) = first {
            let mut values = differing.remove(&field).unwrap_or_default();
            for (source, word) in equal.remove(&field).unwrap_or_default() {
                values.extend(source.processes(rules, field, tree, own).into_iter().map(|process| (process, word)));
            }
            values.sort_unstable();
            out.difference = Some(Difference { field, values });
        }
        // Fields after the first one that differs no longer matter.
        let open = equal.into_iter().filter(|(field, _)| first.is_none_or(|first| *field < first));
        let open = open.filter(|(field, _)| !is_compared(rules, *field, tree, own));
        out.same = open.map(|(field, words)| (field, words[0].1)).collect();
        out
    }

    /// Process 0's message to all processes. `fields` contains process 0's own words.
    pub(crate) fn total(self, rules: &[MergeRule], fields: &[Vec<u64>]) -> Vec<u8> {
        let mut largest = self.max.into_iter();
        let mut words = Vec::new();
        for (rule, own) in rules.iter().zip(fields) {
            match rule {
                MergeRule::Max { words: count } => words.extend(largest.by_ref().take(*count)),
                MergeRule::First { .. } => words.extend(own),
                MergeRule::Same(_) => {}
            }
        }
        encode(&Total { words, difference: self.difference })
    }
}

impl Reduced {
    /// Reads process 0's message; `None` if it does not fit the rules.
    pub(crate) fn read(bytes: &[u8], rules: &[MergeRule]) -> Option<Self> {
        let Total { words, difference } = decode(bytes)?;
        let mut left = &words[..];
        let mut fields = Vec::new();
        for rule in rules {
            let count = match rule {
                MergeRule::Max { words } | MergeRule::First { words } => *words,
                MergeRule::Same(_) => 0,
            };
            let (field, rest) = left.split_at_checked(count)?;
            fields.push(field.to_vec());
            left = rest;
        }
        left.is_empty().then_some(Self { words: fields, difference })
    }

    /// The result in a world of one process.
    pub fn alone(rules: &[MergeRule], fields: Vec<Vec<u64>>) -> Self {
        let keep =
            |(rule, words): (&MergeRule, Vec<u64>)| if matches!(rule, MergeRule::Same(_)) { Vec::new() } else { words };
        Self { words: rules.iter().zip(fields).map(keep).collect(), difference: None }
    }
}

/// The source of a word: this process, or the subtree of a child.
enum Source {
    Own,
    Below(u32),
}

impl Source {
    /// The processes that have supplied this source's word of the field.
    fn processes(&self, rules: &[MergeRule], field: u32, tree: &ControlTree, own: u32) -> Vec<u32> {
        match self {
            Self::Own => vec![own],
            Self::Below(child) => {
                let supplies = |process: &u32| match &rules[field as usize] {
                    MergeRule::Same(processes) => has(processes.as_deref(), *process),
                    _ => false,
                };
                (0..tree.processes()).filter(|process| tree.is_below(*process, *child) && supplies(process)).collect()
            }
        }
    }
}

/// True if all processes that supply the field are `own` or below it.
fn is_compared(rules: &[MergeRule], field: u32, tree: &ControlTree, own: u32) -> bool {
    match &rules[field as usize] {
        MergeRule::Same(Some(processes)) => processes.iter().all(|process| tree.is_below(*process, own)),
        _ => tree.parent(own).is_none(),
    }
}

fn take_larger(rules: &[MergeRule], largest: &mut [u64], other: &[u64]) {
    let mut start = 0;
    for rule in rules {
        let MergeRule::Max { words } = rule else { continue };
        let range = start..start + words;
        if other[range.clone()] > largest[range.clone()] {
            largest[range.clone()].copy_from_slice(&other[range.clone()]);
        }
        start = range.end;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Combines all numbers along the tree, from the leaves to process 0. Also returns the size of the largest message.
    fn reduce(tree: &ControlTree, rules: &[MergeRule], fields: &[Vec<Vec<u64>>]) -> (Reduced, usize) {
        let mut partials: BTreeMap<u32, Partial> = BTreeMap::new();
        let mut bytes = 0;
        // A parent's number is lower than those of its children.
        for process in (0..tree.processes()).rev() {
            let below = tree.children(process).into_iter();
            let below: Vec<_> = below.map(|child| (child, partials.remove(&child).expect("earlier"))).collect();
            assert!(below.iter().all(|(child, partial)| partial.is_valid(rules, tree, *child)));
            let own = Partial::new(rules, &fields[process as usize]);
            let combined = own.combine(rules, tree, process, below);
            bytes = bytes.max(combined.write().len());
            assert!(combined.write().len() <= bytes_max(rules, tree.processes()));
            partials.insert(process, Partial::read(&combined.write()).expect("valid bytes"));
        }
        let total = partials.remove(&0).expect("the root").total(rules, &fields[0]);
        (Reduced::read(&total, rules).expect("the total fits the rules"), bytes)
    }

    /// Computes the result directly from the definition, without a tree.
    fn expected(rules: &[MergeRule], fields: &[Vec<Vec<u64>>]) -> Reduced {
        let mut reduced = Reduced::default();
        for (index, rule) in rules.iter().enumerate() {
            let all = || fields.iter().map(|fields| &fields[index]);
            reduced.words.push(match rule {
                MergeRule::Max { .. } => all().max().expect("a process").clone(),
                MergeRule::First { .. } => fields[0][index].clone(),
                MergeRule::Same(_) => Vec::new(),
            });
            let values: Vec<_> = (0..).zip(all()).filter_map(|(p, words)| Some((p, *words.first()?))).collect();
            let differs = values.iter().any(|(_, value)| *value != values[0].1);
            if matches!(rule, MergeRule::Same(_)) && differs && reduced.difference.is_none() {
                reduced.difference = Some(Difference { field: index as u32, values });
            }
        }
        reduced
    }

    proptest! {
        #[test]
        fn the_result_does_not_depend_on_the_tree(
            nodes in prop::collection::vec(0u32..12, 1..60),
            sets in prop::collection::vec(prop::collection::vec(any::<bool>(), 60), 0..5),
            seed in prop::collection::vec(0u64..3, 64),
            differing in prop::collection::vec((0usize..8, 0u32..60), 0..3),
        ) {
            let tree = ControlTree::new(&nodes);
            let all = tree.processes();
            let mut rules = vec![MergeRule::Max { words: 2 }, MergeRule::First { words: 3 }, MergeRule::Same(None), MergeRule::Max { words: 1 }];
            for set in &sets {
                let set: Vec<u32> = (0..all).filter(|process| set[*process as usize]).collect();
                rules.push(MergeRule::Same(Some(set.into())));
            }
            let fields: Vec<Vec<Vec<u64>>> = (0..all).map(|process| {
                let mut next = seed.iter().cycle().skip(process as usize * 7).copied();
                let field = |(index, rule): (usize, &MergeRule)| match rule {
                    MergeRule::Max { words } => next.by_ref().take(*words).collect(),
                    MergeRule::First { words } => (0..*words as u64 * u64::from(process == 0)).collect(),
                    MergeRule::Same(set) => {
                        let value = 1000 + u64::from(differing.contains(&(index, process)));
                        if has(set.as_deref(), process) { vec![value] } else { Vec::new() }
                    }
                };
                rules.iter().enumerate().map(field).collect()
            }).collect();
            prop_assert!((0..all).all(|process| fits(&rules, process, &fields[process as usize])));
            prop_assert_eq!(reduce(&tree, &rules, &fields).0, expected(&rules, &fields));
        }

        /// For any bytes from a peer, reading ends and uses no more memory than a message may take.
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Partial::read(&bytes);
            let _ = Reduced::read(&bytes, &[MergeRule::Max { words: 2 }]);
        }
    }

    #[test]
    fn a_message_does_not_grow_with_the_number_of_processes() {
        let bytes = [8u32, 64, 3072].map(|processes| {
            let tree = ControlTree::new(&(0..processes).map(|process| process / 8).collect::<Vec<_>>());
            // Models a mesh with one data rank, of 8 tensor ranks, per node. In a step, these 8 compare a batch digest.
            let mut rules = vec![MergeRule::Max { words: 1 }, MergeRule::Same(None)];
            let data_ranks = (0..processes / 8).map(|data| (8 * data..8 * data + 8).collect::<Vec<u32>>());
            rules.extend(data_ranks.map(|processes| MergeRule::Same(Some(processes.into()))));
            let fields = |process: u32| {
                let digest = |data: u32| if data == process / 8 { vec![u64::from(data)] } else { Vec::new() };
                let fixed = [vec![u64::from(process == 5)], vec![7]];
                fixed.into_iter().chain((0..processes / 8).map(digest)).collect::<Vec<_>>()
            };
            let fields: Vec<_> = (0..processes).map(fields).collect();
            let (reduced, bytes) = reduce(&tree, &rules, &fields);
            assert_eq!((&reduced.words[0], &reduced.difference), (&vec![1], &None));
            bytes
        });
        println!("largest message of a step: {bytes:?} bytes");
        assert!(bytes.iter().all(|bytes| *bytes <= 64), "{bytes:?}");
    }
}
