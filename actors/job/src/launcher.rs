//! `shardflow launch`: starts a node's processes, forwards signals to them, and restarts them after a failure that a restart
//! may fix.
//!
//! Each node has its own launcher. When a process fails, the processes of other nodes detect it and end too, and each launcher
//! restarts its own. A failure before the rendezvous that a restart would not fix is reported to the other nodes at the
//! rendezvous endpoint.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;
use std::{env, fs, io, thread};

use crate::transport::{PROCESSES_MAX, PrivateFolder};
use crossbeam_channel::{Receiver, Sender, select};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};

use crate::departure::Departure;
use crate::env::{Endpoint, EnvError, SecretSource, Variables, process_variables};
use crate::exit::{Exit, Report, read_progress, unix_ns};
use crate::machine::temporary_folder;
use crate::options::ClusterOptions;
use crate::output;
use crate::requests::not_ignored;
use crate::secret::Secret;
use crate::text::counted;
use cause::{Decision, Ended, Restarts, exit_after_signal, first_cause};
use guard::{FOLDER_PREFIX, Guard};

mod attempt;
mod cause;
mod children;
mod guard;
mod logs;

pub use guard::{become_program, child_command, guard};

/// Capacity of the event queue. A sender waits while the queue is full.
const EVENTS_MAX: usize = 64;

/// How long a launcher that ends on a signal waits for the reader of its output.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(1);

/// Options of `shardflow launch`.
#[derive(Clone, Debug)]
pub struct LaunchOptions {
    /// The program: a path, or a name that is searched for in `PATH`.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// The `shardflow` binary, which provides the hidden commands `guard` and `child`.
    pub helper: PathBuf,
    /// Processes on this node, at least 1; the same on every node.
    pub local_processes: u32,
    /// Number of nodes, at least 1.
    pub nodes: u32,
    /// Number of this node, below `nodes`.
    pub node: u32,
    /// The address of process 0. Without it, on one node, a Unix socket in a private folder.
    pub endpoint: Option<Endpoint>,
    /// Name of the job: letters, digits, `.`, `-` and `_`. Generated if absent.
    pub run_id: Option<String>,
    /// Largest number of restarts.
    pub restarts_max: u64,
    /// Logs are written to `<log_dir>/<run id>/attempt-<n>/rank-<r>.log`.
    pub log_dir: PathBuf,
    /// Time between SIGTERM, or a forwarded signal, and SIGKILL.
    pub grace: Duration,
    /// Time between the first failure and SIGTERM to the other processes.
    pub failure_wait: Duration,
    /// Pause before the second restart; doubled for each later one.
    pub restart_wait: Duration,
    /// Environment variables of the processes that this launcher reads too, such as [`crate::env::HEARTBEAT_MS`].
    pub variables: Vec<(&'static str, String)>,
}

/// Why the processes were not started.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the error texts explain variants and fields")]
pub enum LaunchError {
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Env(#[from] EnvError),
    #[error("cannot {action}: {source}")]
    Io { action: String, source: io::Error },
}

impl LaunchError {
    /// The launcher's exit code.
    pub fn exit(&self) -> Exit {
        match self {
            LaunchError::Usage(_) => Exit::Usage,
            LaunchError::Refused(_) => Exit::Refused,
            LaunchError::Env(error) => error.exit(),
            LaunchError::Io { .. } => Exit::Internal,
        }
    }

    fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> LaunchError {
        |source| LaunchError::Io { action: action.into(), source }
    }
}

/// An event that the launcher waits for.
enum Event {
    /// The process with this local rank ended and has not been reaped.
    Ended(usize),
    Signal(u8),
}

/// The state that all attempts share.
struct Job<'a> {
    options: &'a LaunchOptions,
    /// Resolved path.
    program: PathBuf,
    run_id: String,
    /// Unix time in milliseconds.
    began_ms: u64,
    secret: Secret,
    /// Private folder; removed when the launcher ends.
    folder: PrivateFolder,
    events: (Sender<Event>, Receiver<Event>),
    guard: Guard,
    /// The exit codes of the attempts so far.
    causes: Vec<u8>,
    /// How to reach the other nodes, if there are any.
    departure: Option<Departure>,
    /// Reporting threads hold clones of the sender, so the receiver is disconnected when all reports are sent.
    reports: (Sender<()>, Receiver<()>),
}

/// Starts the processes, restarts them if needed, and returns when they have ended. Prints failures to standard error, the
/// first cause last.
///
/// Must be called by a thread that lives as long as the launcher, such as the main thread: the kernel kills the processes when
/// it ends.
///
/// # Errors
/// The processes cannot be started. The failure of a process is not an error: its exit is returned.
pub fn launch(options: &LaunchOptions) -> Result<Exit, LaunchError> {
    let departure = departure(options);
    let launched = Job::prepare(options, departure.clone()).and_then(|mut job| {
        let result = supervise(&mut job);
        match result {
            Ok((_, Some(_))) => output::finish(Some(OUTPUT_TIMEOUT)),
            _ => wait_for_output_reader(&job.events.1),
        }
        result.map(|(exit, _)| exit)
    });
    launched.inspect_err(|error| report(options, departure, error.exit(), error.to_string()))
}

/// Reports to the other nodes that this one starts no process because of a usage error, if `options` suffice to reach them.
pub fn report_usage(options: &LaunchOptions, cause: String) {
    report(options, departure(options), Exit::Usage, cause);
}

fn report(options: &LaunchOptions, departure: Option<Departure>, exit: Exit, cause: String) {
    let rank = options.node.saturating_mul(options.local_processes);
    let report = Report { rank, exit: exit.code(), time_unix_ns: unix_ns(), cause, ..Report::default() };
    if let Some(departure) = departure.filter(|_| report.concerns_all()) {
        print_notice(&format!("reporting to the other nodes: {}", report.cause));
        output::stderr().flush(Some(Duration::from_millis(200)));
        departure.report(rank..rank.saturating_add(options.local_processes), &report);
    }
}

/// How to reach the other nodes; `None` if flags or variables are incomplete, which is reported elsewhere.
fn departure(options: &LaunchOptions) -> Option<Departure> {
    let endpoint = options.endpoint.as_ref().filter(|_| options.nodes > 1)?;
    let variables = variables(options);
    let secret = SecretSource::find(&variables).ok()??.read().ok()?;
    let cluster_options = ClusterOptions::read(&variables).unwrap_or_default();
    Some(Departure::new(endpoint, secret, &cluster_options, processes(options)?))
}

/// The number of processes on all nodes, if a job may have that many.
fn processes(options: &LaunchOptions) -> Option<u32> {
    options.local_processes.checked_mul(options.nodes).filter(|processes| *processes <= PROCESSES_MAX)
}

/// The environment variables of this process, with those set by flags.
fn variables(options: &LaunchOptions) -> Variables {
    let given = options.variables.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
    process_variables().into_iter().chain(given).collect()
}

/// Waits until all output is written, or a signal arrives.
fn wait_for_output_reader(events: &Receiver<Event>) {
    let (writing, written) = crossbeam_channel::bounded::<()>(0);
    thread::spawn(move || (output::finish(None), drop(writing)));
    wait_until_done_or_signal(&written, events);
}

/// Waits until `done` has a value or is disconnected, or a signal other than SIGUSR1 arrives.
fn wait_until_done_or_signal<T>(done: &Receiver<T>, events: &Receiver<Event>) -> Option<T> {
    loop {
        select! {
            recv(done) -> value => return value.ok(),
            recv(events) -> event => match event {
                Ok(Event::Signal(signal)) if i32::from(signal) != SIGUSR1 => return None,
                _ => {}
            },
        }
    }
}

/// Runs attempts until one ends without a restart. Also returns the signal that ended the launcher, if any.
fn supervise(job: &mut Job) -> Result<(Exit, Option<u8>), LaunchError> {
    let options = job.options;
    let mut restarts = Restarts::new(options.restarts_max);
    loop {
        let outcome = attempt::run(job, restarts.made, restarts.pause(options.restart_wait))?;
        outcome.show_errors();
        if let Some(signal) = outcome.signal {
            let (exit, failed) = exit_after_signal(&outcome.ended, signal);
            if let Some(failed) = failed {
                output::stderr().line(&format!("error: {}", outcome.describe(failed)));
            }
            return Ok((exit, outcome.signal));
        }
        let Some(cause) = first_cause(&outcome.ended) else { return Ok((Exit::Done, None)) };
        let decision = if outcome.abandoned || cause.ended_on_request() {
            // An abandoned process still holds the node's devices and files; a request to end means that the node is reclaimed.
            Decision::WouldNotHelp
        } else {
            restarts.next(cause.exit, read_progress(&job.progress_file()))
        };
        match decision {
            Decision::Restart => {
                job.causes.push(cause.exit.code());
                print_notice(&outcome.describe(cause));
                let from = restarts.committed.map_or("the start".into(), |step| format!("step {step}"));
                let delay = match restarts.pause(options.restart_wait) {
                    Duration::ZERO => String::new(),
                    pause => format!(", in {pause:?}"),
                };
                print_notice(&format!("restart {} of at most {}, from {from}{delay}", restarts.made, restarts.max));
                continue;
            }
            Decision::WouldNotHelp if options.restarts_max > 0 => print_notice("a restart would not help"),
            Decision::Exhausted if options.restarts_max > 0 => {
                print_notice(&format!("gave up after {}", counted(restarts.made, "restart")));
            }
            Decision::NoProgress => print_notice(&format!(
                "gave up: {} restarts in a row ended without a committed step {}",
                cause::RESTARTS_WITHOUT_PROGRESS_MAX,
                restarts.committed.map_or("at all".into(), |step| format!("above {step}")),
            )),
            Decision::WouldNotHelp | Decision::Exhausted => {}
        }
        output::stderr().line(&format!("error: {}", outcome.describe(cause)));
        job.wait_for_reports();
        return Ok((cause.exit, None));
    }
}

fn print_notice(text: &str) {
    output::stderr().line(&format!("shardflow: {text}"));
}

impl<'a> Job<'a> {
    fn prepare(options: &'a LaunchOptions, departure: Option<Departure>) -> Result<Job<'a>, LaunchError> {
        // Comes first: process 1 of a container ignores signals without a handler.
        let events = crossbeam_channel::bounded(EVENTS_MAX);
        watch_signals(events.0.clone()).map_err(LaunchError::io("watch for signals"))?;
        check(options)?;
        let program = find_program(options)?;
        let variables = variables(options);
        ClusterOptions::read(&variables).map_err(|error| match &error {
            EnvError::Option { name, .. } if options.variables.iter().any(|(given, _)| given == name) => {
                let flag = name.trim_start_matches("SHARDFLOW_").replace('_', "-").to_lowercase();
                LaunchError::Refused(format!("--{flag}: {error}"))
            }
            _ => error.into(),
        })?;
        let secret = match SecretSource::find(&variables)? {
            Some(source) => source.read()?,
            None if options.nodes > 1 => {
                return Err(LaunchError::Refused(format!(
                    "{} nodes need a secret: set SHARDFLOW_SECRET to the same text of at least 16 characters on each; \
                     make one with: export SHARDFLOW_SECRET=$(shardflow secret)",
                    options.nodes
                )));
            }
            None => random_secret()?,
        };
        let run_id = match &options.run_id {
            Some(name) => name.clone(),
            // Seconds sort logs by time; random characters distinguish jobs that start in the same second.
            None => format!("{}-{}", unix_ns() / 1_000_000_000, &random_secret()?.text()[..6]),
        };
        let folder = temporary_folder(FOLDER_PREFIX).map_err(|error| LaunchError::Refused(error.to_string()))?;
        let guard = Guard::start(&options.helper, folder.path()).map_err(LaunchError::io("start the guard"))?;
        let began_ms = unix_ns() / 1_000_000;
        let (causes, reports) = (Vec::new(), crossbeam_channel::bounded(0));
        Ok(Job { options, program, run_id, began_ms, secret, folder, events, guard, causes, departure, reports })
    }

    /// Reports the failure of a process before the rendezvous to the other nodes, on a thread of its own.
    fn report(&self, ended: &Ended) {
        let report = ended.report();
        let Some(departure) = self.departure.clone().filter(|_| report.concerns_all()) else { return };
        let pending = self.reports.0.clone();
        let send = move || {
            departure.report(report.rank..report.rank + 1, &report);
            drop(pending);
        };
        // If the thread cannot start, the other nodes wait until their timeout.
        let _ = thread::Builder::new().name("report".into()).spawn(send);
    }

    /// Reports to the other nodes that no process of this node joins. Returns true if a process there waits for them.
    fn is_missed(&self, report: Report) -> bool {
        let Some(departure) = self.departure.clone() else { return false };
        print_notice("no process of this node has joined the other nodes; reporting it to those that wait");
        let ranks = report.rank..report.rank + self.options.local_processes;
        let (sender, missed) = crossbeam_channel::bounded(1);
        thread::spawn(move || sender.send(departure.report(ranks, &report)));
        wait_until_done_or_signal(&missed, &self.events.1).unwrap_or(false)
    }

    /// Waits until all reports are sent, or a signal arrives.
    fn wait_for_reports(&mut self) {
        let (sender, done) = std::mem::replace(&mut self.reports, crossbeam_channel::bounded(0));
        // The reporting threads hold the other senders.
        drop(sender);
        wait_until_done_or_signal(&done, &self.events.1);
    }

    fn progress_file(&self) -> PathBuf {
        self.folder.path().join("progress")
    }

    /// The rendezvous endpoint of an attempt. Each attempt has a Unix socket of its own, because an old one may be left over.
    fn endpoint(&self, attempt: u64) -> Result<Endpoint, LaunchError> {
        match &self.options.endpoint {
            Some(endpoint) => Ok(endpoint.clone()),
            None => {
                let path = self.folder.path().join(format!("meet-{attempt}"));
                let refused = |expected, fix| {
                    let path = path.display();
                    let message =
                        format!("cannot use {path} for the rendezvous: expected {expected}; set TMPDIR to {fix}");
                    LaunchError::Refused(message)
                };
                let text = path.to_str().ok_or_else(|| refused("UTF-8", "a path in UTF-8"))?;
                Endpoint::parse(&format!("unix:{text}")).map_err(|expected| refused(expected, "a shorter path"))
            }
        }
    }
}

fn random_secret() -> Result<Secret, LaunchError> {
    Secret::random().map_err(|e| LaunchError::Io { action: "make a secret".into(), source: io::Error::other(e) })
}

fn check(options: &LaunchOptions) -> Result<(), LaunchError> {
    let usage = |message: String| Err(LaunchError::Usage(message));
    let LaunchOptions { local_processes, nodes, node, endpoint, run_id, .. } = options;
    if *local_processes == 0 || *nodes == 0 {
        return usage(format!("--nnodes {nodes} --nproc-per-node {local_processes}: both must be at least 1"));
    }
    if processes(options).is_none() {
        return usage(format!(
            "--nnodes {nodes} --nproc-per-node {local_processes}: more than {PROCESSES_MAX} processes"
        ));
    }
    if node >= nodes {
        return usage(format!("--node-rank {node} with --nnodes {nodes}: nodes are numbered from 0 to {}", nodes - 1));
    }
    if *nodes > 1 && !matches!(endpoint, Some(Endpoint::Tcp { .. })) {
        return usage(format!("--nnodes {nodes} needs --rdzv-endpoint HOST:PORT of node 0, the same on all nodes"));
    }
    let is_name = |name: &String| {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        (1..=100).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('.')
    };
    match run_id {
        Some(name) if !is_name(name) => usage(format!(
            "--rdzv-id {name}: expected 1 to 100 letters, digits, '.', '-' or '_', not starting with '.'"
        )),
        _ => Ok(()),
    }
}

/// Resolves the program's path, so that a wrong name is reported once, before any process is started.
fn find_program(options: &LaunchOptions) -> Result<PathBuf, LaunchError> {
    let program = PathBuf::from(&options.program);
    if let Some(flag) = options.program.to_str().filter(|name| name.starts_with('-')) {
        return Err(LaunchError::Usage(format!("unexpected argument '{flag}'; see `shardflow launch --help`")));
    }
    let runnable =
        |path: &PathBuf| fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    let name = options.program.to_string_lossy();
    let not_found = |place: &str| LaunchError::Usage(format!("program {name} not found{place}"));
    if program.components().count() == 1 && !name.contains('/') {
        let paths = env::var_os("PATH").unwrap_or_default();
        let found = env::split_paths(&paths).map(|folder| folder.join(&program)).find(runnable);
        let place =
            if program.is_file() { " in PATH; for the file in this folder write ./ before it" } else { " in PATH" };
        return found.ok_or_else(|| not_found(place));
    }
    let problem = match fs::metadata(&program) {
        Err(_) => return Err(not_found("")),
        Ok(data) if !data.is_file() => "not a file",
        Ok(_) if !runnable(&program) => "not executable",
        Ok(_) => return Ok(program),
    };
    Err(LaunchError::Usage(format!("{} cannot be run: it is {problem}", program.display())))
}

/// Starts the thread that sends an event for each signal. A signal that was ignored at the start, as under `nohup`, stays
/// ignored, except SIGTERM and SIGUSR1.
fn watch_signals(events: Sender<Event>) -> io::Result<()> {
    let watched = not_ignored(&[SIGTERM, SIGUSR1], &[SIGHUP, SIGINT, SIGQUIT]);
    let mut signals = signal_hook::iterator::Signals::new(watched)?;
    let forward = move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal as u8)).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("signals".into()).spawn(forward).map(drop)
}
