//! The CUDA backend on software devices: the suite of every backend, with engines for one GPU and for many. Each test starts
//! this program again, so that the dynamic linker finds the software device in the place of NVIDIA's libraries; what the
//! device finds wrong fails the test. Imports the kernels and the software device.

use std::sync::Arc;
use std::time::Duration;

use shardflow_kernels::collective::Collective;
use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::conformance::{self, Failure};
use shardflow_kernels::cuda::gpu::Gpu;
use shardflow_kernels::cuda::local::Local;
use shardflow_kernels::cuda::nccl::{Nccl, Seat, UniqueId};
use shardflow_kernels::device::Device;
use shardflow_kernels::error::KernelError;
use shardflow_kernels::memory::Arena;
use shardflow_software_cuda::{Report, command};

/// Names what the child does.
const CASE: &str = "SHARDFLOW_TEST_CASE";

/// For members of a group to join each other.
const WITHIN: Duration = Duration::from_secs(30);

fn report(failures: &[Failure]) {
    let lines: Vec<String> = failures.iter().take(20).map(|f| f.to_string().chars().take(600).collect()).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), lines.join("\n"));
}

fn gpus() -> Vec<Arc<Gpu>> {
    (0..Gpu::count().expect("a driver")).map(|ordinal| Gpu::open(ordinal).expect("a device")).collect()
}

fn arenas(devices: impl Iterator<Item = Device>) -> Result<Vec<(Device, Arena)>, KernelError> {
    let with_arena = |device: Device| device.arena(conformance::COLLECTIVES_ARENA_BYTES).map(|arena| (device, arena));
    devices.map(with_arena).collect()
}

/// Several devices of a mesh on one GPU.
fn shared(engine: &dyn Fn() -> Arc<dyn Collective>) {
    let gpu = Gpu::open(0).expect("a device");
    let make = |n| {
        let engine = engine();
        arenas((0..n).map(|rank| Device::cuda(rank, gpu.clone(), engine.clone())))
    };
    report(&conformance::run_collectives(&make));
}

/// A GPU for each device.
fn nccl() {
    let gpus = gpus();
    let make = |n: usize| {
        let mut seats = Vec::new();
        for group in conformance::collectives_groups(n) {
            let id = UniqueId::new()?;
            let seat = |member: usize| Seat { group: group.clone(), member, gpu: gpus[member].clone(), id };
            seats.extend((0..n).map(seat));
        }
        let engine = Arc::new(Nccl::join(&seats, WITHIN)?);
        arenas((0..n).map(|rank| Device::cuda(rank, gpus[rank].clone(), engine.clone())))
    };
    report(&conformance::run_collectives_unordered(&make, gpus.len()));
}

#[test]
#[ignore = "started by the other tests, on software devices"]
fn child() {
    match std::env::var(CASE).as_deref() {
        Ok("alone") => {
            let gpu = Gpu::open(0).expect("a device");
            report(&conformance::run_alone(&Device::cuda(0, gpu, Arc::new(Local::new()))));
        }
        Ok("local") => shared(&|| Arc::new(Local::new())),
        Ok("staged") => shared(&|| Arc::new(InProcess::new())),
        Ok("nccl") => nccl(),
        other => panic!("no such case: {other:?}"),
    }
}

fn run(case: &str, devices: usize, policy: &str, seed: u64) {
    let folder = tempfile::tempdir().expect("a folder");
    let program = std::env::current_exe().expect("this program");
    let mut child = command(program, folder.path(), devices, policy, seed).expect("the software device");
    let output =
        child.args(["--ignored", "--exact", "child", "--nocapture"]).env(CASE, case).output().expect("a child");
    let text = String::from_utf8_lossy(&output.stderr);
    let tail: String = text.lines().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    assert!(output.status.success(), "{case}, {policy}, seed {seed}:\n{tail}");
    let found = Report::read(folder.path()).expect("a report");
    assert!(found.findings.is_empty(), "{case}, {policy}, seed {seed}: {:#?}", found.findings);
}

#[test]
fn ops_and_streams() {
    run("alone", 1, "random", 1);
}

#[test]
fn devices_that_share_a_gpu() {
    run("local", 1, "random", 2);
}

#[test]
fn an_engine_of_the_host() {
    run("staged", 1, "random", 3);
}

#[test]
fn devices_with_a_gpu_each() {
    run("nccl", 4, "random", 4);
}
