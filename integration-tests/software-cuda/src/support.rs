//! What tests need to run a program on the software device.
//!
//! The dynamic linker reads its path when a process starts, so tests start a child: themselves with another argument, or
//! a program. [`command`] sets it up, [`Report::read`](crate::Report::read) says what was found.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::findings::Report;

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

/// The built library: beside the running test or program, or where `SOFTWARE_CUDA_LIBRARY` says.
pub fn library() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os("SOFTWARE_CUDA_LIBRARY") {
        return Ok(path.into());
    }
    let program = std::env::current_exe()?;
    let folders = program.ancestors().skip(1).take(3).flat_map(|f| [f.to_path_buf(), f.join("deps")]);
    let found: Vec<PathBuf> = folders.map(|f| f.join(LIBRARY)).filter(|p| p.exists()).collect();
    // Cargo leaves older ones in other folders.
    let newest = found.into_iter().max_by_key(|p| p.metadata().and_then(|m| m.modified()).ok());
    newest.ok_or_else(|| {
        let what = format!("no {LIBRARY} near {}: cargo build -p shardflow-software-cuda", program.display());
        io::Error::new(io::ErrorKind::NotFound, what)
    })
}

/// Makes links in `folder` (which is made too) that put the library in the place of NVIDIA's.
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

/// A command that runs `program` on that many software devices, with a report at `folder/report.json`. The libraries are
/// installed in `folder`.
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

/// Names to a test's child what it is to do.
pub const CASE: &str = "SHARDFLOW_TEST_CASE";

/// Within this a test's child ends, whatever it waits for.
const CHILD_WITHIN: Duration = Duration::from_secs(600);

/// What a test's child is to do. The child is ended when it takes too long, for its test waits for it.
///
/// # Panics
/// Where nothing says what.
pub fn case() -> String {
    let case = std::env::var(CASE).expect("a test that starts this one says what to do");
    let told = case.clone();
    std::thread::spawn(move || {
        std::thread::sleep(CHILD_WITHIN);
        eprintln!("{told}: not done after {CHILD_WITHIN:?}");
        std::process::exit(124);
    });
    case
}

/// What came of a test's child.
#[derive(Debug)]
pub struct Ran {
    /// What it printed.
    pub stdout: String,
    /// What the device found.
    pub report: Report,
}

/// Runs this test program's ignored test `child` on so many software devices: [`CASE`] tells it `case`, and `fault`, if one is
/// given, is injected.
///
/// # Panics
/// When the child does not succeed, with the end of what it complained of; when it leaves no report.
pub fn run_child(case: &str, devices: usize, policy: &str, seed: u64, fault: Option<&str>) -> Ran {
    let environment: Vec<_> = fault.map(|fault| ("SOFTWARE_CUDA_FAULT", fault)).into_iter().collect();
    run_child_in(case, devices, policy, seed, &environment)
}

/// As [`run_child`], with these variables.
///
/// # Panics
/// As [`run_child`].
pub fn run_child_in(case: &str, devices: usize, policy: &str, seed: u64, environment: &[(&str, &str)]) -> Ran {
    let folder = tempfile::tempdir().expect("a folder");
    let program = std::env::current_exe().expect("this program");
    let mut child = command(program, folder.path(), devices, policy, seed).expect("the software device");
    child.args(["--ignored", "--exact", "child", "--nocapture"]).env(CASE, case);
    child.envs(environment.iter().copied());
    let output = child.output().expect("a child");
    let text = String::from_utf8_lossy(&output.stderr);
    let tail: String = text.lines().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    assert!(output.status.success(), "{case}, {policy}, seed {seed}:\n{tail}");
    let report = Report::read(folder.path()).expect("a report");
    Ran { stdout: String::from_utf8_lossy(&output.stdout).into_owned(), report }
}

/// Where [`command`] has the report written.
pub fn report_path(folder: &Path) -> PathBuf {
    folder.join("report.json")
}

impl Report {
    /// Reads what [`command`]'s program left.
    pub fn read(folder: &Path) -> io::Result<Report> {
        Ok(serde_json::from_slice(&std::fs::read(report_path(folder))?)?)
    }
}
