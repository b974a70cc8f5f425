//! Training with activations and gradients in bf16: near to f32 and to the float64 reference on every mesh, in less memory, the
//! same bits in every run, and weights, their gradients and moments in f32.

use shardflow::graph::NodeOp;
use shardflow::passes::precision::Precision;
use shardflow::passes::{Boxing, CompileOptions};
use shardflow::plan::Plan;
use shardflow::plan::Schedule::{GPipe, OneFOneB};
use shardflow_integration_tests::training::{Model, ONE, Trained, options, relative, within};
use shardflow_kernels::op::Op;
use shardflow_kernels::tensor::DType;

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

/// Bytes of all registers of a plan: activations that wait, what goes between stages, parameters.
fn register_bytes(plan: &Plan) -> u64 {
    plan.spec.registers.iter().map(|r| u64::from(r.slots) * r.slot_bytes as u64).sum()
}

#[test]
fn activations_take_less_memory_and_the_update_is_in_f32() {
    let model = Model { width: 64, context: 64, ..Model::default() };
    for mesh in [ONE, "data=2,stage=2,tensor=2"] {
        let (whole, half) = (model.plan(mesh, &options(4, OneFOneB)), model.plan(mesh, &halves(4)));
        let (before, after) = (register_bytes(&whole), register_bytes(&half));
        assert!(after * 10 < before * 7, "{mesh}: {after} bytes in bf16, {before} in f32");
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

/// Sums over devices are in f32: nothing that a collective reads is in bf16. Transfers between stages are.
#[test]
fn collectives_move_f32_and_stages_bf16() {
    let plan =
        Model::default().plan("data=2,stage=2,tensor=2", &CompileOptions { boxing: Boxing::Automatic, ..halves(2) });
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
