//! Tests the values that `gpt` compares between its ranks and, on resume, with a checkpoint.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use programs::{Folder, GPT, launcher};
use serde_json::Value;

#[path = "support/programs.rs"]
mod programs;

/// Time limit of a run, much longer than any run of these tests takes.
const TIMEOUT: Duration = Duration::from_secs(150);
const MODEL: &str = "--layers 2 --heads 2 --width 16 --context 8 --sample 0 --threads-per-device 1";

/// Runs `gpt` with these flags and the defaults. Returns the exit code and the output.
fn gpt(folder: &Folder, flags: &str) -> (Option<i32>, String) {
    run(folder, Command::new(GPT).args(with_defaults(flags)))
}

/// Adds default flags for the model and the data, except those that `flags` sets.
fn with_defaults(flags: &str) -> Vec<String> {
    let own: Vec<&str> = flags.split_whitespace().collect();
    let defaults: Vec<&str> = MODEL.split_whitespace().chain("--batch 4 --data text".split_whitespace()).collect();
    let kept = defaults.chunks(2).filter(|pair| !own.contains(&pair[0])).flatten();
    kept.chain(&own).map(ToString::to_string).collect()
}

fn run(folder: &Folder, command: &mut Command) -> (Option<i32>, String) {
    let mut run = folder.start(command);
    (run.end(TIMEOUT), run.text())
}

/// Runs `gpt` as two processes. The second process has an additional flag or variable.
fn run_two(folder: &Folder, flags: &str, second: &str, variable: &str) -> (Option<i32>, String) {
    let line = |flags: &str| format!("exec {GPT} {}", with_defaults(flags).join(" "));
    // The additional flag replaces the same flag in `flags`.
    let own = second.split_whitespace().next().unwrap_or("-");
    let kept: Vec<&str> = flags.split_whitespace().collect();
    let kept: Vec<&str> = kept.chunks(2).filter(|pair| pair[0] != own).flatten().copied().collect();
    let (first, second) = (line(flags), line(&format!("{} {second}", kept.join(" "))));
    let script = format!("if [ $RANK = 1 ]; then {variable} {second}; else {first}; fi");
    let mut command = Command::new(launcher());
    run(folder, command.args(["launch", "--nproc-per-node=2", "--", "sh", "-c", &script]))
}

/// Returns the contents of all files below a folder, by path.
fn files(folder: &Folder, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut out, mut folders) = (BTreeMap::new(), vec![folder.path().join(name)]);
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                out.insert(path.clone(), std::fs::read(path).expect("a file"));
            }
        }
    }
    out
}

/// Returns the manifest of a step's checkpoint.
fn manifest(folder: &Folder, name: &str, step: u64) -> Value {
    let path = folder.path().join(name).join(format!("step-{step:012}/manifest.json"));
    let text = std::fs::read(path).expect("a checkpoint");
    serde_json::from_slice::<Value>(&text).expect("JSON")["body"].clone()
}

/// Writes two variants of the file `text`. `other` has its first two letters swapped, so its length and vocabulary are
/// the same. `renumbered` has another vocabulary.
fn write_texts(folder: &Folder) {
    let mut text = std::fs::read(folder.path().join("text")).expect("a text");
    text.swap(0, 1);
    std::fs::write(folder.path().join("other"), &text).expect("a text");
    // Replacing each `z` by `Z` also changes the token ids of other bytes.
    text.swap(0, 1);
    text.iter_mut().filter(|byte| **byte == b'z').for_each(|byte| *byte = b'Z');
    std::fs::write(folder.path().join("renumbered"), text).expect("a text");
}

#[test]
fn ranks_with_other_values_end_together_and_name_the_value() {
    let folder = Folder::new("agreement-ranks");
    write_texts(&folder);
    let flags = "--mesh data=2 --steps 3";
    for (second, variable, expected) in [
        ("--lr 0.5", "", "differ in their lr: 0.001 and 0.5;"),
        ("--data other", "", "differ in their data: "),
        ("--data renumbered", "", "differ in their data: "),
        ("--seed 7", "", "differ in their seed: 1337 and 7;"),
        ("--dropout 0.5", "", "differ in their dropout: 0 and 0.5;"),
        ("--clip 1", "", "differ in their clip: none and 1;"),
        ("--steps 4", "", "differ in their steps: 3 and 4;"),
        ("--micro-batches 2", "", "differ in their micro-batches: 1 and 2;"),
        ("--schedule gpipe", "", "differ in their schedule: 1f1b and gpipe;"),
        ("--sample 5", "", "differ in their sample: not given and given;"),
        ("--checkpoint ck", "", "differ in their checkpoint: not given and given;"),
        ("--save model", "", "differ in their save: not given and given;"),
        ("", "SHARDFLOW_TRANSPORT=tcp", "differ in their transport: Auto and Tcp; set the same SHARDFLOW_TRANSPORT"),
    ] {
        let (code, text) = run_two(&folder, flags, second, variable);
        assert_eq!(code, Some(78), "{second}{variable}: {text}");
        assert!(text.contains("rank 0 (") && text.contains("rank 1 ("), "{second}{variable}: {text}");
        assert!(text.contains(expected), "{second}{variable}: {text}");
        assert!(!text.contains("loss"), "{second}{variable}: {text}");
    }
}

/// On the mesh `stage=2`, the ranks have no weight in common.
#[test]
fn ranks_that_start_from_other_files_end_together_and_name_the_tensor() {
    let folder = Folder::new("agreement-init");
    for seed in [1, 2] {
        let (code, text) = gpt(&folder, &format!("--steps 1 --seed {seed} --save model-{seed}"));
        assert_eq!(code, Some(0), "{text}");
    }
    for mesh in ["data=2", "tensor=2", "stage=2"] {
        let script = |second: u32| {
            let flags = with_defaults(&format!("--mesh {mesh} --steps 2")).join(" ");
            format!(
                "if [ $RANK = 1 ]; then file=model-{second}; else file=model-1; fi; exec {GPT} {flags} --init-from $file"
            )
        };
        let launch = |second| {
            let mut command = Command::new(launcher());
            run(&folder, command.args(["launch", "--nproc-per-node=2", "--", "sh", "-c", &script(second)]))
        };
        let (code, text) = launch(2);
        assert_eq!(code, Some(78), "{mesh}: {text}");
        let expected =
            ["the ranks differ in tensor ", "rank 0 has ", "rank 1 has ", "hint: give all ranks the same file"];
        assert!(expected.iter().all(|expected| text.contains(expected)), "{mesh}: {text}");
        assert!(!text.contains("loss"), "{mesh}: {text}");
        let (code, text) = launch(1);
        assert_eq!(code, Some(0), "{mesh}: {text}");
        let (code, text) = launch(3);
        assert!(code == Some(2) && text.contains("model-3"), "{mesh}: {code:?} {text}");
    }
}

#[test]
fn a_checkpoint_of_another_training_is_refused_and_not_changed() {
    let folder = Folder::new("agreement-refused");
    write_texts(&folder);
    let (code, text) = gpt(&folder, "--steps 5 --checkpoint ck --checkpoint-every 2 --save model");
    assert_eq!(code, Some(0), "{text}");
    let before = files(&folder, "ck");
    for (flags, expected) in [
        ("--layers 4", "its layers is 2, but this program has 4"),
        ("--layers 1", "its layers is 2, but this program has 1"),
        ("--heads 4", "its heads is 2, but this program has 4"),
        ("--width 32", "its width is 16, but this program has 32"),
        ("--context 16", "its context is 8, but this program has 16"),
        ("--data other", "its data is 1800 bytes, blake3 "),
        ("--data renumbered", "its data is 1800 bytes, blake3 "),
    ] {
        let (code, text) = gpt(&folder, &format!("{flags} --steps 400 --checkpoint ck --checkpoint-every 2"));
        assert_eq!(code, Some(65), "{flags}: {text}");
        assert!(text.contains(expected) && text.contains("hint: use the flags and the data"), "{flags}: {text}");
        assert!(files(&folder, "ck") == before, "{flags}: files have changed");
    }
    // `--init-from` loads only weights, so it does not compare the data.
    for (flags, code, expected) in [
        ("--heads 4", 2, "its heads is 2, but this program has 4"),
        ("--layers 1", 2, "its layers is 2, but this program has 1"),
        ("--data renumbered", 2, "its vocabulary is 29 bytes, blake3 "),
        ("--data other", 0, "model: parameters are loaded; optimizer state is fresh"),
    ] {
        let (got, text) = gpt(&folder, &format!("{flags} --init-from model --steps 1"));
        assert_eq!(got, Some(code), "{flags}: {text}");
        assert!(text.contains(expected), "{flags}: {text}");
    }
}

#[test]
fn a_resume_reports_what_differs_and_continues_with_the_next_sample() {
    let folder = Folder::new("agreement-resume");
    let resume = |flags: &str, steps: u64| {
        let (code, text) = gpt(&folder, &format!("{flags} --steps {steps} --checkpoint ck"));
        assert_eq!(code, Some(0), "{flags}: {text}");
        let samples = manifest(&folder, "ck", steps)["cursor"]["samples"].clone();
        (text, samples.as_str().expect("a text").to_owned())
    };
    let (text, samples) = resume("", 4);
    assert!(text.contains("no checkpoint in ck: starting from step 0") && !text.contains("warning"), "{text}");
    assert_eq!(samples, "16");
    for (flags, steps, expected, warnings, consumed) in [
        ("--batch 2", 6, &["warning: batch was 4 and is 2 from here on"][..], 1, "20"),
        (
            "--dropout 0.25 --clip 1",
            7,
            &["batch was 2 and is 4", "dropout was 0 and is 0.25", "maximum gradient norm was inf and is 1"],
            3,
            "24",
        ),
        ("--dropout 0.25 --clip 1 --seed 7", 8, &["warning: the seed 1337 from ", "replaces the seed 7"], 1, "28"),
        ("--dropout 0.25 --clip 1 --mesh data=2 --lr 0.5 --micro-batches 2 --schedule gpipe", 9, &[], 0, "32"),
    ] {
        let (text, samples) = resume(flags, steps);
        assert!(text.contains("continuing from step"), "{flags}: {text}");
        assert!(expected.iter().all(|line| text.contains(line)), "{flags}: {text}");
        assert_eq!(text.matches("warning: ").count(), warnings, "{flags}: {text}");
        assert_eq!(samples, consumed, "{flags}");
    }
    let recorded = manifest(&folder, "ck", 9);
    assert_eq!((recorded["seed"].as_u64(), recorded["declared"]["batch"].as_str()), (Some(1337), Some("4")));
}

#[test]
fn resume_can_be_required_or_forbidden() {
    let folder = Folder::new("agreement-required");
    let (code, text) = gpt(&folder, "--steps 2 --resume required --checkpoint mistyped");
    assert_eq!(code, Some(65), "{text}");
    assert!(text.contains("mistyped: no complete checkpoint") && !text.contains("loss"), "{text}");
    // A refused run removes the folders that it has created for checkpoints. A folder of the user stays.
    std::fs::create_dir(folder.path().join("own")).expect("a folder");
    for (place, rest) in [("new/a/b", "new"), ("own/a", "own/a")] {
        let (code, text) = gpt(&folder, &format!("--steps 2 --init-from no-such --checkpoint {place}"));
        assert!(code == Some(2) && text.contains("no-such"), "{text}");
        assert!(!folder.path().join(rest).exists(), "{place}");
    }
    assert!(folder.path().join("own").is_dir() && !folder.path().join("mistyped").exists());
    let (code, text) = gpt(&folder, "--steps 2 --resume required");
    assert!(code == Some(2) && text.contains("--resume required needs --checkpoint"), "{text}");
    let (code, text) = gpt(&folder, "--steps 2 --resume never --checkpoint ck");
    assert_eq!(code, Some(0), "{text}");
    let before = files(&folder, "ck");
    write_texts(&folder);
    for other in ["", "--heads 1", "--data other"] {
        let (code, text) = gpt(&folder, &format!("--steps 4 --resume never --checkpoint ck {other}"));
        assert_eq!(code, Some(2), "{other}: {text}");
        assert!(text.contains("--resume never is given, but ck has a checkpoint of step 2"), "{other}: {text}");
        assert!(!text.contains("continuing"), "{other}: {text}");
    }
    assert!(files(&folder, "ck") == before, "files have changed");
    let (code, text) = gpt(&folder, "--steps 4 --resume required --checkpoint ck");
    assert!(code == Some(0) && text.contains("continuing from step 2"), "{text}");
    // A restarted job continues from its own checkpoints.
    let mut restarted = Command::new(launcher());
    restarted.args(["launch", "--nproc-per-node=1", "--", "env", "SHARDFLOW_RESTART_COUNT=1", GPT]);
    let (code, text) = run(&folder, restarted.args(with_defaults("--steps 6 --resume never --checkpoint ck")));
    assert!(code == Some(0) && text.contains("continuing from step 4"), "{text}");
}
