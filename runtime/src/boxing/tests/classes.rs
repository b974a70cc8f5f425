//! Checks that results for a device class or for one device equal the results of a pass over all devices.

use shardflow_kernels::tensor::Region;

use super::*;
use crate::boxing::step::Pull;

/// The pulls of all target devices, computed in one pass over these devices.
fn all_pulls(step: &BoxingStep) -> Vec<Vec<Pull>> {
    let (source, target) = (&step.from.placement, &step.to.placement);
    let same_axes = source.axes().iter().map(|a| a.size).eq(target.axes().iter().map(|a| a.size));
    let mut holders: Vec<(Region, Vec<usize>)> = Vec::new();
    for index in 0..source.device_count() {
        let region = step.from.region(&step.shape, index);
        match holders.iter_mut().find(|h| h.0 == region) {
            Some((_, indices)) => indices.push(index),
            None => holders.push((region, vec![index])),
        }
    }
    let mut pulled = vec![0; source.device_count()];
    let mut all = Vec::new();
    for (index, &device) in target.devices().iter().enumerate() {
        let region = step.to.region(&step.shape, index);
        let mut pulls = Vec::new();
        for (held, indices) in &holders {
            let Some(common) = held.intersect(&region) else { continue };
            let own = source.index_of(device).filter(|i| indices.contains(i));
            let same_coords = Some(index).filter(|i| same_axes && indices.contains(i));
            let least = indices.iter().copied().min_by_key(|&i| (pulled[i], i));
            let holder = own.or(same_coords).or(least).unwrap();
            pulled[holder] += if own.is_none() { common.element_count() } else { 0 };
            let (src, dst) = (common.relative_to(held), common.relative_to(&region));
            pulls.push(Pull { from_device: source.devices()[holder], src, dst });
        }
        all.push(pulls);
    }
    all
}

fn check_step(step: &BoxingStep) {
    let devices = 0..step.to.placement.device_count();
    let max = devices.clone().map(|index| step.bytes_received(index)).max().unwrap();
    assert_eq!(step.bytes_received_max(), max, "{step}");
    let is_kept = devices.clone().all(|index| step.local(index) == LocalStep::Keep);
    assert_eq!(step.is_kept_everywhere(), is_kept, "{step}");
    if step.kind == StepKind::Transfer {
        let pulls: Vec<LocalStep> = all_pulls(step).into_iter().map(LocalStep::Pull).collect();
        assert_eq!(devices.map(|index| step.local(index)).collect::<Vec<_>>(), pulls, "{step}");
    }
}

/// Checks the steps of the route, and the single step from source to target, if there is one.
fn check_classes(shape: &[usize], from: &PlacedLayout, to: &PlacedLayout) {
    let overlap = Overlap::of(&from.placement, &to.placement);
    let ends = |side: &Side<'_>| side.ends.iter().map(|end| (*end).clone()).collect();
    let model = CostModel::default();
    let space = SearchSpace::new(shape, DType::F32, from, to, &overlap, &model, ends);
    let direct = space.step(space.source, space.target);
    let mut steps = plan(shape, DType::F32, from, to, &model).unwrap().steps;
    steps.extend(direct.map(|RouteStep { kind, axes, elements_max, cost_seconds, .. }| {
        let (shape, from, to) = (shape.to_vec(), from.clone(), to.clone());
        BoxingStep { kind, shape, dtype: DType::F32, from, to, axes, elements_max, cost_seconds }
    }));
    steps.iter().for_each(check_step);
}

#[test]
fn classes_and_single_devices_equal_all_devices_on_two_axes() {
    for target in [grid(0, 2, 3), grid(2, 2, 3), grid(6, 2, 3), grid(6, 3, 2), grid(0, 3, 2), grid(6, 1, 4)] {
        check_pairs(&grid(0, 2, 3), &target, check_classes);
    }
}

/// A placement of at most 64 devices, so that a case takes milliseconds.
fn large_placements() -> impl Strategy<Value = Placement> {
    (0..70_usize, prop::collection::vec(1..5_usize, 0..6)).prop_map(|(first, mut sizes)| {
        while sizes.iter().product::<usize>() > 64 {
            let largest = sizes.iter_mut().max().unwrap();
            *largest -= 1;
        }
        let axes: Vec<(&str, usize)> = ["a", "b", "c", "d", "e"].into_iter().zip(sizes.iter().copied()).collect();
        let devices = (first..first + sizes.iter().product::<usize>()).rev().collect();
        Placement::of(devices, &axes).unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn classes_and_single_devices_equal_all_devices_on_five_axes(
        (source, target, same) in (large_placements(), large_placements(), any::<bool>()),
        shape in prop::collection::vec(0..20_usize, 0..4),
        (from, to) in (prop::array::uniform5(0..60_usize), prop::array::uniform5(0..60_usize)),
        max in any::<[bool; 2]>(),
    ) {
        let target = if same { source.clone() } else { target };
        let from = layout_from_draws(&source, shape.len(), &from, max[0]);
        let to = layout_from_draws(&target, shape.len(), &to, max[1]);
        check_classes(&shape, &from, &to);
        check_exact(&shape, &from, &to);
    }
}

/// The test searches the layout changes of a GPT layer and of its gradients. If two axes besides `data` and `tensor`
/// have several devices, the search evaluates no additional edges.
#[test]
fn more_axes_take_no_more_work() {
    let edges = |axes: &[(&str, usize)], layouts: &[(&str, &str)]| {
        let count = axes.iter().map(|axis| axis.1).product();
        let [here, next] = [0, count].map(|first| Placement::of((first..first + count).collect(), axes).unwrap());
        let mut planner = Planner::default();
        for (from, to) in layouts {
            let shape = [1024, 2048, 4096];
            planner.plan(&shape, DType::F32, &layout(&here, from), &layout(&here, to)).unwrap();
            planner.plan(&shape, DType::F32, &layout(&here, from), &layout(&next, to)).unwrap();
        }
        planner.edges_evaluated
    };
    let two = [("S0,P", "S0,B"), ("P,B", "B,B"), ("P,S1", "B,S1"), ("S0,B", "S0,S2"), ("P,P", "B,B")];
    let two = edges(&[("data", 8), ("tensor", 8)], &two);
    // `S1` on the context axis is the split of the sequence.
    let four =
        [("S0,S0,S1,P", "S0,S0,S1,B"), ("P,P,P,B", "B,B,B,B"), ("P,P,P,S1", "B,B,B,S1"), ("S0,S0,S1,B", "S0,S0,S1,S2")];
    let four = four.into_iter().chain([("P,P,P,P", "B,B,B,B")]).collect::<Vec<_>>();
    let four = edges(&[("pod", 2), ("data", 8), ("context", 4), ("tensor", 8)], &four);
    assert!(four <= two, "the search evaluated {four} edges with four axes, but only {two} with two axes");
}

/// On more than two axes, the search omits layouts. Without a reduction, the plan is still the cheapest. With a
/// reduction, it costs at most a third more than the cheapest plan.
#[test]
fn plans_on_three_axes_are_close_to_the_cheapest() {
    let cube = |first: usize| Placement::of((first..first + 8).collect(), &[("a", 2), ("b", 2), ("c", 2)]).unwrap();
    let (here, there, shape) = (cube(0), cube(8), [8, 8]);
    let is_usual = |layout: &&NdSbp| layout.partial() != Some(ReduceOp::Max);
    let all: Vec<NdSbp> = all_layouts(2, 3).iter().filter(is_usual).cloned().collect();
    let pairs = all.iter().flat_map(|from| all.iter().map(move |to| (from, to)));
    // Test only some of the pairs, to save time.
    for (from, to) in pairs.step_by(23) {
        for target in [&here, &there] {
            let from = PlacedLayout { placement: here.clone(), sbp: from.clone() };
            let to = PlacedLayout { placement: target.clone(), sbp: to.clone() };
            let planned = plan(&shape, DType::F32, &from, &to, &BANDWIDTH_BOUND).unwrap();
            let overlap = Overlap::of(&here, target);
            let space = SearchSpace::new(&shape, DType::F32, &from, &to, &overlap, &BANDWIDTH_BOUND, unrestricted);
            let least: f64 = space.cheapest_route().unwrap().iter().map(|step| step.cost_seconds).sum();
            let is_reduced = from.sbp.partial().is_some() && to.sbp.partial().is_none();
            let is_moved = from.sbp.partial().is_none() && to.sbp.partial().is_none();
            let limit = if is_moved { 1.0 } else { 4.0 / 3.0 };
            let cost = planned.cost_seconds;
            let is_close = cost <= least * limit * (1.0 + 1e-9);
            assert!(is_close || !(is_moved || is_reduced), "{from} -> {to} by {planned}: {cost} s, least {least} s");
        }
    }
}
