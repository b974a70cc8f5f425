//! What keeps children from outliving the launcher, in two hidden commands of the binary.
//!
//! A launcher that is killed by SIGKILL can do nothing any more. So each child asks the kernel to be killed with the
//! thread that started it, before it becomes the program ([`become_program`]). That does not reach the child's own
//! children: for them a guard, a process that does nothing but read a pipe from the launcher, knows all process groups,
//! and kills those that are left when the pipe closes ([`guard`]). The first needs no other process alive, the second
//! reaches everybody but who left the group by `setsid`.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io::{self, BufRead, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::process::{Pid, Signal, getppid, kill_process_group, set_parent_process_death_signal};

use crate::exit::{Exit, report};

/// Name with which a launcher's private folder begins; the guard removes no other.
pub(super) const FOLDER_PREFIX: &str = "shardflow-launch-";

/// The launcher's end: a running guard.
pub(super) struct Guard {
    process: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Starts `helper guard`, which also removes `folder` in the end.
    pub(super) fn start(helper: &Path, folder: &Path) -> io::Result<Guard> {
        let mut command = Command::new(helper);
        command.arg("guard").arg("--folder").arg(folder);
        // In its own group it does not get what a terminal sends to the launcher's.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn()?;
        let pipe = process.stdin.take();
        Ok(Guard { process, pipe })
    }

    /// Reports that `group` exists (`+`), or is empty (`-`): before its leader is waited for, so that the number cannot mean
    /// another group yet. An error means that the guard is gone: what it guarded is then left to the kernel's signal.
    pub(super) fn report(&mut self, sign: char, group: Pid) -> io::Result<()> {
        match &mut self.pipe {
            // One write, shorter than a pipe's atomic 4096 bytes: the guard sees a whole line or none.
            Some(pipe) => pipe.write_all(format!("{sign}{}\n", group.as_raw_pid()).as_bytes()),
            None => Ok(()),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.pipe = None;
        // It ends when the pipe does. An error means that it ended before.
        let _ = self.process.wait();
    }
}

/// The command `shardflow guard`: reads groups from `from` until it ends, then kills those that are left.
pub fn guard(folder: &Path, from: impl BufRead) -> Exit {
    // Who stops the launcher politely often signals all of its processes; the guard has to outlive it.
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
        // As a rule the launcher has removed it.
        let _ = std::fs::remove_dir_all(folder);
    }
    Exit::Done
}

/// The command that becomes `program` by way of [`become_program`].
pub(super) fn child_command(helper: &Path, program: &Path, args: &[OsString]) -> Command {
    let mut command = Command::new(helper);
    command.arg("child").arg("--parent").arg(std::process::id().to_string()).arg("--").arg(program).args(args);
    // So that a signal reaches the program's own children too, and what a terminal sends reaches it once, by the
    // launcher.
    command.process_group(0);
    command
}

/// The command `shardflow child`: becomes `program`, to be killed when the thread that started this process ends. Comes
/// back only when it cannot.
pub fn become_program(parent: u32, program: PathBuf, args: &[OsString]) -> Exit {
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return fail(Exit::Internal, &format!("cannot ask to be killed with the launcher: {error}"));
    }
    // The launcher may have ended before the kernel knew.
    if getppid().map(|pid| pid.as_raw_pid()) != i32::try_from(parent).ok() {
        return fail(Exit::Retry, "the launcher ended");
    }
    let error = Command::new(&program).args(args).exec();
    fail(Exit::Usage, &format!("cannot run {}: {error}", program.display()))
}

fn fail(exit: Exit, cause: &str) -> Exit {
    eprintln!("error: {cause}");
    // Where the report cannot be written the line above is in the log.
    let _ = report(exit, cause, None);
    exit
}
