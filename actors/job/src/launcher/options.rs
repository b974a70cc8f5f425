//! Options of `shardflow launch`, and the values derived from them before a process is started.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;
use std::{env, fs, io};

use crate::departure::Departure;
use crate::env::{Endpoint, EnvError, SecretSource, Variables, process_variables};
use crate::exit::{Exit, Report, unix_ns};
use crate::options::ClusterOptions;
use crate::transport::PROCESSES_MAX;

/// Options of `shardflow launch`.
#[derive(Clone, Debug)]
pub struct LaunchOptions {
    /// The program: a path, or a name to look up in `PATH`.
    pub program: OsString,
    /// The program's arguments.
    pub args: Vec<OsString>,
    /// The `shardflow` binary, which provides the hidden commands `guard` and `child`.
    pub helper: PathBuf,
    /// Number of processes on this node, at least 1; the same on every node.
    pub local_processes: u32,
    /// Number of nodes, at least 1.
    pub nodes: u32,
    /// Number of this node, below `nodes`.
    pub node: u32,
    /// The address of process 0. On one node, the default is a Unix socket in a private folder.
    pub endpoint: Option<Endpoint>,
    /// Name of the job: letters, digits, `.`, `-` and `_`. Generated if not set.
    pub run_id: Option<String>,
    /// Maximum number of restarts.
    pub restarts_max: u64,
    /// Folder of the logs: `<log_dir>/<run id>/attempt-<n>/rank-<r>.log`.
    pub log_dir: PathBuf,
    /// Time between SIGTERM, or a forwarded signal, and SIGKILL.
    pub grace: Duration,
    /// Time from the first failure until the launcher sends SIGTERM to the remaining processes.
    pub failure_wait: Duration,
    /// Pause before the second restart. It doubles with each later restart.
    pub restart_wait: Duration,
    /// Environment variables that the launcher sets for the processes and also reads, such as
    /// [`crate::env::HEARTBEAT_MS`].
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
    #[error("cannot {action}: {source}{}", limit_hint(source))]
    Io { action: String, source: io::Error },
}

/// A hint for the user if a system limit prevents the start of a process or a thread.
fn limit_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::WouldBlock => {
            "; raise the limit on processes and threads (`ulimit -u`, `pids.max` of the cgroup)"
        }
        _ => "",
    }
}

impl LaunchError {
    /// The launcher's exit code.
    pub fn exit(&self) -> Exit {
        match self {
            LaunchError::Usage(_) => Exit::Usage,
            LaunchError::Refused(_) => Exit::Refused,
            LaunchError::Env(error) => error.exit(),
            // The system cannot start a process or a thread.
            LaunchError::Io { source, .. } if source.kind() == io::ErrorKind::WouldBlock => Exit::Refused,
            LaunchError::Io { .. } => Exit::Internal,
        }
    }

    pub(super) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> LaunchError {
        |source| LaunchError::Io { action: action.into(), source }
    }
}

/// Returns how to reach the other nodes. Returns `None` for a single node. Also returns `None` if flags or variables
/// are missing or invalid; other code reports this error.
pub(super) fn departure(options: &LaunchOptions) -> Option<Departure> {
    let endpoint = options.endpoint.as_ref().filter(|_| options.nodes > 1)?;
    let variables = variables(options);
    let secret = SecretSource::find(&variables).ok()??.read().ok()?;
    let cluster_options = ClusterOptions::read(&variables).unwrap_or_default();
    Some(Departure::new(endpoint, secret, &cluster_options, processes(options)?))
}

/// Returns a report which states that this node has left the job ([`Report::departed`]).
pub(super) fn departed(options: &LaunchOptions, exit: Exit, cause: &str) -> Report {
    let LaunchOptions { node, local_processes, .. } = options;
    let rank = node.saturating_mul(*local_processes);
    let (time_unix_ns, cause) = (unix_ns(), format!("node {node} ended: {cause}"));
    let (exit, first_cause_rank) = (exit.of_waiting().code(), Some(rank));
    Report { rank, exit, time_unix_ns, cause, first_cause_rank, joined: false, departed: true }
}

/// The total number of processes on all nodes. `None` if the total exceeds the maximum of a job.
pub(super) fn processes(options: &LaunchOptions) -> Option<u32> {
    options.local_processes.checked_mul(options.nodes).filter(|processes| *processes <= PROCESSES_MAX)
}

/// The environment variables of this process. Values from flags replace those of the environment.
pub(super) fn variables(options: &LaunchOptions) -> Variables {
    let given = options.variables.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
    process_variables().into_iter().chain(given).collect()
}

pub(super) fn check(options: &LaunchOptions) -> Result<(), LaunchError> {
    let usage = |message: String| Err(LaunchError::Usage(message));
    let LaunchOptions { local_processes, nodes, node, endpoint, run_id, .. } = options;
    if *local_processes == 0 || *nodes == 0 {
        return usage(format!("--nnodes {nodes} --nproc-per-node {local_processes}: both must be at least 1"));
    }
    if processes(options).is_none() {
        return usage(format!(
            "--nnodes {nodes} --nproc-per-node {local_processes}: a job cannot have more than {PROCESSES_MAX} processes"
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

/// Resolves the program's path before any process is started, so that a wrong name is reported only once.
pub(super) fn find_program(options: &LaunchOptions) -> Result<PathBuf, LaunchError> {
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
        let place = if program.is_file() { " in PATH; to run the file in this folder, use ./NAME" } else { " in PATH" };
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
