//! Runs boxing plans on the in-process engine, one thread per device, and compares bits and bytes with the interpreter.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::collective::{Collective, CollectiveCall, Group};
use shardflow_kernels::device::Device;
use shardflow_kernels::memory::View;

use super::*;
use crate::boxing::interpret::run_local;
use crate::boxing::step::GroupCall;
use crate::sbp::region::filled;

/// Aborts the process after a minute, because a thread that is stuck in a collective cannot be joined.
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

/// Aborts the collectives of the other members when one member panics.
struct AbortOnPanic<'a>(&'a InProcess);

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort("a member panicked");
        }
    }
}

/// Runs a step on one thread per device, and returns the shards. For each rank, adds to `pulled` the bytes that the
/// device receives outside collectives.
fn run_step(
    engine: &Arc<InProcess>,
    step: &BoxingStep,
    shards: &[HostTensor],
    pulled: &mut BTreeMap<usize, usize>,
) -> Vec<HostTensor> {
    let devices = step.to.placement.devices();
    let parts: Vec<(HostTensor, usize)> = std::thread::scope(|scope| {
        let run = |index: usize| {
            scope.spawn(move || {
                let _guard = AbortOnPanic(engine);
                let mut received = 0;
                let shard = match step.local(index) {
                    LocalStep::Call(call) => run_collective(engine, call, &shards[index], &step.output_shape(index)),
                    _ => run_local(step, index, shards, &mut received),
                };
                (shard, received * DType::F32.bytes())
            })
        };
        let members: Vec<_> = (0..devices.len()).map(run).collect();
        members.into_iter().map(|m| m.join().unwrap()).collect()
    });
    let (shards, bytes): (Vec<HostTensor>, Vec<usize>) = parts.into_iter().unzip();
    devices.iter().zip(bytes).for_each(|(device, bytes)| *pulled.entry(*device).or_default() += bytes);
    shards
}

fn run_collective(engine: &Arc<InProcess>, call: GroupCall, input: &HostTensor, shape: &[usize]) -> HostTensor {
    let arena_of = |tensor: &HostTensor| {
        let arena = Device::cpu(0, 1, engine.clone()).arena(tensor.as_bytes().len()).unwrap();
        arena.write_host(0, tensor).unwrap();
        arena
    };
    let (input_arena, output_arena) = (arena_of(input), arena_of(&filled(shape, DType::F32, f32::NAN)));
    let read = View::new("test", &input_arena, 0, &input.shape, DType::F32).unwrap();
    let write = View::new("test", &output_arena, 0, shape, DType::F32).unwrap();
    let GroupCall { ranks, member, kind } = call;
    // Groups with the same ranks have the same id.
    let id = ranks.iter().fold(0, |id, rank| id | 1 << rank);
    let call = CollectiveCall { group: Arc::new(Group { id, ranks }), member, kind };
    engine.run(&call, &[read], &[write]).unwrap();
    output_arena.read_host(0, shape, DType::F32).unwrap()
}

fn check_engine(shape: &[usize], from: &PlacedLayout, to: &PlacedLayout) {
    let plan = plan(shape, DType::F32, from, to, &CostModel::default()).unwrap();
    let mut shards = scatter(&matrix(shape), &from.sbp, &from.placement, 9).unwrap();
    let (expected, _) = interpret(&plan, &shards);
    let (engine, mut pulled) = (Arc::new(InProcess::new()), BTreeMap::new());
    for step in &plan.steps {
        shards = run_step(&engine, step, &shards, &mut pulled);
    }
    let same = shards.iter().zip(&expected).all(|(a, b)| same_bits(a, b));
    assert!(same && shards.len() == expected.len(), "{from} -> {to} by {plan}");
    for (device, predicted) in &plan.bytes_received() {
        let counted = engine.bytes_received(*device) as usize + pulled.get(device).unwrap_or(&0);
        assert_eq!(counted, *predicted, "device {device}, {from} -> {to} by {plan}");
    }
}

#[test]
fn layout_changes_on_one_and_two_axes_equal_the_interpreter() {
    for (source, target) in [(line(0, 3), line(0, 3)), (line(0, 4), line(2, 3))] {
        with_deadline(|| check_pairs(&source, &target, check_engine));
    }
    for target in [grid(0, 2, 2), grid(2, 2, 3)] {
        with_deadline(|| check_pairs(&grid(0, 2, 2), &target, check_engine));
    }
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
