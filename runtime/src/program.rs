//! Runs a program's `main`: prints its error as one line and returns the matching exit code.

use std::error::Error;
use std::process::ExitCode;

use crate::cluster::ClusterError;
use crate::layout_error::LayoutError;
use crate::passes::CompileError;
use crate::session::SessionError;
use shardflow_job::exit::Exit;
use shardflow_job::output;

/// Runs the body of `main`. Prints an error as `error: ..`, reports it to the launcher, and returns its exit code, after all
/// [`output`] is written.
///
/// ```no_run
/// fn main() -> std::process::ExitCode {
///     shardflow::program::run(|| {
///         let mesh = shardflow::prelude::Mesh::parse("data=2")?;
///         Ok(println!("{mesh}"))
///     })
/// }
/// ```
pub fn run(body: impl FnOnce() -> Result<(), Box<dyn Error>>) -> ExitCode {
    let exit = body().map_or_else(show, |()| Exit::Done);
    output::finish(None);
    exit.into()
}

/// Prints and reports an error.
fn show(error: Box<dyn Error>) -> Exit {
    let exit = exit_of(&*error);
    // `Exit::Done` is not a failure: `shardflow plan` needs only the plan, which is written.
    if exit != Exit::Done {
        let rank = error.downcast_ref().and_then(SessionError::first_cause_rank);
        if let Err(e) = shardflow_job::departure::report(exit, &error.to_string(), rank) {
            eprintln!("warning: cannot write the report for the launcher: {e}");
        }
        eprintln!("error: {error}");
    }
    exit
}

fn exit_of(error: &(dyn Error + 'static)) -> Exit {
    if let Some(error) = error.downcast_ref::<SessionError>() {
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
    use super::*;
    use crate::graph::Graph;
    use crate::passes::{CompileOptions, compile};
    use crate::placement::Mesh;

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
    }
}
