//! A checkpoint is the whole training, whatever mesh wrote it; a file that does not fit is refused and changes nothing.

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
    std::fs::read(path).expect("was saved")
}

fn files(folder: &Path) -> usize {
    std::fs::read_dir(folder).expect("the folder is there").count()
}

/// Parameters, moments and the number of steps are all in the file, so equal files are equal trainings.
#[test]
fn a_training_moves_from_mesh_to_mesh_without_a_bit_lost() {
    within(60, || {
        let folder = Scratch::new("checkpoint-meshes");
        let path = folder.path().join("model.safetensors");
        let mut first = session("stage=2");
        (0..3).for_each(|_| drop(model().step(&mut first)));
        let original = saved(&first, &path);
        let tensors = SafeTensors::deserialize(&original).expect("a safetensors file");
        let parameters = first.parameters().expect("copies agree");
        assert_eq!(tensors.len(), 3 * parameters.len(), "each parameter with its two moments");
        let is_zero = |name: &String| tensors.tensor(name).is_ok_and(|t| t.data().iter().all(|b| *b == 0));
        for name in parameters.keys() {
            assert!(!is_zero(&format!("adamw.m/{name}")) && !is_zero(&format!("adamw.v/{name}")), "{name}");
        }
        for mesh in ["tensor=2", "data=3", "data=2,stage=2,tensor=2", "tensor=3", ONE] {
            let mut next = session(mesh);
            next.restore(&path).unwrap_or_else(|e| panic!("mesh {mesh}: {e}"));
            assert_eq!(next.steps(), 3);
            assert!(bits(&next.parameters().expect("copies agree")) == bits(&parameters), "mesh {mesh}");
            assert!(saved(&next, &path) == original, "mesh {mesh}: the files differ");
            next.shutdown().expect("nothing failed");
        }
        assert_eq!(files(folder.path()), 1, "only the checkpoint");
    });
}

#[test]
fn a_resumed_training_gives_the_bits_of_one_that_was_not_interrupted() {
    within(60, || {
        let folder = Scratch::new("checkpoint-resume");
        for mesh in [ONE, "stage=2", "data=2,stage=2,tensor=2"] {
            let path = folder.path().join("model.safetensors");
            let mut whole = session(mesh);
            let mut losses: Vec<u32> = Vec::new();
            for step in 0..6 {
                if step == 3 {
                    whole.save(&path).expect("can be saved");
                }
                losses.extend(model().step(&mut whole).loss.map(f32::to_bits));
            }
            // Steps of its own before, so that all of its state must be replaced.
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

/// Tries to restore a file that does not fit; gives the message.
fn refused(session: &mut Session, folder: &Path, path: &Path) -> String {
    let before = saved(session, &folder.join("before"));
    let error = session.restore(path).expect_err("does not fit").to_string();
    assert!(saved(session, &folder.join("after")) == before, "changed by: {error}");
    assert!(error.starts_with(&path.display().to_string()), "the file comes first in: {error}");
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
        // A step further, every tensor of the files differs from what is there.
        model().step(&mut here);
        let refused = |name: &str, here: &mut Session| refused(here, folder, &folder.join(name));

        // Wider in its last matrix only, so that every tensor before it fits.
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
        small.save(&folder.join("small")).expect("can be saved");
        let text = refused("small", &mut here);
        assert!(text.contains("expected") && text.contains("sizes"), "{text}");

        std::fs::write(folder.join("half"), &good[..good.len() / 2]).expect("can be written");
        let text = refused("half", &mut here);
        assert!(text.contains("not a complete safetensors file"), "{text}");

        std::fs::write(folder.join("text"), "not tensors at all, but a text of some length").expect("can be written");
        let text = refused("text", &mut here);
        assert!(text.contains("not a complete safetensors file"), "{text}");

        let text = refused("nowhere", &mut here);
        assert!(text.to_lowercase().contains("no such file"), "{text}");

        let good_again = folder.join("good");
        here.restore(&good_again).expect("the good one still fits");
        model().step(&mut here);
    });
}

/// Writes the tensors of `file` with other shapes, or without those for which `edit` gives `None`.
fn edited(file: &[u8], path: &Path, edit: impl Fn(&str, &[usize]) -> Option<Vec<usize>>) {
    let (_, metadata) = SafeTensors::read_metadata(file).expect("a safetensors file");
    let metadata: Option<HashMap<String, String>> = metadata.metadata().clone();
    let tensors = SafeTensors::deserialize(file).expect("a safetensors file");
    let views = tensors.tensors().into_iter().filter_map(|(name, view)| {
        let shape = edit(&name, view.shape())?;
        Some((name, TensorView::new(view.dtype(), shape, view.data()).expect("as many elements")))
    });
    let bytes = safetensors::serialize(views.collect::<Vec<_>>(), metadata).expect("can be written");
    std::fs::write(path, bytes).expect("can be written");
}

#[test]
fn what_cannot_be_saved_leaves_nothing() {
    within(60, || {
        let scratch = Scratch::new("checkpoint-nowhere");
        let here = session(ONE);
        let path = scratch.path().join("missing/model.safetensors");
        let text = here.save(&path).expect_err("the folder is not there").to_string();
        assert!(text.starts_with(&path.display().to_string()), "{text}");
        // A folder stands where the file should go.
        let path = scratch.path().join("taken");
        std::fs::create_dir(&path).expect("can be made");
        assert!(here.save(&path).is_err());
        assert_eq!(files(scratch.path()), 1, "only the folder that stood in the way");
    });
}
