//! Tests `gpt` under `mpirun` with MPI collectives: losses equal to those of one process within rounding, killed or
//! frozen ranks, and refused configurations. This test is built only with the feature `mpi`.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use programs::{Folder, GPT, Running, launcher, signal};

#[path = "support/programs.rs"]
mod programs;

/// Time limit of a run, much longer than any run of these tests takes.
const TIMEOUT: Duration = Duration::from_secs(100);
/// Time limit from the loss of a rank to the end of all ranks. Heartbeats detect the loss in 4 s, `mpirun` sooner.
const NOTICED_WITHIN: Duration = Duration::from_secs(15);
const MODEL: &str = "--layers 4 --heads 4 --width 32 --context 16 --batch 8 --sample 0 --threads-per-device 1 --data text \
                     --clip 1 --dropout 0.1";

/// Maximum relative difference of losses. MPI adds in another order than Shardflow, so a sum of n values may differ by
/// about n * 6e-8 of its largest value. Training for 20 steps increases the difference to a measured maximum of 2e-7.
const TOLERANCE: f64 = 1e-5;

/// Runs a command line in this folder, with the collectives of `engine`.
fn start(folder: &Folder, words: &str, engine: &str) -> Running {
    let mut words = words.split_whitespace();
    let mut command = Command::new(words.next().expect("a program"));
    command.args(words).env("SHARDFLOW_COLLECTIVES", engine).env("SHARDFLOW_SECRET", "a secret of these tests alone");
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    let mut run = folder.start(&mut command);
    // `mpirun` cannot forward SIGKILL to its processes.
    run.last_signal = "TERM";
    run
}

fn mpirun(folder: &Folder, processes: u32, flags: &str) -> Running {
    let exports = "-x SHARDFLOW_SECRET -x SHARDFLOW_COLLECTIVES";
    start(folder, &format!("mpirun --quiet --oversubscribe -n {processes} {exports} {GPT} {MODEL} {flags}"), "mpi")
}

fn losses(folder: &Folder, log: &str) -> Vec<f64> {
    folder.records(log).iter().filter_map(|record| record["loss"].as_f64()).collect()
}

fn pid_of(folder: &Folder, rank: u32) -> Option<u32> {
    folder.pid_of(&format!("OMPI_COMM_WORLD_RANK={rank}"))
}

/// Reads to the end, and returns the exit code and the output.
fn end(mut run: Running, within: Duration) -> (Option<i32>, String) {
    let code = run.end(within);
    (code, run.text())
}

#[test]
fn losses_are_those_of_one_process_within_rounding() {
    let folder = Folder::new("mpi-losses");
    let meshes = ["data=4", "tensor=4", "data=2,stage=2,tensor=2 --micro-batches 2"];
    for (number, mesh) in meshes.into_iter().enumerate() {
        let flags = format!("--steps 20 --mesh {mesh}");
        let (one, many) = (format!("one-{number}"), format!("many-{number}"));
        let (code, text) = end(start(&folder, &format!("{GPT} {MODEL} {flags} --log-json {one}"), "own"), TIMEOUT);
        assert_eq!(code, Some(0), "{text}");
        let expected = losses(&folder, &one);
        assert_eq!(expected.len(), 20);
        // With two processes, groups of four devices use Shardflow's own engine; groups of two may use MPI.
        for processes in [2, 4] {
            let (code, text) = end(mpirun(&folder, processes, &format!("{flags} --log-json {many}")), TIMEOUT);
            assert_eq!(code, Some(0), "{mesh} by {processes}:\n{text}");
            let losses = losses(&folder, &many);
            assert_eq!(losses.len(), 20, "{mesh} by {processes}:\n{text}");
            let error = losses.iter().zip(&expected).map(|(a, b)| (a - b).abs() / b.abs()).fold(0.0, f64::max);
            println!("{mesh} by {processes}: losses differ by {error:.1e}");
            assert!(error <= TOLERANCE, "{mesh} by {processes}: off by {error}: got {losses:?}, expected {expected:?}");
        }
    }
}

#[test]
fn a_killed_or_frozen_rank_ends_all_in_time_with_an_error_code() {
    let folder = Folder::new("mpi-lost");
    for (rank, name) in [(1, "KILL"), (3, "KILL"), (2, "STOP")] {
        let log = format!("log-{rank}-{name}");
        let mut run = mpirun(&folder, 4, &format!("--mesh data=2,tensor=2 --steps 100000 --log-json {log}"));
        let deadline = Instant::now() + TIMEOUT;
        while losses(&folder, &log).len() < 20 {
            assert!(Instant::now() < deadline && run.child.try_wait().expect("a child").is_none(), "{rank} {name}");
            thread::yield_now();
        }
        let pid = pid_of(&folder, rank).expect("a running rank");
        signal(pid, name);
        let began = Instant::now();
        let (code, text) = end(run, NOTICED_WITHIN);
        println!("rank {rank} {name}: all ended after {:?} with {code:?}", began.elapsed());
        assert!(code.is_some_and(|code| code != 0), "rank {rank} {name}: {code:?}\n{text}");
        assert!((0..4).all(|rank| pid_of(&folder, rank).is_none()), "rank {rank} {name}: some processes are left");
    }
}

#[test]
fn mpi_collectives_without_mpirun_are_refused() {
    let folder = Folder::new("mpi-refused");
    // Shardflow's launcher starts the processes, so MPI sees each process as a world of one rank.
    let flags = "--mesh data=2 --steps 2";
    let launch = format!("{} launch --nproc-per-node 2 -- {GPT} {MODEL} {flags}", launcher().display());
    let (code, text) = end(start(&folder, &launch, "mpi"), TIMEOUT);
    assert_eq!(code, Some(78), "{text}");
    assert!(text.contains("start the processes with `mpirun -n 2`"), "{text}");
    let (code, text) = end(start(&folder, &format!("{GPT} {MODEL} {flags}"), "nccl"), TIMEOUT);
    assert!(code == Some(78) && text.contains("expected own or mpi"), "{code:?} {text}");
}
