//! Simulates a step in virtual time. Ready work starts when its sites (sets of devices) are free, the work with the
//! lowest priority value first. The lists record this run. So they cannot deadlock, and all sites run shared work in
//! the same order.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use super::work::WorkGraph;

/// The priority and limit that a named schedule gives to each [`super::work::Work`], by index.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Ready work with the lowest value runs first. A tie goes to the work that is last in the program, because running
    /// it finishes micro-batches.
    pub priorities: Vec<i32>,
    /// Maximum number of micro-batches that the work has begun but the work in `closed_by` has not ended.
    pub in_flight_max: Vec<u32>,
}

/// The order of a step, and the time of each firing.
#[derive(Clone, Debug, Default)]
pub struct StepPlan {
    /// For each site: its firings in order, as indices of the work.
    pub lists: Vec<Vec<usize>>,
    /// Start and end of each firing in ticks, by work and iteration.
    pub times: Vec<Vec<(u64, u64)>>,
    /// For each work: the maximum number of micro-batches in flight.
    pub in_flight: Vec<u32>,
    /// The schedule's priorities, by work.
    pub priorities: Vec<i32>,
}

pub(super) fn play(graph: &WorkGraph, rules: Rules) -> StepPlan {
    let mut player = Player::new(graph, rules);
    (0..graph.work.len()).for_each(|work| player.enable(work));
    loop {
        player.start_ready();
        let Some(Reverse(next)) = player.events.pop() else { break };
        player.now = next;
    }
    let Player { lists, times, in_flight, rules, .. } = player;
    StepPlan { lists, times, in_flight, priorities: rules.priorities }
}

struct Player<'a> {
    graph: &'a WorkGraph,
    rules: Rules,
    /// For each work: the work that waits for it.
    readers: Vec<Vec<usize>>,
    now: u64,
    /// Times at which sites become free or work becomes ready.
    events: BinaryHeap<Reverse<u64>>,
    /// The time at which each site becomes free.
    free_at: Vec<u64>,
    /// By priority: work whose next firing needs only firings that have begun. `ready_at` has its earliest start time.
    enabled: BTreeSet<(i32, Reverse<usize>)>,
    ready_at: Vec<u64>,
    lists: Vec<Vec<usize>>,
    times: Vec<Vec<(u64, u64)>>,
    in_flight: Vec<u32>,
}

impl<'a> Player<'a> {
    fn new(graph: &'a WorkGraph, rules: Rules) -> Self {
        let count = graph.work.len();
        let mut readers: Vec<Vec<usize>> = vec![Vec::new(); count];
        for (index, work) in graph.work.iter().enumerate() {
            work.needs.iter().for_each(|(need, _)| readers[*need].push(index));
        }
        Self {
            graph,
            rules,
            readers,
            now: 0,
            events: BinaryHeap::new(),
            free_at: vec![0; graph.sites],
            enabled: BTreeSet::new(),
            ready_at: vec![0; count],
            lists: vec![Vec::new(); graph.sites],
            times: vec![Vec::new(); count],
            in_flight: vec![0; count],
        }
    }

    /// Enables the next firing of this work if all firings that it waits for have begun.
    fn enable(&mut self, index: usize) {
        let work = &self.graph.work[index];
        let iteration = self.times[index].len();
        if iteration == work.firings as usize {
            return;
        }
        let mut ready_at = 0;
        for (need, hop) in &work.needs {
            let times = &self.times[*need];
            // Work of the whole step waits for the last micro-batch. Micro-batches wait for work of the whole step.
            let last = match (work.firings, self.graph.work[*need].firings) {
                (1, all) => all as usize - 1,
                (_, 1) => 0,
                _ => iteration,
            };
            let Some((_, end)) = times.get(last) else { return };
            ready_at = ready_at.max(end + if *hop { self.graph.hop_ticks } else { 0 });
        }
        self.ready_at[index] = ready_at;
        self.enabled.insert((self.rules.priorities[index], Reverse(index)));
        if ready_at > self.now {
            self.events.push(Reverse(ready_at));
        }
    }

    /// Starts all work that can start now. Ready work whose sites are busy reserves them, so no later work takes them.
    fn start_ready(&mut self) {
        let mut reserved: BTreeSet<usize> = BTreeSet::new();
        let candidates: Vec<usize> = self.enabled.iter().map(|(_, Reverse(index))| *index).collect();
        for index in candidates {
            if self.ready_at[index] > self.now || self.open(index) >= self.rules.in_flight_max[index] {
                continue;
            }
            let sites = &self.graph.work[index].sites;
            if sites.iter().all(|site| self.free_at[*site] <= self.now && !reserved.contains(site)) {
                self.start(index);
            }
            reserved.extend(sites);
        }
    }

    fn start(&mut self, index: usize) {
        let work = &self.graph.work[index];
        let end = self.now + work.ticks;
        self.times[index].push((self.now, end));
        self.in_flight[index] = self.in_flight[index].max(self.open(index));
        for site in &work.sites {
            self.free_at[*site] = end;
            self.lists[*site].push(index);
        }
        self.events.push(Reverse(end));
        self.enabled.remove(&(self.rules.priorities[index], Reverse(index)));
        self.enable(index);
        for reader in self.readers[index].clone() {
            let key = (self.rules.priorities[reader], Reverse(reader));
            if !self.enabled.contains(&key) {
                self.enable(reader);
            }
        }
    }

    /// Number of micro-batches that this work has begun but the work in `closed_by` has not ended.
    fn open(&self, index: usize) -> u32 {
        let ended = |closing: &usize| self.times[*closing].partition_point(|(_, end)| *end <= self.now) as u32;
        let begun = self.times[index].len() as u32;
        let closing = &self.graph.work[index].closed_by;
        closing.iter().map(ended).min().map_or(0, |closed| begun - closed.min(begun))
    }
}
