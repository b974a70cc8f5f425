//! Findings of the checks, call counters, and the report at exit.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// An error that a check found. If the error occurs again, only `count` increases.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize, PartialEq, Eq)]
pub struct SimFinding {
    /// The kind, such as `race` or `bounds`. The crate documentation lists all kinds.
    pub kind: String,
    /// What happened, and where.
    pub message: String,
    /// Number of occurrences.
    pub count: u64,
}

/// All findings so far.
#[derive(Default)]
pub(crate) struct Findings {
    list: Vec<SimFinding>,
    seen: HashMap<String, usize>,
}

impl Findings {
    /// Adds a finding, or increases the count of a finding with equal `kind` and `key`.
    pub fn add(&mut self, kind: &str, key: &str, message: impl FnOnce() -> String) {
        let at = *self.seen.entry(format!("{kind} {key}")).or_insert(self.list.len());
        match self.list.get_mut(at) {
            Some(known) => known.count += 1,
            None => {
                let message = message();
                eprintln!("software-cuda: {kind}: {message}");
                self.list.push(SimFinding { kind: kind.into(), message, count: 1 });
            }
        }
    }

    /// All findings in the order of their first occurrence.
    pub fn list(&self) -> &[SimFinding] {
        &self.list
    }

    /// Removes all findings.
    pub fn clear(&mut self) {
        *self = Findings::default();
    }
}

/// Counts the calls of one exported function.
pub(crate) struct Counter {
    name: &'static str,
    calls: AtomicU64,
    listed: AtomicBool,
}

static COUNTERS: Mutex<Vec<&'static Counter>> = Mutex::new(Vec::new());

impl Counter {
    /// Creates a counter for this function.
    pub const fn new(name: &'static str) -> Counter {
        Counter { name, calls: AtomicU64::new(0), listed: AtomicBool::new(false) }
    }

    /// Counts a call.
    pub fn hit(&'static self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if !self.listed.swap(true, Ordering::Relaxed) {
            COUNTERS.lock().unwrap_or_else(|e| e.into_inner()).push(self);
        }
    }
}

/// Returns the number of calls of each function.
pub fn calls() -> BTreeMap<String, u64> {
    let counters = COUNTERS.lock().unwrap_or_else(|e| e.into_inner());
    counters.iter().map(|c| (c.name.to_string(), c.calls.load(Ordering::Relaxed))).collect()
}

static LAUNCHES: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

/// Counts a launch of a kernel.
pub fn count_launch(kernel: &str) {
    let mut launches = LAUNCHES.lock().unwrap_or_else(|e| e.into_inner());
    match launches.get_mut(kernel) {
        Some(count) => *count += 1,
        None => drop(launches.insert(kernel.to_owned(), 1)),
    }
}

/// Classes of functions. Tests check how often each class is called.
pub const CLASSES: &[(&str, &[&str])] = &[
    ("allocations", &["cuMemAlloc_v2", "cuMemAllocAsync", "cuMemHostAlloc"]),
    ("frees", &["cuMemFree_v2", "cuMemFreeAsync", "cuMemFreeHost"]),
    (
        "synchronisations",
        &[
            "cuCtxSynchronize",
            "cuStreamSynchronize",
            "cuEventSynchronize",
            "cuMemAlloc_v2",
            "cuMemFree_v2",
            "cuMemFreeHost",
            "cuMemcpyHtoD_v2",
            "cuMemcpyDtoH_v2",
            "cuMemcpyDtoD_v2",
        ],
    ),
    ("event-tracking", &["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy_v2"]),
    ("launches", &["cuLaunchKernel", "cuLaunchKernelEx", "cublasLtMatmul"]),
    ("queries", &["cuEventQuery", "cuStreamQuery"]),
];

/// Returns the number of calls of one function, or of all functions in one of [`CLASSES`].
pub fn count(name: &str) -> u64 {
    let calls = calls();
    match CLASSES.iter().find(|c| c.0 == name) {
        Some((_, members)) => members.iter().filter_map(|m| calls.get(*m)).sum(),
        None => calls.get(name).copied().unwrap_or(0),
    }
}

/// The report written at exit.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct SimReport {
    /// All findings, including leaks.
    pub findings: Vec<SimFinding>,
    /// Calls by function.
    pub calls: BTreeMap<String, u64>,
    /// Calls by class.
    pub classes: BTreeMap<String, u64>,
    /// Launches by kernel.
    pub kernels: BTreeMap<String, u64>,
    /// Peak of allocated bytes on each device. The last entry is the peak of pinned memory.
    pub peak_bytes: Vec<u64>,
    /// Number of executed operations.
    pub executed: u64,
}

impl SimReport {
    /// Fills in the counters of calls and launches.
    pub fn with_calls(mut self) -> SimReport {
        self.calls = calls();
        self.kernels = LAUNCHES.lock().unwrap_or_else(|e| e.into_inner()).clone();
        self.classes = CLASSES.iter().map(|(name, _)| (name.to_string(), count(name))).collect();
        self
    }

    /// Writes the report as JSON, atomically.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let partial = path.with_extension(format!("partial-{}", std::process::id()));
        let mut file = std::fs::File::create(&partial)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        drop(file);
        std::fs::rename(partial, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_findings_are_counted() {
        let mut findings = Findings::default();
        for key in ["a", "b", "a"] {
            findings.add("race", key, || format!("about {key}"));
        }
        let counts: Vec<_> = findings.list().iter().map(|f| (f.message.as_str(), f.count)).collect();
        assert_eq!(counts, [("about a", 2), ("about b", 1)]);
    }
}
