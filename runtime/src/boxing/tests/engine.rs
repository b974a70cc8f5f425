//! Runs boxing plans on the in-process collective engine with one thread per device, and compares bits and bytes with
//! the interpreter.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::collective::{Collective, CollectiveCall, Group};
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::{Arena, View};

use super::*;
use crate::sbp::region::{copy_box, filled};

/// Aborts the process if the test runs longer than a minute, because a thread that is stuck in a collective cannot be
/// joined.
fn with_deadline(test: impl FnOnce()) {
    let (finished, wait) = channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if wait.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
            eprintln!("boxing on the engine did not finish within 60 s");
            std::process::abort();
        }
    });
    test();
    drop(finished);
    watchdog.join().unwrap();
}

/// Aborts the collectives of the other members when one panics.
struct AbortOnPanic<'a>(&'a InProcess);

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort("a member panicked");
        }
    }
}

struct Runner {
    engine: Arc<InProcess>,
    groups: HashMap<Vec<usize>, Arc<Group>>,
    pulled: BTreeMap<usize, usize>,
}

impl Runner {
    fn arena_of(&self, tensor: &HostTensor) -> Arena {
        let arena = Device::cpu(0, 1, self.engine.clone()).arena(tensor.shape.iter().product::<usize>() * 4).unwrap();
        arena.write_host(0, tensor).unwrap();
        arena
    }

    fn group(&mut self, ranks: &[usize]) -> Arc<Group> {
        let id = self.groups.len() as u32;
        self.groups.entry(ranks.to_vec()).or_insert_with(|| Arc::new(Group { id, ranks: ranks.to_vec() })).clone()
    }

    fn step(&mut self, step: &BoxingStep, shards: &[HostTensor]) -> Vec<HostTensor> {
        let inputs: Vec<Arena> = shards.iter().map(|s| self.arena_of(s)).collect();
        let devices = step.to.placement.devices();
        let locals: Vec<LocalStep> = (0..devices.len()).map(|index| step.local(index)).collect();
        let groups: Vec<Option<Arc<Group>>> = locals
            .iter()
            .map(|local| match local {
                LocalStep::Call(call) => Some(self.group(&call.ranks)),
                _ => None,
            })
            .collect();
        let empty = |index: usize| filled(&step.output_shape(index), shards[0].dtype(), f32::NAN);
        let outputs: Vec<Arena> = (0..devices.len()).map(|index| self.arena_of(&empty(index))).collect();
        let engine = &*self.engine;
        let pulled: Vec<usize> = std::thread::scope(|scope| {
            let members: Vec<_> = locals
                .iter()
                .enumerate()
                .map(|(index, local)| {
                    let (inputs, output, group) = (&inputs, &outputs[index], groups[index].clone());
                    scope.spawn(move || {
                        let _guard = AbortOnPanic(engine);
                        run_local(engine, step, index, local, inputs, output, group)
                    })
                })
                .collect();
            members.into_iter().map(|m| m.join().unwrap()).collect()
        });
        for (device, bytes) in devices.iter().zip(pulled) {
            *self.pulled.entry(*device).or_default() += bytes;
        }
        let read =
            |(index, arena): (usize, &Arena)| arena.read_host(0, &step.output_shape(index), shards[0].dtype()).unwrap();
        outputs.iter().enumerate().map(read).collect()
    }
}

/// Runs one device's part and returns the bytes that it pulled.
fn run_local(
    engine: &InProcess,
    step: &BoxingStep,
    index: usize,
    local: &LocalStep,
    inputs: &[Arena],
    output: &Arena,
    group: Option<Arc<Group>>,
) -> usize {
    let (dtype, shape) = (DType::F32, step.output_shape(index));
    let input_shape = |index: usize| step.from.region(&step.shape, index).size;
    let input = |index: usize| inputs[index].read_host(0, &input_shape(index), dtype).unwrap();
    let mut out = output.read_host(0, &shape, dtype).unwrap();
    let mut pulled = 0;
    match local {
        LocalStep::Call(call) => {
            let before = input_shape(index);
            let read = View::new("test", &inputs[index], 0, &before, dtype).unwrap();
            let write = View::new("test", output, 0, &shape, dtype).unwrap();
            let call = CollectiveCall { group: group.unwrap(), member: call.member, kind: call.kind.clone() };
            engine.run(&call, &[read], &[write]).unwrap();
            return 0;
        }
        LocalStep::Keep => out = input(index),
        LocalStep::Local { fill, copy } => {
            if let Some(value) = fill {
                out = filled(&shape, dtype, *value);
            }
            if let Some((src, dst)) = copy {
                copy_box(&input(index), src, &mut out, dst);
            }
        }
        LocalStep::Pull(pulls) => {
            for pull in pulls {
                let holder = step.from.placement.index_of(pull.from_device).unwrap();
                copy_box(&input(holder), &pull.src, &mut out, &pull.dst);
                let own = pull.from_device == step.to.placement.devices()[index];
                pulled += if own { 0 } else { pull.src.element_count() * dtype.bytes() };
            }
        }
    }
    output.write_host(0, &out).unwrap();
    pulled
}

fn check_engine(shape: &[usize], from: &PlacedLayout, to: &PlacedLayout) {
    let plan = plan(shape, DType::F32, from, to, &CostModel::default()).unwrap();
    let mut shards = scatter_random_terms(&matrix(shape), &from.sbp, &from.placement, 9).unwrap();
    let (expected, _) = interpret(&plan, &shards);
    let mut runner = Runner { engine: Arc::new(InProcess::new()), groups: HashMap::new(), pulled: BTreeMap::new() };
    for step in &plan.steps {
        shards = runner.step(step, &shards);
    }
    let same = shards.iter().zip(&expected).all(|(a, b)| same_bits(a, b));
    assert!(same && shards.len() == expected.len(), "{from} -> {to} by {plan}");
    for (&device, &predicted) in &plan.bytes_received {
        let counted = runner.engine.bytes_received(device) as usize + runner.pulled.get(&device).unwrap_or(&0);
        assert_eq!(counted, predicted, "device {device}, {from} -> {to} by {plan}");
    }
}

#[test]
fn layout_changes_on_one_axis_equal_the_interpreter() {
    with_deadline(|| {
        for (source, target) in [(line(0, 3), line(0, 3)), (line(0, 4), line(2, 3))] {
            for shape in [[5, 7], [3, 2]] {
                pairs(&source, &target).iter().for_each(|(from, to)| check_engine(&shape, from, to));
            }
        }
    });
}

#[test]
fn layout_changes_on_two_axes_equal_the_interpreter() {
    with_deadline(|| {
        for target in [grid(0, 2, 2), grid(2, 2, 3)] {
            for shape in [[5, 7], [3, 2]] {
                pairs(&grid(0, 2, 2), &target).iter().for_each(|(from, to)| check_engine(&shape, from, to));
            }
        }
    });
}

#[test]
fn layout_changes_on_three_axes_equal_the_interpreter() {
    with_deadline(|| {
        let cube = Placement::of((0..8).rev().collect(), &[("a", 2), ("b", 2), ("c", 2)]).unwrap();
        let texts = ["S0,S0,S0", "S0,P,S0", "B,S1,S1", "P,P,P", "S1,S0,B", "B,B,B"];
        for (from, to) in texts.iter().flat_map(|a| texts.map(|b| (*a, b))) {
            check_engine(&[5, 9], &layout(&cube, from), &layout(&cube, to));
        }
    });
}
