//! One process of an attempt: its environment, its start, its end.

use std::io::{self, Read};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child as Process, Command, Stdio};
use std::{env, thread};

use crossbeam_channel::Receiver;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};
use shardflow_kernels::cuda::library::SETTINGS;
use signal_hook::consts::SIGUSR1;

use super::cause::Ended;
use super::logs::{Log, pump};
use super::{Event, Job, LaunchError, guard};
use crate::cluster::env::Endpoint;
use crate::exit::{ERROR_FILE, Exit, PROGRESS_FILE, Report, unix_ns};
use crate::output::{self, OutputQueue};
use crate::requests::signal_mask;

/// What all processes of an attempt share.
pub(super) struct Meeting {
    pub(super) attempt: u64,
    endpoint: Endpoint,
    /// For programs that know torchrun's variables only.
    master: (String, u16),
}

impl Meeting {
    pub(super) fn new(job: &Job, attempt: u64) -> Result<Meeting, LaunchError> {
        let endpoint = job.endpoint(attempt)?;
        let master = match &endpoint {
            Endpoint::Tcp { host, port } => (host.clone(), *port),
            Endpoint::Unix(_) => {
                // Free now; nobody keeps it so.
                let free = || TcpListener::bind(("127.0.0.1", 0))?.local_addr();
                ("127.0.0.1".into(), free().map_err(LaunchError::io("find a free port"))?.port())
            }
        };
        Ok(Meeting { attempt, endpoint, master })
    }
}

/// A process that was started.
pub(super) struct Child {
    pub(super) rank: u32,
    pub(super) log: Log,
    process: Process,
    /// Its number, and that of its process group.
    pid: Pid,
    error_file: PathBuf,
    /// Disconnected when all of its output is read.
    pumps: Receiver<()>,
    /// Nothing while it lives.
    pub(super) ended: Option<Ended>,
}

impl Child {
    /// Starts the process with the local number `local`, whose end will be an event.
    pub(super) fn start(job: &mut Job, meeting: &Meeting, local: u32) -> Result<Child, LaunchError> {
        let options = job.options;
        let rank = options.node * options.local_processes + local;
        let folder = options.log_dir.join(&job.run_id).join(format!("attempt-{}", meeting.attempt));
        let log = Log::open(&folder, rank).map_err(|error| {
            LaunchError::Usage(format!("--log-dir: cannot write a log in {}: {error}", folder.display()))
        })?;
        let error_file = job.folder.path().join(format!("error-{}-{rank}.json", meeting.attempt));
        let mut command = guard::child_command(&options.helper, &job.program, &options.args);
        set_environment(&mut command, job, meeting, local);
        command.env(ERROR_FILE, &error_file).stdin(Stdio::null());
        let copy = || log.file.try_clone().map_err(LaunchError::io("open a log twice"));
        if local == 0 {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        } else {
            command.stdout(copy()?).stderr(copy()?);
        }
        let mut process = command.spawn().map_err(LaunchError::io("start a process"))?;
        let pid = Pid::from_child(&process);
        if job.guard.report('+', pid).is_err() {
            super::notice("the guard is gone: should the launcher be killed, children of processes may stay");
        }
        let pumps = start_pumps(&mut process, &log).map_err(LaunchError::io("start a thread"))?;
        let events = job.events.0.clone();
        let wait = move || {
            wait_until_ended(pid);
            // Who does not listen any more does not need to know.
            let _ = events.send(Event::Ended(local as usize));
        };
        let thread = thread::Builder::new().name(format!("wait for rank {rank}"));
        thread.spawn(wait).map_err(LaunchError::io("start a thread"))?;
        Ok(Child { rank, log, process, pid, error_file, pumps, ended: None })
    }

    /// Sends a signal to the process and its own children.
    pub(super) fn signal(&self, signal: Signal) {
        if self.ended.is_none() {
            // An error means that the group is empty.
            let _ = kill_process_group(self.pid, signal);
        }
    }

    /// Sends SIGUSR1 to the process alone, if it has a handler: the default action would end it.
    pub(super) fn signal_usr1(&self) {
        if signal_mask(&self.pid.to_string(), "SigCgt:") >> (SIGUSR1 - 1) & 1 == 1 {
            // An error means that the process has ended.
            let _ = kill_process(self.pid, Signal::USR1);
        }
    }

    /// After its event: ends what it left behind, and notes how it ended. `told`: the launcher had told it to.
    pub(super) fn finish(&mut self, job: &mut Job, told: bool) {
        // While the process was not waited for, its number and its group's belong to nobody else.
        let _ = kill_process_group(self.pid, Signal::KILL);
        let _ = job.guard.report('-', self.pid);
        let time_unix_ns = unix_ns();
        let exit = match self.process.wait() {
            Ok(status) => Exit::from_status(status),
            Err(_) => Exit::Internal,
        };
        // Its pipes close with the group, unless somebody left that.
        let _ = self.pumps.recv_timeout(super::attempt::PUMPS_WAIT);
        let report = Report::read(&self.error_file);
        let error_line = if exit == Exit::Done { None } else { self.log.errors().into_iter().next() };
        self.ended = Some(Ended { rank: self.rank, exit, time_unix_ns, report, error_line, told });
    }
}

/// Copies what the process writes to its log and the screen, where it writes to pipes.
fn start_pumps(process: &mut Process, log: &Log) -> io::Result<Receiver<()>> {
    let (alive, pumps) = crossbeam_channel::bounded(0);
    let start = |name: &str, from: Option<Box<dyn Read + Send>>, screen: &'static OutputQueue| -> io::Result<()> {
        let Some(from) = from else { return Ok(()) };
        let (file, alive) = (log.file.try_clone()?, alive.clone());
        let copy = move || (pump(from, file, screen), drop(alive));
        thread::Builder::new().name(name.into()).spawn(copy).map(drop)
    };
    start("stdout", process.stdout.take().map(|from| Box::new(from) as _), output::stdout())?;
    start("stderr", process.stderr.take().map(|from| Box::new(from) as _), output::stderr())?;
    Ok(pumps)
}

/// Returns when the process has ended, and leaves it to be waited for.
fn wait_until_ended(pid: Pid) {
    while let Err(rustix::io::Errno::INTR) = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {}
}

/// The variables that `cluster::env` reads, torchrun's, and the CUDA driver's.
fn set_environment(command: &mut Command, job: &Job, meeting: &Meeting, local: u32) {
    let options = job.options;
    let rank = (options.node * options.local_processes + local).to_string();
    let processes = (options.nodes * options.local_processes).to_string();
    let (local, local_processes) = (local.to_string(), options.local_processes.to_string());
    let (node, nodes) = (options.node.to_string(), options.nodes.to_string());
    let (attempt, max) = (meeting.attempt.to_string(), options.restarts_max.to_string());
    let causes = job.causes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let variables = [
        ("SHARDFLOW_RANK", &rank),
        ("SHARDFLOW_WORLD_SIZE", &processes),
        ("SHARDFLOW_LOCAL_RANK", &local),
        ("SHARDFLOW_LOCAL_WORLD_SIZE", &local_processes),
        ("SHARDFLOW_NODE_RANK", &node),
        ("SHARDFLOW_NNODES", &nodes),
        ("SHARDFLOW_ENDPOINT", &meeting.endpoint.to_string()),
        ("SHARDFLOW_RUN_ID", &job.run_id),
        ("SHARDFLOW_RESTART_COUNT", &attempt),
        ("SHARDFLOW_MAX_RESTARTS", &max),
        ("SHARDFLOW_RESTART_CAUSES", &causes),
        ("SHARDFLOW_JOB_BEGAN_MS", &job.began_ms.to_string()),
        ("RANK", &rank),
        ("WORLD_SIZE", &processes),
        ("LOCAL_RANK", &local),
        ("LOCAL_WORLD_SIZE", &local_processes),
        ("GROUP_RANK", &node),
        ("GROUP_WORLD_SIZE", &nodes),
        ("ROLE_NAME", &"default".to_string()),
        ("ROLE_RANK", &rank),
        ("ROLE_WORLD_SIZE", &processes),
        ("MASTER_ADDR", &meeting.master.0),
        ("MASTER_PORT", &meeting.master.1.to_string()),
        ("TORCHELASTIC_RESTART_COUNT", &attempt),
        ("TORCHELASTIC_MAX_RESTARTS", &max),
        ("TORCHELASTIC_RUN_ID", &job.run_id),
    ];
    command.envs(variables).envs(options.variables.iter().map(|(name, value)| (name, value)));
    command.envs(SETTINGS.iter().filter(|(name, _)| env::var_os(name).is_none()).copied());
    command.env("SHARDFLOW_SECRET", job.secret.text()).env_remove("SHARDFLOW_SECRET_FILE");
    if local == "0" {
        command.env(PROGRESS_FILE, job.progress_file());
    } else {
        command.env_remove(PROGRESS_FILE);
    }
}
