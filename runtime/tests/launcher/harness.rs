//! Starts the binary in a folder of its own, exchanges lines with its scripts through two named pipes, and waits for
//! processes; every wait has a timeout.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use std::{env, thread};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// A timeout far above the expected time.
pub fn timeout(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A folder for launchers, with the pipes `READY` (from the scripts) and `WAIT` (to the scripts).
pub struct Job {
    folder: tempfile::TempDir,
    ready: Receiver<Vec<u8>>,
    wait: File,
}

impl Job {
    pub fn new() -> Job {
        let folder = tempfile::tempdir().unwrap();
        // A pipe opened for reading and writing never ends, and opening it does not block. `WAIT.none` stays empty.
        let pipe = |name: &str| {
            let path = folder.path().join(name);
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
            OpenOptions::new().read(true).write(true).open(path).unwrap()
        };
        let (ready, wait) = (lines(pipe("ready")), pipe("wait"));
        pipe("wait.none");
        Job { folder, ready, wait }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts `shardflow launch FLAGS -- sh -c SCRIPT`.
    pub fn sh(&self, flags: &[&str], script: &str) -> Running {
        self.sh_with(&[], flags, script)
    }

    pub fn sh_with(&self, variables: &[(&str, &str)], flags: &[&str], script: &str) -> Running {
        let mut command = self.command(env!("CARGO_BIN_EXE_shardflow"));
        command.arg("launch").args(flags).args(["--", "sh", "-c", script]).envs(variables.iter().copied());
        Running::start(command)
    }

    /// Like [`Job::sh`], with SIGHUP ignored as under `nohup`.
    pub fn sh_ignoring_hup(&self, flags: &[&str], script: &str) -> Running {
        let mut command = self.command("sh");
        command.args(["-c", "trap '' HUP; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_shardflow"), "launch"]);
        command.args(flags).args(["--", "sh", "-c", script]);
        Running::start(command)
    }

    /// Starts `shardflow ARGS`.
    pub fn run(&self, args: &[&str]) -> Running {
        self.run_with(&[], args)
    }

    pub fn run_with(&self, variables: &[(&str, &str)], args: &[&str]) -> Running {
        let mut command = self.command(env!("CARGO_BIN_EXE_shardflow"));
        command.args(args).envs(variables.iter().copied());
        Running::start(command)
    }

    /// Like [`Job::sh`], but nothing reads the launcher's output.
    pub fn sh_unread(&self, flags: &[&str], script: &str) -> Unread {
        let mut command = self.command(env!("CARGO_BIN_EXE_shardflow"));
        command.arg("launch").args(flags).args(["--", "sh", "-c", script]);
        Unread { child: command.spawn().unwrap() }
    }

    /// Starts `shardflow ARGS` with pid 1 in its own pid namespace; needs root.
    pub fn as_process_1(&self, args: &[&str]) -> Running {
        let mut command = self.command("unshare");
        command.args(["-pf", "--kill-child", env!("CARGO_BIN_EXE_shardflow")]).args(args);
        Running::start(command)
    }

    fn command(&self, program: &str) -> Command {
        // The test runner may ignore signals, as background jobs of a shell do.
        let mut command = Command::new("env");
        command.args(["--default-signal=HUP,INT,QUIT,TERM", program]);
        command.current_dir(self.folder()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env("READY", self.folder().join("ready")).env("WAIT", self.folder().join("wait"));
        command.env_remove("SHARDFLOW_SECRET").env_remove("SHARDFLOW_SECRET_FILE");
        command
    }

    /// The next line that a script wrote to `READY`.
    pub fn ready(&self) -> String {
        let line = self.ready.recv_timeout(timeout(20)).expect("no script reported that it is ready");
        String::from_utf8(line).unwrap().trim().into()
    }

    /// Writes to the scripts that read `WAIT`.
    pub fn write(&self, text: &str) {
        (&self.wait).write_all(text.as_bytes()).unwrap();
    }

    pub fn log(&self, id: &str, attempt: u64, rank: u32) -> String {
        let path = self.folder().join(format!("shardflow-logs/{id}/attempt-{attempt}/rank-{rank}.log"));
        String::from_utf8_lossy(&fs::read(&path).unwrap()).into()
    }

    /// Number of attempts that have logs.
    pub fn attempts(&self, id: &str) -> usize {
        fs::read_dir(self.folder().join("shardflow-logs").join(id)).unwrap().count()
    }
}

pub struct Running {
    pid: Pid,
    status: Receiver<ExitStatus>,
    /// Lines of standard output.
    pub out: Receiver<Vec<u8>>,
    pub err: Receiver<Vec<u8>>,
}

pub struct Ended {
    /// Exit code; 128 + n for signal n.
    pub code: i32,
    /// Output that was not read before.
    pub out: String,
    pub err: String,
}

impl Running {
    fn start(mut command: Command) -> Running {
        let mut child = command.spawn().unwrap();
        let (out, err) = (lines(child.stdout.take().unwrap()), lines(child.stderr.take().unwrap()));
        let pid = Pid::from_child(&child);
        let (send, status) = channel();
        thread::spawn(move || send.send(Child::wait(&mut child).unwrap()));
        Running { pid, status, out, err }
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }

    pub fn end(self) -> Ended {
        let Ok(status) = self.status.recv_timeout(timeout(30)) else {
            // When the launcher ends, its processes end too.
            self.signal(Signal::KILL);
            let err: Vec<u8> = self.err.iter().flatten().collect();
            panic!("the launcher has not ended: {}", String::from_utf8_lossy(&err));
        };
        let text = |lines: &Receiver<Vec<u8>>| {
            let all: Vec<u8> = lines.iter().flatten().collect();
            String::from_utf8_lossy(&all).into_owned()
        };
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap());
        Ended { code, out: text(&self.out), err: text(&self.err) }
    }
}

/// A running launcher whose output pipes are not read and fill up.
pub struct Unread {
    child: Child,
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

impl Unread {
    /// Reads both pipes to their end.
    pub fn read(&mut self) -> (String, String) {
        let text = |pipe: Box<dyn Read + Send>| lines(pipe);
        let (out, err) = (self.child.stdout.take().unwrap(), self.child.stderr.take().unwrap());
        let [out, err] = [text(Box::new(out)), text(Box::new(err))];
        let all = |lines: Receiver<Vec<u8>>| String::from_utf8(lines.iter().flatten().collect()).unwrap();
        (all(out), all(err))
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Returns the exit code; panics if the launcher does not end.
    pub fn end(&mut self) -> i32 {
        let process = Process::open(self.child.id() as i32);
        assert!(process.ends_before(Instant::now() + timeout(20)), "the launcher has not ended");
        let status = self.child.wait().unwrap();
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
    }
}

/// Receives the lines of a stream until its end.
fn lines(from: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (send, lines) = channel();
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            if send.send(std::mem::take(&mut line)).is_err() {
                return;
            }
        }
    });
    lines
}

/// A process that is not a child of the test. A pidfd identifies it, so its id cannot be reused.
pub struct Process {
    pub pid: i32,
    handle: OwnedFd,
}

impl Process {
    pub fn open(pid: i32) -> Process {
        let handle = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty());
        Process { pid, handle: handle.unwrap_or_else(|error| panic!("process {pid}: {error}")) }
    }

    pub fn kill(&self) {
        kill_process(Pid::from_raw(self.pid).unwrap(), Signal::KILL).unwrap();
    }

    pub fn ends_before(&self, deadline: Instant) -> bool {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap();
        poll(&mut [PollFd::new(&self.handle, PollFlags::IN)], Some(&left)).unwrap() == 1
    }
}

/// Waits for the first child of a process.
pub fn child_of(process: Pid) -> i32 {
    let process = process.as_raw_pid();
    let deadline = Instant::now() + timeout(20);
    while Instant::now() < deadline {
        let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap();
        if let Some(child) = children.split_whitespace().next() {
            return child.parse().unwrap();
        }
        thread::yield_now();
    }
    panic!("process {process} has no child");
}

/// Waits until a process handles a signal.
pub fn wait_for_a_handler(process: i32, signal: u32) {
    let deadline = Instant::now() + timeout(20);
    let is_handled = || {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or_default();
        u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask >> (signal - 1) & 1 == 1)
    };
    while !is_handled() {
        assert!(Instant::now() < deadline, "process {process} has no handler for signal {signal}");
        thread::yield_now();
    }
}

/// The guard of a launcher, which is its child with the command `guard`.
pub fn guard_of(launcher: Pid) -> i32 {
    let launcher = launcher.as_raw_pid();
    let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
    let is_guard = |pid: &&str| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|args| find(&args, b"\0guard\0"));
    children.split_whitespace().find(is_guard).expect("a guard").parse().unwrap()
}

fn find(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

pub fn make_executable(path: &Path) {
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
}
