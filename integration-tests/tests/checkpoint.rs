//! A checkpoint holds the whole training state for any mesh. A file that does not fit is refused and changes nothing.

use std::collections::HashMap;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::session::Session;
use shardflow_integration_tests::training::{Model, ONE, Scratch, bits, options, within};

fn model() -> Model {
    Model { dropout: 0.1, max_norm: 1.0, ..Model::default() }
}

fn session(mesh: &str) -> Session {
    model().session(mesh, &options(2, OneFOneB))
}

fn saved(session: &Session, path: &Path) -> Vec<u8> {
    session.save(path).unwrap_or_else(|e| panic!("{e}"));
    std::fs::read(path).expect("a saved file")
}

fn files(folder: &Path) -> usize {
    std::fs::read_dir(folder).expect("the folder is there").count()
}

/// The file holds parameters, moments and the number of steps, so equal files mean equal training states.
#[test]
fn a_training_moves_between_meshes_bit_for_bit() {
    within(60, || {
        let folder = Scratch::new("checkpoint-meshes");
        let path = folder.path().join("model.safetensors");
        let mut first = session("stage=2");
        (0..3).for_each(|_| drop(model().step(&mut first)));
        let original = saved(&first, &path);
        let tensors = SafeTensors::deserialize(&original).expect("a safetensors file");
        let parameters = first.parameters().expect("parameters");
        assert_eq!(tensors.len(), 3 * parameters.len(), "each parameter with its two moments");
        let is_zero = |name: &String| tensors.tensor(name).is_ok_and(|t| t.data().iter().all(|b| *b == 0));
        for name in parameters.keys() {
            assert!(!is_zero(&format!("adamw.m/{name}")) && !is_zero(&format!("adamw.v/{name}")), "{name}");
        }
        for mesh in ["tensor=2", "data=3", "data=2,stage=2,tensor=2", "tensor=3", ONE] {
            let mut next = session(mesh);
            next.restore(&path).unwrap_or_else(|e| panic!("mesh {mesh}: {e}"));
            assert_eq!(next.steps(), 3);
            assert!(bits(&next.parameters().expect("parameters")) == bits(&parameters), "mesh {mesh}: parameters");
            assert!(saved(&next, &path) == original, "mesh {mesh}: the files differ");
            next.shutdown().expect("a clean shutdown");
        }
        assert_eq!(files(folder.path()), 1, "files other than the checkpoint remain");
    });
}

#[test]
fn a_resumed_training_matches_an_uninterrupted_one_bit_for_bit() {
    within(60, || {
        let folder = Scratch::new("checkpoint-resume");
        for mesh in [ONE, "stage=2", "data=2,stage=2,tensor=2"] {
            let path = folder.path().join("model.safetensors");
            let mut whole = session(mesh);
            let mut losses: Vec<u32> = Vec::new();
            for step in 0..6 {
                if step == 3 {
                    whole.save(&path).expect("saved");
                }
                losses.extend(model().step(&mut whole).loss.map(f32::to_bits));
            }
            // Train a step before the restore. It changes all state, so the restore must replace all state.
            let mut resumed = session(mesh);
            model().step(&mut resumed);
            resumed.restore(&path).expect("the same model");
            let again: Vec<u32> = (3..6).filter_map(|_| model().step(&mut resumed).loss).map(f32::to_bits).collect();
            assert_eq!(again, losses[3..], "mesh {mesh}");
            let end = folder.path().join("end.safetensors");
            assert!(saved(&resumed, &end) == saved(&whole, &path), "mesh {mesh}: the files differ");
        }
    });
}

/// Restores a file that does not fit, and returns the error text.
fn refused(session: &mut Session, folder: &Path, path: &Path) -> String {
    let before = saved(session, &folder.join("before"));
    let error = session.restore(path).expect_err("the file does not fit").to_string();
    assert!(saved(session, &folder.join("after")) == before, "the failed restore changed the state: {error}");
    assert!(error.starts_with(&path.display().to_string()), "the error does not start with the path: {error}");
    error
}

#[test]
fn a_file_that_does_not_fit_is_refused_and_changes_nothing() {
    within(60, || {
        let scratch = Scratch::new("checkpoint-refused");
        let folder = scratch.path();
        let mut here = session("tensor=2");
        model().step(&mut here);
        let good = saved(&here, &folder.join("good"));
        // After another step, every tensor differs from the files.
        model().step(&mut here);
        let refused = |name: &str, here: &mut Session| refused(here, folder, &folder.join(name));

        // Only the last matrix has another shape, so every tensor before it fits.
        edited(&good, &folder.join("wide"), |name, shape| {
            if name == "wte.weight" { Some(vec![shape[1], shape[0]]) } else { Some(shape.to_vec()) }
        });
        let text = refused("wide", &mut here);
        assert!(text.contains("wte.weight") && text.contains("[46, 32]") && text.contains("[32, 46]"), "{text}");

        for missing in ["wte.weight", "adamw.v/wpe.weight"] {
            edited(&good, &folder.join("less"), |name, shape| (name != missing).then(|| shape.to_vec()));
            let text = refused("less", &mut here);
            assert!(text.contains(&format!("no tensor {missing};")), "{text}");
        }

        let small = Model { width: 16, ..model() }.session(ONE, &options(1, OneFOneB));
        small.save(&folder.join("small")).expect("saved");
        let text = refused("small", &mut here);
        assert!(text.contains("expected") && text.contains("sizes"), "{text}");

        std::fs::write(folder.join("half"), &good[..good.len() / 2]).expect("written");
        let text = refused("half", &mut here);
        assert!(text.contains("not a complete safetensors file"), "{text}");

        std::fs::write(folder.join("text"), "a text of some length that holds no tensors").expect("written");
        let text = refused("text", &mut here);
        assert!(text.contains("not a complete safetensors file"), "{text}");

        let text = refused("nowhere", &mut here);
        assert!(text.to_lowercase().contains("no such file"), "{text}");

        let good_again = folder.join("good");
        here.restore(&good_again).expect("the original file still fits");
        model().step(&mut here);
    });
}

/// Writes the tensors of `file` with the shapes that `edit` returns. Omits a tensor for which `edit` returns `None`.
fn edited(file: &[u8], path: &Path, edit: impl Fn(&str, &[usize]) -> Option<Vec<usize>>) {
    let (_, metadata) = SafeTensors::read_metadata(file).expect("a safetensors file");
    let metadata: Option<HashMap<String, String>> = metadata.metadata().clone();
    let tensors = SafeTensors::deserialize(file).expect("a safetensors file");
    let views = tensors.tensors().into_iter().filter_map(|(name, view)| {
        let shape = edit(&name, view.shape())?;
        Some((name, TensorView::new(view.dtype(), shape, view.data()).expect("the same number of elements")))
    });
    let bytes = safetensors::serialize(views.collect::<Vec<_>>(), metadata).expect("written");
    std::fs::write(path, bytes).expect("written");
}

#[test]
fn a_failed_save_leaves_no_file() {
    within(60, || {
        let scratch = Scratch::new("checkpoint-nowhere");
        let here = session(ONE);
        let path = scratch.path().join("missing/model.safetensors");
        let text = here.save(&path).expect_err("the folder is not there").to_string();
        assert!(text.starts_with(&path.display().to_string()), "{text}");
        // A folder blocks the file's path.
        let path = scratch.path().join("taken");
        std::fs::create_dir(&path).expect("created");
        assert!(here.save(&path).is_err());
        assert_eq!(files(scratch.path()), 1, "only the blocking folder");
    });
}
