//! Support for `shardflow plan`: if an environment variable requests it, a program writes its plan and runs nothing.

use std::io;
use std::path::PathBuf;

use crate::plan::Plan;

/// Environment variable with the path of the file for the plan as text.
pub const PLAN_TEXT: &str = "SHARDFLOW_PLAN_TEXT";
/// Environment variable with the path of the file for the plan as an HTML page.
pub const PLAN_HTML: &str = "SHARDFLOW_PLAN_HTML";
/// Environment variable with the path of the file for the plan as Graphviz input.
pub const PLAN_DOT: &str = "SHARDFLOW_PLAN_DOT";

/// The variables in the order of writing. The text is last: once it is written, all files are complete.
const VARIABLES: [&str; 3] = [PLAN_HTML, PLAN_DOT, PLAN_TEXT];

/// True under `shardflow plan`: no session will start, so a program needs neither devices nor data.
pub fn is_requested() -> bool {
    VARIABLES.iter().any(|variable| std::env::var_os(variable).is_some())
}

/// Writes the plan to the files that the environment requests. Returns true if it requests any.
pub(super) fn write_requested(plan: &Plan) -> Result<bool, (PathBuf, io::Error)> {
    for variable in VARIABLES {
        let Some(path) = std::env::var_os(variable).map(PathBuf::from) else { continue };
        let content = match variable {
            PLAN_HTML => plan.to_html(),
            PLAN_DOT => plan.to_dot(),
            _ => plan.explain(),
        };
        std::fs::write(&path, content).map_err(|source| (path, source))?;
    }
    Ok(is_requested())
}
