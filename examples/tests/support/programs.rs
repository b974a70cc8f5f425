//! Helpers for tests of whole programs: a folder with a text, the programs that run there and their output.
#![allow(dead_code, reason = "no test uses all helpers")]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

pub const GPT: &str = env!("CARGO_BIN_EXE_gpt");

/// Returns the path of the launcher. Cargo puts the programs of all packages into one folder.
pub fn launcher() -> PathBuf {
    let launcher = Path::new(GPT).with_file_name("shardflow");
    assert!(launcher.is_file(), "{} does not exist: build the whole workspace", launcher.display());
    launcher
}

/// The folder of one test, with a file `text`. Dropping this value removes the folder.
pub struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Folder {
    pub fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder for tests");
        std::fs::write(path.join("text"), "the quick brown fox jumps over the lazy dog.\n".repeat(40)).expect("a text");
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the complete lines of a log so far.
    pub fn records(&self, log: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.0.join(log)).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Returns the process ids of the `gpt` processes in this folder.
    pub fn workers(&self) -> Vec<u32> {
        let folder = self.0.canonicalize().expect("the folder exists");
        let is_worker = |pid: &u32| {
            let link = |name: &str| std::fs::read_link(format!("/proc/{pid}/{name}")).unwrap_or_default();
            link("cwd") == folder && link("exe").file_name().is_some_and(|name| name == "gpt")
        };
        let entries = std::fs::read_dir("/proc").expect("Linux").flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_worker).collect()
    }

    /// Returns the process id of the `gpt` process with this variable in its environment, such as `RANK=1`.
    pub fn pid_of(&self, variable: &str) -> Option<u32> {
        let has_variable = |pid: &u32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|b| *b == 0).any(|other| other == variable.as_bytes())
        };
        self.workers().into_iter().find(has_variable)
    }

    /// Starts a command in this folder.
    pub fn start(&self, command: &mut Command) -> Running {
        command.current_dir(&self.0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::new(command.spawn().expect("a program that exists"))
    }
}

/// A running program, and the lines that it writes.
pub struct Running {
    pub child: Child,
    /// Signal that is sent to the program on drop.
    pub last_signal: &'static str,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|end| end.is_none()) {
            signal(self.child.id(), self.last_signal);
            let _ = self.child.wait();
        }
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
        Self { child, last_signal: "KILL", lines, seen: Vec::new() }
    }

    /// Returns the output that was read so far.
    pub fn text(&self) -> String {
        self.seen.join("\n")
    }

    /// Reads lines until one contains this text.
    pub fn until(&mut self, text: &str, within: Duration) {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else { panic!("no line with {text:?} in:\n{}", self.text()) };
            self.seen.push(line);
            if self.seen.last().is_some_and(|line| line.contains(text)) {
                return;
            }
        }
    }

    /// Reads to the end, and returns the exit code.
    pub fn end(&mut self, within: Duration) -> Option<i32> {
        let deadline = Instant::now() + within;
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.seen.push(line);
        }
        assert!(Instant::now() < deadline, "the program did not end within {within:?}:\n{}", self.text());
        self.child.wait().expect("a child that ends").code()
    }
}

pub fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().expect("`kill` exists");
    assert!(sent.success(), "kill -{name} {pid}");
}
