//! Evaluation: dropout is the identity and takes nothing, and nothing is trained. A program whose mode is not known is
//! refused with the line of its dropout.

use shardflow::prelude::*;
use shardflow_integration_tests::training::{Model, ONE, bits, within};
use shardflow_kernels::op::Op;

fn options(micro_batches: usize, mode: Option<Mode>) -> CompileOptions {
    CompileOptions { micro_batches, mode, ..CompileOptions::default() }
}

const EVALUATION: Option<Mode> = Some(Mode::Evaluation);

/// Where `x [4, 6, 8]` goes through dropout twice, and once on its way out.
fn forward(mesh: &str, p: Option<f32>) -> Graph {
    forward_to(mesh, p).0
}

/// With the tensor that leaves the last dropout.
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

fn launches(plan: &Plan) -> Vec<&str> {
    plan.actions.iter().flatten().flat_map(|action| &action.launches).map(|launch| launch.op.name()).collect()
}

fn drops(plan: &Plan) -> bool {
    let is_dropout = |launch: &shardflow_kernels::op::Launch| matches!(launch.op, Op::Dropout { .. });
    plan.actions.iter().flatten().flat_map(|action| &action.launches).any(is_dropout)
}

#[test]
fn dropout_is_the_identity_and_takes_nothing() {
    within(60, || {
        for (mesh, micro_batches) in [(ONE, 1), (ONE, 2), ("data=2", 2), ("stage=2", 2), ("data=2,stage=2", 4)] {
            let what = format!("mesh {mesh}, {micro_batches} micro-batches");
            let compiled = |p, mode| compile(forward(mesh, p), &options(micro_batches, mode)).expect("a plan");
            let (without, plan) = (compiled(None, None), compiled(Some(0.5), EVALUATION));
            assert_eq!(launches(&plan), launches(&without), "{what}");
            let bytes = |plan: &Plan| plan.memory.iter().map(|m| m.total_bytes()).collect::<Vec<_>>();
            assert_eq!(bytes(&plan), bytes(&without), "{what}");
            assert!(!plan.graph.nodes().iter().any(|node| node.name == "rng"), "{what}: random numbers are fed");
            let training = compiled(Some(0.5), Some(Mode::Training));
            assert!(drops(&training), "{what}");
            let (got, want) = (step(plan).outputs, step(without).outputs);
            assert!(bits(&got) == bits(&want), "{what}");
            assert!(bits(&step(training).outputs) != bits(&want), "{what}: training drops nothing");
        }
    });
}

/// An output, a parameter and an input may be all that dropout stood between.
#[test]
fn what_only_went_through_dropout_comes_out() {
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
fn a_program_that_does_not_say_its_mode_is_refused() {
    let error = compile(forward(ONE, Some(0.5)), &options(1, None)).map(drop).expect_err("which mode?");
    let CompileError::Graph(errors) = &error else { panic!("{error}") };
    assert_eq!(errors.len(), 1, "{error}");
    let line =
        include_str!("evaluation.rs").lines().position(|line| line.contains("g.dropout(x, p, 1)")).expect("it is") + 1;
    let text = error.to_string();
    for want in ["dropout: ", "minimises nothing", "Mode::Evaluation", &format!("evaluation.rs:{line}")] {
        assert!(text.contains(want), "{want:?} is not in: {text}");
    }
    // A program without dropout needs no mode, nor does one that minimises a loss.
    compile(forward(ONE, None), &options(1, None)).expect("a plan");
    assert!(drops(&Model { dropout: 0.1, ..Model::default() }.plan(ONE, &options(1, None))));
}

/// The program that trains, compiled for evaluation: the loss of the model without dropout, and weights that stay.
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
            assert!((loss - want).abs() < 1e-5 * want, "{mesh}: {loss}, not {want}");
            assert_eq!((report.grad_norm, session.updates()), (None, 0), "{mesh}");
            assert!(bits(&session.parameters().expect("parameters")) == bits(&before), "{mesh}: something was trained");
            let bytes = |session: &Session| session.plan().memory.iter().map(|m| m.total_bytes()).sum::<usize>();
            assert!(bytes(&session) < bytes(&training), "{mesh}: memory for a training");
        }
    });
}

/// One program for both: a copy of it trains, and a copy of it that got an output more evaluates, whatever the copies' tensors
/// are numbered.
#[test]
fn copies_of_a_program_evaluate() {
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
                assert!(bits(&evaluated(g.clone())) == bits(&want), "{mesh}: of a copy");
                assert!(bits(&evaluated(g)) == bits(&want), "{mesh}: of an extended copy");
            }
        }
    });
}
