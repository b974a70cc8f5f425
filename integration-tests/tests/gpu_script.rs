//! Tests `gpu/check.sh` without a GPU, on software GPUs, with a stage that hangs, and with an interruption. The script
//! always writes a report of the results. The script needs Python. These tests skip its comparisons with PyTorch.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use shardflow_integration_tests::training::Scratch;
use shardflow_software_cuda::SimReport;

/// Creates a folder with `gpu_check` and a fake conformance suite. The suite hangs in all cases except one.
fn binaries(scratch: &Scratch) -> PathBuf {
    let folder = scratch.path().join("binaries");
    fs::create_dir(&folder).expect("an empty folder");
    symlink(env!("CARGO_BIN_EXE_gpu_check"), folder.join("gpu_check")).expect("an empty folder");
    let suite = folder.join("conformance");
    fs::write(&suite, "#!/bin/sh\n[ \"$SHARDFLOW_TEST_CASE\" = staged ] || exec tail -f /dev/null\n").expect("a file");
    fs::set_permissions(&suite, fs::Permissions::from_mode(0o755)).expect("permission to change the file");
    folder
}

/// Returns whether Python, which the script needs, is installed. Prints SKIPPED if not.
fn has_python() -> bool {
    let found = Command::new("python3").args(["-c", ""]).status().is_ok_and(|status| status.success());
    if !found {
        println!("SKIPPED: no python3");
    }
    found
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("gpu/check.sh")
}

/// Returns a command that runs the script on this number of software GPUs.
fn on_software(scratch: &Scratch, gpus: usize) -> Command {
    shardflow_software_cuda::command(script(), scratch.path(), gpus, "random", 1).expect("the software device")
}

/// Adds arguments that select these stages and tiny sizes.
fn add_tiny_arguments(command: &mut Command, scratch: &Scratch, only: &str) {
    command.arg("--tiny").arg("--binaries").arg(binaries(scratch)).args(["--only", only]);
}

fn report(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("report.json")).expect("a report")).expect("JSON")
}

/// Returns the name and the state of each stage in the report.
fn states(out: &Path) -> Vec<(String, String)> {
    let report = report(out);
    let stages = report["stages"].as_array().expect("stages");
    let text = |stage: &Value, key: &str| stage[key].as_str().expect("a text").to_owned();
    for stage in stages.iter().filter(|stage| stage["state"] == "failed") {
        println!("{stage:#}");
    }
    stages.iter().map(|stage| (text(stage, "name"), text(stage, "state"))).collect()
}

fn assert_states(states: &[(String, String)], expected: &[(&str, &str)]) {
    let states: Vec<_> = states.iter().map(|(name, state)| (&name[..], &state[..])).collect();
    assert_eq!(states, expected);
}

#[test]
fn without_a_gpu_every_other_stage_is_skipped() {
    if !has_python() {
        return;
    }
    let scratch = Scratch::new("gpu-script-none");
    let out = scratch.path().join("out");
    let mut script = Command::new(script());
    // Hide the machine's GPUs.
    script.env("CUDA_VISIBLE_DEVICES", "").arg("--binaries").arg(binaries(&scratch)).arg(&out);
    assert_eq!(script.status().expect("a shell").code(), Some(1));
    let states = states(&out);
    assert_eq!(states[0], ("versions".to_owned(), "failed".to_owned()));
    assert!(states.len() > 20 && states[1..].iter().all(|(_, state)| state == "skipped"), "{states:?}");
}

/// Returns how often a stage ran attention: the forward pass by cuDNN and by our own kernels, then the backward pass by
/// cuDNN and by our own kernels.
fn attentions(report: &Value, stage: &str) -> [u64; 4] {
    let stage = report["stages"].as_array().expect("stages").iter().find(|s| s["name"] == stage).expect("the stage");
    ["forward_cudnn", "forward_own", "backward_cudnn", "backward_own"]
        .map(|count| stage["results"]["counts"][format!("attention_{count}")].as_u64().expect("a count"))
}

#[test]
fn shardflow_stages_run_on_a_software_device() {
    if !has_python() {
        return;
    }
    let scratch = Scratch::new("gpu-script-ours");
    let out = scratch.path().join("out");
    let mut script = on_software(&scratch, 1);
    let stages = [
        "versions",
        "ceilings",
        "conformance-staged",
        "gpt2-f32-ours",
        "compare",
        "launches",
        "launches-own",
        "launches-any-order",
        "gpt2-any-order",
        "virtual-stage",
        "virtual-tensor",
    ];
    add_tiny_arguments(&mut script, &scratch, &stages.join(" "));
    let status = script.arg(&out).status().expect("a shell");
    // These comparisons have no PyTorch results.
    let beside = ["gpt2-losses-f32", "gpt2-losses-bf16", "gpt2-speed"];
    let expected = stages.map(|name| (name, "ok")).into_iter().chain(beside.map(|name| (name, "skipped")));
    assert_states(&states(&out), &expected.collect::<Vec<_>>());
    assert!(status.success(), "{status}");
    let report = report(&out);
    // There are ten steps of two layers. cuDNN has no attention in f32.
    assert_eq!(attentions(&report, "gpt2-f32-ours"), [0, 20, 0, 20]);
    let both = |stage| {
        let [cudnn, own, more_cudnn, more_own] = attentions(&report, stage);
        (cudnn + more_cudnn, own + more_own)
    };
    let ((cudnn, own), (none, alone)) = (both("launches"), both("launches-own"));
    assert!(cudnn > 0 && own == 0 && none == 0 && alone > 0, "{report:#}");
    for stage in ["launches-any-order", "gpt2-any-order"] {
        let [_, _, backward, own] = attentions(&report, stage);
        assert!(backward > 0 && own == 0, "{stage}: {report:#}");
    }
    // The last process on the software device was a training, which has written this report.
    assert_eq!(SimReport::read(scratch.path()).expect("a report").findings, []);
}

/// On one GPU, the NCCL stages are skipped. On two GPUs, trainings over NCCL are compared with trainings on one GPU.
#[test]
fn nccl_needs_two_gpus() {
    if !has_python() {
        return;
    }
    let stages = ["versions", "conformance-nccl", "gpt2-f32-ours", "nccl-data", "nccl-stage"];
    let derived = ["gpt2-losses-f32", "gpt2-losses-bf16", "gpt2-speed", "nccl-losses-data", "nccl-losses-stage"];
    for gpus in [1, 2] {
        let scratch = Scratch::new(&format!("gpu-script-nccl-{gpus}"));
        let out = scratch.path().join("out");
        let mut script = on_software(&scratch, gpus);
        let requested = stages.iter().filter(|stage| gpus == 1 || **stage != "conformance-nccl").copied();
        add_tiny_arguments(&mut script, &scratch, &requested.clone().collect::<Vec<_>>().join(" "));
        assert!(script.arg(&out).status().expect("a shell").success());
        let state = |name: &'static str| match name.contains("nccl") {
            true if gpus == 1 => (name, "skipped"),
            false if derived.contains(&name) => (name, "skipped"),
            _ => (name, "ok"),
        };
        assert_states(&states(&out), &requested.chain(derived).map(state).collect::<Vec<_>>());
    }
}

/// Runs `report.py` on a folder of stages. Each stage has a name, a status and the last line of its output. Returns the
/// states of the stages, and whether `report.py` succeeded.
fn run_report(name: &str, info: &str, stages: &[(&str, &str, &str)]) -> (Vec<(String, String)>, bool) {
    let scratch = Scratch::new(name);
    let write = |name: &str, text: &str| fs::write(scratch.path().join(name), text).expect("a file");
    write("info", info);
    write("stages", &stages.iter().map(|(name, ..)| format!("{name}\n")).collect::<String>());
    for (name, status, out) in stages {
        write(&format!("{name}.status"), status);
        write(&format!("{name}.out"), out);
    }
    let ended = Command::new("python3").arg(script().with_file_name("report.py")).arg(scratch.path()).status();
    (states(scratch.path()), ended.expect("python").success())
}

#[test]
fn an_unreadable_status_fails_only_its_stage() {
    if !has_python() {
        return;
    }
    let (states, passed) =
        run_report("gpu-script-garbled", "", &[("first", "ended well 3 9 9", ""), ("second", "ended 0 3 9 9", "")]);
    assert_states(&states, &[("first", "failed"), ("second", "ok")]);
    assert!(!passed);
}

/// A measured speed counts only together with the speed of torch.compile. With tiny sizes, this comparison is skipped.
#[test]
fn a_speed_without_a_comparison_does_not_pass() {
    if !has_python() {
        return;
    }
    let ours = r#"{"tokens_per_s": 9.0, "weights": 9, "memory": {}, "losses": [],
        "model": {"vocabulary": 1, "context": 1, "width": 1, "layers": 1}}"#
        .replace('\n', " ");
    for (sizes, expected) in [("", "not-measured"), ("tiny", "skipped")] {
        let stages = [("gpt2-ours-1", "ended 0 3 9 9", &*ours), ("gpt2-compile-1", "ended 77 3 9 9", "")];
        let (states, passed) = run_report("gpu-script-speed", &format!("sizes={sizes}\n"), &stages);
        assert_eq!(states.last().expect("derived").clone(), ("gpt2-speed".to_owned(), expected.to_owned()));
        assert_eq!(passed, expected == "skipped");
    }
}

/// Losses in bf16 are compared with those of the first complete PyTorch round.
#[test]
fn losses_are_compared_with_the_first_complete_round() {
    if !has_python() {
        return;
    }
    let training = |loss: f64| format!(r#"{{"weights": 9, "losses": [{loss}], "tokens_per_s": null}}"#);
    let (ours, near, far) = (training(5.0), training(5.01), training(6.0));
    for (eager, compiled, whole, cut) in [(&near, &far, "ok", "failed"), (&far, &near, "failed", "ok")] {
        for (eager_status, expected) in [("ended 0 3 9 9", whole), ("ended 124 9 9 9", cut)] {
            let stages = [
                ("gpt2-ours-1", "ended 0 3 9 9", &*ours),
                ("gpt2-eager-1", eager_status, eager),
                ("gpt2-compile-1", "ended 0 3 9 9", compiled),
            ];
            let (states, _) = run_report("gpu-script-rounds", "", &stages);
            assert!(states.contains(&("gpt2-losses-bf16".to_owned(), expected.to_owned())), "{states:?}");
        }
    }
}

/// A failed stage reports the program's error, the last panic or Python's exception as its cause.
#[test]
fn a_failure_is_reported_with_its_cause() {
    if !has_python() {
        return;
    }
    let cases = [
        ("warning\nerror: the first\nerror: the second\n", "error: the first"),
        (
            "thread 'a' panicked at x.rs:1:1:\non purpose\nthread 'b' panicked at y.rs:2:2:\nthe cause\nnote: run\n",
            "the cause",
        ),
        (
            "Traceback:\n  File \"x\"\ntorch.cuda.OutOfMemoryError: too much\n\nSet TORCHDYNAMO_VERBOSE=1\n",
            "torch.cuda.OutOfMemoryError: too much",
        ),
        ("no more than this\n", "no more than this"),
        ("", "the stage printed nothing"),
    ];
    for (stderr, why) in cases {
        let scratch = Scratch::new("gpu-script-why");
        let write = |name: &str, text: &str| fs::write(scratch.path().join(name), text).expect("a file");
        write("stages", "compare\n");
        write("compare.status", "ended 1 3 9 9");
        write("compare.err", stderr);
        let ended = Command::new("python3").arg(script().with_file_name("report.py")).arg(scratch.path()).status();
        assert_eq!(ended.expect("python").code(), Some(1));
        assert_eq!(report(scratch.path())["stages"][0]["why"], why);
    }
}

/// A stage for which no time is left has not failed. If it is required, however, the whole run has not passed.
#[test]
fn a_stage_without_time_is_not_run() {
    if !has_python() {
        return;
    }
    for (name, status, state, passes) in [
        ("compare", "not-run nothing is left of 9 s", "not-run", false),
        ("sanitizer-memcheck", "not-run nothing is left of 9 s", "not-run", true),
        ("compare", "ended 124 3 3 60", "not-run", false),
        ("compare", "ended 124 60 60 60", "timed-out", false),
        ("sanitizer-memcheck", "ended 124 60 60 60", "timed-out", false),
        ("sanitizer-memcheck", "ended 9 1 3 60", "failed", false),
        // The command `timeout` kills a stage at its time limit. Another process may kill it earlier.
        ("compare", "ended 137 65 60 60", "timed-out", false),
        ("compare", "ended 137 2 60 60", "failed", false),
        ("launches-any-order", "not-run nothing is left of 9 s", "not-run", true),
    ] {
        let (states, passed) = run_report("gpu-script-late", "", &[(name, status, "")]);
        assert_states(&states, &[(name, state)]);
        assert_eq!(passed, passes, "{name}: {status}");
    }
}

#[test]
fn time_limits_must_be_numbers() {
    for flag in ["--deadline", "--stage-seconds"] {
        for value in ["soon", "0", "-1", "1.5", ""] {
            let ended = Command::new(script()).args([flag, value]).output().expect("a shell");
            assert_eq!(ended.status.code(), Some(2), "{flag} {value:?}");
            let stderr = String::from_utf8_lossy(&ended.stderr).into_owned();
            assert_eq!(stderr, format!("error: {flag} takes seconds, not '{value}'\n"));
        }
    }
}

#[test]
fn a_hung_stage_is_killed_and_the_next_one_runs() {
    if !has_python() {
        return;
    }
    let scratch = Scratch::new("gpu-script-hangs");
    let out = scratch.path().join("out");
    let mut script = on_software(&scratch, 1);
    add_tiny_arguments(&mut script, &scratch, "versions conformance-alone conformance-staged");
    let script = script.args(["--stage-seconds", "15"]).arg(&out);
    assert_eq!(script.status().expect("a shell").code(), Some(1));
    assert_states(
        &states(&out),
        &[("versions", "ok"), ("conformance-alone", "timed-out"), ("conformance-staged", "ok")],
    );
}

#[test]
fn an_interrupted_run_reports_the_finished_stages() {
    if !has_python() {
        return;
    }
    let scratch = Scratch::new("gpu-script-ends");
    let out = scratch.path().join("out");
    let mut script = on_software(&scratch, 1);
    add_tiny_arguments(&mut script, &scratch, "versions conformance-alone conformance-staged");
    let mut child = script.arg(&out).stdout(Stdio::piped()).spawn().expect("a shell");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
    // The script prints the name of a stage before it starts the stage.
    assert!(lines.any(|line| line == "== conformance-alone"), "the stage never begins");
    kill_process(Pid::from_child(&child), Signal::TERM).expect("a child");
    lines.for_each(drop);
    assert_eq!(child.wait().expect("a child").code(), Some(1));
    assert_states(&states(&out), &[("versions", "ok"), ("conformance-alone", "interrupted")]);
}
