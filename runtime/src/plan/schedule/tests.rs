//! Tests that step plans of pipelines have the known durations and numbers of micro-batches in flight.

use shardflow_actors::label::Role;

use super::Schedule;
use super::list::StepPlan;
use super::work::{Work, WorkGraph};
use crate::plan::segments::SegmentId;

/// A chain of stages; `order` has the site of each chunk of the forward chain.
fn chain(order: &[usize], micro_batches: u32, (forward, backward, hop_ticks): (u64, u64, u64)) -> WorkGraph {
    let chunks = order.len();
    let work = |index: usize| {
        // The chain has the forward chunks, then the backward chunks from the last to the first.
        let (is_forward, chunk) = if index < chunks { (true, index) } else { (false, 2 * chunks - 1 - index) };
        let mut needs: Vec<(usize, bool)> = Vec::new();
        if let Some(previous) = index.checked_sub(1) {
            needs.push((previous, previous + 1 != chunks));
        }
        if !is_forward && chunk + 1 != chunks {
            needs.push((chunk, false));
        }
        Work {
            segment: SegmentId(index as u32),
            role: if is_forward { Role::Forward } else { Role::Backward },
            sites: vec![order[chunk]],
            firings: micro_batches,
            ticks: if is_forward { forward } else { backward },
            needs,
            closed_by: if is_forward { vec![2 * chunks - 1 - chunk] } else { Vec::new() },
        }
    };
    let sites = order.iter().max().map_or(0, |last| last + 1);
    WorkGraph { work: (0..2 * chunks).map(work).collect(), sites, micro_batches, hop_ticks }
}

/// Checks that each work fires as often as required, after all work that it needs, and that lists are in order of time.
fn check(graph: &WorkGraph, plan: &StepPlan) {
    for (index, work) in graph.work.iter().enumerate() {
        assert_eq!(plan.times[index].len(), work.firings as usize, "work {index}");
        for (iteration, (start, _)) in plan.times[index].iter().enumerate() {
            for (need, hop) in &work.needs {
                let end = plan.times[*need][iteration].1 + if *hop { graph.hop_ticks } else { 0 };
                assert!(end <= *start, "work {index} starts at {start}, before work {need} ends at {end}");
            }
        }
    }
    for list in &plan.lists {
        let mut firings: Vec<_> = plan.times.iter().map(|times| times.iter()).collect();
        assert!(list.iter().map(|work| firings[*work].next().expect("a firing").0).is_sorted());
    }
}

/// With hops, `2 (p - s) - 1` micro-batches in flight keep stage `s` of `p` busy; without, `p - s`.
#[test]
fn pipelines_take_the_known_times() {
    let of = |stages: usize, micro_batches: u32, ticks, schedule: Schedule, saves_memory| {
        let graph = chain(&(0..stages).collect::<Vec<_>>(), micro_batches, ticks);
        let plan = schedule.plan(&graph, saves_memory);
        check(&graph, &plan);
        let makespan = plan.times.iter().flatten().map(|time| time.1).max();
        (makespan.unwrap_or(0), plan.in_flight[..stages].to_vec())
    };
    assert_eq!(of(4, 8, (1, 2, 0), Schedule::GPipe, false), (33, vec![8, 8, 8, 8]));
    assert_eq!(of(4, 8, (1, 2, 0), Schedule::OneFOneB, false), (33, vec![4, 3, 2, 1]));
    // Times are in half ticks.
    let hops = |saves_memory| of(8, 32, (2, 4, 1), Schedule::OneFOneB, saves_memory);
    assert_eq!(hops(false), (2 * 124, vec![15, 13, 11, 9, 7, 5, 3, 1]));
    assert_eq!(hops(true), (2 * 151, vec![8, 7, 6, 5, 4, 3, 2, 1]));
}

/// The plan has all firings for every assignment of chunks to three sites, whatever the order of sites in the chain.
#[test]
fn chains_that_return_to_a_site_end() {
    for chunks in 1..6u32 {
        for code in 0..3u32.pow(chunks) {
            let order: Vec<usize> = (0..chunks).map(|chunk| (code / 3u32.pow(chunk) % 3) as usize).collect();
            for schedule in [Schedule::GPipe, Schedule::OneFOneB] {
                for micro_batches in [1, 5] {
                    let graph = chain(&order, micro_batches, (10, 20, 1));
                    check(&graph, &schedule.plan(&graph, false));
                }
            }
        }
    }
}

#[test]
fn work_on_several_sites_runs_in_one_order_on_all() {
    for schedule in [Schedule::GPipe, Schedule::OneFOneB] {
        let mut graph = chain(&[0, 1, 0, 2, 0], 6, (10, 20, 1));
        for index in [0, 4, 5, 9] {
            graph.work[index].sites = vec![0, 1, 2];
        }
        let plan = schedule.plan(&graph, false);
        check(&graph, &plan);
        let shared = |list: &Vec<usize>| list.iter().copied().filter(|w| graph.work[*w].sites.len() == 3).collect();
        let orders: Vec<Vec<usize>> = plan.lists.iter().map(shared).collect();
        assert!(orders.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
