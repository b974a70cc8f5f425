//! Prevents children from outliving the launcher, with two hidden commands of the binary.
//!
//! A launcher that is killed by SIGKILL cannot end its processes. So each child sets its parent-death signal before it
//! executes the program ([`become_program`]). The child's own children do not inherit that, so a guard process reads
//! all process groups from a pipe of the launcher and kills the remaining ones when the pipe closes ([`guard`]). The
//! signal needs no other process; the guard reaches every process that has not left its group by `setsid`.

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

/// Prefix of a launcher's private folder; the guard removes no other folder.
pub(super) const FOLDER_PREFIX: &str = "shardflow-launch-";

/// The launcher's handle of a running guard process.
pub(super) struct Guard {
    process: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Starts `helper guard`, which also removes `folder` when it ends.
    pub(super) fn start(helper: &Path, folder: &Path) -> io::Result<Guard> {
        let mut command = Command::new(helper);
        command.arg("guard").arg("--folder").arg(folder);
        // A terminal sends signals to the launcher's group; the guard has its own.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn()?;
        let pipe = process.stdin.take();
        Ok(Guard { process, pipe })
    }

    /// Reports that `group` exists (`+`) or is empty (`-`), before its leader is reaped, so that the id cannot be
    /// reused yet. An error means that the guard has ended; then only the kernel's signal remains.
    pub(super) fn report(&mut self, sign: char, group: Pid) -> io::Result<()> {
        match &mut self.pipe {
            // One write below a pipe's atomic 4096 bytes: the guard reads a whole line or none.
            Some(pipe) => pipe.write_all(format!("{sign}{}\n", group.as_raw_pid()).as_bytes()),
            None => Ok(()),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.pipe = None;
        // The guard ends when the pipe closes. An error means that it ended before.
        let _ = self.process.wait();
    }
}

/// The command `shardflow guard`: reads groups from `from` until its end, then kills the remaining ones.
pub fn guard(folder: &Path, from: impl BufRead) -> Exit {
    // These signals often go to all of the launcher's processes, and the guard must outlive the launcher.
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
        // Usually the launcher has removed it.
        let _ = std::fs::remove_dir_all(folder);
    }
    Exit::Done
}

/// The command that executes `program` through [`become_program`].
pub fn child_command(helper: &Path, program: &Path, args: &[OsString]) -> Command {
    let mut command = Command::new(helper);
    command.arg("child").arg("--parent").arg(std::process::id().to_string()).arg("--").arg(program).args(args);
    // With a group of its own, a signal reaches the program's children too, and a terminal's signal arrives only once.
    command.process_group(0);
    command
}

/// The command `shardflow child`: executes `program`, which the kernel kills when the starting thread ends.
pub fn become_program(parent: u32, program: PathBuf, args: &[OsString]) -> Exit {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return fail(Exit::Internal, &format!("cannot set the parent-death signal: {error}"));
    }
    // The launcher may have ended before the signal was set.
    if getppid().map(|pid| pid.as_raw_pid()) != i32::try_from(parent).ok() {
        return fail(Exit::Retry, "the launcher ended");
    }
    let error = Command::new(&program).args(args).exec();
    fail(Exit::Usage, &format!("cannot run {}: {error}", program.display()))
}

fn fail(exit: Exit, cause: &str) -> Exit {
    eprintln!("error: {cause}");
    // If the report cannot be written, the log still has the line above.
    let _ = report(exit, cause, None);
    exit
}
