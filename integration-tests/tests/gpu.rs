//! Training on GPUs that software plays: on any mesh the losses of CPU devices within a tolerance, with a GPU for each device and
//! with all devices on one, and nothing wrong in what the driver was asked. Each case runs in a child, so that the dynamic
//! linker finds the software device in the place of NVIDIA's libraries.

use shardflow::passes::CompileOptions;
use shardflow::passes::precision::Precision;
use shardflow::plan::Schedule::OneFOneB;
use shardflow_integration_tests::training::{Model, options, relative};
use shardflow_kernels::device::DeviceKind;
use shardflow_software_cuda::{CASE, Ran, run_child};

const STEPS: usize = 3;
/// Relative difference of losses from the CPU backend's: sums in another order, other roundings of exp and erf.
const F32_MAX: f64 = 1e-4;

fn model() -> Model {
    Model { layers: 4, heads: 2, width: 16, context: 8, batch: 8, dropout: 0.1, max_norm: 1.0 }
}

fn settings(device: DeviceKind, precision: Precision) -> CompileOptions {
    CompileOptions { device, precision, ..options(2, OneFOneB) }
}

#[test]
#[ignore = "started by the other tests, on software devices"]
fn child() {
    let mesh = std::env::var(CASE).expect("a mesh");
    let trained = model().train(&mesh, &settings(DeviceKind::Cuda, Precision::F32), STEPS);
    println!("\n> {:?}", trained.losses);
}

/// The losses of a training on so many GPUs.
fn train(mesh: &str, gpus: usize, policy: &str, seed: u64) -> Vec<f64> {
    let Ran { stdout: said, report } = run_child(mesh, gpus, policy, seed, None);
    assert!(report.findings.is_empty(), "{mesh} on {gpus} GPUs, {policy}, seed {seed}: {:#?}", report.findings);
    let line = said.lines().find_map(|line| line.strip_prefix("> [")).expect("losses").trim_end_matches(']');
    line.split(", ").map(|loss| loss.parse().expect("a number")).collect()
}

fn check(mesh: &str, gpus: usize, policy: &str, seed: u64) {
    let cpu = model().train(mesh, &settings(DeviceKind::Cpu, Precision::F32), STEPS);
    let losses = train(mesh, gpus, policy, seed);
    assert_eq!(losses.len(), STEPS);
    for (step, (got, want)) in losses.iter().zip(&cpu.losses).enumerate() {
        let difference = relative(*got, f64::from(*want));
        assert!(difference <= F32_MAX, "{mesh} on {gpus} GPUs, step {step}: {got} against {want}: {difference:e}");
    }
}

#[test]
fn one_device() {
    check("data=1", 1, "random", 1);
}

#[test]
fn a_gpu_for_each_device() {
    check("data=2", 2, "random", 2);
    check("stage=2", 2, "adversarial", 3);
    check("tensor=2", 2, "lazy", 4);
}

#[test]
fn all_parallelisms_at_once() {
    check("data=2,stage=2,tensor=2", 8, "random", 5);
}

#[test]
fn devices_that_share_a_gpu() {
    check("data=2,stage=2", 1, "random", 6);
    check("tensor=2", 1, "lazy", 7);
}
