//! Plans for many meshes are valid, errors name the defect of a plan, and simulated schedules take the expected time.

use std::collections::BTreeSet;
use std::sync::Arc;

use expect_test::expect;
use shardflow_actors::simulate::{Jitter, SimulatedRun, SimulationOptions, Timing, simulate};
use shardflow_actors::spec::{ActionSpec, Firing, Spec, StreamKind};
use shardflow_kernels::collective::{CollectiveKind, ReduceOp};
use shardflow_kernels::memory::ALIGNMENT;
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::{DType, element_count};

use super::action::DeviceRegister;
use super::assign::RegisterPlan;
use super::emit::emit;
use super::error::PlanError;
use super::slots::Slots;
use super::validate::{check_quotient, validate};
use super::{ClassPlan, Plan, RegisterPlace, Schedule};
use crate::graph::builder::Layout;
use crate::graph::{AdamW, Graph, Role, Var};
use crate::nn::{self, GptConfig};
use crate::passes::{CompileError, CompileOptions, compile};
use crate::placement::Mesh;

pub(crate) const GPT: GptConfig =
    GptConfig { vocabulary: 7, layers: 4, heads: 4, width: 8, context: 3, batch: 8, dropout: 0.1 };

const SCHEDULES: [Schedule; 2] = [Schedule::GPipe, Schedule::OneFOneB];

/// The graph of a GPT, and its loss.
pub(crate) fn gpt_graph(mesh: &str, config: &GptConfig) -> (Graph, Var) {
    let mut g = Graph::new(&Mesh::parse(mesh).expect("a mesh"));
    let logits = nn::gpt(&mut g, config);
    let layout = nn::batch_layout(&g);
    let targets = g.input("targets", &[config.batch, config.context], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());
    (g, loss)
}

fn try_gpt(mesh: &str, options: &CompileOptions) -> Result<Plan, CompileError> {
    compile(gpt_graph(mesh, &GPT).0, options)
}

pub(crate) fn gpt(mesh: &str, micro_batches: usize, schedule: Schedule) -> Plan {
    let options = CompileOptions { micro_batches, schedule, ..CompileOptions::default() };
    try_gpt(mesh, &options).unwrap_or_else(|e| panic!("mesh {mesh}, {micro_batches}: {e}"))
}

#[test]
fn plans_for_many_meshes_are_valid_and_deterministic() {
    let meshes = [
        "data=1",
        "data=2",
        "data=3",
        "tensor=2",
        "tensor=3",
        "stage=2",
        "stage=4",
        "data=2,tensor=2",
        "data=3,stage=2",
        "stage=2,tensor=2",
        "data=2,stage=2,tensor=2",
    ];
    for mesh in meshes {
        for micro_batches in [1, 4] {
            for schedule in SCHEDULES {
                let plan = gpt(mesh, micro_batches, schedule);
                validate(&plan).unwrap_or_else(|e| panic!("mesh {mesh}, {micro_batches}: {e}"));
            }
        }
        let (plan, again) = (gpt(mesh, 2, Schedule::OneFOneB), gpt(mesh, 2, Schedule::OneFOneB));
        assert_eq!((plan.hash(), plan.explain()), (again.hash(), again.explain()));
        let (plan, again) = (plan.instance(), again.instance());
        assert!(plan.spec == again.spec && plan.memories().eq(again.memories()), "mesh {mesh}");
        assert_eq!(format!("{:?}", plan.actions), format!("{:?}", again.actions), "mesh {mesh}");
    }
}

/// Each firing of a step has its own slot, and no two tensors or slots of a device overlap.
#[test]
fn staging_slots_hold_all_tensors_of_a_step_apart() {
    for mesh in ["data=1", "data=3", "stage=2,tensor=2", "data=3,stage=4"] {
        for micro_batches in [1, 4] {
            let plan = gpt(mesh, micro_batches, Schedule::OneFOneB).instance();
            let mut used: Vec<Vec<(usize, usize)>> = vec![Vec::new(); plan.device_count()];
            for (actor, actions) in plan.spec.actors.values().zip(plan.actions.values()) {
                let memory = plan.memory(actor.device);
                for (spec, action) in actor.actions.iter().zip(actions) {
                    let place = memory.staging.get(&action.segment);
                    assert_eq!(place.is_some(), action.host.is_some(), "{mesh}: {}", action.name);
                    let (Some(place), Some(host)) = (place, &action.host) else { continue };
                    assert_eq!(place.slots, spec.per_step as usize, "{mesh}: {}", action.name);
                    for (slot, buffer) in (0..place.slots).flat_map(|slot| host.buffers.iter().map(move |b| (slot, b)))
                    {
                        let bytes = element_count(&buffer.shape) * buffer.dtype.bytes();
                        assert!(buffer.offset + bytes <= place.stride, "{mesh}: {}", action.name);
                        let start = place.offset + slot * place.stride + buffer.offset;
                        assert_eq!(start % ALIGNMENT, 0, "{mesh}: {}", action.name);
                        used[actor.device].push((start, start + bytes));
                    }
                }
            }
            for (used, memory) in used.iter_mut().zip(plan.memories()) {
                used.sort_unstable();
                assert!(used.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{mesh}: overlap in {used:?}");
                assert!(used.last().is_none_or(|last| last.1 <= memory.staging_end()), "{mesh}: {used:?}");
                assert_eq!(memory.staging_bytes, memory.staging_end(), "CPU staging memory counts as device memory");
            }
        }
    }
}

/// A device's own programs differ from those of its class's first device only in regions and ranks.
#[test]
fn devices_of_a_class_run_the_same_programs() {
    let mut classes = 0;
    for mesh in ["data=3,tensor=3", "data=8", "data=5,stage=2", "stage=2,tensor=4", "data=3,stage=4,tensor=2"] {
        let plan = gpt(mesh, 2, Schedule::OneFOneB);
        classes += plan.classes.devices.len();
        for device in 0..plan.device_count() {
            let class = plan.class_plan(device);
            for (id, first) in class.storage.segments.iter().zip(&class.actions) {
                let own = emit(&plan, device, *id);
                let at = format!("mesh {mesh}, device {device}, {}", own.plan.name);
                assert_eq!((own.scratch_bytes, &own.outputs), (first.scratch_bytes, &first.outputs), "{at}");
                assert_eq!((&own.plan.signals, &own.plan.nodes), (&first.plan.signals, &first.plan.nodes), "{at}");
                let register = |at: &DeviceRegister| (plan.classes.of[at.device], at.register);
                let [inputs, others] = [&own, first].map(|e| e.inputs.iter().map(register).collect::<Vec<_>>());
                assert_eq!(inputs, others, "{at}");
                for (own, first) in own.plan.launches.iter().zip(&first.plan.launches) {
                    assert_eq!(own.op.name(), first.op.name(), "{at}");
                    assert_eq!((&own.reads, &own.writes), (&first.reads, &first.writes), "{at}");
                    assert_eq!((&own.workspace, own.accumulate), (&first.workspace, first.accumulate), "{at}");
                }
            }
        }
    }
    assert!(classes < 9 + 8 + 10 + 8 + 24, "some devices are alike");
}

#[test]
fn the_number_of_classes_does_not_grow_with_the_data_axis() {
    let classes = |mesh: &str| gpt(mesh, 1, Schedule::OneFOneB).classes.devices.len();
    assert_eq!(classes("data=4,stage=2"), classes("data=8,stage=2"));
    assert_eq!(classes("data=2,tensor=2"), classes("data=8,tensor=2"));
}

#[test]
fn a_stage_that_is_used_again_runs_a_further_chunk() {
    let mut g = Graph::new(&Mesh::parse("stage=2").unwrap());
    g.place_at("stage", 0);
    let ids = g.input("ids", &[4, 3], DType::I32, Layout::broadcast());
    let mut x = nn::embedding(&mut g, "embedding", ids, 7, 8, nn::Parallel::Replicated);
    for (layer, stage) in [0, 1, 0].into_iter().enumerate() {
        g.place_at("stage", stage);
        x = nn::linear(&mut g, &format!("layer {layer}"), x, 8, nn::Parallel::Replicated);
    }
    let loss = g.cross_entropy(x, ids);
    g.minimize(loss, AdamW::default());
    let instance = compile(g, &CompileOptions::default()).expect("a valid program").instance();
    let chunks = |device: usize, role: Role| {
        let actors = instance.spec.actors.values().filter(move |actor| actor.device == device);
        let actions = actors.flat_map(|actor| &actor.actions).filter(move |action| action.label.role == role);
        actions.map(|action| (action.label.chunk, &*action.name)).collect::<Vec<_>>()
    };
    assert_eq!(chunks(0, Role::Forward), [(0, "forward"), (1, "forward 1")]);
    assert_eq!(chunks(1, Role::Forward), [(0, "forward")]);
    assert_eq!(chunks(0, Role::Backward), [(0, "backward"), (1, "backward 1")]);
    assert_eq!(chunks(1, Role::Backward), [(0, "backward")]);
}

/// Along an axis, classes change only where the size of a part changes, once for each distinct remainder of a split
/// extent, and after the first device, which holds the first copies.
#[test]
fn uneven_extents_split_classes_at_most_once_for_each_remainder() {
    let batch = [GPT.batch];
    let widths = [GPT.width, GPT.heads, 4 * GPT.width, GPT.vocabulary];
    let along = |extents: &[usize], devices: usize| {
        let boundaries: BTreeSet<usize> = extents.iter().map(|extent| extent % devices).chain([1]).collect();
        1 + boundaries.range(1..devices).count()
    };
    for (data, tensor) in [1, 2, 3, 5, 8].into_iter().flat_map(|d| [1, 2, 3, 5, 7, 8].map(|t| (d, t))) {
        let mesh = format!("data={data},tensor={tensor}");
        let classes = gpt(&mesh, 1, Schedule::OneFOneB).classes.devices.len();
        let most = along(&batch, data) * along(&widths, tensor);
        assert!(classes <= most, "{mesh}: {classes} classes, at most {most} expected");
    }
}

#[test]
fn a_tight_memory_limit_keeps_fewer_micro_batches_in_flight() {
    let options = CompileOptions { micro_batches: 8, ..CompileOptions::default() };
    let in_flight = |plan: &Plan| plan.in_flight.iter().copied().filter(|count| *count > 1).collect::<Vec<_>>();
    let most = |plan: &Plan| plan.memories().map(|memory| memory.total_bytes()).max().expect("devices");
    let fast = try_gpt("stage=4", &options).expect("every plan fits without a limit");
    assert_eq!(in_flight(&fast), [7, 5, 3]);
    let limit = CompileOptions { memory_bytes: Some(most(&fast) - 1), ..options.clone() };
    let small = try_gpt("stage=4", &limit).expect("a smaller plan fits");
    assert_eq!(in_flight(&small), [4, 3, 2]);
    let limit = CompileOptions { memory_bytes: Some(most(&small) - 1), ..options };
    assert!(matches!(try_gpt("stage=4", &limit), Err(CompileError::Plan(PlanError::Memory { .. }))));
}

/// Changes a valid plan with `corrupt` and returns the error of its validation.
fn refused(mesh: &str, schedule: Schedule, corrupt: impl FnOnce(&mut Plan)) -> String {
    let mut plan = gpt(mesh, 4, schedule);
    corrupt(&mut plan);
    validate(&plan).expect_err("the plan is corrupt").to_string()
}

/// Changes the stash: the register that holds the activations that forward keeps for backward.
fn change_stash(change: fn(&mut Slots, &mut RegisterPlace)) -> impl FnOnce(&mut Plan) {
    move |plan| {
        let ClassPlan { storage, slots, arena, .. } = &mut plan.class_plans[0];
        let is_forward = |register: &RegisterPlan| plan.segments.get(register.producer).name == "forward";
        let mut registers = storage.registers.iter().zip(&*slots);
        let stash = registers.position(|(register, slots)| is_forward(register) && slots.count > 1);
        let stash = stash.expect("forward has a stash");
        change(&mut slots[stash], &mut arena.registers[stash]);
    }
}

/// GPipe runs all forwards first, which a stash with one slot does not allow.
#[test]
fn a_register_with_too_few_slots_is_refused_with_the_deadlock_cycle() {
    let error = refused("tensor=2", Schedule::GPipe, change_stash(|slots, _| slots.count = 1));
    expect!["the plan cannot run to completion: deadlock: these actions wait in a cycle: device 0 compute forward waits for a credit of register 'device 0 forward/dropout.6 (+66)' (1 of 1 slots held by device 0 compute backward); device 0 compute backward waits for its turn after device 0 compute forward"].assert_eq(&error);
    let error = refused("tensor=2", Schedule::GPipe, change_stash(|slots, _| slots.count = 0));
    expect!["the plan cannot run to completion: register 'device 0 forward/dropout.6 (+66)': slots is 0, expected at least 1"].assert_eq(&error);
}

#[test]
fn a_different_action_order_on_one_device_is_refused_with_the_group() {
    let mut quotient = gpt("tensor=2", 4, Schedule::GPipe).quotient();
    let compute = quotient.spec.actors.values_mut().find(|a| (a.device, a.stream) == (1, StreamKind::Compute));
    let Some(Firing::Ordered(list)) = compute.map(|a| &mut a.firing) else { panic!("the actor must fire in order") };
    list.swap(3, 4);
    let error = check_quotient(&quotient).expect_err("the order differs").to_string();
    expect!["devices 0 and 1 call different collectives of group 0: forward forward forward forward backward backward backward backward versus forward forward forward backward forward backward backward backward"].assert_eq(&error);
}

#[test]
fn a_different_collective_on_one_device_is_refused_with_the_group() {
    let change = |plan: &mut Plan| {
        let launches = plan.class_plans[1].actions.iter_mut().flat_map(|action| &mut action.plan.launches);
        let sum = CollectiveKind::AllReduce { op: ReduceOp::Sum };
        let call = launches.filter_map(|l| if let Op::Collective(call) = &mut l.op { Some(call) } else { None });
        let call = call.into_iter().find(|c| c.kind == sum).expect("forward sums activations");
        call.kind = CollectiveKind::AllReduce { op: ReduceOp::Max };
    };
    let error = refused("tensor=2", Schedule::OneFOneB, change);
    expect!["devices 0 and 1 call different collectives of group 0: AllReduce { op: Sum } as call 0 of forward versus AllReduce { op: Max } as call 0 of forward"].assert_eq(&error);
}

#[test]
fn a_fetch_of_an_update_output_is_refused() {
    let fetch_an_update = |plan: &mut Plan| {
        let segments = &mut plan.segments;
        let named = |name: &str| segments.ids().find(|id| segments.get(*id).name == name).expect("segment exists");
        let (fetch, update) = (named("fetch (step)"), named("update"));
        segments.reads[fetch.0 as usize].insert(update);
    };
    let error = refused("stage=2", Schedule::OneFOneB, fetch_an_update);
    expect!["the plan cannot run to completion: fetch (step) waits for update, but the host starts update only after fetch (step) has ended"].assert_eq(&error);
}

#[test]
fn a_register_that_is_too_small_is_refused_with_the_buffer() {
    let error = refused("stage=2", Schedule::OneFOneB, change_stash(|_, place| place.stride -= 256));
    let expected = "device 0 forward: launch 27 (gelu): a buffer ends at byte 6912, but its memory has only 6656 bytes";
    assert_eq!(error, expected);
}

#[test]
fn overlapping_parts_of_an_arena_are_refused() {
    let error = refused("stage=2", Schedule::OneFOneB, change_stash(|slots, _| slots.count += 1));
    expect!["device 0: the register of dropout.6 ends at byte 42112, but the register of h.0.ln1.weight starts at byte 35200"].assert_eq(&error);
    let error = refused("stage=2", Schedule::OneFOneB, |plan| plan.class_plans[1].arena.memory.arena_bytes -= 64);
    let expected =
        "device 1: scratch of Compute ends at byte 37760, but the memory after the arena starts at byte 37696";
    assert_eq!(error, expected);
}

const FORWARD: u64 = 10;
const BACKWARD: u64 = 20;

/// Simulates a step in which only forward, backward and hops take time.
fn run(plan: &Plan, slots_max: u32, hop_ticks: u64, jitter: Option<Jitter>) -> SimulatedRun {
    let mut spec: Spec = plan.clone().instance().spec;
    spec.registers.values_mut().for_each(|r| r.slots = r.slots.min(slots_max));
    let ticks = |action: &ActionSpec| match action.label.role {
        Role::Forward => FORWARD,
        Role::Backward => BACKWARD,
        _ => 0,
    };
    let action_ticks = spec.actors.values().map(|actor| actor.actions.iter().map(ticks).collect()).collect();
    let options = SimulationOptions { jitter, ..SimulationOptions::steps(1) };
    simulate(&Arc::new(spec), &Timing { action_ticks, hop_ticks }, &options).unwrap_or_else(|e| panic!("{e}"))
}

/// The minimum for a synchronous pipeline without interleaving is `(micro-batches + stages - 1) (forward + backward)`.
#[test]
fn both_pipeline_schedules_take_the_minimum_time() {
    for schedule in SCHEDULES {
        for micro_batches in [4, 8] {
            let plan = gpt("stage=4", micro_batches, schedule);
            let free = run(&plan, u32::MAX, 0, None);
            assert_eq!(free.makespan, (micro_batches as u64 + 3) * (FORWARD + BACKWARD), "{schedule:?}");
            assert_eq!(run(&plan, u32::MAX, 0, None), free, "runs without jitter are deterministic");
        }
    }
    // Hop latency delays the filling and draining of the pipeline, and the host's decision, but not each micro-batch.
    let makespan = |schedule| run(&gpt("stage=4", 8, schedule), u32::MAX, 1, None).makespan;
    assert_eq!(SCHEDULES.map(makespan), [345, 345]);
}

#[test]
fn fewer_credits_take_more_time_and_give_the_same_result() {
    for schedule in SCHEDULES {
        let plan = gpt("stage=4", 8, schedule);
        let all = run(&plan, u32::MAX, 1, None);
        let mut last = all.makespan;
        for slots_max in (1..8).rev() {
            let fewer = run(&plan, slots_max, 1, None);
            assert_eq!(fewer.digest, all.digest, "{schedule:?}, {slots_max} slots");
            assert!(fewer.makespan >= last, "{schedule:?}, {slots_max} slots: {} ticks < {last}", fewer.makespan);
            last = fewer.makespan;
        }
        assert!(last > 2 * all.makespan, "{schedule:?}: stages overlap with one slot: {last} ticks");
    }
}

#[test]
fn delays_change_no_result() {
    for mesh in ["stage=4", "data=2,stage=2,tensor=2"] {
        let plan = gpt(mesh, 4, Schedule::OneFOneB);
        let exact = run(&plan, u32::MAX, 1, None);
        for seed in 0..20 {
            let jitter = Jitter { seed, action_ticks_max: 30, hop_ticks_max: 15 };
            let delayed = run(&plan, u32::MAX, 1, Some(jitter));
            assert_eq!(delayed.digest, exact.digest, "mesh {mesh}, seed {seed}");
        }
    }
}

/// The two layouts give the first device the same part, so the launches of the classes' first devices are equal.
#[test]
fn plans_that_differ_only_in_the_regions_of_other_devices_have_different_hashes() {
    let hash = |axis: &str| {
        let mut g = Graph::new(&Mesh::parse("data=2,tensor=2").expect("a mesh"));
        let x = g.input("x", &[4, 4], DType::F32, Layout::broadcast());
        let part = g.relayout(x, Layout::split(axis, 0));
        g.output("y", part);
        compile(g, &CompileOptions::default()).expect("a plan").hash()
    };
    assert_ne!(hash("data"), hash("tensor"));
    assert_eq!(hash("data"), hash("data"));
}
