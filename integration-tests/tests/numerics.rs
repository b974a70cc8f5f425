//! A step with Inf or NaN changes no weight on any mesh. The report names the first non-finite tensor: an input, an op
//! in the forward or backward pass, or a parameter.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use shardflow::checkpoint::convert;
use shardflow::graph::Role;
use shardflow::prelude::*;
use shardflow::session::numerics::FirstNonFinite;
use shardflow_integration_tests::training::{LEARNING_RATE, Scratch, bits, options, within};

const BATCH: usize = 8;
const MICRO_BATCHES: usize = 4;
const LENGTH: usize = 3;
const TOKENS: usize = 5;
const WIDTH: usize = 6;

/// `(x, fault) -> (y)`: y is x, but NaN where `fault > 1/2`. The gradient is NaN where `fault < -1/2`.
#[derive(Debug)]
struct NanOp {
    backward: bool,
}

impl CustomOp for NanOp {
    fn name(&self) -> &str {
        if self.backward { "faulty_grad" } else { "faulty" }
    }

    fn rule(&self) -> Result<Rule, LayoutError> {
        Rule::parse("btc,btc->btc")
    }

    fn kernel(&self, _: &[Region], _: &[Region]) -> Arc<dyn CustomKernel> {
        Arc::new(Self { backward: self.backward })
    }

    fn backward(&self, g: &mut Graph, inputs: &[Var], _: &[Var], grads: &[Option<Var>]) -> Vec<Option<Var>> {
        let dx = grads[0].map(|dy| g.custom(Arc::new(NanOp { backward: true }), &[dy, inputs[1]])[0]);
        vec![dx, None]
    }
}

impl CustomKernel for NanOp {
    fn name(&self) -> &str {
        CustomOp::name(self)
    }

    fn run_cpu(&self, mut args: CpuArgs<'_>) -> Result<(), KernelError> {
        let ([x, fault], [y]) = (&args.reads[..], &mut args.writes[..]) else { panic!("two reads, one write") };
        let (CpuSlice::F32(x), CpuSlice::F32(fault), CpuSliceMut::F32(y)) = (&x.data, &fault.data, &mut y.data) else {
            panic!("floats");
        };
        let sign = if self.backward { -1.0 } else { 1.0 };
        for ((y, x), fault) in y.iter_mut().zip(*x).zip(*fault) {
            *y = if sign * fault <= 0.5 { *x } else { f32::NAN };
        }
        Ok(())
    }
}

/// Starts two linear layers with a [`NanOp`] between them, on two stages if the mesh has stages.
fn start(mesh: &str, max_norm: f32, on_non_finite: OnNonFinite) -> Session {
    let mut g = Graph::new(&Mesh::parse(mesh).expect("a mesh"));
    let staged = g.mesh().axis("stage").is_ok();
    let layout = nn::batch_layout(&g);
    if staged {
        g.place_at("stage", 0);
    }
    let ids = g.input("ids", &[BATCH, LENGTH], DType::I32, layout.clone());
    let x = nn::embedding(&mut g, "table", ids, TOKENS, WIDTH, Parallel::Replicated);
    let x = nn::linear(&mut g, "first", x, WIDTH, Parallel::Replicated);
    if staged {
        g.place_at("stage", 1);
    }
    let fault = g.input("fault", &[BATCH, LENGTH, WIDTH], DType::F32, layout.clone());
    let x = g.custom(Arc::new(NanOp { backward: false }), &[x, fault])[0];
    let logits = nn::linear(&mut g, "last", x, TOKENS, Parallel::Replicated);
    let targets = g.input("targets", &[BATCH, LENGTH], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW { max_norm, ..AdamW::default() });
    let plan = compile(g, &options(MICRO_BATCHES, Schedule::OneFOneB)).unwrap_or_else(|e| panic!("mesh {mesh}: {e}"));
    let options = SessionOptions { on_non_finite, ..SessionOptions::default() };
    Session::start(plan, &options).unwrap_or_else(|e| panic!("mesh {mesh}: {e}"))
}

/// Runs a step with this value of `fault` in one row of the batch.
fn step(session: &mut Session, row: usize, value: f32) -> Result<StepReport, SessionError> {
    let tokens = || HostTensor::i32(&[BATCH, LENGTH], (0..(BATCH * LENGTH) as i32).map(|i| i % 5).collect());
    let mut fault = vec![0.0; BATCH * LENGTH * WIDTH];
    fault[row * LENGTH * WIDTH..][..LENGTH * WIDTH].fill(value);
    let fault = HostTensor::f32(&[BATCH, LENGTH, WIDTH], fault);
    session.step(&[("ids", tokens()), ("targets", tokens()), ("fault", fault)], LEARNING_RATE)
}

fn first(error: Result<StepReport, SessionError>) -> FirstNonFinite {
    let Err(SessionError::NonFinite(found)) = error else { panic!("{error:?}") };
    found.first.unwrap_or_else(|| panic!("the report names no tensor"))
}

/// Returns the device that computes a row of the batch on the last stage.
fn device_of(mesh: &str, row: usize) -> usize {
    let data = row % 2;
    match mesh {
        "data=1" => 0,
        "data=2" => data,
        "stage=2" => 1,
        "data=2,stage=2" => 2 * data + 1,
        other => panic!("{other}"),
    }
}

const MESHES: [&str; 4] = ["data=1", "data=2", "stage=2", "data=2,stage=2"];

/// Returns the parameters after this number of finite steps.
fn undisturbed(mesh: &str, max_norm: f32, steps: usize) -> BTreeMap<String, HostTensor> {
    let mut session = start(mesh, max_norm, OnNonFinite::Stop);
    (0..steps).for_each(|_| drop(step(&mut session, 0, 0.0).expect("a finite step")));
    session.parameters().expect("parameters")
}

#[test]
fn a_step_that_is_not_finite_changes_nothing_and_names_the_first_tensor() {
    within(120, || {
        for (mesh, max_norm) in MESHES.iter().flat_map(|mesh| [(mesh, f32::INFINITY), (mesh, 1.0)]) {
            let expected = undisturbed(mesh, max_norm, 2);
            let mut session = start(mesh, max_norm, OnNonFinite::Stop);
            step(&mut session, 0, 0.0).expect("a finite step");
            for row in [0, 3, BATCH - 1] {
                for (value, tensor, op, role) in [
                    (f32::INFINITY, "fault", "input", Role::Forward),
                    (f32::NAN, "fault", "input", Role::Forward),
                    (1.0, "faulty", "custom kernel", Role::Forward),
                    (-1.0, "faulty_grad", "custom kernel", Role::Backward),
                ] {
                    let case = format!("{mesh}, clipped to {max_norm}, row {row}, {value}");
                    let error = step(&mut session, row, value);
                    assert!(error.as_ref().is_err_and(|e| e.exit() == Exit::Numerics), "{case}: {error:?}");
                    let found = first(error);
                    assert_eq!(found.tensor.split('.').next(), Some(tensor), "{case}: {found}");
                    assert_eq!((found.op.as_str(), found.role), (op, role), "{case}: {found}");
                    assert_eq!(found.micro_batch, Some(row / 2), "{case}: {found}");
                    assert_eq!(found.device, device_of(mesh, row), "{case}: {found}");
                    assert_eq!(found.elements, (LENGTH * WIDTH) as u64, "{case}: {found}");
                    assert!(found.location.starts_with("integration-tests/tests/numerics.rs:"), "{case}: {found}");
                }
            }
            assert_eq!(session.steps(), 1, "{mesh}");
            step(&mut session, 0, 0.0).expect("a finite step");
            let parameters = session.parameters().expect("parameters");
            assert!(bits(&parameters) == bits(&expected), "{mesh}, clipped to {max_norm}: the parameters changed");
        }
    });
}

#[test]
fn a_parameter_that_is_not_finite_is_named() {
    within(60, || {
        for mesh in MESHES {
            let mut session = start(mesh, f32::INFINITY, OnNonFinite::Stop);
            let mut parameters = session.parameters().expect("parameters");
            let (name, weight) = parameters.iter_mut().find(|(name, _)| name.starts_with("first")).expect("a layer");
            let HostData::F32(values) = &mut weight.data else { panic!("floats") };
            values[1] = f32::INFINITY;
            let name = name.clone();
            session.set_parameters(&parameters).expect("set");
            let found = first(step(&mut session, 0, 0.0));
            assert_eq!((found.tensor, found.op.as_str(), found.elements), (name, "parameter", 1), "{mesh}");
        }
    });
}

#[test]
fn non_finite_steps_are_skipped_up_to_a_limit() {
    within(60, || {
        let mut session = start("data=2", f32::INFINITY, OnNonFinite::Skip { in_a_row_max: 2 });
        for expected in [1, 2] {
            let report = step(&mut session, 5, 1.0).expect("a skipped step");
            let found = report.non_finite.expect("a report of the skipped step");
            assert_eq!((found.step + 1, session.steps()), (expected, expected));
            assert!(found.to_string().starts_with(&format!("step {expected} is not finite, loss NaN, ")), "{found}");
        }
        let report = step(&mut session, 0, 0.0).expect("a finite step");
        assert_eq!(report.non_finite, None);
        (0..2).for_each(|_| drop(step(&mut session, 5, 1.0).expect("a skipped step")));
        assert_eq!(first(step(&mut session, 5, 1.0)).micro_batch, Some(2));
        assert_eq!(session.steps(), 5);
    });
}

#[test]
fn a_nan_learning_rate_is_refused() {
    let mut session = start("data=1", f32::INFINITY, OnNonFinite::Stop);
    let error = session.step(&[], f32::NAN);
    assert!(matches!(&error, Err(SessionError::Input { .. })), "{error:?}");
    step(&mut session, 0, 0.0).expect("a finite step after the refusal");
}

/// Returns the parameters after one more finite step.
fn after_a_finite_step(mut session: Session) -> BTreeMap<String, HostTensor> {
    step(&mut session, 0, 0.0).expect("a finite step");
    session.parameters().expect("parameters")
}

/// Skipped steps do not advance AdamW's bias correction. The first update therefore has its full size on any mesh.
#[test]
fn skipped_steps_do_not_count_as_updates() {
    within(120, || {
        for (mesh, max_norm) in MESHES.iter().flat_map(|mesh| [(mesh, f32::INFINITY), (mesh, 1.0)]) {
            let mut session = start(mesh, max_norm, OnNonFinite::Skip { in_a_row_max: 10 });
            (0..10).for_each(|_| drop(step(&mut session, 5, 1.0).expect("skipped")));
            assert_eq!((session.steps(), session.updates()), (10, 0), "{mesh}");
            let trained = after_a_finite_step(session);
            assert!(bits(&trained) == bits(&undisturbed(mesh, max_norm, 1)), "{mesh}, norm <= {max_norm}: differs");
        }
    });
}

/// AdamW's first update moves each weight by the learning rate, for any gradient.
#[test]
fn the_first_update_after_skipped_steps_equals_the_learning_rate() {
    let mut g = Graph::new(&Mesh::parse("data=1").expect("a mesh"));
    let x = g.input("x", &[4, 2], DType::F32, Layout::broadcast());
    let w = g.parameter("w", &[3, 2], Init::Ones, Layout::broadcast());
    let y = g.einsum("bi,oi->bo", x, w);
    let targets = g.input("targets", &[4], DType::I32, Layout::broadcast());
    let loss = g.cross_entropy(y, targets);
    g.minimize(loss, AdamW { weight_decay: 0.0, betas: (0.9, 0.99), ..AdamW::default() });
    let on_non_finite = OnNonFinite::Skip { in_a_row_max: 10 };
    let options = SessionOptions { on_non_finite, ..SessionOptions::default() };
    let mut session =
        Session::start(compile(g, &CompileOptions::default()).expect("a plan"), &options).expect("starts");
    let mut step = |x: f32| {
        let x = HostTensor::f32(&[4, 2], vec![x; 8]);
        session.step(&[("x", x), ("targets", HostTensor::i32(&[4], vec![0, 0, 0, 1]))], 1e-2).expect("a step");
        session.parameters().expect("parameters")["w"].as_f32().expect("floats").to_vec()
    };
    (0..10).for_each(|_| assert_eq!(step(f32::NAN), [1.0; 6]));
    let moved = step(1.0);
    assert!(moved.iter().all(|w| ((w - 1.0).abs() - 1e-2).abs() < 1e-5), "{moved:?}");
}

/// A name, and a function that loads a saved state into a session.
type Loader<'a> = (&'a str, &'a dyn Fn(&mut Session));

/// A resume restores the number of updates from a file, from a checkpoint, and from an exported or resharded
/// checkpoint. This also holds if a session returns to an earlier step.
#[test]
fn the_number_of_updates_is_saved() {
    within(120, || {
        let start = || start("data=2", 1.0, OnNonFinite::Skip { in_a_row_max: 10 });
        let scratch = Scratch::new("updates");
        let path = |name: &str| scratch.path().join(name);
        let store = |name: &str| Store::open(path(name).to_str().expect("UTF-8")).expect("a folder");
        let mut session = start();
        (0..10).for_each(|row| drop(step(&mut session, 0, if row == 3 { 0.0 } else { 1.0 }).expect("a step")));
        assert_eq!((session.steps(), session.updates()), (10, 1));

        session.save(&path("file")).expect("saved");
        let (agree, member) = session.agreement().expect("room for snapshots");
        let options = SaverOptions { member, ..SaverOptions::default() };
        let mut saver = Saver::new(store("run"), agree, options).expect("a thread");
        saver.save(&session, Cursor::new()).expect("begun");
        saver.wait(Duration::from_secs(60)).expect("saved");
        let reader = store("run").read(10).expect("committed");
        convert::export(&reader, &path("exported")).expect("exported");
        convert::reshard(&reader, &store("resharded"), 3).expect("resharded");

        let expected = after_a_finite_step(session);
        assert!(bits(&expected) == bits(&undisturbed("data=2", 1.0, 2)));
        let loaders: [Loader<'_>; 5] = [
            ("file", &|s| drop(s.restore(&path("file")).expect("restored"))),
            ("export", &|s| drop(s.restore(&path("exported")).expect("restored"))),
            ("checkpoint", &|s| drop(s.restore_checkpoint(&reader).expect("restored"))),
            ("newest", &|s| drop(s.restore_newest(&store("run")).expect("restored"))),
            ("resharded", &|s| drop(s.restore_newest(&store("resharded")).expect("restored"))),
        ];
        for (name, load) in loaders {
            let mut fresh = start();
            load(&mut fresh);
            assert_eq!((fresh.steps(), fresh.updates()), (10, 1), "{name}");
            assert!(bits(&after_a_finite_step(fresh)) == bits(&expected), "{name}: the next update differs");
            // Return from a later step to the saved step.
            let mut later = start();
            (0..4).for_each(|_| drop(step(&mut later, 0, 0.0).expect("a finite step")));
            load(&mut later);
            assert!(
                bits(&after_a_finite_step(later)) == bits(&expected),
                "{name}, from a later step: the next update differs"
            );
        }
    });
}

#[test]
fn gradients_too_large_to_square_are_clipped_or_skipped() {
    within(120, || shardflow_integration_tests::large::check(DeviceKind::Cpu));
}
