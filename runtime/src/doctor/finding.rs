//! A finding, which is one line of the report, and the text form of sizes.

use serde::Serialize;

/// Status of one finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FindingStatus {
    Ok,
    /// The feature is missing, but only some programs need it.
    Absent,
    /// The resource is smaller or slower than recommended.
    Poor,
    /// The feature does not work, and every program with several processes needs it.
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
    /// How to install or improve the feature.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Creates a finding without a hint. The caller sets the group.
pub(super) fn ok(name: &'static str, value: impl Into<String>) -> Finding {
    Finding { group: "", name, status: FindingStatus::Ok, value: value.into(), hint: None }
}

pub(super) fn not_ok(
    name: &'static str,
    status: FindingStatus,
    value: impl Into<String>,
    hint: impl Into<String>,
) -> Finding {
    Finding { status, hint: Some(hint.into()), ..ok(name, value) }
}

/// Formats a size, such as `12.3 GiB`.
pub(super) fn size(bytes: u64) -> String {
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
    fn sizes_have_units() {
        let sizes = [0, 2047, 1 << 20, (1 << 30) - 1, 3 << 29].map(size);
        assert_eq!(sizes, ["0 KiB", "1 KiB", "1 MiB", "1023 MiB", "1.5 GiB"]);
    }
}
