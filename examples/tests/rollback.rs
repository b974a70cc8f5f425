//! A training that rolls back to its newest checkpoint after a bad batch, and continues without that batch.

use std::sync::Arc;

use shardflow::prelude::*;

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

fn open(place: &str, session: &mut Session) -> CheckpointManager {
    let options = ManagerOptions {
        resume: Resume::Auto,
        schedule: SaveSchedule { every: 3, steps: STEPS },
        keep: 3,
        keep_every: None,
        batch: ROWS as u64,
        requests: None,
        save: None,
        on_note: Arc::new(|_| {}),
    };
    CheckpointManager::open(place, options, session).expect("a store")
}

fn step(session: &mut Session, batch: u64) -> StepReport {
    let value = |i: usize| if batch == BAD { f32::NAN } else { ((i as u64 * 7 + batch * 3) % 11) as f32 / 11.0 };
    let x = HostTensor::f32(&[ROWS, 2, WIDTH], (0..ROWS * 2 * WIDTH).map(value).collect());
    let targets = HostTensor::i32(&[ROWS, 2], (0..ROWS as i32 * 2).map(|i| i % 5).collect());
    session.step(&[("x", x), ("targets", targets)], 1e-2).expect("a step")
}

#[test]
fn batches_up_to_the_bad_one_are_skipped() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("rollback-{}", std::process::id()));
    let place = folder.to_str().expect("a path");
    let rows = ROWS as u64;

    let mut session = start();
    let mut checkpoints = open(place, &mut session);
    let mut batches = Vec::new();
    while session.steps() < STEPS {
        let batch = checkpoints.take_batch() / rows;
        batches.push(batch);
        let report = step(&mut session, batch);
        if let Some(found) = &report.non_finite {
            checkpoints.roll_back(&mut session, found).expect("a checkpoint");
            continue;
        }
        checkpoints.after_step(&session, &report).expect("saved");
    }
    // The step with the bad batch 7 returns to the checkpoint of step 6, and training continues with batch 8.
    assert_eq!(batches, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]);
    let trained = session.parameters().expect("parameters");

    let mut without_batch = start();
    [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13].iter().for_each(|batch| drop(step(&mut without_batch, *batch)));
    assert_eq!(without_batch.parameters().expect("parameters"), trained);

    let mut later = start();
    let mut checkpoints = open(place, &mut later);
    let next = (later.steps(), checkpoints.take_batch());
    assert_eq!(next, (STEPS, (STEPS + 2) * rows), "the cursor lacks the skipped batches");
    std::fs::remove_dir_all(folder).expect("a folder");
}

/// A process that dies after a rollback and before the next checkpoint does not train on the bad batch again.
#[test]
fn a_rollback_survives_the_end_of_the_process() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("rolled-back-{}", std::process::id()));
    let place = folder.to_str().expect("a path");
    let mut session = start();
    let mut checkpoints = open(place, &mut session);
    loop {
        let batch = checkpoints.take_batch() / ROWS as u64;
        let report = step(&mut session, batch);
        if let Some(found) = &report.non_finite {
            checkpoints.roll_back(&mut session, found).expect("a checkpoint");
            break;
        }
        checkpoints.after_step(&session, &report).expect("saved");
    }
    drop(checkpoints);
    let mut later = start();
    let mut checkpoints = open(place, &mut later);
    assert_eq!((later.steps(), checkpoints.take_batch()), (6, (BAD + 1) * ROWS as u64));
    drop(checkpoints);
    std::fs::remove_dir_all(folder).expect("a folder");
}
