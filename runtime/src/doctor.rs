//! `shardflow doctor`: reports a machine's resources and software, what is missing, and how to install it.

use std::fmt;

use serde::Serialize;

use shardflow_job::exit::Exit;

mod gpu;
mod machine;
mod software;
mod works;

/// Status of one finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FindingStatus {
    Ok,
    /// Missing; only some programs need it.
    Absent,
    /// Smaller or slower than recommended.
    Poor,
    /// Does not work; every program with several processes needs it.
    Broken,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `machine`, `works`, `gpu` or `cluster`.
    pub group: &'static str,
    pub name: &'static str,
    pub status: FindingStatus,
    /// Numbers, versions or paths.
    pub value: String,
    /// How to install or improve it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// All findings.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// In the order of the report.
    pub findings: Vec<Finding>,
}

/// Examines this machine. Takes well under a second and makes no lasting change.
pub fn examine() -> Findings {
    let of = |group, findings: Vec<Finding>| findings.into_iter().map(move |finding| Finding { group, ..finding });
    let (machine, works) = (of("machine", machine::examine()), of("works", works::examine()));
    let (gpu, cluster) = (of("gpu", gpu::examine()), of("cluster", software::examine()));
    Findings { findings: machine.chain(works).chain(gpu).chain(cluster).collect() }
}

/// [`examine`] sets the group.
fn ok(name: &'static str, value: impl Into<String>) -> Finding {
    Finding { group: "", name, status: FindingStatus::Ok, value: value.into(), hint: None }
}

fn not_ok(name: &'static str, status: FindingStatus, value: impl Into<String>, hint: impl Into<String>) -> Finding {
    Finding { status, hint: Some(hint.into()), ..ok(name, value) }
}

impl Findings {
    /// [`Exit::Refused`] if a finding is broken.
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

/// Formats a size, such as `12.3 GiB`.
fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes >> 10),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64),
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
            // A finding that is not ok has a hint.
            assert!(finding["status"] == "ok" || finding["hint"].is_string(), "{finding}");
        }
    }

    #[test]
    fn sizes_have_units() {
        let sizes = [0, 2047, 1 << 20, (1 << 30) - 1, 3 << 29].map(size);
        assert_eq!(sizes, ["0 KiB", "1 KiB", "1 MiB", "1023 MiB", "1.5 GiB"]);
    }
}
