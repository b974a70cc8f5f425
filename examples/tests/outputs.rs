//! Tests the files that `gpt` writes: after a failed write, all ranks save a checkpoint and end with code 73; two flags
//! cannot name one file; and no unfinished file stays.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use programs::{Folder, GPT, launcher, signal};

#[path = "support/programs.rs"]
mod programs;

/// Time limit of a run, much longer than any run of these tests takes.
const TIMEOUT: Duration = Duration::from_secs(150);
const MODEL: &str = "--layers 2 --heads 2 --width 16 --context 8 --batch 4 --threads-per-device 1 --data text";

/// Runs `gpt` with the flags of the model, followed by `flags`. Returns the exit code and the output.
fn gpt(folder: &Folder, flags: &str) -> (Option<i32>, String) {
    run(folder, Command::new(GPT).args(MODEL.split_whitespace()).args(flags.split_whitespace()))
}

fn launch(folder: &Folder, flags: &str) -> (Option<i32>, String) {
    let mut command = Command::new(launcher());
    command.args(["launch", "--nproc-per-node=2", "--", GPT]).args(MODEL.split_whitespace());
    run(folder, command.args(["--mesh", "data=2"]).args(flags.split_whitespace()))
}

/// Runs a shell script. `$GPT` is `gpt` with the flags of the model. `$WIDE` is the same command with a wider model,
/// which has 1.6 MB of weights, or 4.8 MB with the moments of AdamW.
fn script(folder: &Folder, script: &str) -> (Option<i32>, String) {
    let gpt = format!("{GPT} {MODEL}");
    let wide = gpt.replace("--width 16", "--width 128");
    run(folder, Command::new("bash").args(["-c", script]).env("WIDE", wide).env("GPT", gpt))
}

fn run(folder: &Folder, command: &mut Command) -> (Option<i32>, String) {
    let mut run = folder.start(command.env_remove("SLURM_JOB_END_TIME"));
    (run.end(TIMEOUT), run.text())
}

/// Steps of the checkpoints in a folder.
fn checkpoints(folder: &Path) -> Vec<u64> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let complete = entries.filter(|entry| entry.path().join("manifest.json").exists());
    let names = complete.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect()
}

/// The files and folders in a folder, without the launcher's logs.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name != "shardflow-logs").collect()
}

/// All ranks end with code 73, and the last step is saved. With several ranks, only rank 0 writes the log.
#[test]
fn a_log_that_cannot_be_written_ends_all_ranks_with_a_checkpoint() {
    let folder = Folder::new("outputs-log");
    for processes in [1, 2] {
        let checkpoint = format!("ck-{processes}");
        let flags = format!("--sample 0 --steps 1000000 --log-json /dev/full --checkpoint {checkpoint}");
        let begin = Instant::now();
        let (code, text) = if processes == 1 { gpt(&folder, &flags) } else { launch(&folder, &flags) };
        assert!(begin.elapsed() < Duration::from_secs(60), "{text}");
        assert_eq!(code, Some(73), "{text}");
        assert!(text.contains("cannot write log /dev/full: No space left on device"), "{text}");
        let steps = checkpoints(&folder.path().join(&checkpoint));
        let [step] = steps[..] else { panic!("one checkpoint expected: {steps:?} {text}") };
        let requested = format!(
            "ended after step {step} because of a rank that cannot write its log or trace; this step is saved in"
        );
        assert_eq!(text.contains(&requested), processes == 2, "{text}");
    }
}

#[test]
fn a_checkpoint_folder_is_no_other_output_or_input() {
    let folder = Folder::new("outputs-same");
    for flag in ["--save", "--log-json", "--trace", "--init-from"] {
        for place in ["x", "file://x", "./x"] {
            let (code, text) = gpt(&folder, &format!("{flag} x --checkpoint {place} --steps 1"));
            assert_eq!(code, Some(2), "{flag} {place}: {text}");
            let pair = [format!("{flag} and --checkpoint"), format!("--checkpoint and {flag}")];
            let is_named = pair.iter().any(|pair| text.contains(&format!("error: {pair} are the same file")));
            assert!(is_named && !text.contains("loss"), "{flag} {place}: {text}");
        }
    }
    let (code, text) = gpt(&folder, "--checkpoint text --steps 1");
    assert!(code == Some(2) && text.contains("--data and --checkpoint are the same file"), "{code:?} {text}");
    assert_eq!(names(folder.path()), ["text"]);
}

/// A continued training generates the same text as a training without an interruption.
#[test]
fn the_seed_of_a_checkpoint_holds_for_the_generated_text() {
    let folder = Folder::new("outputs-seed");
    let written = |flags: &str| {
        let (code, text) = gpt(&folder, flags);
        assert_eq!(code, Some(0), "{text}");
        text.split_once("written by the model:").expect("generated text").1.to_owned()
    };
    let first = written("--steps 2 --sample 40 --seed 5 --checkpoint ck");
    assert_ne!(first, written("--steps 2 --sample 40 --seed 6"), "another seed gives another text");
    assert_eq!(first, written("--steps 2 --sample 40 --seed 6 --checkpoint ck"));
}

/// The hint must name `--resume auto`, because the same command with `--resume never` would be refused.
#[test]
fn the_hint_after_a_signal_fits_the_resume_policy() {
    let folder = Folder::new("outputs-never");
    let mut command = Command::new(GPT);
    let flags = "--sample 0 --steps 10000000 --checkpoint ck --checkpoint-every 100000000 --resume never";
    command.args(MODEL.split_whitespace()).args(flags.split_whitespace()).env_remove("SLURM_JOB_END_TIME");
    let mut run = folder.start(&mut command);
    run.until("step ", TIMEOUT);
    run.until("loss", TIMEOUT);
    signal(run.child.id(), "TERM");
    assert_eq!(run.end(TIMEOUT), Some(143), "{}", run.text());
    let text = run.text();
    assert!(text.contains("hint: to continue from there, run the same command with --resume auto"), "{text}");
}

/// At the limit on the size of a file (`ulimit -f`), the kernel sends SIGXFSZ. Without a handler, this signal would end
/// the process without a message.
#[test]
fn a_limit_on_the_size_of_files_is_an_error_and_leaves_nothing_unfinished() {
    let folder = Folder::new("outputs-limit");
    let (code, text) = script(&folder, "ulimit -f 100; exec $WIDE --steps 1 --sample 0 --save ul.st");
    assert!(code == Some(73) && text.contains("error: --save ul.st"), "{code:?} {text}");
    assert!(text.contains("File too large"), "{text}");
    assert_eq!(names(folder.path()), ["text"], "{text}");
    let (code, text) = script(&folder, "ulimit -f 100; exec $WIDE --steps 1 --sample 0 --checkpoint ck");
    assert!(code == Some(73) && text.contains("the last checkpoint is not saved"), "{code:?} {text}");
    let rest = names(&folder.path().join("ck"));
    assert!(!rest.iter().any(|name| name.starts_with("lock-")), "{rest:?} {text}");
    // With a limit of 0, the process cannot even write the lock file.
    let (code, text) = script(&folder, "ulimit -f 0; exec $WIDE --steps 1 --sample 0 --checkpoint new");
    assert!(code == Some(73) && text.contains("new/lock-1.json"), "{code:?} {text}");
    assert_eq!(names(&folder.path().join("new")), [""; 0], "{text}");
}

/// There is enough space for either file alone, but not for both files.
#[test]
fn the_space_of_a_checkpoint_and_of_saved_parameters_is_counted_together() {
    let folder = Folder::new("outputs-room");
    std::fs::create_dir(folder.path().join("small")).expect("a folder");
    let mount = Command::new("unshare").args(["--mount", "mount", "-t", "tmpfs", "none", "/tmp"]).output();
    if !mount.is_ok_and(|output| output.status.success()) {
        println!("SKIPPED outputs-room: no mount namespace");
        return;
    }
    for (flags, expected) in [
        ("--save small/model", 0),
        ("--checkpoint small/ck", 0),
        ("--save small/model --checkpoint small/ck", 73),
        ("--save model --checkpoint small/ck", 0),
    ] {
        let mount = "mount -t tmpfs -o size=8m none small";
        let gpt = format!("$WIDE --steps 1 --sample 0 {flags}");
        let (code, text) = script(&folder, &format!("exec unshare --mount sh -c '{mount} && exec {gpt}'"));
        assert_eq!(code, Some(expected), "{flags}: {text}");
        let refused = text.contains(": 1 checkpoint of ") && text.contains("for the file with all parameters");
        assert_eq!((refused, text.contains("loss")), (expected == 73, expected == 0), "{flags}: {text}");
    }
}

/// Lost output is a failure. A reader that closes its pipe early is not a failure.
#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let folder = Folder::new("outputs-stdout");
    for flags in ["--explain", "--steps 2 --sample 0", "--steps 2 --sample 5"] {
        for (to, expected) in [("> /dev/full", 73), ("| head -1 > /dev/null", 0), ("| true", 0), ("> /dev/null", 0)] {
            let (code, text) = script(&folder, &format!("set -o pipefail; $GPT {flags} {to}"));
            assert_eq!(code, Some(expected), "{flags} {to}: {text}");
            let is_named = text.contains("error: cannot write standard output: No space left on device");
            assert_eq!(is_named, expected == 73, "{flags} {to}: {text}");
        }
    }
    let mut command = Command::new(GPT);
    command.arg("--explain").stdout(Stdio::null());
    assert_eq!(command.status().expect("gpt").code(), Some(0));
}

/// With several ranks, rank n writes the trace `FILE.n`. No other flag may name this file.
#[test]
fn traces_of_ranks_are_no_other_output() {
    let folder = Folder::new("outputs-traces");
    for (flag, file) in [("--log-json", "col.0"), ("--save", "col.0"), ("--save", "col.1"), ("--checkpoint", "col.1")] {
        let (code, text) = launch(&folder, &format!("--trace col {flag} {file} --steps 1 --sample 0"));
        assert_eq!(code, Some(2), "{flag} {file}: {text}");
        let expected = format!("{flag} and --trace are the same file {file}");
        let swapped = format!("--trace and {flag} are the same file {file}");
        assert!(text.contains(&expected) || text.contains(&swapped), "{flag} {file}: {text}");
        assert_eq!(names(folder.path()), ["text"], "{flag} {file}");
    }
    let (code, text) = launch(&folder, "--trace col --log-json col --steps 1 --sample 0");
    assert_eq!(code, Some(2), "{text}");
    let (code, text) = launch(&folder, "--trace col --log-json col.2 --steps 1 --sample 0");
    assert_eq!(code, Some(0), "{text}");
}
