//! Tests of boxing: every layout change is exact, moves the predicted bytes, and has the least cost.

mod classes;
mod engine;

use expect_test::{Expect, expect};
use proptest::prelude::*;
use shardflow_kernels::collective::ReduceOp;
use shardflow_kernels::tensor::HostTensor;

use super::interpret::interpret;
use super::search::{Side, combinations};
use super::step::{LocalStep, StepKind};
use super::*;
use crate::sbp::Sbp;
use crate::sbp::region::same_bits;
use crate::sbp::{gather, scatter};

fn line(first: usize, count: usize) -> Placement {
    Placement::of((first..first + count).collect(), &[("x", count)]).unwrap()
}

fn grid(first: usize, rows: usize, columns: usize) -> Placement {
    Placement::of((first..first + rows * columns).collect(), &[("a", rows), ("b", columns)]).unwrap()
}

fn layout(placement: &Placement, text: &str) -> PlacedLayout {
    PlacedLayout { placement: placement.clone(), sbp: NdSbp::parse(text).unwrap() }
}

fn all_layouts(dims: usize, axes: usize) -> Vec<NdSbp> {
    let (splits, partial) = ((0..dims).map(Sbp::Split), [ReduceOp::Sum, ReduceOp::Max].map(Sbp::Partial));
    let entries: Vec<Sbp> = std::iter::once(Sbp::Broadcast).chain(splits).chain(partial).collect();
    combinations((0..axes).map(|_| entries.clone()))
}

fn layouts(placement: &Placement) -> Vec<PlacedLayout> {
    let layouts = all_layouts(2, placement.axes().len());
    // Each axis has `B`, `S0`, `S1`, `P` or `Pmax`. Layouts that mix reductions are excluded.
    assert_eq!(layouts.len(), [1, 5, 23][placement.axes().len()]);
    layouts.into_iter().map(|sbp| PlacedLayout { placement: placement.clone(), sbp }).collect()
}

fn pairs(source: &Placement, target: &Placement) -> Vec<(PlacedLayout, PlacedLayout)> {
    let targets = layouts(target);
    layouts(source).iter().flat_map(|from| targets.iter().map(|to| (from.clone(), to.clone()))).collect()
}

fn check_pairs(source: &Placement, target: &Placement, check: fn(&[usize], &PlacedLayout, &PlacedLayout)) {
    for shape in [[5, 7], [3, 2]] {
        pairs(source, target).iter().for_each(|(from, to)| check(&shape, from, to));
    }
}

fn matrix(shape: &[usize]) -> HostTensor {
    let count: usize = shape.iter().product();
    HostTensor::f32(shape, (0..count).map(|i| (i * 7 % 31) as f32 - 11.0).collect())
}

/// Runs a layout change. Compares the result with the whole tensor, and the bytes with the prediction.
fn check_exact(shape: &[usize], from: &PlacedLayout, to: &PlacedLayout) {
    let plan = plan(shape, DType::F32, from, to, &CostModel::default()).unwrap();
    let whole = matrix(shape);
    let shards = scatter(&whole, &from.sbp, &from.placement, 5).unwrap();
    let (shards, bytes_received) = interpret(&plan, &shards);
    let gathered = gather(&shards, shape, &to.sbp, &to.placement);
    let gathered = gathered.unwrap_or_else(|e| panic!("{from} -> {to} by {plan}: {e}"));
    assert!(same_bits(&gathered, &whole), "{from} -> {to} by {plan}");
    assert_eq!(bytes_received, plan.bytes_received(), "{from} -> {to} by {plan}");
}

#[test]
fn every_layout_change_on_one_axis_is_exact() {
    for (n, m) in (1..=4).flat_map(|n| (1..=4).map(move |m| (n, m))) {
        // The targets: the same placement (if n = m), an overlapping one, and a disjoint one.
        [0, 1, n].into_iter().for_each(|first| check_pairs(&line(0, n), &line(first, m), check_exact));
    }
}

#[test]
fn every_layout_change_on_two_axes_is_exact() {
    // The targets: the same placement, a larger one that overlaps, and a disjoint one.
    for target in [grid(0, 2, 2), grid(2, 2, 3), grid(4, 2, 2)] {
        check_pairs(&grid(0, 2, 2), &target, check_exact);
    }
}

#[test]
fn layout_changes_with_other_ranks_and_meshes_are_exact() {
    let cube = Placement::of((0..8).collect(), &[("a", 2), ("b", 2), ("c", 2)]).unwrap();
    let texts = ["S0,S0,S0", "S0,P,S0", "B,S1,S1", "P,P,P", "S1,S0,B", "B,B,B", "P,S0,B", "Pmax,S1,Pmax"];
    for (from, to) in texts.iter().flat_map(|a| texts.map(|b| (*a, b))) {
        check_exact(&[5, 9], &layout(&cube, from), &layout(&cube, to));
        check_exact(&[1, 1], &layout(&cube, from), &layout(&cube, to));
        check_exact(&[0, 3], &layout(&cube, from), &layout(&cube, to));
    }
    check_pairs(&grid(3, 1, 3), &grid(3, 1, 3), check_exact);
    let one = Placement::of(vec![3], &[]).unwrap();
    for text in ["S0,S0,S0", "P,P,P", "B,S0,B"] {
        check_exact(&[7], &layout(&cube, text), &layout(&one, "()"));
        check_exact(&[7], &layout(&one, "()"), &layout(&cube, text));
    }
    check_exact(&[], &layout(&cube, "P,B,P"), &layout(&one, "()"));
    check_exact(&[2, 3, 4], &layout(&cube, "S2,P,S0"), &layout(&cube, "S0,S2,S1"));
}

#[test]
fn integers_are_moved_but_not_reduced() {
    let place = grid(0, 2, 2);
    let ids = HostTensor::i32(&[5], vec![1, -2, i32::MAX, i32::MIN, 16_777_217]);
    let (from, to) = (layout(&place, "S0,S0"), layout(&place, "B,S0"));
    let plan_of = |from, to| plan(&[5], DType::I32, from, to, &CostModel::default());
    let shards = scatter(&ids, &from.sbp, &place, 1).unwrap();
    let (shards, _) = interpret(&plan_of(&from, &to).unwrap(), &shards);
    assert_eq!(gather(&shards, &[5], &to.sbp, &place).unwrap(), ids);
    let error = plan_of(&from, &layout(&place, "P,B")).unwrap_err().to_string();
    assert!(error.contains("integer tensors cannot be partial"), "{error}");
}

#[test]
fn layout_changes_without_reductions_keep_every_bit() {
    let place = grid(0, 2, 2);
    let special = [f32::from_bits(0x7fc0_1234), -0.0, f32::INFINITY, f32::MIN_POSITIVE / 2.0, f32::NEG_INFINITY, 1.0];
    let whole = HostTensor::f32(&[3, 2], special.to_vec());
    let is_unreduced = |(from, to): &(PlacedLayout, PlacedLayout)| from.sbp.partial().or(to.sbp.partial()).is_none();
    for (from, to) in pairs(&place, &place).into_iter().filter(is_unreduced) {
        let plan = plan(&[3, 2], DType::F32, &from, &to, &CostModel::default()).unwrap();
        let (shards, _) = interpret(&plan, &scatter(&whole, &from.sbp, &place, 1).unwrap());
        assert!(same_bits(&gather(&shards, &[3, 2], &to.sbp, &place).unwrap(), &whole), "{plan}");
    }
}

/// Finds the least cost of all simple paths of at most `steps` steps by depth-first search. Abandons a path
/// when it costs more than the best one.
fn exhaustive(space: &SearchSpace<'_>, path: &mut Vec<usize>, steps: usize, cost: f64, best: &mut f64) {
    let last = path[path.len() - 1];
    if last == space.target {
        *best = best.min(cost);
        return;
    }
    for next in 0..space.states.len() {
        if path.contains(&next) || path.len() > steps {
            continue;
        }
        let Some(edge) = space.edge(last, next, f64::INFINITY) else { continue };
        if cost + edge.cost_seconds <= *best {
            path.push(next);
            exhaustive(space, path, steps, cost + edge.cost_seconds, best);
            path.pop();
        }
    }
}

/// All layouts, including those that the planner omits.
fn unrestricted(side: &Side<'_>) -> Vec<NdSbp> {
    all_layouts(side.shape.len(), side.sizes.len())
}

fn check_least(shape: &[usize], from: &PlacedLayout, to: &PlacedLayout, model: &CostModel, steps: usize) {
    let planned = plan(shape, DType::F32, from, to, model).unwrap();
    let overlap = Overlap::of(&from.placement, &to.placement);
    let space = SearchSpace::new(shape, DType::F32, from, to, &overlap, model, unrestricted);
    // This bound makes the search terminate. It is twice the planner's cost, so the check fails if nothing is found.
    let mut least = planned.cost_seconds * 2.0;
    exhaustive(&space, &mut vec![space.source], steps, 0.0, &mut least);
    let cost = planned.cost_seconds;
    assert!((cost - least).abs() <= 1e-9 * least, "{from} -> {to} by {planned}: cost {cost} s, least cost {least} s");
}

/// A cost model in which bandwidth dominates latency, so longer paths win.
const BANDWIDTH_BOUND: CostModel = CostModel {
    within: LinkCost { alpha_seconds: 1.0, seconds_per_byte: 1.0 },
    across: LinkCost { alpha_seconds: 2.0, seconds_per_byte: 3.0 },
};

/// A cost model in which latency matters, but a single step is not always best.
const LATENCY_MATTERS: CostModel = CostModel {
    within: LinkCost { alpha_seconds: 140.0, seconds_per_byte: 1.0 },
    across: LinkCost { alpha_seconds: 20.0, seconds_per_byte: 3.0 },
};

#[test]
fn no_path_costs_less_than_the_plan() {
    for (shape, model) in [([5, 7], BANDWIDTH_BOUND), ([5, 7], LATENCY_MATTERS), ([6, 4], CostModel::default())] {
        for (source, target) in [(line(0, 3), line(0, 3)), (line(0, 2), line(1, 4))] {
            pairs(&source, &target).iter().for_each(|(from, to)| check_least(&shape, from, to, &model, usize::MAX));
        }
    }
}

#[test]
fn no_short_path_on_a_grid_costs_less_than_the_plan() {
    let (source, target) = (grid(0, 2, 2), grid(0, 2, 2));
    for from in layouts(&source) {
        layouts(&target).iter().for_each(|to| check_least(&[5, 7], &from, to, &BANDWIDTH_BOUND, 3));
    }
}

#[test]
fn a_planner_that_has_searched_before_finds_the_same_plans() {
    let place = grid(0, 2, 3);
    // The placements after the first have the same axes, but different devices.
    let others = [grid(0, 2, 3), grid(6, 2, 3), grid(12, 2, 3), grid(3, 2, 3)];
    for (shape, dtype) in [([5, 7], DType::F32), ([1, 2], DType::F32), ([5, 7], DType::I32)] {
        let mut planner = Planner::new(BANDWIDTH_BOUND);
        for (from, to) in others.iter().flat_map(|other| pairs(&place, other)) {
            let planned = plan(&shape, dtype, &from, &to, &BANDWIDTH_BOUND);
            let seconds = planned.as_ref().map_or(f64::INFINITY, |p| p.cost_seconds);
            assert_eq!(planner.seconds(&shape, dtype, &from, &to), seconds, "{from} -> {to}");
            let error = |e: LayoutError| e.to_string();
            assert_eq!(planner.plan(&shape, dtype, &from, &to).map_err(error), planned.map_err(error));
        }
    }
}

fn check(shape: &[usize], from: &PlacedLayout, to: &PlacedLayout, expected: Expect) {
    let plan = plan(shape, DType::F32, from, to, &CostModel::default()).unwrap();
    assert_eq!(plan, super::plan(shape, DType::F32, from, to, &CostModel::default()).unwrap());
    expected.assert_eq(&plan.to_string());
}

#[test]
fn common_layout_changes_use_the_expected_collectives() {
    let (pair, place) = (line(0, 2), grid(0, 2, 2));
    for (placement, from, to, expected) in [
        (&pair, "P", "B", expect!["all-reduce over x: (P) -> (B), 16384 bytes"]),
        (&pair, "P", "S1", expect!["reduce-scatter over x: (P) -> (S1), 8192 bytes"]),
        (&pair, "S0", "S1", expect!["all-to-all over x: (S0) -> (S1), 4096 bytes"]),
        (&pair, "B", "P", expect!["pad over x: (B) -> (P), 0 bytes"]),
        (&place, "P,P", "B,B", expect!["all-reduce over a+b: (P, P) -> (B, B), 24576 bytes"]),
        (&place, "S0,S0", "B,S0", expect!["all-to-all over a+b: (S0, S0) -> (B, S0), 8192 bytes"]),
        (&place, "S0,B", "B,S0", expect!["all-to-all over a+b: (S0, B) -> (B, S0), 8192 bytes"]),
        (&place, "B,B", "B,B", expect![""]),
    ] {
        check(&[64, 64], &layout(placement, from), &layout(placement, to), expected);
    }
}

/// Narayanan et al. 2021, section 4.1, <https://arxiv.org/abs/2104.04473>: a replicated tensor is sent only once.
#[test]
fn a_replicated_tensor_crosses_placements_once() {
    let (from, to) = (layout(&line(0, 4), "B"), layout(&line(4, 4), "B"));
    check(
        &[1024, 1024],
        &from,
        &to,
        expect![
            "transfer: (B) on x=4 on [0, 1, 2, 3] -> (S0) on x=4 on [4, 5, 6, 7], 1048576 bytes; all-gather over x: (S0) -> (B), 3145728 bytes"
        ],
    );
    check(&[2, 2], &from, &to, expect!["transfer: (B) on x=4 on [0, 1, 2, 3] -> (B) on x=4 on [4, 5, 6, 7], 16 bytes"]);
}

#[test]
fn pulls_are_spread_over_all_holders_of_a_copy() {
    let (from, to) = (layout(&line(0, 2), "B"), layout(&line(2, 4), "S0"));
    let plan = plan(&[8], DType::F32, &from, &to, &CostModel::default()).unwrap();
    let sources: Vec<usize> = (0..4)
        .map(|index| match plan.steps[0].local(index) {
            LocalStep::Pull(pulls) => pulls[0].from_device,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(sources, [0, 1, 0, 1]);
}

fn placements() -> impl Strategy<Value = Placement> {
    (0..5_usize, prop::collection::vec(1..4_usize, 0..4)).prop_map(|(first, sizes)| {
        let names = ["a", "b", "c"];
        let axes: Vec<(&str, usize)> = names.into_iter().zip(sizes.iter().copied()).collect();
        // Ranks are in reverse order, so that index and rank differ.
        let devices = (first..first + sizes.iter().product::<usize>()).rev().collect();
        Placement::of(devices, &axes).unwrap()
    })
}

/// Maps random numbers to a layout on this placement; all `Partial` entries have the same reduction.
fn layout_from_draws(placement: &Placement, rank: usize, draws: &[usize], max: bool) -> PlacedLayout {
    let op = if max { ReduceOp::Max } else { ReduceOp::Sum };
    let entry = |&draw: &usize| match draw % (rank + 2) {
        0 => Sbp::Broadcast,
        1 => Sbp::Partial(op),
        dim => Sbp::Split(dim - 2),
    };
    let sbp = NdSbp(draws[..placement.axes().len()].iter().map(entry).collect());
    PlacedLayout { placement: placement.clone(), sbp }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn random_layout_changes_are_exact(
        (source, target, same) in (placements(), placements(), any::<bool>()),
        shape in prop::collection::vec(0..6_usize, 0..4),
        (from, to) in (prop::array::uniform3(0..60_usize), prop::array::uniform3(0..60_usize)),
        max in any::<[bool; 2]>(),
    ) {
        let target = if same { source.clone() } else { target };
        let from = layout_from_draws(&source, shape.len(), &from, max[0]);
        let to = layout_from_draws(&target, shape.len(), &to, max[1]);
        check_exact(&shape, &from, &to);
    }
}

#[test]
fn terms_move_to_other_devices_without_a_reduction() {
    let (source, target) = (grid(0, 2, 2), grid(4, 2, 2));
    for text in ["P,S0", "B,P", "P,P"] {
        let plan = plan(&[6, 4], DType::F32, &layout(&source, text), &layout(&target, text), &CostModel::default());
        assert_eq!(
            plan.unwrap().steps.iter().map(|step| step.kind).collect::<Vec<_>>(),
            [StepKind::Transfer],
            "{text}"
        );
    }
}
