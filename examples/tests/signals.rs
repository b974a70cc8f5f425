//! Tests requests to save or to end. `gpt` receives them as signals, or when the end time of its Slurm job is near.
//! Also tests output that no one reads.

use std::io::{PipeReader, Read, Write, pipe};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use programs::{Folder, GPT, Running, launcher, signal};

#[path = "support/programs.rs"]
mod programs;

/// Time limit of a run, much longer than any run of these tests takes.
const TIMEOUT: Duration = Duration::from_secs(150);
const MODEL: &str = "--layers 2 --heads 2 --width 16 --context 8 --batch 4 --threads-per-device 1 --data text";
/// A training that needs a signal to end within the timeout.
const ENDLESS: &str = "--sample 0 --steps 10000000 --log-json log";

/// Flag of `env` that resets ignored signals. Tests inherit the signals that a shell ignores in background commands.
const SIGNALS: &str = "--default-signal=HUP,INT,QUIT,TERM";

fn gpt(flags: &str) -> Command {
    let mut command = Command::new("env");
    command
        .args([SIGNALS, GPT])
        .args(MODEL.split_whitespace())
        .args(flags.split_whitespace())
        .env_remove("SLURM_JOB_END_TIME");
    command
}

/// Starts `gpt` as two processes.
fn launch(launch: &str, flags: &str) -> Command {
    let mut command = Command::new("env");
    command
        .arg(SIGNALS)
        .arg(launcher())
        .args(["launch", "--nproc-per-node=2"])
        .args(launch.split_whitespace())
        .arg("--")
        .arg(GPT);
    command.args(MODEL.split_whitespace()).args(["--mesh", "data=2"]).args(flags.split_whitespace());
    command.env_remove("SLURM_JOB_END_TIME");
    command
}

/// Waits until the condition holds.
fn wait_until(event: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "timed out after {TIMEOUT:?}, waiting for {event}");
        thread::yield_now();
    }
}

/// Returns the number of steps in the log. Counts lines without parsing them, because the log may be long.
fn steps(folder: &Folder) -> usize {
    std::fs::read(folder.path().join("log")).unwrap_or_default().iter().filter(|byte| **byte == b'\n').count()
}

/// Waits until this number of steps is in the log.
fn train(folder: &Folder, run: &mut Running, count: usize) {
    wait_until("steps", || {
        assert!(run.child.try_wait().expect("a child").is_none(), "{} {:?}", run.text(), run.end(TIMEOUT));
        steps(folder) >= count
    });
}

/// Returns the steps of the checkpoints in `ck`.
fn checkpoints(folder: &Folder) -> Vec<u64> {
    let entries = std::fs::read_dir(folder.path().join("ck")).into_iter().flatten().flatten();
    let is_complete = |entry: &std::fs::DirEntry| entry.path().join("manifest.json").exists();
    let step = |name: &str| name.strip_prefix("step-")?.parse().ok();
    let names = entries.filter(is_complete).map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut steps: Vec<u64> = names.filter_map(|name| step(&name)).collect();
    steps.sort();
    steps
}

#[test]
fn signals_save_a_checkpoint_and_end_the_training_and_the_hint_is_true() {
    let folder = Folder::new("signals-end");
    for (name, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let mut run = folder.start(&mut gpt(ENDLESS));
        train(&folder, &mut run, 3);
        signal(run.child.id(), name);
        assert_eq!(run.end(TIMEOUT), Some(code), "{name}: {}", run.text());
        let text = run.text();
        assert!(text.contains(&format!("because of SIG{name}; nothing is saved")), "{text}");
        assert!(text.contains("hint: the same command starts from step 0; give --checkpoint DIR"), "{text}");

        std::fs::remove_file(folder.path().join("log")).expect("a log");
        let mut run = folder.start(&mut gpt(&format!("{ENDLESS} --checkpoint ck --checkpoint-every 100000000")));
        train(&folder, &mut run, 3);
        signal(run.child.id(), name);
        assert_eq!(run.end(TIMEOUT), Some(code), "{name}: {}", run.text());
        let (text, step) = (run.text(), *checkpoints(&folder).last().expect("a checkpoint"));
        let error = format!("error: ended after step {step} because of SIG{name}; this step is saved in ck");
        assert!(text.contains(&error) && text.contains("hint: to continue from there, run the same command"), "{text}");
        std::fs::remove_file(folder.path().join("log")).expect("a log");
    }
    assert_eq!(checkpoints(&folder).len(), 3, "each of the three runs saves one checkpoint");
}

#[test]
fn under_the_launcher_an_interrupt_saves_once() {
    let folder = Folder::new("signals-launch");
    let flags = format!("{ENDLESS} --checkpoint ck --checkpoint-every 100000000");
    let mut run = folder.start(&mut launch("--max-restarts 3", &flags));
    train(&folder, &mut run, 3);
    signal(run.child.id(), "INT");
    assert_eq!(run.end(TIMEOUT), Some(130), "{}", run.text());
    assert_eq!(checkpoints(&folder).len(), 1, "{}", run.text());
    assert!(!run.text().contains("interrupted again"), "{}", run.text());
}

/// Starts one of two ranks without the launcher.
fn rank(folder: &Folder, rank: u32, port: u16, prefix: &[&str]) -> Running {
    let inner = gpt(&format!("--mesh data=2 {ENDLESS}"));
    let mut command = Command::new("env");
    command.args(prefix).arg(inner.get_program()).args(inner.get_args());
    let rank = rank.to_string();
    command.envs([("RANK", rank.as_str()), ("LOCAL_RANK", &rank), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")]);
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    folder.start(command.env("SHARDFLOW_SECRET", "of this test only"))
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port()
}

#[test]
fn a_second_interrupt_ends_a_step_that_hangs() {
    let folder = Folder::new("signals-twice");
    let port = free_port();
    let mut runs = [0, 1].map(|number| rank(&folder, number, port, &[]));
    train(&folder, &mut runs[0], 3);
    signal(runs[1].child.id(), "STOP");
    let begin = Instant::now();
    // Several signals that arrive while one is handled count as one, so the test sends more than one.
    wait_until("an end", || {
        let _ = Command::new("kill").args(["-INT", &runs[0].child.id().to_string()]).stderr(Stdio::null()).status();
        runs[0].child.try_wait().expect("a child").is_some()
    });
    let text = runs[0].text();
    assert_eq!(runs[0].end(TIMEOUT), Some(130), "after {:?}: {text}", begin.elapsed());
}

/// Process 1 of a container ignores signals for which it has no handler.
#[test]
fn sigterm_ends_a_process_that_waits_for_others_even_as_process_1() {
    let folder = Folder::new("signals-start");
    let is_root = Command::new("unshare").args(["-pf", "true"]).output().is_ok_and(|output| output.status.success());
    for prefix in [&[][..], &["unshare", "-pf", "--kill-child"]] {
        if !prefix.is_empty() && !is_root {
            eprintln!("SKIPPED: `unshare -pf` needs root");
            continue;
        }
        let mut run = rank(&folder, 0, free_port(), prefix);
        run.until("samples of", TIMEOUT);
        let workers = folder.workers();
        let [pid] = workers[..] else { panic!("one process: {workers:?}") };
        let begin = Instant::now();
        signal(pid, "TERM");
        assert_eq!(run.end(TIMEOUT), Some(143), "{prefix:?}: {}", run.text());
        assert!(begin.elapsed() < Duration::from_secs(10), "{prefix:?}: after {:?}", begin.elapsed());
    }
}

#[test]
fn sigterm_ends_a_process_that_generates_text() {
    let folder = Folder::new("signals-sample");
    let mut run = folder.start(&mut gpt("--steps 1 --sample 10000000"));
    run.until("memory at most", TIMEOUT);
    signal(run.child.id(), "TERM");
    assert_eq!(run.end(TIMEOUT), Some(143), "{}", run.text());
}

#[test]
fn sigusr1_saves_a_checkpoint_and_the_training_continues() {
    let folder = Folder::new("signals-usr1");
    let flags = format!("{ENDLESS} --checkpoint ck --checkpoint-every 100000000 --checkpoint-keep 10");
    let mut run = folder.start(&mut launch("", &flags));
    train(&folder, &mut run, 3);
    signal(run.child.id(), "USR1");
    run.until("on request", TIMEOUT);
    let first = checkpoints(&folder);
    assert!(!first.is_empty(), "{}", run.text());
    // A signal to any one rank is enough. A signal during the step that was just saved needs no new checkpoint.
    for rank in ["RANK=1", "RANK=0"] {
        let before = steps(&folder);
        train(&folder, &mut run, before + 2);
        signal(folder.pid_of(rank).expect("a rank"), "USR1");
        run.until("on request", TIMEOUT);
    }
    assert!(checkpoints(&folder).len() > first.len(), "{}", run.text());
    let before = steps(&folder);
    train(&folder, &mut run, before + 20);
    // The launcher's signal reaches the ranks in one or two steps. Each of the two signals to single ranks saves at
    // most once.
    let saved = checkpoints(&folder);
    assert!(saved.len() <= 4, "a request saved more than one checkpoint: {saved:?}");
    signal(run.child.id(), "TERM");
    assert_eq!(run.end(TIMEOUT), Some(143), "{}", run.text());
    // Without --checkpoint, the training continues after the signal.
    std::fs::remove_file(folder.path().join("log")).expect("a log");
    let mut run = folder.start(&mut gpt(ENDLESS));
    train(&folder, &mut run, 3);
    signal(run.child.id(), "USR1");
    run.until("nothing is saved without --checkpoint", TIMEOUT);
    let before = steps(&folder);
    train(&folder, &mut run, before + 3);
}

#[test]
fn with_on_usr1_end_sigusr1_ends_the_training_and_the_launcher_does_not_restart_it() {
    let folder = Folder::new("signals-usr1-end");
    let flags = format!("{ENDLESS} --checkpoint ck --checkpoint-every 100000000 --on-usr1 end");
    for to_rank in [false, true] {
        let mut run = folder.start(&mut launch("--max-restarts 3", &flags));
        train(&folder, &mut run, 3);
        signal(if to_rank { folder.pid_of("RANK=1").expect("a rank") } else { run.child.id() }, "USR1");
        assert_eq!(run.end(TIMEOUT), Some(75), "{}", run.text());
        let text = run.text();
        let expected = "because of SIGUSR1 or the end of the job's time; this step is saved in ck";
        assert!(text.contains(expected), "{text}");
        assert!(!text.contains("restart 1 of"), "{text}");
        assert_eq!(checkpoints(&folder).len(), 1 + usize::from(to_rank), "{text}");
        std::fs::remove_file(folder.path().join("log")).expect("a log");
    }
}

/// The signal announces the loss of the node, so the program ends although there is no training state to save.
#[test]
fn with_on_usr1_end_sigusr1_ends_a_program_that_does_not_train() {
    let folder = Folder::new("signals-usr1-sample");
    let mut run = folder.start(&mut launch("--max-restarts 3", "--steps 1 --sample 10000000 --on-usr1 end"));
    run.until("memory at most", TIMEOUT);
    signal(run.child.id(), "USR1");
    assert_eq!(run.end(TIMEOUT), Some(75), "{}", run.text());
    assert!(!run.text().contains("restart 1 of"), "{}", run.text());
}

#[test]
fn a_training_ends_before_its_slurm_job_does() {
    let folder = Folder::new("signals-slurm");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_secs();
    let end = |seconds: u64| seconds.to_string();
    let flags = format!("{ENDLESS} --checkpoint ck --checkpoint-every 100000000 --job-end-margin 9998");
    let mut run = folder.start(launch("--max-restarts 3", &flags).env("SLURM_JOB_END_TIME", end(now + 10_000)));
    assert_eq!(run.end(TIMEOUT), Some(75), "{}", run.text());
    assert!(!run.text().contains("restart 1 of") && checkpoints(&folder).len() == 1, "{}", run.text());
    // An end time that is in the past, far in the future or invalid does not end the training.
    for time in [end(now - 10), end(now + 1_000_000), "soon".into()] {
        let mut run = folder.start(gpt("--steps 3 --sample 0").env("SLURM_JOB_END_TIME", time));
        assert_eq!(run.end(TIMEOUT), Some(0), "{}", run.text());
    }
}

/// Starts `gpt` with stdout and stderr in a full pipe.
fn unread(folder: &Folder, flags: &str) -> (Child, PipeReader) {
    let (reader, writer) = pipe().expect("a pipe");
    let mut filler = writer.try_clone().expect("a pipe");
    // This is more than the capacity of a pipe, so the pipe stays full until it is read.
    thread::spawn(move || filler.write_all(&vec![b'.'; 2 << 20]));
    let mut command = gpt(flags);
    command.current_dir(folder.path()).stdin(Stdio::null());
    command.stdout(writer.try_clone().expect("a pipe")).stderr(writer);
    (command.spawn().expect("a program"), reader)
}

#[test]
fn a_stalled_reader_does_not_block_the_training() {
    let folder = Folder::new("signals-unread");
    let (mut child, mut reader) = unread(&folder, "--steps 300 --sample 20 --log-json log --listen 127.0.0.1:0");
    wait_until("the totals", || folder.records("log").last().is_some_and(|last| last["totals"]["steps"] == 300));
    assert!(child.try_wait().expect("a child").is_none(), "after the training it waits for its reader");
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("text");
    assert_eq!(child.wait().expect("an end").code(), Some(0));
    for part in ["watch the training at", "step 300/300", "memory at most", "20 characters written by the model"] {
        assert!(text.contains(part), "no {part:?}: {}", text.trim_start_matches('.'));
    }
    // A process whose reader stalls ends on SIGTERM, during the training and after it.
    for flags in [ENDLESS, "--steps 3 --sample 0 --log-json log"] {
        std::fs::remove_file(folder.path().join("log")).expect("a log");
        let (mut child, _reader) = unread(&folder, flags);
        wait_until("steps", || steps(&folder) > 3);
        signal(child.id(), "TERM");
        wait_until("an end", || child.try_wait().expect("a child").is_some());
        assert_eq!(child.wait().expect("an end").code(), Some(143), "{flags}");
    }
}

#[test]
fn all_records_to_a_pipe_arrive_and_do_not_block_the_training() {
    let folder = Folder::new("signals-records");
    let (reader, writer) = pipe().expect("a pipe");
    let mut command = gpt("--steps 1500 --sample 0 --log-json /dev/stdout --checkpoint ck --checkpoint-every 1500");
    command.current_dir(folder.path()).stdin(Stdio::null()).stdout(writer);
    let mut child = command.spawn().expect("a program");
    // Close this process's end of the pipe. The pipe then ends with the program.
    drop(command);
    wait_until("the last step", || checkpoints(&folder) == [1500]);
    let mut text = String::new();
    { reader }.read_to_string(&mut text).expect("text");
    assert_eq!(child.wait().expect("an end").code(), Some(0));
    let records: Vec<serde_json::Value> = text
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert!((0..1500).all(|step| records[step]["step"] == step) && records.len() == 1501, "{} lines", records.len());
}

#[test]
fn the_log_and_trace_of_a_killed_run_are_readable_and_can_be_continued() {
    let folder = Folder::new("signals-torn");
    let flags = "--sample 0 --checkpoint ck --checkpoint-every 5 --log-json log --trace trace.json";
    let mut run = folder.start(&mut gpt(&format!("{flags} --steps 10000000")));
    train(&folder, &mut run, 30);
    signal(run.child.id(), "KILL");
    assert_eq!(run.end(TIMEOUT), None);
    let trace = |expected: i32| {
        let output = Command::new(launcher()).args(["trace", "trace.json"]).current_dir(folder.path()).output();
        let output = output.expect("it runs");
        assert_eq!(output.status.code(), Some(expected), "{}", String::from_utf8_lossy(&output.stderr));
    };
    trace(0);
    let log = folder.path().join("log");
    let mut file = std::fs::File::options().append(true).open(&log).expect("a log");
    file.write_all(b"{\"step\":31,\"lo").expect("room");
    let steps = checkpoints(&folder).last().expect("a checkpoint") + 3;
    let mut run = folder.start(&mut gpt(&format!("{flags} --steps {steps}")));
    assert_eq!(run.end(TIMEOUT), Some(0), "{}", run.text());
    let text = std::fs::read_to_string(&log).expect("a log");
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    assert_eq!(lines.last().expect("lines")["totals"]["steps"], 3);
    trace(0);
}

#[test]
fn a_trace_ends_at_its_limit() {
    let folder = Folder::new("signals-trace");
    let mut run = folder.start(&mut gpt("--steps 2000 --sample 0 --trace trace.json --trace-mib 1"));
    assert_eq!(run.end(TIMEOUT), Some(0), "{}", run.text());
    assert!(run.text().contains("it has reached --trace-mib 1"), "{}", run.text());
    let text = std::fs::read_to_string(folder.path().join("trace.json")).expect("a trace");
    assert!((1 << 19..1 << 20).contains(&text.len()), "{} bytes", text.len());
    let events: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
    let note = events.iter().find(|event| event["ph"] == "i").expect("a note");
    assert!(note["name"].as_str().is_some_and(|name| name.contains("limit")), "{note}");
    let output = Command::new(launcher()).args(["trace", "trace.json"]).current_dir(folder.path()).output();
    assert_eq!(output.expect("it runs").status.code(), Some(0));
}

/// Without a line end, the shell's prompt would follow the live line.
#[test]
fn an_interrupt_ends_the_live_line_of_a_terminal() {
    let folder = Folder::new("signals-screen");
    let line = format!("env {SIGNALS} {GPT} {MODEL} {ENDLESS}");
    let mut command = Command::new("env");
    command.args(["TERM=xterm", "script", "-qec", &line, "/dev/null"]);
    let mut run = folder.start(&mut command);
    train(&folder, &mut run, 30);
    let [pid] = folder.workers()[..] else { panic!("one program: {:?}", folder.workers()) };
    signal(pid, "INT");
    assert_eq!(run.end(TIMEOUT), Some(130), "{}", run.text());
    let text = run.text();
    let (before, _) = text.split_once("error: ended after step").expect("an error");
    let before = before.trim_end_matches("\r\x1b[K");
    assert!(before.ends_with('\n') || before.ends_with("\r\n"), "{before:?}");
    assert!(before.contains("  ETA "), "{before:?}");
}
