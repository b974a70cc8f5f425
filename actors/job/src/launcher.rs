//! `shardflow launch`: starts a node's processes, forwards signals to them, and restarts them if a restart may help.
//!
//! Each node has its own launcher. If a process fails, the processes on other nodes detect the failure and end, and
//! each launcher restarts its processes. If a process fails before the rendezvous and no restart can help, the launcher
//! reports this at the rendezvous endpoint.

use std::thread;
use std::time::Duration;

use crossbeam_channel::Receiver;

use crate::departure::Departure;
use crate::exit::{Exit, read_progress};
use crate::output;
use crate::text::counted;
use cause::{Decision, Ended, Restarts, exit_after_signal, first_cause};
use job::{Event, Job, print_notice, wait_until_done_or_signal};
use options::{departed, departure};

mod attempt;
mod cause;
mod children;
mod guard;
mod job;
mod logs;
mod options;

pub use guard::{become_program, child_command, guard};
pub use options::{LaunchError, LaunchOptions};

/// Maximum time that a launcher waits, after a signal, until its output has been read.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(1);

/// Starts the processes, restarts them if needed, and returns when they have ended. Returns the exit of the process
/// that failed first. Prints failures to standard error; the last line is the first cause.
///
/// Call this from a thread that lives as long as the launcher: the kernel kills the processes when that thread ends.
pub fn launch(options: &LaunchOptions) -> Result<Exit, LaunchError> {
    let departure = departure(options);
    let launched = Job::prepare(options, departure.clone()).and_then(|mut job| {
        let result = supervise(&mut job);
        match result {
            Ok((_, Some(_))) => output::finish(Some(OUTPUT_TIMEOUT)),
            _ => wait_for_output_reader(&job.events.1),
        }
        result.map(|(exit, _)| exit)
    });
    launched.inspect_err(|error| report(options, departure, error.exit(), error.to_string()))
}

/// Reports to the other nodes that a usage error keeps this node from starting processes. Does nothing if `options` do
/// not determine how to reach the other nodes.
pub fn report_usage(options: &LaunchOptions, cause: String) {
    report(options, departure(options), Exit::Usage, cause);
}

fn report(options: &LaunchOptions, departure: Option<Departure>, exit: Exit, cause: String) {
    if let Some(departure) = departure {
        print_notice(&format!("reporting to the other nodes: {cause}"));
        output::stderr().flush(Some(Duration::from_millis(200)));
        let report = departed(options, exit, &exit.after(&cause));
        departure.report(report.rank..report.rank.saturating_add(options.local_processes), &report);
    }
}

/// Waits until all output is written or a signal arrives.
fn wait_for_output_reader(events: &Receiver<Event>) {
    let (writing, written) = crossbeam_channel::bounded::<()>(0);
    let write = move || (output::finish(None), drop(writing));
    if thread::Builder::new().name("output".into()).spawn(write).is_err() {
        return output::finish(Some(OUTPUT_TIMEOUT));
    }
    wait_until_done_or_signal(&written, events);
}

/// Runs attempts until one ends without a restart. Also returns the signal that ended the launcher, if any.
fn supervise(job: &mut Job) -> Result<(Exit, Option<u8>), LaunchError> {
    let options = job.options;
    let mut restarts = Restarts::new(options.restarts_max);
    loop {
        let outcome = attempt::run(job, restarts.made, restarts.pause(options.restart_wait))?;
        outcome.show_errors();
        if let Some(signal) = outcome.signal {
            let (exit, failed) = exit_after_signal(&outcome.ended, signal);
            // A process that had joined has already reported its end to the others.
            if exit != Exit::Done && !outcome.reports().any(|report| report.joined) {
                let cause = failed.map_or_else(|| exit.after("it was interrupted"), Ended::describe);
                job.report(departed(options, exit, &cause));
            }
            if let Some(failed) = failed {
                output::stderr().line(&format!("error: {}", outcome.describe(failed)));
            }
            job.wait_for_reports();
            return Ok((exit, outcome.signal));
        }
        let Some(cause) = first_cause(&outcome.ended) else { return Ok((Exit::Done, None)) };
        let decision = if outcome.abandoned || cause.ended_on_request() || outcome.reports().any(|r| r.departed) {
            // A process still runs and holds devices, this node was asked to end, or another node has left the job.
            Decision::WouldNotHelp
        } else {
            restarts.next(cause.exit, read_progress(&job.progress_file()))
        };
        match decision {
            Decision::Restart => {
                job.causes.push(cause.exit.code());
                print_notice(&outcome.describe(cause));
                let from = restarts.committed.map_or("the start".into(), |step| format!("step {step}"));
                let delay = match restarts.pause(options.restart_wait) {
                    Duration::ZERO => String::new(),
                    pause => format!(", in {pause:?}"),
                };
                print_notice(&format!("restart {} of at most {}, from {from}{delay}", restarts.made, restarts.max));
                continue;
            }
            Decision::WouldNotHelp if options.restarts_max > 0 => print_notice("a restart would not help"),
            Decision::Exhausted if options.restarts_max > 0 => {
                print_notice(&format!("gave up after {}", counted(restarts.made, "restart")));
            }
            Decision::NoProgress => print_notice(&format!(
                "gave up: {} restarts in a row committed no step {}",
                cause::RESTARTS_WITHOUT_PROGRESS_MAX,
                restarts.committed.map_or("at all".into(), |step| format!("above {step}")),
            )),
            Decision::WouldNotHelp | Decision::Exhausted => {}
        }
        if outcome.abandoned || decision != Decision::WouldNotHelp {
            // Without this report, other nodes could restart their processes, which would then wait for this node.
            job.report(departed(options, cause.exit, &cause.describe()));
        }
        output::stderr().line(&format!("error: {}", outcome.describe(cause)));
        job.wait_for_reports();
        return Ok((cause.exit, None));
    }
}
