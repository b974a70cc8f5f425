//! If a kernel fails or panics on one device of any mesh, the step ends with the first cause, and nothing hangs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use shardflow::graph::builder::Layout;
use shardflow::graph::{AdamW, CustomOp, Graph, Var};
use shardflow::layout_error::LayoutError;
use shardflow::nn::{self, Parallel};
use shardflow::passes::compile;
use shardflow::placement::Mesh;
use shardflow::plan::Schedule::{self, GPipe, OneFOneB};
use shardflow::sbp::rule::Rule;
use shardflow::session::{Session, SessionError, SessionOptions};
use shardflow_actors::error::Failure;
use shardflow_integration_tests::training::{LEARNING_RATE, Model, ONE, options, vocabulary, within};
use shardflow_kernels::error::KernelError;
use shardflow_kernels::op::{CpuArgs, CpuSlice, CpuSliceMut, CustomKernel};
use shardflow_kernels::tensor::{DType, HostTensor, Region};

#[derive(Clone, Copy, Debug, PartialEq)]
enum FailureKind {
    Error,
    Panic,
}

/// An op that copies its input. One firing of one shard fails.
#[derive(Debug)]
struct Fragile {
    kind: FailureKind,
    /// The firing that fails, counted from 0 over the whole session.
    firing: usize,
    /// First row of the shard that fails.
    row: usize,
}

#[derive(Debug)]
struct FragileKernel {
    kind: FailureKind,
    fails_at: Option<usize>,
    fired: AtomicUsize,
}

impl CustomOp for Fragile {
    fn name(&self) -> &str {
        "fragile"
    }

    fn rule(&self) -> Result<Rule, LayoutError> {
        Rule::parse("btc->btc")
    }

    fn kernel(&self, inputs: &[Region], _: &[Region]) -> Arc<dyn CustomKernel> {
        let fails_at = (inputs[0].start[0] == self.row).then_some(self.firing);
        Arc::new(FragileKernel { kind: self.kind, fails_at, fired: AtomicUsize::new(0) })
    }

    fn backward(&self, _: &mut Graph, _: &[Var], _: &[Var], grads: &[Option<Var>]) -> Vec<Option<Var>> {
        grads.to_vec()
    }
}

impl CustomKernel for FragileKernel {
    fn name(&self) -> &str {
        "fragile"
    }

    fn run_cpu(&self, mut args: CpuArgs<'_>) -> Result<(), KernelError> {
        let firing = self.fired.fetch_add(1, Ordering::Relaxed);
        if self.fails_at == Some(firing) {
            match self.kind {
                FailureKind::Error => {
                    let message = format!("fails at firing {firing}");
                    return Err(KernelError::Custom { name: "fragile".into(), message });
                }
                FailureKind::Panic => panic!("panics at firing {firing}"),
            }
        }
        let (CpuSlice::F32(from), CpuSliceMut::F32(to)) = (&args.reads[0].data, &mut args.writes[0].data) else {
            return Err(KernelError::arguments("fragile", "element type", "floats", "integers"));
        };
        to.copy_from_slice(from);
        Ok(())
    }
}

const BATCH: usize = 8;
const MICRO_BATCHES: usize = 4;

/// Starts two linear layers with the fragile op between them, on two stages if the mesh has stages.
fn start(mesh: &str, schedule: Schedule, op: Fragile) -> Session {
    let mut g = Graph::new(&Mesh::parse(mesh).expect("a mesh"));
    let staged = g.mesh().axis("stage").is_ok();
    let layout: Layout = nn::batch_layout(&g);
    if staged {
        g.place_at("stage", 0);
    }
    let ids = g.input("ids", &[BATCH, 3], DType::I32, layout.clone());
    let x = nn::embedding(&mut g, "table", ids, 5, 4, Parallel::Replicated);
    let x = nn::linear(&mut g, "first", x, 6, Parallel::Replicated);
    if staged {
        g.place_at("stage", 1);
    }
    let x = g.custom(Arc::new(op), &[x])[0];
    let logits = nn::linear(&mut g, "last", x, 5, Parallel::Replicated);
    let targets = g.input("targets", &[BATCH, 3], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW { max_norm: 1.0, ..AdamW::default() });
    let plan = compile(g, &options(MICRO_BATCHES, schedule)).unwrap_or_else(|e| panic!("mesh {mesh}: {e}"));
    Session::start(plan, &SessionOptions::default()).unwrap_or_else(|e| panic!("mesh {mesh}: {e}"))
}

fn step(session: &mut Session) -> Result<(), SessionError> {
    let tokens = || HostTensor::i32(&[BATCH, 3], (0..BATCH as i32 * 3).map(|i| i % 5).collect());
    session.step(&[("ids", tokens()), ("targets", tokens())], LEARNING_RATE).map(drop)
}

fn failure(error: SessionError) -> Failure {
    match error {
        SessionError::Failed(failure) => failure,
        other => panic!("expected the actor's failure, got: {other}"),
    }
}

/// Checks the error if one of `devices` fails first. These devices hold row 0 of a micro-batch on the last stage.
fn check(mesh: &'static str, schedule: Schedule, devices: &'static [usize], kind: FailureKind) {
    within(60, move || {
        let op = Fragile { kind, firing: MICRO_BATCHES + 2, row: 0 };
        let mut session = start(mesh, schedule, op);
        step(&mut session).unwrap_or_else(|e| panic!("mesh {mesh}, first step: {e}"));
        let first = failure(step(&mut session).expect_err("the op fails in the second step"));
        let Failure::Kernel { actor, device, action, cause } = &first else { panic!("mesh {mesh}: {first}") };
        assert!(devices.contains(device), "mesh {mesh}: {first}");
        assert_eq!((actor.as_str(), action.as_str()), (&*format!("device {device} compute"), "forward"));
        let text = match (kind, cause.as_ref()) {
            (FailureKind::Error, KernelError::Custom { message, .. }) => message,
            (FailureKind::Panic, KernelError::Panic { message, .. }) => message,
            other => panic!("mesh {mesh}: {other:?}"),
        };
        assert!(text.ends_with("at firing 6"), "mesh {mesh}: {first}");
        assert_eq!(session.steps(), 1, "a failed step was counted");
        // Later calls report the same cause and do not wait.
        match step(&mut session) {
            Err(SessionError::Failed(again)) => assert_eq!(again, first),
            other => panic!("mesh {mesh}: {other:?}"),
        }
        // The parameters may be those of a half-finished step. The session does not return or save them.
        assert_eq!(failure(session.parameters().expect_err("the session has failed")), first, "mesh {mesh}");
        let path = std::env::temp_dir().join(format!("shardflow-failed-{}-{mesh}", std::process::id()));
        assert_eq!(failure(session.save(&path).expect_err("the session has failed")), first, "mesh {mesh}");
        assert!(!path.exists());
        let end = failure(session.shutdown().expect_err("the session has failed"));
        assert_eq!(end, first, "mesh {mesh}");
    });
}

const CASES: [(&str, &[usize]); 5] = [
    (ONE, &[0]),
    ("data=2", &[0]),
    ("stage=2", &[1]),
    ("data=2,stage=2", &[1]),
    // Both shards of the axis `tensor` run the op on the same rows.
    ("data=2,stage=2,tensor=2", &[2, 3]),
];

#[test]
fn an_error_on_one_device_ends_the_step_with_its_cause() {
    for (mesh, devices) in CASES {
        for schedule in [GPipe, OneFOneB] {
            check(mesh, schedule, devices, FailureKind::Error);
        }
    }
}

#[test]
fn a_panic_on_one_device_ends_the_step_with_its_cause() {
    for (mesh, devices) in CASES {
        check(mesh, OneFOneB, devices, FailureKind::Panic);
    }
}

#[test]
fn a_failed_session_can_be_dropped() {
    within(60, || {
        let mut session = start("data=2,stage=2", OneFOneB, Fragile { kind: FailureKind::Error, firing: 1, row: 1 });
        assert!(step(&mut session).is_err());
        drop(session);
    });
}

/// Dropping an idle session ends its threads.
#[test]
fn a_session_can_be_dropped_without_a_step() {
    within(60, || drop(start("data=2,stage=2", OneFOneB, Fragile { kind: FailureKind::Error, firing: 0, row: 0 })));
}

/// A shard of the embedding table cannot detect a bad token. The session therefore checks all tokens first.
#[test]
fn a_token_outside_the_vocabulary_is_named() {
    for mesh in [ONE, "data=2,stage=2,tensor=2"] {
        within(60, move || {
            let model = Model::default();
            let mut session = model.session(mesh, &options(2, OneFOneB));
            for (input, place) in [("ids", 0), ("targets", 1)] {
                for bad in [vocabulary() as i32, -1] {
                    let mut batch = model.batch(0);
                    let mut values = batch[place].1.as_i32().expect("ids are integers").to_vec();
                    values[model.context + 5] = bad;
                    batch[place].1 = HostTensor::i32(&[model.batch, model.context], values);
                    let text = session.step(&batch, LEARNING_RATE).expect_err("no such token").to_string();
                    let vocabulary = vocabulary();
                    let want = format!(
                        "input {input}: expected tokens of a vocabulary of {vocabulary}, got token {bad} at [1, 5]"
                    );
                    assert_eq!(text, want, "mesh {mesh}");
                }
            }
            assert_eq!(session.steps(), 0);
            model.step(&mut session);
        });
    }
}

/// If inputs do not match the program, nothing runs, and the session can continue.
#[test]
fn wrong_inputs_are_refused_before_anything_runs() {
    within(60, || {
        let model = Model::default();
        let mut session = model.session("data=2", &options(2, OneFOneB));
        let good = model.batch(0);
        let short = HostTensor::i32(&[2, 2], vec![0; 4]);
        let floats = HostTensor::f32(&[12, 16], vec![0.0; 192]);
        let cases: [(&[(&str, HostTensor)], &str); 4] = [
            (&good[..1], "input targets: expected I32 [12, 16], got nothing"),
            (&[good[0].clone(), ("targets", short)], "input targets: expected I32 [12, 16], got I32 [2, 2]"),
            (&[good[0].clone(), ("targets", floats)], "input targets: expected I32 [12, 16], got F32 [12, 16]"),
            (&[good[0].clone(), good[1].clone(), ("mask", good[0].1.clone())], "input mask: "),
        ];
        for (inputs, want) in cases {
            let text = session.step(inputs, LEARNING_RATE).expect_err("wrong inputs").to_string();
            assert!(text.starts_with(want), "{text}");
        }
        model.step(&mut session);
    });
}
