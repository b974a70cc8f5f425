//! Counts the slots of each register: the maximum number of pieces that are alive at once when the step's lists run
//! with unlimited slots. The same run is possible with this number of slots. One action alone writes a register, so no
//! two actions compete for slots, and a plan that completes at one timing completes at any timing.

use std::collections::BTreeMap;
use std::sync::Arc;

use shardflow_actors::spec::StreamKind;

use crate::graph::Rate;
use crate::plan::assign::{ClassStorage, RegisterPlan};
use crate::plan::schedule::list::StepPlan;
use crate::plan::schedule::work::WorkGraph;
use crate::plan::segments::{SegmentId, Segments};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slots {
    pub count: u32,
    /// The slot of each piece of a step; empty if piece `n` lies in slot `n mod count`.
    pub slot_of: Arc<[u32]>,
}

impl Slots {
    /// The fewest slots for pieces with these lifetimes (in ticks). Sets `slot_of` only if a ring would need more.
    fn of(lifetimes: &[(u64, u64)]) -> Self {
        let fits = |count: &usize| lifetimes.iter().zip(&lifetimes[*count..]).all(|(piece, next)| piece.1 <= next.0);
        let ring = (1..lifetimes.len()).find(fits).unwrap_or(lifetimes.len()).max(1);
        // A piece takes the first slot that is free at its start.
        let (mut free_at, mut slot_of): (Vec<u64>, Vec<u32>) = (Vec::new(), Vec::new());
        for (start, end) in lifetimes {
            let slot = free_at.iter().position(|free| free <= start).unwrap_or(free_at.len());
            free_at.resize(free_at.len().max(slot + 1), 0);
            free_at[slot] = *end;
            slot_of.push(slot as u32);
        }
        let is_table = free_at.len() < ring;
        let count = if is_table { free_at.len() } else { ring };
        Self { count: count as u32, slot_of: if is_table { slot_of.into() } else { Arc::default() } }
    }
}

/// Start and end in ticks of each firing of each segment, in a step with unlimited slots.
pub struct Times<'a> {
    segments: &'a Segments,
    hop_ticks: u64,
    by_segment: BTreeMap<SegmentId, Vec<(u64, u64)>>,
}

impl<'a> Times<'a> {
    /// Compute segments run as listed in `step`. A segment of another stream runs as soon as its inputs are complete,
    /// but at most one iteration ahead of the work that reads it.
    pub fn of(segments: &'a Segments, work: &WorkGraph, step: &StepPlan) -> Self {
        let listed = work.work.iter().zip(&step.times).map(|(work, times)| (work.segment, times.clone()));
        let mut times = Self { segments, hop_ticks: work.hop_ticks, by_segment: listed.collect() };
        let mut readers: Vec<Vec<SegmentId>> = vec![Vec::new(); segments.list.len()];
        for id in segments.ids() {
            segments.reads[id.index()].iter().for_each(|source| readers[source.index()].push(id));
        }
        for id in segments.ids().filter(|id| segments.get(*id).stream != StreamKind::Compute) {
            times.place(id, &readers, work.micro_batches);
        }
        times
    }

    fn place(&mut self, id: SegmentId, readers: &[Vec<SegmentId>], micro_batches: u32) {
        if self.by_segment.contains_key(&id) {
            return;
        }
        let segment = self.segments.get(id);
        let firings = segment.rate.per_step(micro_batches as usize);
        // A placeholder until all sources of this segment have their times.
        self.by_segment.insert(id, vec![(0, 0); firings]);
        for source in &self.segments.reads[id.index()] {
            self.place(*source, readers, micro_batches);
        }
        let computes = |reader: &&SegmentId| self.segments.get(**reader).stream == StreamKind::Compute;
        let reading = readers[id.index()].iter().filter(computes).map(|reader| &self.by_segment[reader]);
        let first_reader = reading.filter(|times| times.len() == firings).min_by_key(|times| times.first().copied());
        let mut times = Vec::with_capacity(firings);
        for iteration in 0..firings {
            let sources = self.segments.reads[id.index()].iter();
            let ready = sources.map(|source| self.end(*source, iteration, firings)).max().unwrap_or(0);
            let previous = iteration.checked_sub(1).and_then(|previous| Some(first_reader?[previous].0)).unwrap_or(0);
            let start = ready.max(previous);
            times.push((start, start + self.hop_ticks));
        }
        self.by_segment.insert(id, times);
    }

    /// The time at which `source` completes the piece that a reader with `firings` firings reads in firing `iteration`.
    fn end(&self, source: SegmentId, iteration: usize, firings: usize) -> u64 {
        let times = &self.by_segment[&source];
        let piece = if firings == 1 { None } else { times.get(iteration) };
        piece.or(times.last()).map_or(0, |time| time.1)
    }

    pub fn slots(&self, storage: &ClassStorage) -> Vec<Slots> {
        storage.registers.iter().map(|register| Slots::of(&self.lifetimes(register))).collect()
    }

    /// The times at which the slot of each piece is acquired and released; `[(0, 0)]` if a step has only one piece.
    fn lifetimes(&self, register: &RegisterPlan) -> Vec<(u64, u64)> {
        if register.initial || register.rate == Rate::Step {
            return vec![(0, 0)];
        }
        let producer = self.segments.get(register.producer);
        let written = &self.by_segment[&register.producer];
        // The message that releases a slot takes `hop_ticks` if it comes from another actor.
        let released = |reader: &SegmentId, piece: usize, is_own: bool| {
            let hop = if is_own && self.segments.get(*reader).stream == producer.stream { 0 } else { self.hop_ticks };
            self.by_segment[reader].get(piece).map_or(0, |time| time.1 + hop)
        };
        let lifetime = |(piece, (start, end)): (usize, &(u64, u64))| {
            let own = register.readers.iter().map(|reader| released(reader, piece, true));
            let others = register.transfers.iter().map(|reader| released(reader, piece, false));
            (*start, own.chain(others).max().unwrap_or(*end))
        };
        written.iter().enumerate().map(lifetime).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No two pieces that are alive at once share a slot, and at some time all slots are in use. There is a table only
    /// if a ring of the same number of slots does not hold the pieces.
    #[test]
    fn slots_are_as_few_as_the_pieces_that_are_alive_at_once() {
        let mut seed = 1u64;
        let mut next = |n: u64| {
            seed = crate::init::mix(seed);
            seed % n
        };
        for _ in 0..500 {
            let (mut start, pieces) = (0, next(9) + 1);
            let piece = |_| {
                start += next(4);
                (start, start + 1 + next(12))
            };
            let lifetimes: Vec<(u64, u64)> = (0..pieces).map(piece).collect();
            let Slots { count, slot_of } = Slots::of(&lifetimes);
            let shown = format!("lifetimes {lifetimes:?}, slots {slot_of:?}");
            let slot = |piece: usize| slot_of.get(piece).copied().unwrap_or(piece as u32 % count);
            for (piece, (_, end)) in lifetimes.iter().enumerate() {
                let later = lifetimes.iter().enumerate().skip(piece + 1).filter(|(_, later)| later.0 < *end);
                assert!(later.into_iter().all(|(later, _)| slot(later) != slot(piece)), "{shown}");
            }
            let alive = |at: u64| lifetimes.iter().filter(|(start, end)| *start <= at && at < *end).count();
            let most = lifetimes.iter().map(|(start, _)| alive(*start)).max();
            assert_eq!(most, Some(count as usize), "{shown}");
            let ring_holds = lifetimes.iter().zip(lifetimes.iter().skip(count as usize)).all(|(a, b)| a.1 <= b.0);
            assert_eq!(slot_of.is_empty(), ring_holds, "{shown}");
        }
        assert_eq!(Slots::of(&[(0, 0)]), Slots { count: 1, slot_of: Arc::default() });
    }
}
