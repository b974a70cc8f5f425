//! The command line of `gpt`: flags and their checks.
//!
//! This module checks the flags against each other; `compile` checks that a plan exists for them and fits in memory.

use std::net::SocketAddr;
use std::path::PathBuf;

use shardflow::files::resolved;
use shardflow::nn::UnevenSize;
use shardflow::passes::THREADS_MAX;
use shardflow::prelude::*;
use shardflow::program::ProgramError;
use shardflow::watch::client;

/// Train a small GPT on a text. The devices form a mesh, and belong to one or several processes.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "gpt", version)]
pub struct GptArgs {
    /// Text to train on; the default is this repository's own sources and docs.
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Number of devices along each mesh axis, such as data=2,stage=2,tensor=2. An unlisted axis has one device.
    #[arg(long, value_name = "AXIS=N,..", default_value = "data=1,stage=1,tensor=1", value_parser = mesh)]
    pub mesh: Mesh,
    /// Order of forward and backward work in a pipeline.
    #[arg(long, value_enum, default_value_t = Schedule::OneFOneB)]
    pub schedule: Schedule,
    /// Kind of devices in the mesh. Devices of the mesh may share a GPU only if the job has a single process.
    #[arg(long, value_enum, default_value_t = DeviceArg::Cpu)]
    pub device: DeviceArg,
    /// Storage type of activations and their gradients. Weights, their gradients and the optimizer update always use
    /// f32.
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    pub precision: Precision,
    /// Micro-batches per step.
    #[arg(long, value_name = "M", default_value_t = 1)]
    pub micro_batches: usize,
    /// CPU threads of each device; by default the cores of this process are divided evenly among its devices.
    #[arg(long, value_name = "N")]
    pub threads_per_device: Option<usize>,
    /// Memory limit of each device in MiB. By default, the limit on GPUs is the first GPU's free memory, divided by the
    /// number of devices that share a GPU. All CPU devices of a node together must also fit in the node's free memory.
    #[arg(long, value_name = "MIB")]
    pub memory_mib: Option<usize>,
    /// Transformer layers.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub layers: usize,
    /// Attention heads.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub heads: usize,
    /// Width of the residual stream.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub width: usize,
    /// Tokens per sample.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub context: usize,
    /// Samples per step, over all micro-batches and data shards.
    #[arg(long, value_name = "N", default_value_t = 12)]
    pub batch: usize,
    /// Training steps.
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub steps: u64,
    /// Learning rate of AdamW.
    #[arg(long, value_name = "X", default_value_t = 1e-3)]
    pub lr: f32,
    /// Maximum norm of the whole gradient; by default gradients are not clipped.
    #[arg(long, value_name = "NORM")]
    pub clip: Option<f32>,
    /// Probability of dropping an activation.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub dropout: f32,
    /// Seed of the initial weights, of dropout and of the generated text. A resumed training uses the seed of its
    /// checkpoint instead.
    #[arg(long, value_name = "N", default_value_t = 1337)]
    pub seed: u64,
    /// Number of characters to generate with the trained model at the end; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub sample: usize,
    /// Write one JSON object per step to this file.
    #[arg(long, value_name = "FILE")]
    pub log_json: Option<PathBuf>,
    /// Print the plan (layouts, boxing, schedule, memory) and stop before training.
    #[arg(long)]
    pub explain: bool,
    /// Write the trained parameters to this file.
    #[arg(long, value_name = "FILE.safetensors")]
    pub save: Option<PathBuf>,
    /// Start from the parameters in this file with fresh optimizer state. This flag has no effect when training
    /// continues from a checkpoint.
    #[arg(long, value_name = "FILE.safetensors")]
    pub init_from: Option<PathBuf>,
    /// Save checkpoints here. --resume sets whether training continues from the newest one.
    #[arg(long, value_name = "DIR")]
    pub checkpoint: Option<String>,
    /// Whether training continues from an existing checkpoint.
    #[arg(long, value_enum, default_value_t = Resume::Auto)]
    pub resume: Resume,
    /// Steps between two checkpoints.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub checkpoint_every: u64,
    /// Number of newest checkpoints that are kept.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub checkpoint_keep: usize,
    /// Besides the newest checkpoints, always keep those whose step is a multiple of N.
    #[arg(long, value_name = "N")]
    pub checkpoint_keep_every: Option<u64>,
    /// Policy for a step whose loss or gradients are not finite; such a step never changes a weight.
    #[arg(long, value_enum, default_value_t = NonFiniteArg::Stop)]
    pub on_non_finite: NonFiniteArg,
    /// After this long without progress, report the cause and abort with exit code 79. A warning comes earlier: after
    /// the time that five steps take, but after at least 10 s and at most a minute.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub hang_timeout: u64,
    /// Serve Prometheus metrics, the live page and the session's health at this address; --listen alone means
    /// 127.0.0.1:9400. With several processes, process n listens on this port plus n.
    #[arg(long, value_name = "ADDRESS:PORT", num_args = 0..=1, default_missing_value = client::ADDRESS, value_parser = client::address)]
    pub listen: Option<SocketAddr>,
    /// Peak speed of one device in 10^12 floating-point operations per second; enables the utilisation metric (MFU).
    #[arg(long, value_name = "N")]
    pub peak_tflops: Option<f64>,
    /// Write a trace of all actors to this file, for ui.perfetto.dev. With several processes, process n writes FILE.n.
    #[arg(long, value_name = "FILE.json")]
    pub trace: Option<PathBuf>,
    /// Size in MiB at which the trace ends; the training continues.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub trace_mib: u64,
    /// Action of all processes on SIGUSR1, a notice of preemption. They act after the current step or the next one.
    #[arg(long, value_enum, default_value_t = OnUsr1Arg::Checkpoint)]
    pub on_usr1: OnUsr1Arg,
    /// Under Slurm, save a checkpoint and end with code 75 before the job's end time. The lead time is this margin plus
    /// the time of one step and one save.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub job_end_margin: u64,
}

/// Action on SIGUSR1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnUsr1Arg {
    /// Save a checkpoint and continue.
    Checkpoint,
    /// Save a checkpoint and end with code 75.
    End,
}

/// Policy for steps that are not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum NonFiniteArg {
    /// End the training with code 80, and name the tensor.
    Stop,
    /// Skip the batch; end the training after too many such steps in a row.
    Skip,
    /// Return to the newest checkpoint, and continue with the batches after the bad one.
    Rollback,
}

/// Device kinds that `--device` accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceArg {
    /// Threads of this machine.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
}

/// Maximum number of devices in a mesh. The limit turns a typo such as `data=1000000000` into an immediate error.
/// `compile` compares the mesh with the devices that exist.
pub const DEVICES_MAX: usize = 4096;

/// Ten years in seconds: a longer time is a typo, and could overflow the clock.
const SECONDS_MAX: u64 = 10 * 365 * 24 * 60 * 60;

/// Parses `--mesh`.
fn mesh(text: &str) -> Result<Mesh, String> {
    let too_many = || format!("mesh {text:?} has more than {DEVICES_MAX} devices");
    let mesh = Mesh::parse_axes(text, &["data", "stage", "tensor"]).map_err(|error| match error {
        LayoutError::UnknownAxis { axis, .. } => format!("unknown mesh axis {axis:?}: expected data, stage or tensor"),
        LayoutError::EmptyAxis { axis } => format!("--mesh {axis} must be at least 1, got 0"),
        LayoutError::DuplicateAxis { axis } => format!("mesh axis {axis} is given twice"),
        LayoutError::TooManyDevices { .. } => too_many(),
        _ => format!("mesh {text:?} is not a list of axis=size, such as data=2,stage=2,tensor=2"),
    })?;
    if mesh.device_count() > DEVICES_MAX { Err(too_many()) } else { Ok(mesh) }
}

fn usage(text: String) -> ProgramError {
    ProgramError::new(Exit::Usage, text, "see `gpt --help` for the flags and their defaults")
}

/// Converts an uneven size to an error. If the heads do not divide the width, it is a usage error. For other sizes, the
/// exit code is `Refused`.
fn uneven(error: &UnevenSize) -> ProgramError {
    let &UnevenSize { size, value, divisor, parts } = error;
    let (below, above) = (value / parts * parts, error.next_value());
    let (flag, given) = match divisor {
        "stage" => ("stage".into(), format!("--mesh stage={parts}")),
        divisor => (format!("--{divisor}"), format!("--{divisor} {parts}")),
    };
    let (exit, hint) = match divisor {
        "heads" if below == 0 => {
            (Exit::Usage, format!("--{size} {above} gives {parts} heads of size {}", above / parts))
        }
        "heads" => (Exit::Usage, format!("try --{size} {below} or --{size} {above}")),
        _ => (Exit::Refused, format!("try --{size} {above}, or set {flag} to one of {}", error.possible_parts())),
    };
    ProgramError::new(exit, format!("--{size} {value} is not a multiple of {given}"), hint)
}

impl GptArgs {
    /// Checks the flags against each other.
    ///
    /// # Errors
    /// Names the first flag that cannot be used, with its value.
    pub fn check(&self) -> Result<(), ProgramError> {
        let at_least_one = [
            ("--micro-batches", self.micro_batches as u64),
            ("--threads-per-device", self.threads_per_device.map_or(1, |n| n as u64)),
            ("--memory-mib", self.memory_mib.map_or(1, |n| n as u64)),
            ("--layers", self.layers as u64),
            ("--heads", self.heads as u64),
            ("--width", self.width as u64),
            ("--context", self.context as u64),
            ("--batch", self.batch as u64),
            ("--checkpoint-every", self.checkpoint_every),
            ("--checkpoint-keep", self.checkpoint_keep as u64),
            ("--checkpoint-keep-every", self.checkpoint_keep_every.unwrap_or(1)),
            ("--hang-timeout", self.hang_timeout),
            ("--trace-mib", self.trace_mib),
        ];
        if let Some((flag, _)) = at_least_one.iter().find(|(_, size)| *size == 0) {
            return Err(usage(format!("{flag} must be at least 1, got 0")));
        }
        let times = [("--hang-timeout", self.hang_timeout), ("--job-end-margin", self.job_end_margin)];
        if let Some((flag, got)) = times.iter().find(|(_, seconds)| *seconds > SECONDS_MAX) {
            return Err(usage(format!("{flag} must be at most {SECONDS_MAX} seconds, got {got}")));
        }
        let range = |flag, expected, got: f32| Err(usage(format!("{flag} must be {expected}, got {got}")));
        if !(self.lr.is_finite() && self.lr >= 0.0) {
            return range("--lr", "finite and not negative", self.lr);
        }
        // `contains` is false for NaN.
        if !(0.0..1.0).contains(&self.dropout) {
            return range("--dropout", "at least 0 and less than 1", self.dropout);
        }
        if let Some(clip) = self.clip.filter(|clip| clip.is_nan() || *clip <= 0.0) {
            return range("--clip", "more than 0", clip);
        }
        if let Some(peak) = self.peak_tflops.filter(|peak| !peak.is_finite() || *peak <= 0.0) {
            return range("--peak-tflops", "finite and more than 0", peak as f32);
        }
        if self.checkpoint.is_none() {
            let needs = |flag, instead| {
                let hint = format!("give --checkpoint DIR, or {instead}");
                Err(ProgramError::new(Exit::Usage, format!("{flag} needs --checkpoint"), hint))
            };
            if self.on_non_finite == NonFiniteArg::Rollback {
                return needs("--on-non-finite rollback", "--on-non-finite skip");
            }
            if self.resume == Resume::Required {
                return needs("--resume required", "--resume auto");
            }
        }
        self.model(1).check(&self.mesh, self.micro_batches).map_err(|error| uneven(&error))?;
        if let Some(threads) = self.threads_per_device.filter(|threads| *threads > THREADS_MAX) {
            let text = format!("--threads-per-device must be at most {THREADS_MAX}, got {threads}");
            return Err(usage(text));
        }
        Ok(())
    }

    /// Returns the path of this process's trace. With several processes, each one writes a separate file.
    pub fn trace_of(&self, process: u32, processes: u32) -> Option<PathBuf> {
        let numbered = |path: &PathBuf| PathBuf::from(format!("{}.{process}", path.display()));
        if processes > 1 { self.trace.as_ref().map(numbered) } else { self.trace.clone() }
    }

    /// Checks that no two flags name the same file, if a process writes the file. Only `--init-from` and `--save` may
    /// name the same file.
    ///
    /// # Errors
    /// If two flags name the same file. The error names the first two such flags.
    pub fn check_files(&self, processes: u32) -> Result<(), ProgramError> {
        let (data, log) = (("--data", &self.data), ("--log-json", &self.log_json));
        let (save, init) = (("--save", &self.save), ("--init-from", &self.init_from));
        let trace = ("--trace", &self.trace);
        let folder =
            self.checkpoint.as_ref().map(|place| PathBuf::from(place.strip_prefix("file://").unwrap_or(place)));
        let checkpoint = ("--checkpoint", &folder);
        let pairs = [(data, log), (data, save), (init, log), (save, log)];
        let traces: Vec<_> = (0..processes).map(|process| self.trace_of(process, processes)).collect();
        let traces = traces.iter().map(|numbered| ("--trace", numbered)).chain([trace]);
        let with_trace = traces.flat_map(|trace| [data, log, save, init, checkpoint].map(|other| (other, trace)));
        let with_checkpoint = [data, log, save, init].map(|other| (other, checkpoint));
        for ((first, a), (second, b)) in pairs.into_iter().chain(with_checkpoint).chain(with_trace) {
            let (Some(a), Some(b)) = (a, b) else { continue };
            if resolved(a) == resolved(b) {
                let text = format!("{first} and {second} are the same file {}", b.display());
                return Err(ProgramError::new(Exit::Usage, text, format!("give another file with {second}")));
            }
        }
        Ok(())
    }

    /// The model's sizes; the text determines the vocabulary.
    pub fn model(&self, vocabulary: usize) -> GptConfig {
        let &Self { layers, heads, width, context, batch, dropout, .. } = self;
        GptConfig { vocabulary, layers, heads, width, context, batch, dropout }
    }

    /// Returns the number of threads of each device: the flag's value, or else `cores` divided evenly among the
    /// devices on this machine. The result is at least one.
    pub fn threads(&self, cores: usize, devices_here: usize) -> usize {
        self.threads_per_device.unwrap_or(cores / devices_here.max(1)).clamp(1, THREADS_MAX)
    }
}

#[cfg(test)]
mod tests {
    use clap::error::ErrorKind;
    use shardflow::flags;

    use super::*;

    fn parse(flags: &[&str]) -> Result<GptArgs, clap::Error> {
        flags::parse(std::iter::once(&"gpt").chain(flags))
    }

    /// Returns the error and the hint for these flags.
    fn check(flags: &str) -> String {
        let args = parse(&flags.split(' ').collect::<Vec<_>>()).unwrap();
        let error = args.check().unwrap_err();
        format!("{error} | {}", error.hint)
    }

    #[test]
    fn times_that_would_overflow_the_clock_are_refused() {
        for flag in ["--hang-timeout", "--job-end-margin"] {
            for seconds in ["18446744073709551615", "9223372036854775807", "315360001"] {
                let expected = format!("{flag} must be at most 315360000 seconds, got {seconds} | ");
                assert!(check(&format!("{flag} {seconds}")).starts_with(&expected));
            }
            parse(&[flag, "315360000"]).unwrap().check().unwrap();
        }
    }

    #[test]
    fn defaults_are_usable() {
        let args = parse(&[]).unwrap();
        args.check().unwrap();
        assert_eq!((args.layers, args.heads, args.width, args.context, args.batch), (4, 4, 128, 64, 12));
        assert_eq!(args.mesh.to_string(), "data=1,stage=1,tensor=1");
        assert_eq!((args.threads(2, 1), args.threads(0, 1)), (2, 1));
        assert_eq!((args.memory_mib, args.device), (None, DeviceArg::Cpu));
    }

    #[test]
    fn meshes_and_schedules_are_parsed() {
        let args = parse(&["--mesh", "tensor=2, data=3", "--schedule", "gpipe"]).unwrap();
        assert_eq!((args.mesh.to_string().as_str(), args.mesh.device_count()), ("data=3,stage=1,tensor=2", 6));
        assert_eq!((args.schedule, args.threads(16, 6)), (Schedule::GPipe, 2));
    }

    #[test]
    fn bad_meshes_are_usage_errors() {
        for (mesh, expected) in [
            ("data", "is not a list of axis=size"),
            ("data=x", "is not a list of axis=size"),
            ("", "is not a list of axis=size"),
            ("expert=2", "unknown mesh axis \"expert\""),
            ("data=0", "--mesh data must be at least 1"),
            ("data=2,data=2", "mesh axis data is given twice"),
            ("data=5000", "more than 4096 devices"),
            ("data=9223372036854775808,tensor=2", "more than 4096 devices"),
        ] {
            let error = parse(&["--mesh", mesh]).unwrap_err();
            assert_eq!(
                (error.kind(), error.exit_code()),
                (ErrorKind::ValueValidation, i32::from(Exit::Usage.code())),
                "{mesh}"
            );
            assert!(error.to_string().contains(expected), "{mesh}: {error}");
        }
    }

    #[test]
    fn flags_are_checked_against_each_other() {
        for (flags, expected) in [
            ("--width 130", "--width 130 is not a multiple of --heads 4 | try --width 128 or --width 132"),
            ("--width 3", "--width 3 is not a multiple of --heads 4 | --width 4 gives 4 heads of size 1"),
            (
                "--micro-batches 5",
                "--batch 12 is not a multiple of --micro-batches 5 | try --batch 15, \
                 or set --micro-batches to one of 1, 2, 3, 4, 6, 12",
            ),
            (
                "--mesh stage=5",
                "--layers 4 is not a multiple of --mesh stage=5 | try --layers 5, or set stage to one of 1, 2, 4",
            ),
            (
                "--threads-per-device 65",
                "--threads-per-device must be at most 64, got 65 | see `gpt --help` for the flags and their defaults",
            ),
        ] {
            assert_eq!(check(flags), expected);
        }
        let sizes = "layers heads width context batch micro-batches threads-per-device memory-mib checkpoint-keep-every \
                     hang-timeout trace-mib";
        for flag in sizes.split(' ') {
            let error = check(&format!("--{flag} 0"));
            assert!(error.starts_with(&format!("--{flag} must be at least 1, got 0")), "{error}");
        }
        for (flag, values) in [
            ("--lr", "NaN inf -1 -1e-3 -inf"),
            ("--dropout", "-0.1 1 NaN"),
            ("--clip", "-1 0 NaN"),
            ("--peak-tflops", "-2.5 0 inf"),
        ] {
            for value in values.split(' ') {
                let error = check(&format!("{flag} {value}"));
                assert!(error.starts_with(&format!("{flag} must be ")), "{error}");
            }
        }
    }

    /// Checks every flag that takes a whole number.
    #[test]
    fn negative_numbers_are_out_of_range() {
        let command = <GptArgs as clap::CommandFactory>::command();
        let takes_numbers = |arg: &&clap::Arg| {
            let name = arg.get_value_names().and_then(|names| names.first()).map(|name| name.to_string());
            matches!(name.as_deref(), Some("N" | "M" | "MIB" | "SECONDS"))
        };
        let flags: Vec<String> =
            command.get_arguments().filter(takes_numbers).filter_map(|arg| Some(arg.get_long()?.to_owned())).collect();
        assert!(flags.len() > 12 && flags.contains(&"seed".into()), "{flags:?}");
        for flag in flags.iter().filter(|flag| *flag != "peak-tflops") {
            let error = parse(&[&format!("--{flag}"), "-1"]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ValueValidation, "{flag}: {error}");
            let range = format!("invalid value '-1' for '--{flag} <");
            let text = error.to_string();
            assert!(text.contains(&range) && text.contains("expected a whole number of at most "), "{text}");
        }
        let text = parse(&["--seed", "18446744073709551616"]).unwrap_err().to_string();
        assert!(text.contains("expected a whole number of at most 18446744073709551615, without a sign"), "{text}");
        assert_eq!(parse(&["--lr", "--steps", "3"]).unwrap_err().exit_code(), i32::from(Exit::Usage.code()));
        assert_eq!(parse(&["-5"]).unwrap_err().kind(), ErrorKind::UnknownArgument);
    }

    #[test]
    fn the_clap_definition_is_valid() {
        <GptArgs as clap::CommandFactory>::command().debug_assert();
    }
}
