//! Runs the built programs as a user would: their errors, their output, and the files they leave.

use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use programs::{GPT, launcher};
use serde_json::Value;

#[path = "support/programs.rs"]
mod programs;

/// A tiny model and batch.
const TINY: &str = "--layers 2 --heads 2 --width 16 --context 8 --batch 4 --steps 4 --sample 0 --threads-per-device 1";
/// Time limit of a run, much longer than any run of these tests takes.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Exit code and output of a program.
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

/// Runs a program in a folder until it ends; kills it at the timeout.
fn run(program: &str, folder: &Path, args: &[&str]) -> Run {
    let mut command = Command::new(program);
    command.args(args).current_dir(folder).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("a program that was built");
    let (sender, receiver) = channel();
    let read = |mut pipe: Box<dyn Read + Send>, index: usize| {
        let sender = sender.clone();
        thread::spawn(move || {
            let mut text = String::new();
            let _ = pipe.read_to_string(&mut text);
            let _ = sender.send((index, text));
        });
    };
    read(Box::new(child.stdout.take().expect("piped")), 0);
    read(Box::new(child.stderr.take().expect("piped")), 1);
    let mut texts = [String::new(), String::new()];
    for _ in 0..2 {
        let Ok((index, text)) = receiver.recv_timeout(TIMEOUT) else {
            let _ = child.kill();
            panic!("{program} {args:?} did not end within {TIMEOUT:?}");
        };
        texts[index] = text;
    }
    let code = child.wait().expect("a child that ends").code().unwrap_or(-1);
    let [stdout, stderr] = texts;
    Run { code, stdout, stderr }
}

/// The folder of one test.
struct Folder(programs::Folder);

impl Folder {
    fn new(name: &str) -> Self {
        Self(programs::Folder::new(&format!("cli-{name}")))
    }

    /// Runs `gpt` in this folder with the tiny model and the text. `flags` override the default flags. No path contains
    /// a space.
    fn gpt(&self, flags: &str) -> Run {
        let own: Vec<&str> = flags.split_whitespace().collect();
        let defaults: Vec<&str> = TINY.split_whitespace().chain(["--data", "text"]).collect();
        let kept = defaults.chunks(2).filter(|pair| !own.contains(&pair[0])).flatten().copied();
        run(GPT, self.0.path(), &kept.chain(own.iter().copied()).collect::<Vec<_>>())
    }

    /// Runs `gpt`, which must succeed, and returns its JSON log.
    fn log(&self, flags: &str) -> Vec<Value> {
        let run = self.gpt(&format!("{flags} --log-json log"));
        assert_eq!(run.code, 0, "{flags}: {}", run.stderr);
        let text = std::fs::read_to_string(self.0.path().join("log")).unwrap();
        // A later run must not read this log.
        std::fs::remove_file(self.0.path().join("log")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Returns the losses of a run, which must succeed. JSON keeps floats exact, so equal numbers have equal bits.
    fn losses(&self, flags: &str) -> Vec<f64> {
        self.log(flags).iter().filter_map(|line| line["loss"].as_f64()).collect()
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// Each case has flags, a part of the `error: ` line, and a part of the lines below it. Each run must end with `code`
/// before it trains. It must not leave a file, although its flags request a log and parameters.
fn check_errors(folder: &Folder, code: i32, cases: &[(&str, &str, &str)]) {
    let before = folder.files();
    for (flags, error, help) in cases {
        let outputs = [("--save", "--save model"), ("--log-json", "--log-json log")];
        let outputs = outputs.iter().filter(|(flag, _)| !flags.contains(flag)).map(|(_, all)| *all);
        let run = folder.gpt(&format!("{flags} {}", outputs.collect::<Vec<_>>().join(" ")));
        assert_eq!(run.code, code, "{flags}: {}", run.stderr);
        let (first, rest) = run.stderr.split_once('\n').unwrap();
        assert!(first.starts_with("error: ") && first.contains(error), "{flags}: {first}");
        assert!(rest.contains(help), "{flags}: {rest}");
        assert!(!run.stdout.contains("loss"), "{flags}: {}", run.stdout);
        assert_eq!(folder.files(), before, "{flags}");
    }
}

#[test]
fn unusable_flags_and_files_are_usage_errors() {
    let folder = Folder::new("usage");
    std::fs::write(folder.0.path().join("empty"), "").unwrap();
    std::fs::write(folder.0.path().join("short"), "too short").unwrap();
    std::fs::create_dir(folder.0.path().join("folder")).unwrap();
    std::os::unix::fs::symlink("same", folder.0.path().join("link")).unwrap();
    check_errors(
        &folder,
        2,
        &[
            ("--data missing", "cannot read data file missing", "--data"),
            ("--data folder", "cannot read data file folder", "--data"),
            ("--data empty", "data file empty is empty", "--data"),
            ("--data short", "short is too short: 9 bytes", "smaller --context"),
            ("--layer 3", "--layer", "'--layers'"),
            ("--layers three", "'three' for '--layers", "--help"),
            ("--lr NaN", "--lr must be finite", "--help"),
            ("--lr abc", "'abc' for '--lr <X>': expected a number", "--help"),
            ("--checkpoint text/x", "--checkpoint text/x", "hint: give a folder, or a path where one can be created"),
            ("--listen 192.0.2.1:80", "--listen cannot listen on 192.0.2.1:80", "an address of this machine"),
            ("--trace no/t.json", "cannot write no/t.json", "a folder that exists"),
            ("--trace text", "--data and --trace are the same file text", ""),
            ("--width 15", "--width 15 is not a multiple of --heads 2", "--width 16"),
            ("--mesh expert=2", "unknown mesh axis \"expert\": expected data, stage or tensor", "--help"),
            ("--mesh data", "is not a list of axis=size", "--help"),
            ("--schedule zigzag", "'zigzag' for '--schedule", "gpipe, 1f1b"),
            ("--threads-per-device 65", "--threads-per-device must be at most 64, got 65", "--help"),
            ("--save no/such/model", "cannot write no/such/model", "a folder that exists"),
            ("--save folder", "cannot write folder", "not a folder"),
            ("--save new/", "cannot write new/: it ends with a slash", "not a folder"),
            ("--save short/", "cannot write short/: it ends with a slash", "not a folder"),
            ("--trace new/", "cannot write new/: it ends with a slash", "not a folder"),
            ("--log-json new/", "cannot write new/: it ends with a slash", "not a folder"),
            ("--save text", "--data and --save are the same file", "--save"),
            ("--log-json ./text", "--data and --log-json are the same file", "--log-json"),
            ("--save same --log-json same", "--save and --log-json are the same file", "--log-json"),
            ("--save same --log-json ./same", "--save and --log-json are the same file", "--log-json"),
            ("--log-json same --trace folder/../same", "--log-json and --trace are the same file", "--trace"),
            ("--save link --log-json same", "--save and --log-json are the same file", "--log-json"),
            ("--context 18446744073709551615", "text is too short", "smaller --context"),
            ("--log-json no/such/log", "cannot write no/such/log", "a folder that exists"),
            ("--log-json folder", "cannot write folder", "not a folder"),
            ("--init-from missing", "--init-from missing", "gpt --save"),
            ("--init-from text", "text: not a complete safetensors file", "gpt --save"),
        ],
    );
}

#[test]
fn impossible_plans_are_refused() {
    check_errors(
        &Folder::new("refused"),
        78,
        &[
            ("--layers 3 --mesh stage=2", "--layers 3 is not a multiple of --mesh stage=2", "--layers 4"),
            ("--batch 1152921504606846976", "more elements than any device can hold", "--help"),
            ("--batch 40000 --micro-batches 40000", "micro_batches is 40000", "--help"),
            ("--batch 4 --micro-batches 3", "--batch 4 is not a multiple of --micro-batches 3", "--batch 6"),
            ("--layers 99999999999", "99999999999 layers, but the maximum is 1024", "--help"),
            ("--memory-mib 1 --width 64", "does not fit: each device may use 1048576 bytes", "device 0: "),
            // This model needs at least 13 TB.
            ("--width 262144 --memory-mib 4096", "does not fit", "--memory-mib"),
        ],
    );
}

#[test]
fn explain_prints_the_plan_and_stops() {
    let folder = Folder::new("explain");
    let run = folder.gpt("--explain --mesh stage=2 --micro-batches 2 --save model --log-json log");
    assert_eq!((run.code, run.stderr.as_str()), (0, ""));
    for part in
        ["mesh data=1,stage=2,tensor=1: 2 devices; 1f1b, 2 micro-batches", "h.1.mlp.fc.weight", "memory (bytes)"]
    {
        assert!(run.stdout.contains(part), "no {part:?} in {}", run.stdout);
    }
    assert!(!run.stdout.contains("step 1/"), "{}", run.stdout);
    assert_eq!(folder.files(), ["text"]);
}

#[test]
fn the_log_contains_every_step_and_the_totals() {
    let folder = Folder::new("log");
    let log = folder.log("--steps 30 --lr 1e-2 --mesh data=2 --micro-batches 2");
    assert_eq!(log.len(), 31);
    for (step, line) in log[..30].iter().enumerate() {
        assert_eq!(line["step"], step);
        for key in ["loss", "grad_norm", "step_seconds", "tokens_per_second"] {
            assert!(line[key].as_f64().is_some_and(|n| n > 0.0), "{key} in {line}");
        }
    }
    let loss = |step: usize| log[step]["loss"].as_f64().unwrap();
    // At first all 29 different letters have the same probability.
    assert!((loss(0) - 29f64.ln()).abs() < 0.2 && loss(29) < 0.8 * loss(0), "first {}, last {}", loss(0), loss(29));
    let totals = &log[30]["totals"];
    assert_eq!((&totals["steps"], &totals["tokens"]), (&30.into(), &(30 * 4 * 8).into()));
    assert_eq!(totals["final_loss"], log[29]["loss"]);
    let devices = totals["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 2);
    for (rank, device) in devices.iter().enumerate() {
        let bytes = |key: &str| device[key].as_u64().unwrap();
        let (planned, measured) = (bytes("planned_peak_bytes"), bytes("measured_peak_bytes"));
        assert_eq!(device["device"], rank);
        assert!(measured > 0 && measured <= planned, "measured {measured} bytes, planned {planned} bytes");
    }
}

#[test]
fn a_stream_that_loses_records_ends_the_run() {
    let run = Folder::new("full").gpt("--log-json /dev/full");
    assert_eq!(run.code, 73, "{}", run.stderr);
    assert!(run.stderr.contains("error: cannot write log /dev/full: No space left on device"), "{}", run.stderr);
}

/// `gpt` must write the log through its open stdout. If it opened `/dev/stdout` again, the log would have a separate
/// file position, and would overwrite other lines.
#[test]
fn the_log_can_go_to_the_file_of_standard_output() {
    let folder = Folder::new("stdout");
    let flags: Vec<&str> = TINY.split_whitespace().chain(["--data", "text", "--log-json", "/dev/stdout"]).collect();
    let path = folder.0.path().join("output");
    let output = std::fs::File::create(&path).unwrap();
    let mut command = Command::new(GPT);
    let code = command.args(flags).current_dir(folder.0.path()).stdout(output).status().unwrap().code();
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(code, Some(0), "{text}");
    let records = text.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count();
    let progress = text.lines().filter(|line| line.starts_with("step ") && line.contains("loss")).count();
    assert_eq!((records, progress), (5, 4), "{text}");
    assert!(text.starts_with("text ") && !text.contains('\0'), "{text:?}");
}

#[test]
fn a_run_can_start_from_saved_parameters() {
    let folder = Folder::new("save");
    let first = folder.losses("--steps 30 --lr 1e-2 --save model");
    // Files contain whole tensors, so another mesh can read them.
    let second = folder.losses("--init-from model --mesh data=2,tensor=2");
    assert!(second[0] < 0.8 * first[0], "{} then {}", first[0], second[0]);
    let again = folder.losses("--init-from model --seed 1");
    assert!((again[0] - second[0]).abs() < 1e-4, "{} {}", again[0], second[0]);

    std::fs::rename(folder.0.path().join("model"), folder.0.path().join("good")).unwrap();
    let mut bytes = std::fs::read(folder.0.path().join("good")).unwrap();
    std::fs::write(folder.0.path().join("cut"), &bytes[..bytes.len() / 2]).unwrap();
    check_errors(
        &folder,
        2,
        &[
            ("--init-from good --width 32", "its width is 16, but this program has 32", "--width"),
            ("--init-from good --layers 3", "its layers is 2, but this program has 3", "--layers"),
            ("--init-from cut", "cut: not a complete safetensors file", "gpt --save"),
        ],
    );
    // The file begins with 8 bytes for the header's length, and the header. The tensors follow.
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[header..].chunks_exact_mut(4).for_each(|element| element.copy_from_slice(&f32::NAN.to_le_bytes()));
    std::fs::write(folder.0.path().join("nan"), &bytes).unwrap();
    let run = folder.gpt("--init-from nan");
    assert_eq!(run.code, 80, "{}", run.stderr);
    assert!(
        run.stderr.contains("error: step 1 is not finite") && run.stderr.contains(" (parameter), "),
        "{}",
        run.stderr
    );
    let hint = "hint: the loaded file or checkpoint has parameters with Inf or NaN: give another one\n";
    assert!(run.stderr.ends_with(hint), "{}", run.stderr);
}

#[test]
fn a_checkpoint_replaces_saved_parameters() {
    let folder = Folder::new("resumed");
    assert_eq!(folder.gpt("--steps 1 --save model").code, 0);
    let run = |steps: u64| folder.gpt(&format!("--init-from model --checkpoint c --steps {steps}"));
    let first = run(2);
    assert!(
        first.stderr.contains("optimizer state is fresh") && !first.stderr.contains("not used"),
        "{}",
        first.stderr
    );
    let second = run(3);
    assert_eq!(second.code, 0, "{}", second.stderr);
    for (text, is_printed) in
        [("continuing from step 2", true), ("--init-from model is not used", true), ("optimizer state is fresh", false)]
    {
        assert_eq!(second.stderr.contains(text), is_printed, "{text}: {}", second.stderr);
    }
    assert!(second.stdout.contains("\n1 step in "), "{}", second.stdout);
}

#[test]
fn an_error_in_a_trace_names_the_file() {
    let folder = Folder::new("trace-error");
    let run = run(launcher().to_str().unwrap(), folder.0.path(), &["trace", "text"]);
    assert_eq!(run.code, 65, "{}", run.stderr);
    assert!(run.stderr.starts_with("error: text is not a trace written by Shardflow: "), "{}", run.stderr);
}

#[test]
fn a_repeated_run_gives_the_same_bits() {
    let folder = Folder::new("bits");
    let mesh = "--mesh data=2,stage=2,tensor=2 --micro-batches 2";
    let first = folder.losses(mesh);
    assert_eq!(first.len(), 4);
    assert_eq!(folder.losses(mesh), first);
    assert_eq!(folder.losses(&format!("{mesh} --schedule gpipe")), first);
    assert_ne!(folder.losses(&format!("{mesh} --seed 1")), first);
    let one = folder.losses("");
    assert!(one.iter().zip(&first).all(|(a, b)| (a - b).abs() < 1e-4), "one device {one:?}, eight devices {first:?}");
    let pipeline = folder.losses("--mesh stage=2 --micro-batches 2");
    assert_eq!(folder.losses("--micro-batches 2"), pipeline);
    let dropped = folder.losses("--dropout 0.2 --clip 0.5");
    assert_ne!(dropped, one);
    assert!(dropped.iter().all(|loss| loss.is_finite()));
}

#[test]
fn the_trained_model_generates_text() {
    let folder = Folder::new("sample");
    let generate = |flags: &str| {
        let run = folder.gpt(flags);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(run.stdout.contains(" 100/100  loss "), "{}", run.stdout);
        let (_, text) = run.stdout.split_once("90 characters written by the model:\n").unwrap();
        text.to_string()
    };
    let flags = "--steps 100 --lr 2e-2 --sample 90";
    let text = generate(flags);
    assert_eq!(text.len(), 91, "{text}");
    // The text repeats one sentence of nine words.
    let words = "the quick brown fox jumps over the lazy dog.";
    let known = text.split_whitespace().filter(|word| words.split(' ').any(|w| w == *word)).count();
    assert!(known >= 6, "{known} words of the text in {text}");
    assert_eq!(generate(flags), text);
}

#[test]
fn the_other_programs_run() {
    let folder = Folder::new("others");
    for (program, last) in [
        (env!("CARGO_BIN_EXE_first_steps"), "step 100  loss 0.6"),
        (env!("CARGO_BIN_EXE_custom_kernel"), "mesh data=2,tensor=2: losses agree"),
    ] {
        let run = run(program, folder.0.path(), &[]);
        assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{program}");
        assert!(run.stdout.lines().last().is_some_and(|line| line.starts_with(last)), "{}", run.stdout);
    }
}

#[test]
fn the_readme_shows_the_function_train_of_first_steps() {
    let read = |path| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("a file");
    let program = read("src/bin/first_steps.rs");
    let (_, train) = program.split_once("fn train()").expect("a function");
    let body =
        train.split("\n}\n").next().unwrap().lines().skip(1).map(|line| line.strip_prefix("    ").unwrap_or(line));
    let body: Vec<&str> = body.collect();
    assert!(body.len() > 20 && read("../README.md").contains(&body.join("\n")), "{}", body.join("\n"));
}

#[test]
fn small_programs_ignore_that_a_pipe_is_closed() {
    for program in [env!("CARGO_BIN_EXE_first_steps"), env!("CARGO_BIN_EXE_custom_kernel")] {
        let mut command = Command::new(program);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("it ends");
        assert_eq!((output.status.code(), &*String::from_utf8_lossy(&output.stderr)), (Some(0), ""), "{program}");
    }
}

/// With this learning rate, the first update leaves weights whose products overflow f32.
#[test]
fn a_training_that_overflows_follows_its_policy_and_names_the_tensor() {
    let folder = Folder::new("blows-up");
    let args = "--lr 1e30 --steps 100";
    let first = "step 2 is not finite, loss ";
    for (policy, expected, warnings) in [
        ("", first, 0),
        ("--on-non-finite skip", "step 12 is not finite", 10),
        (
            "--on-non-finite rollback --checkpoint ck --checkpoint-every 1",
            "rolled back 3 times to step 1 without success: step 2",
            4,
        ),
    ] {
        let run = folder.gpt(&format!("{args} {policy}"));
        assert_eq!(run.code, 80, "{policy}: {}", run.stderr);
        let last = run.stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(last.contains(expected), "{policy}: {}", run.stderr);
        assert!(
            last.contains(" Inf or NaN is layer_norm_grad") && last.contains("elements on device 0 ("),
            "{policy}: {}",
            run.stderr
        );
        let printed = run.stderr.lines().filter(|line| line.starts_with("warning: step ")).count();
        assert_eq!(printed, warnings, "{policy}: {}", run.stderr);
    }
}

#[test]
fn a_training_serves_its_page_writes_a_trace_and_shows_its_plan() {
    let folder = Folder::new("watched");
    let ended = folder.gpt("--listen 127.0.0.1:0 --trace trace.json --mesh data=2");
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stderr.contains("watch the training at http://127.0.0.1:"), "{}", ended.stderr);
    let trace = std::fs::read_to_string(folder.0.path().join("trace.json")).unwrap();
    let events: Vec<Value> = serde_json::from_str(&trace).unwrap();
    let forwards = events.iter().filter(|event| event["ph"] == "X" && event["name"] == "forward").count();
    assert_eq!(forwards, 2 * 4, "two devices, four steps");
    // `plan` accepts the command line of a running job, even without the job's GPUs and while its port is in use.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut program = vec!["--", GPT, "--data", "text"];
    program.extend(TINY.split_whitespace());
    program.extend(["--device", "cuda", "--mesh", "data=4", "--listen", &address]);
    let plan = |flags: &[&str]| {
        let args: Vec<&str> = ["plan"].iter().chain(flags).chain(&program).copied().collect();
        let ended = run(launcher().to_str().unwrap(), folder.0.path(), &args);
        assert_eq!((ended.code, &*ended.stderr), (0, ""), "{}", ended.stdout);
        ended.stdout
    };
    assert_eq!(
        plan(&["--html", "page.html", "--dot", "plan.dot"]),
        "the plan is in page.html\nthe plan is in plan.dot\n"
    );
    assert!(plan(&[]).contains("devices [0, 1, 2, 3]"));
    for (file, part) in [("page.html", "device 0 compute"), ("plan.dot", "digraph")] {
        assert!(std::fs::read_to_string(folder.0.path().join(file)).unwrap().contains(part), "{file}");
    }
    // No process listens there any more.
    drop(taken);
    for command in ["status", "explain-hang"] {
        let ended = run(launcher().to_str().unwrap(), folder.0.path(), &[command, "--at", &address]);
        let expected = format!("nothing is served at {address}");
        assert!(ended.code == 69 && ended.stderr.contains(&expected), "{}", ended.stderr);
    }
}

#[test]
fn a_terminal_gets_a_live_line_and_a_pipe_gets_plain_lines() {
    let folder = Folder::new("progress");
    let flags = format!("{} --data text", TINY.replace("--steps 4", "--steps 50"));
    let last = |text: &str| text.lines().filter(|line| line.contains("step 50/50  loss ")).count();
    let piped = run(GPT, folder.0.path(), &flags.split_whitespace().collect::<Vec<_>>());
    assert!(!piped.stdout.contains(['\r', '\x1b']), "{:?}", piped.stdout);
    let lines: Vec<&str> =
        piped.stdout.lines().filter(|line| line.starts_with("step ") && line.contains("loss")).collect();
    // The first step, then every second step, and the last step are printed.
    assert_eq!((lines.len(), last(&piped.stdout)), (26, 1), "{}", piped.stdout);
    // `script` runs the program in a terminal.
    let on_terminal = |kind: &str| {
        let command = format!("{GPT} {flags}");
        run("env", folder.0.path(), &[&format!("TERM={kind}"), "script", "-qec", &command, "/dev/null"])
    };
    let screen = on_terminal("xterm");
    assert_eq!((screen.code, last(&screen.stdout)), (0, 1), "{:?}", screen.stdout);
    // Each permanent line replaces the live line.
    let shown: Vec<&str> = screen.stdout.lines().filter(|line| line.contains("loss")).collect();
    assert_eq!(shown.len(), 26, "{:?}", screen.stdout);
    assert!(shown.iter().all(|line| line.starts_with("\r\x1b[K") && line.contains("  ETA 0:")), "{shown:?}");
    let dumb = on_terminal("dumb");
    assert!(!dumb.stdout.contains('\x1b') && dumb.stdout.contains("step  3/50"), "{:?}", dumb.stdout);
}

/// Users copy these programs, so an error must be one readable line with its exit code. A program that ends early for
/// `shardflow plan` has not failed.
#[test]
fn small_programs_print_readable_errors() {
    let folder = Folder::new("small-programs");
    for program in [env!("CARGO_BIN_EXE_first_steps"), env!("CARGO_BIN_EXE_custom_kernel")] {
        let run_with = |variable: &str, value: &Path| {
            let output = Command::new(program).env(variable, value).output().expect("it starts");
            (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
        };
        let (page, plan) = (folder.0.path().join("nowhere/plan.html"), folder.0.path().join("plan"));
        let expected =
            format!("error: cannot write the plan to {}: No such file or directory (os error 2)\n", page.display());
        assert_eq!(run_with("SHARDFLOW_PLAN_HTML", &page), (Some(2), expected), "{program}");
        assert_eq!(run_with("SHARDFLOW_PLAN_TEXT", &plan), (Some(0), String::new()), "{program}");
    }
}

/// A program that does not read its cluster from the environment trains alone, even if a launcher has started it.
#[test]
fn a_rank_that_trains_alone_prints_a_warning() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_first_steps"));
    let variables = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29400")];
    command.envs(variables).env("SHARDFLOW_SECRET", "a secret of these tests");
    let output = command.output().expect("a program that was built");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.starts_with("warning: rank 1 of 2 trains alone: "), "{stderr}");
}
