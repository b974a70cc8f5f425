//! Trains a small GPT on a text, with any mesh of devices in one or several processes. At the end, generates text with
//! the trained model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardflow::files::{OutputFileError, check_appendable, check_room, check_writable};
use shardflow::flags;
use shardflow::job::text::counted;
use shardflow::prelude::*;
use shardflow::program::{ProgramError, note, print};
use shardflow::session::plan_files;
use shardflow::trace::{TraceError, TraceFile};
use shardflow::watch::Watch;
use shardflow_examples::args::{DeviceArg, GptArgs, NonFiniteArg, OnUsr1Arg};
use shardflow_examples::data::Text;
use shardflow_examples::error::{GptError, Saved};
use shardflow_examples::log::{Progress, StepRecord, Totals};
use shardflow_examples::sample::{Sampler, loading_bytes, sampling_bytes};

/// Time limit for the work after the last step, once a signal has requested the end.
const FINISH_LIMIT: Duration = Duration::from_secs(20);
/// A process that was requested to end waits this long for the reader of its output.
const OUTPUT_LIMIT: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    // Install the handlers first: without them, process 1 of a container ignores signals.
    let requests = Requests::on_signals();
    let args: GptArgs = match flags::parse_own() {
        Ok(args) => args,
        Err(code) => return code,
    };
    let (result, requests) = match requests {
        Ok(requests) => (run(&args, &requests), requests),
        Err(error) => (Err(GptError::Signals(error)), Arc::default()),
    };
    let limit = matches!(requests.pending(), Request::End(_)).then_some(OUTPUT_LIMIT);
    program::finish(result.map_err(|error| ProgramError::from(error).into()), limit)
}

/// Reports every detectable error before the first step, and creates files only after the checks. Every process runs
/// this function; only the first process prints progress.
fn run(args: &GptArgs, requests: &Arc<Requests>) -> Result<(), GptError> {
    args.check()?;
    requests.set_job_end_margin(Duration::from_secs(args.job_end_margin));
    if args.on_usr1 == OnUsr1Arg::End {
        requests.set_on_usr1(Request::End(Exit::Retry));
    }
    let mut cluster = Cluster::from_env()?;
    args.check_files(cluster.processes())?;
    cluster.options.on_waiting = Some(Arc::new(|missing| note(missing)));
    let text = Text::load(args.data.as_deref(), args.context)?;
    let model = args.model(text.vocab());
    let options = options(args, &cluster)?;
    let plan = compile(build(args, &model), &options)?;
    let prints = cluster.is_first();
    let resume = args.resume.at_restart(cluster.restart());
    if args.explain {
        if prints {
            print(plan.explain().trim_end());
        }
        return Ok(());
    }
    let sampler = sampler(args, &model, &cluster)?;
    let trace_path = args.trace_of(cluster.process(), cluster.processes());
    trace_path.as_deref().map_or(Ok(()), check_writable)?;
    if prints {
        args.save.as_deref().map_or(Ok(()), check_writable)?;
        args.log_json.as_deref().map_or(Ok(()), check_appendable)?;
        print_header(args, &text, &plan, &cluster);
    }
    let process = cluster.process();
    let watch = listen(args, process)?;
    let extra_bytes = extra_bytes(args, &plan, sampler.as_ref(), &cluster);
    let options = SessionOptions { extra_bytes, ..session_options(args, &text, cluster, requests.clone()) };
    let mut session = start(args, plan, &options)?;
    if let Some(watch) = &watch {
        watch.show(&session);
    }
    let checkpoints = open_checkpoints(args, resume, requests, &mut session)?;
    if let Some(path) = &args.init_from {
        init_from(path, &mut session)?;
    }
    let mut outputs = match Outputs::open(args, trace_path, process, requests, &session) {
        Ok(outputs) => outputs,
        Err(error) => return Err(abort(session, error)),
    };
    let deferred = requests.defer();
    train(args, &text, &mut session, checkpoints, &mut outputs)?;
    deferred.within(FINISH_LIMIT);
    save(args, &session)?;
    // Every process has to make this call.
    let parameters = (args.sample > 0).then(|| session.parameters_on_first()).transpose()?.flatten();
    // End the session's threads before the sampler starts its own.
    let seed = session.seed();
    session.shutdown()?;
    drop(deferred);
    if let Some(error) = outputs.failed {
        return Err(error);
    }
    if let Request::End(exit) = requests.pending() {
        return Err(GptError::Ended { exit, steps: args.steps, process, saved: Saved::All });
    }
    if let Some((sampler, parameters)) = sampler.zip(parameters).filter(|_| prints) {
        let written = sampler.run(&parameters, &text.prompt(), args.sample, seed)?;
        let characters = counted(args.sample, "character");
        print(format!("\n{characters} written by the model:\n{}", text.decode(&written)));
    }
    Ok(())
}

/// Serves the live page, if the flags ask for it.
fn listen(args: &GptArgs, process: u32) -> Result<Option<Watch>, GptError> {
    let first = args.listen.filter(|_| !plan_files::is_requested());
    let watch = first.map(|first| Watch::listen_as(process, first)).transpose()?;
    if let Some(watch) = &watch {
        note(format!("watch the training at http://{}; metrics are at /metrics", watch.address()));
    }
    Ok(watch)
}

/// Saves the parameters, if the flags ask for it. Every process has to make this call.
fn save(args: &GptArgs, session: &Session) -> Result<(), GptError> {
    let Some(path) = &args.save else { return Ok(()) };
    session.save(path).map_err(|e| GptError::Save(e.into()))?;
    if session.is_first() {
        print(format!("parameters saved to {}", path.display()));
    }
    Ok(())
}

fn open_checkpoints(
    args: &GptArgs,
    resume: Resume,
    requests: &Arc<Requests>,
    session: &mut Session,
) -> Result<Option<CheckpointManager>, GptError> {
    let Some(place) = &args.checkpoint else { return Ok(None) };
    let options = ManagerOptions {
        resume,
        schedule: SaveSchedule { every: args.checkpoint_every, steps: args.steps },
        keep: args.checkpoint_keep,
        keep_every: args.checkpoint_keep_every,
        batch: args.batch as u64,
        save: args.save.clone(),
        requests: Some(requests.clone()),
        on_note: Arc::new(|line| note(line)),
    };
    Ok(Some(CheckpointManager::open(place, options, session)?))
}

/// Loads the parameters in `path`, unless the session has already loaded those of a checkpoint.
fn init_from(path: &Path, session: &mut Session) -> Result<(), GptError> {
    let notes = if session.steps() > 0 {
        vec![format!("--init-from {} is not used: the parameters are those of the checkpoint", path.display())]
    } else {
        session.init_from(path).map_err(|e| GptError::InitFrom(e.into()))?
    };
    notes.iter().filter(|_| session.is_first()).for_each(note);
    Ok(())
}

fn options(args: &GptArgs, cluster: &Cluster) -> Result<CompileOptions, GptError> {
    let here = cluster.devices_here(args.mesh.device_count());
    let device = match args.device {
        DeviceArg::Cpu => DeviceKind::Cpu,
        DeviceArg::Cuda => DeviceKind::Cuda,
    };
    let memory_bytes = match (args.memory_mib, device) {
        (Some(mib), _) => Some(mib.saturating_mul(1 << 20)),
        // `shardflow plan` sets no limit, so it works on any machine. For CPUs, the session checks the free memory.
        (None, _) if plan_files::is_requested() => None,
        (None, DeviceKind::Cpu) => None,
        // `--explain` also works without a GPU.
        (None, DeviceKind::Cuda) if args.explain => gpu_memory_bytes(here).ok(),
        (None, DeviceKind::Cuda) => Some(gpu_memory_bytes(here).map_err(GptError::Device)?),
    };
    Ok(CompileOptions {
        device,
        micro_batches: args.micro_batches,
        schedule: args.schedule,
        precision: args.precision,
        threads_per_device: args.threads(cores(), here),
        memory_bytes,
        on_slow: cluster.is_first().then_some(report_slow_compilation as _),
        ..CompileOptions::default()
    })
}

fn report_slow_compilation(took: Duration, part: &'static str) {
    note(format!("compiling for {:.0} s: {part}", took.as_secs_f64()));
}

/// Returns the bytes that this process allocates besides the plan, either to load parameters before the training or to
/// generate text after it.
fn extra_bytes(args: &GptArgs, plan: &Plan, sampler: Option<&Sampler>, cluster: &Cluster) -> u64 {
    let loading = if args.init_from.is_some() { loading_bytes(plan) } else { 0 };
    // The sampler runs on the first process, which has the first devices.
    let first_devices = plan.device_count() / cluster.processes().max(1) as usize;
    let own_bytes = (0..first_devices).map(|device| plan.memory(device).total_bytes() as u64).sum();
    let sampling = if args.sample > 0 { sampling_bytes(plan, sampler, own_bytes) } else { 0 };
    loading.max(sampling)
}

/// Maximum number of consecutive steps that may be skipped before the training ends.
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

/// Starts the session. The cores assigned at the rendezvous may differ from those that this process expected, so the
/// number of threads may change.
fn start(args: &GptArgs, plan: Plan, options: &SessionOptions) -> Result<Session, GptError> {
    let planned_threads = plan.threads_per_device;
    let session = Session::start(plan, options)?;
    if let Some(path) = args.save.as_deref().filter(|_| session.is_first()) {
        let room = check_room(path, session.checkpoint_bytes());
        let failed = |e: OutputFileError| CheckpointError::Io { path: e.path, source: e.cause };
        if let Err(error) = room {
            return Err(abort(session, GptError::Save(SessionError::from(failed(error)).into())));
        }
    }
    let threads = session.plan().threads_per_device;
    if threads != planned_threads && session.is_first() {
        note(format!("using {} per device, to fit the cores of this process", counted(threads, "thread")));
    }
    Ok(session)
}

/// Ends all ranks because of an error that only this rank sees.
fn abort(session: Session, error: GptError) -> GptError {
    session.abort(error.exit(), &error);
    error
}

/// The values that must be equal on all ranks. A resume with changed data or a changed model is refused. A resume with
/// a changed batch size, dropout, clipping or precision prints a warning. Other values may change on resume.
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
        // `Free`, because the session itself already compares the maximum norm on resume.
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

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The training program, which is the same for every mesh.
fn build(args: &GptArgs, model: &GptConfig) -> Graph {
    let mut g = Graph::new(&args.mesh);
    let logits = nn::gpt(&mut g, model);
    let layout = nn::batch_layout(&g);
    let targets = g.input("targets", &[model.batch, model.context], DType::I32, layout);
    let loss = g.cross_entropy(logits, targets);
    g.minimize(loss, AdamW { max_norm: args.clip.unwrap_or(f32::INFINITY), ..AdamW::default() });
    g
}

/// The program that generates text, if `--sample` requests text and this is the first process.
fn sampler(args: &GptArgs, model: &GptConfig, cluster: &Cluster) -> Result<Option<Sampler>, GptError> {
    let here = cluster.devices_here(args.mesh.device_count());
    let options = CompileOptions { threads_per_device: args.threads(cores(), here), ..CompileOptions::default() };
    Ok((args.sample > 0 && cluster.is_first()).then(|| Sampler::compile(model, &options)).transpose()?)
}

fn print_header(args: &GptArgs, text: &Text, plan: &Plan, cluster: &Cluster) {
    let (weights, devices, threads) = (weights(plan), args.mesh.device_count(), plan.threads_per_device);
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

/// Returns the number of elements of all parameters.
fn weights(plan: &Plan) -> usize {
    plan.graph.parameters().iter().map(|v| plan.graph.shape(*v).iter().product::<usize>()).sum()
}

/// Output files and progress of one rank during the training, without checkpoints.
struct Outputs<'a> {
    progress: Option<Progress>,
    log: Option<JsonLog>,
    trace: Option<TraceFile>,
    trace_mib: u64,
    process: u32,
    requests: &'a Requests,
    /// The error of a failed write. After it, all ranks run one more step, save a checkpoint and end.
    failed: Option<GptError>,
}

impl<'a> Outputs<'a> {
    fn open(
        args: &GptArgs,
        trace: Option<PathBuf>,
        process: u32,
        requests: &'a Requests,
        session: &Session,
    ) -> Result<Self, GptError> {
        let trace_mib = args.trace_mib;
        let open = if session.steps() > 0 { JsonLog::append } else { JsonLog::create };
        let log = args.log_json.as_deref().filter(|_| session.is_first()).map(open);
        let log = log.transpose().map_err(GptError::Log)?;
        let trace = trace.map(|path| TraceFile::create(&path, trace_mib.saturating_mul(1 << 20))).transpose()?;
        let progress = session.is_first().then(|| Progress::new(args.steps));
        Ok(Self { progress, log, trace, trace_mib, process, requests, failed: None })
    }

    fn step(&mut self, record: &StepRecord, session: &Session) {
        self.progress.iter_mut().for_each(|progress| progress.step(record));
        let logged = self.log.as_mut().map_or(Ok(()), |log| log.line(record)).map_err(GptError::Log);
        if let Err(error) = logged.and_then(|()| Ok(self.trace(record.step, session)?)) {
            (self.log, self.trace) = (None, None);
            note(format!("warning: {error}; the training ends after the next step"));
            self.failed = Some(error);
            self.requests.submit(Request::End(Exit::CannotWrite));
        }
    }

    fn trace(&mut self, step: u64, session: &Session) -> Result<(), TraceError> {
        let Some(file) = &mut self.trace else { return Ok(()) };
        if file.add(session)? {
            return Ok(());
        }
        note(format!("the trace ends with step {}: it has reached --trace-mib {}", step + 1, self.trace_mib));
        finish_trace(self.trace.take())
    }

    fn finish(&mut self, totals: &Totals) -> Result<(), GptError> {
        finish_trace(self.trace.take())?;
        let Some(mut log) = self.log.take() else { return Ok(()) };
        log.line(&BTreeMap::from([("totals", totals)])).and_then(|()| log.finish()).map_err(GptError::Log)
    }
}

fn train(
    args: &GptArgs,
    text: &Text,
    session: &mut Session,
    mut checkpoints: Option<CheckpointManager>,
    outputs: &mut Outputs<'_>,
) -> Result<(), GptError> {
    let prints = session.is_first();
    let (shape, step_tokens) = ([args.batch, args.context], (args.batch * args.context) as u64);
    let (mut seconds, mut final_loss) = (0.0, None);
    let mut steps = 0;
    while session.steps() < args.steps {
        let step = session.steps();
        let first = checkpoints.as_mut().map_or(step.wrapping_mul(args.batch as u64), CheckpointManager::take_batch);
        let (ids, targets) = text.samples(first, args.batch, args.context);
        let inputs = [("ids", HostTensor::i32(&shape, ids)), ("targets", HostTensor::i32(&shape, targets))];
        let start = Instant::now();
        let report = session.step(&inputs, args.lr)?;
        let step_seconds = start.elapsed().as_secs_f64();
        let loss = report.loss.map_or(f64::NAN, f64::from);
        let tokens_per_second = step_tokens as f64 / step_seconds;
        let record = StepRecord { step, loss, grad_norm: report.grad_norm, step_seconds, tokens_per_second };
        outputs.step(&record, session);
        (steps, seconds, final_loss) = (steps + 1, seconds + step_seconds, Some(loss));
        if let Some(found) = &report.non_finite {
            if prints {
                note(format!("warning: {found}; no weight is updated"));
            }
            if let Some(checkpoints) = checkpoints.as_mut().filter(|_| args.on_non_finite == NonFiniteArg::Rollback) {
                checkpoints.roll_back(session, found)?;
                continue;
            }
        }
        if let Some(checkpoints) = &mut checkpoints {
            checkpoints.after_step(session, &report)?;
        } else if report.request == Request::Checkpoint && prints {
            note("warning: a checkpoint was requested, but nothing is saved without --checkpoint DIR");
        }
        if let Request::End(exit) = report.request {
            let checkpoint = |place| Saved::Checkpoint(place, args.resume);
            let saved = args.checkpoint.clone().map_or(Saved::Nothing, checkpoint);
            let ended = GptError::Ended { exit, steps: session.steps(), process: outputs.process, saved };
            return Err(outputs.failed.take().unwrap_or(ended));
        }
    }
    let totals = totals(steps, step_tokens, seconds, final_loss, session);
    if prints {
        print_totals(&totals);
    }
    if let Err(error) = outputs.finish(&totals) {
        outputs.failed.get_or_insert(error);
    }
    Ok(())
}

fn finish_trace(trace: Option<TraceFile>) -> Result<(), TraceError> {
    if let Some(lost) = trace.map(TraceFile::finish).transpose()?.filter(|lost| *lost > 0) {
        note(format!("warning: the trace lacks {lost} firings: a step has more firings than an actor records"));
    }
    Ok(())
}

fn totals(steps: u64, step_tokens: u64, train_seconds: f64, final_loss: Option<f64>, session: &Session) -> Totals {
    let tokens = steps.saturating_mul(step_tokens);
    let devices = session.metrics().devices.into_iter().map(From::from).collect();
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
