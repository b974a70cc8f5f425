//! Trains a small GPT on a text, on any mesh of devices of one process or of several, and writes a text with it at the end.
//! Imports `shardflow::prelude` and what the examples share.

use std::fmt::Display;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use clap::Parser;
use shardflow::exit;
use shardflow::passes::THREADS_MAX;
use shardflow::prelude::*;
use shardflow::session::shown;
use shardflow::trace::{TraceError, TraceFile};
use shardflow::watch::{Watch, WatchError};
use shardflow_examples::args::{ArgsError, DeviceArg, GptArgs, NonFiniteArg, PrecisionArg, ScheduleArg, fail};
use shardflow_examples::checkpoints::{Checkpoints, CheckpointsError};
use shardflow_examples::data::{DataError, Text};
use shardflow_examples::files::{PlaceError, check_writable};
use shardflow_examples::log::{DeviceMemory, JsonLog, LogError, Progress, StepRecord, Totals, note};
use shardflow_examples::sample::Sampler;

fn main() -> ExitCode {
    match run(&GptArgs::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // `shardflow plan` wanted no more.
        Err(GptError::Session(SessionError::PlanShown)) => ExitCode::SUCCESS,
        Err(error) => {
            // The launcher, if there is one, prints the first cause of all processes last.
            let told = exit::report(Exit::from_code(error.exit_code()), &error.to_string(), error.first_cause_rank());
            told.unwrap_or_else(|e| eprintln!("warning: cannot tell the launcher: {e}"));
            fail(error.exit_code(), &error, &error.hint())
        }
    }
}

/// All that can be wrong is found before the first step; files are made only then. Where the program runs as several
/// processes, each runs all of this; the first one speaks.
fn run(args: &GptArgs) -> Result<(), GptError> {
    args.check()?;
    let mut cluster = Cluster::from_env()?;
    cluster.options.on_waiting = Some(Arc::new(|missing| note(missing)));
    let text = Text::load(args.data.as_deref(), args.context)?;
    let model = model(args, &text);
    let options = options(args, &cluster)?;
    let plan = compile(build(args, &model)?, &options)?;
    let speaks = cluster.is_first();
    if args.explain {
        if speaks {
            say(plan.explain().trim_end());
        }
        return Ok(());
    }
    let sampler = sampler(args, &model, &cluster)?;
    if let Some(path) = args.save.as_deref().filter(|_| speaks) {
        check_writable(path)?;
    }
    let trace_path = args.trace.as_deref().map(|path| trace_path(path, &cluster));
    trace_path.as_deref().map_or(Ok(()), check_writable)?;
    if speaks {
        introduce(args, &text, &plan, &cluster);
    }
    let terminated: Arc<AtomicBool> = Arc::default();
    let process = cluster.process();
    let watch = args.listen.filter(|_| !shown::is_asked()).map(|first| listen(first, process)).transpose()?;
    let mut session = Session::start(plan, &session_options(args, cluster, terminated.clone()))?;
    check_threads(args, &session);
    exit::on_terminate(&terminated).map_err(GptError::Signals)?;
    if let Some(watch) = &watch {
        watch.show(&session);
    }
    if let Some(path) = &args.init_from {
        session.init_from(path).map_err(GptError::InitFrom)?;
    }
    let checkpoints = args.checkpoint.as_deref().map(|place| Checkpoints::open(place, args, speaks, &mut session));
    let checkpoints = checkpoints.transpose()?;
    let open = if session.steps() > 0 { JsonLog::go_on } else { JsonLog::create };
    let log = args.log_json.as_deref().filter(|_| speaks).map(open).transpose()?;
    let trace = trace_path.map(|path| TraceFile::create(&path)).transpose()?;
    let outputs = Outputs { log, checkpoints, trace };
    train(args, &text, &mut session, outputs, speaks)?;
    if let Some(path) = &args.save {
        session.save(path).map_err(GptError::Save)?;
        if speaks {
            say(format!("parameters saved to {}", path.display()));
        }
    }
    // Copies of all of them, which no budget counts; every process has to ask for them.
    let parameters = (args.sample > 0).then(|| session.parameters()).transpose()?;
    // Its threads end before those of the sampler start.
    session.shutdown()?;
    if let Some((sampler, parameters)) = sampler.zip(parameters).filter(|_| speaks) {
        let written = sampler.run(&parameters, &text.prompt(), args.sample, args.seed)?;
        say(format!("\n{} characters written by the model:\n{}", args.sample, text.decode(&written)));
    }
    Ok(())
}

/// The model's sizes; those of the vocabulary are the text's.
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
        // A plan can be looked at anywhere; a session holds one for CPUs against what the node has free.
        (None, _) if shown::is_asked() => None,
        (None, DeviceKind::Cpu) => None,
        // A plan can be looked at where no GPU is.
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

/// Steps one after another that may be passed over before the training is given up.
const NON_FINITE_IN_A_ROW_MAX: u32 = 10;

/// A step that does not move for a minute is told: what everything waits for, and who on which register of whom. So is a
/// process that the others wait for most of the time.
fn session_options(args: &GptArgs, cluster: Cluster, terminated: Arc<AtomicBool>) -> SessionOptions {
    let tell: Arc<dyn Fn(&str) + Send + Sync> = Arc::new(|report| note(format!("warning: {report}")));
    let hang = Duration::from_secs(args.hang_timeout);
    let watchdog = WatchdogOptions {
        abort_after: Some(hang),
        on_stall: Some(tell.clone()),
        on_slow: Some(tell),
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
        stop: Some(terminated),
        on_non_finite,
        peak_flops,
        steps_planned: Some(args.steps),
        tells_metrics: true,
    }
}

/// Threads are chosen before the processes meet, from this process's cores alone; then all know whose cores are whose.
fn check_threads(args: &GptArgs, session: &Session) {
    let (chosen, allowed) = (session.plan().threads_per_device, session.threads_allowed().min(THREADS_MAX));
    let is_cpu = session.plan().device == DeviceKind::Cpu;
    if is_cpu && args.threads_per_device.is_none() && allowed != chosen {
        let cores = "the cores that the processes of this node may run on";
        note(format!(
            "warning: {chosen} threads a device, where {cores} give {allowed}: --threads-per-device {allowed}"
        ));
    }
}

/// Each process on a port of its own.
fn listen(first: SocketAddr, process: u32) -> Result<Watch, GptError> {
    let port = u32::from(first.port()) + if first.port() == 0 { 0 } else { process };
    let Ok(port) = u16::try_from(port) else { return Err(GptError::Port { first, process }) };
    let watch = Watch::listen(SocketAddr::new(first.ip(), port))?;
    eprintln!("watch it at http://{}, metrics at /metrics", watch.address());
    Ok(watch)
}

/// Each process in a file of its own.
fn trace_path(path: &Path, cluster: &Cluster) -> PathBuf {
    let of_process = || PathBuf::from(format!("{}.{}", path.display(), cluster.process()));
    if cluster.processes() > 1 { of_process() } else { path.to_owned() }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The program that is trained: written once, whatever the mesh.
fn build(args: &GptArgs, model: &GptConfig) -> Result<Graph, GptError> {
    let mut g = Graph::new(&Mesh::new(&args.mesh.axes())?);
    let logits = nn::gpt(&mut g, model);
    let layout = nn::batch_layout(&g);
    let targets = g.input("targets", &[model.batch, model.context], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW { max_norm: args.clip.unwrap_or(f32::INFINITY), ..AdamW::default() });
    Ok(g)
}

/// The program that writes text, if any is wanted.
fn sampler(args: &GptArgs, model: &GptConfig, cluster: &Cluster) -> Result<Option<Sampler>, GptError> {
    let here = cluster.devices_here(args.mesh.devices());
    let options = CompileOptions { threads_per_device: args.threads(cores(), here), ..CompileOptions::default() };
    Ok((args.sample > 0 && cluster.is_first()).then(|| Sampler::compile(model, &options)).transpose()?)
}

fn introduce(args: &GptArgs, text: &Text, plan: &Plan, cluster: &Cluster) {
    let weights: usize = plan.graph.parameters().iter().map(|v| plan.graph.shape(*v).iter().product::<usize>()).sum();
    let (devices, threads) = (args.mesh.devices(), plan.threads_per_device);
    let named = args.data.as_deref().map_or("this repository".into(), |path| path.display().to_string());
    say(format!("text      {named}: {} tokens to train on, {} different", text.train_len(), text.vocab()));
    say(format!("model     {}, {} wide, {weights} weights", count(args.layers, "layer"), args.width));
    let over = match cluster.processes() {
        1 => String::new(),
        many => format!(", in {many} processes"),
    };
    let (devices, threads) = (count(devices, "device"), count(threads, "thread"));
    say(format!("mesh      {}: {devices} of {threads}{over}", plan.graph.mesh()));
    let batches = count(plan.micro_batches, "micro-batch");
    say(format!("step      {} samples of {} tokens, in {batches}", args.batch, args.context));
}

fn count(n: usize, thing: &str) -> String {
    match (n, thing.ends_with("ch")) {
        (1, _) => format!("1 {thing}"),
        (n, true) => format!("{n} {thing}es"),
        (n, false) => format!("{n} {thing}s"),
    }
}

/// What a training writes beside what it prints.
struct Outputs {
    log: Option<JsonLog>,
    checkpoints: Option<Checkpoints>,
    trace: Option<TraceFile>,
}

fn train(args: &GptArgs, text: &Text, session: &mut Session, outputs: Outputs, speaks: bool) -> Result<(), GptError> {
    let Outputs { mut log, mut checkpoints, mut trace } = outputs;
    let mut progress = speaks.then(|| Progress::new(args.steps));
    let (shape, step_tokens) = ([args.batch, args.context], (args.batch * args.context) as u64);
    let (mut seconds, mut final_loss) = (0.0, None);
    let mut steps = 0;
    while session.steps() < args.steps {
        let step = session.steps();
        let batch = checkpoints.as_ref().map_or(step, |checkpoints| checkpoints.batch(step));
        let (ids, targets) = text.batch(batch, args.batch, args.context);
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
        if let Some(trace) = &mut trace {
            trace.add(session)?;
        }
        (steps, seconds, final_loss) = (steps + 1, seconds + step_seconds, Some(loss));
        if let Some(found) = &report.non_finite {
            if speaks {
                note(format!("warning: {found}; nothing is updated"));
            }
            if let Some(checkpoints) = checkpoints.as_mut().filter(|_| args.on_non_finite == NonFiniteArg::Rollback) {
                checkpoints.roll_back(session, found)?;
                continue;
            }
        }
        let is_last = step + 1 == args.steps || report.stop;
        if let Some(checkpoints) = &mut checkpoints {
            checkpoints.after_step(session, is_last)?;
        }
        if report.stop {
            return Err(GptError::Terminated { steps: session.steps() });
        }
    }
    if let Some(lost) = trace.map(TraceFile::finish).transpose()?.filter(|lost| *lost > 0) {
        note(format!("warning: the trace lacks {lost} firings, for steps have more of them than an actor keeps"));
    }
    let totals = totals(steps, step_tokens, seconds, final_loss, session);
    if speaks {
        summarise(&totals);
    }
    log.map_or(Ok(()), |log| log.finish(&totals)).map_err(GptError::from)
}

fn totals(steps: u64, step_tokens: u64, train_seconds: f64, final_loss: Option<f64>, session: &Session) -> Totals {
    let tokens = steps.saturating_mul(step_tokens);
    let device = |d: DeviceMetrics| DeviceMemory {
        device: d.device,
        planned_peak_bytes: d.planned_peak_bytes,
        measured_peak_bytes: d.measured_peak_bytes,
    };
    let devices = session.metrics().devices.into_iter().map(device).collect();
    Totals { steps, tokens, train_seconds, tokens_per_second: tokens as f64 / train_seconds, final_loss, devices }
}

fn summarise(totals: &Totals) {
    if totals.steps > 0 {
        let (seconds, rate) = (totals.train_seconds, totals.tokens_per_second);
        say(format!("{} steps in {seconds:.1} s, {rate:.0} tokens/s", totals.steps));
    }
    let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
    for d in &totals.devices {
        let (planned, measured) = (mib(d.planned_peak_bytes), mib(d.measured_peak_bytes));
        say(format!("device {:<2} memory at most {measured:.2} MiB, planned {planned:.2} MiB", d.device));
    }
}

/// Prints a line. A closed pipe, `gpt --explain | head`, is no failure.
fn say(line: impl Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
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
    Place(#[from] PlaceError),
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
    #[error("--listen {first}: no port is left for process {process}")]
    Port { first: SocketAddr, process: u32 },
    #[error("--trace: {0}")]
    Trace(#[from] TraceError),
    #[error("cannot listen for SIGTERM: {0}")]
    Signals(std::io::Error),
    #[error("terminated after step {steps}")]
    Terminated { steps: u64 },
}

/// What goes before the node's own budget.
const NODE_MEMORY_HINT: &str = "--memory-mib sets what each device may take instead, whatever the node has free";

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
            Self::Terminated { .. } => Exit::Signal(15).code(),
            Self::Data(_) | Self::Place(_) | Self::Log(_) | Self::Mesh(_) => Exit::Usage.code(),
            Self::Watch(_) | Self::Port { .. } | Self::Trace(_) => Exit::Usage.code(),
            Self::InitFrom(Checkpoint(_)) | Self::Save(Checkpoint(_)) => Exit::Usage.code(),
            Self::Compile(_) => Exit::Refused.code(),
            Self::InitFrom(error) | Self::Save(error) | Self::Session(error) => error.exit().code(),
        }
    }

    /// The process that failed, where it was another one.
    fn first_cause_rank(&self) -> Option<u32> {
        match self {
            Self::InitFrom(error) | Self::Save(error) | Self::Session(error) => error.first_cause_rank(),
            Self::Checkpoints(error) => error.session().and_then(SessionError::first_cause_rank),
            _ => None,
        }
    }

    /// What the user can change.
    fn hint(&self) -> String {
        match self {
            Self::Args(error) => error.hint(),
            Self::Data(error) => error.hint().into(),
            Self::Watch(_) | Self::Port { .. } => "give an address of this machine, and ports that are free".into(),
            Self::Place(_) | Self::Log(_) | Self::Trace(_) | Self::Session(SessionError::PlanFile { .. }) => {
                "give a file in a folder that exists and may be written to".into()
            }
            Self::Mesh(_) | Self::Compile(CompileError::Devices { .. }) => {
                "a mesh has as many devices as its sizes multiply to".into()
            }
            Self::Compile(CompileError::Plan(PlanError::Memory { .. }))
            | Self::Session(SessionError::Plan(PlanError::Memory { .. })) => {
                "--memory-mib sets what a device has".into()
            }
            Self::Session(error) if is_node_memory(error) => NODE_MEMORY_HINT.into(),
            Self::Checkpoints(error) if error.session().is_some_and(is_node_memory) => NODE_MEMORY_HINT.into(),
            Self::Session(SessionError::Kernel(KernelError::OutOfMemory { .. })) => {
                "reduce the model or the batch, or raise the limit on memory (`ulimit -v`)".into()
            }
            Self::Compile(CompileError::Graph(_) | CompileError::Range { .. }) => {
                "change the flag that gives this size; see `gpt --help`".into()
            }
            Self::InitFrom(SessionError::Checkpoint(
                CheckpointError::Missing { .. } | CheckpointError::Shape { .. },
            )) => "give the --data, --layers, --heads, --width and --context that the file was saved with".into(),
            Self::InitFrom(_) => "give a file that `gpt --save` wrote".into(),
            Self::Save(_) => "the parameters are lost; see that there is room, and train again".into(),
            Self::Checkpoints(error) => error.hint().into(),
            Self::Terminated { .. } => "the same command with --checkpoint goes on from there".into(),
            Self::Signals(_) => String::new(),
            // What to do is a part of it.
            Self::Device(_) | Self::Session(SessionError::Kernel(KernelError::Unavailable { .. })) => {
                "`shardflow doctor` tells what is here".into()
            }
            Self::Session(SessionError::NonFinite(_)) => {
                "try a lower --lr, or --clip 1; --on-non-finite says what else to do".into()
            }
            Self::Cluster(error) | Self::Session(SessionError::Cluster(error)) if error.exit() == Exit::Refused => {
                String::new()
            }
            Self::Cluster(_) | Self::Session(SessionError::Cluster(_)) => {
                "see that all ranks are started, with the same program and flags, and can reach rank 0".into()
            }
            Self::Session(SessionError::Failed(failure)) if failure.is_of_a_peer() => {
                "see the log of that rank; started again, the run goes on from its last checkpoint".into()
            }
            Self::Compile(CompileError::Plan(_)) | Self::Session(_) => {
                "this is a fault of the program: please report it with the command and this text".into()
            }
        }
    }
}
