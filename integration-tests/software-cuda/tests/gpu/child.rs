//! Runs a test's case in a child process on the software device.

use std::path::Path;
use std::process::{Command, Output};

use shardflow_software_cuda::SimReport;

const CASE: &str = "SOFTWARE_CUDA_TEST_CASE";

/// In the child: runs the case that the parent has named.
pub fn run(cases: &[(&str, fn())]) {
    let name = std::env::var(CASE).expect("the parent names a case");
    let (_, case) = cases.iter().find(|c| c.0 == name).expect("the case exists");
    case();
}

/// In the parent: returns a command that runs a case and writes a report to the folder.
pub fn command(case: &str, folder: &Path, devices: usize, policy: &str, seed: u64) -> Command {
    let program = std::env::current_exe().expect("the program has a path");
    let command = shardflow_software_cuda::command(program, folder, devices, policy, seed);
    let mut command = command.expect("the software device is built");
    command.args(["--exact", "child", "--ignored", "--nocapture"]).env(CASE, case);
    command
}

/// In the parent: runs a case with these environment variables. Returns its output and the device's report.
pub fn start(case: &str, devices: usize, policy: &str, seed: u64, settings: &[(&str, &str)]) -> (Output, SimReport) {
    let folder = tempfile::tempdir().expect("the temporary folder is writable");
    let mut command = command(case, folder.path(), devices, policy, seed);
    let output = command.envs(settings.iter().copied()).output().expect("this program starts");
    let report = SimReport::read(folder.path()).unwrap_or_default();
    (output, report)
}

/// In the parent: checks that the case passes without findings.
pub fn expect_clean(case: &str, devices: usize, policy: &str, seed: u64) {
    let (output, report) = start(case, devices, policy, seed, &[]);
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{case} failed under {policy}, seed {seed}:\n{text}");
    assert_eq!(report.findings, [], "{case} has findings under {policy}, seed {seed}");
    assert!(report.executed > 0, "{case} did not run on the software device");
}
