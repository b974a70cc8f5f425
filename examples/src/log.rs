//! What a training run says: JSON lines for programs, progress lines for people. Imports nothing of this crate.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;

/// One training step. In JSON, a number that is not finite is written as `null`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepRecord {
    /// From 0.
    pub step: u64,
    /// Mean over the step's tokens, before the update.
    pub loss: f64,
    /// Norm of the whole gradient before clipping; `null` where it is not computed.
    pub grad_norm: Option<f64>,
    /// Wall time of the step.
    pub step_seconds: f64,
    /// Tokens of the step by its wall time.
    pub tokens_per_second: f64,
}

/// Memory of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceMemory {
    /// Rank in the mesh.
    pub device: usize,
    /// What the plan computed before the run.
    pub planned_peak_bytes: usize,
    /// What was in use at most.
    pub measured_peak_bytes: usize,
}

/// The whole run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Totals {
    /// Steps done.
    pub steps: u64,
    /// Tokens of all steps.
    pub tokens: u64,
    /// Wall time of all steps.
    pub train_seconds: f64,
    /// Tokens by wall time.
    pub tokens_per_second: f64,
    /// Loss of the last step; `null` when there was none.
    pub final_loss: Option<f64>,
    /// By rank.
    pub devices: Vec<DeviceMemory>,
}

/// The log could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write log {path}: {cause}")]
pub struct LogError {
    /// The file.
    pub path: PathBuf,
    /// What the system says.
    pub cause: io::Error,
}

/// A file of JSON objects, one a line and each flushed, so that a run can be followed and a killed run keeps its past.
#[derive(Debug)]
pub struct JsonLog {
    path: PathBuf,
    file: File,
}

impl JsonLog {
    /// Creates the file, before training starts; an older one is replaced.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path) -> Result<Self, LogError> {
        let file = File::create(path).map_err(|cause| LogError { path: path.into(), cause })?;
        Ok(Self { path: path.into(), file })
    }

    /// Opens the file of a run that goes on from a checkpoint: steps that were done again stand in it twice.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn go_on(path: &Path) -> Result<Self, LogError> {
        let file = File::options().append(true).create(true).open(path);
        Ok(Self { path: path.into(), file: file.map_err(|cause| LogError { path: path.into(), cause })? })
    }

    /// Adds a step.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn step(&mut self, record: &StepRecord) -> Result<(), LogError> {
        self.line(record)
    }

    /// Adds the last line, `{"totals": {..}}`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn finish(mut self, totals: &Totals) -> Result<(), LogError> {
        #[derive(Serialize)]
        struct Last<'a> {
            totals: &'a Totals,
        }
        self.line(&Last { totals })
    }

    fn line(&mut self, object: &impl Serialize) -> Result<(), LogError> {
        // One write a line: `File` has no buffer of its own, so a reader never sees half of it for long.
        let written = serde_json::to_vec(object).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            self.file.write_all(&line)
        });
        written.map_err(|cause| LogError { path: self.path.clone(), cause })
    }
}

/// How a run does, on stdout: on a screen one line that is written anew, at most once a second; elsewhere a line every few steps, and
/// each minute. Always of the first and the last step.
#[derive(Debug)]
pub struct Progress {
    steps: u64,
    start: Instant,
    pace: Pace,
    /// The screen's line has no end yet.
    is_open: bool,
}

/// To the start of the screen's line, of which nothing is left; what does not fit into it is cut off and does not wrap.
const ANEW: &str = "\r\x1b[K\x1b[?7l";
const WRAP: &str = "\x1b[?7h";

/// Which steps are shown.
#[derive(Debug)]
enum Pace {
    /// Once a second; the time of the last line.
    Seconds(Option<Duration>),
    /// Every so many steps, and a minute after the last line, whose time this is.
    Steps(u64, Duration),
}

/// What follows a file wants to see that it goes on.
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
    /// Starts the clock of a run of `steps` steps.
    pub fn new(steps: u64) -> Self {
        let pace = if is_screen(&io::stdout()) {
            Pace::Seconds(None)
        } else {
            Pace::Steps((steps / 20).max(1), Duration::ZERO)
        };
        Self { steps, start: Instant::now(), pace, is_open: false }
    }

    /// Shows a step, when it is time to.
    pub fn step(&mut self, record: &StepRecord) {
        let text = self.text(record, self.start.elapsed());
        // A closed pipe must not end the training.
        let _ = io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush());
    }

    fn text(&mut self, record: &StepRecord, now: Duration) -> String {
        let is_last = record.step + 1 == self.steps;
        if !self.pace.is_due(record.step, now) && !is_last {
            return String::new();
        }
        let line = progress_line(record, self.steps);
        match self.pace {
            Pace::Steps(..) => format!("{line}\n"),
            Pace::Seconds(_) => {
                self.is_open = !is_last;
                format!("{ANEW}{line}{WRAP}{}", if is_last { "\n" } else { "" })
            }
        }
    }
}

/// What comes next stands on a line of its own.
impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_open {
            let _ = writeln!(io::stdout());
        }
    }
}

/// Writes a line to stderr, in place of the progress on a screen, which is written anew below it.
pub fn note(line: impl Display) {
    let anew = if is_screen(&io::stderr()) { "\r\x1b[K" } else { "" };
    eprintln!("{anew}{line}");
}

/// A terminal that knows escape codes.
fn is_screen(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("TERM").is_some_and(|name| name != "dumb")
}

fn progress_line(record: &StepRecord, steps: u64) -> String {
    let norm = record.grad_norm.map(|norm| format!("  norm {norm:.3}")).unwrap_or_default();
    let (step, width) = (record.step + 1, steps.to_string().len());
    format!(
        "step {step:>width$}/{steps}  loss {:.4}{norm}  {:.1} ms  {:.0} tokens/s",
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
    fn lines_can_be_read_while_the_run_goes_on() {
        let path = std::env::temp_dir().join(format!("shardflow-log-{}.jsonl", std::process::id()));
        let mut log = JsonLog::create(&path).unwrap();
        log.step(&RECORD).unwrap();
        log.step(&StepRecord { loss: f64::NAN, grad_norm: Some(1.5), ..RECORD }).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "{\"step\":8,\"loss\":2.5,\"grad_norm\":null,\"step_seconds\":0.0125,\"tokens_per_second\":61440.0}\n\
             {\"step\":8,\"loss\":null,\"grad_norm\":1.5,\"step_seconds\":0.0125,\"tokens_per_second\":61440.0}\n"
        );
        let devices = vec![DeviceMemory { device: 0, planned_peak_bytes: 12, measured_peak_bytes: 8 }];
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
    fn a_log_that_cannot_be_created_is_named() {
        let error = JsonLog::create(Path::new("no/such/folder/log.jsonl")).unwrap_err().to_string();
        assert!(error.starts_with("cannot write log no/such/folder/log.jsonl: "), "{error}");
    }

    #[test]
    fn progress_is_paced() {
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
    fn a_screen_has_one_line_and_a_file_many() {
        let texts = |pace| {
            let mut progress = Progress { steps: 3, start: Instant::now(), pace, is_open: false };
            let record = |step| StepRecord { step, ..RECORD };
            let texts = [0, 1, 2].map(|step| progress.text(&record(step), Duration::from_secs(2 * step)));
            assert!(!progress.is_open, "the last one ends");
            texts.concat()
        };
        let line = |step| format!("step {step}/3  loss 2.5000  12.5 ms  61440 tokens/s");
        let screen = |step| format!("\r\x1b[K\x1b[?7l{}\x1b[?7h", line(step));
        assert_eq!(texts(Pace::Seconds(None)), format!("{}{}{}\n", screen(1), screen(2), screen(3)));
        assert_eq!(texts(Pace::Steps(2, Duration::ZERO)), format!("{}\n{}\n", line(1), line(3)));
    }

    #[test]
    fn progress_lines() {
        assert_eq!(progress_line(&RECORD, 300), "step   9/300  loss 2.5000  12.5 ms  61440 tokens/s");
        let line = progress_line(&StepRecord { grad_norm: Some(0.25), ..RECORD }, 9);
        assert_eq!(line, "step 9/9  loss 2.5000  norm 0.250  12.5 ms  61440 tokens/s");
    }
}
