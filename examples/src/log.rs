//! The output of a training run: records for programs, and progress lines for people.

use std::time::{Duration, Instant};

use serde::Serialize;
use shardflow::job::output::{self, OutputKind};
use shardflow::prelude::*;

/// One training step. In JSON, a number that is not finite is written as `null`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepRecord {
    /// Number of the step, from 0.
    pub step: u64,
    /// Mean loss over the step's tokens, before the update.
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
    /// Rank of the device in the mesh.
    pub device: usize,
    /// Peak memory that the plan predicts.
    pub planned_peak_bytes: usize,
    /// Peak memory during the run.
    pub measured_peak_bytes: usize,
}

impl From<DeviceMetrics> for DeviceMemoryRecord {
    fn from(metrics: DeviceMetrics) -> Self {
        let DeviceMetrics { device, planned_peak_bytes, measured_peak_bytes, .. } = metrics;
        Self { device, planned_peak_bytes, measured_peak_bytes }
    }
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

/// Prints progress to stdout: a line for the first step, for the last step and at a fixed interval of steps, and also
/// after a minute without a line. On a terminal, a live line below the other lines is updated at most once per second.
#[derive(Debug)]
pub struct Progress {
    steps: u64,
    start: Instant,
    /// Number of steps so far, whether or not they were printed.
    done: u32,
    lines: Pace,
    /// `None` if stdout is not a terminal.
    live: Option<Pace>,
    /// Whether the live line on the screen lacks its newline.
    is_open: bool,
}

/// Returns to the start of the line, clears it, and disables line wrap. The terminal then cuts off a long line.
const CLEAR_LINE: &str = "\r\x1b[K\x1b[?7l";
const ENABLE_WRAP: &str = "\x1b[?7h";

/// Longest time without a line. Because of this limit, a reader of an output file sees that the run continues.
const SILENT_MAX: Duration = Duration::from_secs(60);

/// Selects the steps to show. A step is due if either rule holds.
#[derive(Debug)]
struct Pace {
    /// Rule 1: the step's number is a multiple of this.
    steps: Option<u64>,
    /// Rule 2: this much time has passed since the last line.
    silent_max: Duration,
    /// Time of the last line.
    last: Option<Duration>,
}

impl Pace {
    /// Every `every`-th step is due, and so is a step that ends [`SILENT_MAX`] or more after the last line.
    fn steps(every: u64) -> Self {
        Self { steps: Some(every), silent_max: SILENT_MAX, last: Some(Duration::ZERO) }
    }

    /// A step is due if the last line is at least one second old.
    fn seconds() -> Self {
        Self { steps: None, silent_max: Duration::from_secs(1), last: None }
    }

    fn is_due(&mut self, step: u64, now: Duration) -> bool {
        let silent = self.last.is_none_or(|last| now.saturating_sub(last) >= self.silent_max);
        let due = silent || self.steps.is_some_and(|every| step.is_multiple_of(every));
        if due {
            self.last = Some(now);
        }
        due
    }
}

impl Progress {
    /// Starts the clock of a run that ends at step `steps`.
    pub fn new(steps: u64) -> Self {
        let lines = Pace::steps((steps / 20).max(1));
        let live = program::is_screen(&std::io::stdout()).then_some(Pace::seconds());
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
    fn records_are_json_objects() {
        let text = |record| serde_json::to_string(&record).unwrap();
        assert_eq!(
            text(StepRecord { loss: f64::NAN, ..RECORD }),
            "{\"step\":8,\"loss\":null,\"grad_norm\":null,\"step_seconds\":0.0125,\"tokens_per_second\":61440.0}"
        );
        assert!(text(StepRecord { grad_norm: Some(1.5), ..RECORD }).contains("\"grad_norm\":1.5,"));
    }

    #[test]
    fn progress_is_printed_at_intervals() {
        let mut seconds = Pace::seconds();
        let due: Vec<bool> = [0, 400, 999, 1000, 1500, 2100]
            .into_iter()
            .map(|ms| seconds.is_due(0, Duration::from_millis(ms)))
            .collect();
        assert_eq!(due, [true, false, false, true, false, true]);
        let mut steps = Pace::steps(15);
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
            let (lines, start) = (Pace::steps(2), Instant::now());
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
        // Each step takes a minute, so each step is printed on its own line.
        assert_eq!(texts(Some(Pace::seconds())), [1, 2, 3, 4, 5].map(lines).concat());
        assert_eq!(texts(None), [1, 2, 3, 4, 5].map(|step| format!("{}\n", line(step))).concat());
        let (pace, start) = (Pace::steps(3), Instant::now());
        let mut progress =
            Progress { steps: 9, start, done: 0, lines: pace, live: Some(Pace::seconds()), is_open: false };
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
}
