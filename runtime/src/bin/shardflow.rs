//! The command `shardflow`: parses the arguments and calls the library.

use std::ffi::OsString;
use std::fmt::Display;
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Write};
#[cfg(feature = "watch")]
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use rustix::fs::MemfdFlags;
use serde::Serialize;
use shardflow::checkpoint::cli::{self, CheckpointCommand};
use shardflow::doctor;
use shardflow::flags;
use shardflow::program::ProgramError;
use shardflow::session::plan_files::{PLAN_DOT, PLAN_HTML, PLAN_TEXT};
use shardflow::trace::join::JoinedTrace;
use shardflow::trace::summary::TraceSummary;
#[cfg(feature = "watch")]
use shardflow::watch::client;
use shardflow_job::env::{self, Endpoint};
use shardflow_job::exit::Exit;
use shardflow_job::launcher::{self, LaunchOptions, become_program, child_command, guard, launch};
use shardflow_job::machine::parse_ip;
use shardflow_job::requests::Requests;
use shardflow_job::secret::Secret;
use shardflow_kernels::cuda::library::SETTINGS;

#[derive(Parser)]
#[command(name = "shardflow", version, about = "An actor-based dataflow runtime for training neural networks")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a program as several processes on one or more nodes.
    Launch(Box<LaunchArgs>),
    /// List, verify, reshard or export checkpoints.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Report this machine's resources and missing software, and how to install that software. Exits with code 78 if a
    /// feature that every job requires is broken.
    Doctor {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Print a program's plan, or write it to files. The program does not train.
    Plan {
        /// Write an HTML page to this file. The page shows the graph, memory, layouts and boxing
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
        /// Write the graph in Graphviz DOT format to this file
        #[arg(long, value_name = "FILE")]
        dot: Option<PathBuf>,
        /// The program and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "PROGRAM ARGS")]
        command: Vec<OsString>,
    },
    /// Summarise the trace of a program that ran with `--trace`: busy time, idle time with the reasons, critical path
    /// and simulated time.
    Trace {
        /// The trace files, one per process
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Merge all files into this file, with a common clock
        #[arg(long, value_name = "FILE")]
        join: Option<PathBuf>,
    },
    /// Show the state of a process that was started with `--listen`.
    #[cfg(feature = "watch")]
    Status {
        /// Address that the process listens on
        #[arg(long, value_name = "ADDRESS:PORT", default_value = client::ADDRESS, value_parser = client::address)]
        at: SocketAddr,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show the chain of waiting actors, down to the actor that causes the wait. The chain may lead to other processes
    /// on this node.
    #[cfg(feature = "watch")]
    ExplainHang {
        /// Address that one of the job's processes listens on
        #[arg(long, value_name = "ADDRESS:PORT", default_value = client::ADDRESS, value_parser = client::address)]
        at: SocketAddr,
    },
    /// Print a new secret for `SHARDFLOW_SECRET`.
    Secret,
    /// For internal use by the launcher: kills the remaining processes when the launcher ends.
    #[command(hide = true)]
    Guard {
        #[arg(long)]
        folder: PathBuf,
    },
    /// For internal use by `launch` and `plan`: executes a program and kills it when the parent process ends.
    #[command(hide = true)]
    Child {
        #[arg(long)]
        parent: u32,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
}

/// A flag that torchrun also has keeps its name from torchrun. Its words may be separated by `-` or `_`.
#[derive(Args)]
struct LaunchArgs {
    /// Number of processes on this node; must be equal on all nodes
    #[arg(long, alias = "nproc_per_node", value_name = "N", default_value_t = 1)]
    nproc_per_node: u32,
    /// Number of nodes. Each node runs this command with its own --node-rank
    #[arg(long, value_name = "N", default_value_t = 1)]
    nnodes: u32,
    /// Rank of this node, from 0. Required if there are several nodes
    #[arg(long, alias = "node_rank", value_name = "N")]
    node_rank: Option<u32>,
    /// Rendezvous address on node 0. Required if there are several nodes
    #[arg(long, alias = "rdzv_endpoint", value_name = "HOST:PORT", value_parser = endpoint)]
    rdzv_endpoint: Option<Endpoint>,
    /// Name of the job and of its log folder
    #[arg(long, alias = "rdzv_id", value_name = "NAME")]
    rdzv_id: Option<String>,
    /// Maximum number of restarts after failures that a restart may fix
    #[arg(long, alias = "max_restarts", value_name = "N", default_value_t = 0)]
    max_restarts: u64,
    /// Accepted for compatibility with torchrun, but ignored: the launcher detects the end of a process without polling
    #[arg(long, alias = "monitor_interval", value_name = "SECONDS", hide = true)]
    #[allow(dead_code)]
    monitor_interval: Option<f64>,
    /// Folder for logs; a log is DIR/<job>/attempt-<n>/rank-<r>.log
    #[arg(long, alias = "log_dir", value_name = "DIR", default_value = "shardflow-logs")]
    log_dir: PathBuf,
    /// Maximum time that a process may take to end after a signal. After this time, it receives SIGKILL
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    grace: Duration,
    /// Time between the first failure and SIGTERM to the other processes
    #[arg(long, alias = "failure_wait", value_name = "SECONDS", default_value = "15", value_parser = seconds)]
    failure_wait: Duration,
    /// Pause before the second restart. It doubles for each later restart, up to 60 s. The first restart has no pause
    #[arg(long, alias = "restart_wait", value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    restart_wait: Duration,
    /// Time to wait at the start for the processes of all nodes [default: 300]
    #[arg(long, alias = "meet_wait", value_name = "SECONDS", value_parser = positive_seconds)]
    meet_wait: Option<Duration>,
    /// Time limit for the report to the other nodes if this node fails permanently before the rendezvous [default: 10]
    #[arg(long, alias = "report_wait", value_name = "SECONDS", value_parser = seconds)]
    report_wait: Option<Duration>,
    /// Local address that the processes listen on [default: source address of the route to process 0]
    #[arg(long, value_name = "ADDRESS", value_parser = interface)]
    interface: Option<String>,
    /// Host name or address at which other nodes reach this node's processes [default: the address they listen on]
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
    /// Interval between heartbeats; must be equal on all nodes [default: 250]
    #[arg(long, value_name = "MILLISECONDS")]
    heartbeat_ms: Option<u64>,
    /// Time without heartbeats after which a process counts as failed; must be equal on all nodes [default: 4000]
    #[arg(long, value_name = "MILLISECONDS")]
    heartbeat_deadline_ms: Option<u64>,
    /// Encrypt tensors and register messages between nodes. Must be equal on all nodes. Rendezvous and control messages
    /// are always encrypted
    #[arg(long)]
    encrypt: bool,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "PROGRAM ARGS")]
    command: Vec<OsString>,
}

impl LaunchArgs {
    /// Returns the processes' environment variables: those for the given flags, and defaults for unset CUDA settings.
    fn variables(&self) -> Vec<(&'static str, String)> {
        let given = [
            (env::MEET_MS, self.meet_wait.map(|wait| wait.as_millis().to_string())),
            (env::REPORT_WAIT_MS, self.report_wait.map(|wait| wait.as_millis().to_string())),
            (env::INTERFACE, self.interface.clone()),
            (env::ENCRYPT, self.encrypt.then(|| "on".to_owned())),
            (env::ADVERTISE, self.advertise.clone()),
            (env::HEARTBEAT_MS, self.heartbeat_ms.map(|ms| ms.to_string())),
            (env::HEARTBEAT_DEADLINE_MS, self.heartbeat_deadline_ms.map(|ms| ms.to_string())),
        ];
        let cuda = SETTINGS.iter().filter(|(name, _)| std::env::var_os(name).is_none());
        let cuda = cuda.map(|(name, value)| (*name, Some((*value).to_owned())));
        given.into_iter().chain(cuda).filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

fn endpoint(text: &str) -> Result<Endpoint, String> {
    Endpoint::parse_rendezvous(text).map_err(|expected| format!("expected {expected}"))
}

/// Checks an address. Returns the address as text, because a parsed address cannot contain the name of an IPv6 zone.
fn interface(text: &str) -> Result<String, String> {
    parse_ip(text).map(|_| text.into()).ok_or_else(|| "expected an IP address, such as 10.0.0.1 or fe80::1%eth0".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "expected a number of seconds".to_string())?;
    // Limit waits to one day, so that `Instant` cannot overflow. A longer wait is a mistake.
    if !(0.0..=86400.0).contains(&seconds) {
        return Err("expected 0 to 86400 seconds".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

fn positive_seconds(text: &str) -> Result<Duration, String> {
    seconds(text).ok().filter(|time| time.as_millis() > 0).ok_or("expected 0.001 to 86400 seconds".into())
}

fn main() -> ExitCode {
    // Clap exits with code 2 on a usage error.
    let Cli { command } = flags::parse(std::env::args_os()).unwrap_or_else(|error| {
        report_usage(&error);
        error.exit()
    });
    // The launcher and its helpers handle signals themselves. Every other command must end on a signal, even as pid 1.
    if !matches!(command, Command::Launch(_) | Command::Guard { .. } | Command::Child { .. })
        && let Err(error) = Requests::on_signals()
    {
        return fail(failed(Exit::Internal, format!("cannot handle signals: {error}"))).into();
    }
    let output = match command {
        Command::Launch(args) => run_launch(*args),
        Command::Checkpoint(command) => cli::run(&command).map(|text| (text, Exit::Done)),
        Command::Doctor { json } => run_doctor(json),
        #[cfg(feature = "watch")]
        Command::Status { at, json } => run_status(at, json),
        #[cfg(feature = "watch")]
        Command::ExplainHang { at } => done(client::explain_hang(at), Exit::PeerUnavailable),
        Command::Trace { files, join } => run_trace(&files, join.as_deref()),
        Command::Plan { html, dot, command } => run_plan(html, dot, &command),
        Command::Secret => done(Secret::random().map(|secret| secret.text().to_owned()), Exit::Internal),
        Command::Guard { folder } => Ok((String::new(), guard(&folder, std::io::stdin().lock()))),
        Command::Child { parent, command } => {
            Ok((String::new(), become_program(parent, command[0].clone().into(), &command[1..])))
        }
    };
    output.and_then(print).unwrap_or_else(fail).into()
}

type Output = Result<(String, Exit), ProgramError>;

fn failed(exit: Exit, error: impl Display) -> ProgramError {
    ProgramError::new(exit, error.to_string(), "")
}

fn done(result: Result<impl Display, impl Display>, exit: Exit) -> Output {
    result.map(|text| (text.to_string(), Exit::Done)).map_err(|error| failed(exit, error))
}

fn fail(error: ProgramError) -> Exit {
    eprintln!("error: {error}");
    error.exit
}

/// A closed pipe is not an error: its reader, such as `head`, wants no more output.
fn print((text, exit): (String, Exit)) -> Result<Exit, ProgramError> {
    if text.is_empty() {
        return Ok(exit);
    }
    match writeln!(std::io::stdout(), "{}", text.trim_end()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(failed(Exit::CannotWrite, error)),
        _ => Ok(exit),
    }
}

fn show(value: &(impl Serialize + Display), as_json: bool) -> Result<String, ProgramError> {
    let json = as_json.then(|| serde_json::to_string_pretty(value)).transpose();
    Ok(json.map_err(|error| failed(Exit::Internal, error))?.unwrap_or_else(|| value.to_string()))
}

/// Reports a usage error of `launch` to the other nodes, if the flags needed to reach those nodes can be parsed.
fn report_usage(error: &clap::Error) {
    let words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let Some(options) = error.use_stderr().then(|| report_options(&words)).flatten() else { return };
    launcher::report_usage(&options, flags::first_line(error));
}

/// Returns the options for a report to the other nodes, from arguments that cannot be parsed completely.
fn report_options(words: &[String]) -> Option<LaunchOptions> {
    let flags = words.get(2..).filter(|_| words[1] == "launch")?;
    let mut known = vec!["shardflow".to_string(), "launch".into()];
    for name in ["nnodes", "node-rank", "nproc-per-node", "rdzv-endpoint", "report-wait", "interface"] {
        let value = flags.iter().enumerate().find_map(|(index, word)| {
            let (flag, value) = word.split_once('=').map_or((word.as_str(), None), |(flag, value)| (flag, Some(value)));
            let matches = flag.strip_prefix("--").is_some_and(|flag| flag.replace('_', "-") == name);
            matches.then(|| value.or(flags.get(index + 1).map(String::as_str)))?
        });
        known.extend(value.map(|value| format!("--{name}={value}")));
    }
    known.push("program".into());
    match flags::parse(known).ok()? {
        Cli { command: Command::Launch(args) } => launch_options(*args).ok(),
        _ => None,
    }
}

fn run_launch(args: LaunchArgs) -> Output {
    let options = launch_options(args).map_err(|usage| failed(Exit::Usage, usage))?;
    let exit = launch(&options).map_err(|error| failed(error.exit(), error))?;
    Ok((String::new(), exit))
}

fn launch_options(args: LaunchArgs) -> Result<LaunchOptions, String> {
    let Some(node) = args.node_rank.or((args.nnodes <= 1).then_some(0)) else {
        return Err(format!("--nnodes {} needs --node-rank; give each node a different rank", args.nnodes));
    };
    Ok(LaunchOptions {
        variables: args.variables(),
        restart_wait: args.restart_wait,
        program: args.command[0].clone(),
        args: args.command[1..].to_vec(),
        // This path names the running binary even if its file was replaced.
        helper: "/proc/self/exe".into(),
        local_processes: args.nproc_per_node,
        nodes: args.nnodes,
        node,
        endpoint: args.rdzv_endpoint,
        run_id: args.rdzv_id,
        restarts_max: args.max_restarts,
        log_dir: args.log_dir,
        grace: args.grace,
        failure_wait: args.failure_wait,
    })
}

fn run_doctor(as_json: bool) -> Output {
    let findings = doctor::examine();
    Ok((show(&findings, as_json)?, findings.exit()))
}

fn run_trace(files: &[PathBuf], join: Option<&Path>) -> Output {
    let read = |file: &PathBuf| match std::fs::read(file) {
        // A truncated file may end inside a character.
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) => Err(failed(Exit::Usage, format!("cannot read {}: {error}", file.display()))),
    };
    let texts = files.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let name = |file: usize| files[file - 1].display().to_string();
    let joined = JoinedTrace::of(&texts).map_err(|error| failed(Exit::BadData, error.with_names(name)))?;
    if let Some(path) = join {
        let written = File::create(path).and_then(|file| joined.write(&texts, BufWriter::new(file)));
        written.map_err(|error| failed(Exit::Usage, format!("cannot write {}: {error}", path.display())))?;
    }
    let summary = TraceSummary::of(joined).map_err(|error| failed(Exit::BadData, error))?;
    // Names come from the file and may contain control characters.
    Ok((summary.to_string().replace(|c: char| c.is_control() && c != '\n', "?"), Exit::Done))
}

/// Runs the program with environment variables that make it write its plan instead of starting a session.
fn run_plan(html: Option<PathBuf>, dot: Option<PathBuf>, command: &[OsString]) -> Output {
    if let Some(flag) = command[0].to_str().filter(|name| name.starts_with('-')) {
        let text = format!("unexpected argument '{flag}'; see `shardflow plan --help`");
        return Err(failed(Exit::Usage, text));
    }
    // Let the program write the plan to a file in memory. A full disk then cannot truncate the plan, and a killed
    // command leaves no file behind.
    let text = rustix::fs::memfd_create("plan", MemfdFlags::CLOEXEC);
    let mut text =
        File::from(text.map_err(|e| failed(Exit::Internal, format!("cannot create a file in memory: {e}")))?);
    let mut program = child_command("/proc/self/exe".as_ref(), command[0].as_ref(), &command[1..]);
    program.env(PLAN_TEXT, format!("/proc/{}/fd/{}", std::process::id(), text.as_raw_fd()));
    for (variable, path) in [(PLAN_HTML, &html), (PLAN_DOT, &dot)] {
        // The program may change its working directory.
        let path = path.as_deref().map(std::path::absolute).transpose().map_err(|e| failed(Exit::Usage, e))?;
        path.map(|path| program.env(variable, path));
    }
    let name = command[0].display();
    let output = program.output().map_err(|e| failed(Exit::Usage, format!("cannot start {name}: {e}")))?;
    let mut plan = String::new();
    let read = text.read_to_string(&mut plan);
    read.map_err(|e| failed(Exit::Internal, format!("cannot read the plan: {e}")))?;
    let written: Vec<String> =
        html.iter().chain(&dot).map(|path| format!("the plan is in {}", path.display())).collect();
    // Accept any exit code: `Session::start` returns an error in this mode, and the program's `main` may return it.
    if !plan.is_empty() && output.status.code().is_some() {
        return Ok((if written.is_empty() { plan } else { written.join("\n") }, Exit::Done));
    }
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    let exit = Some(Exit::from_status(output.status)).filter(|exit| *exit != Exit::Done).unwrap_or(Exit::Usage);
    Err(failed(exit, format!("{name} ended without starting a session, so there is no plan")))
}

#[cfg(feature = "watch")]
fn run_status(at: SocketAddr, as_json: bool) -> Output {
    let status = client::status(at).map_err(|error| failed(Exit::PeerUnavailable, error))?;
    Ok((show(&status, as_json)?, Exit::Done))
}
