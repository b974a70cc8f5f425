//! A training that goes back to its newest checkpoint because of a bad batch, and on without it.

use clap::Parser;
use shardflow::prelude::*;
use shardflow_examples::args::GptArgs;
use shardflow_examples::checkpoints::Checkpoints;

const ROWS: usize = 4;
const WIDTH: usize = 6;
const STEPS: u64 = 12;
const BAD: u64 = 7;

fn start() -> Session {
    let mut g = Graph::new(&Mesh::parse("data=2").expect("a mesh"));
    let layout = nn::batch_layout(&g);
    let x = g.input("x", &[ROWS, 2, WIDTH], DType::F32, layout.clone());
    let targets = g.input("targets", &[ROWS, 2], DType::I32, layout);
    let logits = nn::linear(&mut g, "layer", x, WIDTH, Parallel::Replicated);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW::default());
    let options = SessionOptions { on_non_finite: OnNonFinite::Skip { in_a_row_max: 3 }, ..SessionOptions::default() };
    Session::start(compile(g, &CompileOptions::default()).expect("a plan"), &options).expect("a session")
}

fn step(session: &mut Session, batch: u64) -> StepReport {
    let value = |i: usize| if batch == BAD { f32::NAN } else { ((i as u64 * 7 + batch * 3) % 11) as f32 / 11.0 };
    let x = HostTensor::f32(&[ROWS, 2, WIDTH], (0..ROWS * 2 * WIDTH).map(value).collect());
    let targets = HostTensor::i32(&[ROWS, 2], (0..ROWS as i32 * 2).map(|i| i % 5).collect());
    session.step(&[("x", x), ("targets", targets)], 1e-2).expect("a step")
}

#[test]
fn the_batches_up_to_the_bad_one_are_passed_over() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("rollback-{}", std::process::id()));
    let place = folder.to_str().expect("a path");
    let args = GptArgs::parse_from(["gpt", "--checkpoint-every", "3"]);

    let mut session = start();
    let mut checkpoints = Checkpoints::open(place, &args, false, &mut session).expect("a place");
    let mut batches = Vec::new();
    while session.steps() < STEPS {
        let batch = checkpoints.batch(session.steps());
        batches.push(batch);
        if let Some(found) = step(&mut session, batch).non_finite {
            checkpoints.roll_back(&mut session, &found).expect("a way back");
            continue;
        }
        let is_last = session.steps() == STEPS;
        checkpoints.after_step(&session, Request::Nothing, is_last).expect("saved");
    }
    // Step 6 is the newest checkpoint when batch 7 turns out to be bad.
    assert_eq!(batches, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]);
    let trained = session.parameters().expect("parameters");

    let mut never_saw_it = start();
    [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13].iter().for_each(|batch| drop(step(&mut never_saw_it, *batch)));
    assert_eq!(never_saw_it.parameters().expect("parameters"), trained);

    let mut later = start();
    let checkpoints = Checkpoints::open(place, &args, false, &mut later).expect("a place");
    assert_eq!(
        (later.steps(), checkpoints.batch(later.steps())),
        (STEPS, STEPS + 2),
        "batches passed over are forgotten"
    );
    std::fs::remove_dir_all(folder).expect("a folder");
}
