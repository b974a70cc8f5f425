//! Boxing: every pair of layouts moves exactly, counts what it predicts, and is planned at the least cost.

use expect_test::{Expect, expect};
use shardflow_kernels::tensor::HostTensor;

use super::interpret::interpret;
use super::*;
use crate::placement::Mesh;
use crate::sbp::region::same_bits;
use crate::sbp::{gather, scatter_random_terms};

const ENTRIES: [&str; 5] = ["B", "P", "Pmax", "S0", "S1"];

fn line(first: usize, count: usize) -> Placement {
    Placement::of((first..first + count).collect(), &[("x", count)]).unwrap()
}

fn grid(first: usize, rows: usize, columns: usize) -> Placement {
    Placement::of((first..first + rows * columns).collect(), &[("a", rows), ("b", columns)]).unwrap()
}

fn layout(placement: &Placement, text: &str) -> Layout {
    Layout { placement: placement.clone(), sbp: NdSbp::parse(text).unwrap() }
}

/// All layouts of a matrix on this placement.
fn layouts(placement: &Placement) -> Vec<Layout> {
    let mut texts = vec![String::new()];
    for _ in placement.axes() {
        texts = texts
            .iter()
            .flat_map(|t| ENTRIES.map(|e| format!("{t}{}{e}", if t.is_empty() { "" } else { "," })))
            .collect();
    }
    texts.iter().map(|t| layout(placement, t)).filter(|l| !l.sbp.mixes_reductions()).collect()
}

fn matrix(shape: &[usize]) -> HostTensor {
    let count: usize = shape.iter().product();
    HostTensor::f32(shape, (0..count).map(|i| (i * 7 % 31) as f32 - 11.0).collect())
}

/// Runs a pair and holds it against the whole tensor. Returns false where no boxing is defined (one reduction to another).
fn check_exact(shape: &[usize], from: &Layout, to: &Layout) -> bool {
    let plan = match plan(shape, DType::F32, from, to, &CostModel::default()) {
        Ok(plan) => plan,
        Err(error) => panic!("{error}"),
    };
    let whole = matrix(shape);
    let shards = scatter_random_terms(&whole, &from.sbp, &from.placement, 5).unwrap();
    plan.steps.iter().for_each(BoxingStep::assert_closed);
    let done = interpret(&plan, &shards);
    let gathered = gather(&done.shards, shape, &to.sbp, &to.placement);
    let gathered = gathered.unwrap_or_else(|e| panic!("{from} -> {to} by {plan}: {e}"));
    assert!(same_bits(&gathered, &whole), "{from} -> {to} by {plan}");
    assert_eq!(done.bytes_received, plan.bytes_received, "{from} -> {to} by {plan}");
    true
}

#[test]
fn every_pair_on_lines_is_exact_and_counted() {
    for (n, m) in (1..=4).flat_map(|n| (1..=4).map(move |m| (n, m))) {
        // The same (when n = m), overlapping and disjoint.
        for first in [0, 1, n] {
            let (source, target) = (line(0, n), line(first, m));
            for shape in [[5, 7], [3, 2]] {
                for from in layouts(&source) {
                    layouts(&target).iter().for_each(|to| assert!(check_exact(&shape, &from, to)));
                }
            }
        }
    }
}
