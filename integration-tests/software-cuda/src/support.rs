//! Functions for tests to run a program on the software device.
//!
//! The dynamic linker reads its search path when a process starts. A test therefore starts a child process, which runs
//! the test program itself with other arguments, or another program. [`command`] returns the child's command, and
//! [`SimReport::read`](crate::SimReport::read) reads the child's report.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::findings::SimReport;

const LIBRARY: &str = "libshardflow_software_cuda.so";
/// Names under which programs look for NVIDIA's libraries.
const NAMES: &[&str] = &[
    "libcuda.so",
    "libcuda.so.1",
    "libnvrtc.so",
    "libnvrtc.so.13",
    "libnccl.so",
    "libnccl.so.2",
    "libcublasLt.so",
    "libcublasLt.so.13",
    "libcudnn.so",
    "libcudnn.so.9",
];

/// Returns the path of the built library: `SOFTWARE_CUDA_LIBRARY`, or the newest build near the running program.
pub fn library() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os("SOFTWARE_CUDA_LIBRARY") {
        return Ok(path.into());
    }
    let program = std::env::current_exe()?;
    let folders = program.ancestors().skip(1).take(3).flat_map(|f| [f.to_path_buf(), f.join("deps")]);
    let found: Vec<PathBuf> = folders.map(|f| f.join(LIBRARY)).filter(|p| p.exists()).collect();
    // Cargo leaves older builds in other folders, so take the newest.
    let newest = found.into_iter().max_by_key(|p| p.metadata().and_then(|m| m.modified()).ok());
    newest.ok_or_else(|| {
        let message = format!("no {LIBRARY} near {}: run cargo build -p shardflow-software-cuda", program.display());
        io::Error::new(io::ErrorKind::NotFound, message)
    })
}

/// Creates `folder` with symbolic links to this library that have the names of NVIDIA's libraries.
pub fn install(folder: &Path) -> io::Result<()> {
    let library = library()?.canonicalize()?;
    std::fs::create_dir_all(folder)?;
    for name in NAMES {
        let link = folder.join(name);
        match std::fs::remove_file(&link) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => symlink(&library, &link)?,
        }
    }
    Ok(())
}

/// Returns a command that runs `program` on this number of software devices, with the libraries in `folder` and the
/// report in `folder/report.json`.
pub fn command(
    program: impl AsRef<OsStr>,
    folder: &Path,
    devices: usize,
    policy: &str,
    seed: u64,
) -> io::Result<Command> {
    install(folder)?;
    let mut command = Command::new(program);
    command
        .env("LD_LIBRARY_PATH", folder)
        .env("SOFTWARE_CUDA_DEVICES", devices.to_string())
        .env("SOFTWARE_CUDA_POLICY", policy)
        .env("SOFTWARE_CUDA_SEED", seed.to_string())
        .env("SOFTWARE_CUDA_REPORT", report_path(folder));
    Ok(command)
}

/// Environment variable that names the case for a test's child process.
pub const CASE: &str = "SHARDFLOW_TEST_CASE";

/// Time limit of a test's child process.
const CHILD_WITHIN: Duration = Duration::from_secs(600);

/// Returns the case of a test's child process. Also ends this process after a time limit, because the test waits for
/// it.
///
/// # Panics
/// If the environment names no case.
pub fn case() -> String {
    let case = std::env::var(CASE).expect("the starting test sets the case");
    let name = case.clone();
    std::thread::spawn(move || {
        std::thread::sleep(CHILD_WITHIN);
        eprintln!("{name}: the case has not ended after {CHILD_WITHIN:?}");
        std::process::exit(124);
    });
    case
}

/// Result of a test's child process.
#[derive(Debug)]
pub struct ChildRun {
    /// Standard output of the child.
    pub stdout: String,
    /// The device's report.
    pub report: SimReport,
}

/// Runs this test program's ignored test `child` on this number of software devices. [`CASE`] is set to `case`, and
/// `fault` optionally names a fault to inject.
///
/// # Panics
/// If the child fails or leaves no report. The message for a failed child has the end of the child's standard error.
pub fn run_child(case: &str, devices: usize, policy: &str, seed: u64, fault: Option<&str>) -> ChildRun {
    let environment: Vec<_> = fault.map(|fault| ("SOFTWARE_CUDA_FAULT", fault)).into_iter().collect();
    run_child_in(case, devices, policy, seed, &environment)
}

/// Like [`run_child`], with these environment variables.
///
/// # Panics
/// Like [`run_child`].
pub fn run_child_in(case: &str, devices: usize, policy: &str, seed: u64, environment: &[(&str, &str)]) -> ChildRun {
    let folder = tempfile::tempdir().expect("the temporary folder is writable");
    let program = std::env::current_exe().expect("the program has a path");
    let mut child = command(program, folder.path(), devices, policy, seed).expect("the software device is built");
    child.args(["--ignored", "--exact", "child", "--nocapture"]).env(CASE, case);
    child.envs(environment.iter().copied());
    let output = child.output().expect("this program starts");
    let text = String::from_utf8_lossy(&output.stderr);
    let tail: String = text.lines().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    assert!(output.status.success(), "{case} failed under {policy}, seed {seed}:\n{tail}");
    let report = SimReport::read(folder.path()).expect("the child has written a report");
    ChildRun { stdout: String::from_utf8_lossy(&output.stdout).into_owned(), report }
}

/// Returns the path of the report of [`command`].
pub fn report_path(folder: &Path) -> PathBuf {
    folder.join("report.json")
}

impl SimReport {
    /// Reads the report of a program that [`command`] started.
    pub fn read(folder: &Path) -> io::Result<SimReport> {
        Ok(serde_json::from_slice(&std::fs::read(report_path(folder))?)?)
    }
}
