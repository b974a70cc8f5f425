//! Training with activations and their gradients in bf16. On every mesh, losses are close to those in f32, the training
//! needs less memory, and every run has the same bits. Weights, their gradients and their moments are in f32.

use shardflow::graph::{NodeOp, Role};
use shardflow::passes::precision::Precision;
use shardflow::passes::{Boxing, CompileOptions};
use shardflow::plan::Plan;
use shardflow::plan::Schedule::{GPipe, OneFOneB};
use shardflow::prelude::{AdamW, Graph, Init, Layout, Mesh, Parallel, Session, SessionOptions, compile, nn};
use shardflow_integration_tests::training::{Model, ONE, Scratch, TrainingResult, options, relative, within};
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::{DType, HostTensor};

const STEPS: usize = 20;
const SECONDS_MAX: u64 = 300;
/// Largest relative difference from the f32 losses. Each activation has a relative rounding error of up to 2^-8, and
/// most of these errors cancel.
const LOSS_MAX: f64 = 4e-3;

fn bf16_options(micro_batches: usize) -> CompileOptions {
    CompileOptions { precision: Precision::BF16, ..options(micro_batches, OneFOneB) }
}

fn assert_close(case: &str, got: &TrainingResult, want: &TrainingResult) {
    for (step, (got, want)) in got.losses.iter().zip(&want.losses).enumerate() {
        let difference = relative(f64::from(*got), f64::from(*want));
        assert!(difference <= LOSS_MAX, "{case}: loss {got}, expected {want}, at step {step}: {difference:e}");
    }
    for (step, (got, want)) in got.norms.iter().zip(&want.norms).enumerate() {
        let difference = relative(*got, *want);
        assert!(difference <= 0.05, "{case}: norm {got}, expected {want}, at step {step}: {difference:e}");
    }
}

#[test]
fn losses_are_close_to_f32_on_every_mesh() {
    within(SECONDS_MAX, || {
        let model = Model { dropout: 0.1, max_norm: 1.0, ..Model::default() };
        let whole = model.train(ONE, &options(2, OneFOneB), STEPS);
        for mesh in [ONE, "data=3", "tensor=2", "stage=4", "data=2,stage=2,tensor=2"] {
            let got = model.train(mesh, &bf16_options(2), STEPS);
            assert_close(mesh, &got, &whole);
            assert!(got.losses[1..] != whole.losses[1..], "{mesh}: the losses equal those of f32");
            assert!(got.losses[STEPS - 1] < got.losses[0] - 0.3, "{mesh}: the loss does not fall: {:?}", got.losses);
        }
    });
}

#[test]
fn pipelines_and_repetitions_give_the_same_bits() {
    within(SECONDS_MAX, || {
        let model = Model::default();
        let one = model.train(ONE, &bf16_options(4), STEPS);
        for mesh in [ONE, "stage=2", "stage=4"] {
            for schedule in [GPipe, OneFOneB] {
                let got = model.train(mesh, &CompileOptions { schedule, ..bf16_options(4) }, STEPS);
                assert_eq!(got.losses, one.losses, "mesh {mesh}, {schedule:?}");
            }
        }
        let [a, b] = [(); 2].map(|()| model.train("data=2,tensor=2", &bf16_options(2), STEPS));
        assert_eq!((a.losses, a.norms), (b.losses, b.norms));
    });
}

/// Returns the bytes of all registers: stashed activations, stage transfers, and weights that other actions read.
fn register_bytes(plan: &Plan) -> u64 {
    plan.clone().instance().spec.registers.values().map(|r| u64::from(r.slots) * r.slot_bytes as u64).sum()
}

/// Returns the memory of all devices in bytes, without scratch memory.
fn bytes_without_scratch(plan: &Plan) -> usize {
    plan.memories().map(|memory| memory.fixed_bytes + memory.register_bytes).sum()
}

#[test]
fn activations_use_less_memory_and_the_update_is_in_f32() {
    let model = Model { width: 64, context: 64, ..Model::default() };
    for mesh in [ONE, "data=2,stage=2,tensor=2"] {
        let (whole, half) = (model.plan(mesh, &options(4, OneFOneB)), model.plan(mesh, &bf16_options(4)));
        let (before, after) = (register_bytes(&whole), register_bytes(&half));
        assert!(after * 4 < before * 3, "{mesh}: {after} bytes in bf16, {before} in f32");
        let (before, after) = (bytes_without_scratch(&whole), bytes_without_scratch(&half));
        assert!(after * 10 < before * 9, "{mesh}: {after} bytes in bf16, {before} in f32");
        let graph = &half.graph;
        let dtypes = |vars: &[shardflow::graph::Var]| vars.iter().map(|v| graph.tensor(*v).dtype).collect::<Vec<_>>();
        let (mut products, mut updates, mut casts) = (0, 0, 0);
        for node in graph.nodes() {
            match &node.op {
                NodeOp::Kernel(Op::Einsum(_)) => {
                    assert_eq!(dtypes(&node.inputs), [DType::BF16; 2], "{mesh}: {}", node.name);
                    products += 1;
                }
                NodeOp::Kernel(Op::AdamW { .. }) => {
                    let all = [&node.inputs[..], &node.updates].concat();
                    assert!(dtypes(&all).iter().all(|d| *d == DType::F32), "{mesh}: {}", node.name);
                    updates += 1;
                }
                NodeOp::Kernel(Op::Cast) => casts += 1,
                NodeOp::Accumulate | NodeOp::Bucket { .. } => {
                    assert!(dtypes(&node.inputs).iter().all(|d| *d == DType::F32), "{mesh}: {}", node.name);
                }
                _ => {}
            }
        }
        assert!(products > 0 && updates > 0 && casts > 0, "{products} products, {updates} updates, {casts} casts");
    }
}

/// The update casts each weight once per step, for any number of micro-batches.
#[test]
fn no_micro_batch_casts_a_weight() {
    for mesh in [ONE, "data=2,stage=2,tensor=2"] {
        let plan = Model::default().plan(mesh, &bf16_options(4));
        let (graph, parameters) = (&plan.graph, plan.graph.parameters());
        let (mut copies, mut casts) = (0, 0);
        for node in graph.nodes() {
            match &node.op {
                NodeOp::Bf16Copy { of } => {
                    assert!(parameters.contains(of), "{mesh}: {}", node.name);
                    copies += 1;
                }
                NodeOp::Kernel(Op::Cast) if parameters.contains(&node.inputs[0]) => {
                    assert_eq!(node.role, Role::Update, "{mesh}: {}", node.name);
                    casts += 1;
                }
                _ => {}
            }
        }
        assert!(copies > 0 && copies == casts, "{mesh}: {copies} copies, {casts} casts");
    }
}

/// Loading weights also updates the bf16 copies that matrix products read.
#[test]
fn loaded_weights_are_used_by_the_next_step() {
    within(SECONDS_MAX, || {
        let model = Model::default();
        for mesh in [ONE, "stage=2,tensor=2"] {
            let scratch = Scratch::new("precision-load");
            let file = scratch.path().join("model.safetensors");
            let mut trained = model.session(mesh, &bf16_options(2));
            (0..3).for_each(|_| drop(model.step(&mut trained)));
            trained.save(&file).expect("a file");
            let weights = trained.parameters().expect("between steps");
            let continue_training =
                |session: &mut Session| (0..3).map(|_| model.step(session).loss).collect::<Vec<_>>();
            let expected = continue_training(&mut trained);
            let mut other = model.session(mesh, &bf16_options(2));
            (0..5).for_each(|_| drop(model.step(&mut other)));
            other.restore(&file).expect("a good file");
            assert_eq!(continue_training(&mut other), expected, "{mesh}: weights from a file");
            let mut other = model.session(mesh, &bf16_options(2));
            other.set_parameters(&weights).expect("the same program");
            let loss = other.step(&model.batch(3), 1e-3).expect("a step").loss;
            assert_eq!(loss, expected[0], "{mesh}: weights from memory");
        }
    });
}

/// Sums over devices are in f32, so no collective has a bf16 operand. Transfers between stages are in bf16.
#[test]
fn collectives_move_f32_and_stages_bf16() {
    let plan =
        Model::default().plan("data=2,stage=2", &CompileOptions { boxing: Boxing::Automatic, ..bf16_options(2) });
    let (mut collectives, mut transfers) = (0, 0);
    for launch in plan.clone().instance().actions.values().flatten().flat_map(|action| &action.launches) {
        let has_bf16 = launch.reads.iter().chain(&launch.writes).any(|buffer| buffer.dtype == DType::BF16);
        match launch.op {
            Op::Collective(_) => {
                assert!(!has_bf16, "{launch:?}");
                collectives += 1;
            }
            Op::CopyRegion { .. } => transfers += usize::from(has_bf16),
            _ => {}
        }
    }
    assert!(collectives > 0 && transfers > 0, "{collectives} collectives, {transfers} transfers");
}

/// If data already exists when a step begins, it is transferred in f32, and the reader casts it. Examples are a float
/// input that is fed on the whole mesh, and a weight of a later stage that the first stage reads.
#[test]
fn transferred_inputs_and_weights_are_cast_by_their_reader() {
    let mut g = Graph::new(&Mesh::parse("stage=2").expect("a mesh"));
    let x = g.input("x", &[4, 1, 8], DType::F32, Layout::broadcast());
    g.place_at("stage", 0);
    let hidden = nn::linear(&mut g, "first", x, 8, Parallel::Replicated);
    g.place_at("stage", 1);
    let logits = nn::linear(&mut g, "last", hidden, 8, Parallel::Replicated);
    let targets = g.input("targets", &[4, 1], DType::I32, Layout::broadcast());
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());
    let plan = compile(g, &bf16_options(2)).unwrap_or_else(|error| panic!("{error}"));
    let mut session = Session::start(plan, &SessionOptions::default()).expect("a session");
    let batch = [
        ("x", HostTensor::f32(&[4, 1, 8], (0..32).map(|i| i as f32 / 16.0 - 1.0).collect())),
        ("targets", HostTensor::i32(&[4, 1], vec![0, 3, 5, 7])),
    ];
    let losses: Vec<f32> = (0..20).map(|_| session.step(&batch, 1e-2).expect("a step").loss.expect("a loss")).collect();
    assert!(losses[19] < losses[0] - 0.1, "{losses:?}");
}

/// The terms of an f32 sum are in f32. Examples are the gradient of a weight that is used twice, and a reduction over
/// devices.
#[test]
fn terms_of_sums_are_not_rounded() {
    let mut g = Graph::new(&Mesh::parse("data=2").expect("a mesh"));
    let x = g.input("x", &[4, 8], DType::F32, Layout::split("data", 0));
    let weight = g.parameter("weight", &[8, 8], Init::Normal { std: 0.1 }, Layout::broadcast());
    let hidden = g.einsum("bi,oi->bo", x, weight);
    let logits = g.einsum("bi,oi->bo", hidden, weight);
    let targets = g.input("targets", &[4], DType::I32, Layout::split("data", 0));
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());
    let plan = compile(g, &bf16_options(1)).unwrap_or_else(|error| panic!("{error}"));
    let graph = &plan.graph;
    let sums: Vec<_> = graph.nodes().iter().filter(|node| node.name == "grad_sum").collect();
    assert!(!sums.is_empty());
    for node in sums.iter().filter(|node| graph.shape(node.outputs[0]) == [8, 8]) {
        assert!(node.inputs.iter().all(|input| graph.tensor(*input).dtype == DType::F32), "{node:?}");
    }
}
