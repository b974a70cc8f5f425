//! In evaluation, dropout is the identity and costs nothing, and no weight changes. If a program has dropout but no
//! mode, the error names the line of the dropout.

use shardflow::prelude::*;
use shardflow_integration_tests::training::{Model, ONE, bits, within};
use shardflow_kernels::op::Op;

fn options(micro_batches: usize, mode: Option<Mode>) -> CompileOptions {
    CompileOptions { micro_batches, mode, ..CompileOptions::default() }
}

const EVALUATION: Option<Mode> = Some(Mode::Evaluation);

/// Returns a program in which `x [4, 6, 8]` passes three dropouts. The last dropout is just before an output.
fn forward(mesh: &str, p: Option<f32>) -> Graph {
    forward_to(mesh, p).0
}

/// Returns the same program together with the output tensor of its last dropout.
fn forward_to(mesh: &str, p: Option<f32>) -> (Graph, Var) {
    let mut g = Graph::new(&Mesh::parse(mesh).expect("a mesh"));
    let staged = g.mesh().axis("stage").is_ok();
    let place = |g: &mut Graph, stage| {
        if staged {
            g.place_at("stage", stage)
        }
    };
    place(&mut g, 0);
    let layout = nn::batch_layout(&g);
    let x = g.input("x", &[4, 6, 8], DType::F32, layout);
    let dropped = p.map_or(x, |p| g.dropout(x, p, 1));
    let h = nn::linear(&mut g, "up", dropped, 8, Parallel::Replicated);
    let h = g.gelu(h);
    place(&mut g, 1);
    let h = p.map_or(h, |p| g.dropout(h, p, 2));
    let h = p.map_or(h, |p| g.dropout(h, p, 3));
    let y = nn::linear(&mut g, "down", h, 8, Parallel::Replicated);
    g.output("y", y);
    g.output("h", h);
    (g, h)
}

fn step(plan: Plan) -> StepReport {
    let x = HostTensor::f32(&[4, 6, 8], (0..192).map(|i| (i as f32 * 0.7).sin()).collect());
    let mut session = Session::start(plan, &SessionOptions::default()).expect("starts");
    session.step(&[("x", x)], 0.0).expect("a step")
}

fn launches(plan: &Plan) -> Vec<String> {
    let actions = plan.clone().instance().actions;
    actions.values().flatten().flat_map(|action| &action.launches).map(|launch| launch.op.name().to_owned()).collect()
}

fn has_dropout(plan: &Plan) -> bool {
    let is_dropout = |launch: &shardflow_kernels::op::Launch| matches!(launch.op, Op::Dropout { .. });
    plan.clone().instance().actions.values().flatten().flat_map(|action| &action.launches).any(is_dropout)
}

#[test]
fn dropout_is_the_identity_and_costs_nothing() {
    within(60, || {
        for (mesh, micro_batches) in [(ONE, 1), (ONE, 2), ("data=2", 2), ("stage=2", 2), ("data=2,stage=2", 4)] {
            let case = format!("mesh {mesh}, {micro_batches} micro-batches");
            let compiled = |p, mode| compile(forward(mesh, p), &options(micro_batches, mode)).expect("a plan");
            let (without, plan) = (compiled(None, None), compiled(Some(0.5), EVALUATION));
            assert_eq!(launches(&plan), launches(&without), "{case}");
            let bytes = |plan: &Plan| plan.memories().map(|m| m.total_bytes()).collect::<Vec<_>>();
            assert_eq!(bytes(&plan), bytes(&without), "{case}");
            assert!(!plan.graph.nodes().iter().any(|node| node.name == "rng"), "{case}: a random input remains");
            let training = compiled(Some(0.5), Some(Mode::Training));
            assert!(has_dropout(&training), "{case}");
            let (got, want) = (step(plan).outputs, step(without).outputs);
            assert!(bits(&got) == bits(&want), "{case}");
            assert!(bits(&step(training).outputs) != bits(&want), "{case}: training has no dropout");
        }
    });
}

/// Dropout may be the only op on the path from an input or parameter to an output.
#[test]
fn a_tensor_with_only_dropout_is_returned_unchanged() {
    within(60, || {
        let mut g = Graph::new(&Mesh::parse("data=2").expect("a mesh"));
        let x = g.input("x", &[4, 2], DType::F32, Layout::split("data", 0));
        let w = g.parameter("w", &[3], Init::Ones, Layout::broadcast());
        let (x, w) = (g.dropout(x, 0.9, 1), g.dropout(w, 0.9, 2));
        g.output("x", x);
        g.output("w", w);
        let mut session =
            Session::start(compile(g, &options(2, EVALUATION)).expect("a plan"), &SessionOptions::default())
                .expect("starts");
        let x = HostTensor::f32(&[4, 2], (0..8).map(|i| i as f32).collect());
        let outputs = session.step(&[("x", x.clone())], 0.0).expect("a step").outputs;
        assert_eq!((&outputs["x"], &outputs["w"]), (&x, &HostTensor::f32(&[3], vec![1.0; 3])));
    });
}

#[test]
fn a_program_without_a_mode_is_refused() {
    let error = compile(forward(ONE, Some(0.5)), &options(1, None)).map(drop).expect_err("an unknown mode");
    let CompileError::Graph(errors) = &error else { panic!("{error}") };
    assert_eq!(errors.len(), 1, "{error}");
    let line =
        include_str!("evaluation.rs").lines().position(|line| line.contains("g.dropout(x, p, 1)")).expect("the line")
            + 1;
    let text = error.to_string();
    for want in ["dropout: ", "minimises nothing", "Mode::Evaluation", &format!("evaluation.rs:{line}")] {
        assert!(text.contains(want), "{want:?} is not in: {text}");
    }
    // Two kinds of programs need no mode: those without dropout, and those that minimise a loss.
    compile(forward(ONE, None), &options(1, None)).expect("a plan");
    assert!(has_dropout(&Model { dropout: 0.1, ..Model::default() }.plan(ONE, &options(1, None))));
}

/// A training program that is compiled for evaluation gives the loss of the model without dropout, and its weights do
/// not change.
#[test]
fn evaluation_of_a_training_program_trains_nothing() {
    within(60, || {
        let (model, without) = (Model { dropout: 0.3, ..Model::default() }, Model::default());
        for (mesh, micro_batches) in [(ONE, 1), ("data=2", 3), ("stage=2", 4), ("data=2,stage=2,tensor=2", 2)] {
            let mut session = model.session(mesh, &options(micro_batches, EVALUATION));
            let mut training = without.session(mesh, &options(micro_batches, None));
            let before = session.parameters().expect("parameters");
            let (report, want) = (model.step(&mut session), without.step(&mut training));
            let (loss, want) = (report.loss.expect("a loss"), want.loss.expect("a loss"));
            assert!((loss - want).abs() < 1e-5 * want, "{mesh}: got {loss}, expected {want}");
            assert_eq!((report.grad_norm, session.updates()), (None, 0), "{mesh}");
            assert!(bits(&session.parameters().expect("parameters")) == bits(&before), "{mesh}: the weights changed");
            let bytes = |session: &Session| session.plan().memories().map(|m| m.total_bytes()).sum::<usize>();
            assert!(bytes(&session) < bytes(&training), "{mesh}: evaluation needs no less memory than training");
        }
    });
}

/// A copy of a program gives the same results in evaluation. The same holds for a copy with an additional output, even
/// if the tensors of this copy have other indices in their graph.
#[test]
fn copies_of_a_program_can_be_evaluated() {
    within(60, || {
        for (mesh, micro_batches) in [(ONE, 1), ("data=2", 2), ("data=2,stage=2", 2)] {
            for precision in [Precision::F32, Precision::BF16] {
                let evaluated = |g: Graph| {
                    let options = CompileOptions { precision, ..options(micro_batches, EVALUATION) };
                    step(compile(g, &options).unwrap_or_else(|e| panic!("{mesh}: {e}"))).outputs
                };
                let extended = |p| {
                    let (g, h) = forward_to(mesh, p);
                    let mut g = g.clone();
                    let z = nn::linear(&mut g, "more", h, 5, Parallel::Replicated);
                    let z = g.gelu(z);
                    g.output("z", z);
                    g
                };
                let want = evaluated(extended(None));
                let g = extended(Some(0.5));
                assert!(bits(&evaluated(g.clone())) == bits(&want), "{mesh}: a copy differs");
                assert!(bits(&evaluated(g)) == bits(&want), "{mesh}: an extended copy differs");
            }
        }
    });
}
