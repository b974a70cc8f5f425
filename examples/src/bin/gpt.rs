//! Trains a small GPT on a text, on any mesh of devices of one or several processes, and generates text with it at the
//! end.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardflow::job::output;
use shardflow::job::text::counted;
use shardflow::prelude::*;
use shardflow::session::plan_files;
use shardflow::trace::{TraceError, TraceFile};
use shardflow::watch::{Watch, WatchError};
use shardflow::{exit, flags};
use shardflow_examples::args::{
    ArgsError, DeviceArg, GptArgs, NonFiniteArg, OnUsr1Arg, PrecisionArg, ScheduleArg, fail,
};
use shardflow_examples::checkpoints::{Checkpoints, CheckpointsError};
use shardflow_examples::data::{DataError, Text};
use shardflow_examples::files::{self, OutputFileError, check_appendable, check_room, check_writable};
use shardflow_examples::log::{DeviceMemoryRecord, JsonLog, LogError, Progress, StepRecord, Totals, note, print};
use shardflow_examples::sample::Sampler;

/// Limit of the work after the last step, once a signal has requested the end.
const FINISH_LIMIT: Duration = Duration::from_secs(20);
/// How long a process that ends on request waits for the reader of its output.
const OUTPUT_LIMIT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    // Handlers come first: without them, process 1 of a container ignores signals.
    let requests = Requests::on_signals();
    let args: GptArgs = match flags::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(error) => return print_usage(&error),
    };
    let (result, requests) = match requests {
        Ok(requests) => (run(&args, &requests), requests),
        Err(error) => (Err(GptError::Signals(error)), Arc::default()),
    };
    let code = match result {
        Ok(()) => ExitCode::SUCCESS,
        // `shardflow plan` needs only the plan.
        Err(GptError::Session(SessionError::PlanWritten)) => ExitCode::SUCCESS,
        Err(error) => {
            // The launcher, if there is one, prints the first cause of all processes last.
            let reported =
                exit::report(Exit::from_code(error.exit_code()), &error.to_string(), error.first_cause_rank());
            reported.unwrap_or_else(|e| note(format!("warning: cannot report to the launcher: {e}")));
            fail(error.exit_code(), &error, &error.hint())
        }
    };
    output::finish(matches!(requests.pending(), Request::End(_)).then_some(OUTPUT_LIMIT));
    code
}

/// Prints the parser's message: the help, or a wrong flag, which is also reported to the other processes.
fn print_usage(error: &clap::Error) -> ExitCode {
    // A closed pipe is not an error.
    let _ = error.print();
    let code = u8::try_from(error.exit_code()).unwrap_or(Exit::Usage.code());
    if code != 0 {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        let reported = exit::report(Exit::from_code(code), first, None);
        reported.unwrap_or_else(|e| eprintln!("warning: cannot write the report: {e}"));
    }
    ExitCode::from(code)
}

/// Reports every detectable error before the first step, and creates files only after the checks. Each process runs all
/// of this; only the first one prints.
fn run(args: &GptArgs, requests: &Arc<Requests>) -> Result<(), GptError> {
    args.check()?;
    requests.set_job_end_margin(Duration::from_secs(args.job_end_margin));
    if args.on_usr1 == OnUsr1Arg::End {
        requests.set_on_usr1(Request::End(Exit::Retry));
    }
    let mut cluster = Cluster::from_env()?;
    cluster.options.on_waiting = Some(Arc::new(|missing| note(missing)));
    let text = Text::load(args.data.as_deref(), args.context)?;
    let model = model(args, &text);
    let options = options(args, &cluster)?;
    let plan = compile(build(args, &model)?, &options)?;
    let prints = cluster.is_first();
    let resume = args.resume_at(cluster.restart());
    if args.explain {
        if prints {
            print(plan.explain().trim_end());
        }
        return Ok(());
    }
    let sampler = sampler(args, &model, &cluster)?;
    if let Some(path) = args.save.as_deref().filter(|_| prints) {
        check_writable(path)?;
    }
    args.log_json.as_deref().filter(|_| prints).map_or(Ok(()), check_appendable)?;
    let trace_path = args.trace.as_deref().map(|path| trace_path(path, &cluster));
    trace_path.as_deref().map_or(Ok(()), check_writable)?;
    if prints {
        print_header(args, &text, &plan, &cluster);
    }
    let process = cluster.process();
    let watch = args.listen.filter(|_| !plan_files::is_requested()).map(|first| listen(first, process)).transpose()?;
    let planned_threads = plan.threads_per_device;
    let mut session = Session::start(plan, &session_options(args, &text, cluster, requests.clone()))?;
    if let Some(path) = args.save.as_deref().filter(|_| prints) {
        let room = check_room(path, session.checkpoint_bytes());
        room.map_err(|e| GptError::Save(CheckpointError::Io { path: e.path, source: e.cause }.into()))?;
    }
    if prints {
        report_threads(planned_threads, &session);
    }
    if let Some(watch) = &watch {
        watch.show(&session);
    }
    let checkpoints = args
        .checkpoint
        .as_deref()
        .map(|place| Checkpoints::open(place, &GptArgs { resume, ..args.clone() }, prints, &mut session));
    let checkpoints = checkpoints.transpose()?;
    if let Some(path) = &args.init_from {
        init_from(path, &mut session, checkpoints.as_ref().is_some_and(Checkpoints::is_resumed), prints)?;
    }
    let open = if session.steps() > 0 { JsonLog::append } else { JsonLog::create };
    let log = args.log_json.as_deref().filter(|_| prints).map(open).transpose()?;
    let trace = trace_path.map(|path| TraceFile::create(&path, args.trace_mib.saturating_mul(1 << 20))).transpose()?;
    let outputs = Outputs { log, checkpoints, trace, requests: requests.clone(), process };
    let deferred = requests.defer();
    train(args, &text, &mut session, outputs, prints)?;
    deferred.within(FINISH_LIMIT);
    if let Some(path) = &args.save {
        session.save(path).map_err(GptError::Save)?;
        if prints {
            print(format!("parameters saved to {}", path.display()));
        }
    }
    // Copies of all parameters, which no budget counts. Every process has to make this call.
    let parameters = (args.sample > 0).then(|| session.parameters()).transpose()?;
    // End the session's threads before the sampler starts its own.
    session.shutdown()?;
    drop(deferred);
    if let Request::End(exit) = requests.pending() {
        return Err(GptError::Ended { exit, steps: args.steps, process, saved: Saved::All });
    }
    if let Some((sampler, parameters)) = sampler.zip(parameters).filter(|_| prints) {
        let written = sampler.run(&parameters, &text.prompt(), args.sample, args.seed)?;
        print(format!("\n{} characters written by the model:\n{}", args.sample, text.decode(&written)));
    }
    Ok(())
}

/// Loads parameters, unless the session has continued from a checkpoint, which has its own.
fn init_from(path: &Path, session: &mut Session, is_resumed: bool, prints: bool) -> Result<(), GptError> {
    let notes = if is_resumed {
        vec![format!("--init-from {} is not used: the checkpoint has the parameters", path.display())]
    } else {
        session.init_from(path).map_err(GptError::InitFrom)?
    };
    notes.iter().filter(|_| prints).for_each(note);
    Ok(())
}

/// The model's sizes; the text determines the size of the vocabulary.
fn model(args: &GptArgs, text: &Text) -> GptConfig {
    GptConfig {
        vocabulary: text.vocab(),
        layers: args.layers,
        heads: args.heads,
        width: args.width,
        context: args.context,
        batch: args.batch,
        dropout: args.dropout,
    }
}

fn options(args: &GptArgs, cluster: &Cluster) -> Result<CompileOptions, GptError> {
    let here = cluster.devices_here(args.mesh.devices());
    let device = match args.device {
        DeviceArg::Cpu => DeviceKind::Cpu,
        DeviceArg::Cuda => DeviceKind::Cuda,
    };
    let memory_bytes = match (args.memory_bytes(), device) {
        (Some(given), _) => Some(given),
        // A plan can be shown on any machine. A session also compares a plan for CPUs with the node's free memory.
        (None, _) if plan_files::is_requested() => None,
        (None, DeviceKind::Cpu) => None,
        // A plan can be shown without a GPU.
        (None, DeviceKind::Cuda) if args.explain => gpu_memory_bytes(here).ok(),
        (None, DeviceKind::Cuda) => Some(gpu_memory_bytes(here).map_err(GptError::Device)?),
    };
    Ok(CompileOptions {
        device,
        micro_batches: args.micro_batches,
        schedule: match args.schedule {
            ScheduleArg::GPipe => Schedule::GPipe,
            ScheduleArg::OneFOneB => Schedule::OneFOneB,
        },
        precision: match args.precision {
            PrecisionArg::F32 => Precision::F32,
            PrecisionArg::BF16 => Precision::BF16,
        },
        threads_per_device: args.threads(cores(), here),
        memory_bytes,
        ..CompileOptions::default()
    })
}

/// Consecutive steps that may be skipped before the training ends.
const NON_FINITE_IN_A_ROW_MAX: u32 = 10;

/// Stalled steps and slow processes are logged as warnings. A stall report states what each actor waits for.
fn session_options(args: &GptArgs, text: &Text, cluster: Cluster, requests: Arc<Requests>) -> SessionOptions {
    let warn: Arc<dyn Fn(&str) + Send + Sync> = Arc::new(|report| note(format!("warning: {report}")));
    let hang = Duration::from_secs(args.hang_timeout);
    let watchdog = WatchdogOptions {
        abort_after: Some(hang),
        on_stall: Some(warn.clone()),
        on_slow: Some(warn),
        ..WatchdogOptions::default()
    };
    let on_non_finite = match args.on_non_finite {
        NonFiniteArg::Stop => OnNonFinite::Stop,
        NonFiniteArg::Skip | NonFiniteArg::Rollback => OnNonFinite::Skip { in_a_row_max: NON_FINITE_IN_A_ROW_MAX },
    };
    let peak_flops = args.peak_tflops.map(|tera| tera * 1e12);
    SessionOptions {
        seed: args.seed,
        watchdog,
        cluster,
        requests: Some(requests),
        on_non_finite,
        threads: if args.threads_per_device.is_some() { Threads::Planned } else { Threads::Owned },
        peak_flops,
        steps_planned: Some(args.steps),
        declared: declared(args, text),
        ..SessionOptions::default()
    }
}

/// Reports the number of threads if the cores assigned at the rendezvous differ from those that this process expected.
fn report_threads(planned_threads: usize, session: &Session) {
    let threads = session.plan().threads_per_device;
    if threads != planned_threads {
        note(format!("{} per device: the cores that this process may run on", counted(threads, "thread")));
    }
}

/// The values that must be equal on all ranks. A resume refuses other data or another model, and reports another batch
/// size, dropout, clipping or precision. Other values may change on resume.
fn declared(args: &GptArgs, text: &Text) -> Declarations {
    use OnResume::{Free, Same, Warn};
    fn name(value: &impl clap::ValueEnum) -> String {
        value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
    let is_given = |given: bool| if given { "given" } else { "not given" };
    Declarations::default()
        .declare("data", text.identity(), Same)
        .declare_model("vocabulary", text.vocabulary_identity())
        .declare_model("layers", args.layers)
        .declare_model("heads", args.heads)
        .declare_model("width", args.width)
        .declare_model("context", args.context)
        .declare("batch", args.batch, Warn)
        .declare("dropout", args.dropout, Warn)
        .declare("precision", name(&args.precision), Warn)
        .declare("lr", args.lr, Free)
        // A resume compares the maximum norm itself.
        .declare("clip", args.clip.map_or("none".into(), |clip| clip.to_string()), Free)
        .declare("steps", args.steps, Free)
        .declare("micro-batches", args.micro_batches, Free)
        .declare("schedule", name(&args.schedule), Free)
        .declare("sample", is_given(args.sample > 0), Free)
        .declare("on-non-finite", name(&args.on_non_finite), Free)
        .declare("init-from", is_given(args.init_from.is_some()), Free)
        .declare("save", is_given(args.save.is_some()), Free)
        .declare("checkpoint", is_given(args.checkpoint.is_some()), Free)
        .declare("checkpoint-every", args.checkpoint_every, Free)
        .declare("resume", name(&args.resume), Free)
}

/// Each process listens on a separate port.
fn listen(first: SocketAddr, process: u32) -> Result<Watch, GptError> {
    let port = u32::from(first.port()) + if first.port() == 0 { 0 } else { process };
    let Ok(port) = u16::try_from(port) else { return Err(GptError::Port { first, process }) };
    let watch = Watch::listen(SocketAddr::new(first.ip(), port))?;
    note(format!("watch it at http://{}, metrics at /metrics", watch.address()));
    Ok(watch)
}

/// Each process writes a separate file.
fn trace_path(path: &Path, cluster: &Cluster) -> PathBuf {
    let numbered = || PathBuf::from(format!("{}.{}", path.display(), cluster.process()));
    if cluster.processes() > 1 { numbered() } else { path.to_owned() }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The training program, which is the same for every mesh.
fn build(args: &GptArgs, model: &GptConfig) -> Result<Graph, GptError> {
    let mut g = Graph::new(&Mesh::new(&args.mesh.axes())?);
    let logits = nn::gpt(&mut g, model);
    let layout = nn::batch_layout(&g);
    let targets = g.input("targets", &[model.batch, model.context], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW { max_norm: args.clip.unwrap_or(f32::INFINITY), ..AdamW::default() });
    Ok(g)
}

/// The program that generates text, if `--sample` requests any.
fn sampler(args: &GptArgs, model: &GptConfig, cluster: &Cluster) -> Result<Option<Sampler>, GptError> {
    let here = cluster.devices_here(args.mesh.devices());
    let options = CompileOptions { threads_per_device: args.threads(cores(), here), ..CompileOptions::default() };
    Ok((args.sample > 0 && cluster.is_first()).then(|| Sampler::compile(model, &options)).transpose()?)
}

fn print_header(args: &GptArgs, text: &Text, plan: &Plan, cluster: &Cluster) {
    let (weights, devices, threads) = (weights(plan), args.mesh.devices(), plan.threads_per_device);
    let source = args.data.as_deref().map_or("this repository".into(), |path| path.display().to_string());
    print(format!("text      {source}: {} training tokens, {} different", text.train_len(), text.vocab()));
    print(format!("model     {}, width {}, {weights} weights", counted(args.layers, "layer"), args.width));
    let processes = match cluster.processes() {
        1 => String::new(),
        count => format!(", in {count} processes"),
    };
    let (devices, threads) = (counted(devices, "device"), counted(threads, "thread"));
    print(format!("mesh      {}: {devices} of {threads}{processes}", plan.graph.mesh()));
    let batches = counted(plan.micro_batches, "micro-batch");
    let (samples, tokens) = (counted(args.batch, "sample"), counted(args.context, "token"));
    print(format!("step      {samples} of {tokens}, in {batches}"));
}

/// Elements of all parameters.
fn weights(plan: &Plan) -> usize {
    plan.graph.parameters().iter().map(|v| plan.graph.shape(*v).iter().product::<usize>()).sum()
}

/// Files that a training writes.
struct Outputs {
    log: Option<JsonLog>,
    checkpoints: Option<Checkpoints>,
    trace: Option<TraceFile>,
    /// Receives the duration of the last save.
    requests: Arc<Requests>,
    process: u32,
}

fn train(args: &GptArgs, text: &Text, session: &mut Session, outputs: Outputs, prints: bool) -> Result<(), GptError> {
    let Outputs { mut log, mut checkpoints, mut trace, requests, process } = outputs;
    let mut progress = prints.then(|| Progress::new(args.steps));
    let (shape, step_tokens) = ([args.batch, args.context], (args.batch * args.context) as u64);
    let (mut seconds, mut final_loss) = (0.0, None);
    let mut steps = 0;
    while session.steps() < args.steps {
        let step = session.steps();
        let batch = args.batch as u64;
        let first = checkpoints.as_mut().map_or(step.wrapping_mul(batch), |checkpoints| checkpoints.take(batch));
        let (ids, targets) = text.samples(first, args.batch, args.context);
        let inputs = [("ids", HostTensor::i32(&shape, ids)), ("targets", HostTensor::i32(&shape, targets))];
        let start = Instant::now();
        let report = session.step(&inputs, args.lr)?;
        let step_seconds = start.elapsed().as_secs_f64();
        let loss = report.loss.map_or(f64::NAN, f64::from);
        let tokens_per_second = step_tokens as f64 / step_seconds;
        let record = StepRecord { step, loss, grad_norm: report.grad_norm, step_seconds, tokens_per_second };
        if let Some(progress) = &mut progress {
            progress.step(&record);
        }
        if let Some(log) = &mut log {
            log.step(&record)?;
        }
        if let Some(file) = &mut trace
            && !file.add(session)?
        {
            note(format!("the trace ends with step {}: it has reached --trace-mib {}", step + 1, args.trace_mib));
            finish_trace(trace.take())?;
        }
        (steps, seconds, final_loss) = (steps + 1, seconds + step_seconds, Some(loss));
        if let Some(found) = &report.non_finite {
            if prints {
                note(format!("warning: {found}; nothing is updated"));
            }
            if let Some(checkpoints) = checkpoints.as_mut().filter(|_| args.on_non_finite == NonFiniteArg::Rollback) {
                checkpoints.roll_back(session, found)?;
                continue;
            }
        }
        let is_last = step + 1 == args.steps || matches!(report.request, Request::End(_));
        if let Some(checkpoints) = &mut checkpoints {
            checkpoints.after_step(session, report.request, is_last)?;
            requests.set_save_time(checkpoints.save_time());
        } else if report.request == Request::Checkpoint && prints {
            note("warning: a checkpoint was requested, but nothing is saved without --checkpoint DIR");
        }
        if let Request::End(exit) = report.request {
            let saved = args.checkpoint.clone().map_or(Saved::Nothing, Saved::Checkpoint);
            return Err(GptError::Ended { exit, steps: session.steps(), process, saved });
        }
    }
    finish_trace(trace)?;
    let totals = totals(steps, step_tokens, seconds, final_loss, session);
    if prints {
        print_totals(&totals);
    }
    log.map_or(Ok(()), |log| log.finish(&totals)).map_err(GptError::from)
}

fn finish_trace(trace: Option<TraceFile>) -> Result<(), TraceError> {
    if let Some(lost) = trace.map(TraceFile::finish).transpose()?.filter(|lost| *lost > 0) {
        note(format!("warning: the trace lacks {lost} firings: a step has more firings than an actor records"));
    }
    Ok(())
}

fn totals(steps: u64, step_tokens: u64, train_seconds: f64, final_loss: Option<f64>, session: &Session) -> Totals {
    let tokens = steps.saturating_mul(step_tokens);
    let device = |d: DeviceMetrics| DeviceMemoryRecord {
        device: d.device,
        planned_peak_bytes: d.planned_peak_bytes,
        measured_peak_bytes: d.measured_peak_bytes,
    };
    let devices = session.metrics().devices.into_iter().map(device).collect();
    Totals { steps, tokens, train_seconds, tokens_per_second: tokens as f64 / train_seconds, final_loss, devices }
}

fn print_totals(totals: &Totals) {
    if totals.steps > 0 {
        let (seconds, rate) = (totals.train_seconds, totals.tokens_per_second);
        print(format!("{} in {seconds:.1} s, {rate:.0} tokens/s", counted(totals.steps, "step")));
    }
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    for d in &totals.devices {
        let (planned, measured) = (mib(d.planned_peak_bytes), mib(d.measured_peak_bytes));
        print(format!("device {:<2} memory at most {measured:.2} MiB, planned {planned:.2} MiB", d.device));
    }
}

/// State that a training saved before it ended on request.
#[derive(Debug)]
enum Saved {
    /// The last step was done, and all files are written.
    All,
    /// A checkpoint of the last step, in this store.
    Checkpoint(String),
    Nothing,
}

/// Why the program ends early.
#[derive(Debug, thiserror::Error)]
enum GptError {
    #[error(transparent)]
    Args(#[from] ArgsError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    OutputFile(#[from] OutputFileError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("--mesh: {0}")]
    Mesh(#[from] LayoutError),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error("--init-from {0}")]
    InitFrom(SessionError),
    #[error("--save {0}")]
    Save(SessionError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Checkpoints(#[from] CheckpointsError),
    #[error("--device cuda: {0}")]
    Device(KernelError),
    #[error("--listen {0}")]
    Watch(#[from] WatchError),
    #[error("--listen {first}: the port for process {process} is above 65535")]
    Port { first: SocketAddr, process: u32 },
    #[error("--trace: {0}")]
    Trace(#[from] TraceError),
    #[error("cannot handle signals: {0}")]
    Signals(std::io::Error),
    #[error("ended after step {steps}, requested by {}; {saved}", requester(*.exit))]
    Ended { exit: Exit, steps: u64, process: u32, saved: Saved },
}

/// The signal or event that requested the end.
fn requester(exit: Exit) -> &'static str {
    match exit {
        Exit::Signal(1) => "SIGHUP",
        Exit::Signal(2) => "SIGINT",
        Exit::Signal(_) => "SIGTERM",
        _ => "SIGUSR1 or the end of the job's time",
    }
}

impl std::fmt::Display for Saved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("the training is done"),
            Self::Checkpoint(place) => write!(f, "this step is saved in {place}"),
            Self::Nothing => f.write_str("nothing is saved"),
        }
    }
}

const NODE_MEMORY_HINT: &str =
    "reduce --batch, --width or --layers, use more nodes, or free memory or raise its limit on this node";

fn is_node_memory(error: &SessionError) -> bool {
    matches!(error, SessionError::Plan(PlanError::NodeMemory { .. }))
}

impl GptError {
    fn exit_code(&self) -> u8 {
        use SessionError::Checkpoint;
        match self {
            Self::Args(error) => error.exit_code(),
            Self::Cluster(error) => error.exit().code(),
            Self::Checkpoints(error) => error.exit().code(),
            Self::Signals(_) => Exit::Internal.code(),
            Self::Device(error) => SessionError::Kernel(error.clone()).exit().code(),
            Self::Ended { exit, .. } => exit.code(),
            Self::Data(_) | Self::OutputFile(_) | Self::Log(_) | Self::Mesh(_) => Exit::Usage.code(),
            Self::Watch(_) | Self::Port { .. } | Self::Trace(_) => Exit::Usage.code(),
            Self::InitFrom(Checkpoint(_)) => Exit::Usage.code(),
            Self::Save(Checkpoint(_)) => Exit::CannotWrite.code(),
            Self::Compile(_) => Exit::Refused.code(),
            Self::InitFrom(error) | Self::Save(error) | Self::Session(error) => error.exit().code(),
        }
    }

    /// The rank that failed first, if it is known.
    fn first_cause_rank(&self) -> Option<u32> {
        match self {
            Self::InitFrom(error) | Self::Save(error) | Self::Session(error) => error.first_cause_rank(),
            Self::Checkpoints(error) => error.session().and_then(SessionError::first_cause_rank),
            // No other process failed. With code 75, this prevents the launcher from restarting the process.
            Self::Ended { process, .. } => Some(*process),
            _ => None,
        }
    }

    /// What the user can change.
    fn hint(&self) -> String {
        match self {
            Self::Args(error) => error.hint(),
            Self::Data(error) => error.hint().into(),
            Self::Watch(_) | Self::Port { .. } => "give an address of this machine, and ports that are free".into(),
            Self::OutputFile(OutputFileError { cause, .. })
            | Self::Log(LogError { cause, .. })
            | Self::Trace(TraceError { source: cause, .. })
            | Self::Session(SessionError::PlanFile { source: cause, .. }) => files::hint(cause.kind()).into(),
            Self::Mesh(_) | Self::Compile(CompileError::Devices { .. }) => {
                "the number of devices is the product of the sizes in --mesh".into()
            }
            Self::Compile(CompileError::Plan(PlanError::Memory { .. }))
            | Self::Session(SessionError::Plan(PlanError::Memory { .. })) => {
                "--memory-mib sets the memory of each device".into()
            }
            Self::Session(error) if is_node_memory(error) => NODE_MEMORY_HINT.into(),
            Self::Checkpoints(error) if error.session().is_some_and(is_node_memory) => NODE_MEMORY_HINT.into(),
            Self::Session(SessionError::Kernel(KernelError::OutOfMemory { .. })) => {
                "reduce the model or the batch, or raise the limit on memory (`ulimit -v`)".into()
            }
            Self::Compile(CompileError::Graph(_) | CompileError::Range { .. }) => {
                "change the flag that gives this size; see `gpt --help`".into()
            }
            Self::InitFrom(SessionError::Checkpoint(CheckpointError::Unfit { .. })) => {
                "give the --data, --layers, --heads, --width and --context that the file was saved with".into()
            }
            Self::InitFrom(SessionError::Checkpoint(CheckpointError::Dtype { .. })) => {
                "convert the file's tensors to F32, F16 or BF16".into()
            }
            Self::InitFrom(SessionError::Disagreement(_)) => "give all ranks the same file".into(),
            Self::InitFrom(_) => "give a file that `gpt --save` wrote".into(),
            Self::Save(SessionError::Checkpoint(error)) => error.io_kind().map_or("", files::hint).into(),
            Self::Save(_) => String::new(),
            Self::Checkpoints(error) => error.hint().into(),
            Self::Ended { saved: Saved::Checkpoint(_), .. } => "the same command continues from there".into(),
            Self::Ended { saved: Saved::Nothing, .. } => {
                "the same command starts from step 0; with --checkpoint DIR it saves a checkpoint before it ends".into()
            }
            Self::Ended { saved: Saved::All, .. } | Self::Signals(_) => String::new(),
            Self::Device(_) | Self::Session(SessionError::Kernel(KernelError::Unavailable { .. })) => {
                "`shardflow doctor` lists the devices and libraries of this machine".into()
            }
            Self::Session(SessionError::NonFinite(_)) => {
                "try a lower --lr, or --clip 1; --on-non-finite selects another policy".into()
            }
            Self::Cluster(error) | Self::Session(SessionError::Cluster(error))
                if error.exit() == Exit::PeerUnavailable =>
            {
                "check that all ranks are started with the same program and flags, and can reach rank 0".into()
            }
            // The error states the cause.
            Self::Cluster(_) | Self::Session(SessionError::Cluster(_)) => String::new(),
            Self::Session(SessionError::Declared(_) | SessionError::Disagreement(_)) => String::new(),
            Self::Session(SessionError::Failed(failure)) if failure.is_peer_failure() => {
                "see the log of that rank; with --checkpoint DIR the same command continues from the last checkpoint"
                    .into()
            }
            Self::Session(
                error @ (SessionError::Failed(_) | SessionError::Kernel(_) | SessionError::Checkpoint(_)),
            ) if error.exit() != Exit::Internal => String::new(),
            Self::Compile(CompileError::Plan(_)) | Self::Session(_) => {
                "this is a bug in Shardflow: please report it with the command and this text".into()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use shardflow::exit::Report;
    use shardflow::job::rendezvous::{RendezvousError, RendezvousRefusal};

    use super::*;

    fn hint_of(error: impl Into<SessionError>) -> String {
        GptError::Session(error.into()).hint()
    }

    /// A failure that another rank reports does not get the hint to start all ranks.
    #[test]
    fn hints_fit_the_cause() {
        let refused = |exit| {
            let report = Report { rank: 1, exit, cause: "--lr must be finite".into(), ..Report::default() };
            ClusterError::Rendezvous(RendezvousError::Refused(RendezvousRefusal::Failed(report)))
        };
        assert_eq!([2, 65, 76, 78].map(|exit| hint_of(refused(exit))), [""; 4]);
        assert!(hint_of(refused(69)).contains("can reach rank 0"));
        let kernel = |cause| hint_of(SessionError::Kernel(cause));
        assert_eq!(
            kernel(KernelError::Data { op: "embedding".into(), what: "token 7 of 5".into() }),
            "",
            "bad data is not a bug"
        );
        let file = |kind: std::io::ErrorKind| {
            let cause = kind.into();
            GptError::Log(LogError { path: "log".into(), cause }).hint()
        };
        let save = CheckpointError::Io { path: "model".into(), source: std::io::ErrorKind::StorageFull.into() };
        assert_eq!(GptError::Save(save.into()).exit_code(), Exit::CannotWrite.code());
        assert!(file(std::io::ErrorKind::StorageFull).contains("free space"));
        assert!(file(std::io::ErrorKind::PermissionDenied).contains("immutable"));
    }
}
