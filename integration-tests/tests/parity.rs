//! Every mesh, schedule and number of micro-batches trains the same model. Pipelines match one device bit for bit, and
//! other layouts match it within a tolerance. All layouts match the float64 reference.

use std::collections::BTreeMap;

use shardflow::passes::CompileOptions;
use shardflow::plan::Schedule::{GPipe, OneFOneB};
use shardflow_integration_tests::reference;
use shardflow_integration_tests::training::{
    Model, ONE, Scratch, TEXT, TrainingResult, options, relative, vocabulary, within,
};

const STEPS: usize = 20;
/// Largest relative difference of losses between layouts, at the first step and at later steps.
const FIRST_MAX: f64 = 1e-5;
const LATER_MAX: f64 = 1e-3;
const SECONDS_MAX: u64 = 300;

/// Checks that losses and gradient norms differ by no more than the tolerance.
fn assert_close(case: &str, got: &TrainingResult, want: &TrainingResult) {
    assert_eq!(got.losses.len(), want.losses.len(), "{case}");
    for (step, (got, want)) in got.losses.iter().zip(&want.losses).enumerate() {
        let limit = if step == 0 { FIRST_MAX } else { LATER_MAX };
        let difference = relative(f64::from(*got), f64::from(*want));
        assert!(difference <= limit, "{case}, step {step}: loss {got}, expected {want}: {difference:e} > {limit:e}");
    }
    for (step, (got, want)) in got.norms.iter().zip(&want.norms).enumerate() {
        let limit = if step == 0 { 1e-4 } else { 1e-2 };
        let difference = relative(*got, *want);
        assert!(difference <= limit, "{case}, step {step}: norm {got}, expected {want}: {difference:e} > {limit:e}");
    }
}

fn assert_learns(case: &str, trained: &TrainingResult) {
    let (first, last) = (trained.losses[0], trained.losses[trained.losses.len() - 1]);
    assert!(last < first - 0.3, "{case}: the loss fell only from {first} to {last}");
}

/// Trains on each mesh and compares with one device.
fn check_meshes(model: Model, meshes: &'static [&'static str], micro_batches: usize) {
    within(SECONDS_MAX, move || {
        let one = model.train(ONE, &options(micro_batches, OneFOneB), STEPS);
        assert_learns("one device", &one);
        for mesh in meshes {
            let got = model.train(mesh, &options(micro_batches, OneFOneB), STEPS);
            assert_close(&format!("mesh {mesh}, {micro_batches} micro-batches"), &got, &one);
        }
    });
}

#[test]
fn pipelines_match_one_device_bit_for_bit() {
    within(SECONDS_MAX, || {
        let model = Model::default();
        for micro_batches in [1, 2, 4] {
            let one = model.train(ONE, &options(micro_batches, OneFOneB), STEPS);
            assert_learns("one device", &one);
            for mesh in ["stage=2", "stage=4"] {
                for schedule in [GPipe, OneFOneB] {
                    let got = model.train(mesh, &options(micro_batches, schedule), STEPS);
                    let case = format!("mesh {mesh}, {micro_batches} micro-batches, {schedule:?}");
                    assert!(got.bits() == one.bits(), "{case}: got {:?}, expected {:?}", got.losses, one.losses);
                }
            }
        }
    });
}

#[test]
fn meshes_agree_with_one_device() {
    for micro_batches in [1, 2, 4] {
        check_meshes(Model::default(), &["data=2", "tensor=2", "tensor=4", "data=2,stage=2,tensor=2"], micro_batches);
    }
}

/// The 4 heads and the 46 tokens of the vocabulary are split over 3 devices.
#[test]
fn heads_and_vocabulary_need_not_divide_evenly_over_tensor() {
    assert_ne!(vocabulary() % 3, 0);
    check_meshes(Model::default(), &["tensor=3"], 2);
}

#[test]
fn a_batch_need_not_divide_evenly_over_data() {
    check_meshes(Model { batch: 10, ..Model::default() }, &["data=3", "data=3,tensor=2"], 2);
}

/// A micro-batch of one sample is split over three devices.
#[test]
fn devices_may_have_no_samples() {
    check_meshes(Model { batch: 2, ..Model::default() }, &["data=3", "data=3,stage=2", "data=3,stage=4"], 2);
}

#[test]
fn micro_batches_agree_with_one_batch() {
    within(SECONDS_MAX, || {
        let model = Model::default();
        let whole = model.train(ONE, &options(1, OneFOneB), STEPS);
        for micro_batches in [2, 4, 12] {
            let got = model.train(ONE, &options(micro_batches, OneFOneB), STEPS);
            assert_close(&format!("{micro_batches} micro-batches"), &got, &whole);
        }
    });
}

/// A dropout mask depends only on the element's position in the whole batch.
#[test]
fn dropout_is_the_same_for_every_mesh_and_number_of_micro_batches() {
    within(SECONDS_MAX, || {
        let model = Model { dropout: 0.2, ..Model::default() };
        let one = model.train(ONE, &options(1, OneFOneB), STEPS);
        assert_learns("with dropout", &one);
        let without = Model::default().train(ONE, &options(1, OneFOneB), 1);
        assert!(relative(one.losses[0].into(), without.losses[0].into()) > 1e-4, "dropout has no effect");
        let cases = [
            (ONE, 2),
            (ONE, 4),
            ("data=2", 1),
            ("data=3", 2),
            ("tensor=2", 1),
            ("tensor=3", 4),
            ("stage=4", 4),
            ("data=2,stage=2,tensor=2", 2),
        ];
        for (mesh, micro_batches) in cases {
            let got = model.train(mesh, &options(micro_batches, OneFOneB), STEPS);
            assert_close(&format!("mesh {mesh:?}, {micro_batches} micro-batches"), &got, &one);
        }
    });
}

#[test]
fn clipping_is_the_same_on_every_mesh() {
    within(SECONDS_MAX, || {
        let model = Model { max_norm: 0.1, ..Model::default() };
        let one = model.train(ONE, &options(2, OneFOneB), STEPS);
        assert!(one.norms.iter().all(|n| *n > 0.1), "nothing is clipped: {:?}", one.norms);
        let unclipped = Model::default().train(ONE, &options(2, OneFOneB), STEPS);
        assert!(one.parameters != unclipped.parameters, "clipping has no effect");
        let pipeline = model.train("stage=2", &options(2, OneFOneB), STEPS);
        assert!(pipeline.bits() == one.bits(), "got {:?}, expected {:?}", pipeline.losses, one.losses);
        for mesh in ["data=2", "tensor=3", "data=2,stage=2,tensor=2"] {
            assert_close(&format!("mesh {mesh}"), &model.train(mesh, &options(2, OneFOneB), STEPS), &one);
        }
    });
}

/// f32 losses differ from float64 losses only by rounding: up to 1e-5 at first, and up to 1e-3 after 20 steps.
#[test]
fn training_matches_the_float64_reference() {
    within(SECONDS_MAX, || {
        for max_norm in [f32::INFINITY, 0.1] {
            let model = Model { max_norm, ..Model::default() };
            let want = reference::train(&model.reference(), TEXT.as_bytes(), STEPS);
            for (mesh, micro_batches) in [(ONE, 1), ("data=2,stage=2,tensor=2", 2)] {
                let got = model.train(mesh, &options(micro_batches, OneFOneB), STEPS);
                for (step, (got, want)) in got.losses.iter().zip(&want).enumerate() {
                    let limit = if step == 0 { FIRST_MAX } else { LATER_MAX };
                    let difference = relative(f64::from(*got), *want);
                    assert!(difference <= limit, "mesh {mesh:?}, step {step}: {got}, expected {want}: {difference:e}");
                }
            }
        }
    });
}

/// Compares the gradient of every parameter. After a step, the gradient is ten times AdamW's first moment (beta 0.9).
#[test]
fn gradients_match_the_float64_reference() {
    within(SECONDS_MAX, || {
        let model = Model::default();
        let (_, want) = reference::first_step(&model.reference(), TEXT.as_bytes());
        let norm = want.values().flatten().map(|g| g * g).sum::<f64>().sqrt();
        for (mesh, micro_batches) in
            [(ONE, 1), (ONE, 4), ("data=3", 2), ("tensor=3", 2), ("data=2,stage=2,tensor=2", 2)]
        {
            let (got, reported) = first_gradients(&model, mesh, &options(micro_batches, OneFOneB));
            assert!(relative(reported, norm) < 1e-5, "mesh {mesh:?}: norm {reported}, expected {norm}");
            assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
            for (name, want) in &want {
                let size = want.iter().map(|g| g * g).sum::<f64>().sqrt();
                let difference = got[name].iter().zip(want).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
                assert!(
                    difference < 2e-5 * size,
                    "mesh {mesh:?}, {name}: gradients of size {size:e} differ by {difference:e}"
                );
            }
        }
    });
}

/// Returns the gradients of the first step by parameter, and the norm that the step reports.
fn first_gradients(model: &Model, mesh: &str, options: &CompileOptions) -> (BTreeMap<String, Vec<f64>>, f64) {
    let mut session = model.session(mesh, options);
    let report = model.step(&mut session);
    let folder = Scratch::new(&format!("gradients-{}-{}", mesh.replace(['=', ','], "-"), options.micro_batches));
    let path = folder.path().join("first.safetensors");
    session.save(&path).expect("saved");
    let bytes = std::fs::read(&path).expect("a saved file");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a complete file");
    let mut gradients = BTreeMap::new();
    for (name, view) in file.tensors() {
        let Some(name) = name.strip_prefix("adamw.m/") else { continue };
        let values = view.data().chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]));
        gradients.insert(name.to_string(), values.map(|m| f64::from(m) / f64::from(1.0 - 0.9f32)).collect());
    }
    (gradients, report.grad_norm.expect("a gradient norm"))
}
