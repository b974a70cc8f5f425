//! `gpt` as several processes under `shardflow launch`: the same bits as in one process, whatever carries them; processes that
//! are killed, frozen or asked to end. Imports nothing of this crate.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

const GPT: &str = env!("CARGO_BIN_EXE_gpt");
/// Longer than any of these runs, by far.
const TIMEOUT: Duration = Duration::from_secs(150);
const MODEL: &str = "--layers 4 --heads 4 --width 32 --context 16 --batch 8 --sample 0 --threads-per-device 1 --data text \
                     --micro-batches 2";

/// A folder of one test with a text in it; removed at the end.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("processes-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("text"), "the quick brown fox jumps over the lazy dog.\n".repeat(40)).unwrap();
        Self(path)
    }

    /// Starts `gpt` as so many processes; 0 is without a launcher.
    fn start(&self, processes: u32, launch: &str, environment: &[(&str, &str)], flags: &str) -> Running {
        let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
        // Cargo puts the programs of all packages into one folder.
        let launcher = Path::new(GPT).with_file_name("shardflow");
        assert!(launcher.is_file(), "{} is not there: build the workspace, not this package alone", launcher.display());
        let mut command = Command::new(if processes == 0 { Path::new(GPT) } else { &launcher });
        if processes > 0 {
            command.arg("launch").arg(format!("--nproc-per-node={processes}")).args(words(launch)).arg("--").arg(GPT);
        }
        command.args(words(MODEL)).args(words(flags)).current_dir(&self.0).envs(environment.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::new(command.spawn().expect("a program that was built"))
    }

    /// Losses by step, as bits, of a log; a step that was done twice must have the same.
    fn losses(&self, log: &str) -> BTreeMap<u64, u64> {
        let text = std::fs::read_to_string(self.0.join(log)).unwrap_or_default();
        let mut losses = BTreeMap::new();
        for line in text.lines() {
            let record: Value = serde_json::from_str(line).unwrap_or(Value::Null);
            if let (Some(step), Some(loss)) = (record["step"].as_u64(), record["loss"].as_f64()) {
                let before = losses.insert(step, loss.to_bits());
                assert!(before.is_none_or(|before| before == loss.to_bits()), "step {step} came out differently");
            }
        }
        losses
    }

    /// Process id of a rank that was started in this folder.
    fn pid_of(&self, rank: u32) -> Option<u32> {
        let here = self.0.canonicalize().ok()?;
        let wanted = format!("RANK={rank}");
        let is_it = |pid: &u32| {
            let of = |name: &str| format!("/proc/{pid}/{name}");
            let environment = std::fs::read(of("environ")).unwrap_or_default();
            let program = std::fs::read_link(of("exe")).unwrap_or_default();
            std::fs::read_link(of("cwd")).is_ok_and(|cwd| cwd == here)
                && program.file_name().is_some_and(|name| name == "gpt")
                && environment.split(|b| *b == 0).any(|variable| variable == wanted.as_bytes())
        };
        let all = std::fs::read_dir("/proc").ok()?.flatten();
        all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(is_it)
    }
}

/// A program that runs, and the lines that it writes.
struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn new(mut child: Child) -> Self {
        let (sender, lines) = channel();
        let read = |pipe: Box<dyn Read + Send>| {
            let sender = sender.clone();
            thread::spawn(move || BufReader::new(pipe).lines().map_while(Result::ok).try_for_each(|l| sender.send(l)));
        };
        read(Box::new(child.stdout.take().expect("piped")));
        read(Box::new(child.stderr.take().expect("piped")));
        Self { child, lines, seen: Vec::new() }
    }

    fn text(&self) -> String {
        self.seen.join("\n")
    }

    /// Reads on until a line holds this.
    fn until(&mut self, text: &str) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else { panic!("no line with {text:?} in:\n{}", self.text()) };
            self.seen.push(line);
            if self.seen.last().is_some_and(|line| line.contains(text)) {
                return;
            }
        }
    }

    /// Reads to the end; gives the exit code.
    fn end(&mut self) -> Option<i32> {
        let deadline = Instant::now() + TIMEOUT;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.seen.push(line);
        }
        assert!(Instant::now() < deadline, "did not end:\n{}", self.text());
        self.child.wait().expect("a child that ends").code()
    }
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().expect("kill is everywhere");
    assert!(sent.success(), "kill -{name} {pid}");
}

#[test]
fn the_bits_are_the_same_in_one_process_and_in_many() {
    let folder = Folder::new("bits");
    let flags = "--mesh data=2,stage=2,tensor=2 --steps 5 --clip 1 --dropout 0.1";
    assert_eq!(folder.start(0, "", &[], &format!("{flags} --log-json one")).end(), Some(0));
    let one = folder.losses("one");
    assert_eq!(one.len(), 5);
    for (processes, transport) in [
        (2, "auto"),
        (2, "tcp"),
        (3, "unix"),
        (4, "auto"),
        (4, "unix"),
        (4, "tcp"),
        (8, "auto"),
        (8, "unix"),
        (8, "tcp"),
    ] {
        let environment = [("SHARDFLOW_TRANSPORT", transport)];
        let mut run = folder.start(processes, "", &environment, &format!("{flags} --log-json many"));
        assert_eq!(run.end(), Some(0), "{processes} by {transport}:\n{}", run.text());
        assert!(folder.losses("many") == one, "{processes} processes by {transport} give other bits");
    }
}

/// One after the other, each rank is killed, or frozen, at another moment.
#[test]
fn a_worker_that_is_killed_or_frozen_is_named_and_survived() {
    let folder = Folder::new("worker");
    let flags = "--mesh data=2,stage=2 --steps 400";
    assert_eq!(folder.start(0, "", &[], &format!("{flags} --log-json one")).end(), Some(0));
    let undisturbed = folder.losses("one");
    for (rank, how, moment) in [(0, "KILL", 61), (1, "KILL", 81), (2, "KILL", 101), (3, "KILL", 121), (1, "STOP", 81)] {
        let flags = format!("{flags} --checkpoint ck-{rank}-{how} --checkpoint-every 20 --log-json log-{rank}-{how}");
        let mut run = folder.start(4, "--max-restarts 1", &[], &flags);
        run.until(&format!("step {moment:>3}/400"));
        let pid = folder.pid_of(rank).unwrap_or_else(|| panic!("no rank {rank}:\n{}", run.text()));
        let begin = Instant::now();
        signal(pid, how);
        run.until(&format!("rank {rank}"));
        let noticed = begin.elapsed();
        assert!(noticed < Duration::from_secs(8), "rank {rank} {how}: noticed after {noticed:?}:\n{}", run.text());
        run.until("going on from step");
        run.until("/400");
        let resumed = begin.elapsed();
        assert!(resumed < Duration::from_secs(30), "rank {rank} {how}: resumed after {resumed:?}:\n{}", run.text());
        assert_eq!(run.end(), Some(0), "rank {rank} {how}:\n{}", run.text());
        let losses = folder.losses(&format!("log-{rank}-{how}"));
        assert!(losses == undisturbed, "rank {rank} {how}: other losses than an undisturbed run");
    }
}

#[test]
fn sigterm_leaves_a_checkpoint_and_ends_with_143() {
    let folder = Folder::new("term");
    let flags = "--mesh data=2,stage=2 --steps 100000 --checkpoint ck --checkpoint-every 1000000";
    let mut run = folder.start(2, "", &[], &format!("{flags} --log-json log"));
    // The text of a run of so many steps comes late; its log does not.
    let deadline = Instant::now() + TIMEOUT;
    while folder.losses("log").len() < 20 {
        assert!(Instant::now() < deadline && run.child.try_wait().expect("a child").is_none(), "{}", run.text());
        thread::yield_now();
    }
    signal(run.child.id(), "TERM");
    assert_eq!(run.end(), Some(143), "{}", run.text());
    assert_eq!(std::fs::read_dir(folder.0.join("ck")).expect("a checkpoint").count(), 1);
}
