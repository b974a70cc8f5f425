//! Training on software GPUs. On any mesh, the losses match those of CPU devices within a tolerance, and the software
//! device finds no errors in the driver calls. A case may have one GPU per mesh device, one GPU for all mesh devices,
//! or several GPUs that mesh devices share. If a GPU dies or hangs, the session ends with the cause. Each case runs in
//! a child process, whose dynamic linker loads the software device instead of NVIDIA's libraries.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use shardflow::passes::CompileOptions;
use shardflow::passes::precision::Precision;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::session::{Session, SessionOptions};
use shardflow_actors::watchdog::WatchdogOptions;
use shardflow_integration_tests::training::{LEARNING_RATE, Model, options, relative};
use shardflow_kernels::device::DeviceKind;
use shardflow_software_cuda::{ChildRun, POLICIES, SimReport, case, command, run_child};

const STEPS: usize = 3;
/// Largest relative difference from the CPU backend's losses. The CPU backend adds in another order, and its exp and
/// erf round differently.
const F32_MAX: f64 = 1e-4;
/// Largest relative difference in bf16, which has a relative rounding error of up to 2^-8.
const BF16_MAX: f64 = 2e-3;

/// Number of seeds for each policy in the long run.
const SEEDS: u64 = 50;

/// A session with a hung device ends after this time without progress.
const STALL: Duration = Duration::from_secs(2);
/// After a device's death or after [`STALL`], a session ends within this time. The software device is slow.
const LATE_MAX: Duration = Duration::from_secs(8);

fn model() -> Model {
    Model { layers: 4, heads: 2, width: 16, context: 8, batch: 8, dropout: 0.1, max_norm: 1.0 }
}

fn settings(device: DeviceKind, precision: Precision) -> CompileOptions {
    CompileOptions { device, precision, ..options(2, OneFOneB) }
}

fn precision(name: &str) -> Precision {
    if name == "bf16" { Precision::BF16 } else { Precision::F32 }
}

/// Trains until a step fails, and prints the error.
fn train_until_failure(mesh: &str) {
    let plan = model().plan(mesh, &settings(DeviceKind::Cuda, Precision::F32));
    let check_every = Some(Duration::from_millis(100));
    let watchdog =
        WatchdogOptions { stall_after: STALL, abort_after: Some(STALL), check_every, ..WatchdogOptions::default() };
    let mut session =
        Session::start(plan, &SessionOptions { watchdog, ..SessionOptions::default() }).expect("a session");
    for step in 0..100 {
        let began = Instant::now();
        let Err(error) = session.step(&model().batch(step), LEARNING_RATE) else { continue };
        println!("\n> {} ms, code {}, step {step}: {error}", began.elapsed().as_millis(), error.exit().code());
        return;
    }
    panic!("no step failed");
}

#[test]
#[ignore = "started by the other tests, on software devices"]
fn child() {
    let case = case();
    match case.split_once(' ').expect("a kind and a mesh") {
        ("large", _) => shardflow_integration_tests::large::check(DeviceKind::Cuda),
        ("fail", mesh) => train_until_failure(mesh),
        ("count", rest) => {
            let (name, rest) = rest.split_once(' ').expect("a precision");
            let (steps, rest) = rest.split_once(' ').expect("steps");
            let (layers, mesh) = rest.split_once(' ').expect("layers");
            let [steps, layers] = [steps, layers].map(|n| n.parse().expect("a number"));
            Model { layers, ..model() }.train(mesh, &settings(DeviceKind::Cuda, precision(name)), steps);
        }
        ("memory", rest) => {
            let (name, mesh) = rest.split_once(' ').expect("a precision and a mesh");
            let mut session = model().session(mesh, &settings(DeviceKind::Cuda, precision(name)));
            (0..STEPS).for_each(|_| drop(model().step(&mut session)));
            let devices = session.metrics().devices;
            assert!(devices.iter().all(|d| d.allocated_bytes == d.planned_peak_bytes), "{devices:?}");
            println!("\n> {:?}", devices.iter().map(|d| d.planned_peak_bytes).collect::<Vec<_>>());
            session.shutdown().expect("an end");
        }
        (name, mesh) => {
            let trained = model().train(mesh, &settings(DeviceKind::Cuda, precision(name)), STEPS);
            println!("\n> {:?}", trained.losses);
        }
    }
}

/// Returns the losses of a training on this number of software GPUs.
fn train(case: &str, gpus: usize, policy: &str, seed: u64) -> Vec<f64> {
    let ChildRun { stdout, report } = run_child(case, gpus, policy, seed, None);
    assert!(report.findings.is_empty(), "{case} on {gpus} GPUs, {policy}, seed {seed}: {:#?}", report.findings);
    let line = stdout.lines().find_map(|line| line.strip_prefix("> [")).expect("losses").trim_end_matches(']');
    line.split(", ").map(|loss| loss.parse().expect("a number")).collect()
}

/// Trains in `f32` or `bf16` on a mesh, and compares the losses with those of CPU devices.
fn check(name: &str, mesh: &str, gpus: usize, policies: &[(&str, u64)]) {
    let max = if name == "bf16" { BF16_MAX } else { F32_MAX };
    let cpu = model().train(mesh, &settings(DeviceKind::Cpu, precision(name)), STEPS);
    for (policy, seed) in policies {
        let losses = train(&format!("{name} {mesh}"), gpus, policy, *seed);
        assert_eq!(losses.len(), STEPS);
        for (step, (got, want)) in losses.iter().zip(&cpu.losses).enumerate() {
            let difference = relative(*got, f64::from(*want));
            assert!(
                difference <= max,
                "{name} {mesh} on {gpus} GPUs, step {step}: got {got}, expected {want}: {difference:e}"
            );
        }
    }
}

#[test]
fn one_device() {
    check("f32", "data=1", 1, &[("random", 1)]);
}

#[test]
fn a_gpu_for_each_device() {
    check("f32", "data=2", 2, &[("random", 2)]);
    check("f32", "stage=2", 2, &[("adversarial", 3)]);
    check("f32", "tensor=2", 2, &[("lazy", 4)]);
}

#[test]
fn four_gpus() {
    check("f32", "data=2,tensor=2", 4, &[("starve", 8)]);
}

#[test]
fn all_parallelisms_at_once() {
    check("f32", "data=2,stage=2,tensor=2", 8, &[("random", 5)]);
}

#[test]
fn devices_that_share_a_gpu() {
    check("f32", "data=2,stage=2", 1, &[("random", 6)]);
    check("f32", "tensor=2", 1, &[("lazy", 7)]);
}

/// Copies between GPUs must not go through host memory, and NCCL must be able to access peer memory.
#[test]
fn gpus_of_a_session_enable_peer_access() {
    for (mesh, gpus, pairs) in [("data=2,stage=2", 4, 12), ("stage=2,tensor=2", 2, 2), ("data=1", 2, 0)] {
        let calls = calls("f32", 1, 4, mesh, gpus);
        let count = |name: &str| calls.get(name).copied().unwrap_or(0);
        let pooled = count("cuMemAllocAsync");
        assert_eq!((count("cuCtxEnablePeerAccess"), pooled), (pairs, 0), "{mesh} on {gpus} GPUs");
    }
}

/// The peak memory of each device equals the planned memory exactly. The cases include cuDNN attention, cuBLASLt
/// products, NCCL collectives, and collectives between mesh devices that share a GPU.
#[test]
fn device_memory_matches_the_plan_exactly() {
    for (mesh, gpus) in [("data=2", 2), ("stage=2", 2), ("tensor=2", 2), ("data=2,tensor=2", 2), ("tensor=2", 1)] {
        for name in ["f32", "bf16"] {
            let ChildRun { stdout, report } = run_child(&format!("memory {name} {mesh}"), gpus, "random", 11, None);
            assert!(report.findings.is_empty(), "{name} {mesh}: {:#?}", report.findings);
            let line = stdout.lines().find_map(|line| line.strip_prefix("> [")).expect("bytes").trim_end_matches(']');
            let mut planned = vec![0; gpus];
            for (device, bytes) in line.split(", ").enumerate() {
                planned[device % gpus] += bytes.parse::<u64>().expect("a number");
            }
            // The last entry is pinned memory.
            assert_eq!(report.peak_bytes[..gpus], planned, "{name} {mesh} on {gpus} GPUs");
        }
    }
}

#[test]
fn in_bf16() {
    check("bf16", "data=1", 1, &[("random", 1)]);
    check("bf16", "data=2,stage=2", 4, &[("adversarial", 2)]);
    check("bf16", "tensor=2", 2, &[("random", 3)]);
}

/// Returns the losses that `gpt` logs. The threads of `gpt` pass no vector clocks to each other, so the race checker
/// treats them as one thread.
fn run_gpt(device: &str, mesh: &str, gpus: usize) -> Vec<f64> {
    let folder = tempfile::tempdir().expect("a folder");
    // Cargo puts the programs of all packages into one folder.
    let gpt = Path::new(env!("CARGO_BIN_EXE_dies")).with_file_name("gpt");
    assert!(gpt.is_file(), "{} does not exist: run cargo build -p shardflow-examples", gpt.display());
    let mut command = command(gpt, folder.path(), gpus, "random", 1).expect("the software device");
    command.env("SOFTWARE_CUDA_HOST", "global").args(["--device", device, "--mesh", mesh, "--log-json"]);
    let log = folder.path().join("log");
    command.arg(&log).args("--layers 4 --width 32 --heads 2 --context 16 --batch 8 --micro-batches 2".split(' '));
    command.args("--steps 3 --sample 0 --clip 1 --memory-mib 64".split(' '));
    let output = command.output().expect("gpt");
    let (stderr, log) = (String::from_utf8_lossy(&output.stderr), std::fs::read_to_string(log).unwrap_or_default());
    assert!(output.status.success(), "{device} {mesh}: {stderr}");
    if device == "cuda" {
        let report = SimReport::read(folder.path()).expect("a report");
        assert!(report.findings.is_empty(), "{mesh} on {gpus} GPUs: {:#?}", report.findings);
        assert!(report.classes["launches"] > 100, "{mesh}: too few launches on the software device");
    }
    let record = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON");
    log.lines().filter_map(|line| record(line).get("loss")?.as_f64()).collect()
}

#[test]
fn the_gpt_program_trains_on_gpus() {
    for (mesh, gpus) in [("data=1", 1), ("tensor=2", 2), ("data=2,stage=2", 4), ("data=2,stage=2,tensor=2", 8)] {
        let (got, want) = (run_gpt("cuda", mesh, gpus), run_gpt("cpu", mesh, gpus));
        assert_eq!((got.len(), want.len()), (STEPS, STEPS), "{mesh}");
        for (got, want) in got.iter().zip(&want) {
            assert!(relative(*got, *want) <= F32_MAX, "{mesh}: got {got}, expected {want}");
        }
    }
}

/// Runs every mesh with every scheduling policy of the software device.
#[test]
#[ignore = "takes an hour: run by hand"]
fn fifty_seeds_of_each_policy() {
    let cases = [
        ("data=1", 1),
        ("data=2", 2),
        ("stage=2", 2),
        ("tensor=2", 2),
        ("data=2,stage=2", 4),
        ("data=2,stage=2,tensor=2", 8),
        ("data=2", 1),
    ];
    for (policy, _) in POLICIES {
        for (mesh, gpus) in cases {
            let policies: Vec<(&str, u64)> = (0..SEEDS).map(|seed| (*policy, seed)).collect();
            check("f32", mesh, gpus, &policies);
            println!("{mesh} on {gpus} GPUs, {policy}: {SEEDS} seeds");
        }
    }
}

/// Returns the numbers of driver and library calls of a training with these steps and layers, by class and name.
fn calls(name: &str, steps: u64, layers: u64, mesh: &str, gpus: usize) -> BTreeMap<String, u64> {
    let SimReport { findings, calls, classes, .. } =
        run_child(&format!("count {name} {steps} {layers} {mesh}"), gpus, "in-order", 1, None).report;
    assert!(findings.is_empty(), "{findings:#?}");
    calls.into_iter().chain(classes).collect()
}

/// Checks the numbers of calls per step and per layer. docs/performance.md shows these numbers.
#[test]
fn a_step_neither_allocates_nor_synchronizes() {
    const MORE: u64 = 4;
    let each_step = |precision: &str, layers: u64, mesh: &str, gpus: usize| {
        let [few, many] = [2, 2 + MORE].map(|steps| calls(precision, steps, layers, mesh, gpus));
        move |name: &str| (many.get(name).unwrap_or(&0) - few.get(name).unwrap_or(&0)) as f64 / MORE as f64
    };
    let meshes = [("data=1", 1), ("data=2", 2), ("stage=2", 2), ("tensor=2", 2), ("data=2,stage=2", 1)];
    for ((mesh, gpus), precision) in meshes.into_iter().flat_map(|mesh| [(mesh, "f32"), (mesh, "bf16")]) {
        let shallow = each_step(precision, 4, mesh, gpus);
        for name in ["allocations", "frees", "synchronisations", "cuEventCreate", "cuEventDestroy_v2"] {
            assert_eq!(shallow(name), 0.0, "{precision} {mesh}: each step adds to {name}");
        }
        // Each collective writes two words. Without NCCL, each of the four devices has one collective for its gradients,
        // and two for the norm of the gradients: over its stage, and over all devices.
        let collectives = if mesh == "data=2,stage=2" { 12.0 } else { shallow("ncclAllReduce") };
        assert_eq!(shallow("cuStreamWriteValue32_v2"), 2.0 * collectives, "{precision} {mesh}");
        assert!(gpus == 1 || collectives > 0.0, "{precision} {mesh}");
        if (mesh, precision) != ("data=1", "f32") {
            continue;
        }
        let deep = each_step(precision, 8, mesh, gpus);
        let layer = |name: &str| (deep(name) - shallow(name)) / 4.0;
        let names = ["cuLaunchKernel", "cublasLtMatmul", "cuEventRecord", "cuCtxSetCurrent"];
        // Events are needed only between actions and for transfers between devices.
        assert_eq!(names.map(layer), [56.0, 36.0, 0.0, 0.0], "calls per layer, for two micro-batches and the update");
        assert_eq!(names.map(&shallow), [257.0, 150.0, 10.0, 10.0]);
        let copies = ["cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"];
        assert_eq!(copies.map(layer), [0.0, 0.0]);
        // To the device: three tensors for each micro-batch, and the decision whether to update. From the device: two
        // results, and the record of errors after each forward.
        assert_eq!(copies.map(&shallow), [7.0, 4.0]);
        assert_eq!(shallow("cuStreamWaitEvent"), 0.0);
    }
}

/// A session creates all resources of its steps when it starts. A call that creates a resource later could wait for a
/// collective on the GPU while this collective waits for the same process.
#[test]
fn the_first_step_creates_no_resources() {
    const CREATING_CALLS: [&str; 9] = [
        "allocations",
        "frees",
        "synchronisations",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuEventCreate",
        "cublasLtMatmulAlgoGetHeuristic",
        "cudnnBackendGetAttribute",
    ];
    let meshes = [("data=1", 1), ("data=2", 2), ("stage=2", 2), ("tensor=2", 2), ("data=2,stage=2", 1), ("data=3", 2)];
    for (mesh, gpus) in meshes {
        for precision in ["f32", "bf16"] {
            let [none, one] = [0, 1].map(|steps| calls(precision, steps, 2, mesh, gpus));
            assert!(one["launches"] > none.get("launches").copied().unwrap_or(0), "the step launched nothing");
            for name in CREATING_CALLS {
                assert_eq!(
                    one.get(name),
                    none.get(name),
                    "{precision} {mesh} on {gpus} GPUs: the first step adds to {name}"
                );
            }
        }
    }
}

/// Runs a session that fails because of the fault. Returns the duration of the failed step, the exit code and the
/// error.
fn failure(mesh: &str, gpus: usize, fault: &str) -> (Duration, u8, String) {
    let ChildRun { stdout, .. } = run_child(&format!("fail {mesh}"), gpus, "random", 1, Some(fault));
    let (_, result) = stdout.split_once("> ").unwrap_or_else(|| panic!("{mesh}, {fault}: {stdout}"));
    let (ms, rest) = result.split_once(" ms, code ").expect("a time");
    let (code, text) = rest.split_once(", ").expect("a code");
    let took = Duration::from_millis(ms.parse().expect("milliseconds"));
    (took, code.parse().expect("a number"), text.to_owned())
}

#[test]
fn a_killed_device_ends_the_session_with_its_cause() {
    for (mesh, gpus, launch) in [("data=1", 1, 40), ("data=2", 2, 150), ("stage=2", 2, 333), ("tensor=2", 2, 200)] {
        let device = gpus - 1;
        let (took, code, text) = failure(mesh, gpus, &format!("kill:{device}:{launch}"));
        println!("{mesh}: failed after {took:?} with exit code {code}: {text}");
        assert!(took <= LATE_MAX, "{mesh}: {took:?}: {text}");
        assert_eq!(code, 70, "{mesh}: {text}");
        // After a fault, CUDA returns the error from the next call for any stream of the device.
        let is_named = |stream: &str| {
            let actor = format!("device {device} {stream}");
            text.contains(&format!("{actor} on device {device}, action "))
                && text.contains(&format!(": stream {actor} of device {device} on cuda device {device} "))
        };
        assert!(["compute", "copy"].into_iter().any(is_named), "{mesh}: {text}");
        assert!(text.contains("CUDA_ERROR_LAUNCH_FAILED"), "{mesh}: {text}");
    }
}

#[test]
fn a_hung_device_ends_the_session_with_its_cause() {
    for (mesh, gpus, launch) in [("data=1", 1, 40), ("data=2", 2, 150), ("stage=2", 2, 333), ("tensor=2", 2, 200)] {
        let device = gpus - 1;
        let (took, code, text) = failure(mesh, gpus, &format!("hang:{device}:{launch}"));
        println!("{mesh}: failed after {took:?} with exit code {code}: {text}");
        assert!(took <= STALL + LATE_MAX, "{mesh}: {took:?}: {text}");
        assert_eq!(code, 79, "{mesh}: {text}");
        let (cause, _) = text.split_once('\n').expect("a cause and a wait chain");
        let (_, root) = cause.split_once(" ms: ").expect("a duration");
        let root = root.split(';').next().unwrap_or_default();
        let (action, state) = root.split_once(" has ").expect("an action");
        assert!(action.starts_with(&format!("device {device} compute ")), "{mesh}: {text}");
        assert_eq!(state, "not ended, and waits for no other action", "{mesh}: {text}");
    }
}

#[test]
fn devices_that_share_several_gpus() {
    check("f32", "data=2,stage=2", 2, &[("adversarial", 8)]);
    check("f32", "stage=2,tensor=2", 2, &[("random", 9)]);
    check("f32", "data=3", 2, &[("lazy", 10)]);
}

/// In bf16, cuDNN computes attention in the forward and backward pass.
#[test]
fn attention_in_bf16_runs_on_cudnn() {
    let executions = |case: &str| {
        let report = run_child(case, 1, "random", 8, None).report;
        assert!(report.findings.is_empty(), "{case}: {:#?}", report.findings);
        report.calls.get("cudnnBackendExecute").copied().unwrap_or(0)
    };
    // Each step has two micro-batches.
    assert_eq!(executions("bf16 data=1"), (STEPS * 2 * model().layers * 2) as u64);
    assert_eq!(executions("f32 data=1"), 0);
}

#[test]
fn gradients_too_large_to_square_are_clipped_or_skipped() {
    let ChildRun { report, .. } = run_child("large gradients", 2, POLICIES[0].0, 1, None);
    assert!(report.findings.is_empty(), "{:#?}", report.findings);
}
