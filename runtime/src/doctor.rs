//! `shardflow doctor`: what of a machine matters to a run, what is missing, and how to get it.

use std::fmt;

use serde::Serialize;

use crate::exit::Exit;

mod gpu;
mod machine;
mod software;
mod works;

/// How one thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FindingStatus {
    /// There, and works.
    Ok,
    /// Not there; only some programs need it.
    Absent,
    /// There, but smaller or slower than it should be.
    Poor,
    /// Does not work, and no program of several processes runs without.
    Broken,
}

/// One line of the doctor's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `machine`, `works`, `gpu` or `cluster`.
    pub group: &'static str,
    /// What was looked at.
    pub name: &'static str,
    /// How it stands.
    pub status: FindingStatus,
    /// Numbers, versions or paths.
    pub value: String,
    /// How to get it, or to make it better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// All that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    /// In the order in which they are shown.
    pub findings: Vec<Finding>,
}

/// Looks at this machine. Takes well under a second and changes nothing that lasts.
pub fn examine() -> Findings {
    let mut findings = machine::examine();
    findings.extend(works::examine());
    findings.extend(gpu::examine());
    findings.extend(software::examine());
    Findings { findings }
}

impl Finding {
    fn new(group: &'static str, name: &'static str, status: FindingStatus, value: impl Into<String>) -> Finding {
        Finding { group, name, status, value: value.into(), hint: None }
    }

    fn hint(self, hint: impl Into<String>) -> Finding {
        Finding { hint: Some(hint.into()), ..self }
    }
}

impl Findings {
    /// [`Exit::Refused`] when something is broken.
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

/// `12.3 GiB`.
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
    fn text_and_json_tell_the_same() {
        let findings = examine();
        let text = findings.to_string();
        let json = serde_json::to_value(&findings).unwrap();
        let listed = json["findings"].as_array().unwrap();
        assert!(listed.len() >= 20);
        for finding in listed {
            assert!(
                text.contains(finding["name"].as_str().unwrap()) && text.contains(finding["value"].as_str().unwrap())
            );
            // Whoever lacks something is told what to do.
            assert!(finding["status"] == "ok" || finding["hint"].is_string(), "{finding}");
        }
    }

    #[test]
    fn sizes() {
        let sizes = [0, 2047, 1 << 20, (1 << 30) - 1, 3 << 29].map(size);
        assert_eq!(sizes, ["0 KiB", "1 KiB", "1 MiB", "1023 MiB", "1.5 GiB"]);
    }
}
