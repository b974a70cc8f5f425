//! Training on GPUs that software plays, in several processes of one node: on any mesh the losses of CPU devices within a
//! tolerance, and nothing wrong in what any process asked of the driver. Every process sees all GPUs of the node, as on a real
//! one, and uses its share. Each process is this test program, on a software device of its own: what goes between GPUs of two
//! processes goes by the software NCCL's sockets, or by the program's own.

use std::path::Path;
use std::process::{Child, Stdio};

use shardflow::cluster::env::{Endpoint, Launch, Secret, SecretSource, Source, World};
use shardflow::cluster::{Cluster, ClusterOptions};
use shardflow::passes::CompileOptions;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::session::SessionOptions;
use shardflow_integration_tests::training::{Model, Scratch, options, relative};
use shardflow_kernels::device::DeviceKind;
use shardflow_software_cuda::{CASE, Report, command};

const STEPS: usize = 3;
/// Relative difference of losses from the CPU backend's: sums in another order, other roundings of exp and erf.
const LOSS_MAX: f64 = 1e-4;

fn model() -> Model {
    Model { layers: 4, heads: 2, width: 16, context: 8, batch: 8, dropout: 0.1, max_norm: 1.0 }
}

fn settings(device: DeviceKind) -> CompileOptions {
    CompileOptions { device, ..options(2, OneFOneB) }
}

/// A process of so many, which meet at a socket.
fn cluster(process: u32, processes: u32, meet: &Path) -> Cluster {
    let world = World {
        process,
        processes,
        local_process: process,
        local_processes: processes,
        node: Some(0),
        endpoint: Endpoint::Unix(meet.into()),
        secret: SecretSource::Text(Secret::new("a secret of these tests", "this test").expect("long enough")),
        restart: 0,
        source: Source::Shardflow,
        run_id: "gpu_processes".into(),
    };
    Cluster::new(Launch::World(world), ClusterOptions::default())
}

#[test]
#[ignore = "started by the other tests, on software devices"]
fn child() {
    let case = std::env::var(CASE).expect("a case");
    let [mesh, process, processes, meet] = case.split(' ').collect::<Vec<_>>()[..] else { panic!("a case: {case}") };
    let number = |text: &str| text.parse().expect("a number");
    let cluster = cluster(number(process), number(processes), Path::new(meet));
    let options = SessionOptions { cluster, ..SessionOptions::default() };
    let trained = model().train_among(mesh, &settings(DeviceKind::Cuda), STEPS, &options);
    println!("\n> {:?}", trained.losses);
}

/// Trains in so many processes, on a node of so many GPUs; gives what each process saw.
fn train(mesh: &str, processes: u32, gpus: usize, policy: &str, seed: u64) -> Vec<Vec<f64>> {
    let scratch = Scratch::new(&format!("gpu-processes-{seed}"));
    let meet = scratch.path().join("meet.sock");
    let folder = |process: u32| scratch.path().join(process.to_string());
    let start = |process: u32| -> Child {
        let program = std::env::current_exe().expect("this program");
        let mut child = command(program, &folder(process), gpus, policy, seed + u64::from(process));
        let child = child.as_mut().expect("the software device");
        child.args(["--ignored", "--exact", "child", "--nocapture"]);
        child.env(CASE, format!("{mesh} {process} {processes} {}", meet.display()));
        child.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a child")
    };
    let children: Vec<Child> = (0..processes).map(start).collect();
    // All of them, before any is judged: the one that failed first says why.
    let ended: Vec<_> = children.into_iter().map(|child| child.wait_with_output().expect("a child")).collect();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said: String = ended.iter().map(|output| text(&output.stderr)).collect();
    let losses = |(process, output): (u32, &std::process::Output)| {
        let at = format!("{mesh}, process {process} of {processes}, {policy}, seed {seed}");
        assert!(output.status.success(), "{at}:\n{said}");
        let report = Report::read(&folder(process)).expect("a report");
        assert!(report.findings.is_empty(), "{at}: {:#?}", report.findings);
        let said = text(&output.stdout);
        let line = said.lines().find_map(|line| line.strip_prefix("> [")).expect("losses").trim_end_matches(']');
        line.split(", ").map(|loss| loss.parse().expect("a number")).collect()
    };
    (0..).zip(&ended).map(losses).collect()
}

fn check(mesh: &str, processes: u32, gpus: usize, policy: &str, seed: u64) {
    let cpu = model().train(mesh, &settings(DeviceKind::Cpu), STEPS);
    let all = train(mesh, processes, gpus, policy, seed);
    for (process, losses) in all.iter().enumerate() {
        assert_eq!(losses.len(), STEPS);
        assert_eq!(losses, &all[0], "all processes see the same");
        for (step, (got, want)) in losses.iter().zip(&cpu.losses).enumerate() {
            let difference = relative(*got, f64::from(*want));
            let at = format!("{mesh}, process {process} of {processes}, step {step}");
            assert!(difference <= LOSS_MAX, "{at}: {got} against {want}: {difference:e}");
        }
    }
}

#[test]
fn a_gpu_for_each_of_two_processes() {
    check("data=2", 2, 2, "random", 10);
    check("stage=2", 2, 2, "adversarial", 20);
    check("tensor=2", 2, 2, "lazy", 30);
}

#[test]
fn two_gpus_for_each_of_two_processes() {
    check("data=2,stage=2", 2, 4, "random", 40);
    check("stage=2,tensor=2", 2, 4, "adversarial", 50);
}

#[test]
fn devices_that_do_not_divide_evenly() {
    check("data=3", 2, 3, "random", 60);
}
