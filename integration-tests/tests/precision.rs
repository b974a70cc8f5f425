//! Training with activations and gradients in bf16: near to f32 on every mesh, in less memory, the same bits in every run, and
//! weights, their gradients and moments in f32.

use shardflow::graph::{NodeOp, Phase};
use shardflow::passes::precision::Precision;
use shardflow::passes::{Boxing, CompileOptions};
use shardflow::plan::Plan;
use shardflow::plan::Schedule::{GPipe, OneFOneB};
use shardflow::prelude::{AdamW, Graph, Init, Layout, Mesh, Parallel, Session, SessionOptions, compile, nn};
use shardflow_integration_tests::training::{Model, ONE, Scratch, Trained, options, relative, within};
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::{DType, HostTensor};

const STEPS: usize = 20;
const SECONDS_MAX: u64 = 300;
/// Relative difference of losses: a rounding of 2^-9 for each activation, most of which cancels.
const LOSS_MAX: f64 = 4e-3;

fn halves(micro_batches: usize) -> CompileOptions {
    CompileOptions { precision: Precision::BF16, ..options(micro_batches, OneFOneB) }
}

fn assert_near(what: &str, got: &Trained, want: &Trained) {
    for (step, (got, want)) in got.losses.iter().zip(&want.losses).enumerate() {
        let difference = relative(f64::from(*got), f64::from(*want));
        assert!(difference <= LOSS_MAX, "{what}: loss {got} against {want} at step {step}: {difference:e}");
    }
    for (step, (got, want)) in got.norms.iter().zip(&want.norms).enumerate() {
        let difference = relative(*got, *want);
        assert!(difference <= 0.05, "{what}: norm {got} against {want} at step {step}: {difference:e}");
    }
}

#[test]
fn losses_are_near_those_of_f32_on_every_mesh() {
    within(SECONDS_MAX, || {
        let model = Model { dropout: 0.1, max_norm: 1.0, ..Model::default() };
        let whole = model.train(ONE, &options(2, OneFOneB), STEPS);
        for mesh in [ONE, "data=3", "tensor=2", "stage=4", "data=2,stage=2,tensor=2"] {
            let got = model.train(mesh, &halves(2), STEPS);
            assert_near(mesh, &got, &whole);
            assert!(got.losses[1..] != whole.losses[1..], "{mesh}: these are the losses of f32");
            assert!(got.losses[STEPS - 1] < got.losses[0] - 0.3, "{mesh} learns nothing: {:?}", got.losses);
        }
    });
}

#[test]
fn pipelines_and_repetitions_give_the_same_bits() {
    within(SECONDS_MAX, || {
        let model = Model::default();
        let one = model.train(ONE, &halves(4), STEPS);
        for mesh in [ONE, "stage=2", "stage=4"] {
            for schedule in [GPipe, OneFOneB] {
                let got = model.train(mesh, &CompileOptions { schedule, ..halves(4) }, STEPS);
                assert_eq!(got.losses, one.losses, "{mesh} {schedule:?}");
            }
        }
        let [a, b] = [(); 2].map(|()| model.train("data=2,tensor=2", &halves(2), STEPS));
        assert_eq!((a.losses, a.norms), (b.losses, b.norms));
    });
}

/// Bytes of all registers of a plan: activations that wait, what goes between stages, weights that other actions read.
fn register_bytes(plan: &Plan) -> u64 {
    plan.spec.registers.iter().map(|r| u64::from(r.slots) * r.slot_bytes as u64).sum()
}

/// Bytes of all devices, but for the scratch of what runs.
fn kept_bytes(plan: &Plan) -> usize {
    plan.memory.iter().map(|memory| memory.fixed_bytes + memory.register_bytes).sum()
}

#[test]
fn activations_take_less_memory_and_the_update_is_in_f32() {
    let model = Model { width: 64, context: 64, ..Model::default() };
    for mesh in [ONE, "data=2,stage=2,tensor=2"] {
        let (whole, half) = (model.plan(mesh, &options(4, OneFOneB)), model.plan(mesh, &halves(4)));
        let (before, after) = (register_bytes(&whole), register_bytes(&half));
        assert!(after * 4 < before * 3, "{mesh}: {after} bytes in bf16, {before} in f32");
        let (before, after) = (kept_bytes(&whole), kept_bytes(&half));
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
        assert!(products > 0 && updates > 0 && casts > 0, "{mesh}: {products} {updates} {casts}");
    }
}

/// Weights that are read as they lie are cast once a step, by the update, however many micro-batches read them.
#[test]
fn no_micro_batch_casts_a_weight() {
    for mesh in [ONE, "data=2,stage=2,tensor=2"] {
        let plan = Model::default().plan(mesh, &halves(4));
        let (graph, parameters) = (&plan.graph, plan.graph.parameters());
        let (mut copies, mut casts) = (0, 0);
        for node in graph.nodes() {
            match &node.op {
                NodeOp::Bf16Copy { of } => {
                    assert!(parameters.contains(of), "{mesh}: {}", node.name);
                    copies += 1;
                }
                NodeOp::Kernel(Op::Cast) if parameters.contains(&node.inputs[0]) => {
                    assert_eq!(node.phase, Phase::Update, "{mesh}: {}", node.name);
                    casts += 1;
                }
                _ => {}
            }
        }
        assert!(copies > 0 && copies == casts, "{mesh}: {copies} copies, {casts} casts");
    }
}

/// Weights that come from outside are those that products read.
#[test]
fn loaded_weights_are_the_ones_that_are_used() {
    within(SECONDS_MAX, || {
        let model = Model::default();
        for mesh in [ONE, "stage=2,tensor=2"] {
            let scratch = Scratch::new("precision-load");
            let file = scratch.path().join("model.safetensors");
            let mut trained = model.session(mesh, &halves(2));
            (0..3).for_each(|_| drop(model.step(&mut trained)));
            trained.save(&file).expect("a file");
            let weights = trained.parameters().expect("between steps");
            let goes_on = |session: &mut Session| (0..3).map(|_| model.step(session).loss).collect::<Vec<_>>();
            let expected = goes_on(&mut trained);
            let mut other = model.session(mesh, &halves(2));
            (0..5).for_each(|_| drop(model.step(&mut other)));
            other.restore(&file).expect("a good file");
            assert_eq!(goes_on(&mut other), expected, "{mesh}: from a file");
            let mut other = model.session(mesh, &halves(2));
            other.set_parameters(&weights).expect("the same program");
            let loss = other.step(&model.batch(3), 1e-3).expect("a step").loss;
            assert_eq!(loss, expected[0], "{mesh}: from memory");
        }
    });
}

/// Sums over devices are in f32: nothing that a collective reads is in bf16. Transfers between stages are.
#[test]
fn collectives_move_f32_and_stages_bf16() {
    let plan = Model::default().plan("data=2,stage=2", &CompileOptions { boxing: Boxing::Automatic, ..halves(2) });
    let (mut collectives, mut transfers) = (0, 0);
    for launch in plan.actions.iter().flatten().flat_map(|action| &action.launches) {
        let has_half = launch.reads.iter().chain(&launch.writes).any(|buffer| buffer.dtype == DType::BF16);
        match launch.op {
            Op::Collective(_) => {
                assert!(!has_half, "{launch:?}");
                collectives += 1;
            }
            Op::CopyRegion { .. } => transfers += usize::from(has_half),
            _ => {}
        }
    }
    assert!(collectives > 0 && transfers > 0, "{collectives} collectives, {transfers} transfers");
}

/// What is there before anything runs is not made to wait for a cast: the float input of the whole mesh, and the weight of a
/// later stage, that a first stage fetches.
#[test]
fn inputs_and_weights_that_travel_are_cast_where_they_are_read() {
    let mut g = Graph::new(&Mesh::parse("stage=2").expect("a mesh"));
    let x = g.input("x", &[4, 1, 8], DType::F32, Layout::broadcast());
    g.place_at("stage", 0);
    let hidden = nn::linear(&mut g, "first", x, 8, Parallel::Replicated);
    g.place_at("stage", 1);
    let logits = nn::linear(&mut g, "last", hidden, 8, Parallel::Replicated);
    let targets = g.input("targets", &[4, 1], DType::I32, Layout::broadcast());
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());
    let plan = compile(g, &halves(2)).unwrap_or_else(|error| panic!("{error}"));
    let mut session = Session::start(plan, &SessionOptions::default()).expect("it starts");
    let batch = [
        ("x", HostTensor::f32(&[4, 1, 8], (0..32).map(|i| i as f32 / 16.0 - 1.0).collect())),
        ("targets", HostTensor::i32(&[4, 1], vec![0, 3, 5, 7])),
    ];
    let losses: Vec<f32> = (0..20).map(|_| session.step(&batch, 1e-2).expect("a step").loss.expect("a loss")).collect();
    assert!(losses[19] < losses[0] - 0.1, "{losses:?}");
}

/// The terms of a sum in f32 are in f32: those of a weight that is used twice, and of a reduction over devices.
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
    let plan = compile(g, &halves(1)).unwrap_or_else(|error| panic!("{error}"));
    let graph = &plan.graph;
    let sums: Vec<_> = graph.nodes().iter().filter(|node| node.name == "grad_sum").collect();
    assert!(!sums.is_empty());
    for node in sums.iter().filter(|node| graph.shape(node.outputs[0]) == [8, 8]) {
        assert!(node.inputs.iter().all(|input| graph.tensor(*input).dtype == DType::F32), "{node:?}");
    }
}
