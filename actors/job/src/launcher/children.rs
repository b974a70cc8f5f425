//! One process of an attempt: how it is set up, started and reaped.

use std::io::{self, Read};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child as Process, Command, Stdio};
use std::sync::{Arc, Once};
use std::thread;
use std::time::Duration;

use crossbeam_channel::Receiver;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};
use signal_hook::consts::SIGUSR1;

use super::cause::Ended;
use super::guard::child_command;
use super::job::{Event, Job, print_notice};
use super::logs::{Log, pump};
use super::options::LaunchError;
use crate::env::Endpoint;
use crate::exit::{ERROR_FILE, Exit, PROGRESS_FILE, Report, joining_file, unix_ns};
use crate::output::{self, OutputQueue};
use crate::requests::signal_mask;

/// Timeout for reading the last output of an ended process. It expires only if another process keeps the pipes open.
const PUMPS_WAIT: Duration = Duration::from_secs(2);

pub(super) struct AttemptConfig {
    pub(super) attempt: u64,
    endpoint: Endpoint,
    /// Values of `MASTER_ADDR` and `MASTER_PORT`, for programs that read only torchrun's variables.
    master: (String, u16),
}

impl AttemptConfig {
    pub(super) fn new(job: &Job, attempt: u64) -> Result<AttemptConfig, LaunchError> {
        let endpoint = job.endpoint(attempt)?;
        let master = match &endpoint {
            Endpoint::Tcp { host, port } => (host.clone(), *port),
            Endpoint::Unix(_) => {
                // The port is free now, but another process may take it later.
                let free = || TcpListener::bind(("127.0.0.1", 0))?.local_addr();
                ("127.0.0.1".into(), free().map_err(LaunchError::io("find a free port"))?.port())
            }
        };
        Ok(AttemptConfig { attempt, endpoint, master })
    }
}

pub(super) struct Child {
    pub(super) rank: u32,
    pub(super) log: Log,
    process: Process,
    /// The process id, which is also the id of the process's group.
    pid: Pid,
    error_file: PathBuf,
    /// Disconnected once all output of the process has been read.
    pumps: Receiver<()>,
    /// `None` while the process runs.
    pub(super) ended: Option<Ended>,
}

impl Child {
    /// Starts the process with local rank `local`. An event reports its end.
    pub(super) fn start(job: &mut Job, config: &AttemptConfig, local: u32) -> Result<Child, LaunchError> {
        let options = job.options;
        let rank = options.node * options.local_processes + local;
        let folder = options.log_dir.join(&job.run_id).join(format!("attempt-{}", config.attempt));
        let log = Log::open(&folder, rank).map_err(|error| {
            LaunchError::Usage(format!("--log-dir: cannot write a log in {}: {error}", folder.display()))
        })?;
        let error_file = job.folder.path().join(format!("error-{}-{rank}.json", config.attempt));
        let mut command = child_command(&options.helper, &job.program, &options.args);
        set_environment(&mut command, job, config, local);
        command.env(ERROR_FILE, &error_file).stdin(Stdio::null());
        let copy = || log.file.try_clone().map_err(LaunchError::io("duplicate a log's descriptor"));
        if local == 0 {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        } else {
            command.stdout(copy()?).stderr(copy()?);
        }
        let mut process = command.spawn().map_err(LaunchError::io("start a process"))?;
        let pid = Pid::from_child(&process);
        if job.guard.report('+', pid).is_err() {
            print_notice(
                "the guard process has ended, so child processes of ranks may survive if the launcher is killed",
            );
        }
        let pumps = start_pumps(&mut process, &log).map_err(LaunchError::io("start a thread"))?;
        let events = job.events.0.clone();
        let wait = move || {
            wait_until_ended(pid);
            // An error means that the launcher no longer receives events.
            let _ = events.send(Event::Ended(local as usize));
        };
        let thread = thread::Builder::new().name(format!("wait for rank {rank}"));
        thread.spawn(wait).map_err(LaunchError::io("start a thread"))?;
        Ok(Child { rank, log, process, pid, error_file, pumps, ended: None })
    }

    /// True once the process has begun to wait for the other ranks.
    pub(super) fn is_joining(&self) -> bool {
        joining_file(&self.error_file).exists()
    }

    /// True if the process ended with code 0 before it began to join.
    pub(super) fn is_absent(&self) -> bool {
        self.ended.as_ref().is_some_and(|ended| ended.exit == Exit::Done) && !self.is_joining()
    }

    /// Sends a signal to the process and its children.
    pub(super) fn signal(&self, signal: Signal) {
        if self.ended.is_none() {
            // An error means that the process group is empty.
            let _ = kill_process_group(self.pid, signal);
        }
    }

    /// Sends SIGUSR1 to the process only. Without a handler, the signal would end the process, so it is not sent.
    pub(super) fn signal_usr1(&self) {
        if signal_mask(&self.pid.to_string(), "SigCgt:") >> (SIGUSR1 - 1) & 1 == 1 {
            // An error means that the process has ended.
            let _ = kill_process(self.pid, Signal::USR1);
        }
    }

    /// Handles the process's end: kills the rest of its group and records the end. `signaled` is true if the launcher
    /// had sent the process a signal to end.
    pub(super) fn finish(&mut self, job: &mut Job, signaled: bool) {
        // Until the process is reaped, neither its id nor its group's id can be reused.
        let _ = kill_process_group(self.pid, Signal::KILL);
        let _ = job.guard.report('-', self.pid);
        let time_unix_ns = unix_ns();
        let exit = match self.process.wait() {
            Ok(status) => Exit::from_status(status),
            Err(_) => Exit::Internal,
        };
        // The pipes close when the group ends, unless a child process has left the group.
        let _ = self.pumps.recv_timeout(PUMPS_WAIT);
        let report = Report::read(&self.error_file);
        let error_line = if exit == Exit::Done { None } else { self.log.errors().into_iter().next() };
        self.ended = Some(Ended { rank: self.rank, exit, time_unix_ns, report, error_line, signaled });
    }
}

/// Starts threads that copy the process's piped output to its log and the screen.
fn start_pumps(process: &mut Process, log: &Log) -> io::Result<Receiver<()>> {
    let (running, pumps) = crossbeam_channel::bounded(0);
    let reported = Arc::new(Once::new());
    let start = |name: &str, from: Option<Box<dyn Read + Send>>, screen: &'static OutputQueue| -> io::Result<()> {
        let Some(from) = from else { return Ok(()) };
        let (file, running) = (log.file.try_clone()?, running.clone());
        let (path, reported) = (log.path.clone(), reported.clone());
        let failed = move |error| {
            reported.call_once(|| print_notice(&format!("cannot write the log {}: {error}", path.display())));
        };
        let copy = move || (pump(from, file, screen, failed), drop(running));
        thread::Builder::new().name(name.into()).spawn(copy).map(drop)
    };
    start("stdout", process.stdout.take().map(|from| Box::new(from) as _), output::stdout())?;
    start("stderr", process.stderr.take().map(|from| Box::new(from) as _), output::stderr())?;
    Ok(pumps)
}

/// Blocks until the process has ended. Does not reap it.
fn wait_until_ended(pid: Pid) {
    while let Err(rustix::io::Errno::INTR) = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {}
}

/// Sets the variables of Shardflow, of torchrun and of the CUDA driver.
fn set_environment(command: &mut Command, job: &Job, config: &AttemptConfig, local: u32) {
    let options = job.options;
    let rank = options.node * options.local_processes + local;
    let causes = job.causes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let (master, port) = &config.master;
    let variables: [(&[&str], &dyn ToString); 15] = [
        (&["SHARDFLOW_RANK", "RANK", "ROLE_RANK"], &rank),
        (&["SHARDFLOW_WORLD_SIZE", "WORLD_SIZE", "ROLE_WORLD_SIZE"], &(options.nodes * options.local_processes)),
        (&["SHARDFLOW_LOCAL_RANK", "LOCAL_RANK"], &local),
        (&["SHARDFLOW_LOCAL_WORLD_SIZE", "LOCAL_WORLD_SIZE"], &options.local_processes),
        (&["SHARDFLOW_NODE_RANK", "GROUP_RANK"], &options.node),
        (&["SHARDFLOW_NNODES", "GROUP_WORLD_SIZE"], &options.nodes),
        (&["SHARDFLOW_ENDPOINT"], &config.endpoint),
        (&["SHARDFLOW_RUN_ID", "TORCHELASTIC_RUN_ID"], &job.run_id),
        (&["SHARDFLOW_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"], &config.attempt),
        (&["SHARDFLOW_MAX_RESTARTS", "TORCHELASTIC_MAX_RESTARTS"], &options.restarts_max),
        (&["SHARDFLOW_RESTART_CAUSES"], &causes),
        (&["SHARDFLOW_JOB_BEGAN_MS"], &job.began_ms),
        (&["ROLE_NAME"], &"default"),
        (&["MASTER_ADDR"], master),
        (&["MASTER_PORT"], port),
    ];
    for (names, value) in variables {
        command.envs(names.iter().map(|name| (name, value.to_string())));
    }
    command.envs(options.variables.iter().map(|(name, value)| (name, value)));
    command.env("SHARDFLOW_SECRET", job.secret.text()).env_remove("SHARDFLOW_SECRET_FILE");
    if local == 0 {
        command.env(PROGRESS_FILE, job.progress_file());
    } else {
        command.env_remove(PROGRESS_FILE);
    }
}
