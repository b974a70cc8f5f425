//! Two hidden commands of the `shardflow` binary. They end the launched processes if the launcher dies.
//!
//! A launcher that is killed by SIGKILL cannot end its processes. So each child sets its parent-death signal before it
//! executes the program ([`become_program`]). The child's own children do not inherit this signal. So a guard process
//! reads all process groups from a pipe, and kills the remaining groups when the launcher's end of the pipe closes
//! ([`guard`]). The guard reaches every process that has not left its group with `setsid`. If the guard itself has
//! ended, the parent-death signal still ends the launched processes.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io::{self, BufRead, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::process::{Pid, Signal, getppid, kill_process_group, set_parent_process_death_signal};

use crate::departure::report;
use crate::exit::Exit;

/// Name prefix of a launcher's private folder. The guard removes only such folders.
pub(super) const FOLDER_PREFIX: &str = "shardflow-launch-";

/// The launcher's handle of a running guard process.
pub(super) struct Guard {
    process: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Starts the command `helper guard`. The guard also removes `folder` when it ends.
    pub(super) fn start(helper: &Path, folder: &Path) -> io::Result<Guard> {
        let mut command = Command::new(helper);
        command.arg("guard").arg("--folder").arg(folder);
        // A terminal sends its signals to the launcher's group, so the guard gets its own group.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn()?;
        let pipe = process.stdin.take();
        Ok(Guard { process, pipe })
    }

    /// Reports that `group` exists (`+`) or is empty (`-`). Call this before the group's leader is reaped: until then,
    /// its id cannot be reused. An error means that the guard has ended; then only the parent-death signal remains.
    pub(super) fn report(&mut self, sign: char, group: Pid) -> io::Result<()> {
        match &mut self.pipe {
            // A pipe writes less than 4096 bytes atomically, so the guard reads a whole line or none.
            Some(pipe) => pipe.write_all(format!("{sign}{}\n", group.as_raw_pid()).as_bytes()),
            None => Ok(()),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.pipe = None;
        // The guard ends when the pipe closes. An error means that it had already ended.
        let _ = self.process.wait();
    }
}

/// The command `shardflow guard`: reads process groups from `from` until EOF, then kills the remaining groups.
pub fn guard(folder: &Path, from: impl BufRead) -> Exit {
    // These signals often go to all processes of a job together, but the guard must outlive the launcher.
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT, signal_hook::consts::SIGHUP] {
        let _ = signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)));
    }
    let mut groups = HashSet::new();
    for line in from.lines().map_while(Result::ok) {
        let Some((sign, number)) = line.split_at_checked(1) else { continue };
        match (sign, number.parse().ok().and_then(Pid::from_raw)) {
            ("+", Some(group)) => drop(groups.insert(group)),
            ("-", Some(group)) => drop(groups.remove(&group)),
            _ => {}
        }
    }
    for group in groups {
        let _ = kill_process_group(group, Signal::KILL);
    }
    if folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with(FOLDER_PREFIX)) {
        // The launcher has usually removed the folder already.
        let _ = std::fs::remove_dir_all(folder);
    }
    Exit::Done
}

/// Returns the command that executes `program` through [`become_program`].
pub fn child_command(helper: &Path, program: &Path, args: &[OsString]) -> Command {
    let mut command = Command::new(helper);
    command.arg("child").arg("--parent").arg(std::process::id().to_string()).arg("--").arg(program).args(args);
    // Each child gets its own process group. So a signal of the terminal reaches the child only once, through the
    // launcher, and the launcher's signals also reach the child's own children.
    command.process_group(0);
    command
}

/// The command `shardflow child`: executes `program`. The kernel kills the program when the launcher's thread ends.
pub fn become_program(parent: u32, program: PathBuf, args: &[OsString]) -> Exit {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return fail(Exit::Internal, &format!("cannot set the parent-death signal: {error}"));
    }
    // The launcher may have ended before this process set its parent-death signal.
    if getppid().map(|pid| pid.as_raw_pid()) != i32::try_from(parent).ok() {
        return fail(Exit::Retry, "the launcher ended");
    }
    let error = Command::new(&program).args(args).exec();
    fail(Exit::Usage, &format!("cannot run {}: {error}", program.display()))
}

fn fail(exit: Exit, cause: &str) -> Exit {
    eprintln!("error: {cause}");
    // If the report cannot be written, the log still contains the line printed above.
    let _ = report(exit, cause, None);
    exit
}
