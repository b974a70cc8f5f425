//! `shardflow launch`: starts a node's processes, passes signals on, and starts them again after a failure that is
//! worth it.
//!
//! Each node has its own launcher. When a process fails, those on other nodes notice it and end too, and each launcher
//! starts its own again. A failure before the processes have met, for which a new start would not help, is reported to the
//! others at the rendezvous endpoint.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;
use std::{env, fs, io, thread};

use crossbeam_channel::{Receiver, Sender, select};
use shardflow_actors::transport::PrivateFolder;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};

use crate::cluster::departure::Departure;
use crate::cluster::env::{Endpoint, Secret, SecretSource, Variables, process_variables};
use crate::cluster::{ClusterError, ClusterOptions};
use crate::exit::{Exit, Report, read_progress, unix_ns};
use crate::machine::temporary_folder;
use crate::output;
use crate::requests::not_ignored;
use crate::text::counted;
use cause::{Ended, Restarts, Verdict, exit_when_asked, first_cause};
use guard::{FOLDER_PREFIX, Guard};

mod attempt;
mod cause;
mod children;
mod guard;
mod logs;

pub use guard::{become_program, guard};

/// Events that wait to be handled. Who has more waits: a process that ended stays ended.
const EVENTS_MAX: usize = 64;

/// How long a launcher that ends on a signal waits for the reader of its output.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// What to start, and how.
#[derive(Clone, Debug)]
pub struct LaunchOptions {
    /// The program: a path, or a name that is looked for in `PATH`.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// The `shardflow` binary, which provides the hidden commands `guard` and `child`.
    pub helper: PathBuf,
    /// Processes on this node, at least 1. The same on every node.
    pub local_processes: u32,
    /// Nodes, at least 1.
    pub nodes: u32,
    /// Number of this node, below `nodes`.
    pub node: u32,
    /// Where process 0 listens. On one node a Unix socket in a private folder, when absent.
    pub endpoint: Option<Endpoint>,
    /// Name of the job, of letters, digits, `.`, `-` and `_`. A fresh one when absent.
    pub run_id: Option<String>,
    /// Restarts, at most.
    pub restarts_max: u64,
    /// Logs go to `<log_dir>/<run id>/attempt-<n>/rank-<r>.log`.
    pub log_dir: PathBuf,
    /// Time between SIGTERM, or the signal that is passed on, and SIGKILL.
    pub grace: Duration,
    /// Time that processes have to end by themselves after one failed.
    pub failure_wait: Duration,
    /// Pause before the second restart; doubled for each later one.
    pub restart_wait: Duration,
    /// Variables for the processes, which this launcher follows, too, such as [`crate::cluster::HEARTBEAT_MS`].
    pub variables: Vec<(&'static str, String)>,
}

/// Why nothing was started, or not all.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Flags that do not fit together, or no program that can be run.
    #[error("{0}")]
    Usage(String),
    /// Several nodes without a secret, or no place to meet or for the launcher's files.
    #[error("{0}")]
    Refused(String),
    /// A variable, or the secret, cannot be used.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// A file, process or thread that could not be made.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
}

impl LaunchError {
    /// How the launcher ends for it.
    pub fn exit(&self) -> Exit {
        match self {
            LaunchError::Usage(_) => Exit::Usage,
            LaunchError::Refused(_) => Exit::Refused,
            LaunchError::Cluster(error) => error.exit(),
            LaunchError::Io { .. } => Exit::Internal,
        }
    }

    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> LaunchError {
        |source| LaunchError::Io { what: what.into(), source }
    }
}

/// What the launcher waits for.
enum Event {
    /// The process with this local number ended, and was not waited for yet.
    Ended(usize),
    /// Somebody sent this signal.
    Signal(u8),
}

/// What stays the same in all attempts.
struct Job<'a> {
    options: &'a LaunchOptions,
    /// Resolved.
    program: PathBuf,
    run_id: String,
    /// Unix time in milliseconds.
    began_ms: u64,
    secret: Secret,
    /// Private; removed in the end.
    folder: PrivateFolder,
    events: (Sender<Event>, Receiver<Event>),
    guard: Guard,
    /// The exit codes that attempts so far ended with.
    causes: Vec<u8>,
    /// How to reach the other nodes, if there are any.
    departure: Option<Departure>,
    /// The second is disconnected once all failures were reported there, by threads that hold the first.
    reports: (Sender<()>, Receiver<()>),
}

/// Starts the processes and stays until they have ended for good. Says on standard error what goes wrong, the first
/// cause last.
///
/// Must be called by a thread that lives as long as the launcher, such as the main one: the processes are killed with
/// it.
///
/// # Errors
/// What keeps processes from being started. A process that fails is no error: see the exit that is returned.
pub fn launch(options: &LaunchOptions) -> Result<Exit, LaunchError> {
    let departure = departure(options);
    let launched = Job::prepare(options, departure.clone()).and_then(|mut job| {
        let ended = supervise(&mut job);
        match ended {
            Ok((_, Some(_))) => output::finish(Some(LAST_OUTPUT)),
            _ => wait_for_the_reader(&job.events.1),
        }
        ended.map(|(exit, _)| exit)
    });
    launched.inspect_err(|error| report(options, departure, error.exit(), error.to_string()))
}

/// Reports to the other nodes that this one starts nothing because of wrong flags, as far as `options` name the way.
pub fn report_usage(options: &LaunchOptions, cause: String) {
    report(options, departure(options), Exit::Usage, cause);
}

fn report(options: &LaunchOptions, departure: Option<Departure>, exit: Exit, cause: String) {
    let rank = options.node.saturating_mul(options.local_processes);
    let report = Report { rank, exit: exit.code(), time_unix_ns: unix_ns(), cause, ..Report::default() };
    if let Some(departure) = departure.filter(|_| report.is_for_all()) {
        notice(&format!("reporting to the other nodes: {}", report.cause));
        output::stderr().flush(Some(Duration::from_millis(200)));
        departure.report(rank..rank.saturating_add(options.local_processes), &report);
    }
}

/// How to reach the other nodes; `None` where flags or variables are incomplete, which is an error elsewhere.
fn departure(options: &LaunchOptions) -> Option<Departure> {
    let endpoint = options.endpoint.as_ref().filter(|_| options.nodes > 1)?;
    let variables = variables(options);
    let secret = SecretSource::find(&variables).ok()??.read().ok()?;
    let read = ClusterOptions::read(&variables).unwrap_or_default();
    Departure::new(endpoint, &secret, &read, options.local_processes.checked_mul(options.nodes)?).ok()
}

/// The variables of this process and those of the flags.
fn variables(options: &LaunchOptions) -> Variables {
    let given = options.variables.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
    process_variables().into_iter().chain(given).collect()
}

/// Waits until all output is written, or a signal ends the launcher.
fn wait_for_the_reader(events: &Receiver<Event>) {
    let (writing, written) = crossbeam_channel::bounded::<()>(0);
    thread::spawn(move || (output::finish(None), drop(writing)));
    wait_unless_asked(&written, events);
}

/// Waits until no sender of `done` is left, or a signal ends the launcher.
fn wait_unless_asked(done: &Receiver<()>, events: &Receiver<Event>) {
    loop {
        select! {
            recv(done) -> _ => return,
            recv(events) -> event => match event {
                Ok(Event::Signal(signal)) if i32::from(signal) != SIGUSR1 => return,
                _ => {}
            },
        }
    }
}

/// Starts the processes, again after failures that are worth it, until they have ended for good. Gives also the signal by which
/// somebody asked for it.
fn supervise(job: &mut Job) -> Result<(Exit, Option<u8>), LaunchError> {
    let options = job.options;
    let mut restarts = Restarts::new(options.restarts_max);
    loop {
        let outcome = attempt::run(job, restarts.made, restarts.pause(options.restart_wait))?;
        outcome.show_errors();
        if let Some(signal) = outcome.asked {
            let (exit, failed) = exit_when_asked(&outcome.ended, signal);
            if let Some(failed) = failed {
                output::stderr().line(&format!("error: {}", outcome.describe(failed)));
            }
            return Ok((exit, outcome.asked));
        }
        let Some(cause) = first_cause(&outcome.ended) else { return Ok((Exit::Done, None)) };
        let verdict = if outcome.abandoned || cause.ended_on_request() {
            // What cannot be killed still holds the node's devices and files; a node that is taken away runs nothing.
            Verdict::NotWorthIt
        } else {
            restarts.next(cause.exit, read_progress(&job.progress_file()))
        };
        match verdict {
            Verdict::Restart => {
                job.causes.push(cause.exit.code());
                notice(&outcome.describe(cause));
                let from = restarts.committed.map_or("the start".into(), |step| format!("step {step}"));
                let after = match restarts.pause(options.restart_wait) {
                    Duration::ZERO => String::new(),
                    pause => format!(", in {pause:?}"),
                };
                notice(&format!("restart {} of at most {}, from {from}{after}", restarts.made, restarts.max));
                continue;
            }
            Verdict::NotWorthIt if options.restarts_max > 0 => notice("a restart would not help"),
            Verdict::Exhausted if options.restarts_max > 0 => {
                notice(&format!("gave up after {}", counted(restarts.made, "restart")));
            }
            Verdict::NoProgress => notice(&format!(
                "gave up: {} restarts in a row ended without a committed step {}",
                cause::RESTARTS_WITHOUT_PROGRESS_MAX,
                restarts.committed.map_or("at all".into(), |step| format!("above {step}")),
            )),
            Verdict::NotWorthIt | Verdict::Exhausted => {}
        }
        output::stderr().line(&format!("error: {}", outcome.describe(cause)));
        job.wait_for_reports();
        return Ok((cause.exit, None));
    }
}

/// A line of the launcher's own on the screen.
fn notice(text: &str) {
    output::stderr().line(&format!("shardflow: {text}"));
}

impl<'a> Job<'a> {
    fn prepare(options: &'a LaunchOptions, departure: Option<Departure>) -> Result<Job<'a>, LaunchError> {
        // First of all: process 1 of a container has no other way to end.
        let events = crossbeam_channel::bounded(EVENTS_MAX);
        watch_signals(events.0.clone()).map_err(LaunchError::io("watch for signals"))?;
        check(options)?;
        let program = find_program(options)?;
        let variables = variables(options);
        ClusterOptions::read(&variables)?;
        let secret = match SecretSource::find(&variables).map_err(ClusterError::Env)? {
            Some(source) => source.read().map_err(ClusterError::Env)?,
            None if options.nodes > 1 => {
                return Err(LaunchError::Refused(format!(
                    "{} nodes need a secret: set SHARDFLOW_SECRET to the same text of at least 16 characters on each; \
                     make one by: export SHARDFLOW_SECRET=$(shardflow secret)",
                    options.nodes
                )));
            }
            None => random_secret()?,
        };
        let run_id = match &options.run_id {
            Some(name) => name.clone(),
            // Seconds, so that logs sort by time, and some letters, so that two jobs of one second differ.
            None => format!("{}-{}", unix_ns() / 1_000_000_000, &random_secret()?.text()[..6]),
        };
        let folder = temporary_folder(FOLDER_PREFIX).map_err(|error| LaunchError::Refused(error.to_string()))?;
        let guard = Guard::start(&options.helper, folder.path()).map_err(LaunchError::io("start the guard"))?;
        let began_ms = unix_ns() / 1_000_000;
        let (causes, reports) = (Vec::new(), crossbeam_channel::bounded(0));
        Ok(Job { options, program, run_id, began_ms, secret, folder, events, guard, causes, departure, reports })
    }

    /// Reports to the other nodes, on a thread of its own, that a process ended before it joined, if that is for all.
    fn report(&self, ended: &Ended) {
        let report = ended.report();
        let Some(departure) = self.departure.clone().filter(|_| report.is_for_all()) else { return };
        let under_way = self.reports.0.clone();
        let report = move || {
            departure.report(report.rank..report.rank + 1, &report);
            drop(under_way);
        };
        // Without a thread, the others wait until their timeout.
        let _ = thread::Builder::new().name("report".into()).spawn(report);
    }

    /// Waits until all reports are made, or a signal ends the launcher.
    fn wait_for_reports(&mut self) {
        let (sender, done) = std::mem::replace(&mut self.reports, crossbeam_channel::bounded(0));
        // The threads that report hold the others.
        drop(sender);
        wait_unless_asked(&done, &self.events.1);
    }

    fn progress_file(&self) -> PathBuf {
        self.folder.path().join("progress")
    }

    /// Where the processes of an attempt meet. A Unix socket is another one in each: what is left of an old one is not
    /// in the way.
    fn endpoint(&self, attempt: u64) -> Result<Endpoint, LaunchError> {
        match &self.options.endpoint {
            Some(endpoint) => Ok(endpoint.clone()),
            None => {
                let path = self.folder.path().join(format!("meet-{attempt}")).display().to_string();
                let long =
                    |expected| format!("cannot meet at {path}: expected {expected}; set TMPDIR to a shorter path");
                Endpoint::parse(&format!("unix:{path}")).map_err(|expected| LaunchError::Refused(long(expected)))
            }
        }
    }
}

fn random_secret() -> Result<Secret, LaunchError> {
    Secret::random().map_err(|e| LaunchError::Io { what: "make a secret".into(), source: io::Error::other(e) })
}

fn check(options: &LaunchOptions) -> Result<(), LaunchError> {
    let usage = |what: String| Err(LaunchError::Usage(what));
    let LaunchOptions { local_processes, nodes, node, endpoint, run_id, .. } = options;
    if *local_processes == 0 || *nodes == 0 {
        return usage(format!("--nnodes {nodes} --nproc-per-node {local_processes}: at least 1 of each is needed"));
    }
    if local_processes.checked_mul(*nodes).is_none() {
        return usage(format!("--nnodes {nodes} --nproc-per-node {local_processes}: too many processes"));
    }
    if node >= nodes {
        return usage(format!("--node-rank {node} with --nnodes {nodes}: nodes are numbered from 0 to {}", nodes - 1));
    }
    if *nodes > 1 && !matches!(endpoint, Some(Endpoint::Tcp { .. })) {
        return usage(format!("--nnodes {nodes} needs --rdzv-endpoint HOST:PORT, of node 0, the same on all nodes"));
    }
    let is_name = |name: &String| {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        (1..=100).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('.')
    };
    match run_id {
        Some(name) if !is_name(name) => {
            usage(format!("--rdzv-id {name}: letters, digits, dots and dashes are allowed"))
        }
        _ => Ok(()),
    }
}

/// The file that `program` means, so that a wrong name is told once, before anything is started.
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
    let what = match fs::metadata(&program) {
        Err(_) => return Err(not_found("")),
        Ok(data) if !data.is_file() => "no file",
        Ok(_) if !runnable(&program) => "not executable",
        Ok(_) => return Ok(program),
    };
    Err(LaunchError::Usage(format!("{} cannot be run: it is {what}", program.display())))
}

/// Sends the signals that end the launcher, and SIGUSR1. A signal that was ignored at the start, as under `nohup`, stays
/// ignored, except SIGTERM and SIGUSR1.
fn watch_signals(events: Sender<Event>) -> io::Result<()> {
    let wanted = not_ignored(&[SIGTERM, SIGUSR1], &[SIGHUP, SIGINT, SIGQUIT]);
    let mut signals = signal_hook::iterator::Signals::new(wanted)?;
    let forward = move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal as u8)).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("signals".into()).spawn(forward).map(drop)
}
