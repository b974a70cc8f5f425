//! The output of a training run: JSON lines for programs, progress lines for people.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use shardflow::job::output::{self, OutputKind, OutputQueue, ends_line};

/// One training step. In JSON, a number that is not finite is written as `null`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepRecord {
    /// Number of the step, from 0.
    pub step: u64,
    /// Mean over the step's tokens, before the update.
    pub loss: f64,
    /// Norm of the whole gradient before clipping; `null` if it is not computed.
    pub grad_norm: Option<f64>,
    /// Wall time of the step.
    pub step_seconds: f64,
    /// Tokens of the step divided by its wall time.
    pub tokens_per_second: f64,
}

/// Memory of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceMemoryRecord {
    /// Rank in the mesh.
    pub device: usize,
    /// Peak memory by the plan.
    pub planned_peak_bytes: usize,
    /// Peak memory during the run.
    pub measured_peak_bytes: usize,
}

/// Totals of the run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Totals {
    /// Steps done.
    pub steps: u64,
    /// Tokens of all steps.
    pub tokens: u64,
    /// Wall time of all steps.
    pub train_seconds: f64,
    /// Tokens divided by wall time.
    pub tokens_per_second: f64,
    /// Loss of the last step; `null` if there was no step.
    pub final_loss: Option<f64>,
    /// Memory of each device, by rank.
    pub devices: Vec<DeviceMemoryRecord>,
}

/// The log cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write log {path}: {cause}")]
pub struct LogError {
    /// The file.
    pub path: PathBuf,
    /// The system's error.
    pub cause: io::Error,
}

/// A file of JSON objects, one per line. Each is flushed, so that a run can be followed and a killed run keeps its
/// records.
#[derive(Debug)]
pub struct JsonLog {
    path: PathBuf,
    sink: Sink,
}

/// Destination of the lines.
#[derive(Debug)]
enum Sink {
    File(File),
    /// A pipe or a terminal, whose reader may stall.
    Stream(OutputQueue),
    /// The process's standard output or error, such as `/dev/stdout`. Opened again, a file would have a second
    /// position, and each would overwrite the other's lines.
    Standard(&'static OutputQueue),
}

impl Sink {
    fn queue(&self) -> Option<&OutputQueue> {
        match self {
            Self::File(_) => None,
            Self::Stream(output) => Some(output),
            Self::Standard(output) => Some(output),
        }
    }
}

/// The queue of the process's standard output or error, if `path` is the same file.
fn standard_stream(path: &Path) -> Option<&'static OutputQueue> {
    let data = path.metadata().ok()?;
    let is_same = |stream: &dyn AsFd| {
        rustix::fs::fstat(stream.as_fd()).is_ok_and(|s| (s.st_dev, s.st_ino) == (data.dev(), data.ino()))
    };
    if is_same(&io::stdout()) { Some(output::stdout()) } else { is_same(&io::stderr()).then(output::stderr) }
}

impl JsonLog {
    /// Creates the file, and replaces an existing one.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path) -> Result<Self, LogError> {
        Self::open(path, File::options().write(true).create(true).truncate(true))
    }

    /// Opens the file of a run that continues from a checkpoint. It then contains repeated steps twice. An incomplete
    /// last line of the earlier run is removed.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn append(path: &Path) -> Result<Self, LogError> {
        // A pipe is opened only for writing. Opened for both, it would always have a reader.
        let is_stream = path.metadata().is_ok_and(|data| !data.is_file());
        Self::open(path, File::options().read(!is_stream).append(true).create(true))
    }

    fn open(path: &Path, options: &std::fs::OpenOptions) -> Result<Self, LogError> {
        let open = || -> io::Result<Sink> {
            if let Some(output) = standard_stream(path) {
                return Ok(Sink::Standard(output));
            }
            let mut file = options.open(path)?;
            if !file.metadata()?.is_file() {
                return Ok(Sink::Stream(OutputQueue::new(file)));
            }
            if file.metadata()?.len() > 0 {
                repair_last_line(&mut file)?;
            }
            Ok(Sink::File(file))
        };
        let failed = |cause| LogError { path: path.into(), cause };
        Ok(Self { path: path.into(), sink: open().map_err(failed)? })
    }

    /// Writes a step.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn step(&mut self, record: &StepRecord) -> Result<(), LogError> {
        self.line(record)
    }

    /// Writes the last line, `{"totals": {..}}`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self, totals: &Totals) -> Result<(), LogError> {
        #[derive(Serialize)]
        struct Last<'a> {
            totals: &'a Totals,
        }
        self.line(&Last { totals })?;
        self.flush(None);
        self.sink.queue().and_then(OutputQueue::take_error).map_or(Ok(()), |cause| Err(self.error(cause)))
    }

    fn flush(&self, limit: Option<Duration>) {
        self.sink.queue().into_iter().for_each(|output| output.flush(limit));
    }

    fn error(&self, cause: io::Error) -> LogError {
        LogError { path: self.path.clone(), cause }
    }

    fn line(&mut self, object: &impl Serialize) -> Result<(), LogError> {
        // One write per line. `File` is unbuffered, so a reader sees an incomplete line only briefly.
        let written = serde_json::to_vec(object).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            if let Sink::File(file) = &mut self.sink {
                return file.write_all(&line);
            }
            let Some(output) = self.sink.queue() else { return Ok(()) };
            // The progress on a terminal may lack its line end.
            output.end_line();
            output.put(OutputKind::Record, &line);
            output.take_error().map_or(Ok(()), Err)
        });
        written.map_err(|cause| self.error(cause))
    }
}

/// On an early end, waits up to one second for the reader.
impl Drop for JsonLog {
    fn drop(&mut self) {
        self.flush(Some(Duration::from_secs(1)));
    }
}

/// Truncates a file to its last complete line. A last line that lacks only its newline gets one.
fn repair_last_line(file: &mut File) -> io::Result<()> {
    if ends_line(file)? {
        return Ok(());
    }
    let (mut start, mut torn) = (file.metadata()?.len(), Vec::new());
    while start > 0 && !torn.contains(&b'\n') {
        let mut block = vec![0; start.min(4096) as usize];
        start -= block.len() as u64;
        file.read_exact_at(&mut block, start)?;
        block.append(&mut torn);
        torn = block;
    }
    let line = torn.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    if serde_json::from_slice::<serde_json::Map<_, _>>(&torn[line..]).is_ok() {
        return file.write_all(b"\n");
    }
    file.set_len(start + line as u64)
}

/// Progress on stdout: a line every few steps and each minute, and always for the first and the last step. On a
/// terminal, a live line below them is updated at most once per second.
#[derive(Debug)]
pub struct Progress {
    steps: u64,
    start: Instant,
    /// Steps so far, printed or not.
    done: u32,
    lines: Pace,
    /// `None` if stdout is not a terminal.
    live: Option<Pace>,
    /// Whether the live line on the screen lacks its newline.
    is_open: bool,
}

/// Returns to the start of the line, clears it, and disables line wrap, so that a long line is cut off.
const CLEAR_LINE: &str = "\r\x1b[K\x1b[?7l";
const ENABLE_WRAP: &str = "\x1b[?7h";

/// Which steps are shown.
#[derive(Debug)]
enum Pace {
    /// Once per second. The field is the time of the last line.
    Seconds(Option<Duration>),
    /// Every N steps, and [`SILENT_MAX`] after the last line. The fields are N and the time of the last line.
    Steps(u64, Duration),
}

/// Longest time without a line, so that a reader of a file sees that the run continues.
const SILENT_MAX: Duration = Duration::from_secs(60);

impl Pace {
    fn is_due(&mut self, step: u64, now: Duration) -> bool {
        match self {
            Self::Seconds(last) => {
                let due = last.is_none_or(|last| now.saturating_sub(last) >= Duration::from_secs(1));
                if due {
                    *last = Some(now);
                }
                due
            }
            Self::Steps(every, last) => {
                let due = step.is_multiple_of(*every) || now.saturating_sub(*last) >= SILENT_MAX;
                if due {
                    *last = now;
                }
                due
            }
        }
    }
}

impl Progress {
    /// Starts the clock of a run up to step `steps`.
    pub fn new(steps: u64) -> Self {
        let lines = Pace::Steps((steps / 20).max(1), Duration::ZERO);
        let live = is_screen(&io::stdout()).then_some(Pace::Seconds(None));
        Self { steps, start: Instant::now(), done: 0, lines, live, is_open: false }
    }

    /// Prints a step if it is due.
    pub fn step(&mut self, record: &StepRecord) {
        let text = self.text(record, self.start.elapsed());
        output::stdout().put(OutputKind::Progress, text.as_bytes());
    }

    fn text(&mut self, record: &StepRecord, now: Duration) -> String {
        self.done = self.done.saturating_add(1);
        let left = self.steps.saturating_sub(record.step + 1);
        let is_line = self.lines.is_due(record.step, now) || left == 0;
        let is_live = self.live.as_mut().is_some_and(|live| live.is_due(record.step, now));
        if !is_line && !is_live {
            return String::new();
        }
        let eta = (now / self.done).saturating_mul(u32::try_from(left).unwrap_or(u32::MAX));
        let line = progress_line(record, self.steps, eta);
        let end = if is_line { "\n" } else { "" };
        match self.live {
            None => format!("{line}\n"),
            Some(_) => {
                self.is_open = !is_line;
                format!("{CLEAR_LINE}{line}{ENABLE_WRAP}{end}")
            }
        }
    }
}

/// Ends the live line, so that later output starts on a new line.
impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_open {
            output::stdout().end_line();
        }
    }
}

/// Writes a line to stdout.
pub fn print(line: impl Display) {
    output::stdout().line(&line.to_string());
}

/// Writes a line to stderr. On a screen it replaces the live line, which is printed again below it.
pub fn note(line: impl Display) {
    let clear = if is_screen(&io::stderr()) { "\r\x1b[K" } else { "" };
    output::stderr().line(&format!("{clear}{line}"));
}

/// Whether the stream is a terminal that supports escape codes.
fn is_screen(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("TERM").is_some_and(|name| name != "dumb")
}

fn progress_line(record: &StepRecord, steps: u64, eta: Duration) -> String {
    let norm = record.grad_norm.map(|norm| format!("  norm {norm:.3}")).unwrap_or_default();
    let (step, width) = (record.step + 1, steps.to_string().len());
    let (hours, minutes, seconds) = (eta.as_secs() / 3600, eta.as_secs() / 60 % 60, eta.as_secs() % 60);
    format!(
        "step {step:>width$}/{steps}  loss {:.4}{norm}  {:.1} ms  {:.0} tokens/s  ETA {hours}:{minutes:02}:{seconds:02}",
        record.loss,
        record.step_seconds * 1e3,
        record.tokens_per_second
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: StepRecord =
        StepRecord { step: 8, loss: 2.5, grad_norm: None, step_seconds: 0.0125, tokens_per_second: 61440.0 };

    #[test]
    fn each_line_is_readable_as_soon_as_it_is_written() {
        let path = std::env::temp_dir().join(format!("shardflow-log-{}.jsonl", std::process::id()));
        let mut log = JsonLog::create(&path).unwrap();
        log.step(&RECORD).unwrap();
        log.step(&StepRecord { loss: f64::NAN, grad_norm: Some(1.5), ..RECORD }).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "{\"step\":8,\"loss\":2.5,\"grad_norm\":null,\"step_seconds\":0.0125,\"tokens_per_second\":61440.0}\n\
             {\"step\":8,\"loss\":null,\"grad_norm\":1.5,\"step_seconds\":0.0125,\"tokens_per_second\":61440.0}\n"
        );
        let devices = vec![DeviceMemoryRecord { device: 0, planned_peak_bytes: 12, measured_peak_bytes: 8 }];
        let totals =
            Totals { steps: 2, tokens: 4, train_seconds: 0.5, tokens_per_second: 8.0, final_loss: Some(2.5), devices };
        log.finish(&totals).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(last["totals"]["devices"][0]["planned_peak_bytes"], 12);
        assert_eq!(last["totals"]["final_loss"], 2.5);
    }

    #[test]
    fn the_error_names_a_log_that_cannot_be_created() {
        let error = JsonLog::create(Path::new("no/such/folder/log.jsonl")).unwrap_err().to_string();
        assert!(error.starts_with("cannot write log no/such/folder/log.jsonl: "), "{error}");
    }

    #[test]
    fn progress_is_printed_at_intervals() {
        let mut seconds = Pace::Seconds(None);
        let due: Vec<bool> = [0, 400, 999, 1000, 1500, 2100]
            .into_iter()
            .map(|ms| seconds.is_due(0, Duration::from_millis(ms)))
            .collect();
        assert_eq!(due, [true, false, false, true, false, true]);
        let mut steps = Pace::Steps(15, Duration::ZERO);
        assert!(
            steps.is_due(0, Duration::ZERO) && !steps.is_due(14, Duration::ZERO) && steps.is_due(15, Duration::ZERO)
        );
        let due = [(16, 59), (17, 60), (18, 61), (30, 62), (31, 121), (32, 122)];
        let due = due.map(|(step, seconds)| steps.is_due(step, Duration::from_secs(seconds)));
        assert_eq!(due, [false, true, false, true, false, true], "a minute after the last line");
    }

    #[test]
    fn a_screen_shows_a_live_line_below_the_progress_lines() {
        let texts = |live| {
            let (lines, start) = (Pace::Steps(2, Duration::ZERO), Instant::now());
            let mut progress = Progress { steps: 5, start, done: 0, lines, live, is_open: false };
            let record = |step| StepRecord { step, ..RECORD };
            let texts = [0, 1, 2, 3, 4].map(|step| {
                let text = progress.text(&record(step), Duration::from_secs(60 * (step + 1)));
                assert_eq!(progress.is_open, !text.is_empty() && !text.ends_with('\n'), "{text:?}");
                text
            });
            texts.concat()
        };
        let line = |step| {
            let left = 5 - step;
            format!("step {step}/5  loss 2.5000  12.5 ms  61440 tokens/s  ETA 0:{left:02}:00")
        };
        let live = |step| format!("\r\x1b[K\x1b[?7l{}\x1b[?7h", line(step));
        let lines = |step| format!("{}\n", live(step));
        // Each step takes a minute, so each has a line.
        assert_eq!(texts(Some(Pace::Seconds(None))), [1, 2, 3, 4, 5].map(lines).concat());
        assert_eq!(texts(None), [1, 2, 3, 4, 5].map(|step| format!("{}\n", line(step))).concat());
        let (pace, start) = (Pace::Steps(3, Duration::ZERO), Instant::now());
        let mut progress =
            Progress { steps: 9, start, done: 0, lines: pace, live: Some(Pace::Seconds(None)), is_open: false };
        let ends = [0, 1, 2, 3]
            .map(|step| progress.text(&StepRecord { step, ..RECORD }, Duration::from_secs(step)).ends_with('\n'));
        assert_eq!(ends, [true, false, false, true], "the live line is replaced until a permanent line is due");
    }

    #[test]
    fn progress_lines_are_formatted() {
        let eta = Duration::from_secs(2 * 3600 + 3 * 60 + 4);
        let line = progress_line(&RECORD, 300, eta);
        assert_eq!(line, "step   9/300  loss 2.5000  12.5 ms  61440 tokens/s  ETA 2:03:04");
        let line = progress_line(&StepRecord { grad_norm: Some(0.25), ..RECORD }, 9, Duration::ZERO);
        assert_eq!(line, "step 9/9  loss 2.5000  norm 0.250  12.5 ms  61440 tokens/s  ETA 0:00:00");
    }

    /// A killed run leaves any part of its last line. The lines that a later run appends are valid in each case.
    #[test]
    fn a_log_can_be_continued_after_any_truncation() {
        let path = std::env::temp_dir().join(format!("shardflow-torn-{}.jsonl", std::process::id()));
        let mut log = JsonLog::create(&path).unwrap();
        log.step(&StepRecord { step: 0, ..RECORD }).unwrap();
        let first = std::fs::read(&path).unwrap().len();
        log.step(&StepRecord { step: 1, ..RECORD }).unwrap();
        let whole = std::fs::read(&path).unwrap();
        // A power loss may leave zeros. The long line is larger than a block.
        let zeros = [&whole[..first + 5], &[0; 8]].concat();
        let long = [&whole[..first], &[b'x'; 9000]].concat();
        let torn = (0..=whole.len()).map(|cut| whole[..cut].to_vec()).chain([zeros, long]);
        for torn in torn {
            std::fs::write(&path, &torn).unwrap();
            JsonLog::append(&path).unwrap().step(&StepRecord { step: 7, ..RECORD }).unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            let steps: Vec<u64> = text
                .lines()
                .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("valid")["step"].as_u64().unwrap())
                .collect();
            // A line that lacks only its newline counts as complete.
            let kept = [first - 1, whole.len() - 1].iter().filter(|end| torn.len() >= **end).count();
            let kept = if torn.contains(&0) || torn.contains(&b'x') { 1 } else { kept };
            assert_eq!(steps, [&[0, 1][..kept], &[7]].concat(), "{:?}", String::from_utf8_lossy(&torn));
        }
        std::fs::remove_file(&path).unwrap();
    }
}
