//! Training on software GPUs in several processes of one node. On any mesh, the losses match those of CPU devices
//! within a tolerance, and the software device finds no errors in the driver calls. Every process sees all GPUs of the
//! node, as on real hardware, and uses some of them. Each process is this test program with its own software device.
//! Transfers between GPUs of two processes use the sockets of the software NCCL, or Shardflow's own connections.

use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use shardflow::cluster::{ClusterOptions, Transport};
use shardflow::passes::CompileOptions;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::session::SessionOptions;
use shardflow_integration_tests::together::cluster_at;
use shardflow_integration_tests::training::{Model, Scratch, options, relative};
use shardflow_kernels::cuda::library::SETTINGS;
use shardflow_kernels::device::DeviceKind;
use shardflow_software_cuda::{CASE, SimReport, case, command};

const STEPS: usize = 3;
/// Largest relative difference from the CPU backend's losses. The CPU backend adds in another order, and its exp and
/// erf round differently.
const LOSS_MAX: f64 = 1e-4;
/// Much longer than two processes need to start, compile kernels, fail, and report the failure.
const ENDS_WITHIN: Duration = Duration::from_secs(60);

fn model() -> Model {
    Model { layers: 4, heads: 2, width: 16, context: 8, batch: 8, dropout: 0.1, max_norm: 1.0 }
}

fn settings(device: DeviceKind) -> CompileOptions {
    CompileOptions { device, ..options(2, OneFOneB) }
}

#[test]
#[ignore = "started by the other tests, on software devices"]
fn child() {
    let case = case();
    let [mesh, process, processes, by, steps, socket] = case.split(' ').collect::<Vec<_>>()[..] else {
        panic!("not a valid case: {case}")
    };
    let number = |text: &str| text.parse().expect("a number");
    let transport = if by == "pipes" { Transport::Auto } else { Transport::Tcp };
    let cluster_options = ClusterOptions { transport, ..ClusterOptions::default() };
    let cluster = cluster_at(Path::new(socket), number(process), number(processes), cluster_options);
    let options = SessionOptions { cluster, ..SessionOptions::default() };
    let mut session = model().session_with(mesh, &settings(DeviceKind::Cuda), &options);
    let losses: Vec<f32> = (0..number(steps)).map(|_| model().step(&mut session).loss.expect("a loss")).collect();
    println!("\n> {losses:?}");
    let devices = session.metrics().devices;
    let bytes = devices.iter().map(|d| (d.device, d.planned_peak_bytes, d.allocated_bytes));
    println!("\n= {:?}", bytes.collect::<Vec<_>>());
    session.shutdown().expect("an end");
}

/// A training in several processes on one node. `by` is the transport of registers between the processes: `pipes` (NCCL
/// between GPUs) or `connections`.
#[derive(Clone, Copy, Debug)]
struct Case {
    mesh: &'static str,
    processes: u32,
    gpus: usize,
    by: &'static str,
    steps: u32,
}

/// Runs the case with the fault in the last process. Returns the output and the report of each process.
fn run(case: Case, policy: &str, seed: u64, fault: Option<&str>) -> Vec<(Output, Option<SimReport>)> {
    let Case { mesh, processes, gpus, by, steps } = case;
    let scratch = Scratch::new(&format!("gpu-processes-{seed}"));
    let socket = scratch.path().join("meet.sock");
    let folder = |process: u32| scratch.path().join(process.to_string());
    let start = |process: u32| -> Child {
        let program = std::env::current_exe().expect("this program");
        let mut child = command(program, &folder(process), gpus, policy, seed + u64::from(process));
        let child = child.as_mut().expect("the software device");
        child.args(["--ignored", "--exact", "child", "--nocapture"]);
        child.env(CASE, format!("{mesh} {process} {processes} {by} {steps} {}", socket.display()));
        // Set these variables as the launcher does.
        child.envs(SETTINGS);
        child.envs(fault.filter(|_| process + 1 == processes).map(|fault| ("SOFTWARE_CUDA_FAULT", fault)));
        child.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a child")
    };
    let children: Vec<Child> = (0..processes).map(start).collect();
    // Collect all outputs before checking any of them, because the process that failed first reports the cause.
    let outputs: Vec<_> = children.into_iter().map(|child| child.wait_with_output().expect("a child")).collect();
    (0..).zip(outputs).map(|(process, output)| (output, SimReport::read(&folder(process)).ok())).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Checks that the planned memory of each device of a process equals the allocated bytes and the peak of the GPU. The
/// plan includes the local copies of registers of other processes.
fn check_memory(at: &str, stdout: &str, peak_bytes: &[u64]) {
    let line = stdout.lines().find_map(|line| line.strip_prefix("= ")).expect("memory");
    let devices: Vec<(usize, u64, u64)> =
        serde_json::from_str(&line.replace(['('], "[").replace(')', "]")).expect("numbers");
    assert!(!devices.is_empty(), "{at}");
    for (device, planned, allocated) in devices {
        assert_eq!([planned, allocated], [peak_bytes[device]; 2], "{at}, device {device}");
    }
}

/// Returns, for each process, the losses and the number of `ncclSend` calls.
fn train(case: Case, policy: &str, seed: u64) -> Vec<(Vec<f64>, u64)> {
    let ended = run(case, policy, seed, None);
    let stderr: String = ended.iter().map(|(output, _)| text(&output.stderr)).collect();
    let losses = |(process, (output, report)): (u32, &(Output, Option<SimReport>))| {
        let at = format!("{case:?}, process {process}, {policy}, seed {seed}");
        assert!(output.status.success(), "{at}:\n{stderr}");
        let report = report.as_ref().expect("a report");
        assert!(report.findings.is_empty(), "{at}: {:#?}", report.findings);
        let stdout = text(&output.stdout);
        check_memory(&at, &stdout, &report.peak_bytes);
        let line = stdout.lines().find_map(|line| line.strip_prefix("> [")).expect("losses").trim_end_matches(']');
        let losses =
            line.split(", ").filter(|loss| !loss.is_empty()).map(|loss| loss.parse().expect("a number")).collect();
        (losses, report.calls.get("ncclSend").copied().unwrap_or(0))
    };
    (0..).zip(&ended).map(losses).collect()
}

/// Compares the losses with those of CPU devices. Returns the losses and each process's number of `ncclSend` calls.
fn check(
    mesh: &'static str,
    processes: u32,
    gpus: usize,
    by: &'static str,
    policy: &str,
    seed: u64,
) -> (Vec<f64>, Vec<u64>) {
    let cpu = model().train(mesh, &settings(DeviceKind::Cpu), STEPS);
    let all = train(Case { mesh, processes, gpus, by, steps: STEPS as u32 }, policy, seed);
    for (process, (losses, _)) in all.iter().enumerate() {
        assert_eq!(losses.len(), STEPS);
        assert_eq!(losses, &all[0].0, "the processes report different losses");
        for (step, (got, want)) in losses.iter().zip(&cpu.losses).enumerate() {
            let difference = relative(*got, f64::from(*want));
            let at = format!("{mesh}, process {process} of {processes}, step {step}");
            assert!(difference <= LOSS_MAX, "{at}: got {got}, expected {want}: {difference:e}");
        }
    }
    (all[0].0.clone(), all.into_iter().map(|(_, sends)| sends).collect())
}

#[test]
fn a_gpu_for_each_of_two_processes() {
    check("data=2", 2, 2, "pipes", "random", 10);
    check("tensor=2", 2, 2, "pipes", "lazy", 20);
}

#[test]
fn a_pipeline_over_two_processes() {
    let (losses, sends) = check("stage=2", 2, 2, "connections", "lazy", 30);
    assert_eq!(sends, [0, 0]);
    for (policy, seed) in [("random", 32), ("adversarial", 34), ("starve", 36)] {
        let (same, sends) = check("stage=2", 2, 2, "pipes", policy, seed);
        assert!(same == losses, "got {same:?}, expected {losses:?}");
        assert!(sends.iter().all(|sends| *sends > 0), "a process sent nothing: {sends:?}");
    }
}

/// NCCL connects two ranks when they first exchange a message. Before the first step, a session therefore sends a
/// message in each direction of each pipe.
#[test]
fn pipes_are_connected_when_the_session_starts() {
    for (by, expected) in [("pipes", [1, 1]), ("connections", [0, 0])] {
        let case = Case { mesh: "stage=2", processes: 2, gpus: 2, by, steps: 0 };
        let sends: Vec<u64> = train(case, "random", 50).into_iter().map(|(_, sends)| sends).collect();
        assert_eq!(sends, expected, "{by}");
    }
}

#[test]
fn two_gpus_for_each_of_two_processes() {
    check("data=2,stage=2", 2, 4, "pipes", "random", 40);
    check("data=2,stage=2", 2, 4, "connections", "random", 42);
    check("stage=2,tensor=2", 2, 4, "pipes", "adversarial", 44);
}

#[test]
fn devices_that_do_not_divide_evenly() {
    check("data=3", 2, 3, "pipes", "random", 60);
}

/// Returns the error text of process 0 after the fault in process 1.
fn survivor_error(mesh: &'static str, by: &'static str, seed: u64, fault: &str) -> String {
    let started = Instant::now();
    let ended = run(Case { mesh, processes: 2, gpus: 2, by, steps: STEPS as u32 }, "random", seed, Some(fault));
    let stderr = text(&ended[0].0.stderr);
    assert!(started.elapsed() < ENDS_WITHIN, "{mesh} by {by}, {fault}: too slow: {stderr}");
    assert!(ended.iter().all(|(output, _)| !output.status.success()), "{mesh} by {by}, {fault}: {stderr}");
    let report = ended[0].1.as_ref().expect("a report");
    // The failure of the other process aborts running work. The software device records this as a finding.
    let found: Vec<_> = report.findings.iter().filter(|finding| finding.kind != "aborted").collect();
    assert!(found.is_empty(), "{mesh} by {by}, {fault}: {found:#?}");
    stderr
}

#[test]
fn a_lost_gpu_ends_all_processes_with_its_cause() {
    for (mesh, by, seed) in [("stage=2", "pipes", 70), ("stage=2", "connections", 72), ("data=2", "pipes", 74)] {
        let stderr = survivor_error(mesh, by, seed, "kill:1:60");
        assert!(stderr.contains("rank 1") && stderr.contains("CUDA_ERROR_LAUNCH_FAILED"), "{mesh} by {by}: {stderr}");
    }
}

#[test]
fn a_process_that_dies_is_named() {
    for (mesh, seed) in [("stage=2", 80), ("data=2", 82)] {
        let stderr = survivor_error(mesh, "pipes", seed, "die:1:60");
        assert!(stderr.contains("rank 1"), "{mesh}: {stderr}");
    }
}
