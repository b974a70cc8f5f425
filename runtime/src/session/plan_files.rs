//! For `shardflow plan`: a program whose environment says so writes the plan that it would run, and runs nothing.

use std::path::PathBuf;

use super::SessionError;
use crate::plan::Plan;

/// Variable with the file that the plan is written to, as text.
pub const PLAN_TEXT: &str = "SHARDFLOW_PLAN_TEXT";
/// The same, as a page.
pub const PLAN_HTML: &str = "SHARDFLOW_PLAN_HTML";
/// The same, for Graphviz.
pub const PLAN_DOT: &str = "SHARDFLOW_PLAN_DOT";

/// The text last: that it is there says that all is.
const ALL: [&str; 3] = [PLAN_HTML, PLAN_DOT, PLAN_TEXT];

/// True under `shardflow plan`: a session will not start, so that a program needs none of what it would run on.
pub fn is_requested() -> bool {
    ALL.iter().any(|variable| std::env::var_os(variable).is_some())
}

/// Writes the plan where the environment says so; then the session ends before it began.
pub(super) fn show(plan: &Plan) -> Result<(), SessionError> {
    for variable in ALL {
        let Some(path) = std::env::var_os(variable).map(PathBuf::from) else { continue };
        let picture = match variable {
            PLAN_HTML => plan.to_html(),
            PLAN_DOT => plan.to_dot(),
            _ => plan.explain(),
        };
        std::fs::write(&path, picture).map_err(|source| SessionError::PlanFile { path, source })?;
    }
    if is_requested() { Err(SessionError::PlanShown) } else { Ok(()) }
}
