//! `gpt` under `mpirun` with collectives by MPI: the losses of one process, within rounding; ranks that are killed or frozen;
//! what is refused. Built only with the feature `mpi`. Imports nothing of this crate.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

const GPT: &str = env!("CARGO_BIN_EXE_gpt");
/// Longer than any of these runs, by far.
const TIMEOUT: Duration = Duration::from_secs(100);
/// From the loss of a rank to the end of all: our heartbeats need 4 s, `mpirun` less.
const NOTICED_WITHIN: Duration = Duration::from_secs(15);
const MODEL: &str = "--layers 4 --heads 4 --width 32 --context 16 --batch 8 --sample 0 --threads-per-device 1 --data text \
                     --clip 1 --dropout 0.1";

/// Relative difference of losses. MPI adds in another order than we do, so that a sum of n values may differ by about
/// n * 6e-8 of its largest; 20 steps of training let that grow. Measured: 2e-7 at most.
const TOLERANCE: f64 = 1e-5;

/// A folder of one test with a text in it; removed at the end.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("mpi-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder for tests");
        std::fs::write(path.join("text"), "the quick brown fox jumps over the lazy dog.\n".repeat(40)).expect("a text");
        Self(path)
    }

    /// A command of these words in this folder, with collectives by `engine`.
    fn start(&self, words: &str, engine: &str) -> Running {
        let mut words = words.split_whitespace();
        let mut command = Command::new(words.next().expect("a program"));
        command.args(words).current_dir(&self.0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env("SHARDFLOW_COLLECTIVES", engine).env("SHARDFLOW_SECRET", "a secret of these tests alone");
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
        Running::new(command.spawn().expect("gpt was built, openmpi-bin is installed"))
    }

    fn mpirun(&self, processes: u32, flags: &str) -> Running {
        let exports = "-x SHARDFLOW_SECRET -x SHARDFLOW_COLLECTIVES";
        self.start(&format!("mpirun --quiet --oversubscribe -n {processes} {exports} {GPT} {MODEL} {flags}"), "mpi")
    }

    fn losses(&self, log: &str) -> Vec<f64> {
        let text = std::fs::read_to_string(self.0.join(log)).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?["loss"].as_f64()).collect()
    }

    /// Process id of a rank that was started in this folder.
    fn pid_of(&self, rank: u32) -> Option<u32> {
        let here = self.0.canonicalize().ok()?;
        let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
        let is_it = |pid: &u32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == here)
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
}

impl Drop for Running {
    fn drop(&mut self) {
        // Not SIGKILL, which `mpirun` cannot pass on.
        if self.child.try_wait().is_ok_and(|end| end.is_none()) {
            signal(self.child.id(), "TERM");
            let _ = self.child.wait();
        }
    }
}

impl Running {
    fn new(mut child: Child) -> Self {
        let (sender, lines) = channel();
        let (out, errors) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let other = sender.clone();
        thread::spawn(move || BufReader::new(out).lines().map_while(Result::ok).try_for_each(|l| other.send(l)));
        thread::spawn(move || BufReader::new(errors).lines().map_while(Result::ok).try_for_each(|l| sender.send(l)));
        Self { child, lines }
    }

    /// Reads to the end; gives the exit code and what was written.
    fn end(&mut self, within: Duration) -> (Option<i32>, String) {
        let (deadline, mut text) = (Instant::now() + within, String::new());
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            text = text + &line + "\n";
        }
        assert!(Instant::now() < deadline, "did not end within {within:?}:\n{text}");
        (self.child.wait().expect("a child that ends").code(), text)
    }
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().expect("kill is everywhere");
    assert!(sent.success(), "kill -{name} {pid}");
}

#[test]
fn losses_are_those_of_one_process_within_rounding() {
    let folder = Folder::new("losses");
    let meshes = ["data=4", "tensor=4", "data=2,stage=2,tensor=2 --micro-batches 2"];
    for (number, mesh) in meshes.into_iter().enumerate() {
        let flags = format!("--steps 20 --mesh {mesh}");
        let (one, many) = (format!("one-{number}"), format!("many-{number}"));
        let (code, text) = folder.start(&format!("{GPT} {MODEL} {flags} --log-json {one}"), "own").end(TIMEOUT);
        assert_eq!(code, Some(0), "{text}");
        let expected = folder.losses(&one);
        assert_eq!(expected.len(), 20);
        // By two processes, groups of four go by our own engines, and those of two may go by MPI.
        for processes in [2, 4] {
            let (code, text) = folder.mpirun(processes, &format!("{flags} --log-json {many}")).end(TIMEOUT);
            assert_eq!(code, Some(0), "{mesh} by {processes}:\n{text}");
            let losses = folder.losses(&many);
            assert_eq!(losses.len(), 20, "{mesh} by {processes}:\n{text}");
            let off = losses.iter().zip(&expected).map(|(a, b)| (a - b).abs() / b.abs()).fold(0.0, f64::max);
            println!("{mesh} by {processes}: losses differ by {off:.1e}");
            assert!(off <= TOLERANCE, "{mesh} by {processes}: {off}: {losses:?}, in one process {expected:?}");
        }
    }
}

#[test]
fn a_rank_that_is_killed_or_frozen_ends_all_in_time_and_not_with_0() {
    let folder = Folder::new("lost");
    for (rank, how) in [(1, "KILL"), (3, "KILL"), (2, "STOP")] {
        let log = format!("log-{rank}-{how}");
        let mut run = folder.mpirun(4, &format!("--mesh data=2,tensor=2 --steps 100000 --log-json {log}"));
        let deadline = Instant::now() + TIMEOUT;
        while folder.losses(&log).len() < 20 {
            assert!(Instant::now() < deadline && run.child.try_wait().expect("a child").is_none(), "{rank} {how}");
            thread::yield_now();
        }
        let pid = folder.pid_of(rank).expect("a rank that runs");
        signal(pid, how);
        let began = Instant::now();
        let (code, text) = run.end(NOTICED_WITHIN);
        println!("rank {rank} {how}: all ended after {:?} with {code:?}", began.elapsed());
        assert!(code.is_some_and(|code| code != 0), "rank {rank} {how}: {code:?}\n{text}");
        assert!((0..4).all(|rank| folder.pid_of(rank).is_none()), "rank {rank} {how}: some are left");
    }
}

#[test]
fn what_mpi_does_not_know_is_refused() {
    let folder = Folder::new("refused");
    // Ours start the processes, so that each is alone to MPI.
    let flags = "--mesh data=2 --steps 2";
    let launcher = Path::new(GPT).with_file_name("shardflow");
    if launcher.is_file() {
        let launch = format!("{} launch --nproc-per-node 2 -- {GPT} {MODEL} {flags}", launcher.display());
        let (code, text) = folder.start(&launch, "mpi").end(TIMEOUT);
        assert_eq!(code, Some(78), "{text}");
        assert!(text.contains("start the processes by `mpirun -n 2`"), "{text}");
    } else {
        println!("SKIPPED the launcher: {} is not there", launcher.display());
    }
    let (code, text) = folder.start(&format!("{GPT} {MODEL} {flags}"), "nccl").end(TIMEOUT);
    assert!(code == Some(78) && text.contains("expected own or mpi"), "{code:?} {text}");
}
