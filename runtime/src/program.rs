//! Runs a program's `main`: prints output without blocking training, prints an error as one line, and returns the exit
//! code.

use std::error::Error;
use std::fmt::Display;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Duration;

use crate::cluster::ClusterError;
use crate::files;
use crate::layout_error::LayoutError;
use crate::passes::CompileError;
use crate::session::SessionError;
use shardflow_job::exit::Exit;
use shardflow_job::output;
use shardflow_job::requests::Requests;

/// How long the printing of an error waits for stdout to drain.
const STDOUT_DRAIN: Duration = Duration::from_millis(200);

/// Runs the body of `main`, with the signal handlers of [`Requests::on_signals`]. Prints an error as `error: ..` and
/// reports it to the launcher. Returns the exit code after all output is written.
///
/// ```no_run
/// use shardflow::prelude::*;
///
/// fn main() -> std::process::ExitCode {
///     program::run(|| {
///         let plan = compile(Graph::new(&Mesh::parse("data=2")?), &CompileOptions::default())?;
///         let requests = Requests::on_signals()?;
///         let options = SessionOptions { requests: Some(requests.clone()), ..SessionOptions::default() };
///         let mut session = Session::start(plan, &options)?;
///         let _deferred = requests.defer(); // before this, SIGTERM ends the process immediately
///         while session.step(&[], 1e-3)?.request == Request::Nothing {
///             program::print(session.steps());
///         }
///         Ok(session.shutdown()?)
///     })
/// }
/// ```
pub fn run(body: impl FnOnce() -> Result<(), Box<dyn Error>>) -> ExitCode {
    finish(with_signal_handlers(body), None)
}

fn with_signal_handlers(body: impl FnOnce() -> Result<(), Box<dyn Error>>) -> Result<(), Box<dyn Error>> {
    // Install the handlers first: a process with pid 1, as in a container, ignores signals without a handler.
    Requests::on_signals()?;
    body()
}

/// The last part of [`run`], for a program that limits how long it waits for the reader of its output. A write error is
/// an error of the program, except after the reader has closed the pipe.
pub fn finish(result: Result<(), Box<dyn Error>>, output_limit: Option<Duration>) -> ExitCode {
    let mut exit = result.map_or_else(show, |()| Exit::Done);
    output::stdout().flush(output_limit);
    if let Some(error) = output::stdout().take_error().filter(|_| exit == Exit::Done) {
        let (text, hint) = (format!("cannot write standard output: {error}"), files::hint(error.kind()));
        exit = show(ProgramError::new(Exit::CannotWrite, text, hint).into());
    }
    output::finish(output_limit);
    exit.into()
}

/// Prints a line to stdout. Unlike `println!`, it does not wait for a slow reader, and ignores a closed pipe.
pub fn print(line: impl Display) {
    output::stdout().line(&line.to_string());
}

/// Prints a line to stderr. On a terminal, it replaces an unfinished line of progress.
pub fn note(line: impl Display) {
    let clear = if is_screen(&io::stderr()) { "\r\x1b[K" } else { "" };
    output::stderr().line(&format!("{clear}{line}"));
}

/// Whether the stream is a terminal that supports escape codes.
pub fn is_screen(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("TERM").is_some_and(|name| name != "dumb")
}

/// An error with its exit code and a hint. [`run`] prints the hint as `hint: ..` after the error.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct ProgramError {
    /// What failed, in one line.
    pub text: String,
    /// What the user can change; empty if there is nothing to change.
    pub hint: String,
    /// The exit code.
    pub exit: Exit,
    /// Rank of the process that failed first, if it is known.
    pub first_cause_rank: Option<u32>,
}

impl ProgramError {
    /// Creates an error with this exit code and hint.
    pub fn new(exit: Exit, text: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { text: text.into(), hint: hint.into(), exit, first_cause_rank: None }
    }
}

fn show(error: Box<dyn Error>) -> Exit {
    let exit = exit_of(&*error);
    // `Exit::Done` is not a failure: `shardflow plan` needs only the plan, which is already written.
    if exit == Exit::Done {
        return exit;
    }
    let own = error.downcast_ref::<ProgramError>();
    let rank = own
        .map_or_else(|| error.downcast_ref().and_then(SessionError::first_cause_rank), |error| error.first_cause_rank);
    // If there is a launcher, it prints the first cause among the reports of all processes.
    if let Err(e) = shardflow_job::departure::report(exit, &error.to_string(), rank) {
        note(format!("warning: cannot write the report for the launcher: {e}"));
    }
    // On a terminal, both streams share the screen, so print earlier output first.
    output::stdout().end_line();
    output::stdout().flush(Some(STDOUT_DRAIN));
    output::stderr().line(&format!("error: {error}"));
    if let Some(hint) = own.map(|error| &error.hint).filter(|hint| !hint.is_empty()) {
        output::stderr().line(&format!("hint: {hint}"));
    }
    exit
}

fn exit_of(error: &(dyn Error + 'static)) -> Exit {
    if let Some(error) = error.downcast_ref::<ProgramError>() {
        error.exit
    } else if let Some(error) = error.downcast_ref::<SessionError>() {
        error.exit()
    } else if let Some(error) = error.downcast_ref::<ClusterError>() {
        error.exit()
    } else if error.is::<CompileError>() || error.is::<LayoutError>() {
        Exit::Refused
    } else {
        Exit::Internal
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use signal_hook::consts::SIGTERM;

    use super::*;
    use crate::graph::Graph;
    use crate::passes::{CompileOptions, compile};
    use crate::placement::Mesh;
    use shardflow_job::requests::signal_mask;

    #[test]
    fn the_body_runs_with_signal_handlers_and_shares_them() {
        let body = || {
            let handled = signal_mask("self", "SigCgt:");
            assert_eq!(handled >> (SIGTERM - 1) & 1, 1, "{handled:x}");
            assert!(Arc::ptr_eq(&Requests::on_signals()?, &Requests::on_signals()?));
            Ok(())
        };
        with_signal_handlers(body).unwrap();
    }

    #[test]
    fn errors_have_their_exit_codes() {
        let exit = |error: Box<dyn Error>| exit_of(&*error);
        let mesh = Mesh::parse("data=0").map(drop).expect_err("no device");
        assert_eq!(exit(mesh.into()), Exit::Refused);
        let g = Graph::new(&Mesh::parse("data=1").expect("a mesh"));
        let empty = compile(g, &CompileOptions::default()).map(drop).expect_err("an empty program");
        assert_eq!(exit(empty.into()), Exit::Refused);
        assert_eq!(exit(SessionError::PlanWritten.into()), Exit::Done);
        assert_eq!(exit("something else".into()), Exit::Internal);
        assert_eq!(exit(ProgramError::new(Exit::BadData, "no such file", "").into()), Exit::BadData);
    }
}
