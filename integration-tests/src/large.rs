//! Checks gradients whose squares overflow f32, on any kind of device. The norm is finite, clipping works, and a step
//! skips an update that would make a parameter or a moment infinite.

use shardflow::graph::optimizer::Overflow;
use shardflow::graph::{AdamW, Graph};
use shardflow::nn::{self, Parallel};
use shardflow::passes::{CompileOptions, compile};
use shardflow::placement::Mesh;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::session::numerics::OnNonFinite;
use shardflow::session::{Session, SessionError, SessionOptions, StepReport};
use shardflow_kernels::device::DeviceKind;
use shardflow_kernels::tensor::{DType, HostTensor};

use crate::training::{LEARNING_RATE, Scratch, bits, options, relative};

/// 2^80, about 1.2e24. This factor scales gradients of about 0.01 exactly. The squares of the results overflow f32.
const LARGE: f32 = 1_208_925_819_614_629_174_706_176.0;

/// Maximum norm for clipping. It is below the norm of the unscaled gradients.
const MAX_NORM: f32 = 1e-3;

const BATCH: usize = 8;
const LENGTH: usize = 3;
const TOKENS: usize = 5;
const WIDTH: usize = 6;

/// Starts a model of two layers, on two stages if the mesh has stages. `factor` scales its loss.
fn start(device: DeviceKind, mesh: &str, factor: f32, max_norm: f32, on_non_finite: OnNonFinite) -> Session {
    let mut g = Graph::new(&Mesh::parse(mesh).expect("a mesh"));
    let staged = g.mesh().axis("stage").is_ok();
    let layout = nn::batch_layout(&g);
    if staged {
        g.place_at("stage", 0);
    }
    let ids = g.input("ids", &[BATCH, LENGTH], DType::I32, layout.clone());
    let x = nn::embedding(&mut g, "table", ids, TOKENS, WIDTH, Parallel::Replicated);
    if staged {
        g.place_at("stage", 1);
    }
    let logits = nn::linear(&mut g, "last", x, TOKENS, Parallel::Replicated);
    let targets = g.input("targets", &[BATCH, LENGTH], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    let loss = g.scale(loss, factor);
    g.minimize(loss, AdamW { max_norm, ..AdamW::default() });
    let plan = compile(g, &CompileOptions { device, ..options(2, OneFOneB) }).unwrap_or_else(|e| panic!("{mesh}: {e}"));
    let options = SessionOptions { on_non_finite, ..SessionOptions::default() };
    Session::start(plan, &options).unwrap_or_else(|e| panic!("{mesh}: {e}"))
}

fn step(session: &mut Session, learning_rate: f32) -> Result<StepReport, SessionError> {
    let tokens =
        |by: i32| HostTensor::i32(&[BATCH, LENGTH], (0..(BATCH * LENGTH) as i32).map(|i| i * by % 5).collect());
    session.step(&[("ids", tokens(1)), ("targets", tokens(2))], learning_rate)
}

/// Returns parameters and moments as the bytes of a file.
fn state(session: &Session) -> Vec<u8> {
    let folder = Scratch::new(&format!("large-{:?}", std::thread::current().id()));
    let path = folder.path().join("state");
    session.save(&path).expect("a place to write");
    std::fs::read(&path).expect("a written file")
}

/// Runs all checks on devices of this kind.
///
/// # Panics
/// If a check fails.
pub fn check(device: DeviceKind) {
    for mesh in ["data=1", "data=2", "stage=2"] {
        large_gradients_are_clipped_like_small_ones(device, mesh);
        an_update_that_would_overflow_is_skipped(device, mesh);
    }
}

fn large_gradients_are_clipped_like_small_ones(device: DeviceKind, mesh: &str) {
    let train = |factor: f32| {
        let mut session = start(device, mesh, factor, MAX_NORM, OnNonFinite::Stop);
        let norms: Vec<f64> = (0..3)
            .map(|at| {
                let report = step(&mut session, LEARNING_RATE).unwrap_or_else(|e| panic!("{mesh}, step {at}: {e}"));
                report.grad_norm.expect("there are gradients") / f64::from(factor)
            })
            .collect();
        (norms, session.parameters().expect("parameters"))
    };
    let (norms, parameters) = train(1.0);
    let (large_norms, large_parameters) = train(LARGE);
    for (norm, large) in norms.iter().zip(&large_norms) {
        assert!(*norm > 2e-3 && relative(*norm, *large) < 1e-5, "{mesh}: got {large_norms:?}, expected {norms:?}");
    }
    for (name, tensor) in &parameters {
        let (values, large) = (tensor.as_f32().expect("floats"), large_parameters[name].as_f32().expect("floats"));
        let close = values.iter().zip(large).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(close, "{mesh}, {name}: got {large:?}, expected {values:?}");
    }
}

fn an_update_that_would_overflow_is_skipped(device: DeviceKind, mesh: &str) {
    for (factor, learning_rate, kind, overflow_in) in [
        (LARGE, LEARNING_RATE, Overflow::SecondMoment, "a second moment"),
        (1.0, f32::MAX, Overflow::Parameter, "a parameter"),
    ] {
        let mut session = start(device, mesh, factor, f32::INFINITY, OnNonFinite::Stop);
        let before = state(&session);
        let Err(SessionError::NonFinite(found)) = step(&mut session, learning_rate) else {
            panic!("{mesh}: {overflow_in} did not overflow")
        };
        assert_eq!((found.overflow, &found.first), (Some(kind), &None), "{mesh}");
        assert!(found.loss.is_some_and(f32::is_finite) && found.grad_norm.is_some_and(f64::is_finite), "{found:?}");
        let (text, by_rate) = (found.to_string(), overflow_in == "a parameter");
        let advice = if by_rate { "lower the learning rate" } else { "clip the gradients to a smaller norm" };
        assert!(text.ends_with(&format!("could make {overflow_in} overflow f32: {advice}")), "{mesh}: {text}");
        assert!(state(&session) == before, "{mesh}: a skipped update changed the state (overflow in {overflow_in})");
    }
    // The gradients are large, but the updated values are finite, so the step succeeds.
    let mut session = start(device, mesh, 1e18, f32::INFINITY, OnNonFinite::Skip { in_a_row_max: 1 });
    let before = session.parameters().expect("parameters");
    assert_eq!(step(&mut session, LEARNING_RATE).expect("a good step").non_finite, None);
    let after = session.parameters().expect("parameters");
    assert!(bits(&after) != bits(&before), "{mesh}: nothing was updated");
    let floats = after.values().flat_map(|tensor| tensor.as_f32().expect("floats"));
    assert!(floats.copied().all(f32::is_finite), "{mesh}: {after:?}");
}
