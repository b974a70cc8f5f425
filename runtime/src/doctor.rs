//! `shardflow doctor`: reports a machine's resources and software, what is missing, and how to install it.

use std::fmt;

use serde::Serialize;

pub use finding::{Finding, FindingStatus};
use shardflow_job::exit::Exit;

mod finding;
mod gpu;
mod machine;
mod software;
mod works;

/// All findings.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// The findings, in the order of the report.
    pub findings: Vec<Finding>,
}

/// Examines this machine. Takes well under a second and makes no lasting change.
pub fn examine() -> Findings {
    let of = |group, findings: Vec<Finding>| findings.into_iter().map(move |finding| Finding { group, ..finding });
    let (machine, works) = (of("machine", machine::examine()), of("works", works::examine()));
    let (gpu, cluster) = (of("gpu", gpu::examine()), of("cluster", software::examine()));
    Findings { findings: machine.chain(works).chain(gpu).chain(cluster).collect() }
}

impl Findings {
    /// [`Exit::Refused`] if a finding has the status `Broken`.
    pub fn exit(&self) -> Exit {
        if self.findings.iter().any(|f| f.status == FindingStatus::Broken) { Exit::Refused } else { Exit::Done }
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut group = "";
        for finding in &self.findings {
            if finding.group != group {
                group = finding.group;
                writeln!(f, "{group}")?;
            }
            let status = match finding.status {
                FindingStatus::Ok => "ok",
                FindingStatus::Absent => "absent",
                FindingStatus::Poor => "poor",
                FindingStatus::Broken => "BROKEN",
            };
            writeln!(f, "  {status:7} {:18} {}", finding.name, finding.value)?;
            if let Some(hint) = &finding.hint {
                writeln!(f, "{:29}hint: {hint}", "")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_json_have_the_same_findings() {
        let findings = examine();
        let text = findings.to_string();
        let json = serde_json::to_value(&findings).unwrap();
        let listed = json["findings"].as_array().unwrap();
        assert!(listed.len() >= 20);
        for finding in listed {
            assert!(
                text.contains(finding["name"].as_str().unwrap()) && text.contains(finding["value"].as_str().unwrap())
            );
            // Every finding except `ok` has a hint.
            assert!(finding["status"] == "ok" || finding["hint"].is_string(), "{finding}");
        }
    }
}
